"""How long the kernels for GPUs take beside a copy on the same GPU.

    python -m benchmarks.kernels_cuda                      # SmolLM2-135M, LLaMA-7B where it fits
    python -m benchmarks.kernels_cuda --models llama-7b --json

Prints for every model, dtype and plan the milliseconds of a projection of one update, one of
before − after, a reconstruction into the parameters, one of eight rounds at once, and (float32) a
fingerprint: each with its share of the bandwidth of a copy, counting every parameter that has to be
read and written once. Times are from CUDA events around the whole call, with what the host does in
it; medians after warm-up. Nothing is timed that differs from the reference.

Exits with status 2 where there is no CUDA device, or no Triton.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import sys
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

import numpy as np
import torch

from benchmarks.header import header, print_figures
from benchmarks.kernels import BASES, SEED, check_kernels, contiguous, interleaved
from ferret_flwr.projection import projection
from ferret_flwr.projection.arrays import has_triton
from ferret_flwr.projection.families import FAMILIES
from ferret_flwr.projection.layout import Layout
from ferret_flwr.projection.plan import RoundPlan

WARM_UPS, TIMES, ROUNDS = 3, 11, 8
CONTIGUOUS = (1, 2, 8, 64)  # K_l, of K in all
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SPARE = 2**32  # bytes of a GPU's memory left free

Tensors = list[torch.Tensor]


def llama(layers: int, width: int, inner: int, words: int) -> list[tuple[int, ...]]:
    """Return the shapes of a LLaMA's parameters, with attention over all heads."""
    layer = [*[(width, width)] * 4, *[(inner, width)] * 2, (width, inner), (width,), (width,)]
    return [(words, width), *(layer * layers), (width,), (words, width)]


MODELS: dict[str, list[tuple[int, ...]]] = {
    "smollm2-135m": [(134_515_008,)],
    "llama-1b": llama(16, 2048, 5504, 32000),
    "llama-7b": llama(32, 4096, 11008, 32000),  # 6,738,415,616 parameters
}


def plans(size: int) -> Iterator[tuple[str, RoundPlan]]:
    """Yield every plan that is timed, with its name."""
    for family in FAMILIES:
        yield f"{family}, interleaved", interleaved(size, BASES, family)
    for bases in CONTIGUOUS:
        plan = contiguous(size, BASES // bases, bases, "rademacher")
        yield f"rademacher, contiguous, K_l = {bases}", plan


def milliseconds(work: Callable[[], Any]) -> float:
    """Return the median milliseconds of ``work`` on the GPU and in the host's part of it."""
    taken = []
    for _ in range(WARM_UPS + TIMES):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        work()
        end.record()
        torch.cuda.synchronize()
        taken.append(start.elapsed_time(end))
    return median(taken[WARM_UPS:])


def filled(shapes: list[tuple[int, ...]], dtype: torch.dtype, seed: int) -> Tensors:
    """Return random tensors on the GPU."""
    generator = torch.Generator("cuda").manual_seed(seed)
    return [torch.empty(s, dtype=dtype, device="cuda").normal_(generator=generator) for s in shapes]


def copy_all(source: Tensors, target: Tensors) -> None:
    """Copy tensor by tensor, without waiting for one before the next is asked for."""
    for old, new in zip(source, target, strict=True):
        new.copy_(old)


def time_model(name: str, dtype: str) -> Iterator[dict[str, Any]]:
    """Yield a row of figures for each plan and kind of work."""
    shapes = MODELS[name]
    layout = Layout(tuple(map(str, range(len(shapes)))), tuple(shapes))
    model, other = (filled(shapes, DTYPES[dtype], seed) for seed in (SEED, SEED + 1))
    nbytes = layout.size * model[0].itemsize
    copy = milliseconds(lambda: copy_all(model, other))
    speed = 2 * nbytes / copy  # bytes in a millisecond

    def row(plan: str, work: str, moved: int, call: Callable[[], Any]) -> dict[str, Any]:
        taken = milliseconds(call)
        return {
            "model": name,
            "dtype": dtype,
            "plan": plan,
            "work": work,
            "milliseconds": taken,
            "over_copy": taken / copy,
            "of_copy_bandwidth": moved / taken / speed,
        }

    yield row("", "copy", 2 * nbytes, lambda: copy_all(model, other))
    if dtype == "float32":
        yield row("", "fingerprint", nbytes, lambda: projection.fingerprint(model, layout))
    for title, plan in plans(layout.size):
        c = np.full(plan.num_coefficients, 1e-9, dtype=np.float32)
        once, often = [(plan, c)], [(plan.with_seed(SEED + r), c) for r in range(ROUNDS)]
        for work, moved, call in (
            ("project", nbytes, lambda plan=plan: projection.project(model, layout, plan)),
            (
                "project before − after",
                2 * nbytes,
                lambda plan=plan: projection.project(model, layout, plan, other),
            ),
            (
                "reconstruct",
                2 * nbytes,
                lambda rounds=once: projection.replay(model, layout, rounds, model),
            ),
            (
                f"reconstruct {ROUNDS} rounds",
                2 * nbytes,
                lambda rounds=often: projection.replay(model, layout, rounds, model),
            ),
        ):
            yield row(title, work, moved, call)


def fits(name: str, dtype: str) -> bool:
    """Return whether a model, another one, and room for sums are free on the GPU."""
    size = sum(math.prod(shape) for shape in MODELS[name])
    return 2 * size * DTYPES[dtype].itemsize + SPARE <= torch.cuda.mem_get_info()[0]


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kernels_cuda",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    arguments = parser.parse_args()
    missing = "Triton" if not has_triton() else "a CUDA device"
    if not has_triton() or not torch.cuda.is_available():
        print(f"nothing measured: this needs {missing}, and there is none", file=sys.stderr)
        return 2
    check_kernels("cuda")
    about = {
        "bases": BASES,
        "times": TIMES,
    } | header(SEED, "triton")
    rows = []
    if not arguments.json:
        print_figures(about)
    for name in arguments.models:
        for dtype in arguments.dtypes:
            if not fits(name, dtype):
                print(f"{name} in {dtype} does not fit and is left out", file=sys.stderr)
                continue
            for figures in time_model(name, dtype):
                rows.append(figures)
                if not arguments.json:
                    print(
                        "{model:<14}{dtype:<10}{plan:<36}{work:<24}{milliseconds:9.3f} ms "
                        "{over_copy:7.2f} of the copy {of_copy_bandwidth:7.1%} of its "
                        "bandwidth".format_map(figures),
                        flush=True,
                    )
            gc.collect()
            torch.cuda.empty_cache()
    if arguments.json:
        print(json.dumps(about | {"rows": rows}, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
