"""Between a model's tensors and the arrays that a replica and a projection work on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import torch


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


def rounded_like(array: np.ndarray, parameter: torch.Tensor) -> np.ndarray:
    """Return a float32 master as the model holds it: rounded to the parameter's dtype."""
    if parameter.dtype == torch.float32:
        return array
    return as_array(torch.from_numpy(array).to(parameter.dtype))


@torch.no_grad()
def load_masters(parameters: Mapping[str, torch.Tensor], arrays: Iterable[np.ndarray]) -> None:
    """Set each parameter to its float32 master, rounded to the parameter's dtype."""
    for parameter, array in zip(parameters.values(), arrays, strict=True):
        parameter.copy_(torch.from_numpy(array))


def trainable_parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Return name -> parameter in `named_parameters` order: tied ones once, frozen ones never."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}
