"""A model in pieces: what each process finds adds up to what one process finds."""

import numpy as np
import pytest

from ferret_flwr.projection import projection
from ferret_flwr.projection.layout import (
    Blocks,
    InterleavedBlocks,
    Layout,
    LayoutError,
    Pieces,
)
from ferret_flwr.projection.plan import PlanError, RoundPlan
from tests.projection.tensors import TRITON, array, device_of, tensors
from tests.projection.test_kernels import cut, lower, numbers

SHAPES = (70, 11), (0, 3), (33,), (1, 300), (45,)
NAMES = "embed", "empty", "norm", "row", "bias"


def make(exact, kind):
    layout = Layout(NAMES, SHAPES, exact)
    size = layout.size - layout.exact_size
    if kind == "interleaved":
        return layout, RoundPlan(
            1, 3, "rademacher", InterleavedBlocks(size, 70), exact=layout.exact_size
        )
    blocks = Blocks(size, 256)
    counts = np.arange(1, blocks.count + 1)
    return layout, RoundPlan(1, 3, "truncated-normal", blocks, counts, layout.exact_size)


def pieces_of(layout, rank, processes, add_up=lambda array: array):
    """Cut every tensor's rows as `torch.chunk` does; the last tensor lies everywhere."""
    first, size = [], []
    for shape in layout.shapes:
        rows, width = shape[0], int(np.prod(shape[1:]))
        start, stop = (min(rows, -(-rows // processes) * r) for r in (rank, rank + 1))
        first.append(start * width)
        size.append((stop - start) * width)
    first[-1], size[-1] = 0, shape[0]
    counted = [True] * (len(first) - 1) + [rank == 0]
    pieces = Pieces(tuple(first), tuple(size), tuple(counted), add_up)
    return Layout(layout.names, layout.shapes, layout.exact, pieces=pieces)


def of(arrays, part):
    bounds = zip(part.pieces.first, part.pieces.size, strict=True)
    return [a.reshape(-1)[s : s + n].copy() for a, (s, n) in zip(arrays, bounds, strict=True)]


@pytest.fixture(params=["arrays", *TRITON])
def put(request):
    if request.param == "arrays":
        return lambda arrays: arrays
    where = device_of(request.param)
    return lambda arrays: tensors(arrays, where)


def host(arrays):
    return [a if isinstance(a, np.ndarray) else array(a) for a in arrays]


CASES = pytest.mark.parametrize(("exact", "kind"), [(0, "interleaved"), (1, "contiguous")])
PROCESSES = 3


@CASES
def test_pieces_add_up(put, exact, kind):
    layout, plan = make(exact, kind)
    before, after = (cut(lower(numbers(layout.size, s), "bfloat16"), layout) for s in (0, 2))
    expected = projection.project(before, layout, plan, after)
    parts = [pieces_of(layout, rank, PROCESSES) for rank in range(PROCESSES)]
    found = [
        projection.project(put(of(before, part)), part, plan, put(of(after, part)))
        for part in parts
    ]
    assert all(gamma.any() for gamma in found[:2])
    atol = 1e-5 * np.abs(expected).max()
    np.testing.assert_allclose(sum(found), expected, rtol=0, atol=atol)
    assert not np.allclose(sum(found), 1.001 * expected, rtol=0, atol=atol)
    np.testing.assert_array_equal(sum(found)[plan.num_bases :], expected[plan.num_bases :])


@CASES
def test_pieces_are_reconstructed_where_they_lie(put, exact, kind):
    layout, plan = make(exact, kind)
    base, c = cut(numbers(layout.size), layout), numbers(plan.num_coefficients, 1)
    whole = [a.copy() for a in base]
    projection.subtract(whole, layout, plan, c, skip=[3])
    total = 0
    for rank in range(PROCESSES):
        part = pieces_of(layout, rank, PROCESSES)
        here = put(of(base, part))
        projection.subtract(here, part, plan, c, skip=[3])
        for ours, theirs in zip(host(here), of(whole, part), strict=True):
            assert ours.tobytes() == theirs.tobytes()
        total += int(projection.fingerprint(here, part), 16)

        again = put(of(base, part))
        projection.replay(again, part, [(plan, c), (plan, c / 3)], again)
        expected = [a.copy() for a in base]
        projection.replay(expected, layout, [(plan, c), (plan, c / 3)], expected)
        for ours, theirs in zip(host(again), of(expected, part), strict=True):
            assert ours.tobytes() == theirs.tobytes()
        updates = projection.reconstruct(c, part, plan, like=here)
        for ours, theirs in zip(
            host(updates), of(list(projection.reconstruct(c, layout, plan)), part), strict=True
        ):
            np.testing.assert_array_equal(ours, theirs)
    assert projection.fingerprint_text(total) == projection.fingerprint(whole, layout)


def test_a_process_may_hold_nothing(put):
    layout, plan = make(1, "contiguous")
    pieces = Pieces((0,) * 5, (0,) * 5, (True,) * 5, lambda array: array)
    part = Layout(layout.names, layout.shapes, layout.exact, pieces=pieces)
    nothing = put([np.zeros(0, dtype=np.float32) for _ in NAMES])
    assert not projection.project(nothing, part, plan).any()
    assert projection.fingerprint(nothing, part) == "0" * 16
    projection.subtract(nothing, part, plan, numbers(plan.num_coefficients))


def test_what_is_not_finite_elsewhere_is_named():
    layout, plan = make(0, "interleaved")

    def with_another(array):  # process, which finds its "row" not finite
        found = np.array([0, 0, 0, 1, 0]) if array.size == len(NAMES) else np.nan
        return array + found

    part = pieces_of(layout, 0, 2, with_another)
    here = of(cut(numbers(layout.size), layout), part)
    with pytest.raises(PlanError, match="not finite in tensor 'row'"):
        projection.project(here, part, plan)


def test_a_piece_of_another_size_is_named():
    layout, plan = make(0, "interleaved")
    part = pieces_of(layout, 0, 2)
    here = of(cut(numbers(layout.size), layout), part)
    with pytest.raises(LayoutError, match=r"'norm' must have 17 elements, here of shape \(33,\)"):
        projection.project([*here[:2], here[2][1:], *here[3:]], part, plan)
    with pytest.raises(LayoutError, match="of a sharded model .*: use 'train.memory' = 'st"):
        projection.Projection(part, plan)


def test_pieces_do_not_change_which_model_it_is():
    layout, _ = make(1, "interleaved")
    part = pieces_of(layout, 1, 2)
    assert part.fingerprint == layout.fingerprint and part.size == layout.size
    assert part != layout
