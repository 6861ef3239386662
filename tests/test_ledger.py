"""The ledger: what is saved comes back, and what was changed does not pass."""

import hashlib
import json
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from ferret_flwr.ledger import Entry, Header, Ledger, LedgerError
from ferret_flwr.projection.layout import Blocks, InterleavedBlocks
from ferret_flwr.projection.plan import PlanError, RoundPlan

SIZE = 700
HEADER = Header(layout="layout", size=SIZE, base="0123456789abcdef")
COUNTS = {1: [2, 1, 3], 2: [1, 1, 1], 3: [1, 200, 1]}  # 200 takes two bytes
SEEDS = {1: (7,), 2: (1, 2, 2**63 - 1), 3: (9,)}


def make_plan(round, counts=None, size=SIZE):
    blocks = Blocks.of(size, 3)
    family = "truncated-normal" if round == 3 else "rademacher"
    return RoundPlan(round, 10 + round, family, blocks, np.array(counts or COUNTS[round]))


def make_entry(round, plan=None, seeds=None):
    plan, seeds = plan or make_plan(round), seeds or SEEDS.get(round, (round,))
    rng = np.random.default_rng(round)
    coefficients = rng.standard_normal((len(seeds), plan.num_coefficients), dtype=np.float32)
    fingerprint = f"{round:016x}" if round != 2 else ""
    return Entry(plan, seeds, coefficients, 0.1 * round, fingerprint)


@pytest.fixture
def ledger():
    return Ledger(HEADER, tuple(make_entry(round) for round in COUNTS))


def values(entry):
    """Return everything in ``entry`` as values that compare."""
    plan = entry.plan
    return (
        (plan.round, plan.seed, plan.family, plan.blocks, plan.counts.tolist()),
        (entry.seeds, entry.coefficients.tobytes(), entry.coefficients.shape),
        (entry.rate, entry.fingerprint),
    )


def same(a, b):
    return (
        a.header == b.header
        and a.digests == b.digests
        and [values(entry) for entry in a.entries] == [values(entry) for entry in b.entries]
    )


def forge(content, change):
    """Return the file with its parts changed and a checksum that fits, as a forger would."""
    length = int.from_bytes(content[:8], "little")
    text = json.loads(content[8 : 8 + length])["__metadata__"]["ferret"]
    meta, tensors = json.loads(text), load_tensors(content)
    head = meta.pop("head")
    del meta["checksum"]
    change(meta, tensors)
    checksum = hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()
    text = json.dumps(meta | {"head": head, "checksum": checksum})
    return save_tensors(tensors, metadata={"ferret": text})


@pytest.mark.parametrize("rounds", [0, 1, 2, 3])
def test_save_and_load(ledger, tmp_path, rounds):
    ledger = ledger.until(rounds)
    ledger.save(tmp_path / "new" / "ledger")
    loaded = Ledger.load(tmp_path / "new" / "ledger")
    assert same(loaded, ledger)
    assert len(loaded) == rounds
    assert loaded.to_bytes() == ledger.to_bytes()


@pytest.fixture
def mixed(ledger):
    """Return a ledger whose fourth round has interleaved blocks."""
    plan = RoundPlan(4, 14, "rademacher", InterleavedBlocks(SIZE, 5))
    return ledger.append(make_entry(4, plan))


def test_interleaved_blocks_behind_contiguous_ones(mixed):
    loaded = Ledger.from_bytes(mixed.to_bytes(), "file")
    assert same(loaded, mixed)
    assert loaded.entries[3].plan.blocks == InterleavedBlocks(SIZE, 5)
    assert mixed.entries[3].nbytes == 4 * 5
    moved = replace(mixed.entries[3].plan, blocks=InterleavedBlocks(SIZE + 1, 5))
    assert mixed.until(3).append(mixed.entries[3]).head == mixed.head
    with pytest.raises(LedgerError, match="701 parameters"):
        mixed.until(3).append(make_entry(4, moved))


def _claims_more(meta, tensors):
    meta["entries"][3]["interleaved"] = 6


def _claims_a_whale(meta, tensors):
    meta["header"]["size"] = 10**15
    meta["entries"] = [meta["entries"][3] | {"round": 1, "interleaved": 2**31 - 1}]
    for part in ("bases-per-block", "coefficients"):
        tensors[f"00001.{part}"] = tensors[f"00004.{part}"]


def _has_bases(meta, tensors):
    tensors["00004.bases-per-block"] = np.ones(5, dtype=np.uint8)


def _is_no_number(meta, tensors):
    meta["entries"][3]["interleaved"] = None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_claims_more, "round 4 has K = 6 coefficients, got shape"),
        (_claims_a_whale, "round 1 has K = 2147483647 coefficients, got shape"),
        (_has_bases, "bases per block are for contiguous blocks"),
        (_is_no_number, "not a valid ledger"),
    ],
)
def test_a_forged_interleaved_round(mixed, change, message):
    with pytest.raises(LedgerError, match=message):
        Ledger.from_bytes(forge(mixed.to_bytes(), change), "file")


@pytest.mark.parametrize("number", [1, 2])
def test_earlier_formats_are_read(number, ledger):
    def earlier(meta, tensors):
        meta["format"] = f"ferret-ledger-{number}"

    assert same(Ledger.from_bytes(forge(ledger.to_bytes(), earlier), "file"), ledger)


def test_what_is_the_same_is_the_same(ledger):
    """`same` must be able to fail, or the tests with it could not."""
    entries = ledger.entries
    assert not same(ledger, ledger.until(2))
    assert not same(ledger, ledger.with_fingerprint("other"))
    for other in (replace(entries[2], rate=0.5), replace(entries[2], seeds=(8,))):
        assert not same(ledger, Ledger(HEADER, (*entries[:2], other)))


def test_the_head_covers_everything_but_fingerprints(ledger):
    def head(entries, header=HEADER):
        return Ledger(header, tuple(entries)).head

    first, second, third = ledger.entries
    coefficients = second.coefficients.copy()
    coefficients.view(np.uint32)[1, 2] ^= 1
    plan = second.plan
    two = np.array([plan.bases_per_block[:2].sum(), plan.bases_per_block[2]])
    others = [
        replace(second, coefficients=coefficients),
        replace(second, coefficients=second.coefficients[::-1].copy()),
        replace(second, seeds=second.seeds[::-1]),
        replace(second, rate=np.nextafter(second.rate, 1)),
        replace(second, plan=plan.with_seed(plan.seed + 1)),
        replace(second, plan=replace(plan, family="truncated-normal")),
        replace(second, plan=replace(plan, blocks=Blocks(SIZE, 384), bases_per_block=two)),
        replace(second, plan=replace(plan, round=9)),
    ]
    moved = replace(third.plan, bases_per_block=np.array([200, 1, 1]))
    heads = [
        ledger.head,
        *(head([first, other, third]) for other in others),
        head([first, second, replace(third, plan=moved)]),
        head([first, third, second]),
        head([first, third]),
        head([first, second]),
        head([first, second, second, third]),
        head(ledger.entries, replace(HEADER, base="another")),
        head(ledger.entries, replace(HEADER, layout="another")),
        head(ledger.entries, replace(HEADER, size=SIZE + 1)),
    ]
    assert len(set(heads)) == len(heads)
    assert head([first, replace(second, fingerprint="x"), third]) == ledger.head


def _change_coefficient(meta, tensors):
    tensors["00002.coefficients"][1, 2] += 1


def _change_count(meta, tensors):
    tensors["00001.bases-per-block"][:] = [1, 2, 3]


def _change_rate(meta, tensors):
    meta["entries"][1]["rate"] = 1.0


def _change_seed(meta, tensors):
    meta["entries"][1]["seeds"][0] += 1


def _change_header(meta, tensors):
    meta["header"]["base"] = "another"


def _remove_last(meta, tensors):
    del meta["entries"][2]


def _remove_first(meta, tensors):
    """Close the gap by numbering the rest anew."""
    del meta["entries"][0]
    for entry in meta["entries"]:
        entry["round"] -= 1
        for name in ("bases-per-block", "coefficients"):
            tensors[f"{entry['round']:05d}.{name}"] = tensors[f"{entry['round'] + 1:05d}.{name}"]


def _reorder(meta, tensors):
    meta["entries"] = [meta["entries"][i] for i in (1, 0, 2)]
    for round, entry in enumerate(meta["entries"], 1):
        entry["round"] = round
    for name in ("bases-per-block", "coefficients"):
        one, two = f"00001.{name}", f"00002.{name}"
        tensors[one], tensors[two] = tensors[two], tensors[one]


def _insert(meta, tensors):
    meta["entries"].append(meta["entries"][2] | {"round": 4})
    for name in ("bases-per-block", "coefficients"):
        tensors[f"00004.{name}"] = tensors[f"00003.{name}"]


FORGERIES = (
    _change_coefficient,
    _change_count,
    _change_rate,
    _change_seed,
    _change_header,
    _remove_last,
    _remove_first,
    _reorder,
    _insert,
)


@pytest.mark.parametrize("change", FORGERIES)
def test_a_forged_round_breaks_the_chain(ledger, change):
    with pytest.raises(LedgerError, match="'forged' is not a valid ledger: its coefficients"):
        Ledger.from_bytes(forge(ledger.to_bytes(), change), "forged")


def test_forging_nothing_passes(ledger):
    content = forge(ledger.to_bytes(), lambda meta, tensors: None)
    assert same(Ledger.from_bytes(content, "unchanged"), ledger)


def _set(where, key, value):
    def change(meta, tensors):
        target = meta if where is None else meta["entries"][0] if where == 0 else meta[where]
        target[key] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set(None, "format", "ferret-ledger-9"), "'ferret-ledger-9', expected ferret-ledger-1"),
        (_set(None, "format", None), "None, expected ferret-ledger-1"),
        (_set(None, "entries", 3), "TypeError"),
        (_set("header", "size", SIZE + 400), "bases per block must be"),
        (_set("header", "size", "many"), "TypeError"),
        (_set("header", "colour", "red"), "TypeError"),
        (_set(0, "round", 2), "1 seeds for 3 rows"),
        (_set(0, "round", 9), "00009"),
        (_set(0, "round", 1.0), "ValueError"),
        (_set(0, "block-size", 0), "multiple of 128"),
        (_set(0, "block-size", float("inf")), "OverflowError"),
        (_set(0, "block-size", -128), "multiple of 128"),
        (_set(0, "family", "cauchy"), "family must be one of rademacher"),
        (_set(0, "seed", -1), "seed must be in"),
        (_set(0, "seeds", [2**63]), "seed must be in"),
        (_set(0, "seeds", []), "0 seeds for 1 rows"),
        (_set(0, "seeds", ["7"]), "TypeError"),
        (_set(0, "rate", None), "TypeError"),
    ],
)
def test_values_that_cannot_be(ledger, change, message):
    with pytest.raises(LedgerError, match="^'strange' is not a valid ledger: ") as caught:
        Ledger.from_bytes(forge(ledger.to_bytes(), change), "strange")
    assert message in str(caught.value)


def test_a_description_that_was_edited(ledger):
    content = ledger.to_bytes()
    assert content.count(b"0000000000000003") == 1  # a fingerprint, which the chain leaves out
    with pytest.raises(LedgerError, match="its description has been changed"):
        Ledger.from_bytes(content.replace(b"0000000000000003", b"0000000000000004"), "edited")


def test_any_flipped_bit_is_noticed(ledger):
    content = ledger.to_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    rng = np.random.default_rng(0)
    data = rng.choice(np.arange(8 * start, 8 * len(content)), 200, replace=False)
    description = rng.choice(np.arange(64, 8 * start), 300, replace=False)
    passed = []
    for bit in [*range(64), *description, *data]:
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        try:
            assert same(Ledger.from_bytes(bytes(damaged), "damaged"), ledger), f"bit {bit}"
            passed.append(bit)
        except LedgerError as error:
            assert str(error).startswith("'damaged' is not a valid ledger: ")
    assert all(64 <= bit < 8 * start for bit in passed)  # no length, no coefficient
    assert len(passed) < 10


def test_a_truncated_or_extended_file(ledger):
    content = ledger.to_bytes()
    for length in [*range(0, len(content), 29), len(content) - 1]:
        with pytest.raises(LedgerError, match="'cut' is not a valid ledger"):
            Ledger.from_bytes(content[:length], "cut")
    with pytest.raises(LedgerError, match="'long' is not a valid ledger"):
        Ledger.from_bytes(content + b"\0", "long")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"# a text file\nthat is no ledger\n",
        b"\xff" * 4096,
        save_tensors({"w": np.ones(3)}),
        save_tensors({"w": np.ones(3)}, metadata={"format": "pt"}),
        save_tensors({"w": np.ones(3)}, metadata={"ferret": "not JSON"}),
        save_tensors({"w": np.ones(3)}, metadata={"ferret": "[]"}),
        save_tensors({"w": np.ones(3)}, metadata={"ferret": "{}"}),
    ],
    ids=["empty", "text", "noise", "tensors", "model", "no JSON", "list", "nothing"],
)
def test_files_that_are_no_ledgers(tmp_path, content):
    path = tmp_path / "foreign"
    path.write_bytes(content)
    with pytest.raises(LedgerError, match=r"foreign' is not a valid ledger: .") as caught:
        Ledger.load(path)
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(LedgerError, match=r"cannot read .*missing': No such file"):
        Ledger.load(tmp_path / "missing")
    with pytest.raises(LedgerError, match=r"cannot read .*ledger.safetensors': No such file"):
        Ledger.load(tmp_path)


@pytest.mark.parametrize("round", [0, 1, 3, 5])
def test_only_the_next_round_is_appended(ledger, round):
    ledger = ledger.until(1)
    with pytest.raises(LedgerError, match=f"expected round 2, got round {round}"):
        ledger.append(make_entry(round, make_plan(round, counts=[1, 1, 1])))
    assert len(ledger.append(make_entry(2))) == 2
    assert len(ledger) == 1


def test_a_round_for_another_model(ledger):
    other = make_entry(4, make_plan(4, counts=[1, 1, 1], size=SIZE + 1))
    with pytest.raises(LedgerError, match="round 4 is for 701 parameters, the ledger for 700"):
        ledger.append(other)


def test_coefficients_that_no_entry_takes():
    plan = make_plan(1)
    good = np.ones((2, 6), dtype=np.float32)
    nan, inf = good.copy(), good.copy()
    nan[1, 4], inf[0, 2] = np.nan, np.inf
    for coefficients, seeds, message in (
        (nan, (1, 2), "coefficients of seed 2: 1 of 6 .* not finite, the first at 4"),
        (inf, (1, 2), "coefficients of seed 1: 1 of 6 .* not finite, the first at 2"),
        (good[:, :-1], (1, 2), r"K = 6 coefficients, got shape \(5,\)"),
        (good[0], (1,), "float32 matrix"),
        (good.astype(np.float64), (1, 2), "float32 matrix"),
        (good.astype(np.float16), (1, 2), "float32 matrix"),
        (good, (1,), "1 seeds for 2 rows"),
        (good[:0], (), "0 seeds for 0 rows"),
        (good, (1, -2), "seed must be in"),
    ):
        with pytest.raises(PlanError, match=message):
            Entry(plan, seeds, coefficients, 1.0)
    assert Entry(plan, (1, 2), good, 1.0).round == 1


def test_until_and_append_are_inverse(ledger):
    assert same(ledger.until(0), Ledger(HEADER))
    assert same(ledger.until(3), ledger)
    for round in (1, 2, 3):
        part = ledger.until(round)
        assert len(part) == round and part.head == ledger.digests[round]
        assert same(ledger.until(round - 1).append(ledger.entries[round - 1]), part)


def test_with_fingerprint(ledger):
    assert ledger.fingerprint == f"{3:016x}"
    assert ledger.until(2).fingerprint == ""
    assert ledger.until(0).fingerprint == HEADER.base
    known = ledger.until(2).with_fingerprint("known")
    assert known.fingerprint == "known" and known.head == ledger.until(2).head
    assert [e.fingerprint for e in known.entries] == [f"{1:016x}", "known"]
    assert Ledger.from_bytes(known.to_bytes(), "known").fingerprint == "known"
    assert same(ledger.until(0).with_fingerprint("base"), Ledger(HEADER))


def test_nbytes_is_what_the_arrays_weigh(ledger):
    assert ledger.entries[2].nbytes == 4 + 4 * 202
    for rounds in range(4):
        part = ledger.until(rounds)
        arrays = load_tensors(part.to_bytes()).values()
        assert part.nbytes == sum(array.nbytes for array in arrays)
        assert part.nbytes == sum(a.nbytes for entry in part.entries for a in entry.pack()[1])


@pytest.mark.parametrize("name", ["size", "layout", "base"])
def test_headers_that_differ(name):
    HEADER.check(replace(HEADER), "this model")
    other = replace(HEADER, **{name: 1 if name == "size" else "other"})
    theirs, mine = getattr(other, name), getattr(HEADER, name)
    with pytest.raises(LedgerError, match=f"this model has .*: {theirs}, the ledger has {mine}"):
        HEADER.check(other, "this model")


def test_a_refused_save_keeps_the_old_ledger(ledger, tmp_path, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    path = tmp_path / "ledger"
    ledger.until(2).save(path)
    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        ledger.save(path)
    assert same(Ledger.load(path), ledger.until(2))
    assert [entry.name for entry in tmp_path.iterdir()] == ["ledger"]
