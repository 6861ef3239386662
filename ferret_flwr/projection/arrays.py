"""What differs between NumPy arrays and torch tensors, so that the rest need not know.

Arrays lie in the processor's memory and go to ``kernels.cpu``; NumPy lacks bfloat16, which is the
uint16 of its bits. Tensors lie on a GPU and go to ``kernels.cuda``. Neither torch nor Triton is
imported before there is a tensor.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import numpy as np

Array = Any  # numpy.ndarray or torch.Tensor

NUMPY_DTYPES = ("float32", "float16", "uint16")
TORCH_DTYPES = ("float32", "float16", "bfloat16")


def is_numpy(array: Array) -> bool:
    """Return whether ``array`` is NumPy's; if not, it is a torch tensor."""
    return isinstance(array, np.ndarray)


def projectable(array: Array) -> tuple[str, ...]:
    """Return the names of the dtypes that arrays of this kind may have."""
    return NUMPY_DTYPES if is_numpy(array) else TORCH_DTYPES


def dtype_name(array: Array) -> str:
    """Return a dtype's name; one of the other byte order has a sign before it."""
    if not is_numpy(array):
        return str(array.dtype).removeprefix("torch.")
    return array.dtype.name if array.dtype.isnative else str(array.dtype)


def dense(arrays: Sequence[Array]) -> list[Array]:
    """Return C-contiguous arrays, those themselves that are."""
    return [np.ascontiguousarray(a) if is_numpy(a) else a.detach().contiguous() for a in arrays]


def put_back(array: Array, changed: Array) -> None:
    """Write ``changed``, which `dense` made of ``array``, into it unless it is the same memory."""
    if not is_numpy(array):
        if changed.data_ptr() != array.data_ptr():
            array.detach().copy_(changed)
    elif not np.shares_memory(array, changed):
        array[...] = changed.reshape(array.shape)


def as_float32(array: Array) -> Array:
    """Return float32, float16, or bfloat16 as float32."""
    if not is_numpy(array):
        return array.detach().float()
    if array.dtype == np.uint16:
        return (array.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return array.astype(np.float32, copy=False)


def rounded(master: Array, like: Array) -> Array:
    """Return float32 ``master`` in the dtype of ``like``, to nearest, ties to even."""
    if not is_numpy(master):
        return master.to(like.dtype)
    if like.dtype != np.uint16:
        with np.errstate(over="ignore"):
            return master.astype(like.dtype, copy=False)
    bits = np.ascontiguousarray(master).view(np.uint32)
    upper = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(master), np.uint16(0x7FC0), upper.astype(np.uint16))


def all_finite(array: Array) -> bool:
    """Return whether no element is infinite or not a number."""
    if not is_numpy(array):
        return bool(array.isfinite().all())
    return bool(np.isfinite(as_float32(array)).all())


def zeros(size: int, like: Array | None) -> Array:
    """Return ``size`` zeros in float32, where ``like`` lies."""
    if like is None or is_numpy(like):
        return np.zeros(size, dtype=np.float32)
    return like.new_zeros(size, dtype=importlib.import_module("torch").float32)


def zeros_for(array: Array) -> Array:
    """Return as many zeros in float32 as ``array`` has elements, flat, where it lies."""
    return zeros(math.prod(array.shape), array)


def placed(array: np.ndarray, like: Array | None) -> Array:
    """Return ``array`` where ``like`` lies."""
    if like is None or is_numpy(like):
        return array
    return importlib.import_module("torch").from_numpy(array).to(like.device)


def to_host(array: Array) -> np.ndarray:
    """Return a float32 array or tensor as an array."""
    return array if is_numpy(array) else array.detach().cpu().numpy()


def has_triton() -> bool:
    """Return whether Triton is installed."""
    return find_spec("triton") is not None


def cuda_kernels() -> ModuleType:
    """Import the kernels for GPUs.

    Raises
    ------
    ImportError
        Naming the extra that Triton comes with.
    """
    if not has_triton():
        raise ImportError("tensors on a GPU need Triton: pip install 'ferret-flwr[gpu]'")
    return importlib.import_module("ferret_flwr.projection.kernels.cuda")
