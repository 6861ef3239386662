"""One contract for every kernel: the reference's answers, bit for bit where defined."""

import itertools
import math
from dataclasses import replace

import numba
import numpy as np
import pytest
import torch

from ferret_flwr.projection import projection
from ferret_flwr.projection.families import FAMILIES
from ferret_flwr.projection.kernels import cpu, cpu_interleaved, reference, tiles
from ferret_flwr.projection.kernels.segments import Segments
from ferret_flwr.projection.layout import Blocks, InterleavedBlocks, Layout, LayoutError
from ferret_flwr.projection.plan import PlanError, RoundPlan
from tests.projection.tensors import TRITON, OnTensors, device_of

KERNELS = {"cpu": {"contiguous": cpu, "interleaved": cpu_interleaved}}
DTYPES = ("float32", "float16", "bfloat16")
BLOCK = 256
CASES = {  # shapes, and contiguous blocks of a size or interleaved ones of a number
    "one": ([(1,)], Blocks, BLOCK),
    "group-1": ([(127,)], Blocks, BLOCK),
    "group": ([(128,)], Blocks, BLOCK),
    "group+1": ([(129,)], Blocks, BLOCK),
    "block-1": ([(BLOCK - 1,)], Blocks, BLOCK),
    "block": ([(16, BLOCK // 16)], Blocks, BLOCK),
    "block+1": ([(BLOCK + 1,)], Blocks, BLOCK),
    "prime": ([(1009,)], Blocks, BLOCK),
    "tile+block+1": ([(tiles.ELEMENTS + BLOCK + 1,)], Blocks, 2 * tiles.ELEMENTS),
    "tensors across blocks": (
        [(3, 5), (100, 7), (1,), (0, 4), (), (13, 11), (300,)],
        Blocks,
        BLOCK,
    ),
    "tensors across tiles": ([(4000,), (10, 20), (5000,)], Blocks, 3 * tiles.ELEMENTS),
    "one dealt out": ([(1,)], InterleavedBlocks, 1),
    "all to one": ([(300,)], InterleavedBlocks, 1),
    "one to each": ([(13, 11), (157,)], InterleavedBlocks, 300),
    "prime dealt out": ([(1009,)], InterleavedBlocks, 97),
    "almost one to each": ([(1009,)], InterleavedBlocks, 1000),
    "tensors dealt out": (
        [(3, 5), (100, 7), (1,), (0, 4), (), (13, 11), (300,)],
        InterleavedBlocks,
        128,
    ),
    "tiles dealt out": ([(4000,), (10, 20), (5000,)], InterleavedBlocks, 1000),
    "rows of many tiles": (
        [(3 * tiles.ELEMENTS + 5,), (77, 100)],
        InterleavedBlocks,
        2 * tiles.ELEMENTS + 3,
    ),
}
TILED = ["prime", "tensors across blocks", "tensors across tiles", "tensors dealt out",
         "tiles dealt out", "rows of many tiles"]  # fmt: skip
LARGEST = (100, 128, 1000, 2**16)  # how finely the index space is cut for the threads


@pytest.fixture(autouse=True)
def _several_parts(monkeypatch):
    """Divide small arrays, too."""
    monkeypatch.setattr(cpu_interleaved, "ELEMENTS_PER_SUM", 1)


# A kernel adds at most a tile's products in float32, so by the probabilistic bound of Higham and
# Mary (2019), |γ − γ_ref| ≤ λ √n u Σ|v Δ| with n = 4096, u = 2⁻²⁴; λ = 6 fails once in 10⁷ sums.
ROUNDING = 6 * math.sqrt(tiles.ELEMENTS) * 2.0**-24


def lower(x, dtype):
    """Round float32 to ``dtype``, to nearest, ties to even; bfloat16 as its bits in uint16."""
    if dtype != "bfloat16":
        return x.astype(dtype)
    bits = np.ascontiguousarray(x).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def lift(x):
    """Return the float32 values of any projectable array, exactly."""
    if x.dtype == np.uint16:
        return (x.astype(np.uint32) << 16).view(np.float32)
    return x.astype(np.float32)


def bits(x):
    return x.view(np.uint32) if x.dtype == np.float32 else x.view(np.uint16)


def make(case, family, seed=5):
    """Return the layout and a plan with 1, 3, 2, 1, 3, 2, ... bases per contiguous block."""
    shapes, kind, number = CASES[case]
    layout = Layout(tuple(f"t{i}" for i in range(len(shapes))), tuple(shapes))
    blocks = kind(layout.size, number)
    if kind is InterleavedBlocks:
        return layout, RoundPlan(1, seed, family, blocks)
    counts = np.resize([1, 3, 2] if blocks.count > 1 else [3], blocks.count)
    return layout, RoundPlan(1, seed, family, blocks, counts)


def pieces(layout, plan, largest=2**16):
    """Return the segments that a kernel for ``plan`` walks."""
    size = layout.size if plan.interleaved else plan.blocks.block_size
    return Segments.of_pieces(layout.here, size, largest)


def kernel_for(kernel, plan):
    return kernel["interleaved" if plan.interleaved else "contiguous"]


def numbers(size, seed=0):
    """Return float32 numbers over seven orders of magnitude."""
    rng = np.random.default_rng(seed)
    return (rng.standard_normal(size) * 10.0 ** rng.uniform(-5, 2, size)).astype(np.float32)


def far_apart(size, seed=0):
    """Return float32 numbers of which a sum in float64 has other bits in another order."""
    rng = np.random.default_rng(seed)
    return (rng.standard_normal(size) * 10.0 ** rng.uniform(-18, 3, size)).astype(np.float32)


def cut(vector, layout):
    """Return copies of the tensors that make up ``vector``."""
    pieces = np.split(vector, layout.offsets[1:-1])
    return [np.array(p).reshape(s) for p, s in zip(pieces, layout.shapes, strict=True)]


def join(arrays):
    return np.concatenate([np.ravel(array) for array in arrays])


def scattered(array):
    """Return ``array`` with every element apart from the next one in memory."""
    wide = np.full((*array.shape, 3), 7, dtype=array.dtype)
    wide[..., 1] = array
    return wide[..., 1]


def coefficients_for(plan, seed=1):
    return numbers(plan.num_coefficients, seed)


def close(gamma, delta, plan):
    """Return whether γ is the projection of ``delta`` to within float32 rounding."""
    delta = delta.astype(np.float64)
    largest = 1.0 if plan.family == "rademacher" else 1 / math.sqrt(plan.blocks.block_size)
    if plan.interleaved:
        mass = np.bincount(
            reference.block_of(plan, 0, delta.size), np.abs(delta), plan.blocks.count
        )
    else:
        mass = np.add.reduceat(np.abs(delta), np.arange(0, delta.size, plan.blocks.block_size))
    bound = ROUNDING * largest * np.repeat(mass, plan.counts)
    return bool((np.abs(gamma - reference.project(delta, plan)) <= bound).all())


@pytest.fixture(params=KERNELS)
def kernel(request):
    """Each kernel beside the reference."""
    if request.param in KERNELS:
        return KERNELS[request.param]
    on_tensors = OnTensors(device_of(request.param))
    return {"contiguous": on_tensors, "interleaved": on_tensors}


def contract(*axes):
    """Parametrise a test with every kernel, case, family, and value of ``axes``.

    The interpreter is slow: it gets one value of ``axes`` for each case and family, in turns.
    """
    rest = list(itertools.product(*axes))
    turns = itertools.cycle(rest)
    combinations = []
    for backend in (*KERNELS, *TRITON):
        for case, family in itertools.product(CASES, FAMILIES):
            values = [next(turns)] if backend == "interpreter" else rest
            marks = getattr(backend, "marks", ())
            name = backend.values[0] if marks else backend
            combinations += [pytest.param(name, case, family, *v, marks=marks) for v in values]
    return combinations


@pytest.mark.parametrize(
    ("kernel", "case", "family", "dtype"), contract(DTYPES), indirect=["kernel"]
)
def test_subtract_has_the_bits_of_the_reference(kernel, case, family, dtype):
    layout, plan = make(case, family)
    model = lower(numbers(layout.size), dtype)
    master, c = lift(model), coefficients_for(plan)
    expected = master - reference.reconstruct(c, plan)

    arrays = cut(master, layout)
    kernel_for(kernel, plan).subtract(arrays, c, pieces(layout, plan), plan)

    np.testing.assert_array_equal(bits(join(arrays)), bits(expected))
    np.testing.assert_array_equal(bits(lower(join(arrays), dtype)), bits(lower(expected, dtype)))
    assert not np.array_equal(join(arrays), master - reference.reconstruct(3 * c, plan))
    if layout.size > 64:  # a few signs may agree by chance
        wrong = reference.reconstruct(c, plan.with_seed(6))
        assert not np.array_equal(join(arrays), master - wrong)


@pytest.mark.parametrize(
    ("kernel", "case", "family", "dtype", "after"),
    contract(DTYPES, [False, True]),
    indirect=["kernel"],
)
def test_project_is_the_reference_to_float32_rounding(kernel, case, family, dtype, after):
    layout, plan = make(case, family)
    before = lower(numbers(layout.size), dtype)
    ends = lower(numbers(layout.size, seed=2), dtype) if after else None
    delta = lift(before) - lift(ends) if after else lift(before)

    segments = pieces(layout, plan)
    tensors = cut(before, layout), None if ends is None else cut(ends, layout)
    gamma = kernel_for(kernel, plan).project(*tensors, segments, plan)

    assert gamma.dtype == np.float64
    assert gamma.shape == (plan.num_coefficients,)
    assert close(gamma, delta, plan)
    assert not close(3 * gamma, delta, plan)
    assert not close(0.9 * gamma, delta, plan)
    lost = delta.copy()
    lost[np.abs(delta).argmax()] = 0
    assert not close(gamma, lost, plan)
    if layout.size > 64:
        assert not close(gamma, delta, plan.with_seed(6))
    if after:
        assert not close(gamma, lift(before), plan)


@pytest.mark.parametrize("largest", LARGEST)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("case", TILED)
def test_no_bit_of_subtract_depends_on_threads_or_tiling(kernel, threads, case, family, largest):
    layout, plan = make(case, family)
    master, c = numbers(layout.size), coefficients_for(plan)
    arrays = cut(master, layout)
    segments = pieces(layout, plan, largest)
    kernel_for(kernel, plan).subtract(arrays, c, segments, plan)
    expected = master - reference.reconstruct(c, plan)
    np.testing.assert_array_equal(bits(join(arrays)), bits(expected))


@pytest.mark.parametrize("largest", LARGEST)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("case", TILED)
def test_project_is_close_for_every_tiling(kernel, threads, case, family, largest):
    layout, plan = make(case, family)
    delta = numbers(layout.size)
    segments = pieces(layout, plan, largest)
    assert close(
        kernel_for(kernel, plan).project(cut(delta, layout), None, segments, plan), delta, plan
    )


@pytest.mark.parametrize("case", ["tensors across tiles", "tiles dealt out"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_no_bit_of_project_depends_on_threads(kernel, threads, family, dtype, case):
    layout, plan = make(case, family)
    before, after = (cut(lower(far_apart(layout.size, s), dtype), layout) for s in (0, 2))
    segments = pieces(layout, plan, largest=512)
    project = kernel_for(kernel, plan).project
    gamma = project(before, after, segments, plan)
    numba.set_num_threads(1)
    np.testing.assert_array_equal(gamma, project(before, after, segments, plan))
    shuffled = project([array[::-1].copy() for array in before], after, segments, plan)
    assert not np.array_equal(gamma, shuffled)


def test_the_order_of_the_parts_would_be_seen(monkeypatch):
    layout, plan = make("tiles dealt out", "rademacher")
    update, segments = cut(far_apart(layout.size), layout), pieces(layout, plan, largest=512)
    gamma = cpu_interleaved.project(update, None, segments, plan)
    monkeypatch.setattr(cpu_interleaved, "MOST_PARTS", 3)
    assert not np.array_equal(gamma, cpu_interleaved.project(update, None, segments, plan))


@pytest.mark.parametrize("case", ["tensors across blocks", "tensors dealt out"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_memory_order_does_not_matter(case, family, dtype):
    layout, plan = make(case, family)
    before, after = (cut(lower(numbers(layout.size, s), dtype), layout) for s in (0, 2))
    dense = projection.project(before, layout, plan, after)
    sparse = projection.project(
        [scattered(array) for array in before], layout, plan, [np.asfortranarray(a) for a in after]
    )
    np.testing.assert_array_equal(dense, sparse)


@pytest.mark.parametrize("case", ["tensors across blocks", "tensors dealt out"])
@pytest.mark.parametrize("loosen", [np.array, scattered, np.asfortranarray])
@pytest.mark.parametrize("family", FAMILIES)
def test_subtract_works_in_place_whatever_the_memory_order(case, family, loosen):
    layout, plan = make(case, family)
    master, c = numbers(layout.size), coefficients_for(plan)
    arrays = [loosen(array) for array in cut(master, layout)]
    projection.subtract(arrays, layout, plan, c)
    expected = master - reference.reconstruct(c, plan)
    np.testing.assert_array_equal(bits(join(arrays)), bits(expected))
    if loosen is scattered:
        assert all((array.base[..., ::2] == 7).all() for array in arrays)  # and nothing beside it


def test_update_may_mix_dtypes():
    layout, plan = make("tensors across blocks", "rademacher")
    arrays = cut(numbers(layout.size), layout)
    mixed = [lower(array, DTYPES[i % 3]).reshape(array.shape) for i, array in enumerate(arrays)]
    delta = join([lift(array) for array in mixed])
    gamma = projection.project(mixed, layout, plan)
    assert close(gamma, delta, plan)
    assert not close(gamma, join(arrays), plan)  # what rounding took off is seen


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_every_16_bit_number_is_lifted_exactly(dtype):
    patterns = np.arange(2**16, dtype=np.uint16)
    code = tiles.FLOAT16 if dtype == "float16" else tiles.BFLOAT16
    out = np.empty(2**16, dtype=np.float32)
    tiles.load(out, patterns.ctypes.data, code, patterns.size)
    np.testing.assert_array_equal(out, lift(patterns.view(dtype) if code == 2 else patterns))


def test_rounding_of_this_file_is_the_rounding_of_torch():
    torch = pytest.importorskip("torch")
    values = np.random.default_rng(0).integers(0, 2**32, 10**5, dtype=np.uint32).view(np.float32)
    values = np.concatenate(
        [values[np.isfinite(values)], np.float32([1, 1 + 2**-8, 1 + 3 * 2**-8])]
    )
    theirs = torch.from_numpy(values).to(torch.bfloat16).view(torch.uint16).numpy()
    np.testing.assert_array_equal(lower(values, "bfloat16"), theirs)
    assert not np.array_equal((values.view(np.uint32) >> 16).astype(np.uint16), theirs)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("case", CASES)
def test_reconstruct_yields_the_tensors_of_the_reference(case, family):
    layout, plan = make(case, family)
    c = coefficients_for(plan)
    updates = list(projection.reconstruct(c, layout, plan))
    assert [update.size for update in updates] == [math.prod(shape) for shape in layout.shapes]
    assert all(update.dtype == np.float32 for update in updates)
    np.testing.assert_array_equal(join(updates), reference.reconstruct(c, plan))


@pytest.mark.parametrize("one_each", [False, True])
@pytest.mark.parametrize("case", ["tensors across blocks", "tensors dealt out", "prime dealt out"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_fidelity_is_the_cosine_of_update_and_reconstruction(case, family, dtype, one_each):
    layout, plan = make(case, family)
    if one_each and not plan.interleaved:
        plan = replace(plan, bases_per_block=np.ones_like(plan.counts))
    before, after = (lower(numbers(layout.size, s), dtype) for s in (0, 2))
    gamma = projection.project(cut(before, layout), layout, plan, cut(after, layout))
    delta = (lift(before) - lift(after)).astype(np.float64)
    c = (gamma * plan.unbiased_scale()).astype(np.float32)
    update = reference.reconstruct(c, plan).astype(np.float64)
    cosine = delta @ update / np.linalg.norm(delta) / np.linalg.norm(update)
    fidelity = projection.fidelity(cut(before, layout), cut(after, layout), layout, plan, gamma)
    assert fidelity == pytest.approx(cosine, rel=1e-5)
    assert 0.9 * fidelity != pytest.approx(cosine, rel=1e-5)
    nothing = projection.fidelity(cut(before, layout), cut(before, layout), layout, plan, 0 * gamma)
    assert nothing == 0


def test_negative_zeros_survive():
    layout, plan = make("prime", "rademacher")
    master = np.full(layout.size, -0.0, dtype=np.float32)
    c = np.zeros(plan.num_coefficients, dtype=np.float32)
    arrays = cut(master, layout)
    projection.subtract(arrays, layout, plan, c)
    expected = master - reference.reconstruct(c, plan)
    np.testing.assert_array_equal(bits(join(arrays)), bits(expected))


@pytest.mark.parametrize("largest", LARGEST)
@pytest.mark.parametrize("case", [c for c in CASES if CASES[c][1] is Blocks])
def test_segments_cover_every_index_once_and_cross_no_cut(case, largest):
    layout, plan = make(case, "rademacher")
    block_size = plan.blocks.block_size
    segments = Segments.of_pieces(layout.here, block_size, largest)
    stop = segments.start + segments.length
    assert segments.start[0] == 0
    assert stop[-1] == layout.size
    np.testing.assert_array_equal(segments.start[1:], stop[:-1])
    np.testing.assert_array_equal(segments.block, (stop - 1) // block_size)
    assert (segments.length <= largest).all()
    assert (stop <= layout.offsets[segments.tensor + 1]).all()
    np.testing.assert_array_equal(segments.within, segments.start - layout.offsets[segments.tensor])


@pytest.mark.parametrize("parts", [1, 2, 3, 7, 50])
def test_segments_are_divided_evenly(parts):
    segments = Segments.of_piece(0, 10_000, 512, largest=128)
    cost = np.random.default_rng(0).integers(1, 100, len(segments.start))
    bounds = segments.divide(cost, parts)
    assert bounds[0] == 0
    assert bounds[-1] == len(cost)
    assert (np.diff(bounds) >= 0).all()
    shares = [cost[a:b].sum() for a, b in itertools.pairwise(bounds)]
    assert max(shares) <= cost.sum() / parts + 2 * cost.max()


@pytest.mark.parametrize("case", ["tensors across blocks", "tensors dealt out", "tiles dealt out"])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_update_in_pieces_projects_as_the_whole(case, family):
    layout, plan = make(case, family)
    update = numbers(layout.size)
    cuts = [i for i in sorted({1, 3, 130, 200, 4999, *layout.offsets}) if i <= layout.size]
    in_pieces = projection.Projection(layout, plan)
    for start, stop in reversed(list(itertools.pairwise(cuts))):
        in_pieces.add(int(start), update[start:stop])
    expected = reference.project(update, plan)
    element = 1 if family == "rademacher" else plan.blocks.block_size**-0.5  # at most
    allowed = ROUNDING * element * np.abs(update).sum()
    assert (np.abs(in_pieces.coefficients - expected) <= allowed).all()
    assert not (np.abs(1.01 * in_pieces.coefficients - expected) <= allowed).all()


@pytest.mark.parametrize("case", ["tensors across blocks", "tensors dealt out"])
@pytest.mark.parametrize("family", FAMILIES)
def test_tensor_by_tensor_are_the_same_bits(case, family):
    layout, plan = make(case, family)
    arrays, c = cut(numbers(layout.size), layout), coefficients_for(plan)
    alone = [array.copy() for array in arrays]
    projection.subtract(arrays, layout, plan, c)
    total = 0
    for i, array in enumerate(alone):
        projection.subtract_tensor(array, i, layout, plan, c)
        total += projection.fingerprint_part(array, i, layout)
    np.testing.assert_array_equal(bits(join(alone)), bits(join(arrays)))
    assert projection.fingerprint_text(total) == projection.fingerprint(arrays, layout)


def test_pieces_that_cannot_be_added():
    layout, plan = make("tensors dealt out", "rademacher")
    pieces_of = projection.Projection(layout, plan)
    for start, piece in (
        (-1, np.zeros(2, np.float32)),
        (layout.size - 1, np.zeros(2, np.float32)),
        (0, np.zeros(2)),
    ):
        with pytest.raises(LayoutError, match="a piece must be float32 within"):
            pieces_of.add(start, piece)
    with pytest.raises(PlanError, match=f"not finite in tensor '{layout.names[1]}'"):
        pieces_of.add(int(layout.offsets[1]), np.full(2, np.nan, np.float32))
    assert not pieces_of.coefficients.any()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_every_half_is_read_and_rounded_to_as_numpy_does(dtype):
    halves = np.arange(2**16, dtype=np.uint16)
    if dtype == "float16":
        halves = halves.view(np.float16)
    exact = lift(halves)
    number = np.isfinite(exact)
    steps = np.sort(np.unique(exact[number]))
    between = (steps[:-1] / 2 + steps[1:] / 2).astype(np.float32)  # ties to even
    values = np.concatenate([exact, between, np.nextafter(between, steps[1:])])
    values = np.concatenate([values, np.float32([65519, 65520, -65520, 1e30, np.inf, -np.inf])])
    code = {"bfloat16": tiles.BFLOAT16, "float16": tiles.FLOAT16}[dtype]
    read, written = np.empty_like(exact), np.empty(values.size, halves.dtype)
    tiles.load(read, halves.ctypes.data, code, halves.size)
    tiles.store(written.ctypes.data, code, values, values.size)
    np.testing.assert_array_equal(bits(read[number]), bits(exact[number]))
    np.testing.assert_array_equal(np.isnan(read), np.isnan(exact))
    is_number = ~np.isnan(values)
    with np.errstate(over="ignore"):
        expected = lower(values[is_number], dtype)
    np.testing.assert_array_equal(bits(written[is_number]), bits(expected))
    assert np.isnan(lift(written[~is_number])).all()


def test_the_smallest_halves_survive_where_the_smallest_float32_are_flushed():
    halves = np.arange(1, 1024, dtype=np.uint16).view(np.float16)
    read = np.empty(halves.size, dtype=np.float32)
    flushes = torch.set_flush_denormal(True)
    try:
        tiles.load(read, halves.ctypes.data, tiles.FLOAT16, halves.size)
    finally:
        torch.set_flush_denormal(False)
    if not flushes:
        pytest.skip("this processor flushes nothing")
    np.testing.assert_array_equal(read, halves.astype(np.float32))
