"""What a projection's settings cost in loss: one round, from the same model, with the same updates.

``python -m benchmarks.one_round --recipe examples/gsm8k-smollm2.toml --output results/one-round``

trains the recipe's nodes as FedAvg does, and in each of the first rounds puts every setting's
reconstruction in the place of the average update. The loss behind it is compared with the loss
behind the average itself, so the training is done once, and what differs is the projection alone.
Of the recipe's `ferret.*` keys only the number of coefficients counts.

"lost" is the share of FedAvg's progress in the round that the reconstruction's noise takes away;
below 0 it happened to help.

Adaptive allocations get the exact energies of the round before, better than what a run would know.
In the first round there are none.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.header import header, header_text
from benchmarks.inputs import base_fingerprint, data_hashes
from benchmarks.plan import flattened, pairs, read_toml
from benchmarks.plots import pyplot, save
from benchmarks.summary import mean_std
from ferret_flwr.config import Config, ConfigError, FerretConfig, parse
from ferret_flwr.files import write_atomic
from ferret_flwr.flower.wire import node_seed
from ferret_flwr.projection import projection
from ferret_flwr.projection.allocation import energies_of
from ferret_flwr.projection.kernels.philox import derive_seed
from ferret_flwr.projection.layout import Blocks, Layout
from ferret_flwr.projection.plan import RoundPlan
from ferret_flwr.rounds import bases_per_block, blocks_for, publish
from ferret_flwr.training.errors import DataError, ModelError
from ferret_flwr.training.tensors import load_masters, masters_of
from ferret_flwr.training.worker import Node, Worker, score

Arrays = list[np.ndarray]


def settings(coefficients: int) -> dict[str, FerretConfig]:
    """Return what is compared, by name: each differs from the first in what its name says."""
    if coefficients < 16:
        raise ConfigError(f"'ferret.coefficients' must be at least 16 here, got {coefficients}")
    base = FerretConfig(coefficients=coefficients)
    found = {
        "interleaved": base,
        f"K = {coefficients // 8}": replace(base, coefficients=coefficients // 8),
        f"K = {coefficients * 8}": replace(base, coefficients=coefficients * 8),
        "truncated normal": replace(base, family="truncated-normal"),
        "bases per client": replace(base, bases="per-client"),
        "server rate 0.5": replace(base, server_rate=0.5),
        "server rate 1.5": replace(base, server_rate=1.5),
    }
    for blocks in (coefficients // 16, coefficients // 4, coefficients // 2, coefficients):
        found[f"contiguous, L = {blocks}, uniform"] = replace(
            base, blocks=blocks, allocation="uniform"
        )
    for allocation in ("norm", "variance", "energy"):
        found[f"contiguous, L = {coefficients // 16}, {allocation}"] = replace(
            base, blocks=coefficients // 16, allocation=allocation
        )
    return found


@dataclass(frozen=True, eq=False)
class Round:
    """One round of FedAvg.

    Attributes
    ----------
    number
        1 for the first.
    before
        The parameters that nodes train from, in float32.
    updates
        Each node's Δ = before − after.
    previous
        The average update of the round before, if there is one.
    """

    number: int
    before: Arrays
    updates: list[Arrays]
    previous: Arrays | None

    @cached_property
    def average(self) -> Arrays:
        """Return the mean of the updates; nodes take equal steps, so they weigh the same."""
        return mean(self.updates)


def mean(updates: Sequence[Arrays]) -> Arrays:
    """Return the element-wise mean of tensors."""
    return [np.mean(tensors, axis=0, dtype=np.float32) for tensors in zip(*updates, strict=True)]


def rounds(nodes: Sequence[Node], count: int) -> Iterator[Round]:
    """Yield the first ``count`` rounds of FedAvg over ``nodes``."""
    parameters = nodes[0].worker.parameters
    now, previous = masters_of(parameters), None
    for number in range(1, count + 1):
        updates = []
        for node in nodes:
            load_masters(parameters, now)
            node.train(number)
            after = masters_of(parameters)
            updates.append([a - b for a, b in zip(now, after, strict=True)])
        this = Round(number, now, updates, previous)
        yield this
        previous = this.average
        now = [a - b for a, b in zip(now, previous, strict=True)]


def reconstruction(this: Round, layout: Layout, config: FerretConfig, seed: int) -> Arrays:
    """Return what the nodes' coefficients, averaged, are reconstructed to."""
    blocks = blocks_for(layout.size, config)
    counts = None
    if isinstance(blocks, Blocks):
        energies = np.ones(blocks.count)
        if this.previous is not None:
            energies = energies_of(this.previous, layout, blocks)
        energies = np.maximum(energies, config.energy_floor * energies.mean())
        counts = bases_per_block(energies, blocks, config)
    plan = RoundPlan(this.number, derive_seed(seed, this.number), config.family, blocks, counts)
    if config.bases == "shared":
        return _hat(this.average, layout, plan, config.server_rate)
    own = [plan.with_seed(node_seed(plan, config.bases, i)) for i in range(len(this.updates))]
    hats = [_hat(u, layout, p, config.server_rate) for u, p in zip(this.updates, own, strict=True)]
    return mean(hats)


def _hat(update: Arrays, layout: Layout, plan: RoundPlan, rate: float) -> Arrays:
    (coefficients,) = publish(plan, projection.project(update, layout, plan), rate).coefficients
    flat = projection.reconstruct(coefficients, layout, plan)
    return [hat.reshape(shape) for hat, shape in zip(flat, layout.shapes, strict=True)]


def measure(config: Config, count: int, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """Return a row for each round: the losses, and what each setting lost with each seed."""
    nodes_count = config.strategy.min_available_nodes
    nodes = [Node.of(config, i, nodes_count) for i in range(nodes_count)]
    worker = nodes[0].worker
    held_out = worker.split(config.dataset, config.seed).test

    def loss_behind(this: Round, update: Arrays) -> float:
        load_masters(worker.parameters, (a - b for a, b in zip(this.before, update, strict=True)))
        return score(worker.lm, held_out, config)["loss"]

    return [
        _row(this, worker, settings(config.ferret.coefficients), seeds, loss_behind)
        for this in rounds(nodes, count)
    ]


def _row(
    this: Round,
    worker: Worker,
    compared: dict[str, FerretConfig],
    seeds: Sequence[int],
    loss: Callable[[Round, Arrays], float],
) -> dict[str, Any]:
    before = loss(this, [np.zeros_like(array) for array in this.before])
    fedavg = loss(this, this.average)
    print(f"round {this.number}: loss {before:.4f}, after FedAvg {fedavg:.4f}", flush=True)
    lost: dict[str, list[float]] = {}
    for name, config in compared.items():
        if this.previous is None and config.blocks and config.allocation != "uniform":
            continue
        start = time.perf_counter()
        losses = [loss(this, reconstruction(this, worker.layout, config, seed)) for seed in seeds]
        lost[name] = [(value - fedavg) / (before - fedavg) for value in losses]
        center, spread = mean_std(lost[name])
        print(
            f"  {name:<36} lost {center:7.1%} ± {spread:.1%}   "
            f"({time.perf_counter() - start:.0f} s)",
            flush=True,
        )
    return {"round": this.number, "before": before, "fedavg": fedavg, "lost": lost}


def plot(rows: Sequence[dict[str, Any]], title: str, path: Path) -> None:
    """Draw what each setting lost, a panel for each round."""
    names = list(rows[-1]["lost"])
    figure, axes = pyplot().subplots(
        1, len(rows), figsize=(5 * len(rows) + 2, 0.35 * len(names) + 1.6), sharey=True
    )
    for axis, row in zip(np.atleast_1d(axes), rows, strict=True):
        for place, name in enumerate(names):
            values = [100 * value for value in row["lost"].get(name, [])]
            axis.plot(values, [place] * len(values), "o", color="C0", alpha=0.6)
            if values:
                axis.plot([np.mean(values)], [place], "|", color="black", markersize=16)
        axis.axvline(0, color="0.6", linewidth=1)
        axis.set_xscale("symlog", linthresh=10)
        axis.set(title=f"round {row['round']}", xlabel="share of FedAvg's progress lost, %")
        axis.xaxis.set_major_formatter("{x:g}")
        axis.margins(x=0.1)
        axis.grid(alpha=0.3)
    np.atleast_1d(axes)[0].set_yticks(range(len(names)), names)
    np.atleast_1d(axes)[0].invert_yaxis()
    figure.suptitle(title)
    figure.tight_layout()
    save(figure, path)


def main() -> int:
    """Measure, print, and write a table of numbers and a picture."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.one_round",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--recipe", type=Path, required=True, help="a run-config file")
    parser.add_argument("--rounds", type=int, choices=range(1, 6), default=2)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="of the bases")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="over the recipe")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    options = parser.parse_args()
    try:
        own = flattened(read_toml(options.recipe))
        own |= pairs(options.set)
        config = parse(own)
        rows = measure(config, options.rounds, options.seeds)
    except (ConfigError, DataError, ModelError) as error:
        print(error, file=sys.stderr)
        return 2
    options.output.mkdir(parents=True, exist_ok=True)
    figures = {
        "settings": own,
        "rounds": rows,
        "data": data_hashes(config.dataset, config.seed),
        "base": base_fingerprint(config.model),
    } | header(options.seeds)
    write_atomic(options.output / "one-round.json", json.dumps(figures, indent=1).encode())
    plot(rows, f"{config.model.name} on {config.dataset.name}", options.output / "one-round.png")
    print(f"\n{header_text(figures)}\nwritten to {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
