"""What the server decides in a round: the plan before it, the published entry after it.

Both are pure functions of the ledger and the configuration, so a resumed run continues bit for
bit, and neither needs a model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from ferret_flwr.config import ConfigError, FerretConfig
from ferret_flwr.ledger import Entry, Ledger
from ferret_flwr.projection.allocation import allocate
from ferret_flwr.projection.encoding import encode
from ferret_flwr.projection.kernels.philox import derive_seed
from ferret_flwr.projection.layout import AnyBlocks, Blocks, InterleavedBlocks
from ferret_flwr.projection.plan import EXACT_NUMBERS, RoundPlan

PUBLISHED, SENT = 1, 2  # tell the seeds of the server's rounding from those of the nodes'


def next_plan(ledger: Ledger, config: FerretConfig, seed: int, exact: int = 0) -> RoundPlan:
    """Return the plan of the round behind the ledger's last.

    Parameters
    ----------
    ledger
        The rounds published so far; their coefficients tell which contiguous blocks have most of
        the update's energy.
    config
        How many bases, of which family, and how to allocate them.
    seed
        The run's seed.
    exact
        How many elements are not projected, see `Layout`.

    Raises
    ------
    ConfigError
        If the keys contradict each other, see `FerretConfig.contradictions`.
    """
    blocks = blocks_for(ledger.header.size - exact, config)
    number = len(ledger) + 1
    counts = None
    if isinstance(blocks, Blocks):
        counts = bases_per_block(block_energies(ledger, blocks, config), blocks, config)
    return RoundPlan(
        number,
        derive_seed(seed, number),
        config.family,
        blocks,
        counts,
        exact,
        config.number_format,
    )


def blocks_for(size: int, config: FerretConfig) -> AnyBlocks:
    """Return how ``config`` cuts ``size`` parameters.

    Raises
    ------
    ConfigError
        If the keys contradict each other, see `FerretConfig.contradictions`.
    """
    if wrong := config.contradictions():
        raise ConfigError("\n".join(wrong))
    if not config.blocks:
        return InterleavedBlocks.of(size, config.coefficients)
    return Blocks.of(size, config.blocks)


def bases_per_block(energies: np.ndarray, blocks: Blocks, config: FerretConfig) -> np.ndarray:
    """Return K_l for blocks with ``energies``, see `allocate`; only ``energy`` is capped."""
    cap = config.max_per_block if config.allocation == "energy" else None
    return allocate(config.allocation, energies, blocks, config.coefficients, cap)


def block_energies(ledger: Ledger, blocks: Blocks, config: FerretConfig) -> np.ndarray:
    """Estimate ‖Δ_l‖² of the coming round from the published coefficients of the past.

    γ² / ρ is an unbiased estimate of ‖Δ_l‖², averaged over a block's bases, then over rounds by
    an exponential moving average with a floor that keeps a block from being forgotten.

    Returns
    -------
    numpy.ndarray
        float64, ``(L,)``; all ones before the first round.
    """
    energies = None
    for entry in ledger.entries:
        if entry.plan.blocks == blocks and entry.rate > 0:
            new = _entry_energies(entry)
            keep = config.energy_decay if energies is not None else 0.0
            energies = keep * (energies if energies is not None else 0.0) + (1 - keep) * new
    if energies is None or not energies.any():
        return np.ones(blocks.count)
    return np.maximum(energies, config.energy_floor * energies.mean())


def _entry_energies(entry: Entry) -> np.ndarray:
    plan = entry.plan
    projected = entry.coefficients.astype(np.float64) / (entry.rate * plan.unbiased_scale())
    means = (projected**2).mean(axis=0)[: plan.num_bases]
    squares = np.add.reduceat(means, plan.offsets[:-1])
    return squares / (plan.counts * plan.second_moment)


def server_rate(config: FerretConfig, plan: RoundPlan, ledger: Ledger, num_rounds: int) -> float:
    """Return the server learning rate of a round, where 1 applies the average update.

    Parameters
    ----------
    config
        The rate, the factor on it while the energies of contiguous blocks are unknown, and the
        schedule.
    plan
        The coming round.
    ledger
        The rounds before it.
    num_rounds
        Length of the run, which the decaying schedules need.
    """
    adaptive = not plan.interleaved and config.allocation != "uniform"
    if adaptive and not any(entry.plan.blocks == plan.blocks for entry in ledger.entries):
        return config.server_rate * config.warmup_rate
    done = min(1.0, (plan.round - 1) / max(1, num_rounds))
    factor = {
        "constant": 1.0,
        "linear": 1.0 - done,
        "cosine": (1.0 + math.cos(math.pi * done)) / 2,
    }[config.rate_schedule]
    return config.server_rate * factor


def scaled(plan: RoundPlan, projected: np.ndarray, rate: float) -> np.ndarray:
    """Return c = rate·γ/(ρ K_l) in float32, infinite where it is too large for that.

    Parameters
    ----------
    plan
        The round's bases.
    projected
        γ: ``(..., K + E)``.
    rate
        The server learning rate.
    """
    with np.errstate(over="ignore"):
        wide = rate * np.asarray(projected, dtype=np.float64) * plan.unbiased_scale()
        return wide.astype(np.float32)


def publish(
    plan: RoundPlan,
    projected: np.ndarray,
    rate: float,
    seeds: Sequence[int] | None = None,
    still: Sequence[int] = (),
) -> Entry:
    """Fold every factor into the aggregated coefficients.

    Parameters
    ----------
    plan
        The round's bases.
    projected
        γ averaged over the clients, ``(K,)``; or, with ``seeds``, each client's γ times its
        weight in the average, ``(len(seeds), K)``.
    rate
        The server learning rate.
    seeds
        The clients' own seeds, where bases are not shared.
    still
        Positions of the tensors that no client changed.

    Returns
    -------
    Entry
        With c = rate·γ/(ρ K_l) in float32, rounded to the plan's format.

    Raises
    ------
    PlanError
        If the coefficients are not K finite numbers in float32.
    """
    rows = np.atleast_2d(np.asarray(projected, dtype=np.float64))
    for row in rows:
        plan.check_coefficients(row, owner="the aggregate")
    coefficients = scaled(plan, rows, rate)
    own = tuple(seeds) if seeds else (plan.seed,)
    if plan.numbers == EXACT_NUMBERS:
        return Entry(plan, own, coefficients, rate, still=tuple(still))
    for row in coefficients:
        plan.check_coefficients(row, owner="the aggregate in float32")
    encoded = np.stack(
        [
            encode(row, plan.numbers, derive_seed(plan.seed, PUBLISHED, i), plan.exact)
            for i, row in enumerate(coefficients)
        ]
    )
    return Entry.decoded(plan, own, encoded, rate, tuple(still))


def to_send(projected: np.ndarray, plan: RoundPlan, partition_id: int) -> np.ndarray:
    """Return a node's γ in the plan's format, see ``encoding.encode``.

    Parameters
    ----------
    projected
        γ: ``(K + E,)``.
    plan
        The round's bases, with the round's seed whether or not the node's bases are its own.
    partition_id
        Which node it is: each rounds by draws of its own, so that the errors average out.
    """
    seed = derive_seed(plan.seed, SENT, partition_id)
    return encode(projected, plan.numbers, seed, plan.exact)
