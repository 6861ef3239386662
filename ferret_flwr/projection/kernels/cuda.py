"""The kernels for GPUs: `kernels.cpu` and `kernels.cpu_interleaved` for torch tensors, in Triton.

Imported when tensors ask for it. With TRITON_INTERPRET=1 in the environment before that, Triton
runs the same kernels on tensors in the processor's memory: for tests, slowly.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime.jit import JITFunction

from ferret_flwr.projection.families import FAMILIES, GROUP, truncated_normal_scale
from ferret_flwr.projection.kernels import cuda_kernels as kernels
from ferret_flwr.projection.kernels.segments import Segments
from ferret_flwr.projection.layout import LayoutError
from ferret_flwr.projection.plan import RoundPlan

GROUPS = {
    True: 32,
    False: 8,
}  # of a tile, of signs and of normals, which take 32 times the counters
NARROW = 512  # blocks: with fewer, a tile has so many rows that it is cheaper by the element
BUCKETS, ROWS = 1024, 32  # elements and rows, at most, of a step of an interleaved projection
MOST_BASES = 16  # of a contiguous block, that a program takes
MOST_PARTS = 2048  # of the work of an interleaved projection, each with K sums of its own
SUMS = 2**25  # of all parts together, 128 MiB; more only if K alone is
ROWS_PER_PART = 64  # at least, as each part writes its sums once
VECTOR = 16  # elements: tensors of a multiple of it are read 16 bytes at a time

DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
EXACT = {"enable_fp_fusion": False}  # a product and a sum are rounded apart, as on processors

Tensors = Sequence[torch.Tensor]


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Launch on ``device``, which need not be the current one.

    Raises
    ------
    LayoutError
        If it is no GPU, and the kernels are not interpreted.
    """
    if device.type == "cuda":
        return torch.cuda.device(device)
    if isinstance(kernels.subtract, JITFunction):
        raise LayoutError(f"torch tensors must be on a GPU, or NumPy arrays, got them on {device}")
    return nullcontext()


def _send(array: Any, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).to(device)


@lru_cache(maxsize=64)  # two for each GPU
def _rows(segments: Segments, device: torch.device, num_blocks: int = 0) -> torch.Tensor:
    """Return what a kernel knows of each segment, see `cuda_kernels`: int64, ``(S, 6)``.

    With ``num_blocks`` interleaved ones; without, the positions of sums are left to be set.
    """
    where = segments.block, np.zeros_like(segments.block)
    if num_blocks:
        where = np.divmod(segments.start // GROUP * GROUP, num_blocks)
    fields = segments.start, segments.length, segments.tensor, segments.within, *where
    return _send(np.stack(fields, axis=1), device)


Held = tuple[tuple[int, torch.dtype], ...]  # address and dtype of each tensor


def _held(tensors: Tensors) -> Held:
    return tuple((tensor.data_ptr(), tensor.dtype) for tensor in tensors)


@lru_cache(maxsize=16)
def _addresses(tensors: Held, device: torch.device) -> torch.Tensor:
    return _send(np.array([address for address, _ in tensors]), device)


@lru_cache(maxsize=16)
def _alignment(tensors: Held, segments: Segments) -> tuple[bool, ...]:
    """Return for each tensor whether all its tiles begin and end at whole vectors.

    A tile begins at a group of the index space, wherever that is in the tensor.
    """
    origin = segments.start - segments.within
    cut = (segments.start % VECTOR != 0) | (segments.length % VECTOR != 0) | (origin % VECTOR != 0)
    crooked = np.array([address % VECTOR != 0 for address, _ in tensors])
    crooked[segments.tensor[cut]] = True
    return tuple((~crooked).tolist())


@lru_cache(maxsize=16)
def _alike(
    kinds: tuple[Any, ...], segments: Segments, device: torch.device
) -> list[tuple[Any, np.ndarray, torch.Tensor]]:
    """Return each kind of tensor with the numbers of its segments, here and on the device."""
    groups = []
    for kind in dict.fromkeys(kinds):
        tensors = np.array([other == kind for other in kinds])
        which = np.flatnonzero(tensors[segments.tensor])
        if which.size:
            groups.append((kind, which, _send(which, device)))
    return groups


def _keys(plans: Sequence[RoundPlan], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the seed and the scale of each plan, on the device: no kernel is compiled for them."""
    scales = [truncated_normal_scale(plan.blocks.block_size) for plan in plans]
    seeds = np.array([plan.seed for plan in plans], dtype=np.int64)
    return _send(seeds, device), _send(np.array(scales), device)


def _signs(plan: RoundPlan) -> bool:
    return FAMILIES[plan.family].code == FAMILIES["rademacher"].code


def _power_of_2(number: int) -> int:
    return 1 << (number - 1).bit_length()


def subtract(
    arrays: Tensors, coefficients: np.ndarray, segments: Segments, plan: RoundPlan
) -> None:
    """Subtract Δ̂ from float32 ``arrays`` in place, as `cpu.subtract` does."""
    replay(arrays, [(plan, coefficients)], segments, arrays)


def replay(
    source: Tensors,
    rounds: Sequence[tuple[RoundPlan, np.ndarray]],
    segments: Segments,
    target: Tensors,
) -> None:
    """Write float32(``source``) − Δ̂_1 − Δ̂_2 − ... to ``target``, rounded once, at the end.

    Each element is read and written once, however many rounds there are.

    Parameters
    ----------
    source, target
        Contiguous tensors of float32, bfloat16 or float16; they may be the same.
    rounds
        At least one plan, all alike but for seed and number of bases, with its c: float32.
    segments
        Where the tensors and the plans' blocks cut the index space.
    """
    if not segments.start.size:
        return
    device, plan = source[0].device, rounds[0][0]
    plans = [plan for plan, _ in rounds]
    begins = np.cumsum([0] + [plan.num_bases for plan in plans])[:-1]
    if plan.interleaved:
        offsets = begins
    else:
        offsets = np.stack([b + p.offsets for b, p in zip(begins, plans, strict=True)])
    published = np.concatenate([c for _, c in rounds]).astype(np.float32, copy=False)
    shared = (
        *_keys(plans, device),
        _send(offsets.astype(np.int64), device),
        _send(published, device),
        len(plans),
        plan.blocks.count,
    )
    rows = _rows(segments, device, plan.blocks.count if plan.interleaved else 0)
    old, new = _held(source), _held(target)
    ends = _addresses(old, device), _addresses(new, device)
    groups = GROUPS[_signs(plan)]
    tiles = -(-(int(segments.length.max()) + GROUP - 1) // (groups * GROUP))
    whole = map(all, zip(_alignment(old, segments), _alignment(new, segments), strict=True))
    kinds = tuple(zip((t.dtype for t in source), (t.dtype for t in target), whole, strict=True))
    with _on(device):
        for (read, written, aligned), which, numbers in _alike(kinds, segments, device):
            kernels.subtract[(which.size, tiles)](
                *ends,
                rows,
                numbers,
                *shared,
                SOURCE=DTYPES[read],
                TARGET=DTYPES[written],
                ALIGNED=aligned,
                INTERLEAVED=plan.interleaved,
                NARROW=plan.blocks.count < NARROW,
                SIGNS=_signs(plan),
                GROUPS=groups,
                num_warps=4,
                maxnreg=128,  # four programs to a multiprocessor, which hide each other's waiting
                **EXACT,
            )


def project(
    before: Tensors, after: Tensors | None, segments: Segments, plan: RoundPlan
) -> np.ndarray:
    """Return γ of ``before − after``, or of ``before``, as `cpu.project` does: float64, ``(K,)``.

    Parameters
    ----------
    before, after
        Contiguous tensors of equal dtype: float32, bfloat16 or float16.
    segments, plan
        As in `cpu.project`.
    """
    run = _project_interleaved if plan.interleaved else _project_contiguous
    with _on(before[0].device):
        return run(before, before if after is None else after, segments, plan, after is None)


def _project_contiguous(
    before: Tensors, after: Tensors, segments: Segments, plan: RoundPlan, update: bool
) -> np.ndarray:
    device, counts = before[0].device, plan.counts
    chunk = min(MOST_BASES, _power_of_2(int(counts.max())))
    own = counts[segments.block]
    position = np.concatenate([[0], np.cumsum(own)])
    rows = _rows(segments, device).clone()
    rows[:, 5] = _send(position[:-1], device)
    sums = torch.empty(int(position[-1]), dtype=torch.float64, device=device)
    old, new = _held(before), _held(after)
    ends, keys = (_addresses(old, device), _addresses(new, device)), _keys([plan], device)
    on_device = _send(counts, device)
    whole = map(all, zip(_alignment(old, segments), _alignment(new, segments), strict=True))
    kinds = tuple(zip((t.dtype for t in before), whole, strict=True))
    for (dtype, aligned), which, _ in _alike(kinds, segments, device):
        chunks = -(-own[which] // chunk)
        first = np.arange(chunks.sum()) - np.repeat(np.cumsum(chunks) - chunks, chunks)
        kernels.project_contiguous[(first.size,)](
            *ends,
            rows,
            _send(np.repeat(which, chunks), device),
            _send((first * chunk).astype(np.int32), device),
            on_device,
            *keys,
            sums,
            DTYPE=DTYPES[dtype],
            ALIGNED=aligned,
            UPDATE=update,
            SIGNS=_signs(plan),
            GROUPS=GROUPS[_signs(plan)],
            CHUNK=chunk,
            num_warps=4,
            **EXACT,
        )
    bounds = np.searchsorted(segments.block, np.arange(plan.blocks.count + 1))
    coefficients = torch.empty(plan.num_bases, dtype=torch.float64, device=device)
    width = min(128, _power_of_2(int(counts.max())))
    kernels.add_up[(plan.blocks.count, -(-int(counts.max()) // width))](
        sums,
        rows,
        _send(bounds, device),
        on_device,
        _send(plan.offsets, device),
        coefficients,
        CHUNK=width,
    )
    return coefficients.cpu().numpy()


def _project_interleaved(
    before: Tensors, after: Tensors, segments: Segments, plan: RoundPlan, update: bool
) -> np.ndarray:
    device, bases = before[0].device, plan.num_bases
    width = min(BUCKETS, _power_of_2(bases))
    ends = _addresses(_held(before), device), _addresses(_held(after), device)
    keys, rows = _keys([plan], device), _rows(segments, device, bases)
    total = torch.zeros(bases, dtype=torch.float64, device=device)
    for dtype, which, numbers in _alike(tuple(t.dtype for t in before), segments, device):
        length = segments.length[which]
        rows_of_all = int(length.sum()) // max(bases, BUCKETS)
        parts = max(1, min(MOST_PARTS, SUMS // bases, rows_of_all // ROWS_PER_PART))
        inner = np.searchsorted(np.cumsum(length), length.sum() * np.arange(1, parts) / parts)
        bounds = np.concatenate([[0], inner, [which.size]]).astype(np.int64)
        sums = torch.empty((len(bounds) - 1, bases), dtype=torch.float32, device=device)
        kernels.project_interleaved[(len(bounds) - 1, -(-bases // width))](
            *ends,
            rows,
            numbers,
            _send(bounds, device),
            *keys,
            bases,
            sums,
            DTYPE=DTYPES[dtype],
            UPDATE=update,
            SIGNS=_signs(plan),
            ROWS=min(ROWS, BUCKETS // width),
            CELLS=max(1, width // 32),
            LANES=min(32, width),
            num_warps=1,
            **EXACT,
        )
        total += sums.sum(dim=0, dtype=torch.float64)
    return total.cpu().numpy()


def fingerprint(arrays: Tensors, segments: Segments) -> int:
    """Return `reference.fingerprint` of contiguous float32 tensors."""
    if not segments.start.size:
        return 0
    device = arrays[0].device
    held = _held(arrays)
    rows, addresses = _rows(segments, device), _addresses(held, device)
    sums = torch.empty(segments.start.size, dtype=torch.int64, device=device)
    whole = all(_alignment(held, segments))
    with _on(device):
        kernels.fingerprint[(segments.start.size,)](addresses, rows, sums, ALIGNED=whole, GROUPS=8)
    return int(sums.sum()) % 2**64
