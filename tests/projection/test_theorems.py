"""What the mathematics promises: unbiased, of known variance, linear, independent between blocks.

Statistical checks allow five standard errors, from K, d and the number of draws; each is shown
to reject a wrong scale or a wrong seed.
"""

import math

import numpy as np
import pytest

from ferret_flwr.projection import projection
from ferret_flwr.projection.allocation import (
    ALLOCATIONS,
    allocate,
    expected_fidelity,
    expected_squared_error,
)
from ferret_flwr.projection.families import FAMILIES
from ferret_flwr.projection.kernels import reference
from ferret_flwr.projection.layout import Blocks, Layout
from ferret_flwr.projection.plan import RoundPlan

BLOCK = 128
DRAWS = 4000


def make(family, size, bases, seed=0):
    """Return the layout of one tensor and a plan with blocks of 128 elements."""
    blocks = Blocks(size, BLOCK)
    return Layout(("w",), ((size,),)), RoundPlan(1, seed, family, blocks, np.array(bases))


def update(size, seed=0):
    return np.random.default_rng(seed).standard_normal(size).astype(np.float32)


def energies_of(delta):
    return np.add.reduceat(delta.astype(np.float64) ** 2, np.arange(0, delta.size, BLOCK))


def reconstruct(layout, plan, coefficients):
    zeros = np.zeros(layout.size, dtype=np.float32)
    projection.subtract([zeros], layout, plan, np.asarray(coefficients, dtype=np.float32))
    return -zeros


def estimates(layout, plan, delta, draws, other_seed=0):
    """Return Δ̂ for each of ``draws`` seeds: ``(draws, d)``."""
    rows = []
    for seed in range(draws):
        gamma = projection.project([delta], layout, plan.with_seed(seed))
        other = plan.with_seed(seed + other_seed)
        rows.append(reconstruct(layout, other, gamma * plan.unbiased_scale()))
    return np.array(rows)


def kurtosis(family):
    """Return κ = E v⁴ / ρ²."""
    if family == "rademacher":
        return 1.0
    nodes, weights = np.polynomial.legendre.leggauss(24)
    density = weights * np.exp(-(nodes**2) / BLOCK / 2)
    fourth, second = ((nodes**p * density).sum() / density.sum() for p in (4, 2))
    return float(fourth / second**2)


def squared_error(family, delta, plan):
    """Return E‖Δ̂ − Δ‖² = Σ_l (‖Δ_l‖²/K_l) (d_l − 2 + κ).

    The covariance of one v (v·Δ)/ρ is ‖Δ‖² I + ΔΔᵀ + (κ − 3) diag(Δ²); this is its trace.
    """
    factor = plan.blocks.lengths - 2 + kurtosis(family)
    return float((energies_of(delta) * factor / plan.bases_per_block).sum())


@pytest.mark.parametrize("family", FAMILIES)
def test_reconstruction_is_unbiased_with_the_scale(family):
    delta = update(300)
    layout, plan = make(family, 300, [2, 1, 3])
    starts = np.arange(0, 300, BLOCK)

    def along(a):  # <a, Δ>/‖Δ_l‖² per block
        return np.add.reduceat(a * delta, starts) / energies_of(delta)

    fourth = np.add.reduceat(delta.astype(np.float64) ** 4, starts) / energies_of(delta) ** 2
    along_spread = np.sqrt((2 + (kurtosis(family) - 3) * fourth) / plan.bases_per_block / DRAWS)
    trace = squared_error(family, delta, plan) / DRAWS
    largest = (2 * energies_of(delta) / plan.bases_per_block).max() / DRAWS  # eigenvalue
    spread = math.sqrt(2 * largest * trace)  # of ‖mean − Δ‖²

    def unbiased(mean):
        # Along Δ, where a wrong scale shows, and in all directions together.
        weights = 1 / along_spread**2
        error = (weights * (along(mean) - 1)).sum() / weights.sum()
        return abs(error) <= 5 / math.sqrt(weights.sum()) and (
            ((mean - delta) ** 2).sum() <= trace + 5 * spread
        )

    mean = estimates(layout, plan, delta, DRAWS).mean(axis=0)
    assert unbiased(mean)
    assert not unbiased(3 * mean)
    assert not unbiased(0.9 * mean)
    assert not unbiased(estimates(layout, plan, delta, DRAWS, other_seed=1).mean(axis=0))


def mean_is(values, expected):
    """Return whether the mean of ``values`` is ``expected`` to five standard errors."""
    return abs(values.mean() - expected) <= 5 * values.std(ddof=1) / math.sqrt(values.size)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("allocation", ALLOCATIONS)
def test_squared_error_is_as_predicted(family, allocation):
    size = 5 * BLOCK + 40
    delta = update(size) * np.repeat(np.float32([1, 3, 0.3, 1, 2, 1]), BLOCK)[:size]
    blocks = Blocks(size, BLOCK)
    counts = allocate(allocation, energies_of(delta), blocks, total=24, cap=8)
    layout, plan = make(family, size, counts)

    errors = ((estimates(layout, plan, delta, DRAWS) - delta) ** 2).sum(axis=1)
    predicted = squared_error(family, delta, plan)
    assert mean_is(errors, predicted)
    for factor in (3, 0.9):
        assert not mean_is(errors, factor * predicted)
        assert not mean_is(factor * errors, predicted)

    published = expected_squared_error(energies_of(delta), blocks, counts)
    excess = (kurtosis(family) - 1) * (energies_of(delta) / counts).sum()
    assert published + excess == pytest.approx(predicted)
    assert excess <= 0.8 * published / (blocks.lengths.min() - 1)


@pytest.mark.parametrize("family", FAMILIES)
def test_expected_squared_error_leaves_out_the_fourth_moment(family):
    """On a block of three elements κ shows: signs have none, the truncated normal 9/5."""
    delta, bases = update(3), np.array([2])
    layout, plan = make(family, 3, bases)
    errors = ((estimates(layout, plan, delta, DRAWS) - delta) ** 2).sum(axis=1)
    assert mean_is(errors, squared_error(family, delta, plan))
    published = expected_squared_error(energies_of(delta), plan.blocks, bases)
    assert mean_is(errors, published) == (family == "rademacher")


def test_expected_fidelity_is_the_cosine_of_the_reconstruction():
    size = 8 * BLOCK
    delta = update(size)
    layout, plan = make("rademacher", size, np.full(8, 16))
    rows = estimates(layout, plan, delta, 200)
    cosines = rows @ delta / np.linalg.norm(rows, axis=1) / np.linalg.norm(delta)
    fidelity = expected_fidelity(energies_of(delta), plan.blocks, plan.bases_per_block)
    # A ratio of two noisy norms, so the mean is off by a relative 1/K at most.
    assert cosines.mean() == pytest.approx(fidelity, rel=1 / plan.num_coefficients + 5e-3)
    assert 0.9 * cosines.mean() != pytest.approx(fidelity, rel=2e-2)
    assert fidelity == pytest.approx(math.sqrt(128 / size), rel=0.1)


@pytest.mark.parametrize("family", FAMILIES)
def test_error_falls_as_one_over_k(family):
    delta = update(2 * BLOCK)
    counts, draws = np.array([1, 4, 16, 64]), 500
    errors = []
    for count in counts:
        layout, plan = make(family, delta.size, [count, count])
        rows = estimates(layout, plan, delta, draws)
        errors.append(((rows - delta) ** 2).sum(axis=1))
    x = np.log(counts) - np.log(counts).mean()
    relative = [e.std(ddof=1) / e.mean() / math.sqrt(draws) for e in errors]
    tolerance = 5 * math.sqrt(((x * relative) ** 2).sum()) / (x**2).sum()
    assert tolerance < 0.2

    def falls(values):
        slope = (x * np.log([v.mean() for v in values])).sum() / (x**2).sum()
        return abs(slope + 1) <= tolerance

    assert falls(errors)
    assert not falls([np.sqrt(e) for e in errors])
    assert not falls([errors[0]] * len(counts))  # K times the same basis


@pytest.mark.parametrize("family", FAMILIES)
def test_projection_and_reconstruction_are_adjoint(family):
    delta = update(1009)
    layout, plan = make(family, 1009, np.resize([1, 3, 2], 8))
    c = update(plan.num_coefficients, seed=1).astype(np.float64)

    def adjoint(gamma, reconstruction):
        left, right = gamma @ c, reconstruction.astype(np.float64) @ delta
        size = np.abs(reconstruction) @ np.abs(delta) + np.abs(gamma) @ np.abs(c)
        return abs(left - right) <= 4 * 2.0**-24 * math.sqrt(BLOCK) * size

    gamma, reconstruction = (
        projection.project([delta], layout, plan),
        reconstruct(layout, plan, c),
    )
    assert adjoint(gamma, reconstruction)
    assert not adjoint(gamma, 3 * reconstruction)
    assert not adjoint(gamma, 0.9 * reconstruction)
    assert not adjoint(gamma, reconstruct(layout, plan.with_seed(1), c))


@pytest.mark.parametrize("family", FAMILIES)
def test_projection_is_linear(family):
    layout, plan = make(family, 1009, np.resize([1, 3, 2], 8))
    a, b = update(1009), update(1009, seed=1)
    gamma_a, gamma_b = (projection.project([x], layout, plan) for x in (a, b))
    scaled = projection.project([np.float32(0.25) * a], layout, plan)
    np.testing.assert_array_equal(scaled, 0.25 * gamma_a)  # a power of two is exact
    np.testing.assert_array_equal(projection.project([-a], layout, plan), -gamma_a)

    both = projection.project([a + b], layout, plan)
    tolerance = 4 * 2.0**-24 * BLOCK * (np.abs(a).max() + np.abs(b).max())
    largest = 1 if family == "rademacher" else 1 / math.sqrt(BLOCK)
    np.testing.assert_allclose(both, gamma_a + gamma_b, rtol=0, atol=tolerance * largest)
    assert np.abs(both - gamma_a - 0.9 * gamma_b).max() > tolerance * largest

    zeros = projection.project([np.zeros_like(a)], layout, plan)
    assert not zeros.any()
    changed = projection.project([a], layout, plan, [b])
    np.testing.assert_array_equal(changed, projection.project([a - b], layout, plan))


@pytest.mark.parametrize("family", FAMILIES)
def test_bases_of_blocks_indices_and_rounds_are_uncorrelated(family):
    half = update(BLOCK)
    layout, plan = make(family, 2 * BLOCK, [2, 2])
    gammas = np.array(
        [
            projection.project([np.tile(half, 2)], layout, plan.with_seed(seed))
            for seed in range(DRAWS)
        ]
    )

    def independent(a, b):
        return abs(np.corrcoef(a, b)[0, 1]) <= 5 / math.sqrt(len(a))

    for i in range(4):
        for j in range(i):
            assert independent(gammas[:, i], gammas[:, j])
        assert independent(gammas[1:, i], gammas[:-1, i])
        assert not independent(gammas[:, i], gammas[:, i])  # a basis shared by two blocks


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_do_not_touch_each_other(family):
    delta = update(1009)
    layout, plan = make(family, 1009, np.resize([1, 3, 2], 8))
    before = projection.project([delta], layout, plan)
    other = delta.copy()
    other[3 * BLOCK : 4 * BLOCK] += 1
    after = projection.project([other], layout, plan)
    inside = np.zeros(plan.num_coefficients, dtype=bool)
    inside[plan.offsets[3] : plan.offsets[4]] = True
    np.testing.assert_array_equal(before[~inside], after[~inside])
    assert (before[inside] != after[inside]).all()

    c = np.where(inside, 1.0, 0.0)
    reconstruction = reconstruct(layout, plan, c)
    assert np.flatnonzero(reconstruction).min() >= 3 * BLOCK
    assert np.flatnonzero(reconstruction).max() < 4 * BLOCK


def test_unbiased_scale_is_one_over_rho_k():
    _, plan = make("truncated-normal", 300, [2, 1, 3])
    rho = FAMILIES["truncated-normal"].second_moment(BLOCK)
    expected = np.array([1 / 2, 1 / 2, 1, 1 / 3, 1 / 3, 1 / 3]) / rho
    np.testing.assert_allclose(plan.unbiased_scale(), expected, rtol=1e-15)


def test_a_basis_has_unit_bound_in_its_block():
    for family, scale in (("rademacher", 1 / math.sqrt(BLOCK)), ("truncated-normal", 1.0)):
        _, plan = make(family, 1009, np.ones(8, dtype=np.int64))
        v = reference.basis_elements(plan, 0, 0, 1009).astype(np.float64)
        norms = np.sqrt(energies_of(v.astype(np.float32))) * scale
        assert norms.max() <= 1 + 1e-12
        assert (2 * norms).max() > 1
