"""What docs/security.md says of γ: how little noise it has for whoever knows a candidate gradient.

Statistical checks allow five standard errors, from K, d and the number of draws; each is shown to
reject a wrong scale, a wrong K or a wrong seed.
"""

import math

import numpy as np
import pytest

from benchmarks.leakage import auc, read_out, without
from ferret_flwr.flower.wire import node_seed
from ferret_flwr.projection import projection
from ferret_flwr.projection.allocation import allocate
from ferret_flwr.projection.kernels import reference
from ferret_flwr.projection.layout import Blocks, InterleavedBlocks, Layout
from ferret_flwr.projection.plan import RoundPlan

BLOCK, BLOCKS, K = 128, 16, 128
SIZE = BLOCK * BLOCKS
LAYOUT = Layout(("w",), ((SIZE,),))
ENERGIES = np.resize([1.0, 4.0, 0.25, 9.0], BLOCKS)  # of a block's elements
DRAWS, FEW = 2000, 400  # few tell a factor of √2


def make_plan(allocation: str = "uniform", total: int = K, energies: np.ndarray = ENERGIES):
    blocks = Blocks(SIZE, BLOCK)
    counts = allocate(allocation, energies, blocks, total, cap=32)
    return RoundPlan(1, 0, "rademacher", blocks, counts)


def vector(generator: np.random.Generator, energies: np.ndarray) -> np.ndarray:
    scale = np.repeat(np.sqrt(energies), BLOCK)
    return (scale * generator.standard_normal(SIZE)).astype(np.float32)


def project(v: np.ndarray, plan: RoundPlan) -> np.ndarray:
    return projection.project([v], LAYOUT, plan)


def correlation(x: np.ndarray, y: np.ndarray) -> float:
    return float(x @ y / math.sqrt((x @ x) * (y @ y)))


def correlations(plan: RoundPlan, energies: np.ndarray, weights: np.ndarray, draws: int):
    """Return the correlations of γ with Vᵀg, for a g that has nothing to do with Δ in each draw."""
    found = []
    for seed in range(draws):
        generator = np.random.default_rng(seed)
        x, y = (project(vector(generator, energies), plan.with_seed(seed)) for _ in range(2))
        found.append(correlation(x * weights, y * weights))
    return np.array(found)


def noise(plan: RoundPlan) -> float:
    """Return √(1/K + Σ K_l² / (K² d_l)), which is √(1/K + 1/d) if all K_l are the same.

    The first term is the bases' chance. The second is the vectors' own, which do not meet at an
    exact right angle: it is there with the full update, too, and small where K is far below d.
    """
    counts, total = plan.counts, plan.num_coefficients
    return math.sqrt(1 / total + (counts**2 / plan.blocks.lengths).sum() / total**2)


def spreads_by(found: np.ndarray, expected: float) -> bool:
    """Return whether the standard deviation of ``found`` is ``expected``, to five errors of it."""
    return abs(found.std() / expected - 1) <= 5 / math.sqrt(2 * found.size)


def test_noise_of_an_example_that_was_not_there_is_one_over_root_k():
    even = np.ones(BLOCKS)
    plan, half = make_plan(energies=even), make_plan(total=K // 2, energies=even)
    found = correlations(plan, even, np.ones(K), DRAWS)
    dealt = RoundPlan(1, 0, "rademacher", InterleavedBlocks(SIZE, K))
    assert spreads_by(correlations(dealt, even, np.ones(K), DRAWS), noise(plan))
    assert noise(plan) == pytest.approx(math.sqrt(1 / K + 1 / SIZE))
    assert noise(plan) == pytest.approx(1 / math.sqrt(K), rel=0.04)
    assert spreads_by(found, noise(plan))
    assert abs(found.mean()) <= 5 * noise(plan) / math.sqrt(found.size)
    assert not spreads_by(found, noise(half))
    assert not spreads_by(found, noise(plan) / 0.9)
    assert not spreads_by(3 * found, noise(plan))
    assert not spreads_by(correlations(half, even, np.ones(K // 2), FEW), noise(plan))


@pytest.mark.parametrize("allocation", ["uniform", "energy"])
def test_no_allocation_adds_noise_for_who_weighs_the_blocks(allocation: str):
    """Divided by the scale of its block each number counts the same, however they are allotted."""
    plan = make_plan(allocation)
    weights = np.repeat(1 / np.sqrt(ENERGIES), plan.bases_per_block)
    found = correlations(plan, ENERGIES, weights, DRAWS)
    assert spreads_by(found, noise(plan))
    assert not spreads_by(0.9 * found, noise(plan))
    if allocation == "uniform":  # by energy, most numbers are about the blocks that weigh most
        assert not spreads_by(correlations(plan, ENERGIES, np.ones(K), FEW), noise(plan))


@pytest.mark.parametrize("bases", ["shared", "per-client"])
def test_an_example_is_seen_by_its_share_of_the_update(bases: str):
    """With 3/√K of the update's norm it stands three standard deviations above the others."""
    plan, share, found, elsewhere = make_plan(energies=np.ones(BLOCKS)), 3 / math.sqrt(K), [], []
    for seed in range(DRAWS // 2):
        generator = np.random.default_rng(seed)
        g, rest = (vector(generator, np.ones(BLOCKS)).astype(np.float64) for _ in range(2))
        rest -= g * (g @ rest) / (g @ g)
        delta = share * g / np.linalg.norm(g)
        delta += math.sqrt(1 - share**2) * rest / np.linalg.norm(rest)
        own = plan.with_seed(node_seed(plan.with_seed(seed), bases, partition_id=3))
        sent = project(delta.astype(np.float32), own)
        g = g.astype(np.float32)
        found.append(correlation(project(g, own), sent))
        elsewhere.append(correlation(project(g, own.with_seed(seed + 1)), sent))

    def seen(values: list[float], expected: float) -> bool:
        return abs(np.mean(values) - expected) <= 5 / math.sqrt(K * len(values))

    assert seen(found, share)
    assert not seen(found, 0.9 * share)
    assert not seen(found, 1.1 * share)
    assert seen(elsewhere, 0.0) and not seen(elsewhere, share)


def reconstructed(delta: np.ndarray, plan: RoundPlan, rounds: int) -> float:
    """Return cos(Δ̂, Δ) of the mean of ``rounds`` reconstructions of the same Δ."""
    estimate = np.zeros(SIZE)
    for seed in range(rounds):
        asked = plan.with_seed(seed)
        estimate += reference.reconstruct(
            (project(delta, asked) * plan.unbiased_scale()).astype(np.float32), asked
        )
    return correlation(estimate, delta.astype(np.float64))


@pytest.mark.parametrize("rounds", [4, 16])
def test_asking_again_averages_the_noise_out(rounds: int):
    """Fresh seeds for the same update are as good as more coefficients: cos = √(mK / (mK + d))."""
    delta = vector(np.random.default_rng(0), np.ones(BLOCKS))
    found = reconstructed(delta, make_plan(energies=np.ones(BLOCKS)), rounds)

    def fits(times: float) -> bool:
        expected = 1 / math.sqrt(1 + (BLOCK - 1) / (times * K / BLOCKS))
        return abs(found / expected - 1) <= 5 / math.sqrt(2 * rounds * K)  # of a norm by mK numbers

    assert fits(rounds)
    assert not fits(2 * rounds) and not fits(rounds / 2)


def test_as_many_numbers_as_parameters_are_the_parameters():
    errors = read_out((120, 136), seeds=1)
    assert errors[136] < 1e-4
    assert errors[120] == pytest.approx(math.sqrt(1 - 120 / 128), rel=0.5)


def test_what_the_benchmark_counts():
    assert auc(np.array([2.0, 3.0]), np.array([0.0, 1.0])) == 1
    assert auc(np.array([0.0, 1.0]), np.array([2.0, 3.0])) == 0
    assert auc(np.array([1.0, 3.0]), np.array([1.0, 3.0])) == 0.5
    average = np.array([2.0, 0.0])
    assert np.array_equal(without(average, np.array([[5.0, 3.0]])), [[0.0, 1.0]])
