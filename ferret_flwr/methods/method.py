"""What a federated method is, on both sides of the wire and free of Flower.

Ferret's own state is the ledger, and it has a strategy and a client of its own. Every other method
is one class here: the server holds one, each node makes one for a message, and what they tell each
other are lists of arrays. They share models, data, local batches, evaluation and byte counting with
Ferret, so that a comparison compares the methods alone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from ferret_flwr.config import Config
from ferret_flwr.projection.projection import as_float32
from ferret_flwr.training.worker import Node, Worker

Arrays = list[np.ndarray]
Kind = tuple[np.dtype, tuple[int, ...]]  # dtype and shape of an array


@dataclass(frozen=True)
class Reply:
    """What one node answered.

    Attributes
    ----------
    arrays
        As `Method.local_round` returned them.
    weight
        The node's number of training examples.
    partition_id
        Replies are aggregated in this order.
    """

    arrays: Arrays
    weight: int
    partition_id: int


class Method(ABC):
    """One federated method.

    Attributes
    ----------
    adapter
        Which parameters it tunes: "" for the model's own, or a kind of ``adapters.ADAPTERS``.
    optimizer
        What nodes train by, whatever `train.optimizer` says; "" for that.
    group
        Of the run configuration, the keys that are this method's own; "" if there are none.

    Parameters
    ----------
    config
        Of the run, as `configured` returned it.
    worker
        The process's model, with the adapter on it, at its base.
    """

    adapter: ClassVar[str] = ""
    optimizer: ClassVar[str] = ""
    group: ClassVar[str] = ""

    def __init__(self, config: Config, worker: Worker) -> None:
        """Keep both; nothing is computed yet."""
        self.config = config
        self.worker = worker

    @classmethod
    def configured(cls, config: Config) -> Config:
        """Return ``config`` with what the method itself decides."""
        if not cls.optimizer:
            return config
        return replace(config, train=replace(config.train, optimizer=cls.optimizer))

    @abstractmethod
    def start(self) -> None:
        """Become the server's side, before the first round."""

    @abstractmethod
    def state(self) -> Arrays:
        """Return what a node needs to reach the global model and train (server)."""

    @abstractmethod
    def load(self, state: Arrays) -> None:
        """Set the process's model to the one that ``state`` stands for (server and node)."""

    @abstractmethod
    def local_round(self, state: Arrays, node: Node, round: int) -> tuple[Arrays, float]:
        """Train one round from ``state``, which is loaded (node).

        Returns
        -------
        tuple
            What to send, and the mean training loss.

        Raises
        ------
        FloatingPointError
            If the result is not finite; nothing is sent then.
        """

    @abstractmethod
    def check(self, reply: Reply) -> None:
        """Refuse what this method's nodes do not send (server).

        Raises
        ------
        ValueError, FloatingPointError
            Saying what is wrong.
        """

    @abstractmethod
    def aggregate(self, round: int, replies: Sequence[Reply]) -> None:
        """Take a round's replies, checked and ordered by partition, into the state (server)."""

    def base(self) -> str:
        """Return the fingerprint of the base that all must have in common, "" if none need be."""
        return self.worker.base_fingerprint


def check_finite(arrays: Sequence[np.ndarray], owner: str) -> None:
    """Raise `FloatingPointError` unless all ``arrays`` are finite."""
    if not all(np.isfinite(array).all() for array in arrays):
        raise FloatingPointError(f"{owner} is not finite")


def check_arrays(reply: Reply, kinds: Sequence[Kind]) -> None:
    """Raise unless a reply's arrays are finite, of these ``kinds``."""
    owner = f"the reply of partition {reply.partition_id}"
    if len(reply.arrays) != len(kinds):
        raise ValueError(f"{owner} has {len(reply.arrays)} arrays, expected {len(kinds)}")
    for number, (array, (dtype, shape)) in enumerate(zip(reply.arrays, kinds, strict=True)):
        if (array.dtype, array.shape) != (dtype, shape):
            raise ValueError(
                f"{owner} has {array.dtype} {array.shape} as array {number}, expected "
                f"{dtype} {shape}"
            )
    check_finite([as_float32(array) for array in reply.arrays], owner)


def weighted_mean(replies: Sequence[Reply]) -> Arrays:
    """Return the mean of the replies' arrays weighted by examples, in float32."""
    total = sum(reply.weight for reply in replies)
    mean = [np.zeros(array.shape, dtype=np.float32) for array in replies[0].arrays]
    for reply in replies:
        for into, array in zip(mean, reply.arrays, strict=True):
            into += np.float32(reply.weight / total) * as_float32(array)
    return mean
