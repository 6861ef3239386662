"""What a round takes besides training: every phase is there, and counts its own seconds only."""

import importlib
import time

import pytest

from benchmarks.overhead import PHASES, REST, Stopwatch


@pytest.mark.parametrize("place", PHASES)
def test_what_is_measured_exists(place: str) -> None:
    module, path = place.split(":")
    found = importlib.import_module(module)
    for name in path.split("."):
        found = getattr(found, name)
    assert callable(found)


def test_a_phase_is_without_those_within() -> None:
    watch = Stopwatch()
    with watch.phase("outer"):
        time.sleep(0.01)
        with watch.phase("inner"):
            time.sleep(0.1)
    seconds = watch.lap()
    assert seconds["inner"] >= 0.1
    assert 0.01 <= seconds["outer"] < 0.1
    assert not watch.lap().keys() - {REST}
