"""torch tensors in place of arrays: the same answers, the same checks, and models in one pass."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from ferret_flwr.projection import projection
from ferret_flwr.projection.families import FAMILIES
from ferret_flwr.projection.kernels import reference
from ferret_flwr.projection.layout import Blocks, InterleavedBlocks, Layout, LayoutError
from ferret_flwr.projection.plan import PlanError, RoundPlan
from tests.projection.tensors import TRITON, array, device_of, tensor, tensors
from tests.projection.test_kernels import bits, cut, far_apart, join, lift, lower, numbers

LAYOUT = Layout(("embed", "norm", "empty", "head"), ((40, 7), (21,), (0, 4), (30, 20)))
DTYPES = ("float32", "float16", "bfloat16")


def make_plan(kind, family="rademacher", seed=3, counts=(2, 1, 3, 1)):
    if kind == "interleaved":
        return RoundPlan(1, seed, family, InterleavedBlocks(LAYOUT.size, 90))
    return RoundPlan(1, seed, family, Blocks(LAYOUT.size, 256), np.array(counts))


def coefficients(plan, seed=1):
    return numbers(plan.num_coefficients, seed)


@pytest.fixture(params=TRITON)
def device(request):
    """Where tensors lie: with the processor if Triton interprets."""
    return device_of(request.param)


def apart(tensors):
    """Return ``tensors`` with every element apart from the next one in memory."""
    return [torch.stack([t, t, t], dim=-1)[..., 1] for t in tensors]


KINDS = pytest.mark.parametrize("kind", ["interleaved", "contiguous"])


@KINDS
@pytest.mark.parametrize("dtype", DTYPES)
def test_projections_are_those_of_arrays(device, kind, dtype):
    plan = make_plan(kind)
    before, after = (cut(lower(numbers(LAYOUT.size, s), dtype), LAYOUT) for s in (0, 2))
    expected = projection.project(before, LAYOUT, plan, after)
    found = projection.project(tensors(before, device), LAYOUT, plan, apart(tensors(after, device)))
    assert found.dtype == np.float64
    largest = np.abs(lift(join(before))).sum()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6 * largest)
    assert not np.allclose(found, 1.01 * expected, rtol=0, atol=1e-6 * largest)
    cosines = [
        projection.fidelity(b, a, LAYOUT, plan, expected)
        for b, a in ((before, after), (tensors(before, device), tensors(after, device)))
    ]
    assert cosines[0] == pytest.approx(cosines[1], rel=1e-5)


@KINDS
@pytest.mark.parametrize("family", FAMILIES)
def test_reconstructions_have_the_bits_of_arrays(device, kind, family):
    plan = make_plan(kind, family)
    c, arrays = coefficients(plan), cut(numbers(LAYOUT.size), LAYOUT)
    held = tensors(arrays, device)
    held = apart(held)
    projection.subtract(held, LAYOUT, plan, c)
    projection.subtract(arrays, LAYOUT, plan, c)
    assert all(
        bits(array(t)).tolist() == bits(a).tolist() for t, a in zip(held, arrays, strict=True)
    )
    assert projection.fingerprint(held, LAYOUT) == projection.fingerprint(arrays, LAYOUT)
    updates = list(projection.reconstruct(c, LAYOUT, plan, like=held))
    assert all(isinstance(update, torch.Tensor) for update in updates)
    np.testing.assert_array_equal(join(map(array, updates)), reference.reconstruct(c, plan))


def defined(base, rounds, dtype):
    """Return the model after ``rounds`` as `reference` has it, rounded once."""
    master = lift(base)
    for plan, c in rounds:
        master = master - reference.reconstruct(c, plan)
    return lower(master, dtype)


@pytest.fixture(params=["arrays", *TRITON])
def put(request):
    """Return what makes arrays the kind that is tested."""
    if request.param == "arrays":
        return lambda arrays: [a.copy() for a in arrays]
    where = device_of(request.param)
    return lambda arrays: tensors(arrays, where)


def taken(arrays):
    return join([a if isinstance(a, np.ndarray) else array(a) for a in arrays])


@KINDS
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_replay_rounds_once_however_many_rounds(put, kind, family, dtype):
    base = lower(far_apart(LAYOUT.size), dtype)
    base[5] = 0x8000 if dtype == "bfloat16" else -0.0  # a sign that adding to zero would lose
    counts = [(2, 1, 3, 1), (1, 4, 1, 2), (1, 1, 1, 1)]
    plans = [make_plan(kind, family, 3 + r, counts[r]) for r in range(3)]
    rounds = [(plan, coefficients(plan, r) / 50) for r, plan in enumerate(plans)]
    model, other = put(cut(base, LAYOUT)), put(cut(base, LAYOUT))
    projection.replay(model, LAYOUT, rounds, other)
    assert taken(model).tobytes() == base.tobytes()
    projection.replay(model, LAYOUT, rounds, model)  # in place
    expected = defined(base, rounds, dtype)
    assert taken(other).tobytes() == taken(model).tobytes() == expected.tobytes()
    assert defined(base, rounds[::-1], "float32").tobytes() != (
        defined(base, rounds, "float32").tobytes()
    )
    if dtype != "float32":  # rounding after each round is another model
        step = base
        for one in rounds:
            step = defined(step, [one], dtype)
        assert step.tobytes() != expected.tobytes()


def test_a_replay_of_rounds_that_differ_in_kind(put):
    plans = [make_plan("interleaved"), make_plan("contiguous", "truncated-normal")]
    rounds = [(plan, coefficients(plan)) for plan in plans]
    base = lower(numbers(LAYOUT.size), "bfloat16")
    model = put(cut(base, LAYOUT))
    projection.replay(model, LAYOUT, rounds, model)
    assert taken(model).tobytes() == defined(base, rounds, "bfloat16").tobytes()


def test_a_replay_of_no_round_and_to_another_dtype(put):
    base = lower(numbers(LAYOUT.size), "bfloat16")
    masters = put(cut(np.zeros(LAYOUT.size, dtype=np.float32), LAYOUT))
    projection.replay(put(cut(base, LAYOUT)), LAYOUT, [], masters)
    np.testing.assert_array_equal(taken(masters), lift(base))


def test_a_bad_round_leaves_the_model_alone(put):
    plan = make_plan("interleaved")
    good, bad = coefficients(plan), coefficients(plan)
    bad[3] = np.nan
    model = put(cut(numbers(LAYOUT.size), LAYOUT))
    with pytest.raises(PlanError, match="1 of 90 coefficients are not finite"):
        projection.replay(model, LAYOUT, [(plan, good), (plan, bad)], model)
    assert taken(model).tobytes() == numbers(LAYOUT.size).tobytes()


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_update_that_is_not_finite_names_its_tensor(device, dtype, value):
    before = [tensor(np.ones(s, "f4"), device).to(getattr(torch, dtype)) for s in LAYOUT.shapes]
    after = [t.clone() for t in before]
    after[1][-1] = value
    with pytest.raises(PlanError, match="not finite in tensor 'norm'"):
        projection.project(before, LAYOUT, make_plan("interleaved"), after)


def test_tensors_of_another_layout(device):
    good = tensors(cut(numbers(LAYOUT.size), LAYOUT), device)
    plan = make_plan("interleaved")
    with pytest.raises(LayoutError, match="expected 4 tensors, got 2"):
        projection.project(good[:2], LAYOUT, plan)
    with pytest.raises(LayoutError, match=r"'norm' must have 21 elements, .*got shape \(20,\)"):
        projection.fingerprint([good[0], good[1][:-1], *good[2:]], LAYOUT)
    with pytest.raises(LayoutError, match="'norm' must have dtype float32, got bfloat16"):
        projection.subtract(
            [good[0], good[1].bfloat16(), *good[2:]], LAYOUT, plan, coefficients(plan)
        )
    with pytest.raises(LayoutError, match="float32 or float16 or bfloat16, got float64"):
        projection.project([good[0].double(), *good[1:]], LAYOUT, plan)
    with pytest.raises(LayoutError, match="'embed' changed from float32 to float16"):
        projection.project(good, LAYOUT, plan, [good[0].half(), *good[1:]])


@pytest.fixture(params=[0, 2], ids=["all projected", "exact"])
def layout(request):
    return Layout(LAYOUT.names, LAYOUT.shapes, request.param)


def spread(arrays, device):
    """Return every other one as a tensor, so that neighbours lie in different places."""
    return [tensor(a, device) if i % 2 == 0 else a.copy() for i, a in enumerate(arrays)]


@KINDS
@pytest.mark.parametrize("dtype", DTYPES)
def test_each_tensor_may_lie_elsewhere(device, kind, dtype, layout):
    size = layout.size - layout.exact_size
    blocks = InterleavedBlocks(size, 50) if kind == "interleaved" else Blocks(size, 128)
    counts = None if kind == "interleaved" else np.arange(1, blocks.count + 1)
    plan = RoundPlan(1, 3, "rademacher", blocks, counts, layout.exact_size)
    before, after = (cut(lower(numbers(LAYOUT.size, s), dtype), LAYOUT) for s in (0, 2))
    expected = projection.project(before, layout, plan, after)
    apart = spread(before, device), spread(after, device)
    found = projection.project(apart[0], layout, plan, apart[1])
    atol = 1e-6 * np.abs(lift(join(before))).sum()
    np.testing.assert_allclose(found, expected, rtol=0, atol=atol)
    assert not np.allclose(found, 1.01 * expected, rtol=0, atol=atol)
    cosines = [
        projection.fidelity(b, a, layout, plan, expected) for b, a in ((before, after), apart)
    ]
    assert cosines[0] == pytest.approx(cosines[1], rel=1e-5)

    rounds = [(plan, coefficients(plan, r) / 50) for r in range(2)]
    model = spread(before, device)
    projection.replay(model, layout, rounds, model)
    projection.replay(before, layout, rounds, before)
    assert taken(model).tobytes() == taken(before).tobytes()


def test_a_replica_over_several_places(device, layout):
    plan = RoundPlan(
        1, 3, "rademacher", InterleavedBlocks(layout.size - layout.exact_size, 90),
        exact=layout.exact_size,
    )  # fmt: skip
    c, arrays = coefficients(plan), cut(numbers(LAYOUT.size), LAYOUT)
    held = spread(arrays, device)
    for changed in (arrays, held):
        projection.subtract(changed, layout, plan, c, skip=[1])
    assert taken(held).tobytes() == taken(arrays).tobytes()
    assert projection.fingerprint(held, layout) == projection.fingerprint(arrays, layout)


def test_a_tensor_stays_where_it_is(device):
    before = spread(cut(numbers(LAYOUT.size), LAYOUT), device)
    after = [*before[:1], tensor(before[1], device), *before[2:]]
    with pytest.raises(LayoutError, match=f"'norm' must be a NumPy array .* tensor on {device}"):
        projection.project(before, LAYOUT, make_plan("interleaved"), after)


def test_a_tensor_that_was_offloaded_is_named():
    arrays = cut(numbers(LAYOUT.size), LAYOUT)
    arrays[2] = torch.empty(0, 4, device="meta")
    with pytest.raises(LayoutError, match="'empty' is not in memory: it was offloaded"):
        projection.fingerprint(arrays, LAYOUT)


SCRIPT = """
import sys
{block}
import numpy as np, torch
from ferret_flwr.projection import projection
from ferret_flwr.projection.layout import Layout
try:
    projection.fingerprint([torch.zeros(5)], Layout(("w",), ((5,),)))
except Exception as error:
    print(type(error).__name__, error)
"""


@pytest.mark.parametrize(
    ("block", "answer"),
    [
        ("sys.modules['triton'] = None", "ImportError tensors on a GPU need Triton: pip install"),
        ("", "LayoutError torch tensors must be on a GPU, or NumPy arrays, got them on cpu"),
    ],
    ids=["no Triton", "no GPU"],
)
def test_what_is_missing_is_named(monkeypatch, block, answer):
    if not block:
        pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(block=block)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.startswith(answer)
