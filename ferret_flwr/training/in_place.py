"""A model that is itself brought to the end of a ledger, with no copy of its parameters.

A float32 model holds the canonical parameters. Of a bfloat16 one they are rounded, so it is always
built from the base or a snapshot, tensor by tensor, with one tensor in float32 at a time.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from ferret_flwr.follower import DISK_BYTES_PER_SECOND
from ferret_flwr.ledger import Header, Ledger
from ferret_flwr.projection.layout import Layout
from ferret_flwr.projection.projection import (
    fingerprint_part,
    fingerprint_text,
    subtract_tensor,
)
from ferret_flwr.replica import ReplicaError
from ferret_flwr.snapshot import Snapshots, read_in_turn

from .tensors import as_arrays

log = logging.getLogger(__name__)

Tensors = Iterator[np.ndarray]  # float32 masters in layout order, each to be changed by its reader


@dataclass(frozen=True)
class Reached:
    """Where a model stands: which base it has, and the fingerprint of its float32 parameters."""

    header: Header
    fingerprint: str


@dataclass(frozen=True)
class _Start:
    """Parameters to begin with: of which round, their fingerprint, how to read them."""

    round: int
    fingerprint: str
    read: Callable[[], Tensors]
    file: Path | None = None  # of a snapshot


class InPlaceFollower:
    """Brings a model to the end of a ledger, to the bits that a `Replica` would be rounded to.

    Parameters
    ----------
    layout, parameters
        Of the model, which is at its base.
    bases
        Yields ways to read m_0, tensor by tensor, the cheapest first. Called whenever the model
        has been changed.
    dtype
        Of the model.
    """

    def __init__(
        self,
        layout: Layout,
        parameters: Mapping[str, torch.nn.Parameter],
        bases: Callable[[], Iterator[Callable[[], Tensors]]],
        dtype: str = "float32",
    ) -> None:
        """Compute nothing yet."""
        self.layout = layout
        self.parameters = parameters
        self.bases = bases
        self.dtype = dtype
        self._base: Reached | None = None
        self._at: tuple[Reached, str, list[int]] | None = None  # behind which ledger, unchanged

    def from_base(self) -> Reached:
        """Return which base the model has; it stays where it is."""
        if self._base is None:
            read = next(self.bases())
            total = sum(fingerprint_part(m, i, self.layout) for i, m in enumerate(read()))
            base = fingerprint_text(total)
            header = Header(self.layout.fingerprint, self.layout.size, base, self.dtype)
            self._base = Reached(header, base)
        return self._base

    def follow(self, ledger: Ledger, snapshots: Snapshots | None = None) -> Reached:
        """Move the model to the end of ``ledger``; see `Follower.follow` for the rest."""
        header = self.from_base().header
        ledger.header.check(header, "this model")
        if self._at and self._at == (self._at[0], ledger.head, versions(self.parameters)):
            return self._at[0]
        for start in self._starts(ledger, snapshots):
            began = time.perf_counter()
            try:
                before, after = self._move(start.read(), ledger, start.round)
                if before == start.fingerprint:
                    break
                reason = f"its fingerprint is {before}"
            except Exception as error:  # of whatever reads a file that is damaged or foreign
                reason = str(error)
            if start.file is not None and snapshots is not None:
                snapshots.remove(start.file, reason)
            else:
                log.warning("the base model cannot be read in this way: %s", reason)
        else:
            raise ReplicaError(f"the base model {header.base} cannot be read again: {reason}")
        if ledger.fingerprint and ledger.fingerprint != after:
            raise ReplicaError(
                f"the parameters after round {len(ledger)} have fingerprint {after}, the ledger "
                f"names {ledger.fingerprint}"
            )
        reached = Reached(header, after)
        self._at = reached, ledger.head, versions(self.parameters)
        seconds = time.perf_counter() - began
        worth = seconds > 4 * self.layout.size / DISK_BYTES_PER_SECOND
        if snapshots is not None and worth and len(ledger) > start.round:
            self._keep(after, snapshots)
        return reached

    def _starts(self, ledger: Ledger, snapshots: Snapshots | None) -> Iterator[_Start]:
        if snapshots is not None:
            for round, path in snapshots.paths(ledger, after=0):
                fingerprint = ledger.entries[round - 1].fingerprint
                yield _Start(round, fingerprint, partial(read_in_turn, path, self.layout), path)
        for read in self.bases():
            yield _Start(0, ledger.header.base, read)

    @torch.no_grad()
    def _move(self, tensors: Tensors, ledger: Ledger, since: int) -> tuple[str, str]:
        """Set each parameter to where ``ledger`` leads; return the fingerprints of both ends."""
        steps = [
            (entry.plan.with_seed(seed), row, entry.still)
            for entry in ledger.entries[since:]
            for seed, row in zip(entry.seeds, entry.coefficients, strict=True)
        ]
        before, after = 0, 0
        for i, (parameter, master) in enumerate(
            zip(self.parameters.values(), tensors, strict=True)
        ):
            part = fingerprint_part(master, i, self.layout)
            before += part
            for plan, row, still in steps:
                if i not in still:
                    subtract_tensor(master, i, self.layout, plan, row)
            after += fingerprint_part(master, i, self.layout) if steps else part
            parameter.copy_(torch.from_numpy(master))
        return fingerprint_text(before), fingerprint_text(after)

    def _keep(self, fingerprint: str, snapshots: Snapshots) -> None:
        """Leave a snapshot, if the model holds the canonical parameters where they can be read."""
        if all(p.dtype == torch.float32 and p.is_cpu for p in self.parameters.values()):
            snapshots.save(fingerprint, as_arrays(self.parameters.values()))


def versions(parameters: Mapping[str, torch.Tensor]) -> list[int]:
    """Return how often each parameter was written to, as torch counts it."""
    return [parameter._version for parameter in parameters.values()]
