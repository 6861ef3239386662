"""A federation in this process: Flower's own server loop, real clients, a tiny real model."""

from pathlib import Path

import pytest
from flwr.client import Client
from flwr.common import Code, Status
from flwr.server import Server, SimpleClientManager
from flwr.server.strategy import FedAvg, Strategy

from ferret_flwr.config import Config, parse
from ferret_flwr.flower import Ferret, FerretClient
from ferret_flwr.flower.cache import LedgerCache
from ferret_flwr.training.worker import Node
from tests.flower.in_process import InProcess

SETTINGS = {
    "train.steps": 2,
    "train.batch-size": 4,
    "train.gradient-accumulation": 1,
    "train.learning-rate": 0.1,
    "ferret.coefficients": 512,
    "num-server-rounds": 3,
}


@pytest.fixture
def config() -> Config:
    """Return a small run on the built-in model and data."""
    return parse(SETTINGS)


class Federation:
    """Nodes with caches in one folder, and a server that a test can stop and start again."""

    def __init__(self, config: Config, folder: Path, nodes: int = 2) -> None:
        self.config = config
        self.folder = folder
        self.nodes = [Node.of(config, i, nodes) for i in range(nodes)]
        self.proxies = [InProcess(i, self.client) for i in range(nodes)]

    def client(self, node: int, run: int = 1) -> Client:
        """Return a fresh client, as a deployment starts one for each message."""
        return self.numpy_client(node, run).to_client()

    def numpy_client(self, node: int, run: int = 1) -> FerretClient:
        worker = self.nodes[node].worker

        def train(round, config, applied=None):  # type: ignore[no-untyped-def]
            result = self.nodes[node].train(round, applied)
            return len(self.nodes[node].examples), {"train/loss": result.loss}

        def evaluate(round, config):  # type: ignore[no-untyped-def]
            return 1.5, 10, {"round": round}

        return FerretClient(
            worker.parameters,
            train,
            worker.in_place if self.config.train.memory == "lean" else worker.follower,
            LedgerCache(self.folder, run, node, snapshots=False),
            evaluate=evaluate,
            partition_id=node,
        )

    def ferret(self, inner: Strategy | None = None, **arguments: object) -> Ferret:
        """Return the strategy for this federation, without a model on the server."""
        inner = inner or FedAvg(fraction_evaluate=0.0)
        return Ferret(inner, self.config.ferret, seed=self.config.seed, **arguments)

    def run(self, strategy: Strategy, rounds: int) -> None:
        """Run Flower's own loop."""
        manager = SimpleClientManager()
        for proxy in self.proxies:
            manager.register(proxy)
        server = Server(client_manager=manager, strategy=strategy)
        server.set_max_workers(1)  # the nodes share one model
        server.fit(rounds, timeout=None)


@pytest.fixture
def federation(config: Config, tmp_path: Path) -> Federation:
    """Return a federation of two nodes."""
    return Federation(config, tmp_path / "cache")


OK = Status(code=Code.OK, message="Success")
