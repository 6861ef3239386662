"""Compare the loss behind coefficients of 32, 16 and 8 bits, for several K.

Each point is the real app, as in `benchmarks.compare`, whose output folder and resuming it shares.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.plan import Plan
from benchmarks.plots import pyplot, save
from benchmarks.runner import compare
from benchmarks.summary import Outcome, over_seeds
from benchmarks.tables import spread, table
from ferret_flwr.config import ConfigError

BITS = {"float32": 32, "float16": 16, "int8": 8}
COEFFICIENTS = (1024, 4096, 16384)
SETTINGS = {"num-server-rounds": 6, "evaluate.every": 6, "evaluate.generate-examples": 0}


def plan(coefficients: Sequence[int], seeds: Sequence[int]) -> Plan:
    """Return the runs: every K in every format."""
    variants = {
        f"{count} {numbers}": {
            "method": "ferret",
            "ferret.coefficients": count,
            "ferret.number-format": numbers,
        }
        for count in coefficients
        for numbers in BITS
    }
    return Plan.of(
        {
            "title": "Bits a coefficient, on the built-in model",
            "seeds": list(seeds),
            "nodes": 2,
            "settings": SETTINGS,
            "variants": variants,
        }
    )


def plot(outcomes: Sequence[Outcome], path: Path) -> None:
    """Draw the loss against the bits a coefficient has, and against what a node sends."""
    figure, (by_bits, by_bytes) = pyplot().subplots(1, 2, figsize=(10, 4), sharey=True)
    lines: dict[str, list[tuple[int, Any]]] = {}
    for outcome in outcomes:
        if outcome.good:
            count, numbers = outcome.name.split()
            lines.setdefault(count, []).append((BITS[numbers], over_seeds(outcome.good)))
    for count, points in lines.items():
        bits = [b for b, _ in points]
        loss, std = zip(*(figures["loss"] for _, figures in points), strict=True)
        sent = [figures["up"][0] for _, figures in points]
        for axis, x in ((by_bits, bits), (by_bytes, sent)):
            axis.errorbar(x, loss, std, marker="o", capsize=3, label=f"K = {count}")
    by_bits.set(xlabel="bits a coefficient", ylabel="held-out loss after 6 rounds")
    by_bits.set_xticks(list(BITS.values()))
    by_bits.legend(frameon=False)
    by_bytes.set(xlabel="what a node sends in a round", xscale="log")
    by_bytes.set_xticks([1000 * 4**i for i in range(4)], [f"{4**i} kB" for i in range(4)])
    for axis in (by_bits, by_bytes):
        axis.set(yscale="log")
        axis.set_yticks([0.5, 1, 2, 5], ["0.5", "1", "2", "5"])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    figure.tight_layout()
    save(figure, path)


def results(outcomes: Sequence[Outcome]) -> str:
    """Return a Markdown table: bytes as on the wire, loss as mean ± standard deviation."""
    rows = []
    for outcome in outcomes:
        cells = ["", "failed"]
        if outcome.good:
            figures = over_seeds(outcome.good)
            cells = [f"{figures['up'][0]:,.0f}", spread(*figures["loss"], "{:.3f}".format)]
        rows.append([*outcome.name.split(), *cells])
    return table(["K", "format", "a node sends, bytes", "held-out loss"], rows)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line; return 0 if every point has a result."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.number_format", description=__doc__)
    parser.add_argument("--coefficients", type=int, nargs="+", default=COEFFICIENTS, metavar="K")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5], metavar="N")
    parser.add_argument("--output", type=Path, default=Path("results/number-format"))
    parser.add_argument("--plot", type=Path, help="default: loss.png in the output folder")
    options = parser.parse_args(arguments)
    try:
        outcomes = compare(plan(options.coefficients, options.seeds), options.output)
    except ConfigError as error:
        parser.error(str(error))
    plot(outcomes, options.plot or options.output / "loss.png")
    print(results(outcomes))
    return 0 if all(outcome.good for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
