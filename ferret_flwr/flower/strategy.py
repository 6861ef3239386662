"""`Ferret` wraps a Flower strategy: the inner one samples the clients and averages K numbers."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from flwr.common import (
    EvaluateIns,
    EvaluateRes,
    FitIns,
    FitRes,
    GetParametersIns,
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
from flwr.serverapp.strategy import Strategy as MessageStrategy

from ferret_flwr.base import Base
from ferret_flwr.config import ConfigError, FerretConfig
from ferret_flwr.flower import inner, wire
from ferret_flwr.flower.coordinator import Coordinator
from ferret_flwr.flower.nodes import MOST_AT_ONCE, failure_text, told
from ferret_flwr.flower.private import (
    check_clipped,
    check_outermost,
    price,
    untouchable,
    wrapper_of,
)
from ferret_flwr.flower.replies import FitResult, Reply, check_evaluation
from ferret_flwr.ledger import Header, Ledger, LedgerError
from ferret_flwr.projection.plan import EXACT_NUMBERS, RoundPlan
from ferret_flwr.replica import Replica

log = logging.getLogger(__name__)

Metrics = dict[str, Scalar]
Evaluate = Callable[[int, Replica], tuple[float, Metrics] | None]

WAIT_SECONDS = 86_400  # for the first node, as Flower itself waits
HEADER_SECONDS = 600.0  # to load a base model and fingerprint it
HEADER_FIELDS = tuple(field.name for field in fields(Header))
ASKED_FOR_HEADER = 5  # nodes whose base model decides, where the server has none


class Ferret(Strategy):
    """Federated full-parameter tuning in K numbers a round, around any Flower strategy.

    Around a strategy of ``flwr.serverapp.strategy``, the Message API, ``Ferret(strategy)`` is a
    `MessageFerret`, which takes the same arguments but ``replica``, ``evaluate`` and
    ``round_timeout``.

    Parameters
    ----------
    strategy
        Samples the clients and aggregates their K-vectors as it would aggregate weights. If it has
        initial parameters, the run starts from them and nodes run `ferret_mod`; if not, nodes tell
        what they start from.
    config
        Number, family and allocation of the bases, server rate.
    seed
        The run's seed; every round's bases follow from it.
    num_rounds
        Length of the whole run, which the decaying server rates need.
    replica
        A model that follows the ledger on the server. Without one, and without initial parameters,
        the server needs no model: it learns the number of parameters from a node.
    evaluate
        Called with Flower's round and the replica, returns a loss and metrics, or None.
    ledger
        A ledger to continue from.
    ledger_path
        Where the ledger is written after each round.
    round_timeout
        Seconds to wait for nodes that are asked again within a round; None for as long as it takes.
    exact_vectors
        Send arrays of at most one dimension as they are, see `Base`. This and the next
        are for nodes that run `ferret_mod`.
    tie_equal
        Tune matrices that are equal at the start as one.
    secure
        Each reply holds the mean of all of them, as under secure aggregation: all can be used or
        none.

    Raises
    ------
    ConfigError
        If ``strategy`` cannot aggregate coefficients, saying why and what to use instead.
    """

    def __new__(cls, strategy: Any, *args: Any, **kwargs: Any) -> Any:
        """Make the kind of strategy that ``strategy`` is."""
        if isinstance(strategy, MessageStrategy):
            from ferret_flwr.flower.message_strategy import MessageFerret

            return MessageFerret(strategy, *args, **kwargs)
        return super().__new__(cls)

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
        exact_vectors: bool = True,
        tie_equal: bool = True,
        secure: bool = False,
    ) -> None:
        """Bring the replica to the end of the ledger, if both are given."""
        self.strategy = strategy
        self.config = config or FerretConfig()
        inner.check_inner(strategy, self.config)
        self.wrapper = wrapper_of(list(inner.chain(strategy)))  # for differential privacy
        self.spent = 0.0  # of privacy, by this run: Σ 1 / z², see `accounting`
        inner.check_bases(strategy, self.config, FedAvg)
        self.coordinator = Coordinator(
            self.config,
            seed=seed,
            num_rounds=num_rounds,
            ledger_path=ledger_path,
            check_clipped=partial(check_clipped, self.wrapper) if self.wrapper else None,
        )
        self.coordinator.check_rate()
        self.coordinator.begin(ledger, replica)
        self.evaluate_replica = evaluate
        self.round_timeout = round_timeout
        self.exact_vectors = exact_vectors
        self.tie_equal = tie_equal
        self.secure = secure
        self._configs: dict[str, dict[str, Scalar]] = {}  # what the inner strategy sends each node
        self._requests: list[FitIns] = []  # of this round
        self._handed = untouchable()  # what Flower calls the model

    def __repr__(self) -> str:
        """Name the inner strategy."""
        return f"Ferret({self.strategy!r})"

    @property
    def ledger(self) -> Ledger | None:
        """Return the rounds published so far; None until a base model is known."""
        return self.coordinator.ledger

    @property
    def replica(self) -> Replica | None:
        """Return the server's model, if it has one."""
        return self.coordinator.replica

    @property
    def refused(self) -> dict[str, str]:
        """Return which nodes' replies of this round were not used, and why."""
        return self.coordinator.refused

    @property
    def replica_seconds(self) -> float:
        """Return what the server's replica took to follow this round."""
        return self.coordinator.replica_seconds

    def initialize_parameters(self, client_manager: ClientManager) -> Parameters | None:
        """Learn what the run starts from: initial parameters, the replica, or what nodes say."""
        initial = self.strategy.initialize_parameters(client_manager)
        if self.replica is None and initial is None:
            *_, innermost = inner.chain(self.strategy)
            least = getattr(innermost, "min_available_clients", 1)
            if self.ledger is None and (header := _ask_for_header(client_manager, least)):
                self.coordinator.begin(Ledger(header))
            elif self.ledger is None or _run_the_mod(client_manager, least):
                initial = _ask_for_parameters(client_manager)
        if self.replica is None and initial is not None:
            if self.secure:
                raise ConfigError(
                    "secure aggregation needs nodes that have the base model: take the initial "
                    "parameters from the strategy, and use FerretClient"
                )
            arrays = tuple(parameters_to_ndarrays(initial))
            names = tuple(str(i) for i in range(len(arrays)))
            base = Base(names, arrays, self.exact_vectors, self.tie_equal)
            self.coordinator.begin_from(base)
        return self._parameters()

    def configure_fit(
        self, server_round: int, parameters: Parameters, client_manager: ClientManager
    ) -> list[tuple[ClientProxy, FitIns]]:
        """Plan the round and send each sampled node what it misses."""
        self._check_handed(parameters)
        plan = self.coordinator.next_round()
        zeros = np.zeros(plan.num_coefficients, dtype=np.float32)
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
        if self.wrapper is None:
            check_outermost(self._requests)
        coordinator = self.coordinator
        coordinator.start_replies()
        for failure in failures:
            log.warning("%s", failure_text(failure))
        for node in self._configs.keys() - {client.cid for client, _ in results}:
            if self.secure:  # it could not say whether its ledger was stale
                coordinator.lost(node)
            log.warning("node %s did not take part in round %d", node, coordinator.round)
        replies = self._replies_of(results)
        if not self.secure:
            replies = self._ask_again(replies, server_round)
        accepted = coordinator.accept(replies)
        if self.secure and len(accepted) < len(replies):
            log.error("round %d: who is left out is in the mean; not published", coordinator.round)
            return None, {}
        if not accepted:
            return None, {}
        try:
            made, metrics = self._aggregate(server_round, accepted, failures)
        except ValueError as error:  # such as Bulyan's, of too few replies
            log.error("round %d is not published: %r: %s", coordinator.round, self.strategy, error)
            return None, {}
        if not coordinator.publish(made, accepted):
            return None, metrics
        return self._parameters(), metrics

    def evaluate(self, server_round: int, parameters: Parameters) -> tuple[float, Metrics] | None:
        """Evaluate the server's replica, or let the inner strategy evaluate its arrays."""
        self._check_handed(parameters)
        if self.coordinator.base is not None:
            return self.strategy.evaluate(server_round=server_round, parameters=parameters)
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
            arrays, entry = wire.encode(self.coordinator.request(client.cid, None))
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
        self.coordinator.refused = {}
        usable = []
        for client, answer in results:
            about, answer.metrics = wire.about(answer.metrics)
            try:
                check_evaluation(answer, about)
            except ValueError as error:
                self.coordinator.refuse(client.cid, about, str(error))
            else:
                self.coordinator.reached(client.cid, about)
                usable.append((client, answer))
        return self.strategy.aggregate_evaluate(
            server_round=server_round, results=usable, failures=failures
        )

    def _parameters(self) -> Parameters:
        """Return what Flower calls the model: the app's arrays if they are known."""
        base, replica = self.coordinator.base, self.replica
        if base is None or replica is None:
            self._handed = untouchable()
        else:
            self._handed = ndarrays_to_parameters(base.at(replica.arrays))
        return self._handed

    def _check_handed(self, parameters: Parameters) -> None:
        """Raise `ConfigError` if a strategy around this one has changed the model."""
        if self.coordinator.base is not None and parameters.tensors != self._handed.tensors:
            raise ConfigError(
                "a strategy around Ferret has changed the model, which would reach no node: "
                "Ferret must be the outermost, Ferret(strategy=...)"
            )

    def _aggregate(
        self,
        server_round: int,
        accepted: list[Reply],
        failures: list[FitResult | BaseException],
    ) -> tuple[np.ndarray | None, Metrics]:
        plan = self.coordinator.plan
        assert plan is not None, "configure_fit comes first"
        made, metrics = inner.aggregate(
            self.strategy,
            plan,
            server_round,
            [_as_float32(reply, plan) for reply in accepted],
            failures,
            len(self._configs),
        )
        if self.wrapper is not None:
            self.spent += price(self.wrapper)
        return made, metrics

    def _train_request(self, client: ClientProxy, base: bool = False) -> FitIns:
        request = self.coordinator.request(client.cid, self.coordinator.plan, base)
        arrays, entry = wire.encode(request)
        scalars = self._configs.get(client.cid, {}) | entry
        if self.coordinator.base is not None:  # else Ferret's own app counts
            self.coordinator.weigh(client.cid, down=wire.message_nbytes(arrays, scalars))
        return FitIns(arrays, scalars)

    def _ask_again(self, replies: list[Reply], server_round: int) -> list[Reply]:
        """Send nodes what they lack, the base or the whole ledger, and use their new replies."""
        stale = [reply for reply in replies if reply.about.get("stale")]
        if not stale:
            return replies
        names, requests = {}, []
        for reply in stale:
            client, _ = reply.source
            names[client.cid] = self.coordinator.forget(reply.node, reply.about)
            requests.append(
                (client, self._train_request(client, bool(reply.about.get("baseless"))))
            )
        again, failures = fit_clients(
            requests,
            max_workers=MOST_AT_ONCE,
            timeout=self.round_timeout,
            group_id=server_round,
        )
        for failure in failures:
            log.warning("asked again: %s", failure_text(failure))
        for cid in names.keys() - {client.cid for client, _ in again}:
            self.coordinator.silent(names[cid])
        others = [reply for reply in replies if reply not in stale]
        return others + self._replies_of(again)

    def _replies_of(self, results: list[FitResult]) -> list[Reply]:
        """Return the answers that can be read; the other nodes are named and left out."""
        replies = []
        for client, answer in results:
            try:
                replies.append(self._reply_of(client, answer))
            except Exception as error:  # a stranger may send anything
                self.coordinator.refuse(client.cid, {}, f"its reply cannot be read: {error!r}")
        return replies

    def _reply_of(self, client: ClientProxy, answer: FitRes) -> Reply:
        """Return an answer as the coordinator sees it, and as the inner strategy shall see it."""
        if self.coordinator.base is not None:
            up = wire.message_nbytes(answer.parameters, answer.metrics)
            self.coordinator.weigh(client.cid, up=up)
        about, metrics = wire.about(answer.metrics)
        cleaned = FitRes(answer.status, answer.parameters, answer.num_examples, metrics)
        tensors = answer.parameters.tensors
        return Reply(client.cid, about, answer.num_examples, tensors, (client, cleaned))


def _as_float32(reply: Reply, plan: RoundPlan) -> FitResult:
    """Return Flower's answer with γ as the inner strategy can compute with it."""
    client, answer = reply.source
    if plan.numbers != EXACT_NUMBERS:
        answer.parameters = ndarrays_to_parameters([reply.gamma(plan)])
    return client, answer


def _a_few(client_manager: ClientManager, least: int) -> list[ClientProxy]:
    """Wait for ``least`` nodes, and return as many of them as it takes to know what all run."""
    client_manager.wait_for(least, timeout=WAIT_SECONDS)
    return client_manager.sample(
        min(max(least, 1), ASKED_FOR_HEADER, client_manager.num_available())
    )


def _ask_for_header(client_manager: ClientManager, least: int) -> Header | None:
    """Return the header that most of a few nodes report for their base model.

    None if they run `ferret_mod`, and start from what the server sends.

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
    votes: Counter[Header | None] = Counter()
    answers, errors = [], []
    clients = _a_few(client_manager, least)
    with ThreadPoolExecutor(ASKED_FOR_HEADER) as pool:
        asked = [pool.submit(_header_of, client) for client in clients]
    for client, answer in zip(clients, asked, strict=True):
        try:
            header = answer.result()
            votes[header] += 1
            told_header = f"{header.base} of {header.size} parameters" if header else "ferret_mod"
            answers.append(f"node {client.cid}: {told_header}")
        except Exception as error:  # whatever one node does, the others decide
            errors.append(f"node {client.cid}: {told(error)}")
            log.warning(errors[-1])
    if not votes:
        raise LedgerError("no node could load its base model:\n" + "\n".join(errors))
    header, count = votes.most_common(1)[0]
    if 2 * count <= votes.total():
        raise LedgerError("the nodes do not have the same base model:\n" + "\n".join(answers))
    return header


def _header_of(client: ClientProxy) -> Header | None:
    """Ask a node for its base model, and return what it says or raise why it cannot be."""
    question = GetPropertiesIns(config={"ask": "base"})
    answer = client.get_properties(question, timeout=HEADER_SECONDS, group_id=0).properties
    if "error" in answer:
        raise ValueError(str(answer["error"]))
    if answer.get("base") == wire.FROM_SERVER:
        return None
    if missing := set(HEADER_FIELDS) - set(answer):
        raise ValueError(f"it does not say its {sorted(missing)}: it must use FerretClient")
    return Header.received({name: answer[name] for name in HEADER_FIELDS})


def _ask_for_parameters(client_manager: ClientManager) -> Parameters:
    """Return what one node's app starts from, as Flower itself asks for it."""
    (client,) = client_manager.sample(1)
    log.info("asking node %s for the initial parameters", client.cid)
    question = GetParametersIns(config={})
    told_by = client.get_parameters(question, timeout=HEADER_SECONDS, group_id=0).parameters
    if not told_by.tensors:
        raise LedgerError(
            f"node {client.cid} has no parameters to start from: give the strategy inside Ferret "
            "its initial_parameters, or the nodes' NumPyClient a get_parameters"
        )
    return told_by


def _run_the_mod(client_manager: ClientManager, least: int) -> bool:
    """Return whether the nodes run `ferret_mod`, as the first of a few that answers says.

    No node loads its model for it. Where none answers the run goes on as it was started.
    """
    question = GetPropertiesIns(config={"ask": "partition-id"})
    for client in _a_few(client_manager, least):
        try:
            answer = client.get_properties(question, timeout=HEADER_SECONDS, group_id=0)
        except Exception as error:  # whatever one node does, the next may answer
            log.warning("node %s: %s", client.cid, told(error))
        else:
            return answer.properties.get("base") == wire.FROM_SERVER
    return False
