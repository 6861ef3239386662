"""Ferret's local round: train, and project the update onto the round's bases (paper, Alg. 1)."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch

from ferret_flwr.projection.layout import Layout
from ferret_flwr.projection.plan import RoundPlan
from ferret_flwr.projection.projection import Projection, fidelity, project
from ferret_flwr.replica import Replica
from ferret_flwr.training.lean import Applied
from ferret_flwr.training.tensors import as_array, held_like, load_masters, rounded_like

T = TypeVar("T")


@dataclass(frozen=True)
class Projected:
    """One client's update as K numbers.

    Attributes
    ----------
    coefficients
        γ: float32, ``(K,)``.
    fidelity
        cos(Δ̂, Δ) of this update and its own reconstruction; None if Δ was never there as a whole.
    train_seconds, project_seconds
        What it took.
    """

    coefficients: np.ndarray
    fidelity: float | None
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


def lean_round(
    layout: Layout, plan: RoundPlan, train: Callable[[Applied], T]
) -> tuple[Projected, T]:
    """Project each step of a training as it is taken: γ = Σ over steps of Vᵀ(step).

    Parameters
    ----------
    layout
        Of the model's trainable tensors.
    plan
        The round's bases.
    train
        Trains the model from where it is, and tells each step to its argument.

    Returns
    -------
    tuple
        The projected update, without its fidelity, and what ``train`` returned.

    Raises
    ------
    PlanError
        If a step is not finite.
    """
    start = time.perf_counter()
    projection = Projection(layout, plan)
    project_seconds = 0.0

    def add(first: int, step: torch.Tensor) -> None:
        nonlocal project_seconds
        began = time.perf_counter()
        projection.add(first, as_array(step))
        project_seconds += time.perf_counter() - began

    outcome = train(add)
    seconds = time.perf_counter() - start - project_seconds
    coefficients = projection.coefficients.astype(np.float32)
    return Projected(coefficients, None, seconds, project_seconds), outcome
