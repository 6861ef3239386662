"""`FerretClient`: reach the current model from the ledger, train, answer with K numbers."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import cast

import torch
from flwr.app import Context
from flwr.client import NumPyClient
from flwr.common import NDArrays, Scalar

from ferret_flwr import memory
from ferret_flwr.flower import wire
from ferret_flwr.flower.cache import LedgerCache
from ferret_flwr.flower.late import failure
from ferret_flwr.flower.site import Site, check_own
from ferret_flwr.follower import Follower
from ferret_flwr.ledger import Ledger
from ferret_flwr.methods import ferret
from ferret_flwr.projection.layout import Layout
from ferret_flwr.projection.plan import RoundPlan
from ferret_flwr.replica import Replica
from ferret_flwr.rounds import to_send
from ferret_flwr.training.in_place import InPlaceFollower, Reached
from ferret_flwr.training.lean import Applied
from ferret_flwr.training.tensors import (
    devices_of,
    load_masters,
    masters_of,
    placed,
    trainable_parameters,
)

Metrics = dict[str, Scalar]
Step = Callable[[int, Metrics], tuple[int, Metrics]]  # (round, config) -> (examples, metrics)
LeanStep = Callable[[int, Metrics, Applied], tuple[int, Metrics]]  # ... and tells what it changes
Score = Callable[[int, Metrics], tuple[float, int, Metrics]]  # ... -> (loss, examples, metrics)


class FerretClient(NumPyClient):
    """A Flower client that sends projection coefficients instead of weights.

    Parameters
    ----------
    parameters
        The model's trainable tensors by name, in ``named_parameters()`` order.
    train
        Trains ``parameters`` in place. Called with the round and the server's config; returns the
        number of examples and metrics.
    follower
        Holds the replica, which may serve several clients of a process; or moves the model itself,
        and then ``train`` has a third argument to tell each step to, see `lean.LeanSteps`.
    cache
        What the node keeps on its disk.
    evaluate
        Measures ``parameters``. Called like ``train``; returns a loss, the number of examples and
        metrics.
    partition_id
        Names the node in the server's messages, and orders the replies.
    most_coefficients
        A plan with more bases is refused: K numbers are what a reply can reveal. 0 for any.
    """

    def __init__(
        self,
        parameters: Mapping[str, torch.Tensor],
        train: Step | LeanStep,
        follower: Follower | InPlaceFollower,
        cache: LedgerCache,
        *,
        evaluate: Score | None = None,
        partition_id: int,
        most_coefficients: int = 0,
    ) -> None:
        """Keep the pieces; nothing is computed yet."""
        self.tensors = parameters
        self.train_model = train
        self.evaluate_model = evaluate
        self.follower = follower
        self.cache = cache
        self.partition_id = partition_id
        self.most_coefficients = most_coefficients

    @classmethod
    def of(
        cls,
        model: torch.nn.Module,
        train: Step,
        context: Context,
        *,
        evaluate: Score | None = None,
    ) -> FerretClient:
        """Return the client for a freshly loaded ``model`` in a ``client_fn``.

        Parameters
        ----------
        model
            Still at its base weights, which are the same on every node. Its tensors may lie on
            several devices; one that ``fully_shard`` has sharded is answered for by all processes
            of its mesh, each with a client of its own that gets every message.
        train, evaluate
            As in `FerretClient`.
        context
            What Flower hands to ``client_fn``; its node-config names the ``partition-id`` and, if
            need be, the folder to keep ledgers and snapshots in, ``ferret.cache-dir``, and the
            most numbers to send, ``ferret.coefficients``.

        Raises
        ------
        ConfigError
            Naming the node and the key of its node-config that is wrong or missing.
        ModelError
            Naming a parameter that is offloaded, or sharded in another way.
        """
        layout = None
        if "torch.distributed.tensor" in sys.modules:  # else nothing is sharded
            from ferret_flwr.training import sharded

            if sharded.is_sharded(model):
                layout = sharded.layout_of(model)
                train = sharded.resharded(model, train)
                evaluate = evaluate and sharded.resharded(model, evaluate)
        parameters = trainable_parameters(model)
        devices = devices_of(parameters)
        base = masters_of(parameters)
        follower = Follower(
            layout or Layout.of(parameters),
            lambda: placed([array.copy() for array in base], devices),
            place=lambda arrays: placed(arrays, devices),
        )
        own = context.node_config
        check_own(own)
        cache = LedgerCache.of(
            context,
            str(own.get("ferret.cache-dir", "")),
            snapshots=bool(own.get("ferret.snapshots", True)) and layout is None,
        )
        return cls(
            parameters,
            train,
            follower,
            cache,
            evaluate=evaluate,
            partition_id=Site.partition_of(context),
            most_coefficients=int(own.get("ferret.coefficients", 0)),
        )

    def get_properties(self, config: Metrics) -> Metrics:
        """Say which base model this node has, unless only its partition is asked for."""
        if config.get("ask") == "partition-id":
            return {"partition-id": self.partition_id}
        try:
            return asdict(self.follower.from_base().header) | {"partition-id": self.partition_id}
        except Exception as error:
            return failure(error, self.partition_id)

    def fit(self, parameters: NDArrays, config: Metrics) -> tuple[NDArrays, int, Metrics]:
        """Train one round; answer with γ, or with an ``error`` that the server will name."""
        try:
            arrays, examples, metrics = self._fit(parameters, config)
        except Exception as error:
            return [], 0, failure(error, self.partition_id)
        return arrays, examples, metrics | {"partition-id": self.partition_id}

    def evaluate(self, parameters: NDArrays, config: Metrics) -> tuple[float, int, Metrics]:
        """Evaluate the current model on this node's data."""
        try:
            loss, examples, metrics = self._evaluate(parameters, config)
        except Exception as error:
            return 0.0, 0, failure(error, self.partition_id)
        return loss, examples, metrics | {"partition-id": self.partition_id}

    def _fit(self, parameters: NDArrays, config: Metrics) -> tuple[NDArrays, int, Metrics]:
        memory.start()
        start = time.perf_counter()
        request = wire.decode(parameters, config)
        if request.plan is None:
            raise wire.ProtocolError("a request to train without a plan")
        asked = request.plan.num_coefficients
        if self.most_coefficients and not 0 < asked <= self.most_coefficients:
            raise wire.ProtocolError(
                f"the server asks for K = {asked} coefficients, this node gives at most "
                f"'ferret.coefficients' = {self.most_coefficients}"
            )
        replica, _, cached = self._catch_up(request)
        plan = request.plan
        plan = plan.with_seed(wire.node_seed(plan, request.bases, self.partition_id))
        caught_up = time.perf_counter()
        update, (examples, metrics) = self._train(replica, plan, config)
        answer: Metrics = {
            "round": plan.round,
            "seed": plan.seed,
            "fingerprint": replica.fingerprint,
            "cached": cached,
            "time/local_s": update.train_seconds,
            "time/project_s": update.project_seconds,
            "time/reconstruct_s": caught_up - start,
        }
        if update.fidelity is not None:
            answer["ferret/fidelity"] = update.fidelity
        sent = to_send(update.coefficients, request.plan, self.partition_id)
        return [sent], examples, answer | memory.peaks() | metrics

    def _train(
        self, replica: Replica | Reached, plan: RoundPlan, config: Metrics
    ) -> tuple[ferret.Projected, tuple[int, Metrics]]:
        if isinstance(replica, Replica):
            train = cast(Step, self.train_model)
            return ferret.local_round(
                replica, self.tensors, plan, lambda: train(plan.round, config)
            )
        train_lean = cast(LeanStep, self.train_model)
        return ferret.lean_round(
            self.follower.layout, plan, lambda applied: train_lean(plan.round, config, applied)
        )

    def _evaluate(self, parameters: NDArrays, config: Metrics) -> tuple[float, int, Metrics]:
        if self.evaluate_model is None:
            raise RuntimeError("this client cannot evaluate: FerretClient got no `evaluate`")
        replica, ledger, cached = self._catch_up(wire.decode(parameters, config))
        if isinstance(replica, Replica):
            load_masters(self.tensors, replica.arrays)
        loss, examples, metrics = self.evaluate_model(len(ledger), config)
        return loss, examples, metrics | {"cached": cached}

    def _catch_up(self, request: wire.Request) -> tuple[Replica | Reached, Ledger, int]:
        ledger = self.cache.complete(request)
        replica = self.follower.follow(ledger, self.cache.snapshots)
        return replica, ledger, self.cache.keep(ledger, request)
