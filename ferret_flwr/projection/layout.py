"""Named tensors as one index space 0..d-1, cut into blocks of equal size."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from ferret_flwr.projection.families import GROUP


class LayoutError(ValueError):
    """Tensors do not have the layout that was asked for."""


@dataclass(frozen=True, eq=False)
class Pieces:
    """What one of several processes holds of a model that is sharded over them.

    Attributes
    ----------
    first, size
        First element, and number of elements that follow it, of each tensor here: ``(T,)`` each.
    counted
        Whether what is here counts in sums over all processes, as it must in exactly one of those
        that hold the same elements: ``(T,)``.
    add_up
        Returns the sum of the arrays that all processes call it with, the same bits in each:
        float64, or uint64 modulo 2⁶⁴.
    """

    first: tuple[int, ...]
    size: tuple[int, ...]
    counted: tuple[bool, ...]
    add_up: Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Layout:
    """The order and the shapes of a model's trainable tensors.

    Attributes
    ----------
    names, shapes
        One per tensor, in ``named_parameters()`` order, tied tensors once.
    exact
        How many of the tensors, the last ones, are not projected but sent as they are.
    beside
        Digest of what else must be the same for two models to be alike, "" if nothing must.
    pieces
        What this process holds of the tensors, None if it holds all of each.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    exact: int = 0
    beside: str = ""
    pieces: Pieces | None = None

    def __post_init__(self) -> None:
        """Check that something is left to project."""
        if not 0 <= self.exact < max(1, len(self.names)):
            raise LayoutError(
                f"of {len(self.names)} tensors, {self.exact} cannot be exact: at least one is to "
                "be projected"
            )

    @classmethod
    def of(cls, tensors: Mapping[str, Any]) -> Layout:
        """Return the layout of ``tensors``, anything with a ``shape``."""
        shapes = tuple(tuple(int(n) for n in tensor.shape) for tensor in tensors.values())
        return cls(tuple(tensors), shapes)

    @cached_property
    def offsets(self) -> np.ndarray:
        """Index of each tensor's first element, then d: int64, one longer than ``names``."""
        sizes = [math.prod(shape) for shape in self.shapes]
        return np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])

    @cached_property
    def here(self) -> np.ndarray:
        """Index of the first element of each tensor here, and of the one behind: ``(T, 2)``."""
        if self.pieces is None:
            return np.stack([self.offsets[:-1], self.offsets[1:]], axis=1)
        start = self.offsets[:-1] + np.array(self.pieces.first, dtype=np.int64)
        return np.stack([start, start + np.array(self.pieces.size, dtype=np.int64)], axis=1)

    def counts(self, tensor: int) -> bool:
        """Return whether what is here of a tensor counts in sums over all processes."""
        return self.pieces is None or self.pieces.counted[tensor]

    def add_up(self, array: np.ndarray) -> np.ndarray:
        """Return the sum over all processes that hold pieces, ``array`` itself if it is one."""
        return array if self.pieces is None else self.pieces.add_up(array)

    @property
    def size(self) -> int:
        """Return d, the number of elements of all tensors."""
        return int(self.offsets[-1])

    @property
    def num_projected(self) -> int:
        """Return how many tensors are projected."""
        return len(self.names) - self.exact

    @property
    def exact_size(self) -> int:
        """Return the number of elements of the exact tensors."""
        return self.size - int(self.offsets[self.num_projected])

    @cached_property
    def fingerprint(self) -> str:
        """Sixteen hexadecimal digits that change with any name, shape or order."""
        parts: list[Any] = [self.names, self.shapes]
        if self.exact or self.beside:
            parts += [self.exact, self.beside]
        text = json.dumps(parts, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def check(self, arrays: Sequence[Any]) -> None:
        """Raise `LayoutError` naming the first array that is missing or has another size."""
        if len(arrays) != len(self.names):
            raise LayoutError(f"expected {len(self.names)} tensors, got {len(arrays)}")
        sizes = (self.here[:, 1] - self.here[:, 0]).tolist()
        for name, shape, size, array in zip(self.names, self.shapes, sizes, arrays, strict=True):
            if math.prod(array.shape) != size:
                of = "here of " if self.pieces else "as "
                raise LayoutError(
                    f"tensor '{name}' must have {size} elements, {of}shape {shape}, "
                    f"got shape {tuple(array.shape)}"
                )


@dataclass(frozen=True)
class Blocks:
    """The index space 0..d-1 cut into equal blocks, the last one shorter.

    A block is a whole number of ``GROUP`` elements, so no group of random bits spans two blocks.
    """

    size: int  # d
    block_size: int  # b

    def __post_init__(self) -> None:
        """Check what the kernels rely on."""
        if self.size < 1 or self.block_size < 1 or self.block_size % GROUP:
            raise LayoutError(
                f"a block must be a multiple of {GROUP} elements, got {self.block_size} of "
                f"{self.size}"
            )

    @classmethod
    def of(cls, size: int, count: int) -> Blocks:
        """Cut ``size`` elements into at most ``count`` blocks, fewer where d is small."""
        if size < 1 or count < 1:
            raise LayoutError(f"need at least one element and one block, got {size}, {count}")
        return cls(size, math.ceil(math.ceil(size / count) / GROUP) * GROUP)

    @property
    def count(self) -> int:
        """Return L, the number of blocks."""
        return math.ceil(self.size / self.block_size)

    @property
    def lengths(self) -> np.ndarray:
        """Return d_l, the number of elements of each block: int64, ``(L,)``."""
        lengths = np.full(self.count, self.block_size, dtype=np.int64)
        lengths[-1] = self.size - (self.count - 1) * self.block_size
        return lengths


@dataclass(frozen=True)
class InterleavedBlocks:
    """The index space 0..d-1 dealt out to L blocks: rows of L elements, a block to each column.

    Each row is first rotated by a random offset of the round, see `reference.block_of`. So every
    block gets a mix of all tensors: two elements of different rows share a block with probability
    1/L, whatever the model's shapes, and two of one row never. But for that, it is the hashing of a
    count sketch with one row (Charikar et al., 2002).
    """

    size: int  # d
    count: int  # L

    def __post_init__(self) -> None:
        """Check what the kernels rely on."""
        if not 1 <= self.count <= self.size:
            raise LayoutError(
                f"interleaved blocks must be at least one and at most one for each of the "
                f"{self.size} elements, got {self.count}"
            )

    @classmethod
    def of(cls, size: int, count: int) -> InterleavedBlocks:
        """Deal out ``size`` elements to ``count`` blocks, to fewer where d is smaller."""
        if size < 1 or count < 1:
            raise LayoutError(f"need at least one element and one block, got {size}, {count}")
        return cls(size, min(count, size))

    @property
    def block_size(self) -> int:
        """Return b, the most elements of a block, but at least the 128 that a family relies on."""
        return max(GROUP, math.ceil(self.size / self.count))

    @property
    def lengths(self) -> np.ndarray:
        """Return d_l in descending order, whichever blocks the last row falls into: ``(L,)``."""
        lengths = np.full(self.count, self.size // self.count, dtype=np.int64)
        lengths[: self.size % self.count] += 1
        return lengths


AnyBlocks = Blocks | InterleavedBlocks
