"""What the server knows and decides in a round, whichever of Flower's interfaces asks."""

from __future__ import annotations

import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from statistics import median_low
from typing import Any

import numpy as np

from ferret_flwr import report
from ferret_flwr.base import Base
from ferret_flwr.config import ConfigError, FerretConfig
from ferret_flwr.flower import wire
from ferret_flwr.flower.nodes import name_of, told
from ferret_flwr.flower.replies import (
    Reply,
    cached_rounds,
    check_reply,
    estimated_norms,
    last_norm,
    publish_rows,
    untouched,
)
from ferret_flwr.ledger import Ledger, LedgerError
from ferret_flwr.projection.plan import PlanError, RoundPlan
from ferret_flwr.replica import Replica
from ferret_flwr.rounds import next_plan, publish, server_rate

log = logging.getLogger(__name__)

SECONDS = ("time/local_s", "time/project_s", "time/reconstruct_s")  # the slowest node's


class Coordinator:
    """The ledger, what each node has of it, and which replies count.

    Parameters
    ----------
    config
        Number, family and allocation of the bases, server rate.
    seed
        The run's seed; every round's bases follow from it.
    num_rounds
        Length of the whole run, which the decaying server rates need.
    ledger_path
        Where the ledger is written after each round.
    check_clipped
        Raises `ValueError` for coefficients that the node should have clipped. Where they are
        clipped, what one node sends must not refuse another, and lengths are not compared.

    Attributes
    ----------
    ledger
        None until a base model is known, see `begin`.
    replica
        Follows the ledger, if the server has a model.
    base
        The arrays that the run starts from, if nodes may ask for them.
    plan
        Of the round under way.
    refused
        Node -> why its reply of this round was not used.
    replica_seconds
        What the replica took to follow this round.
    rows
        One for each published round of an app that Ferret is plugged into: what crossed the wire
        and what it took, by the names that Ferret's own app uses.
    """

    def __init__(
        self,
        config: FerretConfig,
        *,
        seed: int,
        num_rounds: int,
        ledger_path: Path | None,
        check_clipped: Callable[[np.ndarray], None] | None = None,
    ) -> None:
        """Know no model yet."""
        self.config = config
        self.seed = seed
        self.num_rounds = num_rounds
        self.ledger_path = ledger_path
        self.check_clipped = check_clipped
        self.ledger: Ledger | None = None
        self.replica: Replica | None = None
        self.base: Base | None = None
        self.plan: RoundPlan | None = None
        self.refused: dict[str, str] = {}
        self.replica_seconds = 0.0
        self._reached: dict[str, int] = {}  # node -> rounds in its ledger cache
        self._has_base: set[str] = set()  # nodes that have shown it
        self._heard = False  # whether any node has spoken Ferret's protocol
        self.rows: list[dict[str, Any]] = []
        self._traffic: dict[str, list[int]] = {}  # node -> bytes down, up

    def begin(
        self,
        ledger: Ledger | None,
        replica: Replica | None = None,
        base: Base | None = None,
    ) -> None:
        """Start from a ledger, or from a replica's model, which is brought to the ledger's end.

        Raises
        ------
        LedgerError
            If the ledger belongs to another model.
        """
        self.ledger, self.replica, self.base = ledger, replica, base
        if base is not None:
            report.show_progress()
            _tell(base, self.config.coefficients)
        if replica is not None:
            self.ledger = ledger or Ledger(replica.header)
            replica.follow(self.ledger)
            self.ledger = self.ledger.with_fingerprint(replica.fingerprint)

    def begin_from(self, base: Base) -> None:
        """Start from arrays, and go on from the ledger if there is one.

        Raises
        ------
        ConfigError
            If another run has begun from other arrays.
        LedgerError
            If the ledger belongs to another model.
        """
        replica = Replica(base.layout, base.masters())
        if self.base is None:
            self.begin(self.ledger, replica, base)
        elif not self.base.fits(replica.header):
            raise ConfigError(
                "this Ferret has begun from other initial arrays: make a new one for each run"
            )

    def known(self) -> Ledger:
        """Return the ledger.

        Raises
        ------
        LedgerError
            If there is none yet.
        """
        if self.ledger is None:
            raise LedgerError("the ledger has no header yet: the base model must be known first")
        return self.ledger

    @property
    def round(self) -> int:
        """Return the number of the round under way."""
        return self._planned().round

    def check_rate(self) -> None:
        """Raise `ConfigError` if the rate needs the length of the run, which is not known."""
        if self.config.rate_schedule != "constant" and self.num_rounds < 1:
            raise ConfigError(
                f"the server rate is '{self.config.rate_schedule}': Ferret needs num_rounds"
            )

    def next_round(self) -> RoundPlan:
        """Plan the coming round."""
        exact = self.base.layout.exact_size if self.base else 0
        self.check_rate()
        self._traffic = {}
        self.plan = next_plan(self.known(), self.config, self.seed, exact)
        return self.plan

    def start_replies(self) -> None:
        """Forget what was noted of the round before."""
        self.refused, self.replica_seconds = {}, 0.0

    def weigh(self, node: str, *, down: int = 0, up: int = 0) -> None:
        """Count bytes that cross the wire in this round."""
        traffic = self._traffic.setdefault(node, [0, 0])
        traffic[0] += down
        traffic[1] += up

    def request(self, node: str, plan: RoundPlan | None, base: bool = False) -> wire.Request:
        """Return what ``node`` needs to reach the current model and, to train, to answer.

        Parameters
        ----------
        node
            Flower's id.
        plan
            Of the round; None in a request to evaluate, which cannot be asked again: it brings
            the base to a node that has not shown that it has it.
        base
            Whether the node has said that it lacks the base.
        """
        since = self._reached.get(node, 0)
        lacks = base or (plan is None and node not in self._has_base)
        sent = self.base if lacks else None
        return wire.Request.of(self.known(), since, plan, self.config.bases, sent)

    def forget(self, node: str, about: Mapping[str, Any]) -> str:
        """Send the whole ledger next time to a node that lacks something; return its name."""
        name = name_of(node, about)
        self._heard = True
        self.lost(node)
        if about.get("baseless"):
            log.info("%s has no base model yet and gets it", name)
        else:
            log.warning("%s has lost its ledger cache and gets the whole ledger", name)
        return name

    def lost(self, node: str) -> None:
        """Send the whole ledger next time to a node that could not say what it has."""
        self._reached[node] = 0
        self._has_base.discard(node)

    def silent(self, name: str) -> None:
        """Note a node that did not answer when it was asked again."""
        self.refused[name] = "it did not answer when it was sent what it lacked"

    def refuse(self, node: str, about: Mapping[str, Any], reason: str) -> None:
        """Name the node, and send it the whole ledger next time."""
        name, reason = name_of(node, about), told(reason)
        self.refused[name] = reason
        self.lost(node)
        log.warning("%s is left out: %s", name, reason)

    def reached(self, node: str, about: Mapping[str, Any]) -> None:
        """Note that ``node`` has the base, and how many rounds it says it keeps."""
        self._heard = True
        self._has_base.add(node)
        self._reached[node] = cached_rounds(about, len(self.known()))

    def accept(self, replies: Iterable[Reply]) -> list[Reply]:
        """Return the replies that can be used, in an order that does not depend on arrival."""
        plan, ledger = self._planned(), self.known()
        rate = self._rate()
        usable = []
        for reply in sorted(replies, key=Reply.order):
            try:
                check_reply(reply, plan, self.config.bases, rate)
                if self.check_clipped is not None:
                    self.check_clipped(reply.gamma(plan))
                usable.append(reply)
            except Exception as error:  # a stranger may send anything
                self.refuse(reply.node, reply.about, str(error))
        for partition, count in Counter(reply.about["partition-id"] for reply in usable).items():
            if count > 1:
                log.warning(
                    "%d nodes have 'partition-id' = %s: give each its own", count, partition
                )
        if self.check_clipped is None:
            usable = self._not_huge(usable)
        expected = ledger.fingerprint or _vote(usable)
        if expected and not ledger.fingerprint:
            self.ledger = ledger.with_fingerprint(expected)
        accepted = []
        for reply in usable:
            if expected and reply.about["fingerprint"] == expected:
                self.reached(reply.node, reply.about)
                accepted.append(reply)
            else:
                self.refuse(
                    reply.node,
                    reply.about,
                    f"it trained from parameters {reply.about['fingerprint']!r}, expected "
                    f"{expected or 'a majority to agree'}: its replica is stale or has diverged",
                )
        if not accepted:
            log.error("round %d: no usable reply, nothing is published", plan.round)
            if self.base is not None and not self._heard:
                log.error("no node answers as ferret_mod does: is mods=[ferret_mod] missing?")
        return accepted

    def publish(self, aggregate: np.ndarray | None, accepted: list[Reply]) -> bool:
        """Append the round to the ledger, apply it, save; return whether it could be published.

        Parameters
        ----------
        aggregate
            What the inner strategy made of the γ: ``(K + E,)``; None if it made nothing.
        accepted
            The replies that it was given.
        """
        plan, rate = self._planned(), self._rate()
        if aggregate is None:
            log.error("round %d: the inner strategy returned nothing", plan.round)
            return False
        # Which tensors stand still has no noise, so a run with differential privacy does not ask.
        public = self.base is not None and self.check_clipped is None
        still = untouched(accepted, len(self.base.layout.names)) if self.base and public else ()
        try:
            if self.config.bases == "per-client":
                entry = publish_rows(plan, accepted, rate, still)
            else:
                entry = publish(plan, aggregate, rate, still=still)
        except PlanError as error:
            log.error("round %d is not published: %s", plan.round, error)
            return False
        self.ledger = self.known().append(entry)
        if self.replica is not None:
            start = time.perf_counter()
            self.replica.follow(self.ledger)
            self.ledger = self.ledger.with_fingerprint(self.replica.fingerprint)
            self.replica_seconds = time.perf_counter() - start
        self._save()
        if self.base is not None:
            self.rows.append(self._row(accepted))
            log.info(report.line(self.rows[-1], self.base.nbytes))
        return True

    def _planned(self) -> RoundPlan:
        assert self.plan is not None, "next_round comes first"
        return self.plan

    def _rate(self) -> float:
        return server_rate(self.config, self._planned(), self.known(), self.num_rounds)

    def _row(self, accepted: list[Reply]) -> dict[str, Any]:
        down, up = zip(*self._traffic.values(), strict=True)
        row: dict[str, Any] = {
            "round": self._planned().round,
            "nodes": len(accepted),
            "comm/downlink_bytes_per_node": max(down),
            "comm/uplink_bytes_per_node": max(up),
            "failures": [f"{name}: {why}" for name, why in self.refused.items()],
        }
        for key in SECONDS:
            said = [reply.about.get(key) for reply in accepted]
            row[key] = max((s for s in said if type(s) is float and math.isfinite(s)), default=0.0)
        return row

    def _not_huge(self, replies: list[Reply]) -> list[Reply]:
        """Return the replies that are not far longer than the others and the round before."""
        ratio = self.config.max_norm_ratio
        norms = estimated_norms(replies, self._planned())
        several = [n for n in norms if n] if len(norms) > 1 else []  # one is no measure of itself
        usual = max(median_low(several or [0.0]), last_norm(self.known()))
        kept = []
        for reply, norm in zip(replies, norms, strict=True):
            if ratio and usual and norm > ratio * usual:
                self.refuse(
                    reply.node,
                    reply.about,
                    f"its update is {norm:.3g} long where {usual:.3g} is usual; "
                    f"'ferret.max-norm-ratio' allows {ratio:g} times as much",
                )
            else:
                kept.append(reply)
        return kept

    def _save(self) -> None:
        if self.ledger_path is None:
            return
        try:
            self.known().save(self.ledger_path)
        except OSError as error:
            log.error(
                "cannot write the ledger '%s': %s; the previous one is kept, the next round tries "
                "again",
                self.ledger_path,
                error.strerror,
            )


def _tell(base: Base, coefficients: int) -> None:
    """Log what is projected and what is not."""
    layout = base.layout
    log.info(
        "%d arrays of %d numbers are projected, %d of %d are sent exactly, %d stay as they are",
        layout.num_projected,
        layout.size - layout.exact_size,
        layout.exact,
        layout.exact_size,
        len(base.names) - len(layout.names),
    )
    if layout.exact_size > 4 * coefficients:
        log.warning(
            "vectors of %d numbers in all are sent exactly, far more than the %d coefficients: "
            "exact_vectors=False projects them as well",
            layout.exact_size,
            coefficients,
        )


def _vote(replies: list[Reply]) -> str:
    """Return the fingerprint that more than half of the nodes report, "" if none."""
    votes = Counter(str(reply.about["fingerprint"]) for reply in replies)
    fingerprint, count = votes.most_common(1)[0] if votes else ("", 0)
    return fingerprint if 2 * count > len(replies) else ""
