"""Ferret's local round: train, and project the update onto the round's bases (paper, Alg. 1)."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch

from ferret_flwr.projection.plan import RoundPlan
from ferret_flwr.projection.projection import fidelity, project
from ferret_flwr.replica import Replica
from ferret_flwr.training.tensors import held_like, load_masters, rounded_like

T = TypeVar("T")


@dataclass(frozen=True)
class Projected:
    """One client's update as K numbers.

    Attributes
    ----------
    coefficients
        γ: float32, ``(K,)``.
    fidelity
        cos(Δ̂, Δ) of this update and its own reconstruction.
    train_seconds, project_seconds
        What it took.
    """

    coefficients: np.ndarray
    fidelity: float
    train_seconds: float
    project_seconds: float


def local_round(
    replica: Replica,
    parameters: Mapping[str, torch.Tensor],
    plan: RoundPlan,
    train: Callable[[], T],
) -> tuple[Projected, T]:
    """Start ``parameters`` from the replica, train them, and project what changed.

    Parameters
    ----------
    replica
        The canonical parameters before the round; unchanged.
    parameters
        The model's trainable tensors; trained in place.
    plan
        The round's bases.
    train
        Changes ``parameters``.

    Returns
    -------
    tuple
        The projected update, and what ``train`` returned.

    Raises
    ------
    PlanError
        If the update is not finite.
    """
    start = time.perf_counter()
    load_masters(parameters, replica.arrays)
    outcome = train()
    trained = time.perf_counter()
    pairs = list(zip(replica.arrays, parameters.values(), strict=True))
    before = [rounded_like(master, parameter) for master, parameter in pairs]
    after = [held_like(parameter, master) for master, parameter in pairs]
    projected = project(before, replica.layout, plan, after)
    project_seconds = time.perf_counter() - trained
    projected_update = Projected(
        projected.astype(np.float32),
        fidelity(before, after, replica.layout, plan, projected),
        trained - start,
        project_seconds,
    )
    return projected_update, outcome
