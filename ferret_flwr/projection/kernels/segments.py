"""Where tensors, blocks and tiles cut the index space: the pieces that a kernel walks."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np

LARGEST = 2**16  # elements; small enough to divide any model evenly among threads


@dataclass(frozen=True, eq=False)
class Segments:
    """Pieces of 0..d-1 that each lie in one tensor and one block, in order.

    Attributes
    ----------
    start, length
        First index and number of elements: int64, ``(S,)``.
    tensor, block
        Which tensor and which block the piece lies in: int64, ``(S,)``.
    within
        Offset of the piece's first element in its tensor: int64, ``(S,)``.
    """

    start: np.ndarray
    length: np.ndarray
    tensor: np.ndarray
    block: np.ndarray
    within: np.ndarray

    @classmethod
    def of_piece(
        cls, start: int, size: int, block_size: int, largest: int = LARGEST, tensor: int = 0
    ) -> Segments:
        """Cut the elements ``start..start+size-1``, which an array of their own holds."""
        stop = start + size
        inner = [np.arange(-(-start // n) * n, stop, n) for n in (block_size, largest)]
        cuts = np.unique(np.concatenate([[start], *inner, [stop]])).astype(np.int64)
        first = cuts[:-1]
        which = np.full_like(first, tensor)
        return cls(first, np.diff(cuts), which, first // block_size, first - start)

    @classmethod
    def of_pieces(cls, bounds: np.ndarray, block_size: int, largest: int = LARGEST) -> Segments:
        """Cut the elements from ``bounds[i, 0]`` to before ``bounds[i, 1]`` of each array i."""
        cut = [
            cls.of_piece(start, stop - start, block_size, largest, tensor)
            for tensor, (start, stop) in enumerate(bounds.tolist())
        ]
        return cls(*(np.concatenate([getattr(s, f.name) for s in cut]) for f in fields(cls)))

    def divide(self, cost: np.ndarray, parts: int) -> np.ndarray:
        """Return bounds of ``parts`` runs of segments of about equal ``cost``: ``(parts + 1,)``."""
        total = np.cumsum(cost)
        inner = np.searchsorted(total, cost.sum() * np.arange(1, parts) / parts)
        return np.concatenate([[0], inner, [len(cost)]]).astype(np.int64)
