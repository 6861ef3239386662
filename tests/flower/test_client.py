"""`FerretClient.of`, as the README shows it: a plain PyTorch model in somebody's own project."""

from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import Context, RecordDict
from flwr.client import Client
from flwr.server import Server, SimpleClientManager
from flwr.server.strategy import FedAvg

from ferret_flwr.config import ConfigError, FerretConfig
from ferret_flwr.flower import Ferret, FerretClient
from ferret_flwr.projection.layout import Layout
from ferret_flwr.replica import Replica
from ferret_flwr.training.tensors import masters_of
from tests.flower.in_process import InProcess

WEIGHTS = np.random.default_rng(0).standard_normal((3, 20)).astype(np.float32)
TRUTH = np.random.default_rng(1).standard_normal((3, 20)).astype(np.float32)


def load_model() -> torch.nn.Linear:
    model = torch.nn.Linear(20, 3)
    with torch.no_grad():
        model.weight.copy_(torch.from_numpy(WEIGHTS))
        model.bias.zero_()
    return model


def loss_of(model: torch.nn.Linear, node: int) -> torch.Tensor:
    x = torch.from_numpy(np.random.default_rng(2 + node).standard_normal((64, 20))).float()
    return ((model(x) - x @ torch.from_numpy(TRUTH).T) ** 2).mean()


@pytest.fixture
def nodes(tmp_path: Path) -> list[InProcess]:
    def client_fn(node: int) -> Client:
        model = load_model()

        def train(round: int, config: dict[str, object]) -> tuple[int, dict[str, float]]:
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            for _ in range(5):
                optimizer.zero_grad()
                loss = loss_of(model, node)
                loss.backward()
                optimizer.step()
            return 64, {"train/loss": float(loss)}

        context = Context(
            run_id=1,
            node_id=node,
            node_config={"partition-id": node, "ferret.cache-dir": str(tmp_path)},
            state=RecordDict(),
            run_config={},
        )
        return FerretClient.of(model, train, context).to_client()

    return [InProcess(node, client_fn) for node in range(2)]


def in_node(tmp_path: Path, **config: object) -> Context:
    own = {"ferret.cache-dir": str(tmp_path)} | config
    return Context(run_id=1, node_id=7, node_config=own, state=RecordDict(), run_config={})


def test_the_owner_of_a_node_limits_what_it_sends(tmp_path: Path) -> None:
    own = in_node(tmp_path, **{"partition-id": 0, "ferret.coefficients": 100})
    client = FerretClient.of(load_model(), lambda round, config: (1, {}), own)
    assert client.most_coefficients == 100


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "'partition-id' is missing in the node-config of node 7"),
        ({"partition-id": 0, "ferret.coeficients": 9}, "did you mean 'ferret.coefficients'"),
    ],
)
def test_a_wrong_node_config_is_named(
    config: dict[str, object], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        FerretClient.of(load_model(), lambda round, config: (1, {}), in_node(tmp_path, **config))


def test_learns_in_a_project_of_its_own(nodes: list[InProcess]) -> None:
    model = load_model()
    parameters = dict(model.named_parameters())
    replica = Replica(Layout.of(parameters), masters_of(parameters))
    strategy = Ferret(FedAvg(fraction_evaluate=0.0), FerretConfig(coefficients=64))
    manager = SimpleClientManager()
    for node in nodes:
        manager.register(node)
    server = Server(client_manager=manager, strategy=strategy)
    server.set_max_workers(1)
    before = float(loss_of(model, 0))
    server.fit(12, timeout=None)
    assert not strategy.refused
    assert len(strategy.ledger) == 12
    replica.follow(strategy.ledger)
    with torch.no_grad():
        for parameter, array in zip(parameters.values(), replica.arrays, strict=True):
            parameter.copy_(torch.from_numpy(array))
    assert float(loss_of(model, 0)) < before / 3
