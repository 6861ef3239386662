"""The arrays of another app: which are tuned, how they are kept, what is refused."""

import numpy as np
import pytest

from ferret_flwr.base import Base, BaseError
from ferret_flwr.replica import Replica


def make(**arrays):
    return Base(tuple(arrays), tuple(np.asarray(array) for array in arrays.values()))


@pytest.fixture
def base():
    rng = np.random.default_rng(0)
    return make(
        bias=np.zeros(3, dtype=np.float32),
        weight=rng.standard_normal((4, 3)),
        steps=np.array(2**40, dtype=np.int64),
        half=rng.standard_normal((5, 2)).astype(np.float16),
        nothing=np.zeros((0, 4), dtype=np.float32),
    )


def test_matrices_come_first_and_counters_not_at_all(base):
    assert base.layout.names == ("weight", "half", "bias")
    assert (base.layout.size, base.layout.exact_size) == (25, 3)
    assert all(master.dtype == np.float32 for master in base.masters())
    assert base.nbytes == 12 + 96 + 8 + 20


def test_the_app_sees_its_own_arrays(base):
    masters = base.masters()
    for master in masters:
        master += 1
    arrays = base.at(masters)
    for array, start in zip(arrays, base.arrays, strict=True):
        assert (array.dtype, array.shape) == (start.dtype, start.shape)
    np.testing.assert_array_equal(arrays[0], 1)
    assert arrays[2] == 2**40  # which float32 does not hold beside one more


def test_what_is_kept_on_disk_is_the_same(base, tmp_path):
    path = tmp_path / "base"
    base.save(path)
    kept = Base.load(path)
    assert kept.about() == base.about()
    for array, start in zip(kept.arrays, base.arrays, strict=True):
        assert (array.dtype, array.shape) == (start.dtype, start.shape)
        np.testing.assert_array_equal(array, start)
    header = Replica(base.layout, base.masters()).header
    assert kept.fits(header)
    kept.arrays[1][0, 0] += 1
    assert not kept.fits(header)


@pytest.mark.parametrize("damage", [lambda b: b[:-1], lambda b: b[:40], lambda b: b"", None])
def test_a_damaged_file_is_named(damage, base, tmp_path):
    path = tmp_path / "base"
    if damage:
        base.save(path)
        path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(BaseError, match=f"'{path}' holds no base model"):
        Base.load(path)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"a": np.ones((2, 2)), "b": np.ones(2, dtype=complex)}, "array 'b' is of complex128"),
        ({"a": np.ones((2, 2)), "b": np.array(["x"])}, "array 'b' is of <U1"),
        ({"a": np.full((2, 2), 1e300)}, "array 'a' has elements that are not finite in float32"),
        ({"a": np.array([np.nan])}, "array 'a' has elements that are not finite"),
        ({"a": np.ones(3, dtype=int)}, "none of the 1 arrays is of float16, float32, float64"),
        ({}, "none of the 0 arrays"),
    ],
)
def test_what_cannot_be_tuned_is_named(arrays, message):
    with pytest.raises(BaseError, match=message):
        make(**arrays)


def test_if_there_are_only_vectors_they_are_projected():
    assert make(a=np.ones(3), b=np.ones(4)).layout.exact == 0


def test_tied_matrices_are_tuned_once():
    rng = np.random.default_rng(0)
    table = rng.standard_normal((6, 4)).astype(np.float32)
    same = {
        "embed": table,
        "scale": np.ones((2, 2), dtype=np.float32),  # equal constants are not tied
        "other": np.ones((2, 2), dtype=np.float32),
        "head": table.copy(),
        "half": table.astype(np.float16),
    }
    base = make(**same)
    assert base.layout.names == ("embed", "scale", "other", "half")
    masters = base.masters()
    masters[0] += 1
    np.testing.assert_array_equal(base.at(masters)[3], table + 1)
    with pytest.raises(BaseError, match="arrays 'embed' and 'head' were equal at the start"):
        base.tuned([table, *base.arrays[1:3], table * 2, base.arrays[4]])
    free = Base(base.names, base.arrays, tie_equal=False)
    assert free.layout.names == ("embed", "scale", "other", "head", "half")


def _other(base, change):
    names, arrays = list(base.names), [array.copy() for array in base.arrays]
    change(names, arrays)
    return Base(tuple(names), tuple(arrays))


def _counts_on(names, arrays):
    arrays[2] += 1


def _is_narrower(names, arrays):
    arrays[1] = arrays[1].astype(np.float32).astype(np.float64)
    arrays[1] = arrays[1].astype(np.float32)


def _differs_beyond_float32(names, arrays):
    arrays[1][0, 0] = np.nextafter(arrays[1][0, 0], 10)


def _is_in_another_order(names, arrays):
    names[:] = names[::-1]
    arrays[:] = arrays[::-1]


@pytest.mark.parametrize(
    "change", [_counts_on, _is_narrower, _differs_beyond_float32, _is_in_another_order]
)
def test_a_base_is_more_than_its_float32_parameters(change, base):
    """Nodes keep bases on their disks: another one must not pass for it."""
    header = Replica(base.layout, base.masters()).header
    assert base.fits(header)
    other = _other(base, change)
    assert not other.fits(header)
    assert other.layout.fingerprint != base.layout.fingerprint
