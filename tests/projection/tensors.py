"""Triton's kernels behind the same calls as the others, on NumPy arrays: for the tests."""

import os
from importlib.util import find_spec

import numpy as np
import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def tensor(array, device="cpu"):
    """Return a tensor with the elements of ``array`` in memory of its own; uint16 as bfloat16."""
    if array.dtype == np.uint16:
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16).to(device)
    return torch.from_numpy(array.copy()).to(device)


def tensors(arrays, device="cpu"):
    return [tensor(array, device) for array in arrays]


def array(tensor):
    """Return the elements of ``tensor``; bfloat16 as uint16."""
    tensor = tensor.detach().cpu()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(np.uint16)
    return tensor.numpy()


class OnTensors:
    """The kernels of `cuda` on ``device``, for arrays."""

    def __init__(self, device):
        self.device = device

    @property
    def kernels(self):
        from ferret_flwr.projection.kernels import cuda

        return cuda

    def project(self, before, after, segments, plan):
        ends = None if after is None else tensors(after, self.device)
        return self.kernels.project(tensors(before, self.device), ends, segments, plan)

    def subtract(self, arrays, coefficients, segments, plan):
        changed = tensors(arrays, self.device)
        self.kernels.subtract(changed, coefficients, segments, plan)
        for old, new in zip(arrays, changed, strict=True):
            old[...] = array(new)

    def fingerprint(self, arrays, segments):
        return self.kernels.fingerprint(tensors(arrays, self.device), segments)


def device_of(backend):
    """Return where "interpreter" or "cuda" wants its tensors, or skip the test."""
    if not find_spec("triton"):
        pytest.skip("Triton is not installed")
    if backend == "interpreter":
        if not INTERPRETED:
            pytest.skip("Triton compiles here; TRITON_INTERPRET=1 lets it interpret")
        return "cpu"
    if INTERPRETED or not torch.cuda.is_available():
        pytest.skip("there is no CUDA device, or TRITON_INTERPRET=1")
    return "cuda"


TRITON = ["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)]
