"""Nodes that lie: robust inner strategies go on learning where the mean does not.

The guards of `Ferret` are off unless a test says otherwise, so that what is tested is the strategy.
"""

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from flwr.common import FitRes, ndarrays_to_parameters, parameters_to_ndarrays
from flwr.server.strategy import Bulyan, FedAvg, FedMedian, FedTrimmedAvg, Krum, Strategy

from ferret_flwr.config import FerretConfig
from ferret_flwr.flower import inner
from ferret_flwr.projection.layout import InterleavedBlocks, Layout
from ferret_flwr.projection.plan import RoundPlan
from ferret_flwr.projection.projection import project
from ferret_flwr.rounds import bases_per_block, blocks_for
from tests.flower.conftest import OK, InProcess
from tests.flower.small import UNTRAINED, SmallFederation

NODES, LIARS, ROUNDS = 10, 3, 8  # 30 %
BULYAN_NODES = 15  # it bears (n - 3) / 4 liars and no more
LEARNS = 0.75 * UNTRAINED


def random_vector(honest: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Return noise ten times as long as the honest coefficients."""
    noise = generator.standard_normal(honest.shape)
    return noise * 10 * np.linalg.norm(honest) / np.linalg.norm(noise)


ATTACKS: dict[str, Callable[[np.ndarray, np.random.Generator], np.ndarray]] = {
    "sign flip": lambda honest, _: -honest,
    "sign flip x 10": lambda honest, _: -10 * honest,
    "scale x 100": lambda honest, _: 100 * honest,
    "random": random_vector,
    "NaN": lambda honest, _: np.full_like(honest, np.nan),
}
FINITE = [name for name in ATTACKS if name != "NaN"]
ROBUST: dict[str, Callable[[], Strategy]] = {
    "FedMedian": lambda: FedMedian(fraction_evaluate=0.0),
    "FedTrimmedAvg": lambda: FedTrimmedAvg(fraction_evaluate=0.0, beta=0.3),
    "Krum": lambda: Krum(fraction_evaluate=0.0, num_malicious_clients=LIARS),
    "MultiKrum": lambda: Krum(
        fraction_evaluate=0.0, num_malicious_clients=LIARS, num_clients_to_keep=NODES - LIARS
    ),
    "Bulyan": lambda: Bulyan(fraction_evaluate=0.0, num_malicious_clients=LIARS, to_keep=0),
}


def loss_after(
    folder: Path, strategy: Strategy, attack: str, ratio: float = 0.0, nodes: int = NODES
) -> float:
    """Return the held-out loss after `ROUNDS` rounds with `LIARS` liars."""
    federation = SmallFederation(folder, nodes, LIARS, ATTACKS[attack])
    server = federation.ferret(strategy, max_norm_ratio=ratio)
    federation.run(server, ROUNDS)
    return federation.loss(server.replica)


@pytest.mark.parametrize("attack", FINITE)
@pytest.mark.parametrize("name", ROBUST)
def test_robust_strategies_keep_learning(name: str, attack: str, tmp_path: Path) -> None:
    nodes = BULYAN_NODES if name == "Bulyan" else NODES
    assert loss_after(tmp_path, ROBUST[name](), attack, nodes=nodes) < LEARNS


@pytest.mark.parametrize("attack", FINITE[1:])
def test_the_mean_does_not(attack: str, tmp_path: Path) -> None:
    assert loss_after(tmp_path, FedAvg(fraction_evaluate=0.0), attack) > UNTRAINED


def test_a_plain_sign_flip_slows_the_mean(tmp_path: Path) -> None:
    """Of ten nodes three cancel three: the mean goes 0.4 of the way and in the right direction."""
    flipped = loss_after(tmp_path / "a", FedAvg(fraction_evaluate=0.0), "sign flip")
    robust = loss_after(tmp_path / "b", ROBUST["MultiKrum"](), "sign flip")
    assert LEARNS < flipped < UNTRAINED
    assert robust < LEARNS


@pytest.mark.parametrize(("attack", "ratio"), [("NaN", 0.0), ("scale x 100", 10.0)])
def test_with_the_guards_the_round_is_that_of_the_honest(
    attack: str, ratio: float, tmp_path: Path
) -> None:
    attacked = SmallFederation(tmp_path / "attacked", NODES, LIARS, ATTACKS[attack])
    server = attacked.ferret(FedAvg(fraction_evaluate=0.0), max_norm_ratio=ratio)
    attacked.run(server, ROUNDS)
    assert sorted(server.refused) == [f"node {i} (partition {i})" for i in range(LIARS)]
    honest = SmallFederation(tmp_path / "honest", NODES)
    honest.proxies = honest.proxies[LIARS:]
    alone = honest.ferret(FedAvg(fraction_evaluate=0.0), max_norm_ratio=ratio)
    honest.run(alone, ROUNDS)
    assert server.ledger.head == alone.ledger.head


def replies(rows: np.ndarray) -> list[inner.FitResult]:
    """Return each row as the reply of a node."""
    return [
        (
            InProcess(i, None),  # type: ignore[arg-type]
            FitRes(OK, ndarrays_to_parameters([row.astype(np.float32)]), 1, {}),
        )
        for i, row in enumerate(rows)
    ]


@pytest.mark.parametrize("name", ["FedAvg", "FedMedian", "Krum", "Bulyan"])
def test_most_strategies_of_flowers_do_not_bear_a_nan_by_themselves(name: str) -> None:
    """Krum even chooses it. So `check_reply` refuses it before, and has no switch."""
    rows = np.random.default_rng(0).standard_normal((BULYAN_NODES, 16))
    rows[0, 3] = np.nan
    strategy = ROBUST[name]() if name in ROBUST else FedAvg()
    try:
        aggregated, _ = strategy.aggregate_fit(1, replies(rows), [])
    except ValueError:
        assert name == "Bulyan"  # it looks for the reply that Krum chose, and NaN equals nothing
        return
    (found,) = parameters_to_ndarrays(aggregated)
    assert not np.isfinite(found).all()


def test_too_few_replies_for_bulyan_publish_nothing_and_say_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    federation = SmallFederation(tmp_path, NODES)
    server = federation.ferret(ROBUST["Bulyan"]())
    with caplog.at_level(logging.ERROR):
        federation.run(server, 1)
    assert len(server.ledger) == 0
    assert "round 1 is not published: Bulyan" in caplog.text
    assert "4 * num_malicious + 3" in caplog.text


SIZE, SEEDS = 20_000, 40
PLANS = {
    "interleaved": {},
    "interleaved, truncated normal": {"family": "truncated-normal"},
    "contiguous": {"blocks": 8, "allocation": "energy"},
    "contiguous, truncated normal": {"blocks": 8, "family": "truncated-normal"},
}


class Kept(FedAvg):
    """Not a mean, so it is shown what a strategy that compares lengths is shown."""

    def aggregate_fit(self, server_round, results, failures):  # type: ignore[no-untyped-def]
        self.rows = [parameters_to_ndarrays(reply.parameters)[0] for _, reply in results]
        return results[0][1].parameters, {}


def squared_distances(settings: dict[str, object], seed: int) -> tuple[float, float, float]:
    """Return ‖Δ_0 − Δ_1‖², what the strategy sees of it and what γ alone would say."""
    config = FerretConfig(coefficients=256, **settings)  # type: ignore[arg-type]
    blocks = blocks_for(SIZE, config)
    uneven = 4.0 ** np.arange(blocks.count)  # energies that differ from block to block
    counts = None
    if not isinstance(blocks, InterleavedBlocks):
        counts = bases_per_block(uneven, blocks, config)
    plan = RoundPlan(1, seed, config.family, blocks, counts)
    pair = np.random.default_rng(5).standard_normal((2, SIZE)).astype(np.float32)
    layout = Layout(("w",), ((SIZE,),))
    rows = np.stack([project([row], layout, plan) for row in pair])
    strategy = Kept()
    returned, _ = inner.aggregate(strategy, plan, 1, replies(rows), [], 2)
    np.testing.assert_allclose(returned, rows[0], rtol=1e-5)
    first, second = (row.astype(np.float64) for row in strategy.rows)
    alone = rows.astype(np.float64)
    truth = np.square(pair[0].astype(np.float64) - pair[1]).sum()
    return truth, np.square(first - second).sum(), np.square(alone[0] - alone[1]).sum()


@pytest.mark.parametrize("name", PLANS)
def test_distances_are_those_of_the_updates(name: str) -> None:
    """Their squares are unbiased, with variance 2 Σ_l ‖Δ_l‖⁴ / K_l at most."""
    found = np.array([squared_distances(PLANS[name], seed) for seed in range(SEEDS)])
    truth, seen, alone = found.T
    # Every block has about its share of a normal update, and the fewest bases of a block are 1.
    blocks = PLANS[name].get("blocks", 256)
    relative = np.sqrt(2 / blocks)  # standard deviation of one draw, at most
    tolerance = 4 * relative / np.sqrt(SEEDS)
    assert abs((seen / truth).mean() - 1) < tolerance
    if name != "interleaved":  # where the factor is 1
        assert abs((alone / truth).mean() - 1) > tolerance


def test_multi_krum_leaves_out_the_nodes_that_it_would_in_parameter_space() -> None:
    config = FerretConfig(coefficients=256)
    plan = RoundPlan(1, 3, "rademacher", blocks_for(SIZE, config))
    generator = np.random.default_rng(7)
    updates = generator.standard_normal((NODES, SIZE)) + 1.0
    updates[:LIARS] *= -1.0
    layout = Layout(("w",), ((SIZE,),))
    rows = np.stack([project([row.astype(np.float32)], layout, plan) for row in updates])
    aggregated, _ = inner.aggregate(ROBUST["MultiKrum"](), plan, 1, replies(rows), [], NODES)
    np.testing.assert_allclose(aggregated, rows[LIARS:].mean(axis=0), rtol=1e-4, atol=1e-3)
    whole, _ = ROBUST["MultiKrum"]().aggregate_fit(1, replies(updates), [])
    (kept,) = parameters_to_ndarrays(whole)
    np.testing.assert_allclose(kept, updates[LIARS:].mean(axis=0), rtol=1e-3, atol=1e-3)
