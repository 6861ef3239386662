"""What a round takes besides training: every phase is there, and counts its own seconds only."""

import importlib
import time

import pytest

from benchmarks.overhead import PHASES, REST, Stopwatch, measure
from ferret_flwr.config import Config, flatten


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


@pytest.mark.parametrize("method", ["ferret", "fedavg"])
def test_each_phase_of_a_round_is_seen(method: str) -> None:
    run = {"method": method, "num-server-rounds": 2, "train.steps": 1, "train.batch-size": 1}
    run |= {"strategy.min-available-nodes": 1, "evaluate.generate-examples": 0}
    first, second = measure({"run": flatten(Config()) | run, "nodes": 3})
    own = {"ferret": set(PHASES.values()), "fedavg": {"train", "node: load the weights"}}[method]
    own -= {"node: copy and check the weights"} if method == "ferret" else set()
    assert own <= first.keys()
    assert {"train", "pack and unpack", "server: check and aggregate"} <= second.keys()
    assert all(seconds > 0 for lap in (first, second) for seconds in lap.values())
