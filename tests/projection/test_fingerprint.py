"""The fingerprint: any bit, any order, the same however it is computed."""

import numpy as np
import pytest

from ferret_flwr.projection import projection
from ferret_flwr.projection.kernels import cpu, reference
from ferret_flwr.projection.kernels.segments import Segments
from ferret_flwr.projection.layout import Layout

LAYOUT = Layout(("a", "b", "c"), ((10, 7), (1,), (64, 100)))
VECTOR = np.random.default_rng(0).standard_normal(LAYOUT.size).astype(np.float32)


def _cut(vector, layout=LAYOUT):
    pieces = np.split(vector.copy(), layout.offsets[1:-1])
    return [piece.reshape(shape) for piece, shape in zip(pieces, layout.shapes, strict=True)]


def _fingerprint(vector):
    return projection.fingerprint(_cut(vector), LAYOUT)


def test_equals_the_reference_for_any_threads(threads):
    assert _fingerprint(VECTOR) == f"{reference.fingerprint(VECTOR):016x}"


@pytest.mark.parametrize("largest", [1, 100, 2**16])
def test_does_not_depend_on_how_the_work_is_cut(threads, largest):
    segments = Segments.of_pieces(LAYOUT.here, 2**62, largest)
    assert cpu.fingerprint(_cut(VECTOR), segments) == reference.fingerprint(VECTOR)


def test_does_not_depend_on_how_tensors_are_cut():
    other = Layout(("all",), ((LAYOUT.size,),))
    assert projection.fingerprint([VECTOR], other) == _fingerprint(VECTOR)
    fortran = [np.asfortranarray(array) for array in _cut(VECTOR)]
    assert projection.fingerprint(fortran, LAYOUT) == _fingerprint(VECTOR)


@pytest.mark.parametrize("index", [0, 70, 71, LAYOUT.size - 1])
@pytest.mark.parametrize("bit", [0, 15, 31])
def test_changes_with_any_flipped_bit(index, bit):
    flipped = VECTOR.copy()
    flipped.view(np.uint32)[index] ^= np.uint32(1 << bit)
    assert _fingerprint(flipped) != _fingerprint(VECTOR)
    assert _fingerprint(flipped) == f"{reference.fingerprint(flipped):016x}"


@pytest.mark.parametrize("pair", [(0, 1), (69, 70), (3, LAYOUT.size - 1)])
def test_changes_when_two_elements_are_swapped(pair):
    swapped = VECTOR.copy()
    swapped[list(pair)] = swapped[list(pair[::-1])]
    assert _fingerprint(swapped) != _fingerprint(VECTOR)


def test_sees_the_sign_of_zero_and_every_position_of_zeros():
    zeros = np.zeros(LAYOUT.size, dtype=np.float32)
    assert _fingerprint(zeros) != _fingerprint(-zeros)
    ones = {}
    for index in range(0, LAYOUT.size, 97):
        one = zeros.copy()
        one[index] = 1
        ones[_fingerprint(one)] = index
    assert len(ones) == len(range(0, LAYOUT.size, 97))


def test_is_sixteen_digits_of_float32_only():
    assert len(_fingerprint(VECTOR)) == 16
    arrays = _cut(VECTOR)
    arrays[1] = arrays[1].astype(np.float64)
    with pytest.raises(ValueError, match="'b' must have dtype float32, got float64"):
        projection.fingerprint(arrays, LAYOUT)
