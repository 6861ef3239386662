"""The benchmark of growth: its lines, its limits, and what it refuses to time."""

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from benchmarks import growth
from benchmarks.growth import QUICK, Sizes, crossing, fitting, has_marks, write_into
from benchmarks.sweeps import Curve, Sweep, Work, constant, linear
from ferret_flwr.projection.kernels import cpu_interleaved

X = (10, 100, 1000, 10_000)
TINY = {
    "sizes": (1000, 2000, 4000),
    "bases": (8, 16, 32),
    "bases-size": (2**15,),
    "clients": (2, 4, 8),
    "client-bases": (64,),
    "reply-bases": (32, 64, 128),
    "reply-clients": (2,),
    "rounds": (1, 2, 4),
    "ledger-size": (20_000,),
}


def curve(terms: tuple, seconds: Sequence[float]) -> Curve:
    return Curve(Work("work", "law", terms), X, seconds)


def test_a_line_of_one_term_has_half_of_the_points_above() -> None:
    measured = curve((linear,), [3 * x for x in X])
    np.testing.assert_allclose(measured.expected((1, *X)), [3, *measured.seconds])
    assert measured.slopes == pytest.approx((1, 1))
    steeper = curve((linear,), [x**1.5 for x in X])
    above = [expected > x**1.5 for x, expected in zip(X, steeper.expected(X), strict=True)]
    assert above == [True, True, False, False]
    assert steeper.slopes == pytest.approx((1.5, 1))


def test_a_line_of_two_terms_goes_through_the_ends() -> None:
    measured = curve((constant, linear), [5 + 2 * x for x in X])
    np.testing.assert_allclose(measured.expected((1, *X)), [7, *measured.seconds])
    squares = curve((constant, linear), [x**2 for x in X])
    np.testing.assert_allclose(squares.expected((10, 10_000)), [10**2, 10**8])
    assert squares.expected((1000,))[0] > 9 * 1000**2


def test_a_table_has_the_ratio_of_each_point() -> None:
    rows = {x: {"copy": x * 1.5 if x == 1000 else x, "times": 2.0} for x in X}
    sweep = Sweep.of("Title", "d", [Work("copy", "∝ d", (linear,))], rows)
    lines = sweep.markdown().splitlines()
    assert lines[0] == "Title"
    assert lines[2] == "| d | copy, s | expected: ∝ d | times |"
    assert lines[4] == "| 10 | 10 | 10 (1.00) | 2 |"
    assert lines[6] == "| 1,000 | 1500 | 1000 (1.50) | 2 |"
    assert lines[-1].startswith("| slope | 1.0") and lines[-1].endswith("| 1.00 |  |")


@pytest.mark.parametrize(("snapshot", "rounds"), [(0.5, 1), (2.9, 1), (3.1, 2), (6.9, 3), (7.1, 4)])
def test_where_a_snapshot_begins_to_pay(snapshot: float, rounds: int) -> None:
    rows = {n: {"replay": 1 + 2.0 * n, "snapshot": snapshot} for n in X}
    assert crossing(Sweep.of("", "rounds", growth.BY_ROUNDS, rows)) == rounds


def test_sizes_that_do_not_fit_give_way_to_the_largest(monkeypatch, capsys) -> None:
    free = [growth.SPARE + 4 * n for n in (10**9, 10**9, 33 * 10**7)]
    monkeypatch.setattr(growth, "free_memory", lambda: free.pop(0))
    assert list(fitting((10**6, 10**8, 10**9, 10**10))) == [10**6, 10**8, 33 * 10**7]
    assert "d = 1,000,000,000 does not fit" in capsys.readouterr().err
    free = [growth.SPARE + 4 * n for n in (10**8, 10**8)]
    assert list(fitting((10**8, 10**9))) == [10**8]


def test_memory_is_what_the_system_says_is_free() -> None:
    assert 0 < growth.free_memory() < 2**50


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (Sizes(clients=(1, 2)), "--clients must be at least three numbers"),
        (Sizes(rounds=(1, 3, 3)), "--rounds must be positive and ascending"),
        (Sizes(bases_size=0), "--bases-size must be positive"),
        (Sizes(bases=(8, 12, 16)), "--bases must be multiples of the first"),
        (Sizes(bases=(8, 16, 32), bases_size=16), "up to 16"),
    ],
)
def test_sizes_without_a_line_are_refused(sizes: Sizes, message: str) -> None:
    assert message in sizes.contradiction()
    assert not Sizes().contradiction() and not QUICK.contradiction()


def test_only_what_stands_between_the_marks_is_replaced(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"# before\n\n{growth.START}\n\nold\n\n{growth.END}\n\nafter\n")
    write_into(page, "new")
    assert page.read_text() == f"# before\n\n{growth.START}\n\nnew\n\n{growth.END}\n\nafter\n"
    assert has_marks(page) and not has_marks(tmp_path / "other.md")
    for text in ("after", growth.START, f"{growth.END} {growth.START}"):  # would be lost
        page.write_text(text)
        assert not has_marks(page)


def run(monkeypatch: pytest.MonkeyPatch, *more: object) -> None:
    sizes = [str(part) for name, own in TINY.items() for part in (f"--{name}", *own)]
    monkeypatch.setattr(sys, "argv", ["growth", *sizes, *map(str, more)])
    monkeypatch.setattr(growth, "ENOUGH", 1e-9)  # one turn each
    growth.main()


def test_from_the_command_line(tmp_path: Path, monkeypatch, capsys, one_thread) -> None:
    page, picture = tmp_path / "page.md", tmp_path / "growth.png"
    page.write_text(f"{growth.START}{growth.END}")
    run(monkeypatch, "--json", "--plot", picture, "--into", page)
    assert picture.stat().st_size > 20_000
    printed = capsys.readouterr()
    for told in ("d = 4,000: copy", "K = 32: project", "8 replies: ", "4 rounds: replay"):
        assert told in printed.err
    found = json.loads(printed.out)
    assert found["seed"] == growth.SEED and found["commit"] and found["versions"]["numba"]
    sweeps = [sweep for own in found["sweeps"].values() for sweep in own]
    assert [len(sweep["curves"]) for sweep in sweeps] == [3, 4, 2, 2, 2]
    assert sweeps[0]["d"] == [1000, 2000, 4000] and sweeps[3]["K"] == [32, 64, 128]
    for sweep in sweeps:
        for own in sweep["curves"]:
            assert min(own["seconds"]) > 0
            pairs = zip(own["seconds"], own["expected"], strict=True)
            assert any(math.isclose(*pair) for pair in pairs)
    text = page.read_text()
    for heading in ("Parameters: ", "Coefficients: ", "Clients: ", "Length of a reply: "):
        assert heading in text
    assert text.count("| slope |") == 5 and "a snapshot is faster than" in text
    assert f"commit {found['commit']}" in text


def test_kernels_that_go_wrong_far_behind_are_not_timed(monkeypatch, one_thread) -> None:
    """Small cases are right, as they would be with indices of 32 bits."""

    def wrong(arrays: list, c: np.ndarray, segments, plan) -> None:
        right(arrays, c, segments, plan)
        arrays[0].reshape(-1)[50_000:] *= -1

    right = cpu_interleaved.subtract
    monkeypatch.setattr(cpu_interleaved, "subtract", wrong)
    sizes = Sizes(sizes=(40_000, 60_000, 80_000))
    with pytest.raises(SystemExit, match="not timed: .* at d = 60000"):
        growth.by_size(sizes)
    monkeypatch.setattr(cpu_interleaved, "subtract", right)
    monkeypatch.setattr(growth, "ENOUGH", 1e-9)
    assert list(growth.by_size(sizes).x) == [40_000, 60_000, 80_000]
