"""Between a model's tensors and the arrays that a replica and a projection work on.

Those of a model on a GPU are tensors there, if Triton is installed.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache

import numpy as np
import torch

from ferret_flwr.projection.arrays import Array, has_triton, is_numpy

log = logging.getLogger(__name__)


def as_array(tensor: torch.Tensor) -> np.ndarray:
    """Return ``tensor`` as an array, sharing its memory where it lies on the CPU.

    bfloat16, which NumPy lacks, is returned as the uint16 of its bits.
    """
    tensor = tensor.detach().cpu()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(np.uint16)
    return tensor.numpy()


def as_arrays(tensors: Iterable[torch.Tensor]) -> list[np.ndarray]:
    """Return each tensor as an array, see `as_array`."""
    return [as_array(tensor) for tensor in tensors]


def masters_of(parameters: Mapping[str, torch.Tensor]) -> list[np.ndarray]:
    """Return m_0 = float32(w_0) of each tensor, as memory of its own."""
    return list(masters_in_turn(parameters.values()))


def masters_in_turn(tensors: Iterable[torch.Tensor]) -> Iterator[np.ndarray]:
    """Yield m_0 = float32(w_0) of each tensor, as memory of its own."""
    for tensor in tensors:
        yield tensor.detach().to("cpu", torch.float32, copy=True).numpy()


def device_of(parameters: Mapping[str, torch.Tensor]) -> torch.device | None:
    """Return the GPU on which the replica of ``parameters`` can live, None if in host memory."""
    devices = {p.device for p in parameters.values()}
    if len(devices) != 1 or not all(device.type == "cuda" for device in devices):
        return None
    if not has_triton():
        _warn_once()
        return None
    return devices.pop()


@lru_cache(maxsize=1)
def _warn_once() -> None:
    log.warning(
        "the model is on a GPU but projected on the processor, because Triton is not installed: "
        "pip install 'ferret-flwr[gpu]'"
    )


def placed(arrays: Sequence[Array], device: torch.device | None) -> list[Array]:
    """Return float32 arrays as tensors on ``device``, or as they are if that is None."""
    if device is None:
        return list(arrays)
    return [torch.from_numpy(array).to(device) if is_numpy(array) else array for array in arrays]


def masters_on(parameters: Mapping[str, torch.Tensor], device: torch.device | None) -> list[Array]:
    """Return m_0 = float32(w_0) as `masters_of`, or as tensors on ``device``."""
    if device is None:
        return list(masters_of(parameters))
    return [p.detach().to(device, torch.float32, copy=True) for p in parameters.values()]


def held_like(parameter: torch.Tensor, master: Array) -> Array:
    """Return what ``parameter`` holds as the kind that ``master`` is: an array or a tensor."""
    return as_array(parameter) if is_numpy(master) else parameter.detach()


def rounded_like(master: Array, parameter: torch.Tensor) -> Array:
    """Return a float32 master as the model holds it: rounded to the parameter's dtype."""
    if parameter.dtype == torch.float32:
        return master
    tensor = torch.from_numpy(master) if is_numpy(master) else master
    return held_like(tensor.to(parameter.dtype), master)


@torch.no_grad()
def load_masters(parameters: Mapping[str, torch.Tensor], masters: Iterable[Array]) -> None:
    """Set each parameter to its float32 master, rounded to the parameter's dtype."""
    for parameter, master in zip(parameters.values(), masters, strict=True):
        parameter.copy_(torch.from_numpy(master) if is_numpy(master) else master)


def trainable_parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Return name -> parameter in ``named_parameters`` order: tied ones once, frozen ones never."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}
