"""Coefficients in fewer bytes: round trip, sizes, unbiasedness."""

import math

import numpy as np
import pytest

from ferret_flwr.projection.encoding import RUN, decode, encode, encoded_nbytes
from ferret_flwr.projection.layout import InterleavedBlocks
from ferret_flwr.projection.plan import NUMBERS, PlanError, RoundPlan
from ferret_flwr.rounds import to_send

SMALL = ("float16", "int8")
STEP = {"float16": 2**-11, "int8": 1 / 127}  # of numbers up to 1: the largest distance of two


def numbers(count, seed=0):
    return np.random.default_rng(seed).standard_normal(count).astype(np.float32)


@pytest.mark.parametrize("kind", NUMBERS)
@pytest.mark.parametrize("count", [1, RUN - 1, RUN, RUN + 1, 8192])
def test_size_is_known_in_closed_form(kind, count):
    encoded = encode(numbers(count), kind, 1)
    assert encoded.nbytes == encoded_nbytes(count, kind)
    assert decode(encoded, kind, count).shape == (count,)
    assert encoded_nbytes(8192, kind) == {"float32": 32768, "float16": 16512, "int8": 8320}[kind]


@pytest.mark.parametrize("kind", SMALL)
@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_each_number_is_rounded_to_one_beside_it(kind, size):
    values = numbers(3 * RUN + 7) * np.float32(size)
    back = decode(encode(values, kind, 5), kind, values.size)
    largest = np.repeat(np.maximum.reduceat(np.abs(values), range(0, values.size, RUN)), RUN)
    assert (np.abs(back - values) <= 1.0001 * STEP[kind] * largest[: values.size]).all()
    assert (back != values).any()


@pytest.mark.parametrize("kind", SMALL)
def test_zeros_and_the_largest_are_exact(kind):
    values = np.zeros(2 * RUN, dtype=np.float32)
    np.testing.assert_array_equal(decode(encode(values, kind, 3), kind, values.size), values)
    values[[7, RUN + 1]] = [-3.0, 4.0]
    np.testing.assert_allclose(decode(encode(values, kind, 3), kind, values.size), values)


def deviations(kind, draw, rounds=400):
    """Return the mean error of each number in units of the mean's standard deviation."""
    values = numbers(RUN) / 4
    values[0] = 1.0  # the scale
    total = np.zeros(values.size)
    for seed in range(rounds):
        total += draw(values, kind, seed)
    return (total / rounds - values)[1:] * math.sqrt(rounds) / (STEP[kind] / 2)


def test_rounding_has_no_bias():
    """Each error is at most one step and has mean 0, so a deviation of half a step at most."""

    def ours(values, kind, seed):
        return decode(encode(values, kind, seed), kind, values.size)

    def to_nearest(values, kind, seed):
        if kind == "float16":
            return values.astype(np.float16).astype(np.float32)
        return np.round(values * 127) / np.float32(127)

    for kind in SMALL:
        assert np.abs(deviations(kind, ours)).max() < 4.5  # of 255 numbers: p = 0.002
        assert np.abs(deviations(kind, to_nearest)).max() > 9


@pytest.mark.parametrize("kind", SMALL)
def test_nodes_round_by_draws_of_their_own(kind):
    """The mean of many nodes is nearer than any of them."""
    values = numbers(2048)
    plan = RoundPlan(1, 9, "rademacher", InterleavedBlocks.of(10_000, values.size), numbers=kind)

    def error(partitions):
        sent = [decode(to_send(values, plan, p), kind, values.size) for p in partitions]
        return np.sqrt(np.mean((np.mean(sent, axis=0) - values) ** 2))

    assert error(range(64)) < error([0]) / 6  # 8 is expected
    assert error([5] * 64) > error([0]) / 2  # as if they shared their draws
    np.testing.assert_array_equal(to_send(values, plan, 3), to_send(values, plan, 3))


@pytest.mark.parametrize("kind", SMALL)
def test_what_is_exact_stays_exact(kind):
    """A small variance beside a large coefficient must not be rounded to its scale."""
    values = numbers(300)
    values[-40:] = np.linspace(1e-8, 1e-3, 40)
    encoded = encode(values, kind, 7, exact=40)
    assert encoded.size == encoded_nbytes(260, kind, 40)
    back = decode(encoded, kind, 260, 40)
    np.testing.assert_array_equal(back[-40:], values[-40:])
    rounded = decode(encode(values, kind, 7), kind, 300)
    assert (rounded[-40:] != values[-40:]).any()


@pytest.mark.parametrize("kind", NUMBERS)
@pytest.mark.parametrize(
    "spoil",
    [
        lambda e: e[:-1],
        lambda e: e.astype(np.float64),
        lambda e: e.reshape(1, -1),
        lambda e: np.zeros(0, dtype=e.dtype),
    ],
)
def test_what_is_no_such_array_is_refused(kind, spoil):
    encoded = encode(numbers(300), kind, 0)
    with pytest.raises(PlanError, match=f"300 coefficients in {kind} are "):
        decode(spoil(encoded), kind, 300)
