"""Loss against ε: the same clipping and noise by Flower's wrapper, for Ferret and for FedAvg.

Both clip each node's vector to C, take the plain mean, and add noise of standard deviation z C / N
to each number: K coefficients or all d parameters. What the noise does to a run depends on z / N
alone. So a run trains a few nodes and gets the noise of a round of N: their mean stands for that of
N nodes like them. ε is of all rounds together for a node that takes part in each of them, without
amplification by sampling.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numba
import numpy as np
import torch
from flwr.common import Code, FitRes, Status, ndarrays_to_parameters, parameters_to_ndarrays
from flwr.server.strategy import DifferentialPrivacyServerSideFixedClipping, FedAvg

from benchmarks.header import header, header_text
from ferret_flwr.accounting import epsilon
from ferret_flwr.config import Config, parse
from ferret_flwr.flower.private import not_all_zero
from ferret_flwr.ledger import Ledger
from ferret_flwr.methods.ferret import local_round
from ferret_flwr.replica import Replica
from ferret_flwr.rounds import next_plan, publish
from ferret_flwr.training.tensors import as_arrays, load_masters
from ferret_flwr.training.worker import Node, score

TRAINED = 2  # nodes that a round really trains
STOOD_FOR = 100  # N, nodes that the noise is for
CLIP = 1.0
DELTA = 1e-5
ARMS = {"FedAvg": 0, "Ferret, K = 8192": 8192, "Ferret, K = 1024": 1024}
NOISE = (0.0, 0.5, 1.0, 2.0, 4.0)  # z
ROUNDS = 6
SEEDS = (1, 2)


def noisy_mean(rows: Sequence[np.ndarray], noise: float) -> np.ndarray:
    """Return the mean of the clipped ``rows`` with the noise of N nodes, as Flower computes it."""
    wrapper = DifferentialPrivacyServerSideFixedClipping(FedAvg(), noise, CLIP, STOOD_FOR)
    wrapper.current_round_params = [np.zeros_like(rows[0])]
    ok = Status(Code.OK, "")
    replies = [
        FitRes(ok, ndarrays_to_parameters([not_all_zero(row.astype(np.float32))]), 1, {})
        for row in rows
    ]
    aggregated, _ = wrapper.aggregate_fit(1, [(None, reply) for reply in replies], [])  # type: ignore[misc]
    assert aggregated is not None
    return parameters_to_ndarrays(aggregated)[0]


def ferret(config: Config, nodes: Sequence[Node], replica: Replica, noise: float) -> list[float]:
    """Return the lengths of the nodes' updates, and move ``replica`` through the run's rounds."""
    ledger, lengths = Ledger(replica.header), []
    parameters = nodes[0].worker.parameters
    for number in range(1, config.num_server_rounds + 1):
        plan = next_plan(ledger, config.ferret, config.seed)
        rows = [
            local_round(replica, parameters, plan, partial(node.train, number))[0].coefficients
            for node in nodes
        ]
        lengths += [float(np.linalg.norm(row)) for row in rows]
        ledger = ledger.append(publish(plan, noisy_mean(rows, noise), 1.0))
        replica.follow(ledger)
    load_masters(parameters, replica.arrays)
    return lengths


def fedavg(config: Config, nodes: Sequence[Node], replica: Replica, noise: float) -> list[float]:
    """Return the lengths of the nodes' updates, and leave the run's last model in the worker."""
    parameters, lengths = nodes[0].worker.parameters, []
    masters = [array.copy() for array in replica.arrays]
    cuts = np.cumsum([array.size for array in masters])[:-1]
    for number in range(1, config.num_server_rounds + 1):
        rows = []
        for node in nodes:
            load_masters(parameters, masters)
            node.train(number)
            after = as_arrays(parameters.values())
            rows.append(
                np.concatenate([(m - a).ravel() for m, a in zip(masters, after, strict=True)])
            )
        lengths += [float(np.linalg.norm(row)) for row in rows]
        for master, part in zip(masters, np.split(noisy_mean(rows, noise), cuts), strict=True):
            master -= part.reshape(master.shape)
    load_masters(parameters, masters)
    return lengths


def one_run(coefficients: int, noise: float, seed: int, rounds: int) -> dict[str, Any]:
    """Return the held-out loss after a run, and the median length of a node's update."""
    config = parse(
        {
            "seed": seed,
            "num-server-rounds": rounds,
            "evaluate.generate-examples": 0,
            "ferret.coefficients": coefficients or 1,
        }
    )
    nodes = [Node.of(config, i, TRAINED) for i in range(TRAINED)]
    worker = nodes[0].worker
    base = worker.follower.from_base()
    replica = Replica(worker.layout, [array.copy() for array in base.arrays])
    held_out = worker.split(config.dataset, config.seed).test
    load_masters(worker.parameters, replica.arrays)
    before = score(worker.lm, held_out, config)["loss"]
    start = time.perf_counter()
    lengths = (ferret if coefficients else fedavg)(config, nodes, replica, noise)
    seconds = time.perf_counter() - start
    return {
        "before": before,
        "loss": score(worker.lm, held_out, config)["loss"],
        "median length": statistics.median(lengths),
        "seconds": seconds,
    }


def figures(noises: Sequence[float], seeds: Sequence[int], rounds: int) -> list[dict[str, Any]]:
    """Return one row for each arm and noise multiplier."""
    found = []
    for name, coefficients in ARMS.items():
        for z in noises:
            runs = [one_run(coefficients, z, seed, rounds) for seed in seeds]
            losses = [run["loss"] for run in runs]
            found.append(
                {
                    "arm": name,
                    "z": z,
                    "epsilon": epsilon(rounds / z**2, DELTA) if z else math.inf,
                    "losses": losses,
                    "loss": statistics.mean(losses),
                    "median length": statistics.mean(run["median length"] for run in runs),
                    "seconds": sum(run["seconds"] for run in runs),
                    "before": runs[0]["before"],
                }
            )
            print(json.dumps(found[-1]), flush=True)
    return found


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw the loss against ε, one colour an arm, a dotted line without noise."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(6, 4))
    for name in ARMS:
        own = [row for row in rows if row["arm"] == name]
        noisy = sorted((r for r in own if r["z"]), key=lambda row: row["epsilon"])
        (line,) = axis.plot(
            [r["epsilon"] for r in noisy], [r["loss"] for r in noisy], marker="o", label=name
        )
        for row in noisy:
            axis.plot(
                [row["epsilon"]] * len(row["losses"]),
                row["losses"],
                color=line.get_color(),
                alpha=0.4,
            )
        for row in own:
            if not row["z"]:
                axis.axhline(row["loss"], color=line.get_color(), linestyle=":")
    axis.set(
        xlabel=f"ε at δ = {DELTA:g}, {STOOD_FOR} nodes a round",
        ylabel="held-out loss",
        xscale="log",
    )
    axis.grid(alpha=0.3)
    axis.legend(title="dotted: clipped, no noise")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.privacy", description=__doc__)
    parser.add_argument("--noise", type=float, nargs="+", default=NOISE, help="multipliers z")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--output", type=Path, default=Path("docs/privacy.png"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # the model is small
    numba.set_num_threads(1)
    rows = figures(arguments.noise, arguments.seeds, arguments.rounds)
    print(f"\nbefore the first round: {rows[0]['before']:.3f}\n")
    names = list(ARMS)
    print(f"| z | ε | {' | '.join(names)} |")
    print("|---" * (len(names) + 2) + "|")
    for z in arguments.noise:
        cells = [next(r for r in rows if r["arm"] == name and r["z"] == z) for name in names]
        losses = " | ".join(f"{row['loss']:.3f}" for row in cells)
        print(f"| {z:g} | {cells[0]['epsilon']:.3g} | {losses} |")
    print(f"\n{header_text(header(arguments.seeds))}")
    plot(rows, arguments.output)


if __name__ == "__main__":
    main()
