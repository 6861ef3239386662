"""Federated averaging of full weights (McMahan et al., AISTATS 2017), for comparison."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import numpy as np
import torch

from ferret_flwr.training.tensors import load_masters, masters_of

T = TypeVar("T")


def local_round(
    weights: Sequence[np.ndarray],
    parameters: Mapping[str, torch.Tensor],
    train: Callable[[], T],
) -> tuple[list[np.ndarray], T]:
    """Start ``parameters`` from float32 ``weights``, train them, and return them in float32."""
    load_masters(parameters, weights)
    outcome = train()
    return masters_of(parameters), outcome
