"""Between a model's tensors and the arrays that a replica and a projection work on.

Those on a GPU are tensors there, if Triton is installed. A DTensor, as FSDP makes them, stands for
the part of it that lies in this process.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache

import numpy as np
import torch

from ferret_flwr.projection.arrays import Array, has_triton, is_numpy

from .errors import ModelError

log = logging.getLogger(__name__)


def local(tensor: torch.Tensor) -> torch.Tensor:
    """Return what lies in this process of a parameter, sharing its memory, without gradient."""
    tensor = tensor.detach()
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def as_array(tensor: torch.Tensor) -> np.ndarray:
    """Return ``tensor`` as an array, sharing its memory where it lies on the CPU.

    bfloat16, which NumPy lacks, is returned as the uint16 of its bits.
    """
    tensor = local(tensor).cpu()
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
        yield local(tensor).to("cpu", torch.float32, copy=True).numpy()


def devices_of(parameters: Mapping[str, torch.Tensor]) -> list[torch.device | None]:
    """Return the GPU on which the replica of each tensor can live, None if in host memory.

    Raises
    ------
    ModelError
        Naming a tensor that is not in memory.
    """
    for name, parameter in parameters.items():
        if local(parameter).is_meta:
            raise ModelError(
                f"parameter '{name}' is not in memory: its values were offloaded, or never loaded. "
                "What is trained must lie on GPUs or with the processor as a whole: use a device "
                "map without offloading, fewer trainable parameters, or a smaller model"
            )
    devices = [p.device if local(p).is_cuda else None for p in parameters.values()]
    if any(devices) and not has_triton():
        _warn_once()
        return [None] * len(devices)
    return devices


@lru_cache(maxsize=1)
def _warn_once() -> None:
    log.warning(
        "the model is on a GPU but projected on the processor, because Triton is not installed: "
        "pip install 'ferret-flwr[gpu]'"
    )


Devices = Sequence[torch.device | None]  # one for each tensor, None for host memory


def placed(arrays: Sequence[Array], devices: Devices) -> list[Array]:
    """Return each float32 array as a tensor on its device, or as it is if that is None."""
    return [
        array if device is None or not is_numpy(array) else torch.from_numpy(array).to(device)
        for array, device in zip(arrays, devices, strict=True)
    ]


def masters_on(parameters: Mapping[str, torch.Tensor], devices: Devices) -> list[Array]:
    """Return m_0 = float32(w_0) as `masters_of`, or as a tensor where there is a device."""
    copies = (
        local(p).to(device or "cpu", torch.float32, copy=True)
        for p, device in zip(parameters.values(), devices, strict=True)
    )
    return [
        copy.numpy() if device is None else copy
        for copy, device in zip(copies, devices, strict=True)
    ]


def held_like(parameter: torch.Tensor, master: Array) -> Array:
    """Return what ``parameter`` holds as the kind that ``master`` is: an array or a tensor."""
    return as_array(parameter) if is_numpy(master) else local(parameter)


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
        local(parameter).copy_(torch.from_numpy(master) if is_numpy(master) else master)


def trainable_parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Return name -> parameter in ``named_parameters`` order: tied ones once, frozen ones never."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}
