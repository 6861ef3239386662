"""Tensors that are sent as they are, and tensors that stand still."""

import numpy as np
import pytest

from ferret_flwr.projection.kernels import reference
from ferret_flwr.projection.layout import Blocks, InterleavedBlocks, Layout, LayoutError
from ferret_flwr.projection.plan import PlanError, RoundPlan
from ferret_flwr.projection.projection import fidelity, project, reconstruct, subtract

SHAPES = ((10, 7), (20, 33), (20,), (3,))
LAYOUT = Layout(("embed", "head", "norm", "bias"), SHAPES, exact=2)
PROJECTED, EXACT = 730, 23
PLANS = {
    "interleaved": RoundPlan(1, 5, "rademacher", InterleavedBlocks.of(PROJECTED, 40), None, EXACT),
    "contiguous": RoundPlan(
        1, 5, "rademacher", Blocks.of(PROJECTED, 3), np.array([2, 5, 1]), EXACT
    ),
    "normal": RoundPlan(1, 5, "truncated-normal", InterleavedBlocks.of(PROJECTED, 40), None, EXACT),
}


@pytest.fixture(params=PLANS)
def plan(request):
    return PLANS[request.param]


def tensors(seed, shapes=SHAPES):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]


def flat(arrays):
    return np.concatenate([array.ravel() for array in arrays])


def test_exact_elements_follow_the_coefficients(plan):
    before, after = tensors(1), tensors(2)
    gamma = project(before, LAYOUT, plan, after)
    assert gamma.shape == (plan.num_bases + EXACT,) == (plan.num_coefficients,)
    delta = flat(before) - flat(after)
    inner = reference.project(delta[:PROJECTED], plan)
    np.testing.assert_allclose(gamma[: plan.num_bases], inner, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(gamma[plan.num_bases :], delta[PROJECTED:])


def test_what_is_exact_comes_back_exactly(plan):
    delta = tensors(3)
    published = (project(delta, LAYOUT, plan) * plan.unbiased_scale()).astype(np.float32)
    back = list(reconstruct(published, LAYOUT, plan))
    assert [update.size for update in back] == [70, 660, 20, 3]
    for update, tensor in zip(back[2:], delta[2:], strict=True):
        np.testing.assert_array_equal(update, tensor.ravel())
    reference_update = reference.reconstruct(published[: plan.num_bases], plan)
    np.testing.assert_array_equal(np.concatenate(back[:2]), reference_update)

    arrays = tensors(4)
    expected = [a - u.reshape(a.shape) for a, u in zip(arrays, back, strict=True)]
    subtract(arrays, LAYOUT, plan, published)
    for array, wanted in zip(arrays, expected, strict=True):
        np.testing.assert_array_equal(array, wanted)


@pytest.mark.parametrize("skip", [(), (0,), (1,), (2,), (0, 3), (0, 1, 2, 3)])
def test_tensors_that_stand_still(skip, plan):
    """The others get what they would get anyway."""
    published = np.random.default_rng(0).standard_normal(plan.num_coefficients).astype(np.float32)
    start, everything, arrays = tensors(5), tensors(5), tensors(5)
    subtract(everything, LAYOUT, plan, published)
    subtract(arrays, LAYOUT, plan, published, skip=skip)
    for tensor, array in enumerate(arrays):
        wanted = start if tensor in skip else everything
        np.testing.assert_array_equal(array, wanted[tensor])
        assert (everything[tensor] != start[tensor]).any()


def test_fidelity_of_an_update_of_exact_tensors_alone_is_one(plan):
    before = tensors(6)
    after = [*[a.copy() for a in before[:2]], *tensors(7)[2:]]
    gamma = project(before, LAYOUT, plan, after)
    assert fidelity(before, after, LAYOUT, plan, gamma) == pytest.approx(1)
    after[0] += 0.1
    gamma = project(before, LAYOUT, plan, after)
    assert fidelity(before, after, LAYOUT, plan, gamma) < 0.99


def test_an_update_that_is_not_finite_is_named(plan):
    delta = tensors(8)
    delta[3][1] = np.inf
    with pytest.raises(PlanError, match="not finite in tensor 'bias'"):
        project(delta, LAYOUT, plan)


def test_plan_and_layout_must_agree(plan):
    other = Layout(LAYOUT.names, SHAPES, exact=1)
    with pytest.raises(PlanError, match="has 23 exact elements, the model 3"):
        project(tensors(1), other, plan)
    assert other.fingerprint != LAYOUT.fingerprint
    assert Layout(LAYOUT.names, SHAPES).fingerprint not in (other.fingerprint, LAYOUT.fingerprint)


def test_something_is_projected():
    with pytest.raises(LayoutError, match="at least one is to be projected"):
        Layout(("a", "b"), ((3,), (4,)), exact=2)
    with pytest.raises(PlanError, match="0 or more, got -1"):
        RoundPlan(1, 5, "rademacher", InterleavedBlocks.of(100, 8), None, -1)
