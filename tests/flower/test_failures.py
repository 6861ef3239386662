"""A node that fails, lies or forgets is named, and costs the others nothing."""

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Context, RecordDict
from flwr.client import Client
from flwr.common import (
    FitIns,
    FitRes,
    Parameters,
    ndarrays_to_parameters,
    parameters_to_ndarrays,
)
from flwr.server.strategy import FedMedian

from ferret_flwr.config import ConfigError, FerretConfig, parse
from ferret_flwr.flower.clientapp import client
from ferret_flwr.flower.strategy import Ferret
from ferret_flwr.follower import Follower
from ferret_flwr.ledger import Ledger, LedgerError
from tests.flower.conftest import SETTINGS, Federation, InProcess
from tests.flower.test_rounds_match import fresh_replica, plain_loop


def without_node_1(federation: Federation, rounds: int) -> str:
    """Return the head of a run in which only node 0 takes part."""
    alone = Federation(federation.config, federation.folder / "alone")
    alone.proxies = alone.proxies[:1]
    strategy = alone.ferret(_solo())
    alone.run(strategy, rounds)
    return strategy.ledger.head


def _solo():  # type: ignore[no-untyped-def]
    from flwr.server.strategy import FedAvg

    return FedAvg(
        fraction_evaluate=0.0, min_fit_clients=1, min_available_clients=1, min_evaluate_clients=1
    )


def tamper(proxy: InProcess, change) -> None:  # type: ignore[no-untyped-def]
    """Let ``change`` edit each reply of a node."""
    honest = proxy.fit

    def fit(ins: FitIns, timeout: float | None, group_id: int | None) -> FitRes:
        reply = honest(ins, timeout, group_id)
        change(reply)
        return reply

    proxy.fit = fit  # type: ignore[method-assign]


def set_array(edit):  # type: ignore[no-untyped-def]
    def change(reply: FitRes) -> None:
        (array,) = parameters_to_ndarrays(reply.parameters)
        reply.parameters = ndarrays_to_parameters([edit(array.copy())])

    return change


def with_nan(array: np.ndarray) -> np.ndarray:
    array[7] = np.nan
    return array


def with_infinity(array: np.ndarray) -> np.ndarray:
    array[0] = np.inf
    return array


def set_metric(key: str, value: object):  # type: ignore[no-untyped-def]
    def change(reply: FitRes) -> None:
        reply.metrics[key] = value  # type: ignore[assignment]

    return change


def drop_arrays(reply: FitRes) -> None:
    reply.parameters = Parameters([], "numpy.ndarray")


def garbage(reply: FitRes) -> None:
    reply.parameters = Parameters([b"\x93NUMPY"], "numpy.ndarray")


def nothing(reply: FitRes) -> None:
    reply.parameters = Parameters([b""], "numpy.ndarray")


def no_examples(reply: FitRes) -> None:
    reply.num_examples = 0


def no_round(reply: FitRes) -> None:
    del reply.metrics["round"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (set_array(with_nan), "1 of 512 coefficients are not finite, the first at 7"),
        (set_array(with_infinity), "1 of 512 coefficients are not finite, the first at 0"),
        (set_array(lambda a: a[:-1]), "has K = 512 coefficients, got shape (511,)"),
        (set_array(lambda a: a.astype(np.float64)), "expected one float32 array"),
        (drop_arrays, "expected one float32 array"),
        (set_metric("round", 17), "it replied to round 17"),
        (no_round, "has no 'round'"),
        (set_metric("fingerprint", "0" * 16), "stale or has diverged"),
        (no_examples, "0 examples"),
        (garbage, ""),
        (nothing, "No data left in file"),
        (set_metric("seed", 5), "it used the seed 5"),
        (set_metric("partition-id", -1), "it calls itself partition -1"),
        (set_metric("train/loss", "low"), None),
    ],
)
def test_bad_reply_is_named_and_changes_nothing(change, reason, federation: Federation) -> None:  # type: ignore[no-untyped-def]
    tamper(federation.proxies[1], change)
    strategy = federation.ferret(_solo(), replica=fresh_replica(federation.config))
    federation.run(strategy, 1)
    if reason is None:  # odd, but it harms nobody
        assert not strategy.refused
        return
    (name,) = strategy.refused
    assert name.startswith("node 1")
    assert reason in strategy.refused[name]
    assert strategy.ledger.head == without_node_1(federation, 1)


@pytest.mark.parametrize("bases", ["shared", "per-client"])
def test_huge_coefficients_harm_only_their_node(bases: str, tmp_path: Path) -> None:
    settings = {"ferret.bases": bases, "ferret.family": "truncated-normal"}
    federation = Federation(parse(SETTINGS | settings), tmp_path)
    tamper(federation.proxies[1], set_array(lambda a: np.full_like(a, 1e38)))
    strategy = federation.ferret(_solo())
    federation.run(strategy, 1)
    assert "too large for float32" in strategy.refused["node 1 (partition 1)"]
    assert strategy.ledger.head == without_node_1(federation, 1)


def test_own_bases_need_fedavg_inside() -> None:
    with pytest.raises(ConfigError, match="needs FedAvg inside"):
        Ferret(FedMedian(), FerretConfig(bases="per-client"))


@pytest.mark.parametrize("node_code", ["raise", "nan-loss"])
def test_failing_training_is_named(node_code: str, federation: Federation) -> None:
    node = federation.nodes[1]

    class Broken:
        examples = node.examples
        worker = node.worker

        def train(self, round: int, applied: object = None):  # type: ignore[no-untyped-def]
            if node_code == "raise":
                raise MemoryError("no memory left")
            next(iter(node.worker.parameters.values())).data.fill_(float("nan"))
            return node.train(round)

    federation.nodes[1] = Broken()  # type: ignore[call-overload]
    strategy = federation.ferret(_solo())
    federation.run(strategy, 1)
    reason = strategy.refused["node 1 (partition 1)"]
    assert "MemoryError: no memory left" in reason or "NonFiniteLossError" in reason
    assert strategy.ledger.head == without_node_1(federation, 1)


def test_round_without_any_usable_reply_publishes_nothing(federation: Federation) -> None:
    for proxy in federation.proxies:
        tamper(proxy, set_array(with_nan))
    strategy = federation.ferret()
    federation.run(strategy, 2)
    assert len(strategy.ledger) == 0


def test_two_nodes_of_one_partition_are_reported(
    federation: Federation, caplog: pytest.LogCaptureFixture
) -> None:
    tamper(federation.proxies[1], set_metric("partition-id", 0))
    with caplog.at_level(logging.WARNING):
        federation.run(federation.ferret(), 1)
    assert "2 nodes have 'partition-id' = 0" in caplog.text


def test_disagreeing_replicas_without_a_majority_are_both_refused(federation: Federation) -> None:
    strategy = federation.ferret(_solo())
    federation.run(strategy, 1)
    tamper(federation.proxies[1], set_metric("fingerprint", "0" * 16))
    before = strategy.ledger.head
    federation.run(strategy, 1)
    assert len(strategy.refused) == 2
    assert strategy.ledger.head == before


def test_node_sends_and_receives_only_what_is_new(federation: Federation) -> None:
    federation.run(federation.ferret(), 3)
    entries = [
        (len(parameters_to_ndarrays(ins.parameters)) - 1) // 2
        for ins in federation.proxies[0].requests
    ]
    assert entries == [0, 1, 1]


@pytest.mark.parametrize("damage", ["deleted", "truncated", "from another run"])
def test_lost_cache_changes_no_result(
    damage: str, federation: Federation, caplog: pytest.LogCaptureFixture
) -> None:
    strategy = federation.ferret(_solo())
    federation.run(strategy, 2)
    path = federation.folder / "run-1" / "node-1.safetensors"
    if damage == "deleted":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    else:
        ledger = Ledger.load(path)
        foreign = Ledger(ledger.header)
        for entry in plain_loop_with_other_seed(federation).entries[: len(ledger)]:
            foreign = foreign.append(entry)
        foreign.save(path)
    with caplog.at_level(logging.WARNING):
        federation.run(strategy, 1)
    assert "node 1 (partition 1) has lost its ledger cache" in caplog.text
    assert not strategy.refused
    assert strategy.ledger.head == plain_loop(federation.config, 3).head
    last = parameters_to_ndarrays(federation.proxies[1].requests[-1].parameters)
    assert (len(last) - 1) // 2 == 2  # all rounds
    assert len(Ledger.load(path)) == 2


def plain_loop_with_other_seed(federation: Federation) -> Ledger:
    return plain_loop(replace(federation.config, seed=7), 2)


def test_node_that_joins_late_gets_the_whole_ledger(federation: Federation) -> None:
    late = federation.proxies.pop()
    strategy = federation.ferret(_solo())
    federation.run(strategy, 2)
    federation.proxies.append(late)
    federation.run(strategy, 1)
    assert not strategy.refused
    assert (len(parameters_to_ndarrays(late.requests[0].parameters)) - 1) // 2 == 2


def test_diverged_replica_is_built_again(
    federation: Federation, caplog: pytest.LogCaptureFixture
) -> None:
    strategy = federation.ferret(replica=fresh_replica(federation.config))
    federation.run(strategy, 1)
    replica = federation.nodes[0].worker.follower.follow(strategy.ledger.until(0))
    replica.arrays[0].flat[11] += 1e-6
    with caplog.at_level(logging.WARNING):
        federation.run(strategy, 2)
    assert "built again from the base model" in caplog.text
    assert not strategy.refused
    assert strategy.ledger.head == plain_loop(federation.config, 3).head


def test_node_with_another_base_model_is_refused(federation: Federation) -> None:
    other = fresh_replica(federation.config)
    other.arrays[0].flat[3] += 1
    node = federation.nodes[1]

    class Foreign:
        parameters = node.worker.parameters

        follower = Follower(other.layout, lambda: other.arrays)

    federation.nodes[1] = replace(node, worker=Foreign())  # type: ignore[arg-type]
    strategy = federation.ferret(_solo(), replica=fresh_replica(federation.config))
    federation.run(strategy, 1)
    assert "another base model" in strategy.refused["node 1 (partition 1)"]
    assert strategy.ledger.head == without_node_1(federation, 1)


def test_full_disk_keeps_the_previous_ledger(
    federation: Federation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "ledger.safetensors"
    strategy: Ferret = federation.ferret(ledger_path=path)
    federation.run(strategy, 1)
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("ferret_flwr.files.os.replace", full)
        federation.run(strategy, 1)
    assert path.read_bytes() == before
    assert not list(tmp_path.glob(".*"))
    federation.run(strategy, 1)  # the node caches could not be written either: all is sent again
    assert len(Ledger.load(path)) == 3


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        ({"dataset.name": "nowhere.jsonl"}, "nowhere.jsonl"),
        ({"train.optimizer": "Sdg"}, "'train.optimizer'"),
        ({"model.name": "builtin:huge"}, "builtin:tiny"),
        ({"model.device": "abacus"}, "'model.device'"),
    ],
)
def test_node_that_cannot_start_is_named(
    setting: dict[str, str], reason: str, federation: Federation
) -> None:
    def broken(node: int) -> Client:
        context = Context(
            run_id=1,
            node_id=node,
            node_config={"partition-id": 1, "num-partitions": 2},
            state=RecordDict(),
            run_config=SETTINGS | setting,
        )
        return client(context)

    federation.proxies[1].make_client = broken
    strategy = federation.ferret(_solo(), replica=fresh_replica(federation.config))
    federation.run(strategy, 1)
    assert reason in strategy.refused["node 1 (partition 1)"]
    assert strategy.ledger.head == without_node_1(federation, 1)


def test_run_stops_before_round_1_if_no_node_can_start(federation: Federation) -> None:
    for node, proxy in enumerate(federation.proxies):
        context = Context(
            run_id=1,
            node_id=node,
            node_config={"partition-id": node, "num-partitions": 2},
            state=RecordDict(),
            run_config=SETTINGS | {"train.optimizer": "Sdg"},
        )
        proxy.make_client = lambda _, context=context: client(context)
    with pytest.raises(LedgerError, match=r"no node could load(.|\n)*'train.optimizer'"):
        federation.run(federation.ferret(), 1)
