"""A run under Flower computes what a plain loop computes, however it is interrupted."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
from flwr.common import GetPropertiesIns
from flwr.server.strategy import FedMedian

from ferret_flwr.config import Config, parse
from ferret_flwr.ledger import Ledger
from ferret_flwr.methods.ferret import local_round
from ferret_flwr.projection.kernels.philox import derive_seed
from ferret_flwr.replica import Replica
from ferret_flwr.rounds import next_plan, publish, server_rate
from ferret_flwr.training.models import load_model
from ferret_flwr.training.tensors import masters_of, trainable_parameters
from ferret_flwr.training.worker import Node
from tests.flower.conftest import SETTINGS, Federation, InProcess

ROUNDS = 3


def fresh_replica(config: Config) -> Replica:
    """Return a replica of the base model that nothing else moves."""
    parameters = trainable_parameters(load_model(config.model).model)
    from ferret_flwr.projection.layout import Layout

    return Replica(Layout.of(parameters), masters_of(parameters))


def weighted_mean(rows: list[np.ndarray], weights: list[int]) -> np.ndarray:
    """Average in float32 in the order of Flower's FedAvg."""
    total = sum(weights)
    mean = rows[0] * (weights[0] / total)
    for row, weight in zip(rows[1:], weights[1:], strict=True):
        mean = mean + row * (weight / total)
    return mean


def plain_loop(config: Config, rounds: int = ROUNDS, nodes: int = 2) -> Ledger:
    """Run Ferret without Flower."""
    replica = fresh_replica(config)
    members = [Node.of(config, i, nodes) for i in range(nodes)]
    ledger = Ledger(replica.header)
    for number in range(1, rounds + 1):
        plan = next_plan(ledger, config.ferret, config.seed)
        rows, seeds = [], []
        for node in members:
            own = plan
            if config.ferret.bases == "per-client":
                own = plan.with_seed(derive_seed(plan.seed, node.partition_id))
            update, _ = local_round(
                replica,
                node.worker.parameters,
                own,
                partial(node.train, number),
            )
            rows.append(update.coefficients)
            seeds.append(own.seed)
        weights = [len(node.examples) for node in members]
        rate = server_rate(config.ferret, plan, ledger, config.num_server_rounds)
        if config.ferret.bases == "per-client":
            shares = np.array(weights, dtype=np.float64) / sum(weights)
            ledger = ledger.append(publish(plan, np.stack(rows) * shares[:, None], rate, seeds))
        else:
            ledger = ledger.append(publish(plan, weighted_mean(rows, weights), rate))
        replica.follow(ledger)
        ledger = ledger.with_fingerprint(replica.fingerprint)
    return ledger


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"ferret.bases": "per-client"},
        {"ferret.family": "truncated-normal"},
        {"ferret.blocks": 32, "ferret.allocation": "energy"},
        {
            "ferret.blocks": 32,
            "ferret.family": "truncated-normal",
            "ferret.allocation": "variance",
        },
        {"model.dtype": "bfloat16"},
        {"train.optimizer": "AdamW", "train.learning-rate": 0.001},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())) or "defaults",
)
def test_flower_equals_plain_loop(settings: dict[str, str], tmp_path: Path) -> None:
    config = parse(SETTINGS | settings)
    federation = Federation(config, tmp_path)
    strategy = federation.ferret(replica=fresh_replica(config))
    federation.run(strategy, ROUNDS)
    expected = plain_loop(config)
    assert strategy.ledger.head == expected.head
    assert strategy.ledger.fingerprint == expected.fingerprint


def test_server_without_a_model_publishes_the_same(federation: Federation) -> None:
    with_model = federation.ferret(replica=fresh_replica(federation.config))
    federation.run(with_model, ROUNDS)
    without = Federation(federation.config, federation.folder / "other")
    strategy = without.ferret()
    without.run(strategy, ROUNDS)
    assert strategy.ledger.head == with_model.ledger.head
    known = [entry.fingerprint for entry in strategy.ledger.entries]
    assert known[:-1] == [entry.fingerprint for entry in with_model.ledger.entries][:-1]
    assert known[-1] == ""  # nobody has trained from the last round yet


def test_resumed_run_is_bit_identical(federation: Federation, tmp_path: Path) -> None:
    path = tmp_path / "ledger.safetensors"
    federation.run(federation.ferret(ledger_path=path), 1)
    again = Federation(federation.config, tmp_path / "new-disk")
    resumed = again.ferret(ledger=Ledger.load(path))
    again.run(resumed, ROUNDS - 1)
    assert resumed.ledger.head == plain_loop(federation.config).head


def test_a_run_is_resumed_whose_nodes_say_nothing_of_themselves(
    federation: Federation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "ledger.safetensors"
    federation.run(federation.ferret(ledger_path=path), 1)
    asked = []

    def silent(proxy: InProcess, ins: GetPropertiesIns, **_: object) -> None:
        asked.append(ins.config["ask"])
        raise ConnectionError("gone")

    monkeypatch.setattr(InProcess, "get_properties", silent)
    resumed = federation.ferret(ledger=Ledger.load(path))
    federation.run(resumed, ROUNDS - 1)
    assert set(asked) == {"partition-id"}  # which no node needs its model for
    assert resumed.ledger.head == plain_loop(federation.config).head


def test_another_inner_strategy_aggregates_the_coefficients(config: Config, tmp_path: Path) -> None:
    federation = Federation(config, tmp_path, nodes=3)
    strategy = federation.ferret(FedMedian(fraction_evaluate=0.0))
    federation.run(strategy, 1)
    mean = plain_loop(config, rounds=1, nodes=3)
    (published,), (averaged,) = strategy.ledger.entries, mean.entries
    assert published.plan.seed == averaged.plan.seed
    assert not np.allclose(published.coefficients, averaged.coefficients)


def test_federated_evaluation_sees_the_round_after_training(federation: Federation) -> None:
    from flwr.server.strategy import FedAvg

    seen = []

    def collect(metrics):  # type: ignore[no-untyped-def]
        seen.append([m["round"] for _, m in metrics])
        return {}

    inner = FedAvg(fraction_evaluate=1.0, evaluate_metrics_aggregation_fn=collect)
    federation.run(federation.ferret(inner), 2)
    assert seen == [[1, 1], [2, 2]]
