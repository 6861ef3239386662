"""`MessageFerret` wraps a strategy of Flower's Message API, as `Ferret` wraps one of the other."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.common import Parameters
from flwr.common.serde import recorddict_to_proto
from flwr.serverapp import Grid
from flwr.serverapp.strategy import (
    DifferentialPrivacyClientSideAdaptiveClipping,
    DifferentialPrivacyClientSideFixedClipping,
    DifferentialPrivacyServerSideAdaptiveClipping,
    DifferentialPrivacyServerSideFixedClipping,
    FedAvg,
    FedAvgM,
    FedXgbBagging,
    FedXgbCyclic,
    QFedAvg,
    Result,
    Strategy,
)
from flwr.serverapp.strategy.fedopt import FedOpt

from ferret_flwr.base import Base
from ferret_flwr.config import ConfigError, FerretConfig
from ferret_flwr.flower import wire
from ferret_flwr.flower.coordinator import Coordinator
from ferret_flwr.flower.inner import OF_OTHER_MODELS, OF_WEIGHTS, chain, check_bases, refuse
from ferret_flwr.flower.mod import ABOUT
from ferret_flwr.flower.nodes import told
from ferret_flwr.flower.replies import Reply, check_examples
from ferret_flwr.ledger import Ledger
from ferret_flwr.projection.plan import RoundPlan

log = logging.getLogger(__name__)

COEFFICIENTS = "coefficients"  # what the inner strategy's one array is called

OF_PRIVACY = (
    "weighs by examples, which its noise does not account for. For differential privacy use the "
    "strategies of flwr.server.strategy, see docs/privacy.md"
)
REFUSED: dict[type[Strategy], str] = {
    FedOpt: OF_WEIGHTS,  # FedAdam, FedAdagrad, FedYogi
    FedAvgM: OF_WEIGHTS,
    QFedAvg: OF_WEIGHTS,
    FedXgbBagging: OF_OTHER_MODELS,
    FedXgbCyclic: OF_OTHER_MODELS,
    DifferentialPrivacyServerSideFixedClipping: OF_PRIVACY,
    DifferentialPrivacyServerSideAdaptiveClipping: OF_PRIVACY,
    DifferentialPrivacyClientSideFixedClipping: OF_PRIVACY,
    DifferentialPrivacyClientSideAdaptiveClipping: OF_PRIVACY,
}


class MessageFerret(Strategy):
    """Federated full-parameter tuning in K numbers a round, around a Message API strategy.

    Nodes run `ferret_mod`. `start` takes and returns the arrays that the app knows.

    Parameters
    ----------
    strategy
        Samples the nodes and aggregates their K-vectors as it would aggregate arrays.
    config
        Number, family and allocation of the bases, server rate.
    seed
        The run's seed; every round's bases follow from it.
    num_rounds
        Length of the whole run, which the decaying server rates need; by default that of `start`.
    ledger
        A ledger to continue from; `start` gets the arrays that it started from.
    ledger_path
        Where the ledger is written after each round.
    exact_vectors
        Send arrays of at most one dimension as they are, see `Base`.
    tie_equal
        Tune matrices that are equal at the start as one.

    Raises
    ------
    ConfigError
        If ``strategy`` cannot aggregate coefficients, saying why and what to use instead.
    """

    def __init__(
        self,
        strategy: Strategy,
        config: FerretConfig | None = None,
        *,
        seed: int = 42,
        num_rounds: int = 0,
        ledger: Ledger | None = None,
        ledger_path: Path | None = None,
        exact_vectors: bool = True,
        tie_equal: bool = True,
    ) -> None:
        """Know no arrays yet."""
        self.strategy = strategy
        self.config = config or FerretConfig()
        refuse(chain(strategy, Strategy), REFUSED)
        check_bases(strategy, self.config, FedAvg)
        self.coordinator = Coordinator(
            self.config, seed=seed, num_rounds=num_rounds, ledger_path=ledger_path
        )
        self.coordinator.begin(ledger)
        self.exact_vectors = exact_vectors
        self.tie_equal = tie_equal
        self._requests: dict[int, Message] = {}  # node -> what the inner strategy sends it
        self._grid: Grid | None = None
        self._timeout: float | None = None

    @property
    def ledger(self) -> Ledger | None:
        """Return the rounds published so far; None before the first."""
        return self.coordinator.ledger

    @property
    def refused(self) -> dict[str, str]:
        """Return which nodes' replies of this round were not used, and why."""
        return self.coordinator.refused

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 3,
        timeout: float = 3600,
        *arguments: Any,
        **others: Any,
    ) -> Result:
        """Run the rounds as Flower does; ``initial_arrays`` are those of round 0."""
        self._timeout = timeout
        done = len(self.ledger) if self.ledger else 0
        self.coordinator.num_rounds = self.coordinator.num_rounds or done + num_rounds
        contents = tuple(array.numpy() for array in initial_arrays.values())
        self.coordinator.begin_from(
            Base(tuple(initial_arrays), contents, self.exact_vectors, self.tie_equal)
        )
        arrays = self._arrays()
        return super().start(grid, arrays, num_rounds, timeout, *arguments, **others)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Plan the round and send each sampled node what it misses."""
        if self.coordinator.base is None:
            raise ConfigError(
                "Ferret's own start must be called: what a strategy around it does to the model "
                "would reach no node. Ferret must be the outermost, Ferret(strategy=...)"
            )
        self._grid = grid
        plan = self.coordinator.next_round()
        zeros = np.zeros(plan.num_coefficients, dtype=np.float32)
        chosen = self.strategy.configure_train(server_round, _record(zeros), config, grid)
        self._requests = {message.metadata.dst_node_id: message for message in chosen}
        return [self._request(message, plan) for message in self._requests.values()]

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Check the replies, let the inner strategy average them, publish the round."""
        self.coordinator.start_replies()
        replied = self._ask_again(list(self._readable(replies)))
        accepted = self.coordinator.accept(self._alike(replied))
        if not accepted:
            return None, None
        plan = self.coordinator.plan
        assert plan is not None, "configure_train comes first"
        scale = self._scale(plan)
        for reply in accepted:
            self._show(reply, reply.gamma(plan) * scale)
        try:
            aggregate, metrics = self.strategy.aggregate_train(
                server_round, [reply.source for reply in accepted]
            )
        except ValueError as error:  # such as of too few replies
            log.error("round %d is not published: %r: %s", plan.round, self.strategy, error)
            return None, None
        made = None if aggregate is None else next(iter(aggregate.values())).numpy() / scale
        published = self.coordinator.publish(made, accepted)
        return (self._arrays() if published else None), metrics

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Send each node that the inner strategy chose what it misses."""
        nothing = _record(np.zeros(1, dtype=np.float32))
        chosen = self.strategy.configure_evaluate(server_round, nothing, config, grid)
        return [self._request(message, None) for message in chosen]

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Leave the averaging to the inner strategy."""
        answered = list(replies)
        if answered:  # else what was refused in training remains to be read
            self.coordinator.refused = {}
        usable = []
        for reply in self._readable(answered):
            try:
                if error := reply.about.get("error"):
                    raise ValueError(str(error))
                check_examples(reply.num_examples)
            except ValueError as error:
                self.coordinator.refuse(reply.node, reply.about, str(error))
            else:
                self.coordinator.reached(reply.node, reply.about)
                usable.append(reply)
        return self.strategy.aggregate_evaluate(
            server_round, [reply.source for reply in self._alike(usable)]
        )

    def summary(self) -> None:
        """Say what crosses the wire, then what the inner strategy says."""
        log.info("%d coefficients a round instead of the arrays", self.config.coefficients)
        self.strategy.summary()

    def _arrays(self) -> ArrayRecord:
        base, replica = self.coordinator.base, self.coordinator.replica
        assert base is not None and replica is not None, "start comes first"
        return ArrayRecord(
            {n: Array(a) for n, a in zip(base.names, base.at(replica.arrays), strict=True)}
        )

    def _request(self, message: Message, plan: RoundPlan | None, base: bool = False) -> Message:
        """Return the inner strategy's ``message`` with what the node misses instead of arrays."""
        node = message.metadata.dst_node_id
        packed, entry = wire.encode(self.coordinator.request(str(node), plan, base))
        content = RecordDict(
            {
                name: _packed_record(packed) if isinstance(record, ArrayRecord) else record
                for name, record in message.content.items()
            }
        )
        content[ABOUT] = ConfigRecord(dict(entry))
        self.coordinator.weigh(str(node), down=recorddict_to_proto(content).ByteSize())
        return Message(
            content,
            dst_node_id=node,
            message_type=message.metadata.message_type,
            group_id=message.metadata.group_id,
            ttl=message.metadata.ttl,
        )

    def _readable(self, replies: Iterable[Message]) -> Iterator[Reply]:
        """Yield the replies that have content, as the coordinator sees them."""
        for message in replies:
            node = str(message.metadata.src_node_id)
            if message.has_error():
                log.warning("node %s failed: %s", node, told(message.error.reason))
                continue
            try:
                yield self._reply_of(node, message)
            except Exception as error:  # a stranger may send anything
                self.coordinator.refuse(node, {}, f"its reply cannot be read: {error!r}")

    def _reply_of(self, node: str, message: Message) -> Reply:
        """Return a reply as the coordinator sees it, and make it what the inner one shall see."""
        self.coordinator.weigh(node, up=recorddict_to_proto(message.content).ByteSize())
        about, _ = wire.about(message.content.config_records.get(ABOUT, {}))
        records = message.content.array_records
        tensors = [array.data for record in records.values() for array in record.values()]
        weight: Any = None
        if "error" not in about:
            metrics = list(message.content.metric_records.values())
            key = getattr(self.strategy, "weighted_by_key", "num-examples")
            if len(records) > 1 or len(metrics) != 1 or key not in metrics[0]:
                raise ValueError(
                    f"it needs one ArrayRecord to train and one MetricRecord with '{key}', got "
                    f"{sorted(message.content)}"
                )
            weight = self._weight(metrics[0][key])
        message.content = RecordDict({n: r for n, r in message.content.items() if n != ABOUT})
        return Reply(node, about, weight, tensors, message)

    def _alike(self, replies: list[Reply]) -> list[Reply]:
        """Leave out whose metrics are not finite, or not named as most are: Flower would end."""
        names = Counter(
            frozenset(next(iter(reply.source.content.metric_records.values())))
            for reply in replies
            if "error" not in reply.about
        )
        kept = []
        for reply in replies:
            if "error" in reply.about:  # which the coordinator names
                kept.append(reply)
                continue
            (metrics,) = reply.source.content.metric_records.values()
            values = np.concatenate([np.ravel(value) for value in metrics.values()])
            if frozenset(metrics) != names.most_common(1)[0][0]:
                self.coordinator.refuse(
                    reply.node, reply.about, f"its metrics are {sorted(metrics)}, others' differ"
                )
            elif not np.isfinite(values.astype(np.float64)).all():
                self.coordinator.refuse(
                    reply.node, reply.about, f"its metrics are not finite: {dict(metrics)}"
                )
            else:
                kept.append(reply)
        return kept

    def _weight(self, weight: Any) -> Any:
        """Return how much a node counts; with shared bases the inner strategy decides."""
        usable = type(weight) is float and math.isfinite(weight) and weight > 0
        return 1 if usable and self.config.bases == "shared" else weight

    def _scale(self, plan: RoundPlan) -> np.ndarray:
        """Return 1 / √(ρ K_l): what is not a mean may compare lengths, see `inner.aggregate`."""
        mean = getattr(type(self.strategy), "aggregate_train", None) is FedAvg.aggregate_train
        return np.sqrt(plan.unbiased_scale()) if not mean else np.ones(1)

    def _show(self, reply: Reply, gamma: np.ndarray) -> None:
        """Put γ in float32 where the inner strategy looks for arrays."""
        content = reply.source.content
        for name in list(content.array_records):
            del content[name]
        content["arrays"] = _record(gamma.astype(np.float32))

    def _ask_again(self, replies: list[Reply]) -> list[Reply]:
        """Send nodes what they lack, the base or the whole ledger, and use their new replies."""
        stale = [reply for reply in replies if reply.about.get("stale")]
        if not stale:
            return replies
        assert self._grid is not None, "configure_train comes first"
        requests, names = [], {}
        for reply in stale:
            names[reply.node] = self.coordinator.forget(reply.node, reply.about)
            message = self._requests[int(reply.node)]
            lacks = bool(reply.about.get("baseless"))
            requests.append(self._request(message, self.coordinator.plan, lacks))
        again = list(self._readable(self._grid.send_and_receive(requests, timeout=self._timeout)))
        for node in names.keys() - {reply.node for reply in again}:
            self.coordinator.silent(names[node])
        return [reply for reply in replies if reply not in stale] + again


def _record(array: np.ndarray) -> ArrayRecord:
    return ArrayRecord({COEFFICIENTS: Array(array)})


def _packed_record(packed: Parameters) -> ArrayRecord:
    """Return packed tensors as Flower's records hold them."""
    kind = packed.tensor_type
    return ArrayRecord(
        {
            str(i): Array(data=tensor, dtype="", stype=kind, shape=())
            for i, tensor in enumerate(packed.tensors)
        }
    )
