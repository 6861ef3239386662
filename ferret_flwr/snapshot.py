"""Parameters on a node's disk, so that a new process need not replay a long ledger.

A snapshot is a cache. Its name is the fingerprint of what is in it, which is compared when it is
read, so deleting or damaging one at any time changes no result.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from ferret_flwr.files import atomic_file
from ferret_flwr.ledger import Ledger
from ferret_flwr.projection.arrays import Array, to_host
from ferret_flwr.projection.layout import Layout
from ferret_flwr.replica import Replica

log = logging.getLogger(__name__)

KEPT = 2  # a node behind the others may still need the one before the newest


class Snapshots:
    """The snapshots of one run in a folder, which several nodes of a machine may share.

    Parameters
    ----------
    folder
        Where they lie; it need not exist.
    """

    def __init__(self, folder: Path) -> None:
        """Touch nothing yet."""
        self.folder = folder

    def newest(
        self,
        ledger: Ledger,
        layout: Layout,
        dtype: str,
        *,
        after: int,
        place: Callable[[Sequence[Array]], Sequence[Array]] = list,
    ) -> Replica | None:
        """Return the replica at the latest round that has a snapshot, None if there is none.

        Parameters
        ----------
        ledger
            Its entries name the fingerprints that will do.
        layout, dtype
            Of the model.
        after
            Rounds up to this one are of no use.
        place
            Moves the arrays to where the replica is to live.
        """
        for round, path in self.paths(ledger, after=after):
            try:
                return Replica.at(ledger.until(round), layout, place(_load(path, layout)), dtype)
            except Exception as error:  # of what NumPy makes of a damaged header, too
                self.remove(path, str(error))
        return None

    def paths(self, ledger: Ledger, *, after: int) -> Iterator[tuple[int, Path]]:
        """Yield rounds behind ``after`` that have a snapshot, and its file, the latest first."""
        there = {path.stem: path for path in self.folder.glob("*.npy")}
        for round in range(len(ledger), after, -1):
            path = there.get(ledger.entries[round - 1].fingerprint)
            if path is not None:
                yield round, path

    def remove(self, path: Path, reason: str) -> None:
        """Remove a snapshot that is not what its name says."""
        log.warning("the snapshot '%s' is not valid and is removed: %s", path, reason)
        path.unlink(missing_ok=True)

    def save(self, fingerprint: str, arrays: Sequence[np.ndarray]) -> None:
        """Write parameters and remove older snapshots; a full disk is only logged."""
        path = self.folder / f"{fingerprint}.npy"
        try:
            _save(path, arrays)
            by_age = sorted(self.folder.glob("*.npy"), key=lambda p: p.stat().st_mtime)
            for old in by_age[:-KEPT]:
                old.unlink(missing_ok=True)
        except OSError as error:
            log.warning("cannot write the snapshot '%s': %s", path, error.strerror)


def _save(path: Path, arrays: Sequence[Array]) -> None:
    """Write ``arrays`` behind each other as one vector, without a copy of it in memory."""
    shape = (sum(math.prod(array.shape) for array in arrays),)
    with atomic_file(path, durable=False) as file:
        np.lib.format.write_array_header_1_0(
            file, {"descr": "<f4", "fortran_order": False, "shape": shape}
        )
        for array in arrays:
            file.write(np.ascontiguousarray(to_host(array)).data)


def read_in_turn(path: Path, layout: Layout) -> Iterator[np.ndarray]:
    """Yield each tensor of a snapshot in memory of its own; nothing is mapped.

    Raises
    ------
    ValueError
        If the file does not hold a model of ``layout``.
    """
    with path.open("rb") as file:
        np.lib.format.read_magic(file)
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
        if dtype != np.float32 or shape != (layout.size,):
            raise ValueError(f"it holds {dtype} {shape}, not float32 ({layout.size},)")
        for shape in layout.shapes:
            yield np.fromfile(file, dtype=np.float32, count=math.prod(shape)).reshape(shape)


def _load(path: Path, layout: Layout) -> list[np.ndarray]:
    """Map the file into memory; what is changed there never reaches the disk."""
    vector = np.lib.format.open_memmap(path, mode="c").view(np.ndarray)
    if vector.dtype != np.float32 or vector.shape != (layout.size,):
        raise ValueError(f"it holds {vector.dtype} {vector.shape}, not float32 ({layout.size},)")
    parts = np.split(vector, layout.offsets[1:-1])
    return [part.reshape(shape) for part, shape in zip(parts, layout.shapes, strict=True)]
