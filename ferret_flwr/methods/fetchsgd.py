"""FetchSGD (Rothchild et al., ICML 2020, arXiv 2007.07682, Algorithm 1)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np
import torch

from ferret_flwr.methods.count_sketch import CountSketch
from ferret_flwr.methods.method import Arrays, Method, Reply, check_finite, weighted_mean
from ferret_flwr.training.local import backward, check_seq_length, gradient_norm
from ferret_flwr.training.optimizers import learning_rate
from ferret_flwr.training.tensors import load_masters
from ferret_flwr.training.worker import Node, Worker


class FetchSGD(Method):
    """Nodes send count sketches of gradients; momentum and error are kept as sketches, too.

    A round is one step of size η = `train.learning-rate`, so the schedule counts rounds. A node's
    gradient is over all examples that another method would take its local steps with; optimizer
    and number of steps have no other meaning here. The server, with the mean sketch S of a round:

        S_u ← ρ S_u + S            momentum
        S_e ← S_e + η S_u          error feedback
        Δ = Top-k(U(S_e))          the largest median estimates
        S_e, S_u ← 0 where S(Δ) ≠ 0
        w ← w − Δ

    Algorithm 1 has S_e ← S_e − S(Δ) in the place of the last but one. The authors' code does not
    subtract, and neither do we: estimates that share a cell would take it off repeatedly, and S_e
    can grow without bound.

    The state is w₀ − w: indices, increasing, int32 or int64 as d needs, and float32 values. It
    grows by at most k entries a round, and nodes keep nothing. The model is float32(w₀) minus it,
    rounded to the model's dtype: the ΣΔ is added up first, unlike in a model that each Δ is
    subtracted from.
    """

    group = "sketch"

    def start(self) -> None:
        """Start from the base model."""
        size = self.worker.layout.size
        self.momentum = np.zeros(self._shape, dtype=np.float32)
        self.error = np.zeros(self._shape, dtype=np.float32)
        self.indices = np.empty(0, dtype=np.int32 if size < 2**31 else np.int64)
        self.values = np.empty(0, dtype=np.float32)

    @property
    def _shape(self) -> tuple[int, int]:
        return self.config.sketch.rows, self.config.sketch.columns

    @property
    def _sketch(self) -> CountSketch:
        return CountSketch(*self._shape, self.config.seed)

    def state(self) -> Arrays:
        """Return the indices and values of w₀ − w."""
        return [self.indices, self.values]

    def load(self, state: Arrays) -> None:
        """Set the model to w₀ minus ``state``."""
        sparse_model(self.worker).set(*state)

    def local_round(self, state: Arrays, node: Node, round: int) -> tuple[Arrays, float]:
        """Sketch the gradient at ``state``, of norm `train.max-grad-norm` at most."""
        train, model = self.config.train, self.worker.lm.model
        drawn = [tokens for batch, _ in node.batches(round) for tokens in batch]
        check_seq_length(model, train)
        was_training = model.training
        model.train()
        try:
            loss, _ = backward(model, drawn, train, self.worker.lm.tokenizer.pad_token_id)
            table = self._sketch.sketch(self._gradient())
            norm = gradient_norm(list(self.worker.parameters.values()))
        finally:
            model.zero_grad(set_to_none=True)
            model.train(was_training)
        if train.max_grad_norm:  # sketching is linear, so this clips the gradient
            table *= np.float32(min(1.0, train.max_grad_norm / (norm + 1e-6)))
        owner = f"round {round}: the gradient of partition {node.partition_id}"
        check_finite([table, np.array(loss)], owner)
        return [table], loss

    def _gradient(self) -> Iterator[np.ndarray]:
        """Yield the gradient of each parameter, in float32."""
        for parameter in self.worker.parameters.values():
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            yield gradient.detach().to("cpu", torch.float32).numpy()

    def aggregate(self, round: int, replies: Sequence[Reply]) -> None:
        """Take one step."""
        rounds, settings = self.config.num_server_rounds, self.config.sketch
        rate = learning_rate(round - 1, rounds, self.config.train)
        (sketch,) = weighted_mean(replies)
        self.momentum = np.float32(settings.momentum) * self.momentum + sketch
        self.error = self.error + np.float32(rate) * self.momentum
        check_finite([self.error], f"round {round}: the sum of all sketches")
        size = self.worker.layout.size
        indices, values = self._sketch.top_k(self.error, min(settings.top_k, size), size)
        untouched = self._sketch.sketch_sparse(indices, values) == 0
        self.momentum, self.error = self.momentum * untouched, self.error * untouched
        self._subtract(indices, values)

    def _subtract(self, indices: np.ndarray, values: np.ndarray) -> None:
        """Take Δ off the model."""
        union = np.union1d(self.indices, indices)
        total = np.zeros(union.size, dtype=np.float32)
        total[np.searchsorted(union, self.indices)] = self.values
        total[np.searchsorted(union, indices)] += values
        self.indices, self.values = union.astype(self.indices.dtype), total

    def check(self, reply: Reply) -> None:
        """Raise unless ``reply`` is one finite sketch."""
        kinds = [(array.shape, array.dtype.name) for array in reply.arrays]
        if kinds != [(self._shape, "float32")]:
            raise ValueError(
                f"partition {reply.partition_id} sent {kinds}, not float32 of {self._shape}"
            )
        check_finite(reply.arrays, f"the sketch of partition {reply.partition_id}")


class SparseModel:
    """A worker's model at its base minus a sparse vector.

    Only what differs is written, and what was there is kept, so that no round rebuilds a base that
    no longer is in memory, and the way back to it is exact.

    Parameters
    ----------
    worker
        Its model is set to the base.
    """

    def __init__(self, worker: Worker) -> None:
        """Set the model to the base, wherever it is."""
        self.worker = worker
        self._rebase()

    def _rebase(self) -> None:
        load_masters(self.worker.parameters, self.worker.follower.base())
        self._kept: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        self._seen = self._versions()

    def _versions(self) -> list[int]:
        return [parameter._version for parameter in self.worker.parameters.values()]

    @torch.no_grad()
    def set(self, indices: np.ndarray, values: np.ndarray) -> None:
        """Set the model to float32(w₀) − ``values`` at increasing ``indices``, to w₀ elsewhere."""
        if self._versions() != self._seen:  # somebody else has trained it
            self._rebase()
        for parameter, at, base in self._kept:
            parameter.put_(at, base)
        self._kept = []
        offsets = self.worker.layout.offsets
        cuts = np.searchsorted(indices, offsets)
        for n, parameter in enumerate(self.worker.parameters.values()):
            here = slice(cuts[n], cuts[n + 1])
            at = torch.from_numpy(indices[here] - offsets[n]).to(parameter.device, torch.int64)
            base = parameter.take(at)
            difference = torch.tensor(values[here], device=parameter.device)
            parameter.put_(at, (base.float() - difference).to(parameter.dtype))
            self._kept.append((parameter, at, base))
        self._seen = self._versions()


@lru_cache(maxsize=1)
def sparse_model(worker: Worker) -> SparseModel:
    """Return the sparse model that all methods on ``worker`` share: a node makes one a message."""
    return SparseModel(worker)
