"""(ε, δ) by the library, held against the exact value of a Gaussian mechanism."""

import math

import pytest

from ferret_flwr.accounting import epsilon


def cdf(x: float) -> float:
    """Return Φ, precise in the tails."""
    return 0.5 * math.erfc(-x / math.sqrt(2))


def exact(multiplier: float, delta: float) -> float:
    """Return ε of a Gaussian mechanism (Balle and Wang, 2018, Theorem 8), by bisection."""
    low, high = 0.0, 600.0
    for _ in range(100):
        e = (low + high) / 2
        told = cdf(0.5 / multiplier - e * multiplier) - math.exp(e) * cdf(
            -0.5 / multiplier - e * multiplier
        )
        low, high = (e, high) if told > delta else (low, e)
    return high


@pytest.mark.parametrize("delta", [1e-5, 1e-3])
@pytest.mark.parametrize("rounds", [1, 30])
@pytest.mark.parametrize("multiplier", [0.7, 2.0, 20.0])
def test_rounds_are_one_mechanism(multiplier: float, rounds: int, delta: float) -> None:
    found = epsilon(rounds / multiplier**2, delta)
    truth = exact(multiplier / math.sqrt(rounds), delta)
    assert truth <= found < truth + 0.02


def test_the_limits() -> None:
    assert epsilon(0.0, 1e-5) == 0.0
    assert epsilon(math.inf, 1e-5) == math.inf
    assert epsilon(1 / 0.04**2, 1e-5) > epsilon(1 / 0.06**2, 1e-5)
