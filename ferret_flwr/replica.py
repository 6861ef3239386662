"""A model that follows the ledger: its canonical float32 parameters at some round."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ferret_flwr.ledger import Entry, Header, Ledger, LedgerError
from ferret_flwr.projection import projection
from ferret_flwr.projection.arrays import Array
from ferret_flwr.projection.layout import Layout


class ReplicaError(RuntimeError):
    """The parameters are not the ones that the ledger leads to."""


class Replica:
    """The canonical parameters m_r, with m_0 = float32(w_0) and m_r = m_{r-1} − Δ̂_r.

    Parameters
    ----------
    layout
        The names and shapes of the tensors.
    arrays
        m_0 in layout order: float32, owned and changed in place by the replica. NumPy arrays, or
        torch tensors on a GPU.
    dtype
        Of the model w_0 behind it.
    """

    def __init__(self, layout: Layout, arrays: Sequence[Array], dtype: str = "float32") -> None:
        """Take the arrays over and fingerprint them."""
        self.layout = layout
        self.arrays = list(arrays)
        self.round = 0
        self._fingerprint: str | None = None
        self.header = Header(layout.fingerprint, layout.size, self.fingerprint, dtype)

    @classmethod
    def at(
        cls, ledger: Ledger, layout: Layout, arrays: Sequence[Array], dtype: str = "float32"
    ) -> Replica:
        """Return the replica at the end of ``ledger`` from its parameters instead of the base.

        Raises
        ------
        ReplicaError
            If ``arrays`` are not the parameters that the ledger names.
        """
        replica = cls(layout, arrays, dtype)
        if not ledger.fingerprint or replica.fingerprint != ledger.fingerprint:
            raise ReplicaError(
                f"the parameters have fingerprint {replica.fingerprint}, the ledger names "
                f"{ledger.fingerprint or 'none'} after round {len(ledger)}"
            )
        replica.header = replace(replica.header, base=ledger.header.base)
        replica.round = len(ledger)
        return replica

    @property
    def fingerprint(self) -> str:
        """Return the fingerprint of the parameters as they are now."""
        if self._fingerprint is None:
            self._fingerprint = projection.fingerprint(self.arrays, self.layout)
        return self._fingerprint

    def follow(self, ledger: Ledger) -> None:
        """Apply the rounds of ``ledger`` that are still missing.

        Raises
        ------
        LedgerError
            If the ledger belongs to another model or ends before the replica's round; nothing
            has changed then.
        ReplicaError
            If the parameters before or at the end are not those that the ledger names.
        """
        ledger.header.check(self.header, "this model")
        if len(ledger) < self.round:
            raise LedgerError(f"the replica is at round {self.round}, the ledger at {len(ledger)}")
        self._check(ledger)
        for entry in ledger.entries[self.round :]:
            self._apply(entry)
        self._check(ledger)

    def _check(self, ledger: Ledger) -> None:
        expected = ledger.until(self.round).fingerprint
        if expected and expected != self.fingerprint:
            raise ReplicaError(
                f"the parameters after round {self.round} have fingerprint {self.fingerprint}, "
                f"the ledger names {expected}"
            )

    def _apply(self, entry: Entry) -> None:
        self._fingerprint = None
        for seed, coefficients in zip(entry.seeds, entry.coefficients, strict=True):
            plan = entry.plan.with_seed(seed)
            projection.subtract(self.arrays, self.layout, plan, coefficients, skip=entry.still)
        self.round = entry.round
