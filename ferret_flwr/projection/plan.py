"""One round's bases: which seed, which family, how many for each block."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from ferret_flwr.projection.families import FAMILIES
from ferret_flwr.projection.layout import AnyBlocks, InterleavedBlocks

MOST_BASES = 2**31 - 1  # of a round
NUMBERS = ("float32", "float16", "int8")  # formats of a coefficient, see `encoding`
EXACT_NUMBERS = NUMBERS[0]


class PlanError(ValueError):
    """A plan, or coefficients for it, are not valid."""


@dataclass(frozen=True, eq=False)
class RoundPlan:
    """Everything that defines the random bases V of one round.

    Attributes
    ----------
    round
        1 for the first.
    seed
        Below 2⁶³. Basis element i of basis k is a pure function of ``(seed, k, i)``.
    family
        A key of ``FAMILIES``.
    blocks
        How the projected part of 0..d-1 is cut, which comes first.
    bases_per_block
        K_l of contiguous blocks, at least 1 each: int64, ``(L,)``. Interleaved ones have 1 each,
        and take None.
    exact
        How many elements follow that are not projected: each has a coefficient of its own.
    numbers
        How coefficients cross the wire: one of ``NUMBERS``.
    """

    round: int
    seed: int
    family: str
    blocks: AnyBlocks
    bases_per_block: np.ndarray | None = None
    exact: int = 0
    numbers: str = EXACT_NUMBERS

    def __post_init__(self) -> None:
        """Check what the kernels rely on."""
        if self.family not in FAMILIES:
            raise PlanError(f"family must be one of {', '.join(FAMILIES)}, got '{self.family}'")
        if not 0 <= self.seed < 2**63:
            raise PlanError(f"seed must be in 0..2^63-1, got {self.seed}")
        if self.numbers not in NUMBERS:
            raise PlanError(f"numbers must be one of {', '.join(NUMBERS)}, got '{self.numbers}'")
        if self.exact < 0:
            raise PlanError(f"the number of exact elements must be 0 or more, got {self.exact}")
        if self.interleaved != (self.bases_per_block is None):
            raise PlanError("bases per block are for contiguous blocks, and only for them")
        if self.bases_per_block is None:
            if self.blocks.count > MOST_BASES:
                raise PlanError(
                    f"a round has at most {MOST_BASES} bases, got {self.blocks.count} blocks"
                )
            return
        if not np.issubdtype(self.bases_per_block.dtype, np.integer):
            raise PlanError(f"bases per block must be integers, got {self.bases_per_block.dtype}")
        counts = np.ascontiguousarray(self.bases_per_block, dtype=np.int64)
        if counts.shape != (self.blocks.count,) or counts.min() < 1:
            raise PlanError(
                f"bases per block must be {self.blocks.count} numbers of at least 1, got "
                f"{counts.size} numbers from {counts.min(initial=0)}"
            )
        if counts.sum(dtype=np.float64) > MOST_BASES:  # in integers it could wrap around
            raise PlanError(
                f"a round has at most {MOST_BASES} bases, got {counts.max()} in a block"
            )
        object.__setattr__(self, "bases_per_block", counts)

    @property
    def interleaved(self) -> bool:
        """Return whether a block is spread over the index space."""
        return isinstance(self.blocks, InterleavedBlocks)

    @cached_property
    def offsets(self) -> np.ndarray:
        """Position of each block's first coefficient, then K: int64, ``(L + 1,)``."""
        return np.concatenate([[0], np.cumsum(self.counts)])

    @cached_property
    def counts(self) -> np.ndarray:
        """Return K_l of any blocks: int64, ``(L,)``."""
        if self.bases_per_block is None:
            return np.ones(self.blocks.count, dtype=np.int64)
        return self.bases_per_block

    @property
    def size(self) -> int:
        """Return d, projected elements and exact ones."""
        return self.blocks.size + self.exact

    @property
    def num_bases(self) -> int:
        """Return K = Σ K_l."""
        return self.blocks.count if self.interleaved else int(self.offsets[-1])

    @property
    def num_coefficients(self) -> int:
        """Return K and a number for each exact element."""
        return self.num_bases + self.exact

    @property
    def second_moment(self) -> float:
        """Return ρ = E v² of the family at this block size."""
        return FAMILIES[self.family].second_moment(self.blocks.block_size)

    def unbiased_scale(self) -> np.ndarray:
        """Return 1/(ρ K_l) (paper, Eq. 6), then ones for exact elements: float64, ``(K + E,)``."""
        scale = np.repeat(1 / (self.second_moment * self.counts), self.counts)
        return np.concatenate([scale, np.ones(self.exact)]) if self.exact else scale

    def with_seed(self, seed: int) -> RoundPlan:
        """Return the same plan with the bases of another ``seed``."""
        return replace(self, seed=seed)

    def check_coefficients(self, coefficients: np.ndarray, owner: str = "coefficients") -> None:
        """Raise `PlanError` unless ``coefficients`` are as many finite numbers as there must be."""
        if coefficients.shape != (self.num_coefficients,):
            raise PlanError(
                f"{owner}: round {self.round} has K = {self._counted()} coefficients, "
                f"got shape {coefficients.shape}"
            )
        finite = np.isfinite(coefficients)
        if not finite.all():
            raise PlanError(
                f"{owner}: {np.count_nonzero(~finite)} of {finite.size} coefficients are not "
                f"finite, the first at {int(np.argmin(finite))}"
            )

    def _counted(self) -> str:
        return f"{self.num_bases}" + (f" + {self.exact} exact" if self.exact else "")
