"""Ordinary Flower apps in this process: real ClientApps, and both of Flower's server loops."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from threading import Lock

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.client import NumPyClient
from flwr.clientapp import ClientApp
from flwr.common import ndarrays_to_parameters, parameters_to_ndarrays
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.server import History, Server, SimpleClientManager
from flwr.server.compat.grid_client_proxy import GridClientProxy
from flwr.server.strategy import FedAvg, Strategy
from flwr.serverapp.strategy import FedAvg as MessageFedAvg
from flwr.serverapp.strategy import Result
from flwr.serverapp.strategy import Strategy as MessageStrategy
from flwr.supercore.task_identity import TaskIdentity

from ferret_flwr.flower import bases, ferret_mod
from ferret_flwr.report import show_progress

Train = Callable[[list[np.ndarray], int], list[np.ndarray]]


def start_arrays() -> dict[str, np.ndarray]:
    """Return what a model with every kind of array starts from."""
    rng = np.random.default_rng(5)
    return {
        "embed": tied(),
        "norm": np.ones(30, dtype=np.float32),
        "count": np.array(7, dtype=np.int64),
        "half": rng.standard_normal((30, 20)).astype(np.float16),
        "frozen": rng.standard_normal((20, 20)).astype(np.float32),
        "head": rng.standard_normal((30, 10)),  # float64
        "mask": np.tril(np.ones((4, 4), dtype=bool)),
        "scalar": np.array(0.5, dtype=np.float32),
        "tied": tied(),
    }


def tied() -> np.ndarray:
    """Return what two names stand for."""
    return np.random.default_rng(6).standard_normal((40, 30)).astype(np.float32)


def train(arrays: list[np.ndarray], partition: int) -> list[np.ndarray]:
    """Move every array towards one of the node's own, but for ``frozen``; count the step."""
    rng = np.random.default_rng(100 + partition)
    names, trained = list(start_arrays()), []
    for name, array in zip(names, arrays, strict=True):
        if name in ("count", "frozen", "mask"):
            trained.append(np.asarray(array + 1 if name == "count" else array))
            continue
        step = 0.1 * (rng.standard_normal(array.shape) - array)
        trained.append(np.asarray(array + step, dtype=array.dtype))
    trained[names.index("tied")] = trained[names.index("embed")]
    return trained


class NumPyApp(NumPyClient):
    """A client as ordinary projects have one: it knows arrays only."""

    def __init__(self, partition: int, train: Train) -> None:
        self.partition = partition
        self.train = train

    def get_parameters(self, config):  # type: ignore[no-untyped-def]
        return list(start_arrays().values())

    def fit(self, parameters, config):  # type: ignore[no-untyped-def]
        assert "ferret" not in config
        return self.train(parameters, self.partition), 10 + self.partition, {"seen": 1.0}

    def evaluate(self, parameters, config):  # type: ignore[no-untyped-def]
        assert "ferret" not in config
        return float(np.square(parameters[0]).mean()), 10, {"accuracy": 0.5}


def numpy_app(train: Train = train, mods: Iterable = (ferret_mod,)) -> ClientApp:
    """Return a ClientApp around a NumPyClient."""

    def client_fn(context: Context):  # type: ignore[no-untyped-def]
        return NumPyApp(int(context.node_config["partition-id"]), train).to_client()

    return ClientApp(client_fn=client_fn, mods=list(mods))


def message_app(train: Train = train, mods: Iterable = (ferret_mod,)) -> ClientApp:
    """Return the same app, written for the Message API."""
    app = ClientApp(mods=list(mods))

    @app.train()
    def _train(message: Message, context: Context) -> Message:
        assert set(message.content) == {"arrays", "config"}
        partition = int(context.node_config["partition-id"])
        given = message.content["arrays"]
        made = train([array.numpy() for array in given.values()], partition)
        arrays = ArrayRecord({n: Array(a) for n, a in zip(given, made, strict=True)})
        metrics = MetricRecord({"num-examples": 10 + partition, "seen": 1.0})
        return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)

    @app.evaluate()
    def _evaluate(message: Message, context: Context) -> Message:
        first = next(iter(message.content["arrays"].values())).numpy()
        metrics = {"num-examples": 10, "loss": float(np.square(first).mean())}
        return Message(RecordDict({"metrics": MetricRecord(metrics)}), reply_to=message)

    return app


class Nodes:
    """Flower's Grid in this process: real apps behind it, each message a new process to them.

    Messages are written and read as on the wire, so nobody shares an array with anybody.
    """

    def __init__(
        self, app: ClientApp, folder: Path, count: int = 2, config: dict[str, object] | None = None
    ) -> None:
        self.app = app
        self.folder = folder
        self.ids = list(range(1, count + 1))
        self.config = config or {}
        self.fresh = True  # each message is a new process; else they share one, as in a simulation
        self.dead: set[int] = set()
        self.apps_may_fail = False  # answer with an error then, as a SuperNode does
        self.turn = Lock()  # nodes are processes of their own, here they share this one
        self.bytes: list[tuple[str, int, int]] = []  # kind of message, bytes down and up

    def get_node_ids(self) -> list[int]:
        return self.ids

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        with self.turn:
            return [self._answer(message) for message in messages]

    def _answer(self, message: Message) -> Message:
        node = message.metadata.dst_node_id
        content, down = crossed(message.content)
        kind = message.metadata.message_type
        request = Message(content, dst_node_id=node, message_type=kind)
        if self.fresh:
            bases._live.clear()
        if node in self.dead:
            return Message(Error(code=1, reason="it is dead"), reply_to=request)
        try:
            reply = self.app(request, self.context(node))
        except Exception as error:
            if not self.apps_may_fail:
                raise
            return Message(Error(code=1, reason=repr(error)), reply_to=request)
        reply.content, up = crossed(reply.content)
        self.bytes.append((kind, down, up))
        return reply

    def context(self, node: int) -> Context:
        own = {
            "partition-id": node - 1,
            "num-partitions": len(self.ids),
            "ferret.cache-dir": str(self.cache(node)),
        }
        return Context(
            run_id=1, node_id=node, node_config=own, state=RecordDict(), run_config=self.config
        )

    def cache(self, node: int) -> Path:
        return self.folder / f"node-{node}"


def crossed(content: RecordDict) -> tuple[RecordDict, int]:
    """Return what arrives at the other side, and how many bytes it was."""
    written = recorddict_to_proto(content)
    return recorddict_from_proto(written), written.ByteSize()


def sampling(**more: object) -> dict[str, object]:
    """Return what makes a legacy strategy ask every node, and no other."""
    return {"min_fit_clients": 1, "min_available_clients": 1, "min_evaluate_clients": 1} | more


def legacy_fedavg(start: bool = True, **more: object) -> FedAvg:
    """Return an ordinary strategy, which knows what the run starts from or does not."""
    initial = ndarrays_to_parameters(list(start_arrays().values())) if start else None
    return FedAvg(initial_parameters=initial, **sampling(**more))


def run_legacy(strategy: Strategy, nodes: Nodes, rounds: int) -> tuple[list[np.ndarray], History]:
    """Run Flower's loop; return the arrays in the end."""
    manager = SimpleClientManager()
    for node in nodes.ids:
        manager.register(GridClientProxy(node, nodes, run_id=1))
    server = Server(client_manager=manager, strategy=strategy)
    server.set_max_workers(1)
    history, _ = server.fit(rounds, timeout=None)
    return parameters_to_ndarrays(server.parameters), history


def message_fedavg(**more: object) -> MessageFedAvg:
    """Return an ordinary strategy of the Message API."""
    sampling = {"min_train_nodes": 1, "min_available_nodes": 1, "min_evaluate_nodes": 1}
    return MessageFedAvg(**sampling | more)


def run_messages(
    strategy: MessageStrategy, nodes: Nodes, rounds: int, **more: object
) -> tuple[list[np.ndarray], Result]:
    """Run Flower's loop; return the arrays in the end."""
    initial = ArrayRecord({n: Array(a) for n, a in start_arrays().items()})
    result = strategy.start(nodes, initial, num_rounds=rounds, **more)
    return [array.numpy() for array in result.arrays.values()], result


API = {
    "legacy": (numpy_app, legacy_fedavg, run_legacy),
    "message": (message_app, message_fedavg, run_messages),
}


@pytest.fixture(autouse=True)
def messages_are_caught():  # type: ignore[no-untyped-def]
    """Set up our logger before pytest looks for those that do not propagate."""
    show_progress()


@pytest.fixture(autouse=True)
def server_task(monkeypatch: pytest.MonkeyPatch) -> None:
    """Be the process of a ServerApp, whose messages bear its numbers."""
    for number in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, number, 1)


@pytest.fixture(params=API)
def api(request: pytest.FixtureRequest):  # type: ignore[no-untyped-def]
    """Return app, strategy and loop of each of Flower's interfaces."""
    return API[request.param]
