"""FedKSeed: zeroth-order tuning with K seeds (Qin et al., ICML 2024, arXiv 2312.06353)."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from copy import deepcopy
from functools import lru_cache

import numpy as np

from ferret_flwr.methods.method import Arrays, Method, Reply
from ferret_flwr.methods.zeroth_order import Walk, learning_rates, step_along
from ferret_flwr.projection.kernels.philox import derive_seed
from ferret_flwr.training.randomness import uniform
from ferret_flwr.training.tensors import load_masters
from ferret_flwr.training.worker import Node, Progress, Worker

log = logging.getLogger(__name__)


class FedKSeed(Method):
    """The model is w = w₀ − Σ_k c_k z_k, and all that travels are numbers c_k.

    A pool of K = `zeroth-order.seeds` directions z_k is fixed for the run, one derived seed each.
    In each of `train.steps` local steps a node draws a k from the pool, measures the scalar
    gradient ĝ = (F(w + ε z_k) − F(w − ε z_k)) / 2ε with ε = `zeroth-order.epsilon`, and goes to
    w − η ĝ z_k. It sends which k it drew and what ĝ was: two arrays of `train.steps` numbers.

    The state is c, float32 (K,). The server adds the nodes' ĝ to it weighted by examples, as
    theirs does to an accumulator A (w = w₀ − η Σ_k A_k z_k). Its c has the learning rate of each
    step in it, or a schedule would change the past.

    Which k a node draws is a pure function of run, partition, round and step.
    """

    group = "zeroth-order"

    def start(self) -> None:
        """Start from the base model."""
        self.coefficients = np.zeros(self.config.zeroth_order.seeds)

    def state(self) -> Arrays:
        """Return c."""
        return [self.coefficients.astype(np.float32)]

    def load(self, state: Arrays) -> None:
        """Rebuild the model."""
        load_masters(self.worker.parameters, self._rebuilt(state))

    def local_round(self, state: Arrays, node: Node, round: int) -> tuple[Arrays, float]:
        """Take the local steps from ``state``.

        Returns
        -------
        tuple
            k, int32 and ĝ, float32, of each step; and the mean of both losses over the steps.
        """
        epsilon = self.config.zeroth_order.epsilon
        walk = Walk(node, round, deepcopy(self._rebuilt(state)))
        drawn_seeds = self._draw(self._probabilities(state), node.partition_id, round)
        scalars = np.zeros(len(drawn_seeds), dtype=np.float32)
        losses = []
        for step, rate, drawn in walk.steps():
            seed = derive_seed(self.config.seed, int(drawn_seeds[step]))
            plus = walk.loss(drawn, seed, epsilon)
            minus = walk.loss(drawn, seed, -epsilon)
            scalars[step] = (plus - minus) / (2 * epsilon)
            walk.step(seed, rate * float(scalars[step]))
            losses.append((plus + minus) / 2)
        load_masters(self.worker.parameters, walk.masters)
        return [drawn_seeds, scalars], float(np.mean(losses))

    def aggregate(self, round: int, replies: Sequence[Reply]) -> None:
        """Add each node's steps, weighted by its share of the examples."""
        rates = np.array(learning_rates(round, self.config))
        total = sum(reply.weight for reply in replies)
        for reply in replies:
            indices, scalars = reply.arrays
            lengths = reply.weight / total * rates * scalars
            self.coefficients += np.bincount(indices, lengths, self.coefficients.size)

    def _rebuilt(self, state: Arrays) -> Arrays:
        return rebuild(self.worker, self.config.seed, state[0].astype(np.float32).tobytes())

    def _probabilities(self, state: Arrays) -> np.ndarray:
        """Return how likely a node is to draw each k, but for a factor."""
        return np.ones(state[0].size)

    def _draw(self, probabilities: np.ndarray, partition_id: int, round: int) -> np.ndarray:
        """Return the k of each step of a round: int32, ``(steps,)``."""
        steps = self.config.train.steps
        t = (uniform(steps, "fedkseed", self.config.seed, partition_id, round) + 1.0) / 2
        upto = np.cumsum(probabilities, dtype=np.float64)
        return np.searchsorted(upto, t.astype(np.float64) * upto[-1], "right").astype(np.int32)

    def check(self, reply: Reply) -> None:
        """Raise `ValueError` unless ``reply`` holds one k and one finite ĝ per step."""
        shape, pool = (self.config.train.steps,), self.coefficients.size
        kinds = [(array.shape, array.dtype.name) for array in reply.arrays]
        if kinds != [(shape, "int32"), (shape, "float32")]:
            raise ValueError(
                f"partition {reply.partition_id} sent {kinds}, not int32 and float32 of {shape}"
            )
        indices, scalars = reply.arrays
        if indices.min() < 0 or indices.max() >= pool or not np.isfinite(scalars).all():
            raise ValueError(
                f"partition {reply.partition_id} sent a seed beyond the {pool} of the pool, or a "
                "gradient that is not finite"
            )


class FedKSeedPro(FedKSeed):
    """FedKSeed that prefers the seeds along which the loss changed most.

    The state is c and the probabilities p, float32 (K,) each, p uniform at first. The mean a_k of
    all ``|ĝ|`` that were measured along z_k, 0 before the first, is brought to 0..1, and p is its
    softmax, as in the paper's section on non-uniform sampling:

        p_k ∝ exp((a_k − min a) / (max a − min a)).
    """

    def start(self) -> None:
        """Start from the base model, with all seeds alike."""
        super().start()
        self.sums = np.zeros(self.coefficients.size)  # Σ |ĝ|
        self.counts = np.zeros(self.coefficients.size, dtype=np.int64)

    def state(self) -> Arrays:
        """Return c and p."""
        amplitudes = self.sums / np.maximum(self.counts, 1)
        spread = np.ptp(amplitudes)
        weights = np.exp((amplitudes - amplitudes.min()) / (spread or 1.0))
        return [*super().state(), (weights / weights.sum()).astype(np.float32)]

    def aggregate(self, round: int, replies: Sequence[Reply]) -> None:
        """Add each node's steps, and remember how large its scalar gradients were."""
        super().aggregate(round, replies)
        for reply in replies:
            indices, scalars = reply.arrays
            self.sums += np.bincount(indices, np.abs(scalars), self.sums.size)
            self.counts += np.bincount(indices, minlength=self.counts.size)

    def _probabilities(self, state: Arrays) -> np.ndarray:
        return state[1]


@lru_cache(maxsize=1)
def rebuild(worker: Worker, seed: int, coefficients: bytes) -> Arrays:
    """Return the float32 masters of w₀ − Σ_k c_k z_k, which the caller must not change.

    Each c_k that is not 0 costs one pass over the parameters, in the order of k. To go on from
    an earlier state would round differently, and a node's answer must not depend on which process
    serves it. So a state is rebuilt from the base, but once for all messages with it: the nodes
    of a round in one process share the result, at the price of one more copy of the model.

    Parameters
    ----------
    worker
        The model whose base is w₀.
    seed
        The run's.
    coefficients
        The bytes of c, float32 (K,).
    """
    c = np.frombuffer(coefficients, dtype=np.float32)
    masters = list(worker.follower.base())
    used, progress = np.flatnonzero(c), Progress()
    for done, k in enumerate(used):
        if progress.due():
            log.info("rebuilding the model: %d of %d seeds", done, len(used))
        step_along(masters, worker.layout, derive_seed(seed, int(k)), float(c[k]))
    return masters
