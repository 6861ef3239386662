"""A small model, and what two processes that share it do with it and without one another."""

from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from flwr.app import Context, RecordDict
from flwr.server import History, Server, SimpleClientManager
from flwr.server.strategy import FedAvg
from torch.nn import functional

from ferret_flwr.config import FerretConfig
from ferret_flwr.flower import Ferret, FerretClient
from tests.flower.in_process import InProcess

TOKENS, WIDTH = 23, 10  # 12 and 11 rows


class Tied(torch.nn.Module):
    """The embedding is the head, a row is alone, and something is frozen."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(TOKENS, WIDTH)
        self.inner = torch.nn.Linear(WIDTH, 7)
        self.outer = torch.nn.Linear(7, WIDTH, bias=False)
        self.shift = torch.nn.Parameter(torch.empty(1, WIDTH))
        self.fixed = torch.nn.Linear(WIDTH, WIDTH, bias=False)
        self.norm = torch.nn.LayerNorm(WIDTH)
        self.head = torch.nn.Linear(WIDTH, TOKENS, bias=False)
        self.head.weight = self.embed.weight
        self.fixed.weight.requires_grad_(False)
        generator = np.random.default_rng(0)
        with torch.no_grad():
            for parameter in self.parameters():
                drawn = generator.standard_normal(tuple(parameter.shape))
                parameter.copy_(torch.from_numpy(drawn / 3))
        self.to(dtype)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.fixed(self.embed(tokens)) + self.shift
        return self.head(self.norm(x + self.outer(torch.tanh(self.inner(x)))))


def shard(model: Tied, *, replicas: int = 1) -> Tied:
    """Shard it over all processes, the inner layers in groups of their own; or keep replicas."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    processes = dist.get_world_size()
    shape = (processes,) if replicas == 1 else (replicas, processes // replicas)
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicas", "shards")[-len(shape) :])
    alone = {model.shift} if replicas > 1 else set()
    for part in (model.inner, model.outer, model):
        fully_shard(part, mesh=mesh, ignored_params=alone)
    return model


def step(model: Tied, seed: int, rate: float = 1.0) -> float:
    """Take a step of SGD; every process of a sharded model has the same examples."""
    generator = np.random.default_rng(seed)
    tokens = torch.from_numpy(generator.integers(TOKENS, size=(2, 8, 6)))
    loss = functional.cross_entropy(model(tokens[0]).flatten(0, 1).float(), tokens[1].flatten())
    loss.backward()
    torch.optim.SGD(model.parameters(), lr=rate).step()
    model.zero_grad()
    return loss.item()


def loss_of(model: Tied) -> float:
    """Return a loss without a backward pass, after which FSDP would keep whole parameters."""
    with torch.no_grad():
        tokens = torch.arange(TOKENS)[None]
        return functional.cross_entropy(model(tokens)[0].float(), tokens[0].flip(0)).item()


def context_of(node: int, folder: Path) -> Context:
    """Return what Flower would hand to a node's ``client_fn``."""
    own = {"partition-id": node, "ferret.cache-dir": str(folder)}
    return Context(1, node, own, RecordDict(), {})


def client_of(model: Tied, context: Context) -> FerretClient:
    """Return the client of a node."""
    node = int(context.node_config["partition-id"])

    def train(round, config):  # type: ignore[no-untyped-def]
        before = step(model, 10 * round + node)
        return 8, {"train/loss": before, "train/after": loss_of(model)}

    def evaluate(round, config):  # type: ignore[no-untyped-def]
        return loss_of(model), 8, {}

    return FerretClient.of(model, train, context, evaluate=evaluate)


def make_client(context: Context) -> FerretClient:
    """Return the client of one of the processes of a node."""
    return client_of(shard(Tied(torch.float32)), context)


def federation(
    clients: list[FerretClient], rounds: int = 3
) -> tuple[Ferret, History, list[InProcess]]:
    """Run Flower's own loop; return the strategy, what was measured, and the nodes."""
    inner = FedAvg(min_fit_clients=1, min_evaluate_clients=1, min_available_clients=1)
    strategy = Ferret(inner, FerretConfig(coefficients=150))
    manager = SimpleClientManager()
    nodes = [
        InProcess(node, lambda _, client=client: client.to_client())
        for node, client in enumerate(clients)
    ]
    for node in nodes:
        manager.register(node)
    server = Server(client_manager=manager, strategy=strategy)
    server.set_max_workers(1)
    history, _ = server.fit(rounds, timeout=None)
    return strategy, history, nodes
