"""Project an update onto a round's bases, and take its reconstruction off the parameters.

The parameters are a list of tensors in layout order: NumPy arrays, or torch tensors on a GPU, where
everything stays but K numbers. Nothing here is ever as large as the model.
The coefficients of exact tensors, behind the K others, are the elements of the update themselves.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from types import ModuleType

import numba
import numpy as np

from ferret_flwr.projection.arrays import (
    Array,
    all_finite,
    as_float32,
    cuda_kernels,
    dense,
    dtype_name,
    is_numpy,
    placed,
    projectable,
    put_back,
    rounded,
    to_host,
    zeros,
)
from ferret_flwr.projection.kernels import cpu, cpu_interleaved
from ferret_flwr.projection.kernels.segments import Segments
from ferret_flwr.projection.layout import Layout, LayoutError
from ferret_flwr.projection.plan import PlanError, RoundPlan

WHOLE = 2**62  # a block that no model fills
ELEMENTS_PER_THREAD = 2**19  # of a piece; waking a thread for fewer costs more than it saves


@lru_cache(maxsize=4)
def _segments(layout: Layout, tensors: int, block_size: int) -> Segments:
    return Segments.of(layout.offsets[: tensors + 1], block_size)


def _segments_for(layout: Layout, plan: RoundPlan) -> Segments:
    """Return the pieces to walk."""
    return _segments(layout, layout.num_projected, _block_size(plan))


def _block_size(plan: RoundPlan) -> int:
    """Return what cuts the pieces to walk; interleaved blocks do not."""
    return WHOLE if plan.interleaved else plan.blocks.block_size


def _kernel(plan: RoundPlan, array: Array) -> ModuleType:
    if not is_numpy(array):
        return cuda_kernels()
    return cpu_interleaved if plan.interleaved else cpu


def _check(
    arrays: Sequence[Array], layout: Layout, dtypes: Sequence[str] = (), first: Array | None = None
) -> None:
    """Check sizes, dtypes (any projectable one unless given), and that all lie with ``first``."""
    layout.check(arrays)
    first = arrays[0] if first is None else first
    for name, array in zip(layout.names, arrays, strict=True):
        if _place(array) != _place(first):
            raise LayoutError(
                f"tensor '{name}' must be a {_place(first)} as the others, got a {_place(array)}"
            )
        allowed = dtypes or projectable(array)
        if dtype_name(array) not in allowed:
            raise LayoutError(
                f"tensor '{name}' must have dtype {' or '.join(allowed)}, got {dtype_name(array)}"
            )


def _place(array: Array) -> str:
    return "NumPy array" if is_numpy(array) else f"torch tensor on {array.device}"


def project(
    before: Sequence[Array],
    layout: Layout,
    plan: RoundPlan,
    after: Sequence[Array] | None = None,
) -> np.ndarray:
    """Project Δ = before − after, or Δ = before, onto the round's bases (paper, Eq. 6).

    Parameters
    ----------
    before, after
        Tensors in layout order: float32, float16, or bfloat16, whose bits a NumPy array holds as
        uint16. Non-contiguous ones are copied.
    layout
        Which tensors they are.
    plan
        The round's bases.

    Returns
    -------
    numpy.ndarray
        γ_{l,k} = Σ_{i in block l} v_{k,i} Δ_i, and Δ_i of exact tensors: float64, ``(K + E,)``.

    Raises
    ------
    LayoutError
        If a tensor has another size, dtype or device than expected.
    PlanError
        If Δ is not finite; it names the tensor.
    ImportError
        If tensors are on a GPU and Triton is not installed.
    """
    _check_plan(layout, plan)
    _check(before, layout)
    before = dense(before)
    if after is not None:
        _check(after, layout, first=before[0])
        after = dense(after)
        for name, old, new in zip(layout.names, before, after, strict=True):
            if old.dtype != new.dtype:
                raise LayoutError(
                    f"tensor '{name}' changed from {dtype_name(old)} to {dtype_name(new)}"
                )
    kernel = _kernel(plan, before[0])
    coefficients = kernel.project(before, after, _segments_for(layout, plan), plan)
    if layout.exact:
        exact = _differences(before, after, range(layout.num_projected, len(layout.names)))
        coefficients = np.concatenate([coefficients, *exact])
    if not np.isfinite(coefficients).all():
        ends = before if after is None else after
        for name, old, new in zip(layout.names, before, ends, strict=True):
            if not (all_finite(old) and all_finite(new)):
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
        if layout.exact:
            raise LayoutError("an update with exact tensors cannot come in pieces")
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
            terms = _kernel(self.plan, piece).project([piece], None, segments, self.plan)
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
        _kernel(plan, array).subtract([array], published[: plan.num_bases], segments, plan)


def subtract(
    arrays: Sequence[Array],
    layout: Layout,
    plan: RoundPlan,
    coefficients: np.ndarray,
    skip: Collection[int] = (),
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
        Published c with all factors in them: float32, ``(K + E,)``.
    skip
        Positions of tensors that stay as they are.

    Raises
    ------
    LayoutError
        If a tensor has another size, dtype or device than expected, or is read-only.
    PlanError
        If the coefficients are not so many numbers finite in float32.
    ImportError
        If tensors are on a GPU and Triton is not installed.
    """
    _check_plan(layout, plan)
    _check(arrays, layout, ("float32",))
    _check_writable(arrays, layout)
    published = _published(coefficients, plan)
    segments = _segments_for(layout, plan).without(skip)
    changed = dense(arrays)
    _kernel(plan, arrays[0]).subtract(changed, published[: plan.num_bases], segments, plan)
    for tensor, update in _exact(published, layout, plan, arrays[0]):
        if tensor not in skip:
            changed[tensor][...] -= update.reshape(changed[tensor].shape)
    for array, copy in zip(arrays, changed, strict=True):
        put_back(array, copy)


def _check_writable(arrays: Sequence[Array], layout: Layout) -> None:
    for name, array in zip(layout.names, arrays, strict=True):
        if is_numpy(array) and not array.flags.writeable:
            raise LayoutError(f"tensor '{name}' is read-only")


def _segments_of(layout: Layout, plan: RoundPlan, tensor: int) -> Segments:
    """Return the segments of one projected tensor as those of tensor 0."""
    start, stop = map(int, layout.offsets[tensor : tensor + 2])
    return Segments.of_piece(start, stop - start, _block_size(plan))


def reconstruct(
    coefficients: np.ndarray, layout: Layout, plan: RoundPlan, like: Array | None = None
) -> Iterator[Array]:
    """Yield the reconstruction Δ̂ tensor by tensor, flat, in float32 (paper, Eq. 7).

    As NumPy arrays, or as tensors on the device of ``like`` if that is one. See `subtract` for the
    other arguments and the errors.
    """
    _check_plan(layout, plan)
    negated = -_published(coefficients, plan)
    sizes = np.diff(layout.offsets)
    for tensor in range(layout.num_projected):
        update = zeros(int(sizes[tensor]), like)
        segments = _segments_of(layout, plan, tensor)
        _kernel(plan, update).subtract([update], negated[: plan.num_bases], segments, plan)
        yield update
    for _, update in _exact(negated, layout, plan, like):
        yield -update


def replay(
    base: Sequence[Array],
    layout: Layout,
    rounds: Sequence[tuple[RoundPlan, np.ndarray]],
    into: Sequence[Array],
) -> None:
    """Write float32(base) − Δ̂_1 − Δ̂_2 − ..., rounded to the dtype of ``into``, to ``into``.

    These are the parameters w_r of a model that keeps no float32 masters: the same bits as from
    masters that took one `subtract` after the other. Each parameter is read once and written once,
    however many rounds there are; if they are not alike, or tensors are exact, one tensor at a time
    is in float32.

    Parameters
    ----------
    base
        w_0 in layout order, of any dtype that `project` takes.
    layout
        Which tensors they are.
    rounds
        Plans and their published c, in the ledger's order, one for each seed.
    into
        Contiguous tensors to write to, ``base`` itself or others.

    Raises
    ------
    LayoutError, PlanError, ImportError
        As `subtract`; nothing is changed then.
    """
    _check(base, layout)
    _check(into, layout, first=base[0])
    _check_writable(into, layout)
    for plan, _ in rounds:
        _check_plan(layout, plan)
    published = [(plan, _published(c, plan)) for plan, c in rounds]
    alike = len({(plan.family, plan.blocks) for plan, _ in rounds}) == 1
    if alike and not layout.exact:
        plan, changed = rounds[0][0], dense(into)
        kernel = _kernel(plan, base[0])
        kernel.replay(dense(base), published, _segments_for(layout, plan), changed)
        for array, copy in zip(into, changed, strict=True):
            put_back(array, copy)
        return
    for tensor, (old, new) in enumerate(zip(base, into, strict=True)):
        master = zeros(old.size if is_numpy(old) else old.numel(), like=old)
        master[...] = as_float32(old).reshape(-1)
        for plan, c in published:
            if tensor < layout.num_projected:
                segments = _segments_of(layout, plan, tensor)
                _kernel(plan, master).subtract([master], c[: plan.num_bases], segments, plan)
            for position, update in _exact(c, layout, plan, master):
                if position == tensor:
                    master[...] -= update
        put_back(new, rounded(master.reshape(new.shape), new))


def fidelity(
    before: Sequence[Array],
    after: Sequence[Array],
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
        before, after, reconstruct(coefficients, layout, plan, before[0]), strict=True
    ):
        delta = as_float32(old).ravel() - as_float32(new).ravel()
        squares += float(delta @ delta)
        squares_hat += float(update @ update)
    return inner / math.sqrt(squares * squares_hat) if squares and squares_hat else 0.0


def fingerprint(arrays: Sequence[Array], layout: Layout) -> str:
    """Return sixteen hexadecimal digits that change with any bit of float32 ``arrays``."""
    _check(arrays, layout, ("float32",))
    kernel = cpu if is_numpy(arrays[0]) else cuda_kernels()
    segments = _segments(layout, len(layout.names), WHOLE)
    return fingerprint_text(kernel.fingerprint(dense(arrays), segments))


def fingerprint_part(array: np.ndarray, tensor: int, layout: Layout) -> int:
    """Return what one C-contiguous float32 tensor adds to the fingerprint, modulo 2⁶⁴."""
    segments = Segments.of_piece(int(layout.offsets[tensor]), array.size, WHOLE)
    with _threads_for(array.size):
        return cpu.fingerprint([array], segments)


def fingerprint_text(total: int) -> str:
    """Return the fingerprint whose tensors add ``total`` together."""
    return f"{total % 2**64:016x}"


def _differences(
    before: Sequence[Array], after: Sequence[Array] | None, tensors: Collection[int]
) -> Iterator[np.ndarray]:
    """Yield Δ of some tensors, flat, in float32."""
    for tensor in tensors:
        delta = as_float32(before[tensor])
        yield to_host(delta if after is None else delta - as_float32(after[tensor])).ravel()


def _exact(
    coefficients: np.ndarray, layout: Layout, plan: RoundPlan, like: Array | None
) -> Iterator[tuple[int, Array]]:
    """Yield the position of each exact tensor, and its part of ``coefficients``."""
    shift = plan.num_bases - plan.blocks.size  # from elements to their coefficients
    for tensor in range(layout.num_projected, len(layout.names)):
        first, last = layout.offsets[tensor : tensor + 2] + shift
        yield tensor, placed(coefficients[first:last], like)


def _published(coefficients: np.ndarray, plan: RoundPlan) -> np.ndarray:
    with np.errstate(over="ignore"):  # what overflows float32 is refused as infinite
        published = np.ascontiguousarray(coefficients, dtype=np.float32)
    plan.check_coefficients(published)
    return published


def _check_plan(layout: Layout, plan: RoundPlan) -> None:
    if plan.size != layout.size:
        raise PlanError(f"the plan is for {plan.size} parameters, the model has {layout.size}")
    if plan.exact != layout.exact_size:
        raise PlanError(f"the plan has {plan.exact} exact elements, the model {layout.exact_size}")
