"""What a run with noise says of (ε, δ), also when it goes on where another one stopped."""

import json
import logging
from pathlib import Path

import pytest

from ferret_flwr.accounting import epsilon
from ferret_flwr.config import ConfigError, parse
from ferret_flwr.flower.recording import Recorded
from ferret_flwr.flower.serverapp import Run
from tests.flower.conftest import SETTINGS, Federation

NOISE, DELTA = 2.0, 1e-4
CENTRAL = SETTINGS | {
    "evaluate.every": 0,
    "privacy.mechanism": "central-fixed",
    "privacy.noise-multiplier": NOISE,
    "privacy.delta": DELTA,
}


def rows_after(folder: Path, rounds: int, **settings: object) -> tuple[list[dict], Path]:
    """Run up to round ``rounds``; return the rows of results.json, and its folder."""
    keys = {key.replace("_", "-").replace("--", "."): value for key, value in settings.items()}
    config = parse(
        CENTRAL | {"results-dir": str(folder), "num-server-rounds": rounds} | keys  # type: ignore[arg-type]
    )
    federation = Federation(config, folder / "cache")
    run = Run(config)
    federation.run(Recorded(run.strategy, run._on_row, run.done), rounds - run.done)
    run._on_end()
    return json.loads((run.folder / "results.json").read_text())["rounds"], run.folder


def test_each_round_says_what_has_been_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="ferret_flwr")
    rows, _ = rows_after(tmp_path, 2)
    told = [epsilon(rounds / NOISE**2, DELTA) for rounds in range(3)]
    assert [row["privacy/epsilon"] for row in rows] == told
    assert [row["privacy/epsilon_round"] for row in rows] == [told[1]] * 3
    assert [row["privacy/delta"] for row in rows] == [DELTA] * 3
    assert f"ε {told[1]:.3g} at δ 0.0001" in caplog.text
    assert f"this run is ({told[2]:.4g}, 0.0001)-differentially private" in caplog.text
    assert not any({"train/loss", "ferret/fidelity"} & row.keys() for row in rows)
    assert rows[1]["nodes"] == 2


def test_without_noise_nothing_is_claimed(tmp_path: Path) -> None:
    plain = {"privacy__mechanism": "none", "privacy__noise_multiplier": 1.0}
    rows, folder = rows_after(tmp_path, 1, **plain, privacy__delta=1e-5)
    assert "train/loss" in rows[1]
    assert not any(key.startswith("privacy") for row in rows for key in row)
    with pytest.raises(ConfigError, match="'central-fixed' cannot continue .* results.json"):
        rows_after(tmp_path, 2, ferret__resume=str(folder / "ledger.safetensors"))


def test_local_noise_is_accounted_between_any_two_data_sets(tmp_path: Path) -> None:
    rows, _ = rows_after(tmp_path, 2, privacy__mechanism="local")
    assert rows[2]["privacy/epsilon"] == epsilon(2 * 4 / NOISE**2, DELTA)


@pytest.mark.parametrize("killed", [False, True])
def test_a_resumed_run_goes_on_counting(killed: bool, tmp_path: Path) -> None:
    """A server that is killed while it evaluates has published a round and not said so."""
    rows, folder = rows_after(tmp_path, 2)
    if killed:
        path = folder / "results.json"
        content = json.loads(path.read_text())
        content["rounds"].pop()
        path.write_text(json.dumps(content))
    rows, _ = rows_after(tmp_path, 3, ferret__resume=str(folder / "ledger.safetensors"))
    assert rows[-1]["round"] == 3
    assert rows[-1]["privacy/spent"] == 3 / NOISE**2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"privacy__mechanism": "none"}, "'privacy.noise-multiplier' = 2.0 is for"),
        ({"method": "fedavg"}, "needs 'method' = 'ferret'"),
        ({"strategy__name": "fedmedian"}, "needs 'strategy.name' = 'fedavg': the noise is for"),
        ({"ferret__bases": "per-client"}, "needs 'ferret.bases' = 'shared'"),
        ({"strategy__fraction_evaluate": 0.5}, "needs 'strategy.fraction-evaluate' = 0.0"),
        ({"privacy__mechanism": "local", "ferret__blocks": 4}, "needs 'ferret.blocks' = 0"),
        (
            {"privacy__mechanism": "local", "ferret__family": "truncated-normal"},
            "needs 'ferret.family' = 'rademacher'",
        ),
        (
            {"privacy__mechanism": "central-adaptive"},
            "'privacy.noise-multiplier' must be less than twice 'privacy.count-stddev' = 1.0",
        ),
        ({"privacy__clipped_share": 0.2}, "is for 'privacy.mechanism' = 'central-adaptive', got"),
    ],
    ids=lambda value: "" if isinstance(value, dict) else None,
)
def test_what_would_make_it_false_is_refused(
    settings: dict[str, object], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        rows_after(tmp_path, 1, **settings)


def test_adaptive_clipping_runs(tmp_path: Path) -> None:
    adaptive = {"privacy__mechanism": "central-adaptive", "privacy__count_stddev": 4.0}
    rows, _ = rows_after(tmp_path, 2, **adaptive)
    price = 1 / NOISE**2 - 1 / 8**2 + 1 / 4**2
    assert rows[2]["privacy/spent"] == pytest.approx(2 * price)
