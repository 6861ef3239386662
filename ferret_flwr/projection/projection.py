"""Project an update onto a round's bases, and take its reconstruction off the parameters.

The parameters are a list of tensors in layout order. Nothing here is ever as large as the model.
The coefficients of exact tensors, behind the K others, are the elements of the update themselves.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterator, Sequence
from functools import lru_cache
from types import ModuleType

import numpy as np

from ferret_flwr.projection.kernels import cpu, cpu_interleaved
from ferret_flwr.projection.kernels.segments import Segments
from ferret_flwr.projection.layout import Layout, LayoutError
from ferret_flwr.projection.plan import PlanError, RoundPlan

PROJECTABLE = ("float32", "float16", "uint16")
WHOLE = 2**62  # a block that no model fills


@lru_cache(maxsize=4)
def _segments(layout: Layout, tensors: int, block_size: int) -> Segments:
    return Segments.of(layout.offsets[: tensors + 1], block_size)


def _segments_for(layout: Layout, plan: RoundPlan) -> Segments:
    """Return the pieces to walk; interleaved blocks do not cut them."""
    block_size = WHOLE if plan.interleaved else plan.blocks.block_size
    return _segments(layout, layout.num_projected, block_size)


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
        γ_{l,k} = Σ_{i in block l} v_{k,i} Δ_i, and Δ_i of exact tensors: float64, ``(K + E,)``.

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
    if layout.exact:
        exact = _differences(before, after, range(layout.num_projected, len(layout.names)))
        coefficients = np.concatenate([coefficients, *exact])
    if not np.isfinite(coefficients).all():
        ends = before if after is None else after
        for name, old, new in zip(layout.names, before, ends, strict=True):
            if not (np.isfinite(as_float32(old)).all() and np.isfinite(as_float32(new)).all()):
                raise PlanError(f"the update is not finite in tensor '{name}'")
        raise PlanError("the update is too large to project in float32")
    return coefficients


def subtract(
    arrays: Sequence[np.ndarray],
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
        If a tensor has another size or dtype than expected, or is read-only.
    PlanError
        If the coefficients are not so many numbers finite in float32.
    """
    _check_plan(layout, plan)
    _check(arrays, layout, ("float32",))
    for name, array in zip(layout.names, arrays, strict=True):
        if not array.flags.writeable:
            raise LayoutError(f"tensor '{name}' is read-only")
    published = _published(coefficients, plan)
    segments = _segments_for(layout, plan).without(skip)
    dense = [np.ascontiguousarray(array) for array in arrays]
    _kernel(plan).subtract(dense, published[: plan.num_bases], segments, plan)
    for array, copy in zip(arrays, dense, strict=True):
        if not np.shares_memory(array, copy):
            array[...] = copy.reshape(array.shape)
    for tensor, update in _exact(published, layout, plan):
        if tensor not in skip:
            arrays[tensor][...] -= update.reshape(arrays[tensor].shape)


def reconstruct(coefficients: np.ndarray, layout: Layout, plan: RoundPlan) -> Iterator[np.ndarray]:
    """Yield the reconstruction Δ̂ tensor by tensor, flat, in float32 (paper, Eq. 7).

    See `subtract` for the arguments and the errors.
    """
    _check_plan(layout, plan)
    negated = -_published(coefficients, plan)
    segments = _segments_for(layout, plan)
    bounds = np.searchsorted(segments.tensor, np.arange(layout.num_projected + 1))
    for tensor, (first, last) in enumerate(itertools.pairwise(bounds)):
        update = np.zeros(layout.offsets[tensor + 1] - layout.offsets[tensor], dtype=np.float32)
        _kernel(plan).subtract(
            [update], negated[: plan.num_bases], segments.of_tensor(first, last), plan
        )
        yield update
    for _, update in _exact(negated, layout, plan):
        yield -update


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
    return f"{cpu.fingerprint(dense, _segments(layout, len(layout.names), WHOLE)):016x}"


def _differences(
    before: Sequence[np.ndarray], after: Sequence[np.ndarray] | None, tensors: Collection[int]
) -> Iterator[np.ndarray]:
    """Yield Δ of some tensors, flat, in float32."""
    for tensor in tensors:
        delta = as_float32(before[tensor])
        yield (delta if after is None else delta - as_float32(after[tensor])).ravel()


def _exact(
    coefficients: np.ndarray, layout: Layout, plan: RoundPlan
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield the position of each exact tensor, and its part of ``coefficients``."""
    shift = plan.num_bases - plan.blocks.size  # from elements to their coefficients
    for tensor in range(layout.num_projected, len(layout.names)):
        first, last = layout.offsets[tensor : tensor + 2] + shift
        yield tensor, coefficients[first:last]


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
