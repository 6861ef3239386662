"""Time projection and reconstruction against copying the vector, and against the authors' way.

    python -m benchmarks.kernels                           # --dtype bfloat16, float16
    python -m benchmarks.kernels --slope [--plot docs/kernels.png]    # cost against K_l
    python -m benchmarks.kernels --parts                   # what the distance to a copy is made of
    python -m benchmarks.kernels --start-up                # what compiling costs a process

All that is compared runs in turns, so that what else the machine does strikes all of it, and
ratios are medians of the ratios within each round. A copy reads and writes the vector once; a
projection of an update reads it, one of a difference reads two, a reconstruction reads and writes.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numba
import numpy as np
import torch

from benchmarks.header import header, print_figures
from benchmarks.plots import pyplot, save
from ferret_flwr.projection import projection
from ferret_flwr.projection.families import FAMILIES
from ferret_flwr.projection.kernels import cpu, cpu_interleaved, reference
from ferret_flwr.projection.kernels.segments import LARGEST, Segments
from ferret_flwr.projection.layout import Blocks, InterleavedBlocks, Layout
from ferret_flwr.projection.plan import RoundPlan
from ferret_flwr.training.tensors import as_array, as_arrays

ELEMENTS = 134_515_008  # SmolLM2-135M
BASES = 8192
AUTHORS_BLOCKS = 194  # L of the paper's 1.3 B model
AUTHORS_SAMPLE = 4  # bases measured in a round, of K
CHECKED = (8_000, 12_011)  # elements of tensors: one of whole vectors, one not
WARM_UPS, ROUNDS, SEED = 2, 9, 20240910
FEWER_ROUNDS = 3  # with more bases to a block, which take longer
DTYPES = ("float32", "bfloat16", "float16")
BASES_PER_BLOCK = {  # K_l, as far as seconds go
    "rademacher": (1, 2, 4, 8, 16, 32, 64, 128, 256),
    "truncated-normal": (1, 2, 4, 8, 16),
}

Turns = Mapping[str, Callable[[], Any]]


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
    """Compare every kernel with the reference on small cases, in each type of parameters.

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

    for dtype in (torch.float32, torch.bfloat16, torch.float16):
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


def in_turns(
    turns: Turns, rounds: int = ROUNDS, warm_ups: int = WARM_UPS, enough: float = math.inf
) -> dict[str, np.ndarray]:
    """Return the seconds of each work in every round behind the ``warm_ups``.

    After ``enough`` seconds in all there are no more rounds.
    """
    taken: list[list[float]] = []
    while len(taken) < warm_ups + rounds and sum(map(sum, taken)) < enough:
        taken.append([seconds(work) for work in turns.values()])
    return dict(zip(turns, np.array(taken[warm_ups:]).T, strict=True))


def vector_of(elements: int, dtype: str) -> torch.Tensor:
    """Return normal numbers."""
    generator = torch.Generator().manual_seed(SEED)
    return torch.empty(elements).normal_(generator=generator).to(getattr(torch, dtype))


def works_of(vector: torch.Tensor, other: torch.Tensor, plan: RoundPlan) -> Turns:
    """Return a copy of ``vector`` to ``other``, its projections and a reconstruction in place.

    The vector changes by less than rounding.
    """
    layout, array, after = Layout(("vector",), (vector.shape,)), as_array(vector), as_array(other)
    c = np.full(plan.num_coefficients, 1e-30, dtype=np.float32)

    def reconstruct() -> None:
        if vector.dtype == torch.float32:
            projection.subtract([array], layout, plan, c)
        else:
            projection.replay([array], layout, [(plan, c)], [array])

    return {
        "copy": lambda: other.copy_(vector),
        "project": lambda: projection.project([array], layout, plan),
        "project_difference": lambda: projection.project([array], layout, plan, [after]),
        "reconstruct": reconstruct,
    }


def time_rounds(elements: int, dtype: str, plan: RoundPlan) -> dict[str, np.ndarray]:
    """Return the seconds of each round for a copy, our kernels, and the authors."""
    vector = vector_of(elements, dtype)
    works = {
        **works_of(vector, torch.zeros_like(vector), plan),
        "authors": authors_sample(elements),
    }
    taken = in_turns(works)
    taken["authors"] *= plan.num_coefficients / AUTHORS_SAMPLE
    return taken


def slope(elements: int, dtype: str) -> dict[str, Any]:
    """Return seconds against K_l with a line through them, for each family.

    Contiguous blocks, K = 8192 in all. The line is of least squares relative to the seconds; its
    ``off`` is the largest distance from it, as a part of the measured seconds.
    """
    check_kernels()
    vector = vector_of(elements, dtype)
    other, families = torch.zeros_like(vector), {}
    for family, numbers in BASES_PER_BLOCK.items():
        rows = []
        for bases in numbers:
            works = works_of(vector, other, contiguous(elements, BASES // bases, bases, family))
            works = {n: works[n] for n in ("copy", "project", "reconstruct")}
            taken = in_turns(works, ROUNDS if bases == 1 else FEWER_ROUNDS)
            medians = {f"{n}_seconds": float(np.median(t)) for n, t in taken.items()}
            ratios = {
                f"{n}_over_copy": float(np.median(taken[n] / taken["copy"]))
                for n in ("project", "reconstruct")
            }
            rows.append({"bases": bases, **medians, **ratios})
        lines = {n: fitted(rows, f"{n}_seconds", elements) for n in ("project", "reconstruct")}
        families[family] = {"rows": rows, "lines": lines}
    return {"families": families}


def fitted(rows: list[dict[str, Any]], key: str, elements: int) -> dict[str, float]:
    """Return the line through ``key`` against K_l."""
    x, y = (np.array([row[k] for row in rows], dtype=np.float64) for k in ("bases", key))
    ones = np.stack([np.ones_like(x), x], axis=1)
    (at_zero, each), *_ = np.linalg.lstsq(ones / y[:, None], np.ones_like(y), rcond=None)
    return {
        "at_zero_seconds": float(at_zero),
        "seconds_per_basis": float(each),
        "ns_per_element_and_basis": float(1e9 * each / elements),
        "off": float(np.abs((at_zero + each * x) / y - 1).max()),
    }


def parts(elements: int, dtype: str) -> dict[str, Any]:
    """Return the seconds of what a projection and a reconstruction are made of, over a copy.

    "In cache" does the same work on the first 2¹⁶ elements over and over: all but the memory.
    """
    check_kernels()
    vector = vector_of(elements, dtype)
    other, whole = torch.zeros_like(vector), as_array(vector)
    dealt = interleaved(elements, BASES, "rademacher")
    cut = contiguous(elements, BASES, 1, "rademacher")
    c = np.full(BASES, 1e-30, dtype=np.float32)
    cached = [whole[:LARGEST].copy()]  # read by all threads, so only a projection can have it
    turns: dict[str, Callable[[], Any]] = {
        "copy": lambda: other.copy_(vector),
        "read only (torch.sum)": vector.sum,
    }
    for name, kernel, plan in (("interleaved", cpu_interleaved, dealt), ("contiguous", cpu, cut)):
        block = elements if plan.interleaved else plan.blocks.block_size
        segments = Segments.of_piece(0, elements, block)
        same = Segments(
            segments.start,
            segments.length,
            segments.tensor,
            segments.block,
            np.where(segments.within + segments.length > LARGEST, 0, segments.within),
        )
        turns |= {
            f"project, {name}": partial(kernel.project, [whole], None, segments, plan),
            f"project, {name}, in cache": partial(kernel.project, cached, None, same, plan),
            f"reconstruct, {name}": partial(
                kernel.subtract, [whole], c[: plan.num_bases], segments, plan
            ),
        }
    taken = in_turns(turns)
    return {
        name: {
            "seconds": float(np.median(own)),
            "over_copy": float(np.median(own / taken["copy"])),
        }
        for name, own in taken.items()
    }


START_UP = """
import json, time
phases, last = {}, time.perf_counter()
def done(name):
    global last
    phases[name], last = time.perf_counter() - last, time.perf_counter()
import numpy as np
done("import numpy")
import numba
done("import numba")
from ferret_flwr.projection import projection
from ferret_flwr.projection.layout import InterleavedBlocks, Layout
from ferret_flwr.projection.plan import RoundPlan
done("import ferret_flwr.projection")
layout = Layout(("w",), ((4096,),))
plan = RoundPlan(1, 1, "rademacher", InterleavedBlocks.of(4096, 64))
array = np.ones(4096, dtype=np.float32)
for time_of in ("first", "second"):
    c = projection.project([array], layout, plan).astype(np.float32)
    projection.subtract([array], layout, plan, c)
    projection.fingerprint([array], layout)
    done(f"{time_of} projection, reconstruction and fingerprint")
import torch
done("import torch")
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer
done("import transformers")
print(json.dumps(phases))
"""


def start_up() -> dict[str, dict[str, float]]:
    """Return the seconds that a process spends until it has projected, by phase.

    Once where nothing has been compiled, and again with what the first process left.
    """
    columns = {}
    with tempfile.TemporaryDirectory() as cache:
        for name in ("empty cache", "cache"):
            environment = {**os.environ, "NUMBA_CACHE_DIR": cache}
            command = [sys.executable, "-c", START_UP]
            run = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE)
            columns[name] = json.loads(run.stdout)
    return columns


def measured_on() -> dict[str, Any]:
    """Return what figures depend on."""
    return {
        "threads": f"{numba.get_num_threads()} of numba, {torch.get_num_threads()} of torch",
    } | header(SEED)


def measure(elements: int, dtype: str) -> dict[str, Any]:
    """Return every figure of the benchmark, with what it was measured on."""
    check_kernels()
    plan = interleaved(elements, BASES, "rademacher")
    taken = time_rounds(elements, dtype, plan)
    ours, bases = taken["project"] + taken["reconstruct"], plan.num_coefficients
    over_copy = ("project", "project_difference", "reconstruct")
    return {
        **{f"{n}_over_copy": float(np.median(taken[n] / taken["copy"])) for n in over_copy},
        "authors_over_ours": float(np.median(taken["authors"] / ours)),
        **{f"{name}_seconds": float(np.median(values)) for name, values in taken.items()},
        "authors_how": f"L = {AUTHORS_BLOCKS}, scaled up from {AUTHORS_SAMPLE} of {bases} bases",
        "dtype": dtype,
        "elements": elements,
        "bases": bases,
        "rounds": ROUNDS,
    }


def draw(figures: dict[str, Any], path: Path) -> None:
    """Draw seconds against K_l, with the lines."""
    figure, axes = pyplot().subplots(1, len(FAMILIES), figsize=(11, 4))
    for axis, (family, own) in zip(axes, figures["families"].items(), strict=True):
        bases = np.array([row["bases"] for row in own["rows"]])
        for color, (name, line) in enumerate(own["lines"].items()):
            measured = [row[f"{name}_seconds"] for row in own["rows"]]
            axis.plot(bases, measured, "o", color=f"C{color}", label=name)
            exact = line["at_zero_seconds"] + line["seconds_per_basis"] * bases
            label = f"{line['ns_per_element_and_basis']:.3f} ns an element and basis"
            axis.plot(bases, exact, color=f"C{color}", label=label)
        copies = [row["copy_seconds"] for row in own["rows"]]
        axis.plot(bases, copies, ":", color="0.4", label="copy")
        axis.set(xlabel="bases per block", ylabel="seconds", title=family)
        axis.set(xscale="log", yscale="log")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.suptitle(f"{figures['elements']:,} {figures['dtype']}, {figures['hardware']}", size=9)
    figure.tight_layout()
    save(figure, path)


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kernels",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--elements", type=int, default=ELEMENTS, help="d, default %(default)s")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="default %(default)s")
    kinds = parser.add_mutually_exclusive_group()
    kinds.add_argument("--slope", action="store_true", help="cost against bases per block")
    kinds.add_argument("--parts", action="store_true", help="what the kernels' time is made of")
    kinds.add_argument("--start-up", action="store_true", help="what compiling costs a process")
    parser.add_argument("--plot", type=Path, help="with --slope: draw to this PNG or SVG file")
    arguments = parser.parse_args()
    of_vector = {"elements": arguments.elements, "dtype": arguments.dtype}
    if arguments.start_up:
        figures: dict[str, Any] = start_up()
    else:
        kind = slope if arguments.slope else parts if arguments.parts else measure
        figures = {**of_vector, **kind(**of_vector)}
    figures |= measured_on()
    if arguments.json:
        print(json.dumps(figures, indent=2))
    else:
        print_figures(figures)
    if arguments.plot and arguments.slope:
        draw(figures, arguments.plot)


if __name__ == "__main__":
    main()
