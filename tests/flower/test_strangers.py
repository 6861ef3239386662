"""What does not belong to a run is refused by name, on both sides, and changes nothing.

Three honest rounds are run once. A test then shows the real strategy a changed reply of theirs, or
a real client a changed request of theirs, or changes what lies on a disk.
"""

import copy
import io
import json
import logging
import pickle
import re
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Context, RecordDict
from flwr.common import (
    EvaluateIns,
    EvaluateRes,
    FitIns,
    FitRes,
    GetPropertiesIns,
    GetPropertiesRes,
    Parameters,
    ndarrays_to_parameters,
    parameters_to_ndarrays,
)
from flwr.server import SimpleClientManager
from flwr.server.strategy import FedAvg, FedMedian, Strategy

from ferret_flwr import follower as followers
from ferret_flwr.config import ConfigError, parse
from ferret_flwr.flower import Ferret, wire
from ferret_flwr.flower.cache import LedgerCache
from ferret_flwr.flower.serverapp import Run
from ferret_flwr.flower.site import Site
from ferret_flwr.follower import Follower
from ferret_flwr.ledger import Ledger, LedgerError
from ferret_flwr.projection.layout import Layout
from ferret_flwr.projection.packing import pack_counts
from ferret_flwr.snapshot import Snapshots
from tests.flower.conftest import OK, SETTINGS, Federation, InProcess
from tests.flower.test_rounds_match import fresh_replica
from tests.test_ledger import forge

ROUND = 3  # the round that strangers disturb
NODE_1 = "node 1 (partition 1)"


def alone() -> FedAvg:
    """Return an inner strategy that one node's reply is enough for."""
    few = {"min_fit_clients": 1, "min_available_clients": 1, "min_evaluate_clients": 1}
    return FedAvg(fraction_evaluate=0.0, **few)


@dataclass
class Scene:
    """Three rounds of two honest nodes, and what was said in them."""

    federation: Federation
    ledger: Ledger
    requests: dict[int, list[FitIns]]  # round -> of each node
    replies: dict[int, list[FitRes]]

    @property
    def cache(self) -> Path:
        """Return the ledger cache of node 1."""
        return self.federation.folder / "run-1" / "node-1.safetensors"

    def reply(self, node: int, round: int = ROUND) -> FitRes:
        """Return what ``node`` honestly answered."""
        return copy.deepcopy(self.replies[round][node])

    def server(self, inner: Strategy | None = None, **arguments: Any) -> Ferret:
        """Return a server that is about to begin the round."""
        arguments = {"ledger": self.ledger.until(ROUND - 1)} | arguments
        strategy = self.federation.ferret(inner or alone(), **arguments)
        self.begin(strategy)
        return strategy

    def begin(self, strategy: Ferret) -> dict[str, FitIns]:
        """Let the server plan the round, and return what it asks of each node."""
        manager = SimpleClientManager()
        for proxy in self.federation.proxies:
            manager.register(proxy)
        chosen = strategy.configure_fit(ROUND, Parameters([], ""), manager)
        return {client.cid: request for client, request in chosen}

    def end(self, strategy: Ferret, *replies: FitRes) -> str:
        """Hand the server the nodes' replies, and return the head of its ledger."""
        proxies = [InProcess(node, self.federation.client) for node in range(len(replies))]
        strategy.aggregate_fit(ROUND, list(zip(proxies, replies, strict=True)), [])
        return strategy.ledger.head

    def without_node_1(self) -> str:
        """Return the head of a ledger whose last round is node 0's alone."""
        return self.end(self.server(), self.reply(0))


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    """Run the honest rounds."""
    federation = Federation(parse(SETTINGS), tmp_path_factory.mktemp("honest"))
    replies: dict[int, list[FitRes]] = {}

    def record(proxy: InProcess) -> None:
        honest = proxy.fit

        def fit(ins: FitIns, timeout: float | None, group_id: int | None) -> FitRes:
            reply = honest(ins, timeout, group_id)
            replies.setdefault(int(reply.metrics["round"]), []).append(copy.deepcopy(reply))
            return reply

        proxy.fit = fit  # type: ignore[method-assign]

    for proxy in federation.proxies:
        record(proxy)
    strategy = federation.ferret(alone())
    federation.run(strategy, ROUND)
    for answers in replies.values():
        answers.sort(key=lambda reply: reply.metrics["partition-id"])
    asked = zip(*(proxy.requests for proxy in federation.proxies), strict=True)
    requests = {round: list(pair) for round, pair in enumerate(asked, 1)}
    return Scene(federation, strategy.ledger, requests, replies)


@pytest.fixture
def scene(rehearsal: Scene, tmp_path: Path) -> Scene:
    """Return the honest rounds with caches that a test may spoil."""
    folder = tmp_path / "cache"
    shutil.copytree(rehearsal.federation.folder, folder)
    return replace(rehearsal, federation=Federation(rehearsal.federation.config, folder))


def test_the_scene_is_what_happened(scene: Scene) -> None:
    """Without a stranger the tests below find the honest ledger, and one node's part differs."""
    everybody = scene.end(scene.server(), scene.reply(0), scene.reply(1))
    assert everybody == scene.ledger.head
    assert scene.without_node_1() != everybody
    assert len(Ledger.load(scene.cache)) == ROUND - 1


# Replies


class Canary:
    """Sings when it is unpickled."""

    sang = False

    def __reduce__(self) -> tuple[Callable[[], None], tuple[()]]:
        return sing, ()


def sing() -> None:
    Canary.sang = True


@pytest.fixture
def canary() -> Canary:
    """Return one that has been heard to sing."""
    Canary.sang = False
    pickle.loads(pickle.dumps(Canary()))
    assert Canary.sang
    Canary.sang = False
    return Canary()


def object_array(canary: Canary) -> bytes:
    """Return a .npy file that `numpy.load` would unpickle if it were allowed to."""
    buffer = io.BytesIO()
    np.save(buffer, np.array([canary], dtype=object), allow_pickle=True)
    return buffer.getvalue()


def archive(canary: Canary) -> bytes:
    """Return a .npz file, which `numpy.load` also takes, with the same inside."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("0.npy", object_array(canary))
    return buffer.getvalue()


PICKLES = {
    "a pickle": pickle.dumps,
    "an array of objects": object_array,
    "an archive": archive,
}


@pytest.mark.parametrize("kind", PICKLES)
def test_no_reply_is_unpickled(kind: str, scene: Scene, canary: Canary) -> None:
    reply = scene.reply(1)
    reply.parameters = Parameters([PICKLES[kind](canary)], "numpy.ndarray")
    strategy = scene.server()
    assert scene.end(strategy, scene.reply(0), reply) == scene.without_node_1()
    assert strategy.refused[NODE_1]
    assert not Canary.sang


def relabelled(scene: Scene, *keys: str) -> FitRes:
    """Return node 1's reply of the round before with these entries of the present one."""
    reply, present = scene.reply(1, ROUND - 1), scene.reply(1).metrics
    reply.metrics |= {key: present[key] for key in keys}
    return reply


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ([], "it replied to round 2, this is 3"),
        (["round"], "it used the seed"),
        (["round", "seed"], "stale or has diverged"),
    ],
)
def test_replayed_reply_is_refused(keys: list[str], reason: str, scene: Scene) -> None:
    strategy = scene.server()
    head = scene.end(strategy, scene.reply(0), relabelled(scene, *keys))
    assert reason in strategy.refused[NODE_1]
    assert head == scene.without_node_1()


def promised(shape: tuple[int, ...]) -> bytes:
    """Return a .npy file whose header promises ``shape`` and that ends there."""
    buffer = io.BytesIO()
    header = {"descr": "<f4", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(buffer, header)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        (lambda a: [a, a], "expected one float32 array"),
        (lambda a: [a[None]], r"got shape (1, 512)"),
        (lambda a: [a[:0]], r"got shape (0,)"),
        (lambda a: [a.astype(">f4")], "expected one float32 array"),
        (lambda a: [a.astype(np.float16)], "expected one float32 array"),
        (lambda a: [a.astype("U9")], "expected one float32 array"),
        (lambda a: [promised((2**58,))], ""),
        (lambda a: [promised((-512,))], ""),
    ],
)
def test_reply_of_another_kind_is_refused(tensors, reason: str, scene: Scene) -> None:  # type: ignore[no-untyped-def]
    reply = scene.reply(1)
    (array,) = parameters_to_ndarrays(reply.parameters)
    raw = [t if isinstance(t, bytes) else npy(t) for t in tensors(array)]
    reply.parameters = Parameters(raw, "numpy.ndarray")
    strategy = scene.server()
    assert scene.end(strategy, scene.reply(0), reply) == scene.without_node_1()
    assert reason in strategy.refused[NODE_1]


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


@pytest.mark.parametrize("examples", [float("nan"), float("inf"), 1e300, 2.5, True, "9", [9]])
def test_number_of_examples_that_is_none_is_refused(examples: object, scene: Scene) -> None:
    """Flower takes any number here, and a weight of NaN would undo the whole round."""
    reply = scene.reply(1)
    reply.num_examples = examples  # type: ignore[assignment]
    strategy = scene.server()
    assert scene.end(strategy, scene.reply(0), reply) == scene.without_node_1()
    assert "examples" in strategy.refused[NODE_1]


def test_a_reason_cannot_pass_for_another_line(
    scene: Scene, caplog: pytest.LogCaptureFixture
) -> None:
    reply = scene.reply(1)
    reply.metrics["error"] = "no\n\rround   3 | held-out loss 0.001\x1b[2K" + 10_000 * "!"
    strategy = scene.server()
    with caplog.at_level(logging.WARNING):
        scene.end(strategy, scene.reply(0), reply)
    (message,) = (record.getMessage() for record in caplog.records)
    assert message.startswith(f"{NODE_1} is left out: no")
    assert not any(line.startswith("round") for line in message.splitlines())
    assert "\x1b" not in message and len(message) < 5000
    assert len(strategy.refused[NODE_1]) < 5000


# A lie within the rules is not seen: docs/security.md says what it can do


def test_a_finite_lie_moves_the_mean_and_not_the_median(scene: Scene) -> None:
    def published(inner: Strategy, lie: bool) -> np.ndarray:
        liar = scene.reply(1)
        if lie:
            (honest,) = parameters_to_ndarrays(liar.parameters)
            liar.parameters = ndarrays_to_parameters([500 * honest])
        third = scene.reply(0)
        third.metrics["partition-id"] = 2
        strategy = scene.server(inner)
        scene.end(strategy, scene.reply(0), liar, third)
        assert not strategy.refused
        return np.abs(strategy.ledger.entries[-1].coefficients).max()

    assert published(alone(), lie=True) > 50 * published(alone(), lie=False)
    assert published(FedMedian(), lie=True) <= 10 * published(alone(), lie=False)


@pytest.mark.parametrize("size", [1e10, 1e30])
@pytest.mark.parametrize("others", [0, 1, 2])
def test_a_huge_update_is_refused(size: float, others: int, scene: Scene) -> None:
    """What is usual is what the others sent, or what the round before published."""
    liar = scene.reply(1)
    liar.parameters = ndarrays_to_parameters([np.full(512, size, dtype=np.float32)])
    strategy = scene.server()
    honest = [scene.reply(0) for _ in range(others)]
    for number, reply in enumerate(honest):
        reply.metrics["partition-id"] = 2 * number
    scene.end(strategy, *honest[:1], liar, *honest[1:])
    (name,) = strategy.refused
    assert name == f"node {min(others, 1)} (partition 1)"
    assert re.search(
        "its update is .* long where .* is usual; .* allows 1000", strategy.refused[name]
    )
    if others == 1:
        assert strategy.ledger.head == scene.without_node_1()
    elif not others:
        assert strategy.ledger.head == scene.ledger.until(ROUND - 1).head


def test_small_updates_and_none_are_no_measure(scene: Scene) -> None:
    """A node that has nothing to learn does not make the others look huge."""
    still = scene.reply(1)
    still.parameters = ndarrays_to_parameters([np.zeros(512, dtype=np.float32)])
    first = scene.server(ledger=Ledger(scene.ledger.header))
    assert first.coordinator.plan is not None
    replies = [scene.reply(0, round=1), still]
    replies[1].metrics |= scene.reply(1, round=1).metrics
    scene.end(first, *replies)
    assert not first.refused


def say(fingerprint: str, reply: FitRes) -> FitRes:
    reply.metrics["fingerprint"] = fingerprint
    return reply


def test_a_node_answers_again_and_from_the_same_update(scene: Scene) -> None:
    """It keeps no account: whoever asks a round again learns as much again about one Δ."""
    request, honest = scene.requests[ROUND][1], scene.reply(1)
    assert scene.federation.client(1).fit(request).parameters == honest.parameters

    def other_bases(values: dict[str, Any], arrays: list[np.ndarray]) -> None:
        values["plan"]["seed"] += 1

    again = scene.federation.client(1).fit(edited(other_bases)(request))
    assert "error" not in again.metrics
    assert again.metrics["train/loss"] == honest.metrics["train/loss"]
    assert again.parameters != honest.parameters


def test_a_node_that_says_no_fingerprint_has_no_vote(scene: Scene) -> None:
    """One of two: without a majority nobody's reply is used, and never the silent one's alone."""
    ledger = scene.ledger.until(ROUND - 1).with_fingerprint("")
    strategy = scene.server(ledger=ledger)
    scene.end(strategy, scene.reply(0), say("", scene.reply(1)))
    assert list(strategy.refused) == [NODE_1]
    assert len(strategy.ledger) == ROUND
    strategy = scene.server(ledger=ledger)
    third = scene.reply(0)
    third.metrics["partition-id"] = 2
    scene.end(strategy, say("0" * 16, scene.reply(0)), scene.reply(1), say("1" * 16, third))
    assert len(strategy.refused) == 3
    assert len(strategy.ledger) == ROUND - 1


def test_a_server_with_the_model_does_not_vote(scene: Scene) -> None:
    """Not even behind a ledger that names no fingerprint at its end."""
    ledger = scene.ledger.until(ROUND - 1).with_fingerprint("")
    strategy = scene.server(ledger=ledger, replica=fresh_replica(scene.federation.config))
    third = say("f" * 16, scene.reply(1))
    third.metrics["partition-id"] = 2
    scene.end(strategy, scene.reply(0), say("f" * 16, scene.reply(1)), third)
    assert len(strategy.refused) == 2
    assert strategy.ledger.head == scene.without_node_1()


@pytest.mark.parametrize("liars", [1, 2])
def test_without_a_model_on_the_server_the_majority_decides(liars: int, scene: Scene) -> None:
    """More than half of the replies name the parameters: one liar in three is refused, not two."""
    ledger = scene.ledger.until(ROUND - 1)
    strategy = scene.server(ledger=ledger.with_fingerprint(""))
    third = scene.reply(1)
    third.metrics["partition-id"] = 2
    replies = [scene.reply(0), say("f" * 16, scene.reply(1)), third]
    if liars == 2:
        say("f" * 16, third)
    scene.end(strategy, *replies)
    assert list(strategy.refused) == [NODE_1 if liars == 1 else "node 0 (partition 0)"]
    assert strategy.ledger.entries[ROUND - 2].fingerprint == (
        ledger.fingerprint if liars == 1 else "f" * 16
    )


def test_nodes_that_disagree_about_the_base_model_start_no_run(scene: Scene) -> None:
    """Half of the nodes asked are not a majority: neither half may decide for the other."""
    proxy = scene.federation.proxies[1]

    def lie(ins: GetPropertiesIns, timeout: float | None, group_id: int | None) -> GetPropertiesRes:
        return GetPropertiesRes(OK, asdict(scene.ledger.header) | {"base": "0" * 16})

    proxy.get_properties = lie  # type: ignore[method-assign]
    with pytest.raises(LedgerError, match=r"not have the same (.|\n)*node 1: 0000000000000000"):
        scene.federation.run(scene.federation.ferret(), 1)


@pytest.mark.parametrize(
    "lie", [{"size": "many"}, {"size": -1}, {"size": 2.5}, {"layout": 7}, {"base": None}]
)
def test_a_base_model_that_cannot_be_is_no_answer(lie: dict[str, Any], scene: Scene) -> None:
    def answer(*_: object, **__: object) -> GetPropertiesRes:
        return GetPropertiesRes(OK, asdict(scene.ledger.header) | lie)

    for proxy in scene.federation.proxies:
        proxy.get_properties = answer  # type: ignore[method-assign]
    with pytest.raises(LedgerError, match=r"no node could load (.|\n)*node [01]: there is no such"):
        scene.federation.run(scene.federation.ferret(), 1)


# Replies to an evaluation


@pytest.mark.parametrize(
    "lie",
    [
        {"loss": float("nan")},
        {"loss": float("inf")},
        {"loss": [1.0]},
        {"num_examples": 0},
        {"num_examples": -10},  # with the 10 of node 0: a division by zero
        {"num_examples": float("nan")},
        {"num_examples": [10]},
    ],
)
def test_evaluation_that_cannot_be_is_refused(lie: dict[str, Any], scene: Scene) -> None:
    strategy = scene.server(FedAvg(fraction_evaluate=1.0))
    honest = EvaluateRes(OK, 1.5, 10, {"partition-id": 0})
    liar = EvaluateRes(OK, 1.5, 10, {"partition-id": 1})
    vars(liar).update(lie)
    proxies = scene.federation.proxies
    loss, _ = strategy.aggregate_evaluate(
        ROUND, list(zip(proxies, [honest, liar], strict=True)), []
    )
    assert loss == 1.5
    assert NODE_1 in strategy.refused


# Nodes of another model or version, and of no model at all


def answer_of(scene: Scene, strategy: Ferret, change: Callable[[FitIns], FitIns] | None) -> FitRes:
    """Return what the real client of node 1 says to what it is sent."""
    request = scene.begin(strategy)["1"]
    return scene.federation.client(1).fit(change(request) if change else request)


def with_model(scene: Scene, layout: Layout) -> None:
    """Give node 1 a model of this layout."""
    node = scene.federation.nodes[1]
    arrays = [np.zeros(shape, dtype=np.float32) for shape in layout.shapes]

    class Foreign:
        parameters = node.worker.parameters
        follower = Follower(layout, lambda: arrays)

    scene.federation.nodes[1] = replace(node, worker=Foreign())  # type: ignore[arg-type]


@pytest.mark.parametrize("what", ["layout", "number of parameters"])
def test_node_with_another_layout_is_refused(what: str, scene: Scene) -> None:
    ours = scene.federation.nodes[1].worker.layout
    if what == "layout":  # the same number of parameters under other names
        theirs = Layout(tuple(f"x.{name}" for name in ours.names), ours.shapes)
    else:
        theirs = Layout(ours.names[:-1], ours.shapes[:-1])
    with_model(scene, theirs)
    strategy = scene.server()
    reply = answer_of(scene, strategy, None)
    assert scene.end(strategy, scene.reply(0), reply) == scene.without_node_1()
    assert f"this model has another {what}: " in strategy.refused[NODE_1]


def test_node_of_another_version_is_refused(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    strategy = scene.server()
    with monkeypatch.context() as patch:
        request = scene.begin(strategy)["1"]
        patch.setattr(wire, "PROTOCOL", 4)
        reply = scene.federation.client(1).fit(request)
    assert scene.end(strategy, scene.reply(0), reply) == scene.without_node_1()
    assert "the server speaks protocol 3, this node 4" in strategy.refused[NODE_1]


# Requests: whoever speaks in the server's place


def edited(edit: Callable[[dict[str, Any], list[np.ndarray]], None]) -> Callable[[FitIns], FitIns]:
    """Return what changes a request by its JSON values and its arrays."""

    def change(ins: FitIns) -> FitIns:
        values = json.loads(str(ins.config[wire.KEY]))
        arrays = [array.copy() for array in parameters_to_ndarrays(ins.parameters)]
        edit(values, arrays)
        config = ins.config | {wire.KEY: json.dumps(values)}
        return FitIns(ndarrays_to_parameters(arrays), config)

    return change


def coefficient(values: dict[str, Any], arrays: list[np.ndarray]) -> None:
    arrays[2].view(np.uint32)[0, 5] ^= 1  # of round 1


def blocks(values: dict[str, Any], arrays: list[np.ndarray]) -> None:
    count = values["entries"][0].pop("interleaved")  # as many bases, in one block for all
    values["entries"][0]["block-size"] = 128 * 1000
    arrays[1] = pack_counts(np.array([count]))


def rate(values: dict[str, Any], arrays: list[np.ndarray]) -> None:
    values["entries"][0]["rate"] *= 2


def seed(values: dict[str, Any], arrays: list[np.ndarray]) -> None:
    values["entries"][0]["seeds"][0] += 1


def family(values: dict[str, Any], arrays: list[np.ndarray]) -> None:
    values["entries"][0]["family"] = "truncated-normal"


def reordered(values: dict[str, Any], arrays: list[np.ndarray]) -> None:
    values["entries"].reverse()
    arrays[1:5] = [*arrays[3:5], *arrays[1:3]]


def renumbered(values: dict[str, Any], arrays: list[np.ndarray]) -> None:
    reordered(values, arrays)
    for round, entry in enumerate(values["entries"], 1):
        entry["round"] = round


def first_dropped(values: dict[str, Any], arrays: list[np.ndarray]) -> None:
    del values["entries"][0], arrays[1:3]


def last_dropped(values: dict[str, Any], arrays: list[np.ndarray]) -> None:
    del values["entries"][-1], arrays[3:5]


def repeated(values: dict[str, Any], arrays: list[np.ndarray]) -> None:
    values["entries"].append(values["entries"][-1])
    arrays.extend(arrays[3:5])


def not_finite(values: dict[str, Any], arrays: list[np.ndarray]) -> None:
    arrays[2][0, 5] = np.nan


def base(values: dict[str, Any], arrays: list[np.ndarray]) -> None:
    values["header"]["base"] = "0" * 16


def head(values: dict[str, Any], arrays: list[np.ndarray]) -> None:
    values["head"] = "0" * 64


def fingerprint(values: dict[str, Any], arrays: list[np.ndarray]) -> None:
    values["entries"][-1]["fingerprint"] = "0" * 16


def protocol(values: dict[str, Any], arrays: list[np.ndarray]) -> None:
    values["protocol"] = 4


UNCHAINED = "do not lead to the ledger that they name"
EDITS = {
    coefficient: UNCHAINED,
    blocks: UNCHAINED,
    rate: UNCHAINED,
    seed: UNCHAINED,
    family: UNCHAINED,
    reordered: "expected round 1, got round 2",
    renumbered: UNCHAINED,
    first_dropped: "expected round 1, got round 2",
    last_dropped: UNCHAINED,
    repeated: "expected round 3, got round 2",
    not_finite: "not finite",
    base: UNCHAINED,
    head: UNCHAINED,
    fingerprint: "the ledger names 0000000000000000",
    protocol: "the server speaks protocol 4, this node 3",
}


@pytest.mark.parametrize(
    "edit",
    EDITS,
    ids=lambda edit: edit.__name__,
)
@pytest.mark.parametrize("kind", ["train", "evaluate"])
def test_changed_request_is_refused(edit, kind: str, scene: Scene) -> None:  # type: ignore[no-untyped-def]
    before = scene.cache.read_bytes()
    strategy = scene.server()
    if kind == "train":
        reply = answer_of(scene, strategy, edited(edit))
        assert scene.end(strategy, scene.reply(0), reply) == scene.without_node_1()
    else:
        honest = scene.begin(strategy)["1"]
        changed = edited(edit)(honest)
        answer = scene.federation.client(1).evaluate(
            EvaluateIns(changed.parameters, changed.config)
        )
        proxies = scene.federation.proxies
        strategy.aggregate_evaluate(ROUND, [(proxies[1], answer)], [])
    assert EDITS[edit] in strategy.refused[NODE_1]
    assert scene.cache.read_bytes() == before


def more_numbers(values: dict[str, Any], arrays: list[np.ndarray]) -> None:
    values["plan"]["interleaved"] = 513


def more_contiguous(values: dict[str, Any], arrays: list[np.ndarray]) -> None:
    del values["plan"]["interleaved"]
    values["plan"]["block-size"] = 128
    arrays[0] = np.full(-(-values["header"]["size"] // 128), 100, dtype=np.uint8)


@pytest.mark.parametrize("edit", [more_numbers, more_contiguous], ids=lambda edit: edit.__name__)
def test_request_for_more_numbers_is_refused(edit, scene: Scene) -> None:  # type: ignore[no-untyped-def]
    """How much a reply can reveal is for the node to say."""
    client = scene.federation.numpy_client(1)
    client.most_coefficients = 512
    changed = edited(edit)(scene.requests[ROUND][1])
    reply = client.to_client().fit(changed)
    assert "at most 'ferret.coefficients' = 512" in str(reply.metrics["error"])
    assert not reply.parameters.tensors


def since_head(values: dict[str, Any], arrays: list[np.ndarray]) -> None:
    values["since-head"] = "0" * 64


def since_far(values: dict[str, Any], arrays: list[np.ndarray]) -> None:
    values["since"] = 99


def since_negative(values: dict[str, Any], arrays: list[np.ndarray]) -> None:
    values["since"] = -1


def since_fingerprint(values: dict[str, Any], arrays: list[np.ndarray]) -> None:
    values["since-fingerprint"] = "0" * 16
    values["entries"], arrays[1:] = [], []
    values["head"] = values["since-head"]


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (since_head, "holds other rounds than the server's 1..1"),
        (since_far, "holds other rounds than the server's 1..99"),
        (since_negative, "the request is not valid"),
        (since_fingerprint, "the ledger names 0000000000000000"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_changed_claim_about_the_cache_is_refused(edit, reason: str, scene: Scene) -> None:  # type: ignore[no-untyped-def]
    """What the node has done before stays on its disk, whatever a stranger says about it."""
    before = scene.cache.read_bytes()
    honest = scene.requests[ROUND][1]
    assert json.loads(str(honest.config[wire.KEY]))["since"] == 1
    reply = scene.federation.client(1).fit(edited(edit)(honest))
    assert reason in str(reply.metrics["error"])
    assert not reply.parameters.tensors
    assert scene.cache.read_bytes() == before
    assert "error" not in scene.federation.client(1).fit(honest).metrics


@pytest.mark.parametrize("kind", PICKLES)
@pytest.mark.parametrize("place", [0, 2])
def test_no_request_is_unpickled(kind: str, place: int, scene: Scene, canary: Canary) -> None:
    """Flower raises before the client is asked, or the client finds no array."""
    before = scene.cache.read_bytes()
    request = copy.deepcopy(scene.requests[ROUND][1])
    request.parameters.tensors[place] = PICKLES[kind](canary)
    try:
        reply = scene.federation.client(1).fit(request)
        assert "the request is not valid" in str(reply.metrics["error"])
    except ValueError as error:
        assert "allow_pickle" in str(error)
    assert not Canary.sang
    assert scene.cache.read_bytes() == before


# Disks


def swapped(meta: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
    meta["entries"].reverse()
    for round, entry in enumerate(meta["entries"], 1):
        entry["round"] = round
    for name in ("bases-per-block", "coefficients"):
        one, two = f"00001.{name}", f"00002.{name}"
        tensors[one], tensors[two] = tensors[two], tensors[one]


def flipped(meta: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
    tensors["00002.coefficients"].view(np.uint32)[0, 5] ^= 1


def shortened(meta: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
    del meta["entries"][1]


def pickled(canary: Canary) -> bytes:
    return pickle.dumps(canary)


@pytest.mark.parametrize("damage", [swapped, flipped, shortened, pickled])
def test_changed_cache_changes_no_result(damage, scene: Scene, canary: Canary) -> None:  # type: ignore[no-untyped-def]
    content = pickled(canary) if damage is pickled else forge(scene.cache.read_bytes(), damage)
    scene.cache.write_bytes(content)
    request = scene.requests[ROUND][1]
    reply = scene.federation.client(1).fit(request)
    assert reply.metrics["stale"] and "needs the whole ledger" in str(reply.metrics["error"])
    whole = answer_of(scene, scene.server(), None)
    assert whole.parameters == scene.reply(1).parameters
    assert Ledger.load(scene.cache).head == scene.ledger.until(ROUND - 1).head
    assert not Canary.sang


@pytest.mark.parametrize("damage", [swapped, flipped, shortened, pickled])
def test_changed_ledger_is_not_resumed(
    damage, scene: Scene, canary: Canary, tmp_path: Path
) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "ledger.safetensors"
    content = scene.ledger.until(2).to_bytes()
    path.write_bytes(pickled(canary) if damage is pickled else forge(content, damage))
    settings = {"ferret.resume": str(path), "results-dir": str(tmp_path / "results")}
    with pytest.raises(LedgerError, match="is not a valid ledger"):
        Run(parse(SETTINGS | settings))
    assert not (tmp_path / "results").exists()
    assert not Canary.sang


def test_no_snapshot_is_unpickled(
    scene: Scene, canary: Canary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(followers, "DISK_BYTES_PER_SECOND", 1e-9)  # none is written here
    worker, ledger = scene.federation.nodes[1].worker, scene.ledger.until(1)
    for kind in PICKLES.values():
        (tmp_path / f"{ledger.fingerprint}.npy").write_bytes(kind(canary))
        follower = Follower(worker.layout, worker.follower.base)
        assert follower.follow(ledger, Snapshots(tmp_path)).fingerprint == ledger.fingerprint
        assert not list(tmp_path.glob("*.npy"))
    assert not Canary.sang


def test_old_runs_are_forgotten_and_nothing_else(
    scene: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder is the owner's, who may keep other things there."""
    import os

    folder = tmp_path / "own"
    for name in ("run-7", "run-notes", "other"):
        (folder / name).mkdir(parents=True)
        (folder / name / "node-0.safetensors").write_bytes(b"")
        os.utime(folder / name, (0, 0))
    monkeypatch.setattr(followers, "DISK_BYTES_PER_SECOND", float("inf"))  # snapshots come first
    cache, ledger = LedgerCache(folder, 8, 0), scene.ledger
    worker = scene.federation.nodes[0].worker
    request = wire.Request.of(ledger, 0, ledger.entries[-1].plan)
    Follower(worker.layout, worker.follower.base).follow(cache.complete(request), cache.snapshots)
    assert cache.keep(ledger, request) == len(ledger)
    assert sorted(path.name for path in folder.iterdir()) == ["other", "run-8", "run-notes"]


# What a run may ask of a node


def site(own: dict[str, Any], run: dict[str, Any]) -> Site:
    own = {"partition-id": 0, "num-partitions": 2} | own
    context = Context(1, 77, own, RecordDict(), run)
    return Site.of(context, simulated=False)


@pytest.mark.parametrize("name", ["json", "csv", "text", "pandas", "webdataset", "gsm8k"])
def test_a_reader_is_no_name_of_data(name: str) -> None:
    """`datasets` reads, and as "pandas" unpickles, the files below the present folder for these."""
    with pytest.raises(ConfigError, match="opens no path that comes with a run"):
        site({}, {"dataset.name": name})
    assert site({}, {"dataset.name": f"owner/{name}"}).config.dataset.name == f"owner/{name}"
    assert site({"dataset.name": name}, {}).config.dataset.name == name


def test_a_node_holds_the_run_to_coefficients() -> None:
    """A run may neither ask for the weights nor for more numbers than the owner allows."""
    own = {"method": "ferret", "ferret.coefficients": 512}
    config = site(own, {"method": "fedavg", "ferret.coefficients": 10**6}).config
    assert (config.method, config.ferret.coefficients) == ("ferret", 512)


def test_trust_in_code_of_the_run_s_model_needs_both() -> None:
    """An owner who trusts its own model has not trusted one that the run names."""
    trusted = {"model.trust-remote-code": True}
    assert site(trusted | {"model.name": "/srv/model"}, {}).config.model.trust_remote_code
    assert site(trusted, trusted).config.model.trust_remote_code
    assert not site(trusted, {}).config.model.trust_remote_code
