"""The benchmark of one round: its updates are FedAvg's, its reconstructions those of the app."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import one_round
from ferret_flwr.config import FerretConfig, parse
from ferret_flwr.ledger import Header, Ledger
from ferret_flwr.projection.kernels import reference
from ferret_flwr.projection.kernels.philox import derive_seed
from ferret_flwr.projection.layout import Layout
from ferret_flwr.rounds import next_plan
from ferret_flwr.training.tensors import load_masters, masters_of
from ferret_flwr.training.worker import Node

SETTINGS = {
    "strategy.min-available-nodes": 2,
    "train.steps": 2,
    "train.seq-length": 128,
    "dataset.max-examples": 60,
    "evaluate.max-examples": 8,
    "evaluate.generate-examples": 0,
    "ferret.coefficients": 256,
}


@pytest.fixture(scope="module")
def two_rounds() -> list[one_round.Round]:
    config = parse(SETTINGS)
    return list(one_round.rounds([Node.of(config, i, 2) for i in range(2)], 2))


def flat(arrays: list[np.ndarray]) -> np.ndarray:
    return np.concatenate([array.ravel() for array in arrays])


def test_rounds_are_those_of_fedavg(two_rounds: list[one_round.Round]) -> None:
    config = parse(SETTINGS)
    first, second = two_rounds
    nodes = [Node.of(config, i, 2) for i in range(2)]
    parameters = nodes[0].worker.parameters
    now = first.before
    for number, this in ((1, first), (2, second)):
        ends = []
        for node in nodes:
            load_masters(parameters, now)
            node.train(number)
            ends.append(flat(masters_of(parameters)))
        np.testing.assert_allclose(flat(this.before), flat(now), atol=1e-6)
        average = flat(now) - np.mean(ends, axis=0)
        np.testing.assert_allclose(flat(this.average), average, atol=1e-6)
        now = [a - b for a, b in zip(now, this.average, strict=True)]
    assert first.previous is None and second.previous is not None
    np.testing.assert_array_equal(flat(second.previous), flat(first.average))


@pytest.mark.parametrize(("own", "rate"), [(False, 1.0), (True, 1.0), (True, 0.5)])
def test_a_reconstruction_is_what_the_server_would_publish(
    two_rounds: list[one_round.Round], own: bool, rate: float
) -> None:
    first = two_rounds[0]
    layout = Layout(("all",), ((flat(first.before).size,),))
    bases = "per-client" if own else "shared"
    config = FerretConfig(coefficients=256, bases=bases, server_rate=rate)
    whole = one_round.Round(1, [flat(first.before)], [[flat(u)] for u in first.updates], None)
    (found,) = one_round.reconstruction(whole, layout, config, seed=5)

    plan = next_plan(Ledger(Header("layout", layout.size, "base")), config, 5)
    seeds = [derive_seed(plan.seed, i) if own else plan.seed for i in range(2)]
    expected = np.zeros(layout.size)
    for seed, update in zip(seeds, first.updates, strict=True):
        gamma = reference.project(flat(update), plan.with_seed(seed))
        hat = reference.reconstruct(gamma.astype(np.float32), plan.with_seed(seed))
        expected += rate * hat / 2
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())
    assert np.abs(found + expected).max() > np.abs(expected).max()


def test_from_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.toml"
    lines = (f"{key} = {value}" for key, value in SETTINGS.items())
    recipe.write_text("\n".join(lines))
    options = ["--recipe", recipe, "--seeds", "1", "2", "--output", tmp_path / "out"]
    more = ["--set", "train.optimizer=AdamW", "train.learning-rate=0.001"]
    monkeypatch.setattr(sys, "argv", ["one_round", *map(str, options), *more])
    assert one_round.main() == 0
    figures = json.loads((tmp_path / "out" / "one-round.json").read_text())
    first, second = figures["rounds"]
    assert figures["settings"]["train.optimizer"] == "AdamW"
    assert len(second["lost"]["interleaved"]) == 2
    assert set(second["lost"]) - set(first["lost"]) == {
        f"contiguous, L = 16, {allocation}" for allocation in ("norm", "variance", "energy")
    }
    assert np.mean(second["lost"]["K = 2048"]) < np.mean(second["lost"]["K = 32"])
    assert (tmp_path / "out" / "one-round.png").stat().st_size > 10_000
    assert "interleaved" in capsys.readouterr().out

    monkeypatch.setattr(sys, "argv", ["one_round", *map(str, options), "--set", "train.step=1"])
    assert one_round.main() == 2
    assert "did you mean 'train.steps'?" in capsys.readouterr().err
