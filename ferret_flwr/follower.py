"""The one replica of a process: it goes on from message to message, or starts anew."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

from ferret_flwr.ledger import Ledger
from ferret_flwr.projection.arrays import Array
from ferret_flwr.projection.layout import Layout
from ferret_flwr.replica import Replica, ReplicaError
from ferret_flwr.snapshot import Snapshots

log = logging.getLogger(__name__)

DISK_BYTES_PER_SECOND = 1e9  # a replay that takes longer than writing at this speed is kept


class Follower:
    """Brings a replica to the end of a ledger from wherever that is nearest.

    Parameters
    ----------
    layout, dtype
        Of the model.
    base
        Returns m_0, float32 arrays in layout order that the replica may change. Called when there
        is no other way.
    place
        Moves arrays that come from a snapshot to where those of ``base`` are.
    """

    def __init__(
        self,
        layout: Layout,
        base: Callable[[], Sequence[Array]],
        dtype: str = "float32",
        place: Callable[[Sequence[Array]], Sequence[Array]] = list,
    ) -> None:
        """Load nothing yet."""
        self.layout = layout
        self.base = base
        self.dtype = dtype
        self.place = place
        self._live: Replica | None = None

    def from_base(self) -> Replica:
        """Return the replica at round 0."""
        if self._live is None or self._live.round:
            self._live = Replica(self.layout, self.base(), self.dtype)
        return self._live

    def follow(self, ledger: Ledger, snapshots: Snapshots | None = None) -> Replica:
        """Return the replica at the end of ``ledger``, the same one each time.

        Parameters
        ----------
        ledger
            The rounds published so far.
        snapshots
            Where to look for parameters nearer than the base, and where to leave them if it took
            longer to replay than it would take to write them.

        Raises
        ------
        LedgerError
            If the ledger belongs to another model.
        ReplicaError
            If the base does not lead to what the ledger names.
        """
        live = self._live if self._live and self._live.round <= len(ledger) else None
        nearest = live
        if snapshots is not None:
            after = live.round if live else 0
            found = snapshots.newest(ledger, self.layout, self.dtype, after=after, place=self.place)
            nearest = found or live
        try:
            self._live = nearest or self.from_base()
            began = time.perf_counter()
            self._live.follow(ledger)
        except ReplicaError as error:
            if nearest is None:
                raise
            log.warning("%s; the replica is built again from the base model", error)
            self._live = None
            self._live = self.from_base()
            began = time.perf_counter()
            self._live.follow(ledger)
        seconds = time.perf_counter() - began
        worth = seconds > 4 * self.layout.size / DISK_BYTES_PER_SECOND
        if snapshots is not None and ledger and worth and self._live is not live:
            snapshots.save(self._live.fingerprint, self._live.arrays)
        return self._live
