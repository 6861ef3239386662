"""Federated averaging of full weights (McMahan et al., AISTATS 2017, Algorithm 1)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from ferret_flwr.methods.method import (
    Arrays,
    Method,
    Reply,
    check_arrays,
    check_finite,
    weighted_mean,
)
from ferret_flwr.projection.projection import as_float32
from ferret_flwr.training.tensors import as_arrays, load_masters, masters_of, rounded_like
from ferret_flwr.training.worker import Node


class FedAvg(Method):
    """Nodes are sent the weights, train them, and send them back; the server averages.

    The state is every trainable tensor, in the model's own dtype, bfloat16 as its bits in uint16.
    The server averages in float32. What is trainable is the adapter's choice.

    Attributes
    ----------
    exact
        Send float32, whatever the model's dtype.
    """

    exact: ClassVar[bool] = False
    weights: Arrays

    def start(self) -> None:
        """Start from the base model."""
        self.weights = masters_of(self.worker.parameters)
        self.kinds = [(array.dtype, array.shape) for array in self.state()]

    def base(self) -> str:
        """Return that of the frozen model below an adapter."""
        return self.worker.base_fingerprint if self.adapter else ""

    def state(self) -> Arrays:
        """Return the weights."""
        if self.exact:
            return self.weights
        pairs = zip(self.weights, self.worker.parameters.values(), strict=True)
        return [rounded_like(weight, parameter) for weight, parameter in pairs]

    def load(self, state: Arrays) -> None:
        """Load the weights."""
        load_masters(self.worker.parameters, map(as_float32, state))

    def local_round(self, state: Arrays, node: Node, round: int) -> tuple[Arrays, float]:
        """Train from ``state`` and return the trained weights."""
        result = node.train(round)
        weights = [array.copy() for array in as_arrays(self.worker.parameters.values())]
        owner = f"round {round}: the model of partition {node.partition_id}"
        check_finite(list(map(as_float32, weights)), owner)
        return weights, result.loss

    def check(self, reply: Reply) -> None:
        """Refuse what is not the weights of this model."""
        check_arrays(reply, self.kinds)

    def aggregate(self, round: int, replies: Sequence[Reply]) -> None:
        """Average the weights."""
        self.weights = weighted_mean(replies)
