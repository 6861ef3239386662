"""How many bases each block gets: sums, bounds, proportions, and the optimum."""

import heapq

import numpy as np
import pytest

from ferret_flwr.projection.allocation import (
    ALLOCATIONS,
    allocate,
    expected_fidelity,
    expected_squared_error,
)
from ferret_flwr.projection.layout import Blocks
from ferret_flwr.projection.plan import PlanError

BLOCKS = Blocks(128 * 39 + 50, 128)  # 40, the last one shorter


def _energies(kind, count=BLOCKS.count):
    rng = np.random.default_rng(0)
    energies = {
        "equal": np.full(count, 3.0),
        "lognormal": np.exp(2 * rng.standard_normal(count)),
        "one block has nearly all": np.where(np.arange(count) == 7, 1e12, 1e-12),
        "some are zero": np.where(np.arange(count) % 3, 1.0, 0.0),
        "all are zero": np.zeros(count),
        "tiny": np.full(count, 1e-300),
    }
    return energies[kind]


KINDS = (
    "equal",
    "lognormal",
    "one block has nearly all",
    "some are zero",
    "all are zero",
    "tiny",
)


def _optimum(energies, blocks, total):
    """Return the integer K_l of least error: give each base to where it helps most."""
    cost = energies * (blocks.lengths - 1)
    counts = np.ones(blocks.count, dtype=np.int64)
    gains = [(-c / 2, i) for i, c in enumerate(cost)]  # c/1 − c/2
    heapq.heapify(gains)
    for _ in range(total - blocks.count):
        _, i = heapq.heappop(gains)
        counts[i] += 1
        heapq.heappush(gains, (-cost[i] / counts[i] / (counts[i] + 1), i))
    return counts


@pytest.mark.parametrize("cap", [None, 1, 5, 30, 10**6])
@pytest.mark.parametrize("total", [40, 41, 97, 1000, 12345])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("allocation", ALLOCATIONS)
def test_sums_to_k_with_at_least_one_and_at_most_the_cap(allocation, kind, total, cap):
    counts = allocate(allocation, _energies(kind), BLOCKS, total, cap)
    assert counts.dtype == np.int64
    assert counts.shape == (BLOCKS.count,)
    assert counts.sum() == total
    assert counts.min() >= 1
    if cap is not None:
        assert counts.max() <= max(cap, -(-total // BLOCKS.count))


@pytest.mark.parametrize("total", [40, 97, 12345])
def test_uniform_differs_by_one_at_most(total):
    counts = allocate("uniform", _energies("lognormal"), BLOCKS, total)
    assert np.ptp(counts) <= 1


@pytest.mark.parametrize("allocation", ["uniform", "energy"])
@pytest.mark.parametrize("energy", [0.0, 1e-300, 1e300])
def test_equal_energies_are_uniform(allocation, energy):
    counts = allocate(allocation, np.full(BLOCKS.count, energy), BLOCKS, total=1000)
    np.testing.assert_array_equal(counts, 25)


@pytest.mark.parametrize("allocation", ["norm", "variance"])
def test_no_energy_leaves_only_the_lengths(allocation):
    counts = allocate(allocation, np.zeros(BLOCKS.count), BLOCKS, total=1000)
    assert np.ptp(counts[:-1]) <= 1
    assert counts[-1] < counts[0]


@pytest.mark.parametrize("allocation", ALLOCATIONS)
def test_shares_are_proportional_to_the_weights(allocation):
    energies = np.random.default_rng(0).uniform(0.5, 2, BLOCKS.count)
    lengths = BLOCKS.lengths
    weights = {
        "uniform": np.ones(BLOCKS.count),
        "norm": lengths * np.sqrt(energies),
        "variance": np.sqrt(lengths * energies),
        "energy": energies,
    }

    def proportional(counts, name):
        shares = weights[name] / weights[name].sum() * counts.sum()
        return np.abs(counts - shares).max() < 1  # one unit of rounding

    counts = allocate(allocation, energies, BLOCKS, total=4000)
    assert proportional(counts, allocation)
    for other in set(weights) - {allocation}:
        assert not proportional(counts, other)


@pytest.mark.parametrize("allocation", ALLOCATIONS)
def test_the_unit_of_the_energies_does_not_matter(allocation):
    energies = _energies("lognormal")
    counts = allocate(allocation, energies, BLOCKS, total=777)
    np.testing.assert_array_equal(
        counts, allocate(allocation, 2.0**40 * energies, BLOCKS, total=777)
    )


def test_what_the_cap_takes_goes_to_the_others_in_proportion():
    energies = np.array([100.0, 2.0, 1.0, 1.0])
    counts = allocate("energy", energies, Blocks(512, 128), total=50, cap=10)
    np.testing.assert_array_equal(counts, [20 - 7, 13, 12, 12])  # raised to ⌈50/4⌉ = 13
    counts = allocate("energy", energies, Blocks(512, 128), total=50, cap=30)
    np.testing.assert_array_equal(counts, [30, 10, 5, 5])


@pytest.mark.parametrize("kind", ["equal", "lognormal", "one block has nearly all"])
@pytest.mark.parametrize("total", [40, 97, 1000, 12345])
def test_variance_minimises_the_expected_error(kind, total):
    energies = _energies(kind)
    least = expected_squared_error(energies, BLOCKS, _optimum(energies, BLOCKS, total))

    def minimal(counts):
        # d_l for d_l − 1 and largest remainders for integers cost less than a part in a hundred.
        return expected_squared_error(energies, BLOCKS, counts) <= 1.01 * least

    assert minimal(allocate("variance", energies, BLOCKS, total))
    if kind == "lognormal" and total > 40:
        for other in ("uniform", "energy"):  # norm differs in the short block alone
            assert not minimal(allocate(other, energies, BLOCKS, total))


def test_moving_one_base_never_helps_more_than_rounding():
    energies, total = _energies("lognormal"), 4000
    error = energies * (BLOCKS.lengths - 1)

    def best_move(counts):
        """Return the largest relative fall of the error by moving one base."""
        gain = error / counts - error / (counts + 1)
        loss = np.where(counts > 1, error / np.maximum(counts - 1, 1) - error / counts, np.inf)
        return (gain.max() - loss.min()) / (error / counts).sum()

    rounding = 1 / total
    assert best_move(allocate("variance", energies, BLOCKS, total)) < rounding
    assert best_move(allocate("uniform", energies, BLOCKS, total)) > rounding
    assert best_move(allocate("energy", energies, BLOCKS, total)) > rounding


def test_fidelity_grows_with_the_bases_and_is_at_most_one():
    energies = _energies("lognormal")
    fidelities = [
        expected_fidelity(energies, BLOCKS, allocate("variance", energies, BLOCKS, total))
        for total in (40, 400, 4000, 4_000_000)
    ]
    assert fidelities == sorted(fidelities)
    assert fidelities[0] > 0
    assert 0.99 < fidelities[-1] <= 1


@pytest.mark.parametrize(
    "energies",
    [
        np.ones(39),
        np.ones((40, 1)),
        np.full(40, np.nan),
        np.full(40, np.inf),
        np.where(np.arange(40) == 3, -1.0, 1.0),
    ],
    ids=["few", "shape", "nan", "inf", "negative"],
)
def test_bad_energies(energies):
    with pytest.raises(PlanError, match="energies must be 40 finite numbers of at least 0"):
        allocate("variance", energies, BLOCKS, total=100)


def test_fewer_bases_than_blocks():
    with pytest.raises(PlanError, match="39 bases are fewer than the 40 blocks"):
        allocate("uniform", np.ones(40), BLOCKS, total=39)


def test_unknown_allocation_lists_all_known():
    with pytest.raises(PlanError, match=f"{', '.join(ALLOCATIONS)}, got 'greedy'"):
        allocate("greedy", np.ones(40), BLOCKS, total=100)
