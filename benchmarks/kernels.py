"""Time projection and reconstruction against copying the vector, and against the authors' way.

One run measures everything: a copy, a projection, a subtraction and a sample of the authors' way
in turns, so that what else the machine does strikes all of them. Ratios are medians of the ratios
within each round. Ours are interleaved; the authors have as many bases in 194 blocks.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numba
import numpy as np
import torch

from ferret_flwr.projection import projection
from ferret_flwr.projection.families import FAMILIES
from ferret_flwr.projection.kernels import reference
from ferret_flwr.projection.layout import Blocks, InterleavedBlocks, Layout
from ferret_flwr.projection.plan import RoundPlan

ELEMENTS = 134_515_008  # SmolLM2-135M
BASES = 8192
AUTHORS_BLOCKS = 194  # L of the paper's 1.3 B model
AUTHORS_SAMPLE = 4  # bases measured in a round, of K
WARM_UPS, ROUNDS, SEED = 2, 9, 20240910


def seconds(work: Callable[[], Any]) -> float:
    """Return the wall-clock seconds that ``work`` takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def interleaved(elements: int, bases: int, family: str) -> RoundPlan:
    """Return a plan with interleaved blocks."""
    blocks = InterleavedBlocks.of(elements, bases)
    return RoundPlan(1, SEED, family, blocks)


def contiguous(elements: int, blocks: int, bases: int, family: str) -> RoundPlan:
    """Return a plan with ``bases`` bases for each of at most ``blocks`` contiguous blocks."""
    cut = Blocks.of(elements, blocks)
    return RoundPlan(1, SEED, family, cut, np.full(cut.count, bases))


def check_kernels() -> None:
    """Compare the kernels with the reference on a small case.

    Raises
    ------
    SystemExit
        If a bit of a reconstruction, or more than rounding of a projection, is different.
    """
    delta = np.random.default_rng(SEED).standard_normal(20_011).astype(np.float32)
    layout = Layout(("small",), ((delta.size,),))
    for family in FAMILIES:
        for plan in (
            interleaved(delta.size, 500, family),
            contiguous(delta.size, 7, 1, family),
            contiguous(delta.size, 7, 3, family),
        ):
            gamma, expected = (
                projection.project([delta], layout, plan),
                reference.project(delta, plan),
            )
            c, ours = expected.astype(np.float32), delta.copy()
            projection.subtract([ours], layout, plan, c)
            theirs = delta - reference.reconstruct(c, plan)
            close = np.allclose(gamma, expected, rtol=0, atol=1e-4 * np.abs(expected).max())
            if not close or not np.array_equal(ours.view(np.uint32), theirs.view(np.uint32)):
                raise SystemExit(f"not timed: the kernels disagree with the reference ({family})")


def authors_sample(elements: int) -> Callable[[], None]:
    """Return work that projects and reconstructs `AUTHORS_SAMPLE` bases the authors' way.

    A basis is a truncated-normal vector of a block of d/194 elements, made by torch from its own
    seed as erf⁻¹ of a uniform: once to be multiplied with Δ, once more to be added up. (That is
    ``trunc_normal_`` of the authors' torch; today's rejects samples instead, which is slower.)
    """
    size = elements // AUTHORS_BLOCKS
    delta, update, bound = torch.ones(size), torch.zeros(size), size**-0.5
    limit = math.erf(bound / math.sqrt(2))

    def basis(k: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(SEED + k)
        uniform = torch.empty(size).uniform_(-limit, limit, generator=generator)
        return uniform.erfinv_().mul_(math.sqrt(2)).clamp_(-bound, bound)

    def work() -> None:
        for k in range(AUTHORS_SAMPLE):
            gamma = torch.sum(delta * basis(k))
            update.add_(basis(k).mul_(gamma))

    return work


def time_rounds(elements: int, plan: RoundPlan) -> dict[str, np.ndarray]:
    """Return the seconds of each round for a copy, a projection, a subtraction and the authors."""
    generator = torch.Generator().manual_seed(SEED)
    vector = torch.empty(elements).normal_(generator=generator)
    other, array = torch.zeros_like(vector), vector.numpy()
    layout = Layout(("vector",), ((elements,),))
    c = (1e-6 * projection.project([array], layout, plan)).astype(np.float32)
    turns: dict[str, Callable[[], Any]] = {
        "copy": lambda: other.copy_(vector),
        "project": lambda: projection.project([array], layout, plan),
        "reconstruct": lambda: projection.subtract([array], layout, plan, c),
        "authors": authors_sample(elements),
    }
    rounds = [
        {name: seconds(work) for name, work in turns.items()} for _ in range(WARM_UPS + ROUNDS)
    ]
    taken = {name: np.array([r[name] for r in rounds[WARM_UPS:]]) for name in turns}
    taken["authors"] *= plan.num_coefficients / AUTHORS_SAMPLE
    return taken


def processor() -> str:
    """Return the name of the processor."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def measure(elements: int) -> dict[str, Any]:
    """Return every figure of the benchmark, with what it was measured on."""
    check_kernels()
    plan = interleaved(elements, BASES, "rademacher")
    taken = time_rounds(elements, plan)
    ours, bases = taken["project"] + taken["reconstruct"], plan.num_coefficients
    return {
        "project_over_copy": float(np.median(taken["project"] / taken["copy"])),
        "reconstruct_over_copy": float(np.median(taken["reconstruct"] / taken["copy"])),
        "authors_over_ours": float(np.median(taken["authors"] / ours)),
        **{f"{name}_seconds": float(np.median(values)) for name, values in taken.items()},
        "authors_how": f"L = {AUTHORS_BLOCKS}, scaled up from {AUTHORS_SAMPLE} of {bases} bases",
        "elements": elements,
        "bases": bases,
        "rounds": ROUNDS,
        "seed": SEED,
        "hardware": f"{processor()}, {numba.get_num_threads()} threads",
        "versions": {name: version(name) for name in ("numba", "numpy", "torch")},
    }


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--elements", type=int, default=ELEMENTS, help="d, default %(default)s")
    arguments = parser.parse_args()
    figures = measure(arguments.elements)
    if arguments.json:
        print(json.dumps(figures, indent=2))
        return
    figures["versions"] = ", ".join(f"{k} {v}" for k, v in figures["versions"].items())
    for name, value in figures.items():
        print(f"{name:<24}{f'{value:.3f}' if isinstance(value, float) else value}")


if __name__ == "__main__":
    main()
