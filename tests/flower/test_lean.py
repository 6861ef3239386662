"""A federation of lean nodes publishes what one of standard nodes does."""

from pathlib import Path

import numpy as np
import pytest
from flwr.server import SimpleClientManager

from ferret_flwr.config import parse
from ferret_flwr.replica import Replica
from ferret_flwr.training import worker as workers
from ferret_flwr.training.tensors import as_arrays, masters_of
from tests.flower.conftest import SETTINGS, Federation

pytestmark = pytest.mark.usefixtures("one_thread")

ROUNDS = 2


@pytest.fixture(autouse=True)
def _own_worker():
    workers.worker.cache_clear()
    yield
    workers.worker.cache_clear()


def run(folder: Path, **settings: object) -> Federation:
    workers.worker.cache_clear()
    federation = Federation(parse(SETTINGS | settings), folder)
    base = masters_of(federation.nodes[0].worker.parameters)
    federation.strategy = federation.ferret()
    federation.run(federation.strategy, ROUNDS)
    federation.replica = Replica(federation.nodes[0].worker.layout, base)
    federation.replica.follow(federation.strategy.ledger)
    return federation


def test_lean_nodes_publish_what_standard_ones_do(tmp_path: Path) -> None:
    lean = run(tmp_path / "lean", **{"train.memory": "lean"})
    standard = run(tmp_path / "standard")
    assert not lean.strategy.refused and not standard.strategy.refused
    for one, other in zip(
        lean.strategy.ledger.entries, standard.strategy.ledger.entries, strict=True
    ):
        # Weights differ by float32's rounding of the coefficients, and training magnifies it.
        scale = np.abs(other.coefficients).max()
        assert np.abs(one.coefficients - other.coefficients).max() < 1e-3 * scale
        assert np.abs(1.01 * one.coefficients - other.coefficients).max() > 1e-3 * scale


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_lean_node_evaluates_and_trains_from_the_end_of_the_ledger(
    dtype: str, tmp_path: Path
) -> None:
    federation = run(tmp_path, **{"train.memory": "lean", "model.dtype": dtype})
    replica, worker = federation.replica, federation.nodes[0].worker
    assert federation.strategy.ledger.until(1).fingerprint  # the nodes agreed on it
    reached = worker.in_place.follow(federation.strategy.ledger)
    assert reached.fingerprint == replica.fingerprint
    from ferret_flwr.training.tensors import rounded_like

    for array, master, parameter in zip(
        as_arrays(worker.parameters.values()),
        replica.arrays,
        worker.parameters.values(),
        strict=True,
    ):
        assert array.tobytes() == rounded_like(master, parameter).tobytes()


def test_the_answer_has_no_fidelity_and_the_rest(tmp_path: Path) -> None:
    metrics = {}
    for memory in ("lean", "standard"):
        workers.worker.cache_clear()
        federation = Federation(parse(SETTINGS | {"train.memory": memory}), tmp_path / memory)
        strategy, fits = federation.ferret(), []
        manager = SimpleClientManager()
        for proxy in federation.proxies:
            manager.register(proxy)
        strategy.initialize_parameters(manager)
        for proxy, request in strategy.configure_fit(1, None, manager):
            fits.append(proxy.fit(request, None, None))
        (metrics[memory],) = (fit.metrics for fit in fits if fit.metrics["partition-id"] == 0)
    assert metrics["standard"].keys() - metrics["lean"].keys() == {"ferret/fidelity"}
    assert metrics["lean"].keys() <= metrics["standard"].keys()
    for key in ("train/loss", "fingerprint", "seed"):
        assert metrics["lean"][key] == metrics["standard"][key]
