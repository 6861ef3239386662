"""What a node answers: whether it can be used, and as what it is published."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from flwr.common import EvaluateRes, FitRes, Parameters, parameters_to_ndarrays
from flwr.server.client_proxy import ClientProxy

from ferret_flwr.flower import wire
from ferret_flwr.flower.nodes import UNKNOWN
from ferret_flwr.ledger import Entry, Ledger
from ferret_flwr.projection.encoding import decode
from ferret_flwr.projection.plan import EXACT_NUMBERS, RoundPlan
from ferret_flwr.rounds import publish, scaled

FitResult = tuple[ClientProxy, FitRes]  # as Flower's legacy strategies have it


@dataclass(frozen=True, eq=False)
class Reply:
    """One node's answer to a request to train, of either of Flower's interfaces.

    Attributes
    ----------
    node
        Flower's id.
    about
        What the node says of its answer: round, seed, fingerprint, partition.
    num_examples
        Its weight.
    tensors
        Its arrays as they crossed the wire.
    source
        Flower's own object.
    """

    node: str
    about: Mapping[str, Any]
    num_examples: Any
    tensors: Sequence[bytes]
    source: Any

    @cached_property
    def arrays(self) -> list[np.ndarray]:
        """Return the arrays; raises what NumPy raises if they are none."""
        return parameters_to_ndarrays(Parameters(list(self.tensors), "numpy.ndarray"))

    def gamma(self, plan: RoundPlan) -> np.ndarray:
        """Return γ: float32, ``(K + E,)``; raises `ValueError` if it is none of ``plan``."""
        plain = plan.numbers == EXACT_NUMBERS
        kind = np.dtype(np.float32 if plain else np.uint8)
        if [array.dtype for array in self.arrays] != [kind]:
            kinds = [str(array.dtype) for array in self.arrays]
            raise ValueError(f"expected one {kind} array, got {kinds}")
        if plain:
            return self.arrays[0]
        return decode(self.arrays[0], plan.numbers, plan.num_bases, plan.exact)

    def order(self) -> tuple[int, str]:
        """Return a sorting key: partitions stay what they are, node ids change."""
        partition = self.about.get("partition-id", UNKNOWN)
        return (partition if isinstance(partition, int) else UNKNOWN), self.node


def cached_rounds(about: Mapping[str, Any], most: int) -> int:
    """Return how many rounds the node says it keeps on its disk."""
    cached = about.get("cached", 0)
    return cached if isinstance(cached, int) and 0 <= cached <= most else 0


def check_reply(reply: Reply, plan: RoundPlan, bases: str, rate: float) -> None:
    """Raise `ValueError` saying why ``reply`` cannot be used."""
    about = reply.about
    if error := about.get("error"):
        raise ValueError(str(error))
    kinds = {"round": int, "seed": int, "partition-id": int, "fingerprint": str}
    for key, kind in kinds.items():
        if not isinstance(about.get(key), kind):
            raise ValueError(f"its reply has no '{key}': it must use FerretClient or ferret_mod")
    if not about["fingerprint"]:
        raise ValueError("it does not say from which parameters it trained")
    if about["round"] != plan.round:
        raise ValueError(f"it replied to round {about['round']!r}, this is {plan.round}")
    if not 0 <= int(about["partition-id"]) < 2**63:
        raise ValueError(f"it calls itself partition {about['partition-id']!r}")
    seed = wire.node_seed(plan, bases, int(about["partition-id"]))
    if about["seed"] != seed:
        raise ValueError(f"it used the seed {about['seed']!r}, the round's is {seed}")
    check_examples(reply.num_examples)
    gamma = reply.gamma(plan)
    plan.check_coefficients(gamma, owner="its reply")
    if not np.isfinite(scaled(plan, gamma, rate)).all():
        raise ValueError("its coefficients are too large for float32 when scaled")


def estimated_norms(replies: Iterable[Reply], plan: RoundPlan) -> list[float]:
    """Return an estimate of each ‖Δ‖ from its γ alone: E Σ γ² / (ρ K_l) = ‖Δ‖²."""
    scale = plan.unbiased_scale()
    return [math.sqrt(np.square(reply.gamma(plan), dtype=np.float64) @ scale) for reply in replies]


def last_norm(ledger: Ledger) -> float:
    """Return an estimate of the norm of the last round's update before the server rate, or 0."""
    if not ledger.entries or not ledger.entries[-1].rate:
        return 0.0
    last = ledger.entries[-1]
    squares = (last.coefficients.astype(np.float64) ** 2).sum(axis=0)
    return math.sqrt((squares / last.plan.unbiased_scale()).sum()) / last.rate


def untouched(replies: Iterable[Reply], tensors: int) -> tuple[int, ...]:
    """Return the positions of the ``tensors`` that every node says it has left as they were."""
    said = [reply.about.get("still") for reply in replies]
    sets = [set(s) if isinstance(s, list) and all(type(n) is int for n in s) else () for s in said]
    return tuple(sorted(set(range(tensors)).intersection(*sets))) if sets else ()


def check_evaluation(reply: EvaluateRes, about: Mapping[str, Any]) -> None:
    """Raise `ValueError` saying why ``reply`` cannot be used."""
    if error := about.get("error"):
        raise ValueError(str(error))
    check_examples(reply.num_examples)
    if not isinstance(reply.loss, int | float) or not math.isfinite(reply.loss):
        raise ValueError(f"it reports a loss of {reply.loss!r}")


def check_examples(count: object) -> None:
    """Refuse what is no number of examples: Flower lets any number pass, NaN among them."""
    if type(count) is not int or count < 1:
        raise ValueError(f"it reports {count!r} examples")


def publish_rows(
    plan: RoundPlan, accepted: Sequence[Reply], rate: float, still: Sequence[int] = ()
) -> Entry:
    """Publish each client's coefficients on its own bases, weighted as FedAvg would."""
    weights = np.array([reply.num_examples for reply in accepted], dtype=np.float64)
    rows = np.stack([reply.gamma(plan) for reply in accepted])
    seeds = [int(reply.about["seed"]) for reply in accepted]
    return publish(plan, rows * (weights / weights.sum())[:, None], rate, seeds, still)
