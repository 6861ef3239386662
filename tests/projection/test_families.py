"""The distributions of the elements: moments, bounds, ρ, and what a basis depends on."""

import math

import numpy as np
import pytest

from ferret_flwr.projection.families import FAMILIES
from ferret_flwr.projection.kernels import reference
from ferret_flwr.projection.layout import Blocks
from ferret_flwr.projection.plan import RoundPlan

DRAWS = 2**19
TRUNCATED = FAMILIES["truncated-normal"]


def _plan(family, block_size, seed=11, size=DRAWS):
    blocks = Blocks(size, block_size)
    return RoundPlan(1, seed, family, blocks, np.ones(blocks.count, dtype=np.int64))


def _moment(family, power, block_size):
    """Return E v^power by Gauss-Legendre quadrature of the density (24 nodes: exact to float64)."""
    if family == "rademacher":
        return 1.0
    nodes, weights = np.polynomial.legendre.leggauss(24)
    x = nodes / math.sqrt(block_size)
    density = weights * np.exp(-(x**2) / 2)
    return float((x**power * density).sum() / density.sum())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("block_size", [128, 128 * 257])
def test_mean_variance_and_fourth_moment(family, block_size):
    v = reference.basis_elements(_plan(family, block_size), 0, 0, DRAWS).astype(np.float64)

    def agrees(power, values):
        if power == 1:
            expected, spread = 0.0, _moment(family, 2, block_size)
        else:
            expected = _moment(family, power, block_size)
            spread = _moment(family, 2 * power, block_size) - expected**2
        tolerance = 5 * math.sqrt(spread / DRAWS) + 1e-6 * expected  # five standard errors
        return abs((values**power).mean() - expected) <= tolerance

    for power in (1, 2, 4):
        assert agrees(power, v)
    for power in (2, 4):
        assert not agrees(power, 3 * v)
        assert not agrees(power, 0.9 * v)
    assert not agrees(1, np.abs(v))


@pytest.mark.parametrize("block_size", [128, 256, 1280, 128 * 1001, 128 * 10**6])
def test_rho_against_quadrature(block_size):
    def agrees(rho):
        return rho == pytest.approx(_moment("truncated-normal", 2, block_size), rel=1e-13, abs=0)

    rho = TRUNCATED.second_moment(block_size)
    assert agrees(rho)
    assert not agrees(rho * (1 + 1e-12))
    assert abs(rho * 3 * block_size - 1) < 1 / block_size  # the paper's ≈ 1/(3 d)
    assert FAMILIES["rademacher"].second_moment(block_size) == 1


@pytest.mark.parametrize("block_size", [128, 128 * 257])
def test_truncated_normal_obeys_the_bounds_of_the_paper(block_size):
    plan = _plan("truncated-normal", block_size)
    v = reference.basis_elements(plan, 0, 0, DRAWS)
    assert np.abs(v).max() <= np.float32(1 / math.sqrt(block_size))
    assert np.abs(v).max() > 0.99 / math.sqrt(block_size)
    norms = [np.linalg.norm(piece) for piece in np.split(v, range(block_size, DRAWS, block_size))]
    assert max(norms) <= 1


@pytest.mark.parametrize("block_size", [128, 128 * 257])
def test_truncated_normal_is_the_quantile_of_its_random_word(monkeypatch, block_size):
    words = np.linspace(0, 2**32 - 1, 4096).round().astype(np.uint32)  # both ends included
    monkeypatch.setattr(reference, "philox4x32", lambda counters, key: np.c_[[words] * 4].T)
    v = reference.basis_elements(_plan("truncated-normal", block_size), 0, 0, words.size)
    bound = 1 / math.sqrt(block_size)
    assert np.abs(v).max() <= np.float32(bound)
    cumulative = [math.erf(x / math.sqrt(2)) / math.erf(bound / math.sqrt(2)) for x in v]
    uniform = (words.astype(np.float64) + 0.5) / 2**31 - 1
    np.testing.assert_allclose(cumulative, uniform, rtol=2**-23, atol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_basis_depends_on_seed_basis_and_index(family):
    plan = _plan(family, 256, size=1024)
    v = reference.basis_elements(plan, 0, 0, 1024)
    np.testing.assert_array_equal(v[300:700], reference.basis_elements(plan, 0, 300, 700))
    others = {
        "seed": reference.basis_elements(plan.with_seed(12), 0, 0, 1024),
        "high half of the seed": reference.basis_elements(plan.with_seed(11 + 2**32), 0, 0, 1024),
        "basis": reference.basis_elements(plan, 1, 0, 1024),
        "index": reference.basis_elements(plan, 0, 128, 1152),
    }
    for name, other in others.items():
        correlation = np.corrcoef(v, other)[0, 1]
        assert abs(correlation) < 5 / math.sqrt(1024), name
    assert np.corrcoef(v, v)[0, 1] > 5 / math.sqrt(1024)


def test_signs_do_not_depend_on_the_blocks():
    one, many = (_plan("rademacher", b, size=1024) for b in (1024, 128))
    np.testing.assert_array_equal(
        reference.basis_elements(one, 3, 0, 1024), reference.basis_elements(many, 3, 0, 1024)
    )


def test_truncated_normals_depend_on_the_block_size_by_their_scale_only():
    one, many = (_plan("truncated-normal", b, size=1024) for b in (1024, 128))
    wide, narrow = (reference.basis_elements(plan, 3, 0, 1024) for plan in (many, one))
    np.testing.assert_array_equal(np.sign(wide), np.sign(narrow))
    np.testing.assert_array_equal(np.argsort(wide), np.argsort(narrow))
