"""What crosses the wire, and what it weighs.

A request carries one JSON text under the key ``ferret`` and, as arrays, the packed bases per block
of the coming round (in requests to train), those of each missed entry with its coefficients, and
the base's own arrays if the node has asked for them. A reply carries γ as one float32 array and a
few scalars. Nothing is pickled.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from flwr.common import Parameters, Scalar, ndarrays_to_parameters
from flwr.common.serde import recorddict_to_proto

from ferret_flwr.base import Base
from ferret_flwr.ledger import Entry, Header, Ledger, pack_plan, unpack_plan
from ferret_flwr.projection.kernels.philox import derive_seed
from ferret_flwr.projection.plan import RoundPlan

KEY = "ferret"
PROTOCOL = 3
FROM_SERVER = "from-server"  # the base of a node that runs `ferret_mod`


class ProtocolError(ValueError):
    """A message is not one of this protocol, or of another version of it."""


@dataclass(frozen=True)
class Request:
    """What a node needs to reach the current model and, to train, the plan of the round.

    Attributes
    ----------
    header
        Which model the ledger is for.
    since, since_head, since_fingerprint
        The round that the node is thought to have reached, the ledger's digest there, and the
        fingerprint of the parameters, "" if the server does not know it.
    entries
        The rounds behind ``since``.
    head
        The ledger's digest at its end.
    plan
        The bases of the coming round; None in a request to evaluate.
    bases
        Whether the node draws the plan's bases or its own, one of `ferret.bases`.
    base
        What the header names, for a node that does not have it.
    """

    header: Header
    since: int
    since_head: str
    since_fingerprint: str
    entries: tuple[Entry, ...]
    head: str
    plan: RoundPlan | None
    bases: str = "shared"
    base: Base | None = None

    @classmethod
    def of(
        cls,
        ledger: Ledger,
        since: int,
        plan: RoundPlan | None,
        bases: str = "shared",
        base: Base | None = None,
    ) -> Request:
        """Return the request for a node that has the first ``since`` rounds of ``ledger``."""
        return cls(
            ledger.header,
            since,
            ledger.digests[since],
            ledger.until(since).fingerprint,
            ledger.entries[since:],
            ledger.head,
            plan,
            bases,
            base,
        )


def encode(request: Request) -> tuple[Parameters, dict[str, Scalar]]:
    """Return the arrays and the config entry of a request."""
    tensors, metas, plan = [], [], None
    if request.plan is not None:
        plan, counts = _packed_plan(request.plan)
        tensors.append(counts)
    for entry in request.entries:
        meta, pair = _packed_entry(entry)
        metas.append(meta)
        tensors.extend(pair)
    base = None
    if request.base is not None:
        base, contents = _packed_base(request.base)
        tensors.extend(contents)
    text = json.dumps(
        {
            "protocol": PROTOCOL,
            "header": asdict(request.header),
            "since": request.since,
            "since-head": request.since_head,
            "since-fingerprint": request.since_fingerprint,
            "entries": metas,
            "head": request.head,
            "plan": plan,
            "bases": request.bases,
            "base": base,
        },
        separators=(",", ":"),
    )
    return Parameters(tensors, ndarrays_to_parameters([]).tensor_type), {KEY: text}


# What many nodes are sent is packed once and shared by their requests: a node that has missed a
# hundred rounds would otherwise cost the server a copy of a hundred entries.
_entries: WeakKeyDictionary[Entry, tuple[dict[str, Any], list[bytes]]] = WeakKeyDictionary()
_plans: WeakKeyDictionary[RoundPlan, tuple[dict[str, Any], bytes]] = WeakKeyDictionary()
_bases: WeakKeyDictionary[Base, tuple[dict[str, Any], list[bytes]]] = WeakKeyDictionary()


def _packed_entry(entry: Entry) -> tuple[dict[str, Any], list[bytes]]:
    if entry not in _entries:
        meta, pair = entry.pack()
        tensors = ndarrays_to_parameters(pair).tensors
        _entries[entry] = meta | {"fingerprint": entry.fingerprint}, tensors
    return _entries[entry]


def _packed_plan(plan: RoundPlan) -> tuple[dict[str, Any], bytes]:
    if plan not in _plans:
        meta, counts = pack_plan(plan)
        _plans[plan] = meta, ndarrays_to_parameters([counts]).tensors[0]
    return _plans[plan]


def _packed_base(base: Base) -> tuple[dict[str, Any], list[bytes]]:
    if base not in _bases:
        _bases[base] = base.about(), ndarrays_to_parameters(list(base.arrays)).tensors
    return _bases[base]


def decode(arrays: Sequence[np.ndarray], config: Mapping[str, Any]) -> Request:
    """Return the request behind the arguments of ``NumPyClient.fit`` or ``evaluate``.

    Raises
    ------
    ProtocolError
        If it is not a request of this protocol.
    """
    if KEY not in config:
        raise ProtocolError(
            f"the request has no '{KEY}' entry: the server must use the Ferret strategy"
        )
    try:
        values = json.loads(config[KEY])
        if values["protocol"] != PROTOCOL:
            raise ProtocolError(
                f"the server speaks protocol {values['protocol']}, this node {PROTOCOL}: "
                "install the same version of ferret-flwr on both"
            )
        if type(values["since"]) is not int or values["since"] < 0:
            raise ValueError(f"it builds on {values['since']!r} rounds")
        header = Header.received(values["header"])
        rest = list(arrays)
        plan = None
        if values["plan"] is not None:
            plan = unpack_plan(values["plan"], rest.pop(0), header.size)
        entries = tuple(
            replace(
                Entry.unpack(meta, rest[2 * i : 2 * i + 2], header.size),
                fingerprint=meta["fingerprint"],
            )
            for i, meta in enumerate(values["entries"])
        )
        base = None
        if values["base"] is not None:
            base = Base.of(values["base"], rest[2 * len(entries) :])
        return Request(
            header,
            values["since"],
            values["since-head"],
            values["since-fingerprint"],
            entries,
            values["head"],
            plan,
            values["bases"],
            base,
        )
    except ProtocolError:
        raise
    except (KeyError, TypeError, IndexError, ValueError, AttributeError) as error:
        raise ProtocolError(f"the request is not valid: {error!r}") from error


def about(metrics: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what a node says of its own answer, and what the app's code has reported.

    `FerretClient` is both, `ferret_mod` puts its part into one JSON text under the key ``ferret``.
    """
    rest = dict(metrics)
    if KEY not in rest:
        return rest, rest
    try:
        said = json.loads(rest.pop(KEY))
    except (TypeError, ValueError, RecursionError):
        said = None
    return (said if isinstance(said, dict) else {}), rest


def without_still(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Return a reply's metrics without what `ferret_mod` says of tensors: it has no noise."""
    said, rest = about(metrics)
    if KEY not in metrics:
        return rest
    return rest | {KEY: json.dumps({k: v for k, v in said.items() if k != "still"})}


def node_seed(plan: RoundPlan, bases: str, partition_id: int) -> int:
    """Return the seed of a node's bases: the round's, or one of its own (paper, Alg. 1)."""
    return plan.seed if bases == "shared" else derive_seed(plan.seed, partition_id)


def message_nbytes(parameters: Parameters, scalars: Mapping[str, Scalar]) -> int:
    """Return the size of a request or a reply as Flower serialises it.

    The arrays' bytes are counted, the scalars are serialised to be measured, the framing of so
    many arrays once.
    """
    content = sum(len(tensor) for tensor in parameters.tensors)
    framing = _framing_nbytes(len(parameters.tensors), len(parameters.tensor_type.encode()))
    record = RecordDict({"scalars": ConfigRecord(dict(scalars))})
    return content + framing + recorddict_to_proto(record).ByteSize()


@lru_cache(maxsize=1024)
def _framing_nbytes(arrays: int, letters: int) -> int:
    """Return the size of a record of empty arrays, whose kind is a word of so many letters."""
    empty = Array(data=b"", dtype="", stype="x" * letters, shape=())
    record = RecordDict({"parameters": ArrayRecord({str(i): empty for i in range(arrays)})})
    return recorddict_to_proto(record).ByteSize()
