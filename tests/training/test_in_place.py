"""A model that follows the ledger itself: the bits of a replica, from wherever it starts."""

import logging

import numpy as np
import pytest
import torch

from ferret_flwr.config import ModelConfig
from ferret_flwr.ledger import Ledger, LedgerError
from ferret_flwr.projection.layout import Layout
from ferret_flwr.replica import Replica, ReplicaError
from ferret_flwr.snapshot import Snapshots
from ferret_flwr.training import in_place
from ferret_flwr.training.in_place import InPlaceFollower
from ferret_flwr.training.models import load_model, stored_tensors
from ferret_flwr.training.tensors import (
    as_arrays,
    masters_in_turn,
    masters_of,
    rounded_like,
    trainable_parameters,
)
from ferret_flwr.training.worker import Worker
from tests.test_replica import make_entry

pytestmark = pytest.mark.usefixtures("one_thread")

DTYPES = ["float32", "bfloat16"]


class Bases:
    """Counts how often each way to read the base is taken."""

    def __init__(self, *ways):
        self.ways, self.taken = ways, [0] * len(ways)

    def __call__(self):
        for i, way in enumerate(self.ways):
            yield lambda i=i, way=way: self._take(i, way)

    def _take(self, i, way):
        self.taken[i] += 1
        return way()


@pytest.fixture
def folder(tmp_path):
    """Return a model's folder as users have it."""
    loaded = load_model(ModelConfig())
    loaded.model.save_pretrained(tmp_path / "model", max_shard_size="200KB")
    loaded.tokenizer.save_pretrained(tmp_path / "model")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 1
    return str(tmp_path / "model")


def ledger_for(parameters, rounds=3, seeds=(1,)):
    """Return a ledger that names the parameters at its end, and the replica there."""
    layout = Layout.of(parameters)
    replica = Replica(layout, masters_of(parameters))
    ledger = Ledger(replica.header)
    for round in range(1, rounds + 1):
        ledger = ledger.append(make_entry(round, seeds, layout.size, scale=1e-2))
        replica.follow(ledger)
        ledger = ledger.with_fingerprint(replica.fingerprint)
    return ledger, replica


def is_at(parameters, replica):
    return all(
        array.tobytes() == rounded_like(master, parameter).tobytes()
        for array, master, parameter in zip(
            as_arrays(parameters.values()), replica.arrays, parameters.values(), strict=True
        )
    )


def spoil(parameters):
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.mul_(1.5)


@pytest.mark.parametrize("seeds", [(1,), (3, 1, 2)], ids=["shared", "per client"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_bits_and_the_fingerprint_are_the_replicas(dtype, seeds):
    worker = Worker(ModelConfig(dtype=dtype))
    ledger, replica = ledger_for(worker.parameters, seeds=seeds)
    assert worker.in_place.from_base().header.base == replica.header.base
    for _ in range(2):  # trained, and brought there again
        reached = worker.in_place.follow(ledger)
        assert reached.fingerprint == replica.fingerprint == ledger.fingerprint
        assert is_at(worker.parameters, replica)
        spoil(worker.parameters)
        assert not is_at(worker.parameters, replica)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_base_is_read_again_from_its_file_one_tensor_at_a_time(dtype, folder, monkeypatch):
    worker = Worker(ModelConfig(name=folder, dtype=dtype))
    ledger, replica = ledger_for(worker.parameters)
    worker.in_place.follow(ledger)
    spoil(worker.parameters)
    monkeypatch.setattr("ferret_flwr.training.worker.load_model", lambda _: pytest.fail("whole"))
    worker.in_place.follow(ledger)
    assert is_at(worker.parameters, replica)


def test_a_file_with_other_numbers_is_not_taken(folder, caplog):
    worker = Worker(ModelConfig(name=folder))
    ledger, replica = ledger_for(worker.parameters)
    stored = stored_tensors(worker.config, worker.parameters)
    others = [tensor + 1 for tensor in stored]
    base = [p.detach().clone() for p in worker.parameters.values()]
    bases = Bases(lambda: masters_in_turn(others), lambda: masters_in_turn(base))
    follower = InPlaceFollower(worker.layout, worker.parameters, bases)
    follower._base = worker.in_place.from_base()
    with caplog.at_level(logging.WARNING):
        follower.follow(ledger)
    assert bases.taken == [1, 1] and "its fingerprint is" in caplog.text
    assert is_at(worker.parameters, replica)
    follower = InPlaceFollower(worker.layout, worker.parameters, Bases(bases.ways[0]))
    follower._base = worker.in_place.from_base()
    with pytest.raises(ReplicaError, match="cannot be read again: its fingerprint is"):
        follower.follow(ledger)


def test_names_that_no_file_has_are_not_read():
    parameters = trainable_parameters(load_model(ModelConfig()).model)
    assert stored_tensors(ModelConfig(name="builtin:tiny"), parameters) is None


def test_a_model_that_is_there_is_not_moved_again():
    worker = Worker(ModelConfig())
    ledger, replica = ledger_for(worker.parameters)
    bases = Bases(*worker.in_place.bases())
    follower = InPlaceFollower(worker.layout, worker.parameters, bases)
    once, again = follower.follow(ledger), follower.follow(ledger)
    assert once == again and is_at(worker.parameters, replica)
    assert bases.taken[0] == 2  # for its fingerprint, and to move it


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("damage", ["", "flipped", "truncated", "garbage"])
def test_a_snapshot_is_nearer_and_a_damaged_one_changes_no_result(
    dtype, damage, tmp_path, monkeypatch
):
    worker = Worker(ModelConfig(dtype=dtype))
    ledger, replica = ledger_for(worker.parameters)
    early = Replica(worker.layout, masters_of(worker.parameters))
    early.follow(ledger.until(2))
    snapshots = Snapshots(tmp_path)
    snapshots.save(early.fingerprint, early.arrays)
    (path,) = tmp_path.glob("*.npy")
    content = bytearray(path.read_bytes())
    if damage == "flipped":
        content[-3] ^= 1
    elif damage == "truncated":
        content = content[:-4]
    elif damage:
        content = bytearray(b"nothing of the kind")
    path.write_bytes(content)
    base = [p.detach().clone() for p in worker.parameters.values()]
    bases = Bases(lambda: masters_in_turn(base))
    follower = InPlaceFollower(worker.layout, worker.parameters, bases, dtype)
    follower.from_base()
    follower.follow(ledger, snapshots)
    assert bases.taken == [2 if damage else 1]
    assert path.exists() == (not damage)
    assert is_at(worker.parameters, replica)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_long_replay_leaves_a_snapshot_of_canonical_parameters(dtype, tmp_path, monkeypatch):
    monkeypatch.setattr(in_place, "DISK_BYTES_PER_SECOND", float("inf"))
    worker = Worker(ModelConfig(dtype=dtype))
    ledger, replica = ledger_for(worker.parameters)
    worker.in_place.follow(ledger, Snapshots(tmp_path / "snapshots"))
    left = Snapshots(tmp_path / "snapshots").newest(ledger, worker.layout, dtype, after=0)
    if dtype == "float32":
        assert left is not None and left.fingerprint == replica.fingerprint
    else:  # the model holds rounded ones
        assert left is None


def test_a_ledger_of_another_model_changes_nothing():
    worker = Worker(ModelConfig())
    before = [p.detach().clone() for p in worker.parameters.values()]
    other = {name: p + 1 for name, p in worker.parameters.items()}
    ledger, _ = ledger_for(other)
    with pytest.raises(LedgerError, match="this model has another base model"):
        worker.in_place.follow(ledger)
    assert all(torch.equal(p, q) for p, q in zip(worker.parameters.values(), before, strict=True))


def test_the_fingerprint_in_the_ledger_is_compared():
    worker = Worker(ModelConfig())
    ledger, _ = ledger_for(worker.parameters)
    with pytest.raises(ReplicaError, match="the ledger names 0000"):
        worker.in_place.follow(ledger.with_fingerprint("0" * 16))


def test_lean_and_standard_clients_of_a_process_do_not_meet():
    worker = Worker(ModelConfig())
    ledger, replica = ledger_for(worker.parameters)
    worker.in_place.follow(ledger)
    spoil(worker.parameters)
    follower = worker.follower.follow(ledger)
    assert all(map(np.array_equal, follower.arrays, replica.arrays))
    worker.in_place.follow(ledger.until(1))
    assert worker.follower.follow(ledger).fingerprint == replica.fingerprint
