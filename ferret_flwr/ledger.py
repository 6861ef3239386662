"""The rounds published so far. With a base model, a ledger *is* the trained model.

Entries are chained: each digest covers the entry and the digest before it, so two ledgers with
the same head hold the same rounds, and a changed, missing or reordered entry shows.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from ferret_flwr.files import write_atomic
from ferret_flwr.projection.encoding import decode, encoded_nbytes
from ferret_flwr.projection.layout import AnyBlocks, Blocks, InterleavedBlocks
from ferret_flwr.projection.packing import pack_counts, packed_nbytes, unpack_counts
from ferret_flwr.projection.plan import EXACT_NUMBERS, PlanError, RoundPlan

FINGERPRINT = re.compile("[0-9a-f]{16}")
FORMAT = "ferret-ledger-3"
FORMATS = (
    "ferret-ledger-1",
    "ferret-ledger-2",
    FORMAT,
)  # which knows interleaved blocks, exact tensors


class LedgerError(ValueError):
    """A ledger is damaged, or belongs to something else."""


@dataclass(frozen=True)
class Header:
    """What a ledger can be applied to.

    Attributes
    ----------
    layout
        Fingerprint of the names and shapes of the trainable tensors.
    size
        d, the number of trainable parameters.
    base
        Fingerprint of the float32 base parameters m_0.
    dtype
        What the tuned model's parameters are rounded to; nodes may train in another.
    """

    layout: str
    size: int
    base: str
    dtype: str = "float32"

    @classmethod
    def received(cls, values: Mapping[str, Any]) -> Header:
        """Return the header that a stranger has sent.

        Raises
        ------
        LedgerError
            If it cannot be one: fingerprints are sixteen hexadecimal digits, and name files.
        """
        header = cls(**values)
        named = [isinstance(text, str) for text in (header.layout, header.base, header.dtype)]
        if not (
            all(named)
            and type(header.size) is int
            and header.size > 0
            and FINGERPRINT.fullmatch(header.layout)
            and FINGERPRINT.fullmatch(header.base)
        ):
            raise LedgerError(f"there is no such base model: {header}")
        return header

    def check(self, other: Header, owner: str) -> None:
        """Raise `LedgerError` saying how ``other``, the header of ``owner``, differs."""
        for name, what in (
            ("size", "number of parameters"),
            ("layout", "layout"),
            ("base", "base model"),
        ):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                raise LedgerError(f"{owner} has another {what}: {theirs}, the ledger has {mine}")


@dataclass(frozen=True, eq=False)
class Entry:
    """One published round.

    Attributes
    ----------
    plan
        The round's bases.
    seeds
        One seed for shared bases, one per client otherwise.
    coefficients
        c with every factor in it: float32, ``(len(seeds), K)``.
    rate
        The server learning rate in ``coefficients``.
    fingerprint
        Of the float32 parameters after this round; "" while nobody has computed it.
    still
        Positions of the tensors that no client changed, and that nobody reconstructs therefore.
    encoded
        ``coefficients`` as they cross the wire if the plan's format is not float32: uint8, a row
        for each seed.
    """

    plan: RoundPlan
    seeds: tuple[int, ...]
    coefficients: np.ndarray
    rate: float
    fingerprint: str = ""
    still: tuple[int, ...] = ()
    encoded: np.ndarray | None = None

    @classmethod
    def decoded(
        cls,
        plan: RoundPlan,
        seeds: tuple[int, ...],
        content: np.ndarray,
        rate: float,
        still: tuple[int, ...] = (),
    ) -> Entry:
        """Return the entry whose coefficients cross the wire as ``content``."""
        if plan.numbers == EXACT_NUMBERS:
            return cls(plan, seeds, content, rate, still=still)
        if content.ndim != 2:
            raise PlanError("published coefficients must be a matrix")
        rows = [decode(row, plan.numbers, plan.num_bases, plan.exact) for row in content]
        coefficients = np.stack(rows) if rows else np.zeros((0, 0), dtype=np.float32)
        return cls(plan, seeds, coefficients, rate, still=still, encoded=content)

    def __post_init__(self) -> None:
        """Refuse what could not be applied."""
        if (self.plan.numbers == EXACT_NUMBERS) != (self.encoded is None):
            raise PlanError(f"coefficients in {self.plan.numbers} must be made by `decoded`")
        if self.coefficients.dtype != np.float32 or self.coefficients.ndim != 2:
            raise PlanError("published coefficients must be a float32 matrix")
        if len(self.seeds) != len(self.coefficients) or not self.seeds:
            raise PlanError(f"{len(self.seeds)} seeds for {len(self.coefficients)} rows")
        for seed, row in zip(self.seeds, self.coefficients, strict=True):
            self.plan.with_seed(seed).check_coefficients(
                row, owner=f"published coefficients of seed {seed}"
            )

    @property
    def round(self) -> int:
        """Return the round's number, 1 for the first."""
        return self.plan.round

    def chain(self, previous: str) -> str:
        """Return the digest of this entry behind a ledger whose head is ``previous``."""
        meta, arrays = self.pack()
        digest = hashlib.sha256(previous.encode())
        digest.update(json.dumps(meta, sort_keys=True).encode())
        for array in arrays:
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()

    def pack(self) -> tuple[dict[str, Any], list[np.ndarray]]:
        """Return the entry, but for its fingerprint, as JSON values and two arrays."""
        meta, counts = pack_plan(self.plan)
        meta |= {"seeds": list(self.seeds), "rate": self.rate}
        if self.still:
            meta["still"] = list(self.still)
        return meta, [counts, self.coefficients if self.encoded is None else self.encoded]

    @classmethod
    def unpack(cls, meta: dict[str, Any], arrays: Sequence[np.ndarray], size: int) -> Entry:
        """Return the entry behind what `pack` made, for a model of ``size`` parameters."""
        counts, content = arrays
        plan = unpack_plan(meta, counts, size)
        still = tuple(int(tensor) for tensor in meta.get("still", ()))
        return cls.decoded(plan, tuple(meta["seeds"]), content, float(meta["rate"]), still)

    @property
    def nbytes(self) -> int:
        """Return the size of the two arrays of `pack`, in closed form."""
        return _counts_nbytes(self.plan) + len(self.seeds) * coefficients_nbytes(self.plan)


def pack_plan(plan: RoundPlan) -> tuple[dict[str, Any], np.ndarray]:
    """Return a plan as JSON values and its packed bases per block, none if interleaved."""
    meta: dict[str, Any] = {"round": plan.round, "seed": plan.seed, "family": plan.family}
    if plan.exact:
        meta["exact"] = plan.exact
    if plan.numbers != EXACT_NUMBERS:
        meta["numbers"] = plan.numbers
    if plan.interleaved:
        return meta | {"interleaved": plan.blocks.count}, np.zeros(0, dtype=np.uint8)
    return meta | {"block-size": plan.blocks.block_size}, pack_counts(plan.counts)


def unpack_plan(meta: dict[str, Any], counts: np.ndarray, size: int) -> RoundPlan:
    """Return a plan from its JSON values and its packed bases per block."""
    blocks: AnyBlocks
    exact = int(meta.get("exact", 0))
    size -= exact
    if "interleaved" in meta:
        blocks = InterleavedBlocks(size, int(meta["interleaved"]))
        bases = unpack_counts(counts) if counts.size else None
    else:
        blocks, bases = Blocks(size, int(meta["block-size"])), unpack_counts(counts)
    numbers = meta.get("numbers", EXACT_NUMBERS)
    return RoundPlan(
        int(meta["round"]), int(meta["seed"]), meta["family"], blocks, bases, exact, numbers
    )


def _counts_nbytes(plan: RoundPlan) -> int:
    return 0 if plan.interleaved else packed_nbytes(plan.counts)


def payload_nbytes(plan: RoundPlan, seeds: int = 1) -> int:
    """Return the bytes of the arrays that a node receives in a round, in closed form.

    Parameters
    ----------
    plan
        The round's bases; the round before, whose coefficients come along, is taken to be alike.
    seeds
        Clients of that round if bases are per client, 1 if they are shared.
    """
    return 2 * _counts_nbytes(plan) + seeds * coefficients_nbytes(plan)


def coefficients_nbytes(plan: RoundPlan) -> int:
    """Return the bytes of one vector of coefficients, in closed form."""
    return encoded_nbytes(plan.num_bases, plan.numbers, plan.exact)


@dataclass(frozen=True, eq=False)
class Ledger:
    """A header and the entries of rounds 1, 2, ... in order.

    Attributes
    ----------
    digests
        The head before the first entry, and after each.
    """

    header: Header
    entries: tuple[Entry, ...] = ()
    digests: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Compute the chain where it was not handed over."""
        if not self.digests:
            first = hashlib.sha256(json.dumps(asdict(self.header)).encode()).hexdigest()
            chain = [first]
            for entry in self.entries:
                chain.append(entry.chain(chain[-1]))
            object.__setattr__(self, "digests", tuple(chain))

    def __len__(self) -> int:
        """Return the number of rounds."""
        return len(self.entries)

    @property
    def head(self) -> str:
        """Return the digest of everything."""
        return self.digests[-1]

    def append(self, entry: Entry) -> Ledger:
        """Return the ledger with one more round.

        Raises
        ------
        LedgerError
            If ``entry`` is not for the next round or for another number of parameters.
        """
        if entry.round != len(self) + 1:
            raise LedgerError(f"expected round {len(self) + 1}, got round {entry.round}")
        if entry.plan.size != self.header.size:
            raise LedgerError(
                f"round {entry.round} is for {entry.plan.size} parameters, the ledger for "
                f"{self.header.size}"
            )
        digests = (*self.digests, entry.chain(self.head))
        return Ledger(self.header, (*self.entries, entry), digests)

    def until(self, round: int) -> Ledger:
        """Return the first ``round`` rounds."""
        return Ledger(self.header, self.entries[:round], self.digests[: round + 1])

    def with_fingerprint(self, fingerprint: str) -> Ledger:
        """Return the ledger with the fingerprint of the parameters after its last round."""
        if not self.entries:
            return self
        last = replace(self.entries[-1], fingerprint=fingerprint)
        return Ledger(self.header, (*self.entries[:-1], last), self.digests)

    @property
    def fingerprint(self) -> str:
        """Return the fingerprint of the parameters at the end, "" if unknown."""
        return self.entries[-1].fingerprint if self.entries else self.header.base

    @cached_property
    def nbytes(self) -> int:
        """Return the number of bytes that a node without a cache must receive."""
        return sum(entry.nbytes for entry in self.entries)

    def to_bytes(self) -> bytes:
        """Return the ledger as a safetensors file."""
        tensors, entries = {}, []
        for entry in self.entries:
            meta, (counts, coefficients) = entry.pack()
            tensors[f"{entry.round:05d}.bases-per-block"] = counts
            tensors[f"{entry.round:05d}.coefficients"] = coefficients
            entries.append(meta | {"fingerprint": entry.fingerprint})
        meta = {"format": FORMAT, "header": asdict(self.header), "entries": entries}
        text = json.dumps(meta | {"head": self.head, "checksum": _checksum(meta)})
        return save_tensors(tensors, metadata={"ferret": text})

    @classmethod
    def from_bytes(cls, content: bytes, source: str) -> Ledger:
        """Return the ledger in ``content``, verified.

        Raises
        ------
        LedgerError
            Naming ``source``, if it is truncated, changed, or not a ledger.
        """
        try:
            tensors = load_tensors(content)
            length = int.from_bytes(content[:8], "little")
            meta = json.loads(json.loads(content[8 : 8 + length])["__metadata__"]["ferret"])
            head, checksum = meta.pop("head"), meta.pop("checksum")
            if meta.get("format") not in FORMATS:
                raise LedgerError(
                    f"its format is {meta.get('format')!r}, expected {' or '.join(FORMATS)}"
                )
            if checksum != _checksum(meta):
                raise LedgerError("its description has been changed")
            ledger = cls(Header(**meta["header"]))
            for values in meta["entries"]:
                name = f"{values['round']:05d}"
                arrays = tensors[f"{name}.bases-per-block"], tensors[f"{name}.coefficients"]
                fingerprint = values.pop("fingerprint")
                ledger = ledger.append(Entry.unpack(values, arrays, ledger.header.size))
                ledger = ledger.with_fingerprint(fingerprint)
            if ledger.head != head:
                raise LedgerError("its coefficients have been changed")
        except (SafetensorError, PlanError, LedgerError) as error:
            raise LedgerError(f"'{source}' is not a valid ledger: {error}") from error
        except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
            raise LedgerError(f"'{source}' is not a valid ledger: {error!r}") from error
        return ledger

    def save(self, path: Path) -> None:
        """Write the ledger to ``path``, whole or not at all."""
        write_atomic(path, self.to_bytes())

    @classmethod
    def load(cls, path: Path) -> Ledger:
        """Read and verify the ledger at ``path``, a file or the results folder that holds it.

        Raises
        ------
        LedgerError
            If the file is not there or not valid.
        """
        path = path / "ledger.safetensors" if path.is_dir() else path
        try:
            content = path.read_bytes()
        except OSError as error:
            raise LedgerError(f"cannot read the ledger '{path}': {error.strerror}") from error
        return cls.from_bytes(content, str(path))


def _checksum(meta: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()
