"""Secure aggregation by Flower's own workflow and mod, with nodes that leave or fail."""

from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Context, Error, Message, MessageType, RecordDict
from flwr.clientapp import ClientApp
from flwr.common import FitIns, bytes_to_ndarray, ndarrays_to_parameters, parameters_to_ndarrays
from flwr.common.secure_aggregation.secaggplus_constants import RECORD_KEY_CONFIGS, Key, Stage
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.compat.common import recorddict_compat as compat
from flwr.server import SimpleClientManager
from flwr.server.strategy import FedAvg

from ferret_flwr.config import ConfigError, FerretConfig, parse
from ferret_flwr.flower import Ferret, secure
from ferret_flwr.flower.mods import PROTOCOL, privacy_mod
from ferret_flwr.flower.recording import Recorded
from ferret_flwr.flower.secure import (
    FIRST_RANGE,
    HALTED,
    LEVELS,
    MARGIN,
    SecureServer,
    clipping_range,
    quantisation_error,
)
from ferret_flwr.ledger import Ledger
from tests.flower.small import COEFFICIENTS, SmallFederation, be_a_node, replica

NODES = 5


class Leaves(Exception):
    """A node that is gone."""


class LocalGrid:
    """Flower's grid in this process: a message goes to the real ClientApp of its node."""

    def __init__(self, federation: SmallFederation, run_config: dict[str, object]) -> None:
        self.sent: list[tuple[str, int, Message]] = []  # stage, node, reply
        self.gone: dict[int, str] = {}  # node -> the stage from which on it does not answer
        self.changed: dict[int, float] = {}  # node -> factor on its update
        self.true: dict[tuple[int, int], np.ndarray] = {}  # round, node -> γ
        self.apps = {}
        for proxy in federation.proxies:
            node = proxy.node
            own = {"partition-id": node, "num-partitions": NODES}
            context = Context(1, node, own, RecordDict(), run_config)  # type: ignore[arg-type]
            self.apps[node] = self.app(federation, node, self.spoil(node)), context

    @staticmethod
    def app(federation: SmallFederation, node: int, mod) -> ClientApp:  # type: ignore[no-untyped-def]
        return ClientApp(client_fn=lambda context: federation.client(node), mods=[privacy_mod, mod])

    def spoil(self, node: int):  # type: ignore[no-untyped-def]
        """Return a mod that changes what the node has computed, before anything else sees it."""

        def mod(msg, ctxt, call_next):  # type: ignore[no-untyped-def]
            answer = call_next(msg, ctxt)
            reply = compat.recorddict_to_fitres(answer.content, keep_input=True)
            if not reply.parameters.tensors:
                return answer
            (projected,) = parameters_to_ndarrays(reply.parameters)
            projected = projected * np.float32(self.changed.get(node, 1.0))
            self.true[int(reply.metrics["round"]), node] = projected
            reply.parameters = ndarrays_to_parameters([projected])
            answer.content = compat.fitres_to_recorddict(reply, keep_input=True)
            return answer

        return mod

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        replies = []
        for message in messages:
            node = message.metadata.dst_node_id
            message.content = recorddict_from_proto(recorddict_to_proto(message.content))
            stage = str(message.content.config_records[RECORD_KEY_CONFIGS][Key.STAGE])
            try:
                if node in self.gone and Stage.all().index(stage) >= Stage.all().index(
                    self.gone[node]
                ):
                    raise Leaves
                app, context = self.apps[node]
                reply = app(message, context)
                self.sent.append((stage, node, reply))
            except Exception as error:
                reply = Message(Error(code=2, reason=repr(error)), reply_to=message)
            replies.append(reply)
        return replies


class Scene:
    """A server and nodes that aggregate securely."""

    def __init__(self, folder: Path, run_config: dict[str, object] | None = None) -> None:
        be_a_node()
        self.federation = SmallFederation(folder, NODES)
        asked = run_config or {"privacy.secure-aggregation": True}
        self.grid = LocalGrid(self.federation, asked)
        self.rows: list[dict] = []
        self.ferret = Ferret(
            FedAvg(fraction_evaluate=0.0),
            FerretConfig(coefficients=COEFFICIENTS),
            replica=replica(),
            secure=True,
        )

    def run(self, rounds: int) -> Ledger:
        manager = SimpleClientManager()
        for proxy in self.federation.proxies:
            proxy.node_id, proxy.grid = proxy.node, self.grid  # type: ignore[attr-defined]
            manager.register(proxy)
        recorded = Recorded(self.ferret, self.rows.append)
        SecureServer(manager, recorded, lambda: None, nullcontext(), 0.6).fit(rounds, timeout=None)
        assert self.ferret.ledger is not None
        return self.ferret.ledger

    def mean(self, round: int, without: tuple[int, ...] = ()) -> np.ndarray:
        rows = [self.grid.true[round, node] for node in range(NODES) if node not in without]
        return np.mean(rows, axis=0, dtype=np.float64)


def gamma(ledger: Ledger, round: int) -> np.ndarray:
    entry = ledger.entries[round - 1]
    return entry.coefficients[0].astype(np.float64) / entry.rate


def check(ledger: Ledger, scene: Scene, round: int, without: tuple[int, ...] = ()) -> None:
    """Hold a published round against the mean in the open, within one level of each node."""
    step = 2 * scene.rows[round]["secure/range"] / LEVELS
    expected = scene.mean(round, without)
    np.testing.assert_allclose(gamma(ledger, round), expected, atol=2 * step, rtol=1e-6)
    assert np.abs(expected).max() > 100 * step  # a wrong mean would show


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    return Scene(tmp_path)


def test_the_mean_is_published_and_the_range_follows_it(scene: Scene) -> None:
    ledger = scene.run(3)
    assert len(ledger) == 3
    for round in (1, 2, 3):
        check(ledger, scene, round)
    ranges = [row["secure/range"] for row in scene.rows[1:]]
    assert ranges[0] == FIRST_RANGE
    rms = np.sqrt(np.square(gamma(ledger, 1)).mean())
    assert ranges[1] == pytest.approx(MARGIN * np.sqrt(NODES) * rms, rel=1e-4)
    assert scene.federation.loss(scene.ferret.replica) < 2.0  # type: ignore[arg-type]


def test_the_error_is_what_the_row_says(scene: Scene) -> None:
    ledger = scene.run(1)
    said = scene.rows[1]["secure/quantisation_error"]
    assert said == quantisation_error(FIRST_RANGE, NODES)
    error = gamma(ledger, 1) - scene.mean(1)
    # Of 128 numbers; a level is hit anywhere, so the mean variance is 2/3 of the largest.
    assert 0.5 * said < error.std() < 1.2 * said


@pytest.mark.parametrize("stage", Stage.all())
def test_a_node_that_leaves_is_left_out_or_counted(stage: str, scene: Scene) -> None:
    """Before it has sent its masked vector it is left out; after, the others undo its mask."""
    scene.grid.gone[2] = stage
    ledger = scene.run(2)
    assert len(ledger) == 2
    without = () if stage == Stage.UNMASK else (2,)
    for round in (1, 2):
        check(ledger, scene, round, without)


@pytest.mark.parametrize("factor", [np.nan, np.inf, 1e6])
def test_what_cannot_be_masked_is_caught_before(factor: float, scene: Scene) -> None:
    scene.grid.changed[3] = factor
    ledger = scene.run(1)
    check(ledger, scene, 1, without=(3,))


def test_too_many_leave_and_nothing_is_published(scene: Scene) -> None:
    scene.grid.gone |= {node: Stage.COLLECT_MASKED_VECTORS for node in (0, 1, 2)}
    assert len(scene.run(1)) == 0
    assert not [node for stage, node, _ in scene.grid.sent if stage == Stage.UNMASK]
    assert scene.rows[1]["nodes"] == 0 and scene.rows[1]["failures"] == [HALTED]


def test_a_round_of_one_node_says_so(scene: Scene) -> None:
    scene.federation.proxies = scene.federation.proxies[:1]
    scene.ferret.strategy = FedAvg(
        fraction_evaluate=0.0, min_fit_clients=1, min_available_clients=1
    )
    assert len(scene.run(1)) == 0
    assert scene.rows[1]["failures"] == ["a mask takes at least two nodes, asked were 1"]


def test_more_nodes_than_can_be_summed_are_refused(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(secure, "MOST_NODES", NODES - 1)
    with pytest.raises(ConfigError, match=f"at most {NODES - 1} nodes a round, got {NODES}"):
        scene.run(1)
    assert not scene.ferret.ledger


def test_the_range_widens_until_the_coefficients_fit(scene: Scene) -> None:
    scene.grid.changed = dict.fromkeys(range(NODES), 1000.0)
    ledger = scene.run(3)
    assert len(ledger) >= 1
    tried = [row["secure/range"] for row in scene.rows[1:]]
    assert tried[1] == 16 * tried[0]


def test_a_node_at_other_parameters_spoils_the_round_and_not_the_model(scene: Scene) -> None:
    """Its vector is in the mean and cannot be taken out."""
    honest = scene.grid.spoil(1)

    def elsewhere(msg, ctxt, call_next):  # type: ignore[no-untyped-def]
        answer = honest(msg, ctxt, call_next)
        reply = compat.recorddict_to_fitres(answer.content, keep_input=True)
        reply.metrics["fingerprint"] = "0" * 16
        answer.content = compat.fitres_to_recorddict(reply, keep_input=True)
        return answer

    context = scene.grid.apps[1][1]
    app = scene.grid.app(scene.federation, 1, elsewhere)
    scene.grid.apps[1] = app, context
    assert len(scene.run(1)) == 0
    assert "stale or has diverged" in scene.rows[1]["failures"][0]


def test_nothing_else_is_said_in_clear(scene: Scene) -> None:
    scene.run(1)
    vectors = [(n, r) for stage, n, r in scene.grid.sent if stage == Stage.COLLECT_MASKED_VECTORS]
    assert len(vectors) == NODES
    for node, message in vectors:
        reply = compat.recorddict_to_fitres(message.content, keep_input=True)
        assert not reply.parameters.tensors
        assert reply.num_examples == 1
        assert sorted(reply.metrics) == sorted(PROTOCOL)
        masked = message.content.config_records[RECORD_KEY_CONFIGS][Key.MASKED_PARAMETERS]
        numbers = np.concatenate([bytes_to_ndarray(part).ravel() for part in masked])[1:]  # type: ignore[arg-type,union-attr]
        plain = scene.grid.true[1, node]
        # Uniform in 0..2³²: mean and correlation with the truth are those of chance.
        assert abs(numbers.mean() / 2**32 - 0.5) < 5 / np.sqrt(12 * COEFFICIENTS)
        assert abs(np.corrcoef(numbers, plain)[0, 1]) < 5 / np.sqrt(COEFFICIENTS)
    for stage, _, message in scene.grid.sent:
        if stage != Stage.COLLECT_MASKED_VECTORS:
            assert set(message.content.config_records) == {RECORD_KEY_CONFIGS}
            assert not message.content.array_records
    assert not {"train/loss", "ferret/fidelity", "time/local_s"} & scene.rows[1].keys()


def test_local_noise_is_under_the_mask(tmp_path: Path) -> None:
    scene = Scene(
        tmp_path,
        {
            "privacy.secure-aggregation": True,
            "strategy.min-train-nodes": 3,
            "strategy.min-available-nodes": 3,
            "privacy.mechanism": "local",
            "privacy.clipping-norm": 0.5,
            "privacy.noise-multiplier": 2.0,
        },
    )
    ledger = scene.run(1)
    rows = [scene.grid.true[1, node].astype(np.float64) for node in range(NODES)]
    clipped = np.mean([row * min(1, 0.5 / np.linalg.norm(row)) for row in rows], axis=0)
    noise = gamma(ledger, 1) - clipped
    std = 2.0 * 0.5 / np.sqrt(NODES)
    assert abs(noise.std() / std - 1) < 5 / np.sqrt(2 * COEFFICIENTS)


def test_bytes_of_all_stages_are_counted(scene: Scene) -> None:
    scene.run(1)
    row = scene.rows[1]
    assert row["comm/uplink_bytes_per_node"] > 8 * COEFFICIENTS  # masked numbers are int64
    assert row["comm/downlink_bytes"] > row["comm/downlink_bytes_per_node"] > 0


def test_a_node_that_wants_masks_answers_nothing_in_clear(scene: Scene) -> None:
    app, _ = scene.grid.apps[0]
    own = {"partition-id": 0, "num-partitions": NODES, "privacy.secure-aggregation": True}
    context = Context(1, 0, own, RecordDict(), {})  # type: ignore[arg-type]
    content = compat.fitins_to_recorddict(FitIns(ndarrays_to_parameters([]), {}), keep_input=True)
    message = Message(content, dst_node_id=0, message_type=MessageType.TRAIN)
    with pytest.raises(ConfigError, match="trains with secure aggregation only"):
        app(message, context)


def test_the_range_of_nothing_is_flowers() -> None:
    base = Ledger(replica().header)
    assert clipping_range(base, 7) == FIRST_RANGE


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "needs 'strategy.min-train-nodes' of at least 3"),
        ({"privacy.mechanism": "central-fixed"}, "hides from the server what 'central-fixed'"),
        ({"strategy.name": "fedmedian"}, "needs 'strategy.name' = 'fedavg'"),
        ({"method": "fedavg"}, "needs 'method' = 'ferret'"),
        ({"strategy.fraction-evaluate": 0.5}, "needs 'strategy.fraction-evaluate' = 0.0"),
        (
            {"privacy.secure-aggregation": False, "privacy.secure-threshold": 0.7},
            "'privacy.secure-threshold' needs",
        ),
    ],
    ids=lambda value: "" if isinstance(value, dict) else None,
)
def test_what_it_cannot_go_with_is_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse({"privacy.secure-aggregation": True} | settings)  # type: ignore[arg-type]


def test_the_app_gets_the_server_for_it(tmp_path: Path) -> None:
    from ferret_flwr.flower.serverapp import Run

    settings = {
        "privacy.secure-aggregation": True,
        "strategy.min-train-nodes": 3,
        "strategy.min-available-nodes": 3,
        "evaluate.every": 0,
        "results-dir": str(tmp_path),
    }
    components = Run(parse(settings)).components()  # type: ignore[arg-type]
    assert isinstance(components.server, SecureServer)
    assert components.server.ferret.secure
