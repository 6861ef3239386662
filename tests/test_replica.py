"""The replica: the same bits however it got to a round, and nobody else's rounds."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from ferret_flwr.ledger import Entry, Ledger, LedgerError
from ferret_flwr.projection import projection
from ferret_flwr.projection.kernels import reference
from ferret_flwr.projection.layout import Blocks, Layout
from ferret_flwr.projection.plan import RoundPlan
from ferret_flwr.replica import Replica, ReplicaError
from ferret_flwr.training.tensors import masters_of

SHAPES = {"embed": (20, 15), "norm": (15,), "head": (15, 31)}
LAYOUT = Layout.of({name: np.empty(shape) for name, shape in SHAPES.items()})
ROUNDS = 5
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


pytestmark = pytest.mark.usefixtures("one_thread")


def base(dtype=torch.float32):
    """Return w_0, in ``dtype``, the same for every call."""
    rng = np.random.default_rng(0)
    return {
        name: torch.from_numpy(rng.standard_normal(shape)).to(dtype)
        for name, shape in SHAPES.items()
    }


def make_replica(dtype=torch.float32):
    return Replica(LAYOUT, masters_of(base(dtype)))


def make_entry(round, seeds=(1,), size=LAYOUT.size, scale=1e-4):
    blocks = Blocks.of(size, 3)
    family = "truncated-normal" if round % 2 == 0 else "rademacher"
    counts = np.arange(1, blocks.count + 1) * round
    plan = RoundPlan(round, 100 + round, family, blocks, counts)
    shape = len(seeds), plan.num_coefficients
    coefficients = np.random.default_rng(round).standard_normal(shape) * scale
    return Entry(plan, seeds, coefficients.astype(np.float32), 1.0)


def make_ledger(header, rounds=ROUNDS, seeds=(1,)):
    return Ledger(header, tuple(make_entry(r, seeds) for r in range(1, rounds + 1)))


def flat(arrays):
    return np.concatenate([array.ravel() for array in arrays])


def defined(dtype, ledger):
    """Return m_r as the design defines it, with the reference kernel: float32, ``(d,)``."""
    m = flat(masters_of(base(dtype)))
    for entry in ledger.entries:
        for seed, row in zip(entry.seeds, entry.coefficients, strict=True):
            m = m - reference.reconstruct(row, entry.plan.with_seed(seed))
    return m


@pytest.mark.parametrize("seeds", [(1,), (3, 1, 2)], ids=["shared", "per client"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_replay_is_an_incremental_master_is_the_definition(dtype, seeds):
    at_once, step_by_step, in_jumps = (make_replica(dtype) for _ in range(3))
    ledger = make_ledger(at_once.header, seeds=seeds)
    at_once.follow(ledger)
    for round in range(ROUNDS + 1):
        step_by_step.follow(ledger.until(round))
        assert step_by_step.round == round
        assert flat(step_by_step.arrays).tobytes() == defined(dtype, ledger.until(round)).tobytes()
    for round in (2, 2, ROUNDS):
        in_jumps.follow(ledger.until(round))
    assert at_once.fingerprint == step_by_step.fingerprint == in_jumps.fingerprint
    assert flat(at_once.arrays).tobytes() == flat(step_by_step.arrays).tobytes()
    assert flat(at_once.arrays).tobytes() == flat(in_jumps.arrays).tobytes()


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_masters_keep_what_the_models_dtype_would_lose(dtype):
    replica = make_replica(dtype)
    ledger = make_ledger(replica.header)
    lossy = torch.from_numpy(flat(replica.arrays)).to(dtype)
    for entry in ledger.entries:
        update = reference.reconstruct(entry.coefficients[0], entry.plan.with_seed(1))
        lossy -= torch.from_numpy(update).to(dtype)
    replica.follow(ledger)
    rounded = torch.from_numpy(flat(replica.arrays)).to(dtype)
    assert not torch.equal(rounded, lossy)


def test_seeds_of_clients_matter_and_so_does_their_order():
    ends = set()
    for seeds in ((1, 2), (2, 1), (1, 3), (1,)):
        replica = make_replica()
        replica.follow(make_ledger(replica.header, rounds=1, seeds=seeds))
        ends.add(replica.fingerprint)
    assert len(ends) == 4


def test_the_arrays_given_are_moved_in_place():
    arrays = masters_of(base())
    replica = Replica(LAYOUT, arrays)
    before = flat(arrays)
    replica.follow(make_ledger(replica.header, rounds=1))
    assert all(mine is given for mine, given in zip(replica.arrays, arrays, strict=True))
    assert (flat(arrays) != before).all()


def test_the_header_names_the_base_for_ever():
    replica = make_replica()
    header = replica.header
    assert (header.size, header.layout) == (LAYOUT.size, LAYOUT.fingerprint)
    assert header.base == replica.fingerprint
    replica.follow(make_ledger(header))
    assert replica.header == header
    assert replica.fingerprint not in ("", header.base)


@pytest.mark.parametrize("name", ["size", "layout", "base"])
def test_a_ledger_of_another_model_changes_nothing(name):
    replica = make_replica()
    before = flat(replica.arrays)
    size = LAYOUT.size + 1 if name == "size" else LAYOUT.size
    header = replace(replica.header, **{name: size if name == "size" else "another"})
    foreign = Ledger(header, (make_entry(1, size=size),))
    with pytest.raises(LedgerError, match="this model has another"):
        replica.follow(foreign)
    assert flat(replica.arrays).tobytes() == before.tobytes()
    assert replica.round == 0
    assert projection.fingerprint(replica.arrays, LAYOUT) == replica.header.base


def test_a_ledger_that_ends_before_the_replica():
    replica = make_replica()
    ledger = make_ledger(replica.header)
    replica.follow(ledger.until(3))
    before = flat(replica.arrays)
    with pytest.raises(LedgerError, match="the replica is at round 3, the ledger at 2"):
        replica.follow(ledger.until(2))
    assert flat(replica.arrays).tobytes() == before.tobytes()


def test_the_fingerprint_in_the_ledger_is_compared():
    ledger = make_ledger(make_replica().header)
    truth = make_replica()
    truth.follow(ledger)
    known = ledger.with_fingerprint(truth.fingerprint)
    make_replica().follow(known)
    digit = "0" if truth.fingerprint[0] != "0" else "1"
    wrong = ledger.with_fingerprint(digit + truth.fingerprint[1:])
    replica = make_replica()
    for _ in range(2):  # nor is it forgotten
        with pytest.raises(ReplicaError) as caught:
            replica.follow(wrong)
        assert f"round {ROUNDS}" in str(caught.value)
        assert truth.fingerprint in str(caught.value)
        assert wrong.fingerprint in str(caught.value)


@pytest.mark.parametrize("tensor", range(len(SHAPES)))
@pytest.mark.parametrize("bit", [0, 13, 31])
def test_one_flipped_bit_diverges(tensor, bit):
    ledger = make_ledger(make_replica().header)
    truth = make_replica()
    truth.follow(ledger)
    diverged = make_replica()
    diverged.follow(ledger.until(ROUNDS - 1))
    diverged.arrays[tensor].view(np.uint32).flat[-1] ^= np.uint32(1 << bit)
    if bit:  # a flip of the last bit may round away in the next step
        with pytest.raises(ReplicaError, match=truth.fingerprint):
            diverged.follow(ledger.with_fingerprint(truth.fingerprint))
    flipped = make_replica()
    flipped.arrays[tensor].view(np.uint32).flat[0] ^= np.uint32(1 << bit)
    assert Replica(LAYOUT, flipped.arrays).header.base != truth.header.base


def test_swapped_weights_diverge():
    arrays = masters_of(base())
    arrays[2] = arrays[2][::-1].copy()
    assert Replica(LAYOUT, arrays).fingerprint != make_replica().fingerprint
