"""The built-in data is a function of its seed, and correct."""

from __future__ import annotations

import re

import numpy as np
import pytest

from ferret_flwr.training.randomness import permutation, uniform
from ferret_flwr.training.synthetic import TASKS, tasks

GOLDEN = [2, 3, 1, 5, 7, 6, 0, 4]


def test_same_seed_same_rows():
    assert tasks(3, 200) == tasks(3, 200)
    assert tasks(3, 200) != tasks(4, 200)


def test_rows_are_different_and_cover_all_categories():
    rows = tasks(0)
    assert len({(row["instruction"], row["input"]) for row in rows}) == len(rows) == 4000
    assert {row["category"] for row in rows} == set(TASKS)


def test_answers_are_right():
    for row in tasks(5, 800):
        words = row["input"].partition(": ")[2].split(", ")
        match row["category"]:
            case "sum":
                assert row["output"].endswith(f"is {sum(map(int, words))}.")
            case "count":
                assert int(re.search(r"\d+", row["output"])[0]) == len(words)
            case "last":
                assert row["output"].endswith(f" {words[-1]}.")
            case "reverse":
                assert row["output"].endswith(f": {', '.join(reversed(words))}.")


def test_permutation_is_one_and_depends_on_every_part_of_the_key():
    assert sorted(permutation(101, "a", 1)) == list(range(101))
    assert np.array_equal(permutation(101, "a", 1), permutation(101, "a", 1))
    assert not np.array_equal(permutation(101, "a", 1), permutation(101, "a", 2))
    assert not np.array_equal(permutation(101, "a", 1), permutation(101, "b", 1))
    assert not np.array_equal(permutation(101, "1", 1), permutation(101, 1, 1))


def test_permutation_is_the_same_on_every_machine():
    assert permutation(8, "golden", 0).tolist() == GOLDEN


@pytest.mark.parametrize("n", [1, 100_003])
def test_uniform_has_the_moments_of_its_distribution(n):
    x = uniform(n, "moments").astype(np.float64)
    assert np.abs(x).max() < 1
    if n > 1:
        assert abs(x.mean()) < 5 / np.sqrt(3 * n)
        assert abs((x**2).mean() - 1 / 3) < 5 * np.sqrt(4 / 45 / n)
