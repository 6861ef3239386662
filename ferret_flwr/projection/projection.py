"""Project an update onto a round's bases, and take its reconstruction off the parameters.

The parameters are a list of tensors in layout order: NumPy arrays, or torch tensors on a GPU, where
everything stays but K numbers. Each may lie somewhere else; what a projection finds in one place
after the other, in the order of their first tensors, is added up in float64. Of a model that is
sharded over processes, each brings its `Pieces`, and the projections of all are added up.
Nothing here is ever as large as the model.
The coefficients of exact tensors, behind the K others, are the elements of the update themselves.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Sequence
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
    zeros_for,
)
from ferret_flwr.projection.kernels import cpu, cpu_interleaved
from ferret_flwr.projection.kernels.segments import Segments
from ferret_flwr.projection.layout import Layout, LayoutError
from ferret_flwr.projection.plan import PlanError, RoundPlan

WHOLE = 2**62  # a block that no model fills
DIFFERENCE = 2**16  # elements that are subtracted at a time
ELEMENTS_PER_THREAD = 2**19  # of a piece; waking a thread for fewer costs more than it saves


@lru_cache(maxsize=64)  # two for each device
def _segments(layout: Layout, tensors: tuple[int, ...], block_size: int) -> Segments:
    return Segments.of_pieces(layout.here[list(tensors)], block_size)


def _segments_of(layout: Layout, tensor: int, block_size: int) -> Segments:
    """Return the segments of one tensor as those of tensor 0."""
    start, stop = layout.here[tensor].tolist()
    return Segments.of_piece(start, stop - start, block_size)


def _walks(
    arrays: Sequence[Array], tensors: Iterable[int], layout: Layout, block_size: int
) -> Iterator[tuple[tuple[int, ...], Segments]]:
    """Yield which ``tensors`` lie together, one place after the other, and the pieces to walk."""
    places: dict[str, list[int]] = {}
    for tensor in tensors:
        places.setdefault(_place(arrays[tensor]), []).append(tensor)
    for together in places.values():
        yield tuple(together), _segments(layout, tuple(together), block_size)


def _block_size(plan: RoundPlan) -> int:
    """Return what cuts the pieces to walk; interleaved blocks do not."""
    return WHOLE if plan.interleaved else plan.blocks.block_size


def _of(arrays: Sequence[Array], tensors: Iterable[int]) -> list[Array]:
    return [arrays[tensor] for tensor in tensors]


def _kernel(plan: RoundPlan, array: Array) -> ModuleType:
    if not is_numpy(array):
        return cuda_kernels()
    return cpu_interleaved if plan.interleaved else cpu


def _check(
    arrays: Sequence[Array],
    layout: Layout,
    dtypes: Sequence[str] = (),
    beside: Sequence[Array] | None = None,
) -> None:
    """Check sizes, dtypes (any projectable one unless given), and that each lies ``beside`` one."""
    layout.check(arrays)
    for tensor, (name, array) in enumerate(zip(layout.names, arrays, strict=True)):
        if not is_numpy(array) and array.is_meta:
            raise LayoutError(
                f"tensor '{name}' is not in memory: it was offloaded, or never loaded; every "
                "tensor must lie on a GPU or with the processor"
            )
        if beside is not None and _place(array) != _place(beside[tensor]):
            raise LayoutError(
                f"tensor '{name}' must be a {_place(beside[tensor])} as before, got a "
                f"{_place(array)}"
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
        γ_{l,k} = Σ_{i in block l} v_{k,i} Δ_i, and Δ_i of exact tensors: float64, ``(K + E,)``;
        of all processes together if ``layout`` has pieces.

    Raises
    ------
    LayoutError
        If a tensor has another size or dtype than expected, lies elsewhere after than before, or
        is on no device.
    PlanError
        If Δ is not finite; it names the tensor.
    ImportError
        If tensors are on a GPU and Triton is not installed.
    """
    _check_plan(layout, plan)
    _check(before, layout)
    before = dense(before)
    if after is not None:
        _check(after, layout, beside=before)
        after = dense(after)
        for name, old, new in zip(layout.names, before, after, strict=True):
            if old.dtype != new.dtype:
                raise LayoutError(
                    f"tensor '{name}' changed from {dtype_name(old)} to {dtype_name(new)}"
                )
    coefficients = np.zeros(plan.num_coefficients)
    counted = [tensor for tensor in range(len(layout.names)) if layout.counts(tensor)]
    projected = [tensor for tensor in counted if tensor < layout.num_projected]
    for together, segments in _walks(before, projected, layout, _block_size(plan)):
        old, new = _of(before, together), None if after is None else _of(after, together)
        coefficients[: plan.num_bases] += _kernel(plan, old[0]).project(old, new, segments, plan)
    for tensor in counted[len(projected) :]:
        delta = as_float32(before[tensor])
        delta = to_host(delta if after is None else delta - as_float32(after[tensor]))
        coefficients[_exact(layout, plan, tensor)] = delta.ravel()
    coefficients = layout.add_up(coefficients)
    if not np.isfinite(coefficients).all():
        ends = before if after is None else after
        pairs = zip(before, ends, strict=True)
        finite = np.array([all_finite(old) and all_finite(new) for old, new in pairs])
        wrong = np.flatnonzero(layout.add_up(1.0 - finite))
        if wrong.size:
            raise PlanError(f"the update is not finite in tensor '{layout.names[wrong[0]]}'")
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
        if layout.exact or layout.pieces:
            which = "with exact tensors" if layout.exact else "of a sharded model"
            raise LayoutError(
                f"an update {which} cannot come in pieces, as lean memory has it: use "
                "'train.memory' = 'standard'"
            )
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
    with _threads_for(array.size):
        _subtract_tensor(array, tensor, layout, plan, published)


def _subtract_tensor(
    array: Array, tensor: int, layout: Layout, plan: RoundPlan, published: np.ndarray
) -> None:
    """Take the reconstruction of any tensor off ``array``, in place."""
    if tensor < layout.num_projected:
        segments = _segments_of(layout, tensor, _block_size(plan))
        _kernel(plan, array).subtract([array], published[: plan.num_bases], segments, plan)
    else:
        update = placed(published[_exact(layout, plan, tensor)], array)
        array[...] -= update.reshape(array.shape)


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
        If a tensor has another size or dtype than expected, is on no device, or is read-only.
    PlanError
        If the coefficients are not so many numbers finite in float32.
    ImportError
        If tensors are on a GPU and Triton is not installed.
    """
    _check_plan(layout, plan)
    _check(arrays, layout, ("float32",))
    _check_writable(arrays, layout)
    published = _published(coefficients, plan)
    changed = dense(arrays)
    moving = [tensor for tensor in range(len(changed)) if tensor not in skip]
    projected = [tensor for tensor in moving if tensor < layout.num_projected]
    for together, segments in _walks(changed, projected, layout, _block_size(plan)):
        some = _of(changed, together)
        _kernel(plan, some[0]).subtract(some, published[: plan.num_bases], segments, plan)
    for tensor in moving[len(projected) :]:
        _subtract_tensor(changed[tensor], tensor, layout, plan, published)
    for array, copy in zip(arrays, changed, strict=True):
        put_back(array, copy)


def _check_writable(arrays: Sequence[Array], layout: Layout) -> None:
    for name, array in zip(layout.names, arrays, strict=True):
        if is_numpy(array) and not array.flags.writeable:
            raise LayoutError(f"tensor '{name}' is read-only")


def reconstruct(
    coefficients: np.ndarray,
    layout: Layout,
    plan: RoundPlan,
    like: Sequence[Array] | None = None,
) -> Iterator[Array]:
    """Yield the reconstruction Δ̂ tensor by tensor, flat, in float32 (paper, Eq. 7).

    As NumPy arrays, or each as a tensor on the device of its tensor of ``like``; of a sharded model
    what lies here. See `subtract` for the other arguments and the errors.
    """
    _check_plan(layout, plan)
    negated = -_published(coefficients, plan)
    for tensor, (start, stop) in enumerate(layout.here.tolist()):
        update = zeros(stop - start, None if like is None else like[tensor])
        _subtract_tensor(update, tensor, layout, plan, negated)
        yield update


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
    _check(into, layout, beside=base)
    _check_writable(into, layout)
    for plan, _ in rounds:
        _check_plan(layout, plan)
    published = [(plan, _published(c, plan)) for plan, c in rounds]
    alike = len({(plan.family, plan.blocks) for plan, _ in rounds}) == 1 and not layout.exact
    block_size = _block_size(rounds[0][0]) if alike else WHOLE
    for together, segments in _walks(base, range(len(base)), layout, block_size):
        if alike:
            kernel, targets = _kernel(rounds[0][0], base[together[0]]), _of(into, together)
            changed = dense(targets)
            kernel.replay(dense(_of(base, together)), published, segments, changed)
            for array, copy in zip(targets, changed, strict=True):
                put_back(array, copy)
            continue
        for tensor in together:
            old, new = base[tensor], into[tensor]
            master = zeros_for(old)
            master[...] = as_float32(old).reshape(-1)
            for plan, c in published:
                _subtract_tensor(master, tensor, layout, plan, c)
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
    coefficients = _published(projected * plan.unbiased_scale(), plan)
    inner = float(coefficients.astype(np.float64) @ projected)  # <Δ̂, Δ> = <c, γ>
    known = _square_of_signs(coefficients, plan)
    squares = np.zeros(2)  # of Δ and Δ̂
    for tensor, (old, new) in enumerate(zip(before, after, strict=True)):
        if layout.counts(tensor):
            squares[0] += _square_of_difference(old, new)
            if known is None:
                update = zeros_for(old)
                _subtract_tensor(update, tensor, layout, plan, coefficients)
                squares[1] += float(update @ update)
    total, hat = layout.add_up(squares)
    length = math.sqrt(total * (hat if known is None else known))
    return inner / length if length else 0.0


def _square_of_signs(coefficients: np.ndarray, plan: RoundPlan) -> float | None:
    """Return ‖Δ̂‖² if it takes no basis to know: each element is ± the number of its block."""
    if plan.family != "rademacher" or plan.counts.max() > 1:
        return None
    squares = np.square(coefficients, dtype=np.float64)
    ours, exact = squares[: plan.num_bases], squares[plan.num_bases :].sum()
    if not plan.interleaved:
        return float(ours @ plan.blocks.lengths + exact)
    rows, rest = divmod(plan.blocks.size, plan.num_bases)
    row = np.zeros(rest, dtype=np.float32)  # the last one, whose blocks are the round's choice
    if rest:
        segments = Segments.of_piece(rows * plan.num_bases, rest, WHOLE)
        cpu_interleaved.subtract([row], coefficients[: plan.num_bases], segments, plan)
    return float(rows * ours.sum() + np.square(row, dtype=np.float64).sum() + exact)


def _square_of_difference(old: Array, new: Array) -> float:
    """Return ‖old − new‖², a cache of memory at a time."""
    old, new = old.reshape(-1), new.reshape(-1)
    step, total = DIFFERENCE if is_numpy(old) else len(old) or 1, 0.0
    for first in range(0, len(old), step):
        piece = slice(first, first + step)
        delta = as_float32(old[piece]) - as_float32(new[piece])
        total += float(delta @ delta)
    return total


def fingerprint(arrays: Sequence[Array], layout: Layout) -> str:
    """Return sixteen hexadecimal digits that change with any bit of float32 ``arrays``.

    Of a sharded model they are those of all processes together: the whole model's.
    """
    _check(arrays, layout, ("float32",))
    arrays, total = dense(arrays), np.zeros(1, dtype=np.uint64)
    counted = filter(layout.counts, range(len(layout.names)))
    for together, segments in _walks(arrays, counted, layout, WHOLE):
        kernel = cpu if is_numpy(arrays[together[0]]) else cuda_kernels()
        total += np.uint64(kernel.fingerprint(_of(arrays, together), segments))
    return fingerprint_text(int(layout.add_up(total)[0]))


def fingerprint_part(array: np.ndarray, tensor: int, layout: Layout) -> int:
    """Return what one C-contiguous float32 tensor adds to the fingerprint, modulo 2⁶⁴."""
    with _threads_for(array.size):
        return cpu.fingerprint([array], _segments_of(layout, tensor, WHOLE))


def fingerprint_text(total: int) -> str:
    """Return the fingerprint whose tensors add ``total`` together."""
    return f"{total % 2**64:016x}"


def _exact(layout: Layout, plan: RoundPlan, tensor: int) -> slice:
    """Return where the coefficients of an exact tensor are, or of its piece here."""
    start, stop = layout.here[tensor] + (plan.num_bases - plan.blocks.size)
    return slice(start, stop)


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
