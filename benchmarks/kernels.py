"""Time projection and reconstruction against copying the vector, and against the authors' way.

One run measures everything: a copy, a projection, a subtraction and a sample of the authors' way
in turns, so that what else the machine does strikes all of them. Ratios are medians of the ratios
within each round. Ours are interleaved; the authors have as many bases in 194 blocks.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numba
import numpy as np
import torch

from benchmarks.header import header, print_figures
from ferret_flwr.projection import projection
from ferret_flwr.projection.families import FAMILIES
from ferret_flwr.projection.kernels import reference
from ferret_flwr.projection.layout import Blocks, InterleavedBlocks, Layout
from ferret_flwr.projection.plan import RoundPlan
from ferret_flwr.training.tensors import as_arrays

ELEMENTS = 134_515_008  # SmolLM2-135M
BASES = 8192
AUTHORS_BLOCKS = 194  # L of the paper's 1.3 B model
AUTHORS_SAMPLE = 4  # bases measured in a round, of K
CHECKED = (8_000, 12_011)  # elements of tensors: one of whole vectors, one not
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


def check_kernels(device: str = "", sizes: Sequence[int] = CHECKED) -> None:
    """Compare every kernel with the reference on small cases, in float32 and bfloat16.

    Parameters
    ----------
    device
        Where torch tensors are to lie; "" for NumPy arrays, whose kernels are the processor's.
    sizes
        Elements of each tensor.

    Raises
    ------
    SystemExit
        If a bit of parameters or of a fingerprint, or more than rounding of a projection, differs.
    """
    size = sum(sizes)
    for family in FAMILIES:
        for plan in (
            interleaved(size, size // 40, family),
            interleaved(size, 5, family),
            contiguous(size, 7, 1, family),
            contiguous(size, 7, 20, family),
        ):
            for dtype in _disagreements(plan, device, sizes):
                raise SystemExit(
                    f"not timed: the kernels disagree with the reference ({family}, {dtype}, "
                    f"{plan.blocks})"
                )


def _disagreements(plan: RoundPlan, device: str, sizes: Sequence[int]) -> Iterator[torch.dtype]:
    """Yield the types of parameters for which a kernel is not what the reference says."""
    layout = Layout(tuple(map(str, range(len(sizes)))), tuple((size,) for size in sizes))
    generator = np.random.default_rng(SEED)
    vector = torch.from_numpy(generator.standard_normal(layout.size, np.float32))
    c = generator.standard_normal(plan.num_coefficients, np.float32)
    rounds = [(plan, c), (plan.with_seed(SEED + 1), c)]
    first, second = (torch.from_numpy(reference.reconstruct(c, p)) for p, _ in rounds)

    def held(vector: torch.Tensor) -> list[Any]:
        parts = [part.to(device or "cpu", copy=True) for part in vector.split(list(sizes))]
        return parts if device else as_arrays(parts)

    def bits(arrays: list[Any]) -> bytes:
        return b"".join(a.tobytes() for a in (as_arrays(arrays) if device else arrays))

    def close(projected: np.ndarray, delta: torch.Tensor) -> bool:
        gamma = reference.project(delta.numpy(), plan)
        return np.allclose(projected, gamma, rtol=0, atol=1e-4 * np.abs(gamma).max())

    for dtype in (torch.float32, torch.bfloat16):
        model, other = held(vector.to(dtype)), held(torch.zeros_like(vector, dtype=dtype))
        before = vector.to(dtype).float()
        after = (before - first - second).to(dtype)
        same = close(projection.project(model, layout, plan), before)
        projection.replay(model, layout, rounds, other)
        same &= bits(other) == bits(held(after))
        same &= close(projection.project(model, layout, plan, other), before - after.float())
        if dtype == torch.float32:
            projection.subtract(model, layout, plan, c)
            same &= bits(model) == bits(held(before - first))
            name = f"{reference.fingerprint((before - first).numpy()):016x}"
            same &= projection.fingerprint(model, layout) == name
        if not same:
            yield dtype


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
    in_turns(turns, WARM_UPS)
    taken = in_turns(turns, ROUNDS)
    taken["authors"] *= plan.num_coefficients / AUTHORS_SAMPLE
    return taken


def in_turns(
    turns: Mapping[str, Callable[[], Any]], rounds: int, enough: float = math.inf
) -> dict[str, np.ndarray]:
    """Return the seconds of each work in every round, of which each has its turn.

    After ``enough`` seconds in all there are no more rounds.
    """
    taken: list[list[float]] = []
    while len(taken) < rounds and sum(map(sum, taken)) < enough:
        taken.append([seconds(work) for work in turns.values()])
    return dict(zip(turns, np.array(taken).T, strict=True))


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
        "threads": numba.get_num_threads(),
    } | header(SEED)


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
    print_figures(figures)


if __name__ == "__main__":
    main()
