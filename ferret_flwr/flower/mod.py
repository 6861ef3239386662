"""`ferret_mod` makes a Ferret client of a ClientApp that knows nothing of Ferret.

It stands between Flower and the app. What the server sends, a seed and K numbers a round, becomes
the full arrays that the app expects; the arrays that the app returns become K numbers. It works on
Flower's records, so the app may be written for the Message API or return a ``NumPyClient``.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp.typing import ClientAppCallable

from ferret_flwr.base import Base, BaseError
from ferret_flwr.flower import wire
from ferret_flwr.flower.bases import MissingBaseError, base_of
from ferret_flwr.flower.cache import LedgerCache, StaleCacheError
from ferret_flwr.flower.site import check_asked, check_own
from ferret_flwr.projection.projection import project
from ferret_flwr.replica import Replica
from ferret_flwr.rounds import to_send

log = logging.getLogger(__name__)

ASKED = ("base", "partition-id")  # by Ferret, of nodes that have no client of its own
ABOUT = "ferret"  # the record of a reply in which the mod speaks to the server
LEGACY = {"train": "fitres", "evaluate": "evaluateres"}  # how the replies of NumPyClients begin


def ferret_mod(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """Let an unmodified ClientApp take part in Ferret: ``ClientApp(..., mods=[ferret_mod])``.

    Messages of other strategies pass unchanged, so the mod may stay in place.

    Parameters
    ----------
    message
        From the server. A request of `Ferret` names what the node needs to reach the current
        model; what it lacks, it asks for, and the app is not called.
    context
        The node's. Its node-config may name the folder to keep the base model, ledgers and
        snapshots in, ``ferret.cache-dir``, and its ``partition-id``.
    call_next
        The app, or the next mod.

    Returns
    -------
    Message
        The app's reply, with K + E numbers in the place of its arrays.
    """
    content = message.content
    asked = content.config_records.get("getpropertiesins.config", ConfigRecord()).get("ask")
    if asked in ASKED:
        answer = {"base": wire.FROM_SERVER, "partition-id": _partition_of(context)}
        return Message(_properties(answer), reply_to=message)
    if not any(wire.KEY in record for record in content.config_records.values()):
        return call_next(message, context)
    try:
        turn = _Turn.of(content, context)
        message.content = turn.request(content)
    except Exception as error:
        return Message(_failure(error, message, context), reply_to=message)
    began = time.perf_counter()
    reply = call_next(message, context)
    if not reply.has_content():
        return reply
    try:
        reply.content = turn.reply(reply.content, time.perf_counter() - began)
    except Exception as error:
        return Message(_failure(error, message, context), reply_to=message)
    return reply


@dataclass(frozen=True)
class _Turn:
    """One message: the model that the app starts from, and what it is asked for.

    Attributes
    ----------
    key
        The name of the request's arrays among its records.
    base, replica
        What the app calls its model, and the parameters now.
    arrays
        What the app is given.
    ask
        The server's request, with the node's own seed if bases are per client.
    about
        What the node says of itself.
    """

    key: str
    base: Base
    replica: Replica
    arrays: list[np.ndarray]
    ask: wire.Request
    about: dict[str, Any]

    @classmethod
    def of(cls, content: RecordDict, context: Context) -> _Turn:
        """Bring the node's model to where the server's is."""
        start = time.perf_counter()
        own = context.node_config
        check_own(own)
        key, packed = _only(content.array_records, "the request")
        settings = next(r for r in content.config_records.values() if wire.KEY in r)
        ask = wire.decode([a.numpy() for a in packed.values() if a.data], settings)
        cache = LedgerCache.of(
            context,
            str(own.get("ferret.cache-dir", "")),
            snapshots=bool(own.get("ferret.snapshots", True)),
        )
        ledger = cache.complete(ask)
        base, follower = base_of(ask, cache.folder)
        if ask.plan is not None:
            most = int(own.get("ferret.coefficients", 0)) + base.layout.exact_size
            check_asked(ask.plan, most if "ferret.coefficients" in own else base.layout.size)
        replica = follower.follow(ledger, cache.snapshots)
        about = {
            "partition-id": _partition_of(context),
            "fingerprint": replica.fingerprint,
            "cached": cache.keep(ledger, ask),
            "time/reconstruct_s": time.perf_counter() - start,
        }
        return cls(key, base, replica, base.at(replica.arrays), ask, about)

    def request(self, content: RecordDict) -> RecordDict:
        """Return what the app is to see: its arrays, and nothing of Ferret's."""
        legacy = self.key.endswith("ins.parameters")
        arrays = {n: Array(a) for n, a in zip(self.base.names, self.arrays, strict=True)}
        seen = RecordDict({self.key: ArrayRecord(arrays)})
        for name, record in content.items():
            if isinstance(record, ConfigRecord):
                own = {k: v for k, v in record.items() if k != wire.KEY}
                if own or legacy or wire.KEY not in record:
                    seen[name] = ConfigRecord(own)
            elif name != self.key:
                seen[name] = record
        return seen

    def reply(self, content: RecordDict, seconds: float) -> RecordDict:
        """Return the app's reply with numbers in the place of its arrays."""
        about = self.about | {"time/local_s": seconds}
        if self.ask.plan is not None:
            start = time.perf_counter()
            key, record = _only(content.array_records, "the app's reply")
            gamma, trained = self._projected(record)
            sent = to_send(gamma, self.ask.plan, self.about["partition-id"])
            content[key] = ArrayRecord({"0": Array(sent)})
            about |= trained | {"time/project_s": time.perf_counter() - start}
        return _with_about(content, about)

    def _projected(self, record: ArrayRecord) -> tuple[np.ndarray, dict[str, Any]]:
        """Return γ and what identifies it."""
        assert self.ask.plan is not None
        if odd := sorted(set(record) ^ set(self.base.names)):
            which = "lacks" if odd[0] in self.base.names else "brings another than it got,"
            raise BaseError(f"the app's reply {which} array '{odd[0]}'")
        before = self.base.tuned(self.arrays)
        after = self.base.tuned([record[name].numpy() for name in self.base.names])
        seed = wire.node_seed(self.ask.plan, self.ask.bases, self.about["partition-id"])
        plan = self.ask.plan.with_seed(seed)
        gamma = project(before, self.base.layout, plan, after).astype(np.float32)
        still = [
            i for i, (a, b) in enumerate(zip(before, after, strict=True)) if np.array_equal(a, b)
        ]
        return gamma, {"round": plan.round, "seed": seed, "still": still}


def _only(records: Mapping[str, ArrayRecord], owner: str) -> tuple[str, ArrayRecord]:
    """Return the one record of arrays and its name."""
    if len(records) != 1:
        raise BaseError(f"{owner} must hold one ArrayRecord, got {sorted(records)}")
    return next(iter(records.items()))


def _partition_of(context: Context) -> int:
    """Return what orders the replies: the node's partition, or Flower's id of it."""
    partition = context.node_config.get("partition-id")
    return partition if isinstance(partition, int) else context.node_id % 2**63


def _with_about(content: RecordDict, about: dict[str, Any]) -> RecordDict:
    """Add what the node says of itself, where the server's strategy will find it."""
    text = json.dumps(about, separators=(",", ":"))
    for kind in LEGACY.values():
        if (metrics := content.config_records.get(f"{kind}.metrics")) is not None:
            metrics[wire.KEY] = text
            return content
    content[ABOUT] = ConfigRecord({wire.KEY: text})
    return content


def _failure(error: Exception, message: Message, context: Context) -> RecordDict:
    """Log ``error``, which is being handled, and return the answer that names it."""
    baseless = isinstance(error, MissingBaseError)
    lacking = baseless or isinstance(error, StaleCacheError)
    partition = _partition_of(context)
    log.log(
        logging.INFO if lacking else logging.ERROR,
        "partition %d: %s",
        partition,
        error,
        exc_info=None if lacking else error,
    )
    about = {
        "error": f"{type(error).__name__}: {error}",
        "stale": lacking,
        "baseless": baseless,
        "partition-id": partition,
    }
    return _with_about(_empty(message), about)


def _empty(message: Message) -> RecordDict:
    """Return a reply without arrays, of the kind that the server's strategy can read."""
    kind = LEGACY[message.metadata.message_type.split(".")[0]]
    if not any(name.endswith("ins.parameters") for name in message.content.array_records):
        return RecordDict({"metrics": MetricRecord({})})
    reply = RecordDict(
        {
            f"{kind}.num_examples": MetricRecord({"num_examples": 0}),
            f"{kind}.metrics": ConfigRecord({}),
            f"{kind}.status": ConfigRecord({"code": 0, "message": ""}),
        }
    )
    if kind == "fitres":
        nothing = Array(data=b"", dtype="", stype="", shape=())
        reply["fitres.parameters"] = ArrayRecord({"_empty": nothing})
    else:
        reply["evaluateres.loss"] = MetricRecord({"loss": 0.0})
    return reply


def _properties(answer: dict[str, Any]) -> RecordDict:
    return RecordDict(
        {
            "getpropertiesres.properties": ConfigRecord(answer),
            "getpropertiesres.status": ConfigRecord({"code": 0, "message": ""}),
        }
    )
