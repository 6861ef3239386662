"""A process's model: tensors as arrays, the replica behind them, and the nodes it serves."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from ferret_flwr.config import ConfigError, ModelConfig, parse
from ferret_flwr.ledger import Ledger
from ferret_flwr.projection import projection
from ferret_flwr.projection.layout import Layout
from ferret_flwr.replica import Replica
from ferret_flwr.rounds import next_plan, publish
from ferret_flwr.training import worker as workers
from ferret_flwr.training.errors import DataError, ModelError
from ferret_flwr.training.models import load_model
from ferret_flwr.training.tensors import (
    as_array,
    load_masters,
    masters_of,
    rounded_like,
    trainable_parameters,
)
from ferret_flwr.training.worker import Node, Worker, live_replica, score

DTYPES = ["float32", "bfloat16", "float16"]
CONFIG = parse(
    {
        "dataset.max-examples": 60,
        "train.steps": 2,
        "train.gradient-accumulation": 1,
        "train.seq-length": 128,
        "evaluate.max-examples": 4,
        "evaluate.generate-examples": 0,
        "ferret.coefficients": 32,
    }
)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _own_worker():
    """Keep the process's worker, which these tests train, from other tests."""
    workers.worker.cache_clear()
    yield
    workers.worker.cache_clear()


def make_ledger(header, rounds=3):
    ledger = Ledger(header)
    for round in range(1, rounds + 1):
        plan = next_plan(ledger, CONFIG.ferret, seed=1)
        drawn = np.random.default_rng(round).standard_normal(plan.num_coefficients) / 100
        ledger = ledger.append(publish(plan, drawn, rate=1.0))
    return ledger


def replayed(dtype, ledger):
    """Return the canonical arrays at the ledger's end, from a base of their own."""
    parameters = trainable_parameters(load_model(ModelConfig(dtype=dtype)).model)
    replica = Replica(Layout.of(parameters), masters_of(parameters))
    replica.follow(ledger)
    return replica.arrays


def equal(arrays, others):
    pairs = zip(arrays, others, strict=True)
    return all(a.tobytes() == b.tobytes() and a.dtype == b.dtype for a, b in pairs)


# Tensors and arrays


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_an_array_shares_the_tensors_memory(dtype):
    tensor = torch.tensor([[1.0, -2.5], [0.0, 3.0]], dtype=dtype)
    array = as_array(torch.nn.Parameter(tensor))
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    assert array.shape == (2, 2)
    assert array.tobytes() == tensor.view(bits).numpy().tobytes()
    tensor[0, 1] = 7.0
    assert array.tobytes() == tensor.view(bits).numpy().tobytes()


def test_bfloat16_is_its_bits():
    array = as_array(torch.tensor([1.0, -2.0], dtype=torch.bfloat16))
    assert array.dtype == np.uint16
    assert array.tolist() == [0x3F80, 0xC000]


@pytest.mark.parametrize("dtype", DTYPES)
def test_masters_are_float32_copies(dtype):
    tensors = {"w": torch.nn.Parameter(torch.tensor([0.1, -3.0], dtype=getattr(torch, dtype)))}
    (master,) = masters_of(tensors)
    assert master.dtype == np.float32
    assert master.tolist() == tensors["w"].tolist()
    master[0] = 7
    assert tensors["w"][0] != 7


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_load_masters_rounds_as_rounded_like(dtype):
    master = np.random.default_rng(0).standard_normal((5, 7)).astype(np.float32)
    parameter = torch.nn.Parameter(torch.zeros(5, 7, dtype=dtype))
    load_masters({"w": parameter}, [master])
    assert rounded_like(master, parameter).tobytes() == as_array(parameter).tobytes()
    error = np.abs(parameter.detach().float().numpy() - master)
    assert (error <= torch.finfo(dtype).eps / 2 * np.abs(master)).all()
    assert error.any() == (dtype != torch.float32)
    assert parameter.dtype == dtype and parameter.requires_grad


def test_masters_must_be_as_many_as_parameters():
    with pytest.raises(ValueError, match="shorter"):
        load_masters({"w": torch.zeros(2)}, [])


# The worker's replica


def test_a_worker_has_the_base_model():
    worker = Worker(ModelConfig())
    base = trainable_parameters(load_model(ModelConfig()).model)
    assert worker.layout == Layout.of(base)
    assert equal(masters_of(worker.parameters), masters_of(base))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_replica_goes_on_and_starts_again(dtype):
    worker = Worker(ModelConfig(dtype=dtype))
    ledger = make_ledger(worker.follower.from_base().header)
    replica = worker.follower.follow(ledger)
    ends = [array.copy() for array in replica.arrays]
    assert equal(ends, replayed(dtype, ledger))

    load_masters(worker.parameters, replica.arrays)  # the model in memory is no base any more
    earlier = worker.follower.follow(ledger.until(1))
    assert earlier is not replica
    assert earlier.header == ledger.header
    assert equal(earlier.arrays, replayed(dtype, ledger.until(1)))
    assert worker.follower.follow(ledger) is earlier
    assert equal(earlier.arrays, ends)


def test_the_replica_is_not_the_model():
    worker = Worker(ModelConfig())
    replica = worker.follower.from_base()
    with torch.no_grad():
        for p in worker.parameters.values():
            p.add_(1)
    assert projection.fingerprint(replica.arrays, replica.layout) == replica.header.base


@pytest.mark.parametrize("write", ["train", "load", "live replica"])
def test_the_base_is_the_base_whoever_wrote_to_the_model(write):
    workers.worker.cache_clear()
    node = Node.of(parse({"train.steps": 1, "train.gradient-accumulation": 1}), 0, 2)
    worker = node.worker
    base = [array.copy() for array in masters_of(worker.parameters)]
    if write == "train":
        node.train(1)
    elif write == "load":
        load_masters(worker.parameters, [array + 1 for array in base])
    else:
        live = live_replica(worker)
        live.follow(make_ledger(live.header))
    assert not equal(masters_of(worker.parameters), base)
    assert equal(worker.follower.from_base().arrays, base)
    workers.worker.cache_clear()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_live_replica_is_a_replay(dtype):
    worker = Worker(ModelConfig(dtype=dtype))
    before = masters_of(worker.parameters)
    live = live_replica(worker)
    ledger = make_ledger(live.header)
    live.follow(ledger)
    expected = replayed(dtype, ledger)
    assert equal(live.arrays, expected)
    assert not equal(live.arrays, before)
    moved = equal(masters_of(worker.parameters), expected)
    kept = equal(masters_of(worker.parameters), before)
    assert (moved, kept) == ((True, False) if dtype == "float32" else (False, True))


def test_a_live_replica_of_float32_copies_nothing():
    worker = Worker(ModelConfig())
    live = live_replica(worker)
    for array, parameter in zip(live.arrays, worker.parameters.values(), strict=True):
        assert array.ctypes.data == parameter.data_ptr()


def test_a_live_replica_of_a_transposed_tensor():
    worker = Worker(ModelConfig())
    weight = worker.parameters["model.embed_tokens.weight"]
    weight.data = weight.data.t().contiguous().t()  # the same numbers, in another order
    live = live_replica(worker)
    ledger = make_ledger(live.header)
    live.follow(ledger)
    assert equal(live.arrays, replayed("float32", ledger))


# Nodes


def test_nodes_share_the_model_and_divide_the_data():
    nodes = [Node.of(CONFIG, i, 3) for i in range(3)]
    assert all(node.worker is workers.worker(CONFIG.model) for node in nodes)
    prompts = [row["prompt"] for node in nodes for row in node.examples]
    split = sum(len(node.examples) for node in nodes)
    assert split + len(nodes[0].worker.split(CONFIG.dataset, CONFIG.seed).test) == 60
    assert all(len(node.examples) for node in nodes)
    assert len(prompts) == split


def test_a_node_trains_in_place_the_same_way_each_time():
    node = Node.of(CONFIG, 0, 2)
    base = masters_of(node.worker.parameters)
    ends = []
    for round in (1, 1, 2):
        load_masters(node.worker.parameters, base)
        result = node.train(round)
        assert result.steps == 2
        ends.append(masters_of(node.worker.parameters))
    assert not equal(ends[0], base)
    assert equal(ends[0], ends[1])
    assert not equal(ends[0], ends[2])  # other examples


def origins(examples):
    return sorted(row["origin"] for row in examples)


def test_data_of_its_own_are_not_divided():
    natural = replace(CONFIG.dataset, partitioner="natural", partition_by="room")
    own = Node.of(replace(CONFIG, dataset=natural), 7, None)  # a column that is not needed
    split = Worker(CONFIG.model).split(replace(CONFIG.dataset, holdout=0.0), CONFIG.seed)
    assert len(own.examples) == 60
    assert origins(own.examples) == origins(split.train)


def test_a_node_evaluates_its_own_held_out_examples():
    config = replace(CONFIG, strategy=replace(CONFIG.strategy, fraction_evaluate=1.0))
    one, two = (Node.of(config, i, 2) for i in range(2))
    whole = Node.of(CONFIG, 0, 2)
    assert len(whole.held_out) == 0
    assert origins([*one.examples, *one.held_out]) == origins(whole.examples)
    loss = one.evaluate()["loss"]
    assert loss == score(one.worker.lm, one.held_out, config)["loss"]
    assert loss != two.evaluate()["loss"]
    with torch.no_grad():
        for p in one.worker.parameters.values():
            p.mul_(1.5)
    assert one.evaluate()["loss"] != loss


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"train.optimizer": "Sgd"}, ConfigError, r"'train\.optimizer' = 'Sgd'.*'SGD'"),
        ({"train.optimizer-args": "speed=2"}, ConfigError, r"'train\.optimizer-args'.*speed=2"),
        ({"dataset.name": "/no/such.jsonl"}, DataError, r"/no/such\.jsonl"),
        ({"model.name": "builtin:huge"}, ModelError, "builtin:huge"),
    ],
)
def test_what_a_node_cannot_use_is_named(changes, error, message):
    with pytest.raises(error, match=message):
        Node.of(parse(changes), 0, 2)


def test_more_nodes_than_examples():
    with pytest.raises(DataError, match="54 training examples .* 55 clients"):
        Node.of(CONFIG, 0, 55)
    assert len(Node.of(CONFIG, 53, 54).examples) == 1
