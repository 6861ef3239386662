"""Project an update onto a round's bases, and take its reconstruction off the parameters.

The parameters are a list of tensors in layout order. Nothing here is ever as large as the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from ferret_flwr.projection.kernels import cpu
from ferret_flwr.projection.kernels.segments import Segments
from ferret_flwr.projection.layout import Layout, LayoutError
from ferret_flwr.projection.plan import PlanError, RoundPlan

PROJECTABLE = ("float32", "float16", "uint16")


@lru_cache(maxsize=4)
def _segments(layout: Layout, block_size: int) -> Segments:
    return Segments.of(layout.offsets, block_size)


def _check(arrays: Sequence[np.ndarray], layout: Layout, dtypes: Sequence[str]) -> None:
    layout.check(arrays)
    for name, array in zip(layout.names, arrays, strict=True):
        if array.dtype.name not in dtypes:
            raise LayoutError(
                f"tensor '{name}' must have dtype {' or '.join(dtypes)}, got {array.dtype.name}"
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
    segments = _segments(layout, plan.blocks.block_size)
    coefficients = cpu.project(before, after, segments, plan)
    if not np.isfinite(coefficients).all():
        block = int(np.searchsorted(plan.offsets, np.argmin(np.isfinite(coefficients)), "right"))
        first = (block - 1) * plan.blocks.block_size
        tensor = layout.names[int(np.searchsorted(layout.offsets, first, side="right")) - 1]
        raise PlanError(
            f"the update is not finite at or behind tensor '{tensor}' (block {block - 1})"
        )
    return coefficients


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
        If a tensor has another size or dtype than expected.
    PlanError
        If the coefficients are not K finite numbers.
    """
    _check_plan(layout, plan)
    _check(arrays, layout, ("float32",))
    plan.check_coefficients(coefficients)
    dense = [np.ascontiguousarray(array) for array in arrays]
    segments = _segments(layout, plan.blocks.block_size)
    cpu.subtract(dense, np.ascontiguousarray(coefficients, dtype=np.float32), segments, plan)
    for array, copy in zip(arrays, dense, strict=True):
        if not np.shares_memory(array, copy):
            array[...] = copy.reshape(array.shape)


def fingerprint(arrays: Sequence[np.ndarray], layout: Layout) -> str:
    """Return sixteen hexadecimal digits that change with any bit of float32 ``arrays``."""
    _check(arrays, layout, ("float32",))
    dense = [np.ascontiguousarray(array) for array in arrays]
    return f"{cpu.fingerprint(dense, _segments(layout, 2**62)):016x}"


def _check_plan(layout: Layout, plan: RoundPlan) -> None:
    if plan.blocks.size != layout.size:
        raise PlanError(
            f"the plan is for {plan.blocks.size} parameters, the model has {layout.size}"
        )
