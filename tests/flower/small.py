"""A federation that learns in milliseconds: real strategy, real clients, softmax regression."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from flwr.app import Context, Message, MessageType, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.typing import Mod
from flwr.common import FitIns, FitRes, ndarrays_to_parameters, parameters_to_ndarrays
from flwr.compat.common import recorddict_compat as compat
from flwr.server import Server, SimpleClientManager
from flwr.server.strategy import Strategy
from flwr.supercore.task_identity import TaskIdentity
from torch.nn import functional

from ferret_flwr.config import FerretConfig
from ferret_flwr.flower import Ferret, FerretClient
from ferret_flwr.flower.cache import LedgerCache
from ferret_flwr.follower import Follower
from ferret_flwr.projection.layout import Layout
from ferret_flwr.replica import Replica
from ferret_flwr.training.tensors import load_masters, masters_of, trainable_parameters
from tests.flower.in_process import InProcess

FEATURES, CLASSES, EXAMPLES = 32, 8, 64
COEFFICIENTS = 128  # of 264 parameters
UNTRAINED = float(np.log(CLASSES))

Change = Callable[[np.ndarray, np.random.Generator], np.ndarray]


def data(seed: int, count: int = EXAMPLES) -> tuple[torch.Tensor, torch.Tensor]:
    """Return features and labels; the teacher is the same for all seeds."""
    teacher = np.random.default_rng(0).standard_normal((FEATURES, CLASSES))
    features = np.random.default_rng((1, seed)).standard_normal((count, FEATURES))
    labels = (features @ teacher).argmax(axis=1)
    return torch.tensor(features, dtype=torch.float32), torch.tensor(labels)


def replica() -> Replica:
    """Return a replica of the untrained model."""
    parameters = trainable_parameters(model())
    return Replica(Layout.of(parameters), masters_of(parameters))


def model() -> torch.nn.Linear:
    """Return the untrained model, zero everywhere."""
    linear = torch.nn.Linear(FEATURES, CLASSES)
    for parameter in linear.parameters():
        torch.nn.init.zeros_(parameter)
    return linear


class Dishonest(InProcess):
    """A node whose coefficients are changed on their way."""

    def __init__(self, node: int, make_client: Callable, change: Change) -> None:  # type: ignore[type-arg]
        super().__init__(node, make_client)
        self.change = change
        self.generator = np.random.default_rng((2, node))

    def fit(self, ins: FitIns, timeout: float | None, group_id: int | None) -> FitRes:
        reply = super().fit(ins, timeout, group_id)
        (honest,) = parameters_to_ndarrays(reply.parameters)
        changed = self.change(honest, self.generator).astype(np.float32)
        reply.parameters = ndarrays_to_parameters([changed])
        return reply


def be_a_node() -> None:
    """Let Flower take this process for one that runs a ClientApp."""
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1


class ThroughApp(InProcess):
    """A node whose messages pass through a `ClientApp` with mods, as Flower calls it."""

    def __init__(self, node: int, make_client: Callable, mods: list[Mod]) -> None:  # type: ignore[type-arg]
        super().__init__(node, make_client)
        be_a_node()
        self.app = ClientApp(client_fn=lambda context: make_client(node), mods=mods)
        self.context = Context(1, node, {"partition-id": node}, RecordDict(), {})

    def fit(self, ins: FitIns, timeout: float | None, group_id: int | None) -> FitRes:
        message = Message(
            compat.fitins_to_recorddict(ins, keep_input=True),
            dst_node_id=self.node,
            message_type=MessageType.TRAIN,
        )
        return compat.recorddict_to_fitres(self.app(message, self.context).content, keep_input=True)


class SmallFederation:
    """Nodes with data of one kind, some of them dishonest.

    Parameters
    ----------
    folder
        For the nodes' caches.
    nodes
        All of them.
    liars
        How many of them change what they send.
    change
        How they do.
    """

    def __init__(
        self, folder: Path, nodes: int, liars: int = 0, change: Change | None = None
    ) -> None:
        self.folder = folder
        self.held_out = data(seed=10_000, count=512)
        self.proxies: list[InProcess] = [
            Dishonest(i, self.client, change) if change and i < liars else InProcess(i, self.client)
            for i in range(nodes)
        ]

    def client(self, node: int):  # type: ignore[no-untyped-def]
        """Return a fresh client."""
        linear = model()
        parameters = trainable_parameters(linear)
        layout, base = Layout.of(parameters), masters_of(parameters)
        features, labels = data(node)

        def train(round, config):  # type: ignore[no-untyped-def]
            for _ in range(5):
                loss = functional.cross_entropy(linear(features), labels)
                linear.zero_grad()
                loss.backward()
                with torch.no_grad():
                    for parameter in linear.parameters():
                        parameter -= 0.2 * parameter.grad
            return len(labels), {"train/loss": loss.item()}

        return FerretClient(
            parameters,
            train,
            Follower(layout, lambda: [array.copy() for array in base]),
            LedgerCache(self.folder, 1, node, snapshots=False),
            partition_id=node,
        ).to_client()

    def through_app(self, *mods: Mod) -> None:
        """Give every node's ClientApp these mods."""
        self.proxies = [ThroughApp(p.node, self.client, list(mods)) for p in self.proxies]

    def loss(self, learned: Replica) -> float:
        """Return the held-out loss."""
        linear = model()
        load_masters(trainable_parameters(linear), learned.arrays)
        features, labels = self.held_out
        with torch.no_grad():
            return functional.cross_entropy(linear(features), labels).item()

    def ferret(self, inner: Strategy, **settings: object) -> Ferret:
        """Return a strategy around ``inner`` with a replica of its own."""
        config = FerretConfig(coefficients=COEFFICIENTS, **settings)  # type: ignore[arg-type]
        return Ferret(inner, config, replica=replica())

    def run(self, strategy: Strategy, rounds: int) -> None:
        """Run Flower's own loop."""
        manager = SimpleClientManager()
        for proxy in self.proxies:
            manager.register(proxy)
        Server(client_manager=manager, strategy=strategy).fit(rounds, timeout=None)
