"""The other methods behind Flower: what a node sends is checked, and a bad reply costs its node."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from flwr.common import FitRes, ndarrays_to_parameters, parameters_to_ndarrays
from flwr.server.strategy import FedAvg as FlowerFedAvg

from ferret_flwr.config import ModelConfig, parse
from ferret_flwr.flower.comparison import MethodClient, MethodStrategy
from ferret_flwr.flower.recording import Recorded
from ferret_flwr.flower.serverapp import Run
from ferret_flwr.methods.registry import METHODS
from ferret_flwr.training import worker as workers
from ferret_flwr.training.worker import Node, Worker
from tests.flower.conftest import Federation as FerretFederation
from tests.flower.in_process import InProcess

SETTINGS = {
    "num-server-rounds": 1,
    "train.steps": 1,
    "train.batch-size": 2,
    "train.learning-rate": 0.001,
    "zeroth-order.seeds": 8,
    "sketch.columns": 64,
    "evaluate.every": 0,
}
NAMES = ["fedavg", "fedzo", "fedkseed", "fedkseed-pro", "fedit", "fedprompt", "fetchsgd"]


@pytest.fixture(autouse=True)
def _own_worker():  # type: ignore[no-untyped-def]
    """Keep the process's worker, which these tests train, from other tests."""
    workers.worker.cache_clear()
    yield
    workers.worker.cache_clear()


class Federation(FerretFederation):
    """Nodes of another method."""

    def __init__(self, name: str, nodes: int = 2, **settings: object) -> None:
        kind = METHODS[name]
        self.config = kind.configured(parse(SETTINGS | {"method": name} | settings))
        self.method = kind(
            self.config, Worker(self.config.model, kind.adapter, self.config.adapter)
        )

        def client(number: int):  # type: ignore[no-untyped-def]
            node = Node.of(self.config, number, 2, kind.adapter)
            return MethodClient(kind(self.config, node.worker), node).to_client()

        self.proxies = [InProcess(number, client) for number in range(nodes)]

    def state(self, spoil: Callable[[FitRes], None] | None = None) -> tuple[list[bytes], dict]:
        """Run one round, in which node 1's reply is spoilt; return the state and the row."""
        honest = self.proxies[-1].fit

        def fit(ins, timeout, group_id):  # type: ignore[no-untyped-def]
            reply = honest(ins, timeout, group_id)
            if spoil is not None:
                spoil(reply)
            return reply

        self.proxies[-1].fit = fit  # type: ignore[method-assign]
        few = {"min_fit_clients": 1, "min_available_clients": 1, "fraction_evaluate": 0.0}
        strategy = MethodStrategy(self.method, lambda round: None, **few)
        rows: list[dict] = []
        self.run(Recorded(strategy, rows.append), 1)
        return [array.tobytes() for array in self.method.state()], rows[-1]


def set_arrays(edit: Callable[[list[np.ndarray]], object]) -> Callable[[FitRes], None]:
    def spoil(reply: FitRes) -> None:
        arrays = [array.copy() for array in parameters_to_ndarrays(reply.parameters)]
        reply.parameters = ndarrays_to_parameters(edit(arrays) or arrays)  # type: ignore[arg-type]

    return spoil


def with_nan(arrays: list[np.ndarray]) -> None:
    arrays[-1].flat[0] = np.nan


def set_examples(count: object) -> Callable[[FitRes], None]:
    def spoil(reply: FitRes) -> None:
        reply.num_examples = count  # type: ignore[assignment]

    return spoil


def set_metric(key: str, value: object) -> Callable[[FitRes], None]:
    def spoil(reply: FitRes) -> None:
        reply.metrics[key] = value  # type: ignore[assignment]

    return spoil


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (set_arrays(with_nan), "not finite"),
        (set_arrays(lambda arrays: [*arrays[:-1], np.zeros(3, np.float32)]), "expected|sent"),
        (set_arrays(lambda arrays: [*arrays, arrays[0]]), "expected|sent"),
        (set_examples(-2), "reports -2 examples"),
        (set_examples(float("nan")), "reports nan examples"),
        (set_metric("partition-id", "x"), "calls itself partition 'x'"),
        (set_metric("base", "0" * 16), "another base model: '0000000000000000'"),
    ],
)
def test_a_bad_reply_is_named_and_costs_only_its_node(
    name: str, spoil: Callable[[FitRes], None], reason: str
) -> None:
    state, row = Federation(name).state(spoil)
    assert row["nodes"] == 1
    (failure,) = row["failures"]
    assert failure.startswith("node 1")
    assert any(word in failure for word in reason.split("|"))
    assert state == Federation(name, nodes=1).state()[0]


def test_a_round_without_a_usable_reply_changes_nothing() -> None:
    federation = Federation("fedavg", nodes=1)
    before = Federation("fedavg").method
    before.start()
    state, row = federation.state(set_examples(0))
    assert state == [array.tobytes() for array in before.state()]
    assert row["nodes"] == 0


def test_weights_of_half_precision_weigh_half() -> None:
    """And are averaged in float32: the mean of many is not rounded again and again."""
    bytes_of = {}
    for dtype in ("float32", "bfloat16", "float16"):
        federation = Federation("fedavg", **{"model.dtype": dtype})
        state, row = federation.state()
        bytes_of[dtype] = sum(map(len, state))
        assert 0 < row["comm/uplink_bytes_per_node"] - bytes_of[dtype] < 5000
        assert all(array.dtype == np.float32 for array in federation.method.weights)  # type: ignore[attr-defined]
    assert bytes_of["float32"] == 2 * bytes_of["bfloat16"] == 2 * bytes_of["float16"]


def test_rows_tell_the_time_to_reach_the_model_and_to_train() -> None:
    _, row = Federation("fedkseed").state()
    assert row["time/local_s"] > 0
    assert row["time/reconstruct_s"] > 0


@pytest.mark.parametrize("name", ["fedavg", "fedkseed"])
def test_without_evaluation_the_last_state_is_saved(name: str, tmp_path: Path) -> None:
    settings = SETTINGS | {"method": name, "results-dir": str(tmp_path)}
    run = Run(parse(settings))
    federation = Federation(name)
    server = run.components().server
    server.set_max_workers(1)
    for proxy in federation.proxies:
        server.client_manager().register(proxy)
    server.fit(1, timeout=None)
    base = Worker(ModelConfig()).base_fingerprint
    saved = Worker(ModelConfig(name=str(run.folder / "final"))).base_fingerprint
    assert saved != base
    assert run.method is not None
    run.method.load(run.method.state())
    reloaded = [p.detach().numpy().tobytes() for p in run.method.worker.parameters.values()]
    final = Worker(ModelConfig(name=str(run.folder / "final"))).parameters.values()
    assert reloaded == [p.detach().numpy().tobytes() for p in final]


def test_it_is_flowers_fedavg_that_samples() -> None:
    assert issubclass(MethodStrategy, FlowerFedAvg)
