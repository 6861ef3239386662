"""Project an update onto a round's bases, and take its reconstruction off the parameters.

The parameters are a list of tensors in layout order. Nothing here is ever as large as the model.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from types import ModuleType

import numba
import numpy as np

from ferret_flwr.projection.kernels import cpu, cpu_interleaved
from ferret_flwr.projection.kernels.segments import Segments
from ferret_flwr.projection.layout import Layout, LayoutError
from ferret_flwr.projection.plan import PlanError, RoundPlan

PROJECTABLE = ("float32", "float16", "uint16")
WHOLE = 2**62  # a block that no model fills
ELEMENTS_PER_THREAD = 2**19  # of a piece; waking a thread for fewer costs more than it saves


@lru_cache(maxsize=4)
def _segments(layout: Layout, block_size: int) -> Segments:
    return Segments.of(layout.offsets, block_size)


def _segments_for(layout: Layout, plan: RoundPlan) -> Segments:
    return _segments(layout, _block_size(plan))


def _block_size(plan: RoundPlan) -> int:
    """Return what cuts the pieces to walk; interleaved blocks do not."""
    return WHOLE if plan.interleaved else plan.blocks.block_size


def _kernel(plan: RoundPlan) -> ModuleType:
    return cpu_interleaved if plan.interleaved else cpu


def _check(arrays: Sequence[np.ndarray], layout: Layout, dtypes: Sequence[str]) -> None:
    layout.check(arrays)
    for name, array in zip(layout.names, arrays, strict=True):
        if array.dtype.name not in dtypes or not array.dtype.isnative:
            raise LayoutError(
                f"tensor '{name}' must have dtype {' or '.join(dtypes)}, got {array.dtype}"
            )


def project(
    before: Sequence[np.ndarray],
    layout: Layout,
    plan: RoundPlan,
    after: Sequence[np.ndarray] | None = None,
) -> np.ndarray:
    """Project Δ = before − after, or Δ = before, onto the round's bases (paper, Eq. 6).

    Parameters
    ----------
    before, after
        Tensors in layout order: float32, float16, or uint16 holding the bits of bfloat16.
        Non-contiguous ones are copied.
    layout
        Which tensors they are.
    plan
        The round's bases.

    Returns
    -------
    numpy.ndarray
        γ_{l,k} = Σ_{i in block l} v_{k,i} Δ_i: float64, ``(K,)``.

    Raises
    ------
    LayoutError
        If a tensor has another size or dtype than expected.
    PlanError
        If Δ is not finite; it names the tensor.
    """
    _check_plan(layout, plan)
    _check(before, layout, PROJECTABLE)
    before = [np.ascontiguousarray(array) for array in before]
    if after is not None:
        _check(after, layout, PROJECTABLE)
        after = [np.ascontiguousarray(array) for array in after]
        for name, old, new in zip(layout.names, before, after, strict=True):
            if old.dtype != new.dtype:
                raise LayoutError(f"tensor '{name}' changed from {old.dtype} to {new.dtype}")
    coefficients = _kernel(plan).project(before, after, _segments_for(layout, plan), plan)
    if not np.isfinite(coefficients).all():
        ends = before if after is None else after
        for name, old, new in zip(layout.names, before, ends, strict=True):
            if not (np.isfinite(as_float32(old)).all() and np.isfinite(as_float32(new)).all()):
                raise PlanError(f"the update is not finite in tensor '{name}'")
        raise PlanError("the update is too large to project in float32")
    return coefficients


class Projection:
    """γ of an update that comes in pieces: one tensor, or a part of one, at a time.

    Parameters
    ----------
    layout
        Which tensors there are.
    plan
        The round's bases.

    Attributes
    ----------
    coefficients
        γ of what was added so far: float64, ``(K,)``.
    """

    def __init__(self, layout: Layout, plan: RoundPlan) -> None:
        """Start from no update."""
        _check_plan(layout, plan)
        self.layout = layout
        self.plan = plan
        self.coefficients = np.zeros(plan.num_coefficients, dtype=np.float64)

    def add(self, start: int, piece: np.ndarray) -> None:
        """Add the projection of an update that is zero but for ``piece``.

        Parameters
        ----------
        start
            Index into 0..d-1 of the first element.
        piece
            Elements of one tensor that follow each other: float32.

        Raises
        ------
        LayoutError
            If the piece is of another dtype or leaves the index space.
        PlanError
            If it is not finite; it names the tensor.
        """
        if piece.dtype != np.float32 or not 0 <= start <= self.layout.size - piece.size:
            raise LayoutError(
                f"a piece must be float32 within 0..{self.layout.size - 1}, got {piece.dtype} "
                f"{start}..{start + piece.size - 1}"
            )
        piece = np.ascontiguousarray(piece)
        segments = Segments.of_piece(start, piece.size, _block_size(self.plan))
        with _threads_for(piece.size):
            terms = _kernel(self.plan).project([piece], None, segments, self.plan)
        if not np.isfinite(terms).all():
            tensor = int(np.searchsorted(self.layout.offsets, start, side="right")) - 1
            raise PlanError(f"the update is not finite in tensor '{self.layout.names[tensor]}'")
        self.coefficients += terms


@contextmanager
def _threads_for(elements: int) -> Iterator[None]:
    """Use no more threads than are worth it."""
    before = numba.get_num_threads()
    numba.set_num_threads(max(1, min(before, elements // ELEMENTS_PER_THREAD)))
    try:
        yield
    finally:
        numba.set_num_threads(before)


def subtract_tensor(
    array: np.ndarray, tensor: int, layout: Layout, plan: RoundPlan, coefficients: np.ndarray
) -> None:
    """Take the reconstruction of one tensor off its float32 parameters, in place.

    Parameters
    ----------
    array
        The tensor: float32, C-contiguous.
    tensor
        Which one of ``layout`` it is.
    layout, plan, coefficients
        As in `subtract`, to the same bits.
    """
    published = _published(coefficients, plan)
    segments = Segments.of_piece(int(layout.offsets[tensor]), array.size, _block_size(plan))
    with _threads_for(array.size):
        _kernel(plan).subtract([array], published, segments, plan)


def subtract(
    arrays: Sequence[np.ndarray], layout: Layout, plan: RoundPlan, coefficients: np.ndarray
) -> None:
    """Take the reconstruction Δ̂ off float32 parameters, in place (paper, Eq. 7).

    Parameters
    ----------
    arrays
        float32 tensors in layout order.
    layout
        Which tensors they are.
    plan
        The round's bases.
    coefficients
        Published c with all factors in them: float32, ``(K,)``.

    Raises
    ------
    LayoutError
        If a tensor has another size or dtype than expected, or is read-only.
    PlanError
        If the coefficients are not K numbers finite in float32.
    """
    _check_plan(layout, plan)
    _check(arrays, layout, ("float32",))
    for name, array in zip(layout.names, arrays, strict=True):
        if not array.flags.writeable:
            raise LayoutError(f"tensor '{name}' is read-only")
    published = _published(coefficients, plan)
    dense = [np.ascontiguousarray(array) for array in arrays]
    _kernel(plan).subtract(dense, published, _segments_for(layout, plan), plan)
    for array, copy in zip(arrays, dense, strict=True):
        if not np.shares_memory(array, copy):
            array[...] = copy.reshape(array.shape)


def reconstruct(coefficients: np.ndarray, layout: Layout, plan: RoundPlan) -> Iterator[np.ndarray]:
    """Yield the reconstruction Δ̂ tensor by tensor, flat, in float32 (paper, Eq. 7).

    See `subtract` for the arguments and the errors.
    """
    _check_plan(layout, plan)
    negated = -_published(coefficients, plan)
    for start, stop in itertools.pairwise(layout.offsets):
        update = np.zeros(stop - start, dtype=np.float32)
        segments = Segments.of_piece(start, stop - start, _block_size(plan))
        _kernel(plan).subtract([update], negated, segments, plan)
        yield update


def fidelity(
    before: Sequence[np.ndarray],
    after: Sequence[np.ndarray],
    layout: Layout,
    plan: RoundPlan,
    projected: np.ndarray,
) -> float:
    """Return cos(Δ̂, Δ) of one update Δ = before − after and its own reconstruction.

    Parameters
    ----------
    before, after, layout, plan
        As in `project`.
    projected
        γ as `project` returned it.
    """
    coefficients = (projected * plan.unbiased_scale()).astype(np.float32)
    inner = float(coefficients.astype(np.float64) @ projected)  # <Δ̂, Δ> = <c, γ>
    squares, squares_hat = 0.0, 0.0
    for old, new, update in zip(
        before, after, reconstruct(coefficients, layout, plan), strict=True
    ):
        delta = as_float32(old).ravel() - as_float32(new).ravel()
        squares += float(delta @ delta)
        squares_hat += float(update @ update)
    return inner / math.sqrt(squares * squares_hat) if squares and squares_hat else 0.0


def as_float32(array: np.ndarray) -> np.ndarray:
    """Return float32, float16, or the bits of bfloat16 in uint16, as float32."""
    if array.dtype == np.uint16:
        return (array.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return array.astype(np.float32, copy=False)


def fingerprint(arrays: Sequence[np.ndarray], layout: Layout) -> str:
    """Return sixteen hexadecimal digits that change with any bit of float32 ``arrays``."""
    _check(arrays, layout, ("float32",))
    dense = [np.ascontiguousarray(array) for array in arrays]
    return fingerprint_text(cpu.fingerprint(dense, _segments(layout, WHOLE)))


def fingerprint_part(array: np.ndarray, tensor: int, layout: Layout) -> int:
    """Return what one C-contiguous float32 tensor adds to the fingerprint, modulo 2⁶⁴."""
    segments = Segments.of_piece(int(layout.offsets[tensor]), array.size, WHOLE)
    with _threads_for(array.size):
        return cpu.fingerprint([array], segments)


def fingerprint_text(total: int) -> str:
    """Return the fingerprint whose tensors add ``total`` together."""
    return f"{total % 2**64:016x}"


def _published(coefficients: np.ndarray, plan: RoundPlan) -> np.ndarray:
    with np.errstate(over="ignore"):  # what overflows float32 is refused as infinite
        published = np.ascontiguousarray(coefficients, dtype=np.float32)
    plan.check_coefficients(published)
    return published


def _check_plan(layout: Layout, plan: RoundPlan) -> None:
    if plan.blocks.size != layout.size:
        raise PlanError(
            f"the plan is for {plan.blocks.size} parameters, the model has {layout.size}"
        )
