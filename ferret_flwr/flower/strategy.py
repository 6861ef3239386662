"""`Ferret` wraps a Flower strategy: the inner one samples the clients and averages K numbers."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, fields
from pathlib import Path
from statistics import median_low

import numpy as np
from flwr.common import (
    EvaluateIns,
    EvaluateRes,
    FitIns,
    GetPropertiesIns,
    Parameters,
    Scalar,
    ndarrays_to_parameters,
    parameters_to_ndarrays,
)
from flwr.server.client_manager import ClientManager
from flwr.server.client_proxy import ClientProxy
from flwr.server.server import fit_clients
from flwr.server.strategy import FedAvg, Strategy

from ferret_flwr.config import ConfigError, FerretConfig
from ferret_flwr.flower import inner, wire
from ferret_flwr.flower.nodes import MOST_AT_ONCE, by_partition, failure_text, node_name, told
from ferret_flwr.flower.private import (
    check_clipped,
    check_outermost,
    price,
    untouchable,
    wrapper_of,
)
from ferret_flwr.flower.replies import (
    FitResult,
    cached_rounds,
    check_evaluation,
    check_reply,
    estimated_norms,
    last_norm,
    publish_rows,
)
from ferret_flwr.ledger import Header, Ledger, LedgerError
from ferret_flwr.projection.plan import PlanError, RoundPlan
from ferret_flwr.replica import Replica
from ferret_flwr.rounds import next_plan, publish, server_rate

log = logging.getLogger(__name__)

Metrics = dict[str, Scalar]
Evaluate = Callable[[int, Replica], tuple[float, Metrics] | None]

WAIT_SECONDS = 86_400  # for the first node, as Flower itself waits
HEADER_SECONDS = 600.0  # to load a base model and fingerprint it
HEADER_FIELDS = tuple(field.name for field in fields(Header))
ASKED_FOR_HEADER = 5  # nodes whose base model decides, where the server has none


class Ferret(Strategy):
    """Federated full-parameter tuning in K numbers a round, around any Flower strategy.

    Parameters
    ----------
    strategy
        Samples the clients and aggregates their K-vectors as it would aggregate weights.
    config
        Number, family and allocation of the bases, server rate.
    seed
        The run's seed; every round's bases follow from it.
    num_rounds
        Length of the whole run, which the decaying server rates need.
    replica
        A model that follows the ledger on the server. Without one the server needs no model: it
        learns the number of parameters from a node.
    evaluate
        Called with Flower's round and the replica, returns a loss and metrics, or None.
    ledger
        A ledger to continue from.
    ledger_path
        Where the ledger is written after each round.
    round_timeout
        Seconds to wait for nodes that are asked again within a round; None for as long as it takes.
    secure
        Each reply holds the mean of all of them, as under secure aggregation: all can be used or
        none.

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
        replica: Replica | None = None,
        evaluate: Evaluate | None = None,
        ledger: Ledger | None = None,
        ledger_path: Path | None = None,
        round_timeout: float | None = None,
        secure: bool = False,
    ) -> None:
        """Bring the replica to the end of the ledger, if both are given."""
        self.strategy = strategy
        self.config = config or FerretConfig()
        inner.check_inner(strategy, self.config)
        self.wrapper = wrapper_of(list(inner.chain(strategy)))  # for differential privacy
        self.spent = 0.0  # of privacy, by this run: Σ 1 / z², see `accounting`
        if self.config.bases == "per-client" and type(strategy) is not FedAvg:
            raise ConfigError(
                f"'ferret.bases' = 'per-client' needs FedAvg inside, got {strategy!r}: numbers on "
                "different bases cannot be aggregated otherwise"
            )
        if self.config.rate_schedule != "constant" and num_rounds < 1:
            raise ConfigError(
                f"the server rate is '{self.config.rate_schedule}': Ferret needs num_rounds"
            )
        self.seed = seed
        self.num_rounds = num_rounds
        self.replica = replica
        self.evaluate_replica = evaluate
        self.ledger_path = ledger_path
        self.round_timeout = round_timeout
        self.secure = secure
        self.ledger = ledger
        if replica is not None:
            self.ledger = ledger or Ledger(replica.header)
            replica.follow(self.ledger)
            self.ledger = self.ledger.with_fingerprint(replica.fingerprint)
        self.plan: RoundPlan | None = None
        self.refused: dict[str, str] = {}  # node -> why its reply of this round was not used
        self.replica_seconds = 0.0  # that the replica took to follow this round
        self._reached: dict[str, int] = {}  # node -> rounds in its ledger cache
        self._configs: dict[str, dict[str, Scalar]] = {}  # what the inner strategy sends each node
        self._requests: list[FitIns] = []  # of this round

    def __repr__(self) -> str:
        """Name the inner strategy."""
        return f"Ferret({self.strategy!r})"

    def initialize_parameters(self, client_manager: ClientManager) -> Parameters | None:
        """Learn what the nodes' base model is, unless the server has it; return no weights."""
        self.strategy.initialize_parameters(client_manager)
        if self.ledger is None:
            *_, innermost = inner.chain(self.strategy)
            least = getattr(innermost, "min_available_clients", 1)
            self.ledger = Ledger(_ask_for_header(client_manager, least))
        return untouchable()

    def configure_fit(
        self, server_round: int, parameters: Parameters, client_manager: ClientManager
    ) -> list[tuple[ClientProxy, FitIns]]:
        """Plan the round and send each sampled node what it misses."""
        ledger = self._ledger()
        self.plan = next_plan(ledger, self.config, self.seed)
        zeros = np.zeros(self.plan.num_coefficients, dtype=np.float32)
        chosen = self.strategy.configure_fit(
            server_round=server_round,
            parameters=ndarrays_to_parameters([zeros]),
            client_manager=client_manager,
        )
        self._configs = {client.cid: instruction.config for client, instruction in chosen}
        requests = [(client, self._train_request(client)) for client, _ in chosen]
        self._requests = [request for _, request in requests]
        return requests

    def aggregate_fit(
        self,
        server_round: int,
        results: list[FitResult],
        failures: list[FitResult | BaseException],
    ) -> tuple[Parameters | None, Metrics]:
        """Check the replies, let the inner strategy average them, publish the round."""
        assert self.plan is not None, "configure_fit comes first"
        if self.wrapper is None:
            check_outermost(self._requests)
        self.refused, self.replica_seconds = {}, 0.0
        for failure in failures:
            log.warning("%s", failure_text(failure))
        for node in self._configs.keys() - {client.cid for client, _ in results}:
            if self.secure:
                self._reached[node] = 0  # it could not say whether its ledger was stale
            log.warning("node %s did not take part in round %d", node, self.plan.round)
        rate = server_rate(self.config, self.plan, self._ledger(), self.num_rounds)
        if not self.secure:
            results = self._ask_again(results, server_round)
        accepted = self._accept(results, rate)
        if self.secure and len(accepted) < len(results):
            log.error("round %d: who is left out is in the mean; not published", self.plan.round)
            return None, {}
        if not accepted:
            log.error("round %d: no usable reply, nothing is published", self.plan.round)
            return None, {}
        try:
            projected, metrics = inner.aggregate(
                self.strategy, self.plan, server_round, accepted, failures, len(self._configs)
            )
        except ValueError as error:  # such as Bulyan's, of too few replies
            log.error("round %d is not published: %r: %s", self.plan.round, self.strategy, error)
            return None, {}
        if self.wrapper is not None:
            self.spent += price(self.wrapper)
        if projected is None:
            log.error("round %d: the inner strategy returned nothing", self.plan.round)
            return None, metrics
        try:
            if self.config.bases == "per-client":
                entry = publish_rows(self.plan, accepted, rate)
            else:
                entry = publish(self.plan, projected, rate)
        except PlanError as error:
            log.error("round %d is not published: %s", self.plan.round, error)
            return None, metrics
        self.ledger = self._ledger().append(entry)
        if self.replica is not None:
            start = time.perf_counter()
            self.replica.follow(self.ledger)
            self.ledger = self.ledger.with_fingerprint(self.replica.fingerprint)
            self.replica_seconds = time.perf_counter() - start
        self._save()
        return untouchable(), metrics

    def evaluate(self, server_round: int, parameters: Parameters) -> tuple[float, Metrics] | None:
        """Evaluate the server's replica, if there is one."""
        if self.replica is None or self.evaluate_replica is None:
            return None
        return self.evaluate_replica(server_round, self.replica)

    def configure_evaluate(
        self, server_round: int, parameters: Parameters, client_manager: ClientManager
    ) -> list[tuple[ClientProxy, EvaluateIns]]:
        """Send each node that the inner strategy chose what it misses."""
        chosen = self.strategy.configure_evaluate(
            server_round=server_round, parameters=parameters, client_manager=client_manager
        )
        requests = []
        for client, instruction in chosen:
            arrays, entry = self._request(client, None)
            requests.append((client, EvaluateIns(arrays, instruction.config | entry)))
        return requests

    def aggregate_evaluate(
        self,
        server_round: int,
        results: list[tuple[ClientProxy, EvaluateRes]],
        failures: list[tuple[ClientProxy, EvaluateRes] | BaseException],
    ) -> tuple[float | None, Metrics]:
        """Leave the averaging to the inner strategy."""
        for failure in failures:
            log.warning("%s", failure_text(failure))
        self.refused = {}
        usable = []
        for client, reply in results:
            try:
                check_evaluation(reply)
            except ValueError as error:
                self._refuse(client, reply.metrics, str(error))
            else:
                self._reached[client.cid] = cached_rounds(reply.metrics, len(self._ledger()))
                usable.append((client, reply))
        return self.strategy.aggregate_evaluate(
            server_round=server_round, results=usable, failures=failures
        )

    def _ledger(self) -> Ledger:
        if self.ledger is None:
            raise LedgerError("the ledger has no header yet: initialize_parameters comes first")
        return self.ledger

    def _request(
        self, client: ClientProxy, plan: RoundPlan | None
    ) -> tuple[Parameters, dict[str, Scalar]]:
        since = self._reached.get(client.cid, 0)
        return wire.encode(wire.Request.of(self._ledger(), since, plan, self.config.bases))

    def _train_request(self, client: ClientProxy) -> FitIns:
        arrays, entry = self._request(client, self.plan)
        return FitIns(arrays, self._configs.get(client.cid, {}) | entry)

    def _ask_again(self, results: list[FitResult], server_round: int) -> list[FitResult]:
        """Send the whole ledger to the nodes that have lost theirs, and use their new replies."""
        stale = {
            client: node_name(client, reply.metrics)
            for client, reply in results
            if reply.metrics.get("stale")
        }
        if not stale:
            return results
        requests = []
        for client, name in stale.items():
            log.warning("%s has lost its ledger cache and gets the whole ledger", name)
            self._reached[client.cid] = 0
            requests.append((client, self._train_request(client)))
        again, failures = fit_clients(
            requests,
            max_workers=MOST_AT_ONCE,
            timeout=self.round_timeout,
            group_id=server_round,
        )
        for failure in failures:
            log.warning("asked again: %s", failure_text(failure))
        answered = {client.cid for client, _ in again}
        for client, name in stale.items():
            if client.cid not in answered:
                self.refused[name] = "it did not answer when it was sent the whole ledger"
        return [result for result in results if result[0] not in stale] + again

    def _refuse(self, client: ClientProxy, metrics: Metrics, reason: str) -> None:
        """Name the node, and send it the whole ledger next time."""
        name, reason = node_name(client, metrics), told(reason)
        self.refused[name] = reason
        self._reached[client.cid] = 0
        log.warning("%s is left out: %s", name, reason)

    def _accept(self, results: list[FitResult], rate: float) -> list[FitResult]:
        """Return the replies that can be used, in an order that does not depend on arrival."""
        plan, ledger = self.plan, self._ledger()
        assert plan is not None
        usable = []
        for client, reply in sorted(results, key=by_partition):
            try:
                check_reply(reply, plan, self.config.bases, rate)
                check_clipped(self.wrapper, parameters_to_ndarrays(reply.parameters)[0])
                usable.append((client, reply))
            except Exception as error:  # a stranger may send anything
                self._refuse(client, reply.metrics, str(error))
        for partition, count in Counter(r.metrics["partition-id"] for _, r in usable).items():
            if count > 1:
                log.warning(
                    "%d nodes have 'partition-id' = %s: give each its own", count, partition
                )
        if self.wrapper is None:  # which clips, and what one node sends must not refuse another
            usable = self._not_huge(usable)
        expected = ledger.fingerprint or self._vote(usable)
        if expected and not ledger.fingerprint:
            self.ledger = ledger.with_fingerprint(expected)
        accepted = []
        for client, reply in usable:
            if expected and reply.metrics["fingerprint"] == expected:
                self._reached[client.cid] = cached_rounds(reply.metrics, len(ledger))
                accepted.append((client, reply))
            else:
                self._refuse(
                    client,
                    reply.metrics,
                    f"it trained from parameters {reply.metrics['fingerprint']!r}, expected "
                    f"{expected or 'a majority to agree'}: its replica is stale or has diverged",
                )
        return accepted

    def _not_huge(self, results: list[FitResult]) -> list[FitResult]:
        """Return the replies that are not far longer than the others and the round before."""
        assert self.plan is not None
        ratio = self.config.max_norm_ratio
        norms = estimated_norms((reply for _, reply in results), self.plan)
        several = [n for n in norms if n] if len(norms) > 1 else []  # one is no measure of itself
        usual = max(median_low(several or [0.0]), last_norm(self._ledger()))
        kept = []
        for (client, reply), norm in zip(results, norms, strict=True):
            if ratio and usual and norm > ratio * usual:
                self._refuse(
                    client,
                    reply.metrics,
                    f"its update is {norm:.3g} long where {usual:.3g} is usual; "
                    f"'ferret.max-norm-ratio' allows {ratio:g} times as much",
                )
            else:
                kept.append((client, reply))
        return kept

    def _vote(self, results: list[FitResult]) -> str:
        """Return the fingerprint that more than half of the nodes report, "" if none."""
        votes = Counter(str(reply.metrics["fingerprint"]) for _, reply in results)
        fingerprint, count = votes.most_common(1)[0] if votes else ("", 0)
        return fingerprint if 2 * count > len(results) else ""

    def _save(self) -> None:
        if self.ledger_path is None:
            return
        try:
            self._ledger().save(self.ledger_path)
        except OSError as error:
            log.error(
                "cannot write the ledger '%s': %s; the previous one is kept, the next round tries "
                "again",
                self.ledger_path,
                error.strerror,
            )


def _ask_for_header(client_manager: ClientManager, least: int) -> Header:
    """Return the header that most of a few nodes report for their base model.

    Parameters
    ----------
    client_manager
        Knows the nodes.
    least
        How many of them to wait for.

    Raises
    ------
    LedgerError
        If no node could say, or no base model is that of more than half of them, naming what the
        nodes answered.
    """
    client_manager.wait_for(least, timeout=WAIT_SECONDS)
    count = min(max(least, 1), ASKED_FOR_HEADER, client_manager.num_available())
    votes: Counter[Header] = Counter()
    answers, errors = [], []
    clients = client_manager.sample(count)
    with ThreadPoolExecutor(ASKED_FOR_HEADER) as pool:
        asked = [pool.submit(_header_of, client) for client in clients]
    for client, answer in zip(clients, asked, strict=True):
        try:
            header = answer.result()
            votes[header] += 1
            answers.append(f"node {client.cid}: {header.base} of {header.size} parameters")
        except Exception as error:  # whatever one node does, the others decide
            errors.append(f"node {client.cid}: {told(error)}")
            log.warning(errors[-1])
    if not votes:
        raise LedgerError("no node could load its base model:\n" + "\n".join(errors))
    header, count = votes.most_common(1)[0]
    if 2 * count <= votes.total():
        raise LedgerError("the nodes do not have the same base model:\n" + "\n".join(answers))
    return header


def _header_of(client: ClientProxy) -> Header:
    """Ask a node for its base model, and return what it says or raise why it cannot be."""
    question = GetPropertiesIns(config={})
    answer = client.get_properties(question, timeout=HEADER_SECONDS, group_id=0).properties
    if "error" in answer:
        raise ValueError(str(answer["error"]))
    if missing := set(HEADER_FIELDS) - set(answer):
        raise ValueError(f"it does not say its {sorted(missing)}: it must use FerretClient")
    header = Header(**{name: answer[name] for name in HEADER_FIELDS})  # type: ignore[arg-type]
    if [type(value) for value in astuple(header)] != [str, int, str, str] or header.size < 1:
        raise ValueError(f"there is no such base model: {header}")
    return header
