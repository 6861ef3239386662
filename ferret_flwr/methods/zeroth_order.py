"""What the zeroth-order methods share: random directions, and a model's loss along them.

A direction z is basis 0 of a seed over one block that is the whole model, so element i of z is a
pure function of (seed, i), here and on the server. Its elements are ±1, where the papers draw
Gaussians or points of the unit sphere: the one deliberate deviation. The second moments, all that
the estimators rest on, are the same: E z zᵀ = I as for N(0, 1), and z / √d has length 1 exactly.
In return a direction costs one random bit per element, ±c is exact in floating point, and the
kernels are those of the projection.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator

import numpy as np
import torch

from ferret_flwr.config import Config
from ferret_flwr.methods.method import Arrays
from ferret_flwr.projection.layout import Blocks, Layout
from ferret_flwr.projection.plan import RoundPlan
from ferret_flwr.projection.projection import reconstruct, subtract
from ferret_flwr.training.data import Tokens
from ferret_flwr.training.local import batch_loss
from ferret_flwr.training.optimizers import learning_rate
from ferret_flwr.training.tensors import as_arrays, load_masters
from ferret_flwr.training.worker import Node, Progress

log = logging.getLogger(__name__)


def direction(layout: Layout, seed: int) -> RoundPlan:
    """Return the plan whose only basis is the direction z of ``seed``, below 2⁶³."""
    return RoundPlan(1, seed, "rademacher", Blocks.of(layout.size, 1), np.ones(1, dtype=np.int64))


def step_along(masters: Arrays, layout: Layout, seed: int, length: float) -> None:
    """Take ``length`` times the direction of ``seed`` off float32 ``masters``, in place."""
    subtract(masters, layout, direction(layout, seed), np.array([length]))


def learning_rates(round: int, config: Config) -> list[float]:
    """Return the learning rate of each step of ``round``."""
    steps = config.train.steps
    return [
        learning_rate((round - 1) * steps + step, config.num_server_rounds * steps, config.train)
        for step in range(steps)
    ]


class Walk:
    """A node's model in one round: where it is, and its loss there and nearby.

    The masters are the truth, and every place nearby is reached from them: walking back is
    loading them, which is exact. Walking back on foot would need no second copy of the model, but
    (w + εz) − εz is not w. A float32 model in main memory is moved in place; another one is given
    float32 sums, made tensor by tensor and rounded to its dtype. Both have the same bits.

    Parameters
    ----------
    node, round
        Whose model and data, and when. `train.optimizer` and `train.max-grad-norm` do not apply.
    masters
        Where it starts: float32 in layout order. Owned and moved by the walk.
    """

    def __init__(self, node: Node, round: int, masters: Arrays) -> None:
        """Leave the model as it is."""
        self.node = node
        self.round = round
        self.masters = masters

    def steps(self) -> Iterator[tuple[int, float, list[Tokens]]]:
        """Yield number from 0, learning rate and batch of each step, showing how far it is."""
        config, progress = self.node.config, Progress()
        rates = learning_rates(self.round, config)
        for step, (drawn, _) in enumerate(self.node.batches(self.round)):
            if progress.due():
                log.info(
                    "round %d, partition %d: step %d of %d",
                    self.round,
                    self.node.partition_id,
                    step,
                    config.train.steps,
                )
            yield step, rates[step], drawn

    def loss(self, drawn: list[Tokens], seed: int = 0, length: float = 0.0) -> float:
        """Return F(w + length·z), the mean loss of ``drawn``; the model is left at w + length·z.

        Raises
        ------
        FloatingPointError
            If the loss is not finite.
        """
        worker, train = self.node.worker, self.node.config.train
        self._place(seed, length)
        value = batch_loss(worker.lm.model, drawn, train, worker.lm.tokenizer.pad_token_id)
        return self._finite(value, "the loss")

    def _place(self, seed: int, length: float) -> None:
        """Set the model to w + length·z."""
        parameters, layout = self.node.worker.parameters, self.node.worker.layout
        if not length:
            load_masters(parameters, self.masters)
        elif all(p.dtype == torch.float32 and p.is_cpu for p in parameters.values()):
            load_masters(parameters, self.masters)  # also tells torch that the model changes
            step_along(as_arrays(parameters.values()), layout, seed, -length)
        else:
            bases = direction(layout, seed)
            moves = reconstruct(np.array([length]), layout, bases, self.masters)
            pairs = zip(self.masters, moves, strict=True)
            load_masters(parameters, (m + move.reshape(m.shape) for m, move in pairs))

    def step(self, seed: int, length: float) -> None:
        """Go to w − length·z.

        Raises
        ------
        FloatingPointError
            If ``length`` is not finite in float32; the walk stays where it is.
        """
        with np.errstate(over="ignore"):
            self._finite(float(np.float32(length)), "the step")
        step_along(self.masters, self.node.worker.layout, seed, length)

    def _finite(self, value: float, what: str) -> float:
        if not math.isfinite(value):
            raise FloatingPointError(
                f"round {self.round}: {what} of partition {self.node.partition_id} is not finite; "
                "try a lower 'train.learning-rate'"
            )
        return value
