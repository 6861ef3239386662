"""What is done with a model, in one process or in each of two that share it."""

from pathlib import Path

import numba
import numpy as np
import torch
import torch.distributed as dist

from ferret_flwr.ledger import Ledger
from ferret_flwr.methods.ferret import local_round
from ferret_flwr.projection.layout import Blocks, InterleavedBlocks, Layout
from ferret_flwr.projection.plan import RoundPlan
from ferret_flwr.projection.projection import project
from ferret_flwr.replica import Replica
from ferret_flwr.rounds import publish
from ferret_flwr.training.errors import ModelError
from ferret_flwr.training.tensors import as_arrays, load_masters, masters_of, trainable_parameters
from tests.sharded.model import Tied, client_of, context_of, federation, loss_of, shard, step

DTYPES = ["float32", "bfloat16"]
KINDS = ["interleaved", "contiguous"]
EXACT = 2  # tensors, the last ones


def plan_of(kind: str, layout: Layout, round: int) -> RoundPlan:
    """Return a plan of 60 bases or more."""
    size = layout.size - layout.exact_size
    if kind == "interleaved":
        return RoundPlan(
            round, 40 + round, "rademacher", InterleavedBlocks(size, 60), exact=layout.exact_size
        )
    blocks = Blocks(size, 128)
    counts = np.arange(1, blocks.count + 1) * 10
    return RoundPlan(round, 40 + round, "truncated-normal", blocks, counts, layout.exact_size)


def ledger_of(kind: str, replica: Replica) -> Ledger:
    """Return two rounds."""
    ledger = Ledger(replica.header)
    for round in (1, 2):
        plan = plan_of(kind, replica.layout, round)
        drawn = np.random.default_rng(round).standard_normal(plan.num_coefficients)
        ledger = ledger.append(publish(plan, drawn / 50, rate=1.0))
    return ledger


def found(model: Tied, layout: Layout) -> dict[str, np.ndarray]:
    """Follow a ledger, take a step, project it; return all that a node would tell of it."""
    parameters = trainable_parameters(model)
    base = masters_of(parameters)
    outcome: dict[str, np.ndarray] = {}
    for kind in KINDS:
        for exact in (0, EXACT):
            name = f"{kind}-{exact}"
            own = Layout(layout.names, layout.shapes, exact, pieces=layout.pieces)
            replica = Replica(own, [m.copy() for m in base])
            outcome[f"{name}/base"] = np.array(replica.header.base)
            replica.follow(ledger_of(kind, replica))
            outcome[f"{name}/fingerprint"] = np.array(replica.fingerprint)
            outcome |= {f"{name}/m/{i}": m.copy() for i, m in enumerate(replica.arrays)}
            update = [m - b for m, b in zip(replica.arrays, base, strict=True)]
            outcome[f"{name}/gamma"] = project(update, own, plan_of(kind, own, 3))
    replica = Replica(layout, base)
    replica.follow(ledger_of("interleaved", replica))
    load_masters(parameters, replica.arrays)
    outcome |= {f"w/{i}": w.copy() for i, w in enumerate(as_arrays(parameters.values()))}
    plan = plan_of("interleaved", layout, 3)
    update, loss = local_round(replica, parameters, plan, lambda: step(model, 5))
    outcome["round/gamma"], outcome["round/loss"] = update.coefficients, np.array(loss)
    outcome["round/fidelity"] = np.array(update.fidelity)
    return outcome


def run_federation(model: Tied, folder: Path) -> dict[str, np.ndarray]:
    """Run three rounds of ``model`` and of one that lies in this process alone."""
    clients = [
        client_of(model, context_of(0, folder)),
        client_of(Tied(torch.float32), context_of(1, folder)),
    ]
    strategy, history, _ = federation(clients)
    last = strategy.ledger.entries[-1]
    assert not strategy.refused
    replica = clients[0].follower.follow(strategy.ledger)
    assert replica.fingerprint == clients[1].follower.follow(strategy.ledger).fingerprint
    return {
        "run/fingerprint": np.array(replica.fingerprint),
        "run/c": last.coefficients,
        "run/losses": np.array([loss for _, loss in history.losses_distributed]),
    }


def refusals() -> dict[str, str]:
    """Return what is said of models that are sharded in other ways."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.tensor import Shard, distribute_tensor

    from ferret_flwr.training.sharded import is_sharded, layout_of

    said = {}
    columns = torch.nn.Linear(4, 4)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    columns.weight = torch.nn.Parameter(distribute_tensor(columns.weight, mesh, [Shard(1)]))
    older = FullyShardedDataParallel(torch.nn.Linear(4, 4), device_id=torch.device("cpu"))
    for name, look in {
        "columns": lambda: layout_of(columns),
        "older": lambda: is_sharded(older),
    }.items():
        try:
            look()
        except ModelError as error:
            said[name] = str(error)
    return said


def _join(rank: int, processes: int, folder: str) -> None:
    torch.set_num_threads(1)
    numba.set_num_threads(1)
    rendezvous = Path(folder, "rendezvous").as_uri()
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=processes)
    del dist.distributed_c10d._tensor_to_object  # to unpickle what comes over a socket fails


def in_process(rank: int, processes: int, folder: str) -> None:
    """Do it as one of several processes."""
    from ferret_flwr.training.sharded import layout_of

    _join(rank, processes, folder)
    outcome = {}
    for dtype in DTYPES:
        model = shard(Tied(getattr(torch, dtype)))
        loss_of(model)  # the root now holds whole parameters
        layout = layout_of(model)
        assert layout.pieces is not None
        outcome |= {f"{dtype}/{k}": v for k, v in found(model, layout).items()}
        outcome[f"{dtype}/first"] = np.array(layout.pieces.first)
        outcome[f"{dtype}/layout"] = np.array(layout.fingerprint)
    model = shard(Tied(torch.float32), replicas=processes)
    outcome |= {f"replicas/{k}": v for k, v in found(model, layout_of(model)).items()}
    outcome |= {f"refused/{k}": np.array(v) for k, v in refusals().items()}
    outcome |= run_federation(shard(Tied(torch.float32)), Path(folder, f"cache-{rank}"))
    np.savez(Path(folder, f"{rank}.npz"), **outcome)
    dist.destroy_process_group()


def in_grid(rank: int, processes: int, folder: str) -> None:
    """Do it as one of the processes that hold two replicas of the shards."""
    from ferret_flwr.training.sharded import layout_of

    _join(rank, processes, folder)
    model = shard(Tied(torch.float32), replicas=2)
    np.savez(Path(folder, f"{rank}.npz"), **found(model, layout_of(model)))
    dist.destroy_process_group()
