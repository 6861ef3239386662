"""What interleaved blocks promise beyond any blocks: an error that no structure of Δ changes."""

import math

import numpy as np
import pytest

from ferret_flwr.projection import projection
from ferret_flwr.projection.allocation import expected_fidelity, expected_squared_error
from ferret_flwr.projection.families import FAMILIES, GROUP
from ferret_flwr.projection.kernels import cpu_interleaved, reference
from ferret_flwr.projection.kernels.philox import split_key
from ferret_flwr.projection.layout import Blocks, InterleavedBlocks, Layout, LayoutError
from ferret_flwr.projection.plan import MOST_BASES, PlanError, RoundPlan

DRAWS = 1500
SIZE = 1000


def make(size, count, family="rademacher", seed=0):
    blocks = InterleavedBlocks.of(size, count)
    plan = RoundPlan(1, seed, family, blocks)
    return Layout(("w",), ((size,),)), plan


def estimates(layout, plan, delta, draws=DRAWS):
    """Return Δ̂ for each of ``draws`` seeds: ``(draws, d)``."""
    rows = np.zeros((draws, delta.size), dtype=np.float32)
    for seed, row in enumerate(rows):
        this = plan.with_seed(seed)
        gamma = projection.project([delta], layout, this)
        projection.subtract([row], layout, this, (-gamma * plan.unbiased_scale()).astype("f4"))
    return rows


def spread_out():
    return np.random.default_rng(0).standard_normal(SIZE).astype(np.float32)


def in_one_place():
    delta = np.full(SIZE, 0.01, dtype=np.float32)
    delta[40:60] = 1
    return delta


def in_one_column_of_a_matrix():
    delta = np.full((40, 25), 0.01, dtype=np.float32)
    delta[:, 3] = 1
    return delta.ravel()


UPDATES = [spread_out, in_one_place, in_one_column_of_a_matrix]


def kurtosis(family, size):
    """Return κ = E v⁴ / ρ² for a block of ``size`` elements."""
    if family == "rademacher":
        return 1.0
    nodes, weights = np.polynomial.legendre.leggauss(24)
    density = weights * np.exp(-(nodes**2) / size / 2)
    fourth, second = ((nodes**p * density).sum() / density.sum() for p in (4, 2))
    return float(fourth / second**2)


def mean_is(values, expected):
    """Return whether the mean of ``values`` is ``expected`` to five standard errors."""
    return abs(values.mean() - expected) <= 5 * values.std(ddof=1) / math.sqrt(values.size)


def squared_error(family, delta, plan):
    """Return E‖Δ̂ − Δ‖² = Σ_j Δ_j² (d − d_row(j))/L + (κ − 1) ‖Δ‖².

    Elements of one row never meet, those of two rows with probability 1/L.
    """
    count, squares = plan.blocks.count, delta.astype(np.float64) ** 2
    row = np.arange(delta.size) // count
    others = delta.size - np.bincount(row)[row]
    return float(squares @ others / count + (kurtosis(family, GROUP) - 1) * squares.sum())


@pytest.mark.parametrize("count", [50, 64, 300])
@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("family", FAMILIES)
def test_unbiased_with_the_predicted_error_whatever_the_update(family, update, count):
    delta = update()
    layout, plan = make(SIZE, count, family)
    rows = estimates(layout, plan, delta)
    errors = ((rows - delta) ** 2).sum(axis=1)
    predicted = squared_error(family, delta, plan)
    assert mean_is(errors, predicted)
    assert not mean_is(errors, 0.8 * predicted)

    along = rows @ delta / (delta @ delta)
    assert mean_is(along, 1.0)
    assert not mean_is(along, 0.9)
    bias = ((rows.mean(axis=0) - delta) ** 2).sum()
    assert bias <= 3 * predicted / DRAWS  # what the mean of that many draws is off by


def test_the_error_is_what_the_forecast_says():
    delta = in_one_place()
    _, plan = make(SIZE, 50)
    energies = np.full(50, (delta @ delta) / 50)
    forecast = expected_squared_error(energies, plan.blocks, plan.counts)
    assert forecast == pytest.approx(squared_error("rademacher", delta, plan), rel=1e-6)
    fidelity = expected_fidelity(energies, plan.blocks, plan.counts)
    assert fidelity == pytest.approx(math.sqrt(50 / SIZE))


def test_the_noise_of_a_strong_place_is_shared_by_all():
    """Contiguous blocks keep it where the update is strong, and the loss mostly curved."""
    delta, count = in_one_column_of_a_matrix(), 5
    strong = delta == 1
    layout, plan = make(SIZE, count)
    noise = ((estimates(layout, plan, delta) - delta) ** 2).mean(axis=0)
    assert noise[strong].mean() == pytest.approx(noise[~strong].mean(), rel=0.1)

    delta = np.sort(delta)
    blocks = Blocks(SIZE, 256)
    contiguous = RoundPlan(1, 0, "rademacher", blocks, np.ones(blocks.count, dtype=np.int64))
    noise = ((estimates(layout, contiguous, delta) - delta) ** 2).mean(axis=0)
    assert noise[-100:].mean() > 100 * noise[:100].mean()


@pytest.mark.parametrize("count", [SIZE, SIZE + 1, 10 * SIZE])
def test_as_many_coefficients_as_parameters_lose_nothing(count):
    delta = spread_out()
    layout, plan = make(SIZE, count)
    assert plan.num_coefficients == SIZE
    np.testing.assert_array_equal(estimates(layout, plan, delta, draws=1)[0], delta)


@pytest.mark.parametrize(("size", "count"), [(1000, 50), (1000, 300), (1009, 1000), (7, 7), (5, 1)])
def test_blocks_are_of_equal_size(size, count):
    _, plan = make(size, count)
    sizes = np.bincount(reference.block_of(plan, 0, size), minlength=count)
    np.testing.assert_array_equal(np.sort(sizes)[::-1], plan.blocks.lengths)
    assert plan.blocks.lengths.sum() == size


def test_rows_are_rotated_evenly_and_apart_from_each_other():
    count, rows = 10, 5000
    _, plan = make(rows * count, count)
    first = reference.block_of(plan, 0, rows * count).reshape(rows, count)
    offsets = first[:, 0]
    np.testing.assert_array_equal(first, (offsets[:, None] + np.arange(count)) % count)
    spread = math.sqrt(rows * 0.1 * 0.9)
    for these in (offsets, np.diff(offsets) % count):
        assert np.abs(np.bincount(these, minlength=count) - rows / count).max() <= 5 * spread
    other = reference.block_of(plan.with_seed(1), 0, rows * count)[::count]
    assert abs((other == offsets).sum() - rows / count) <= 5 * spread


def test_a_block_can_be_asked_for_from_anywhere():
    _, plan = make(1009, 37)
    whole = reference.block_of(plan, 0, 1009)
    np.testing.assert_array_equal(reference.block_of(plan, 200, 403), whole[200:403])


def test_rows_beyond_32_bits_have_offsets_of_their_own():
    size = 2**42 + 3
    plan = RoundPlan(1, 0, "rademacher", InterleavedBlocks(size, 512))
    near, far = (reference.block_of(plan, s, s + 512 * 64)[::512] for s in (0, 2**41))
    assert not np.array_equal(near, far)


@pytest.mark.parametrize(("size", "count"), [(5, 6), (5, 0)])
def test_more_blocks_than_elements_are_refused(size, count):
    with pytest.raises(LayoutError, match=f"at most one for each of the {size} elements"):
        InterleavedBlocks(size, count)


def test_bases_per_block_are_for_contiguous_blocks_only():
    for blocks, counts in (
        (InterleavedBlocks(1000, 3), np.ones(3, int)),
        (Blocks(1000, 512), None),
    ):
        with pytest.raises(PlanError, match="for contiguous blocks, and only for them"):
            RoundPlan(1, 0, "rademacher", blocks, counts)


def test_a_plan_of_any_size_costs_nothing_before_it_is_used():
    plan = RoundPlan(1, 0, "rademacher", InterleavedBlocks(10**12, MOST_BASES))
    assert plan.num_coefficients == MOST_BASES  # whose K_l would take 17 GB
    with pytest.raises(PlanError, match=f"at most {MOST_BASES} bases, got {MOST_BASES + 1} blocks"):
        RoundPlan(1, 0, "rademacher", InterleavedBlocks(10**12, MOST_BASES + 1))


@pytest.mark.parametrize("count", [1, 3, 512, 8191, 2**31 - 1])
@pytest.mark.parametrize("start", [0, 2**31 - 2, 2**41 + 7, 2**62])
def test_runs_are_those_of_the_reference(start, count):
    plan = RoundPlan(1, 2**62 + 5, "rademacher", InterleavedBlocks(2**62 + 2**20, count))
    key = tuple(map(np.uint32, split_key(plan.seed)))
    expected, index = reference.block_of(plan, start, start + 3000), start
    found = []
    while index < start + 3000:
        block, run = cpu_interleaved._run(index, start + 3000, count, *key)
        found.extend(range(block, block + run))
        index += run
    np.testing.assert_array_equal(found, expected)
