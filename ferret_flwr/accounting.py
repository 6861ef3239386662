"""What the published rounds have told about a node, as (ε, δ).

Every round releases a vector with Gaussian noise of standard deviation σ, whose sensitivity is s.
Rounds with noise multipliers z_t = σ_t / s_t are together exactly as private as one Gaussian
mechanism with 1 / z² = Σ 1 / z_t², also if a round depends on what the earlier ones released (Dong
et al., 2022, Theorem 3.2 and Corollary 3.3). So Σ 1 / z_t² is all that must be remembered.
"""

from __future__ import annotations

import math
import warnings

from ferret_flwr.config import ConfigError

SMALLEST_MULTIPLIER = 0.05  # below it the tight accountant needs gigabytes


def check_library() -> None:
    """Raise `ConfigError` if the accountants are not installed."""
    try:
        import opacus  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            "'privacy.mechanism' needs Opacus to account for what is told: "
            "pip install 'ferret-flwr[privacy]'"
        ) from error


def epsilon(spent: float, delta: float) -> float:
    """Return an upper bound of ε, by Opacus.

    Parameters
    ----------
    spent
        Σ 1 / z_t², infinite if a round had no noise.
    delta
        The probability with which ε may be exceeded.

    Returns
    -------
    float
        No sampling of nodes is taken into account. At most 0.02 above the exact value where that is
        some 280 or less, and some percent above it beyond.
    """
    if not spent:
        return 0.0
    if not math.isfinite(spent):
        return math.inf
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's, on import
        from opacus.accountants import PRVAccountant, RDPAccountant
    multiplier = 1 / math.sqrt(spent)
    tight = multiplier >= SMALLEST_MULTIPLIER
    accountant = PRVAccountant() if tight else RDPAccountant()
    accountant.history = [(multiplier, 1.0, 1)]
    return float(accountant.get_epsilon(delta))
