"""A model on a GPU: its replica lives there, with the bits that it has in host memory."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ferret_flwr.config import ModelConfig
from ferret_flwr.follower import Follower
from ferret_flwr.ledger import Ledger
from ferret_flwr.methods.ferret import local_round
from ferret_flwr.projection.arrays import to_host
from ferret_flwr.projection.layout import Blocks, InterleavedBlocks, Layout
from ferret_flwr.projection.plan import RoundPlan
from ferret_flwr.replica import Replica
from ferret_flwr.rounds import publish
from ferret_flwr.snapshot import Snapshots
from ferret_flwr.training.errors import ModelError
from ferret_flwr.training.tensors import (
    devices_of,
    load_masters,
    masters_of,
    masters_on,
    placed,
    trainable_parameters,
)
from ferret_flwr.training.worker import Worker, live_replica
from tests.projection import tensors as backends

pytestmark = pytest.mark.usefixtures("one_thread")

DTYPES = ["float32", "bfloat16"]


@pytest.fixture(params=backends.TRITON)
def device(request):
    """The GPU, or where Triton interprets."""
    return torch.device(backends.device_of(request.param))


class Model(SimpleNamespace):
    """What a `Worker` has, of a model that is small enough for the interpreter."""

    @classmethod
    def of(cls, dtype, devices):
        rng = np.random.default_rng(0)
        shapes = {"embed": (70, 11), "norm": (33,), "head": (60, 20)}
        parameters = {
            name: torch.nn.Parameter(torch.from_numpy(rng.standard_normal(shape)).to(device, dtype))
            for (name, shape), device in zip(shapes.items(), devices, strict=True)
        }
        layout = Layout.of(parameters)
        config = SimpleNamespace(dtype=str(dtype).removeprefix("torch."))
        follower = Follower(
            layout,
            lambda: masters_on(parameters, devices),
            config.dtype,
            lambda arrays: placed(arrays, devices),
        )
        return cls(
            parameters=parameters, layout=layout, config=config, devices=devices, follower=follower
        )


HERE = [None, None, None]


def make_worker(dtype, devices):
    return Model.of(getattr(torch, dtype), devices)


@pytest.fixture(params=["together", "apart"])
def devices(request, device):
    """Where each tensor lies: all on one device, or the second in host memory."""
    return [device, device if request.param == "together" else None, device]


def kinds(replica):
    return [None if isinstance(a, np.ndarray) else a.device.type for a in replica.arrays]


def make_ledger(header, rounds=3):
    """Return a ledger with rounds of both kinds of blocks."""
    size, ledger = header.size, Ledger(header)
    cut = Blocks.of(size, 4)
    for round in range(1, rounds + 1):
        blocks, counts = InterleavedBlocks.of(size, 150), None
        if round == 2:
            blocks, counts = cut, np.arange(1, cut.count + 1)
        plan = RoundPlan(round, 40 + round, "rademacher", blocks, counts)
        drawn = np.random.default_rng(round).standard_normal(plan.num_coefficients)
        ledger = ledger.append(publish(plan, drawn / 100, rate=1.0))
    return ledger


def on_host(replica):
    return [to_host(array).tobytes() for array in replica.arrays]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_replica_has_the_same_bits_wherever_it_lives(devices, dtype):
    here, there = make_worker(dtype, HERE), make_worker(dtype, devices)
    ledger = make_ledger(here.follower.from_base().header)
    assert there.follower.from_base().header == ledger.header
    for rounds in range(1, 4):
        ours = here.follower.follow(ledger.until(rounds))
        theirs = there.follower.follow(ledger.until(rounds))
        assert kinds(ours) == HERE
        assert kinds(theirs) == [device and device.type for device in devices]
        assert ours.fingerprint == theirs.fingerprint
        assert on_host(ours) == on_host(theirs)
    load_masters(here.parameters, ours.arrays)
    load_masters(there.parameters, theirs.arrays)
    for one, other in zip(here.parameters.values(), there.parameters.values(), strict=True):
        assert torch.equal(one, other.cpu())


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_local_round_sends_the_same_numbers(devices, dtype):
    outcomes, starts = [], []
    for where in (HERE, devices):
        worker = make_worker(dtype, where)
        ledger = make_ledger(worker.follower.from_base().header, rounds=1)
        replica = worker.follower.follow(ledger)

        def train(parameters=worker.parameters):
            starts.append([backends.array(p).tobytes() for p in parameters.values()])
            rng = np.random.default_rng(2)
            with torch.no_grad():
                for p in parameters.values():
                    p.sub_(torch.from_numpy(rng.standard_normal(p.shape) / 50).to(p))

        blocks = InterleavedBlocks.of(worker.layout.size, 600)
        plan = RoundPlan(2, 7, "rademacher", blocks)
        before = on_host(replica)
        outcomes.append(local_round(replica, worker.parameters, plan, train)[0])
        assert on_host(replica) == before
    assert starts[0] == starts[1]
    ours, theirs = outcomes
    assert theirs.coefficients.dtype == np.float32
    scale = np.abs(ours.coefficients).max()
    np.testing.assert_allclose(theirs.coefficients, ours.coefficients, rtol=0, atol=1e-5 * scale)
    assert not np.allclose(
        theirs.coefficients, 1.001 * ours.coefficients, rtol=0, atol=1e-5 * scale
    )
    assert theirs.fidelity == pytest.approx(ours.fidelity, rel=1e-4)
    assert 0 < theirs.fidelity < 1


def test_snapshots_are_read_wherever_they_were_written(devices, tmp_path):
    here, there = make_worker("float32", HERE), make_worker("float32", devices)
    ledger = make_ledger(here.follower.from_base().header)
    snapshots = Snapshots(tmp_path)
    for writer, reader in ((there, here), (here, there)):
        written = writer.follower.follow(ledger)
        snapshots.save(written.fingerprint, written.arrays)
        named = ledger.with_fingerprint(written.fingerprint)

        def no_base():
            raise AssertionError("the snapshot was not read")

        follower = Follower(reader.layout, no_base, place=reader.follower.place)
        read = follower.follow(named, snapshots)
        assert on_host(read) == on_host(written)
        assert kinds(read) == kinds(reader.follower.from_base())
        (path,) = tmp_path.glob("*.npy")
        path.unlink()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_live_replica_moves_the_model_where_it_is(devices, dtype):
    worker = make_worker(dtype, devices)
    ledger = make_ledger(Replica(worker.layout, masters_of(worker.parameters), dtype).header)
    expected = Replica(worker.layout, masters_of(worker.parameters), dtype)
    expected.follow(ledger)
    replica = live_replica(worker)
    replica.follow(ledger)
    assert on_host(replica) == on_host(expected)
    moved = [array.tobytes() for array in masters_of(worker.parameters)] == on_host(expected)
    assert moved == (dtype == "float32")


def test_masters_on_a_device_are_copies(device):
    parameters = {"w": torch.nn.Parameter(torch.tensor([0.1, -3.0], dtype=torch.bfloat16))}
    (master,) = masters_on(parameters, [device])
    assert master.dtype == torch.float32 and not master.requires_grad
    assert master.tolist() == parameters["w"].tolist()
    master[0] = 7
    assert parameters["w"][0] != 7


def test_the_workers_replica_is_where_it_was_asked_for(device):
    worker = Worker(ModelConfig(device=device.type), device=device)
    replica, arrays = worker.follower.from_base(), masters_of(worker.parameters)
    assert all(a.device.type == device.type for a in replica.arrays)
    assert replica.header == Replica(worker.layout, arrays).header
    assert worker.base_fingerprint == replica.header.base


def test_a_model_in_host_memory_stays_there():
    assert devices_of({"w": torch.nn.Parameter(torch.zeros(3))}) == [None]
    arrays = [np.zeros(3, dtype=np.float32)]
    assert placed(arrays, [None])[0] is arrays[0]


def test_a_tensor_that_was_offloaded_is_named():
    parameters = {"w": torch.zeros(3), "v": torch.zeros(3, device="meta")}
    with pytest.raises(ModelError, match="parameter 'v' is not in memory: .*device map without"):
        devices_of(parameters)


def test_a_model_that_accelerate_has_offloaded(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    where = {"0": "cpu", "1": "disk"}
    accelerate.dispatch_model(model, where, offload_dir=str(tmp_path), main_device="cpu")
    with pytest.raises(ModelError, match="parameter '1.weight' is not in memory"):
        devices_of(trainable_parameters(model))


def test_a_model_over_all_gpus():
    pytest.importorskip("accelerate")
    worker, other = Worker(ModelConfig(device="balanced")), Worker(ModelConfig(device="cpu"))
    places = {None if isinstance(a, np.ndarray) else a.device for a in worker._base()}
    gpus = {torch.device("cuda", i) for i in range(torch.cuda.device_count())} or {None}
    assert places == (gpus if backends.find_spec("triton") else {None})
    assert worker.layout == other.layout  # tied weights are tied
    assert worker.base_fingerprint == other.base_fingerprint


def test_accelerate_is_named_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(ModelError, match="'model.device' = 'balanced' .*accelerate"):
        Worker(ModelConfig(device="balanced"))
