"""The random bits: Philox against its published answers, numba's bits against NumPy's."""

import numpy as np
import pytest

from ferret_flwr.projection.families import FAMILIES
from ferret_flwr.projection.kernels import cpu, reference, tiles
from ferret_flwr.projection.kernels.philox import derive_seed, philox4x32, split_key
from ferret_flwr.projection.kernels.segments import Segments
from ferret_flwr.projection.layout import Blocks
from ferret_flwr.projection.plan import RoundPlan

# Random123, kat_vectors: philox4x32 with 10 rounds. Counter, key, answer.
KNOWN_ANSWERS = {
    "zeros": (
        "00000000 00000000 00000000 00000000",
        "00000000 00000000",
        "6627e8d5 e169c58d bc57ac4c 9b00dbd8",
    ),
    "ones": (
        "ffffffff ffffffff ffffffff ffffffff",
        "ffffffff ffffffff",
        "408f276d 41c83b0e a20bc7c6 6d5451fd",
    ),
    "pi": (
        "243f6a88 85a308d3 13198a2e 03707344",
        "a4093822 299f31d0",
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
}
FAR = 2**32 * 128  # the first element whose group does not fit 32 bits


def _words(text):
    return [int(word, 16) for word in text.split()]


def _one_segment(start, length):
    zero = np.zeros(1, dtype=np.int64)
    return Segments(np.array([start]), np.array([length]), zero, zero, zero)


def _plan(family, size, seed=7):
    return RoundPlan(1, seed, family, Blocks.of(size, 1), np.ones(1, dtype=np.int64))


@pytest.mark.parametrize("name", KNOWN_ANSWERS)
def test_known_answers(name):
    counter, key, answer = map(_words, KNOWN_ANSWERS[name])
    ours = philox4x32(np.array(counter, dtype=np.uint32), tuple(key))
    assert ours.dtype == np.uint32
    assert ours.tolist() == answer
    numbas = tiles.philox(*np.array(counter, dtype=np.uint32), *np.array(key, dtype=np.uint32))
    assert [int(word) for word in numbas] == answer


def test_counters_are_independent_of_their_company():
    counters = np.random.default_rng(0).integers(0, 2**32, (5, 3, 4), dtype=np.uint32)
    together = philox4x32(counters, (1, 2))
    alone = [[philox4x32(counter, (1, 2)) for counter in row] for row in counters]
    np.testing.assert_array_equal(together, alone)


@pytest.mark.parametrize("group", [0, 1, 2**32 - 2, 2**32, 2**40 + 3])
@pytest.mark.parametrize("basis", [0, 1, 2**20])
@pytest.mark.parametrize("seed", [0, 1, 2**63 - 1])
def test_sign_words_of_numba_are_those_of_numpy(group, basis, seed):
    groups = 5
    flat, words = np.empty(4 * tiles.TILE, np.uint32), np.empty((4, tiles.TILE), np.uint32)
    low, high = split_key(seed)
    tiles.sign_words(flat, words, group, groups, basis, np.uint32(low), np.uint32(high))
    counters = [[g & 0xFFFFFFFF, g >> 32, basis, 0] for g in range(group, group + groups)]
    expected = philox4x32(np.array(counters, dtype=np.uint32), (low, high))
    np.testing.assert_array_equal(flat[: 4 * groups], expected.ravel())


@pytest.mark.parametrize("family", FAMILIES)
def test_indices_are_64_bits_wide(family):
    length = 300
    plan = _plan(family, FAR + length)
    near, far = (reference.basis_elements(plan, 0, start, start + length) for start in (0, FAR))
    assert np.mean(near == far) < 0.75  # a wrapped index repeats all of them

    coefficient = np.ones(1, dtype=np.float32)
    for start, elements in ((0, near), (FAR, far)):
        array = np.zeros(length, dtype=np.float32)
        cpu.subtract([array], coefficient, _one_segment(start, length), plan)
        np.testing.assert_array_equal(-array, elements)
        gamma = cpu.project([elements], None, _one_segment(start, length), plan)
        np.testing.assert_allclose(gamma, elements.astype(np.float64) @ elements, rtol=1e-5)


def test_derived_seeds_are_in_range_and_distinct():
    parents, rounds, nodes = (0, 1, 2**63 - 1), range(20), (0, 1, 2**32, 2**63 - 1)
    seeds = [derive_seed(parent, r) for parent in parents for r in rounds]
    seeds += [derive_seed(parent, r, n) for parent in parents for r in rounds for n in nodes]
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert max(seeds) > 2**62  # not only 32 of the bits
    assert len(set(seeds)) == len(seeds)


def test_derived_seeds_are_a_pure_function_of_parent_and_path():
    assert derive_seed(3, 4, 5) == derive_seed(3, 4, 5) == derive_seed(derive_seed(3, 4), 5)
    assert derive_seed(3, 4, 5) != derive_seed(3, 5, 4)
    assert derive_seed(3, 1) != derive_seed(3, 1 + 2**32)
