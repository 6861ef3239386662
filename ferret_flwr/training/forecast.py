"""What a round will cost and give, measured on a model before any run."""

from __future__ import annotations

import time

import numpy as np

from ferret_flwr.projection import projection
from ferret_flwr.projection.allocation import energies_of
from ferret_flwr.projection.layout import Blocks, InterleavedBlocks, Layout
from ferret_flwr.projection.plan import RoundPlan
from ferret_flwr.training.models import LanguageModel
from ferret_flwr.training.tensors import trainable_parameters

PROBE_TEXT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\nA farmer has 12 hens and each lays 5 eggs a week. How many "
    "eggs are there after 3 weeks?\n\n### Response:\n12 hens lay 12 * 5 = 60 eggs a week, so there "
    "are 60 * 3 = 180 eggs after 3 weeks."
)
SAMPLE_ELEMENTS = 2**24  # for timing the kernels


def gradient_energies(lm: LanguageModel, layout: Layout, blocks: Blocks) -> np.ndarray:
    """Return ‖g_l‖² of each block for the gradient of one text: float64, ``(L,)``."""
    tokens = lm.tokenizer(PROBE_TEXT, return_tensors="pt").input_ids
    model = lm.model
    model(input_ids=tokens, labels=tokens).loss.backward()
    gradients = (
        np.zeros(parameter.shape, dtype=np.float32)
        if parameter.grad is None
        else parameter.grad.float().numpy()
        for parameter in trainable_parameters(model).values()
    )
    energies = energies_of(gradients, layout, blocks)
    model.zero_grad(set_to_none=True)
    return energies


def projection_seconds(plan: RoundPlan) -> float:
    """Measure a projection of a part of the index space here, and return it for all of it.

    With contiguous blocks the time is a straight line in the bases of an element.
    """
    if plan.interleaved:
        blocks = InterleavedBlocks.of(SAMPLE_ELEMENTS, plan.blocks.count)
        sample = RoundPlan(1, 1, plan.family, blocks)
        return _seconds(sample) * plan.blocks.size / SAMPLE_ELEMENTS
    cut = Blocks.of(SAMPLE_ELEMENTS, 512)
    one, three = (
        _seconds(RoundPlan(1, 1, plan.family, cut, np.full(cut.count, bases))) / SAMPLE_ELEMENTS
        for bases in (1, 3)
    )
    per_basis = max((three - one) / 2, 0.0)
    work = float((plan.blocks.lengths * plan.counts).sum())
    return plan.blocks.size * max(one - per_basis, 0.0) + work * per_basis


def _seconds(plan: RoundPlan) -> float:
    """Return what a projection with ``plan`` takes, once it is compiled."""
    layout = Layout(("sample",), ((SAMPLE_ELEMENTS,),))
    delta = [np.ones(SAMPLE_ELEMENTS, dtype=np.float32)]
    projection.project(delta, layout, plan)
    start = time.perf_counter()
    projection.project(delta, layout, plan)
    return time.perf_counter() - start
