"""What a node answers: whether it can be used, and as what it is published."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
from flwr.common import EvaluateRes, FitRes, Scalar, parameters_to_ndarrays
from flwr.server.client_proxy import ClientProxy

from ferret_flwr.flower import wire
from ferret_flwr.ledger import Entry, Ledger
from ferret_flwr.projection.plan import PlanError, RoundPlan
from ferret_flwr.rounds import publish

Metrics = dict[str, Scalar]
FitResult = tuple[ClientProxy, FitRes]


def cached_rounds(metrics: Metrics, most: int) -> int:
    """Return how many rounds the node says it keeps on its disk."""
    cached = metrics.get("cached", 0)
    return cached if isinstance(cached, int) and 0 <= cached <= most else 0


def check_reply(reply: FitRes, plan: RoundPlan, bases: str, rate: float) -> None:
    """Raise `ValueError` saying why ``reply`` cannot be used."""
    if error := reply.metrics.get("error"):
        raise ValueError(str(error))
    kinds = {"round": int, "seed": int, "partition-id": int, "fingerprint": str}
    for key, kind in kinds.items():
        if not isinstance(reply.metrics.get(key), kind):
            raise ValueError(f"its reply has no '{key}': it must use FerretClient")
    if not reply.metrics["fingerprint"]:
        raise ValueError("it does not say from which parameters it trained")
    if reply.metrics["round"] != plan.round:
        raise ValueError(f"it replied to round {reply.metrics['round']!r}, this is {plan.round}")
    if not 0 <= int(reply.metrics["partition-id"]) < 2**63:
        raise ValueError(f"it calls itself partition {reply.metrics['partition-id']!r}")
    seed = wire.node_seed(plan, bases, int(reply.metrics["partition-id"]))
    if reply.metrics["seed"] != seed:
        raise ValueError(f"it used the seed {reply.metrics['seed']!r}, the round's is {seed}")
    check_examples(reply.num_examples)
    arrays = parameters_to_ndarrays(reply.parameters)
    if len(arrays) != 1 or arrays[0].dtype != np.float32:
        raise ValueError(f"expected one float32 array, got {[str(a.dtype) for a in arrays]}")
    plan.check_coefficients(arrays[0], owner="its reply")
    try:
        publish(plan, arrays[0], rate)
    except PlanError as overflow:
        raise ValueError("its coefficients are too large for float32 when scaled") from overflow


def estimated_norms(replies: Iterable[FitRes], plan: RoundPlan) -> list[float]:
    """Return an estimate of each ‖Δ‖ from its γ alone: E Σ γ² / (ρ K_l) = ‖Δ‖²."""
    scale = plan.unbiased_scale()
    projected = (parameters_to_ndarrays(reply.parameters)[0] for reply in replies)
    return [math.sqrt(np.square(array, dtype=np.float64) @ scale) for array in projected]


def last_norm(ledger: Ledger) -> float:
    """Return an estimate of the norm of the last round's update before the server rate, or 0."""
    if not ledger.entries or not ledger.entries[-1].rate:
        return 0.0
    last = ledger.entries[-1]
    squares = (last.coefficients.astype(np.float64) ** 2).sum(axis=0)
    return math.sqrt((squares / last.plan.unbiased_scale()).sum()) / last.rate


def check_evaluation(reply: EvaluateRes) -> None:
    """Raise `ValueError` saying why ``reply`` cannot be used."""
    if error := reply.metrics.get("error"):
        raise ValueError(str(error))
    check_examples(reply.num_examples)
    if not isinstance(reply.loss, int | float) or not math.isfinite(reply.loss):
        raise ValueError(f"it reports a loss of {reply.loss!r}")


def check_examples(count: object) -> None:
    """Refuse what is no number of examples: Flower lets any number pass, NaN among them."""
    if type(count) is not int or count < 1:
        raise ValueError(f"it reports {count!r} examples")


def publish_rows(plan: RoundPlan, accepted: Sequence[FitResult], rate: float) -> Entry:
    """Publish each client's coefficients on its own bases, weighted as FedAvg would."""
    weights = np.array([reply.num_examples for _, reply in accepted], dtype=np.float64)
    rows = np.stack([parameters_to_ndarrays(reply.parameters)[0] for _, reply in accepted])
    seeds = [int(reply.metrics["seed"]) for _, reply in accepted]
    return publish(plan, rows * (weights / weights.sum())[:, None], rate, seeds)
