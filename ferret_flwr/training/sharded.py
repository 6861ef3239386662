"""A model that FSDP has sharded over several processes: which part of it lies in this one.

Every process projects and reconstructs its own part; what they exchange are K numbers and
fingerprints. ``torch.distributed.fsdp.fully_shard`` makes such models.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor, Replicate, Shard

from ferret_flwr.projection.layout import Layout, Pieces

from .errors import ModelError
from .tensors import local, trainable_parameters

T = TypeVar("T")


def is_sharded(model: torch.nn.Module) -> bool:
    """Return whether ``fully_shard`` was called, or any parameter is a DTensor.

    Raises
    ------
    ModelError
        If it is sharded by the older class, whose parameters do not tell what they are part of.
    """
    modules, parameters = list(model.modules()), list(model.parameters())
    if any(isinstance(module, FullyShardedDataParallel) for module in modules):
        raise ModelError(
            "a model within FullyShardedDataParallel does not tell which part of it is where: "
            "shard it with torch.distributed.fsdp.fully_shard"
        )
    return any(isinstance(part, FSDPModule | DTensor) for part in modules + parameters)


def layout_of(model: torch.nn.Module) -> Layout:
    """Return the layout of all that is trained, with the pieces of this process.

    Parameters
    ----------
    model
        Its parameters are DTensors on one mesh, sharded by rows or replicated, or plain tensors
        that are the same in all processes of the mesh, which must all call this.

    Raises
    ------
    ModelError
        Naming a parameter that is placed otherwise.
    """
    reshard(model)
    parameters = trainable_parameters(model)
    meshes = {p.device_mesh for p in parameters.values() if isinstance(p, DTensor)}
    if len(meshes) != 1:
        raise ModelError(f"what is trained must be sharded over one mesh, got {len(meshes)}")
    (mesh,) = meshes
    sizes = np.array([local(p).numel() for p in parameters.values()], dtype=np.int64)
    rank = mesh.get_coordinate()
    if rank is None:
        raise ModelError(f"this process holds nothing of a model on {mesh}")
    before = [
        sum(_gathered(sizes, mesh, dim)[: rank[dim]], np.zeros_like(sizes))
        for dim in range(mesh.ndim)
    ]
    first, counted = [], []
    for number, (name, parameter) in enumerate(parameters.items()):
        sharded = _sharded_dimension(name, parameter)
        first.append(0 if sharded is None else int(before[sharded][number]))
        counted.append(_counts(rank, sharded))

    def add_up(array: np.ndarray) -> np.ndarray:
        for dim in range(mesh.ndim):
            array = reduce(np.add, _gathered(array, mesh, dim))
        return array

    whole = Layout.of(parameters)
    found = add_up(np.where(counted, sizes, 0))
    for name, shape, size in zip(whole.names, whole.shapes, found, strict=True):
        if size != math.prod(shape):
            raise ModelError(
                f"the processes of the mesh hold {size} elements of parameter '{name}', which "
                f"has {math.prod(shape)}"
            )
    pieces = Pieces(tuple(first), tuple(sizes.tolist()), tuple(counted), add_up)
    return Layout(whole.names, whole.shapes, pieces=pieces)


def _counts(rank: Sequence[int], sharded: int | None) -> bool:
    """Return whether the process at ``rank`` is the first of those that hold the same elements."""
    return not any(at for dim, at in enumerate(rank) if dim != sharded)


def _gathered(array: np.ndarray, mesh: DeviceMesh, dim: int) -> list[np.ndarray]:
    """Return the arrays of all processes along a dimension of ``mesh``, by rank.

    They have one shape, and a dtype of eight bytes. Sockets authenticate nobody, so what comes is
    taken for numbers: ``all_gather_object`` would unpickle it.
    """
    group = mesh.get_group(dim)
    here = torch.from_numpy(array.view(np.int64)).to(mesh.device_type)
    tensors = [torch.empty_like(here) for _ in range(dist.get_world_size(group))]
    dist.all_gather(tensors, here, group=group)
    return [tensor.cpu().numpy().view(array.dtype) for tensor in tensors]


def _sharded_dimension(name: str, parameter: torch.Tensor) -> int | None:
    """Return the dimension of the mesh that the rows are sharded over, None if they are not."""
    if not isinstance(parameter, DTensor):
        return None
    dims = [dim for dim, at in enumerate(parameter.placements) if at != Replicate()]
    if len(dims) > 1 or any(parameter.placements[dim] != Shard(0) for dim in dims):
        raise ModelError(
            f"parameter '{name}' is placed as {parameter.placements}: a parameter must be "
            "replicated, or sharded once, by rows, as fully_shard does"
        )
    return dims[0] if dims else None


def resharded(model: torch.nn.Module, step: Callable[..., T]) -> Callable[..., T]:
    """Return ``step``, before which the model lets go of what it has gathered.

    After a forward pass alone FSDP keeps the whole parameters of its root, and would go on with
    them though the shards have been changed since.
    """

    def first(*arguments: Any) -> T:
        reshard(model)
        return step(*arguments)

    return first


def reshard(model: torch.nn.Module) -> None:
    """Free gathered parameters; the shards stay as they are."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
