"""How many bases each block gets: Σ K_l = K, each at least one.

The squared error of a reconstruction is Σ_l (d_l / K_l) ‖Δ_l‖² for signs (up to a term that no
K_l removes), so blocks in which the update has more energy ‖Δ_l‖² deserve more bases.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np

from ferret_flwr.projection.layout import AnyBlocks, Blocks, Layout
from ferret_flwr.projection.plan import PlanError


def _uniform(energies: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    return np.ones_like(energies)


def _norm(energies: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    return lengths * np.sqrt(energies)  # ‖Δ_l‖/ρ_l with ρ_l ∝ 1/d_l (paper, Proposition 2)


def _variance(energies: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    return np.sqrt(lengths * energies)  # minimises Σ (d_l/K_l) ‖Δ_l‖² at fixed Σ K_l


def _energy(energies: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    return energies


ALLOCATIONS: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "uniform": _uniform,
    "norm": _norm,
    "variance": _variance,
    "energy": _energy,
}


def allocate(
    allocation: str, energies: np.ndarray, blocks: Blocks, total: int, cap: int | None = None
) -> np.ndarray:
    """Divide ``total`` bases among the blocks.

    Parameters
    ----------
    allocation
        A key of ``ALLOCATIONS``.
    energies
        ‖Δ_l‖² of each block, or an estimate in any unit: ``(L,)``, finite, not negative.
    blocks
        The L blocks.
    total
        K, at least L.
    cap
        Most bases that one block may get. Raised to ⌈K/L⌉ where it would leave bases over.

    Returns
    -------
    numpy.ndarray
        K_l: int64, ``(L,)``, with sum ``total``.

    Raises
    ------
    PlanError
        If ``allocation`` is unknown, the energies are not valid, or ``total`` < L.
    """
    if allocation not in ALLOCATIONS:
        raise PlanError(f"allocation must be one of {', '.join(ALLOCATIONS)}, got '{allocation}'")
    energies = np.asarray(energies, dtype=np.float64)
    if energies.shape != (blocks.count,) or not np.isfinite(energies).all() or energies.min() < 0:
        raise PlanError(f"energies must be {blocks.count} finite numbers of at least 0")
    if total < blocks.count:
        raise PlanError(f"{total} bases are fewer than the {blocks.count} blocks")
    if not energies.any():
        energies = np.ones_like(energies)
    weights = ALLOCATIONS[allocation](energies, blocks.lengths.astype(np.float64))
    most = total if cap is None else max(cap, -(-total // blocks.count))
    return _round_to_total(_fill(weights, total, most), total, most)


def _fill(weights: np.ndarray, total: int, most: int) -> np.ndarray:
    """Return shares proportional to ``weights`` within [1, most] that sum to ``total``.

    The shares are clip(scale·weights, 1, most); their sum grows with the scale, so bisect it.
    """
    weights = np.maximum(weights / weights.max(), 1e-30)
    low, high = 0.0, most / weights.min()
    for _ in range(200):  # halves the interval to the last bit of float64
        scale = (low + high) / 2
        if np.clip(scale * weights, 1, most).sum() < total:
            low = scale
        else:
            high = scale
    return np.clip(high * weights, 1, most)


def _round_to_total(shares: np.ndarray, total: int, most: int) -> np.ndarray:
    """Round ``shares`` to integers in [1, most] with sum ``total``, largest remainders up."""
    counts = np.floor(shares).astype(np.int64)
    while (missing := total - int(counts.sum())) != 0:
        room = (counts < most) if missing > 0 else (counts > 1)
        remainders = np.where(room, (shares - counts) * np.sign(missing), -np.inf)
        chosen = np.argsort(-remainders, kind="stable")[: min(abs(missing), int(room.sum()))]
        counts[chosen] += np.sign(missing)
    return counts


def energies_of(update: Iterable[np.ndarray], layout: Layout, blocks: Blocks) -> np.ndarray:
    """Return ‖Δ_l‖² of each contiguous block of an ``update``: float64, ``(L,)``.

    Parameters
    ----------
    update
        Δ as tensors in layout order.
    layout
        Which tensors they are.
    blocks
        The L blocks.
    """
    energies = np.zeros(blocks.count)
    for offset, tensor in zip(layout.offsets[:-1].tolist(), update, strict=True):
        squares = np.square(tensor, dtype=np.float64).ravel()
        if squares.size:
            first = -offset % blocks.block_size  # of the tensor's elements that begins a block
            cuts = np.arange(first, squares.size, blocks.block_size)
            starts = np.unique(np.concatenate([[0], cuts]))
            within = (offset + starts) // blocks.block_size
            energies[within] += np.add.reduceat(squares, starts)
    return energies


def expected_squared_error(
    energies: np.ndarray, blocks: AnyBlocks, bases_per_block: np.ndarray
) -> float:
    """Return E‖Δ̂ − Δ‖² ≈ Σ_l (d_l/K_l) ‖Δ_l‖², in the unit of ``energies``.

    Exact for a family with E v⁴ = ρ² up to the diagonal term: (d_l − 1)/K_l for signs.
    """
    return float((energies * (blocks.lengths - 1) / bases_per_block).sum())


def expected_fidelity(
    energies: np.ndarray, blocks: AnyBlocks, bases_per_block: np.ndarray
) -> float:
    """Return cos(Δ̂, Δ) as ‖Δ‖ / √(‖Δ‖² + E‖Δ̂ − Δ‖²), about √(K/d) when all are uniform."""
    total = float(np.sum(energies))
    return float(
        np.sqrt(total / (total + expected_squared_error(energies, blocks, bases_per_block)))
    )
