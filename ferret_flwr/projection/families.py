"""The distributions that the elements of a random basis are drawn from.

Each is symmetric about zero, so E v = 0, with E v² = ρ. A basis of a block of ``b`` elements obeys
the paper’s bound ‖v‖ ≤ 1 (signs do so after scaling by 1/√b, which the factor 1/ρ absorbs).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

GROUP = 128  # elements that share one Philox counter; a block is a whole number of groups


@dataclass(frozen=True)
class Family:
    """One distribution of basis elements.

    Attributes
    ----------
    code
        What kernels know the family by.
    second_moment
        ρ = E v² of an element, as a function of the block size ``b``.
    """

    code: int
    second_moment: Callable[[int], float]


def _truncated_normal_second_moment(block_size: int) -> float:
    """Return ρ of N(0, 1) cut at ±1/√b (paper, Section 3.1), about 1/(3 b).

    The ratio of the two integrals' Taylor series: the closed form loses all its digits to
    cancellation when b is large, the series is exact to float64 for b ≥ 128.
    """
    a2 = 1.0 / block_size
    numerator = a2 * (1 / 3 - a2 * (1 / 10 - a2 * (1 / 56 - a2 * (1 / 432 - a2 / 4224))))
    denominator = 1 - a2 * (1 / 6 - a2 * (1 / 40 - a2 * (1 / 336 - a2 / 3456)))
    return numerator / denominator


def truncated_normal_scale(block_size: int) -> float:
    """Return √(π/2)·erf(1/√(2b)): an element is T(scale·t) for t uniform on (−1, 1).

    T is the Taylor series of √2·erf⁻¹, four terms of which are exact to float32 for b ≥ 128.
    """
    return math.sqrt(math.pi / 2) * math.erf(math.sqrt(0.5 / block_size))


FAMILIES: dict[str, Family] = {
    "rademacher": Family(code=0, second_moment=lambda block_size: 1.0),
    "truncated-normal": Family(code=1, second_moment=_truncated_normal_second_moment),
}
