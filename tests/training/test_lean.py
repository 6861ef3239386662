"""Lean training: the standard mode's update, with one gradient at a time and no copy of weights."""

import gc
import math
import weakref
from functools import partial

import numpy as np
import pytest
import torch

from ferret_flwr.config import ModelConfig, TrainConfig
from ferret_flwr.methods.ferret import lean_round, local_round
from ferret_flwr.projection.kernels import reference, rounding
from ferret_flwr.projection.layout import Blocks, InterleavedBlocks, Layout
from ferret_flwr.projection.plan import RoundPlan
from ferret_flwr.replica import Replica
from ferret_flwr.training import lean
from ferret_flwr.training.errors import NonFiniteLossError
from ferret_flwr.training.lean import LeanSteps, gradients_passed_to, rounding_seed
from ferret_flwr.training.local import backward, local_batches, mean_loss, train_locally
from ferret_flwr.training.models import load_model
from ferret_flwr.training.tensors import masters_of, trainable_parameters

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = 3
EMBEDDING = "model.embed_tokens.weight"  # tied: also the output layer


def flat(tensors):
    return torch.cat([t.detach().float().flatten() for t in tensors])


def settings(memory="lean", **changes):
    return TrainConfig(
        **{"memory": memory, "learning_rate": 0.1, "steps": STEPS, "batch_size": 4,
           "max_grad_norm": 0.0} | changes
    )  # fmt: skip


class Trained:
    """One round of the built-in model."""

    def __init__(self, split, config, *, dtype="float32", checkpointing=False, blocks=None):
        self.lm = load_model(ModelConfig(dtype=dtype, gradient_checkpointing=checkpointing))
        self.parameters = trainable_parameters(self.lm.model)
        layout = Layout.of(self.parameters)
        self.start = flat(self.parameters.values())
        self.moved = np.zeros(layout.size)  # Σ |step| of each element
        self.told = np.zeros(layout.size)  # Σ step
        blocks = blocks or InterleavedBlocks.of(layout.size, 512)
        counts = None if isinstance(blocks, InterleavedBlocks) else np.full(blocks.count, 2)
        self.plan = RoundPlan(1, 77, "rademacher", blocks, counts)
        train = partial(
            train_locally, self.lm.model, split.train, self.lm.tokenizer, config,
            too_long="error", seed=5, partition_id=0, round=1, num_rounds=4,
        )  # fmt: skip
        if config.memory == "lean":
            self.update, self.result = lean_round(layout, self.plan, self._listening(train))
        else:
            replica = Replica(layout, masters_of(self.parameters))
            self.update, self.result = local_round(replica, self.parameters, self.plan, train)

    def _listening(self, train):
        def listen(add, first, step):
            values = step.double().numpy()
            self.moved[first : first + values.size] += np.abs(values)
            self.told[first : first + values.size] += values
            add(first, step)

        return lambda add: train(applied=partial(listen, add))

    @property
    def weights(self):
        return flat(self.parameters.values())


def block_sums(values, plan):
    """Return Σ over its block of ``values``, for each coefficient."""
    if plan.interleaved:
        return np.bincount(reference.block_of(plan, 0, values.size), weights=values)
    starts = np.arange(0, values.size, plan.blocks.block_size)
    return np.repeat(np.add.reduceat(values, starts), plan.counts)


def close(coefficients, standard, moved):
    """Return whether they are those of the standard mode.

    Of equal weights, standard rounds w_0 − w_T once and lean each w_t − w_{t+1}, by 2⁻²⁴ at most
    each; and both are rounded to float32. Contiguous blocks add tiles of n = 4096 products in
    float32, with an error below λ √n 2⁻²⁴ of their sum of magnitudes for λ = 6.
    """
    change = np.abs((standard.start - standard.weights).double().numpy())
    factor = 1 if standard.plan.interleaved else 6 * math.sqrt(4096)
    gamma = standard.update.coefficients.astype(np.float64)
    allowed = 2.0**-24 * (factor * block_sums(moved + change, standard.plan) + 2 * np.abs(gamma))
    return (np.abs(coefficients - gamma) <= allowed).all()


CASES = {
    "SGD": {},
    "weight decay": {"optimizer_args": "weight_decay=0.1"},
    "momentum": {"optimizer_args": "momentum=0.9 nesterov=True"},
    "Adam": {"optimizer": "Adam", "learning_rate": 0.003},
    "Adagrad": {"optimizer": "Adagrad", "learning_rate": 0.003},
    "Adafactor": {"optimizer": "Adafactor", "learning_rate": 0.003},
    "clipped": {"max_grad_norm": 0.5, "learning_rate": 1.0},
    "schedule": {"schedule": "linear", "warmup_steps": 2},
}


@pytest.mark.parametrize("piece", [777, lean.PIECE])
@pytest.mark.parametrize("case", CASES)
def test_float32_equals_the_standard_mode(split, monkeypatch, case, piece):
    monkeypatch.setattr(lean, "PIECE", piece)
    standard = Trained(split, settings("standard", **CASES[case]))
    trained = Trained(split, settings(**CASES[case]))
    assert torch.equal(trained.weights, standard.weights)
    assert trained.result.loss == standard.result.loss
    assert trained.update.fidelity is None
    assert trained.update.train_seconds > 0 and trained.update.project_seconds > 0
    gamma = trained.update.coefficients
    assert gamma.dtype == np.float32
    assert close(gamma, standard, trained.moved)
    assert not close(gamma * np.float32(1.0001), standard, trained.moved)
    shorter = Trained(split, settings("standard", **CASES[case] | {"steps": STEPS - 1}))
    assert not close(gamma, shorter, trained.moved)


@pytest.mark.parametrize("changes", [{}, {"max_grad_norm": 0.5}], ids=["", "clipped"])
def test_contiguous_blocks_and_checkpointed_activations(split, monkeypatch, changes):
    monkeypatch.setattr(lean, "PIECE", 777)
    size = Trained(split, settings(steps=1)).start.numel()
    blocks = Blocks.of(size, 30)
    standard = Trained(split, settings("standard", **changes), checkpointing=True, blocks=blocks)
    trained = Trained(split, settings(**changes), checkpointing=True, blocks=blocks)
    assert torch.equal(trained.weights, standard.weights)
    assert close(trained.update.coefficients, standard, trained.moved)
    assert not close(trained.update.coefficients * 0.99, standard, trained.moved)


def batch_of(split, lm, config):
    drawn, _ = next(
        local_batches(split.train, lm.tokenizer, config, "error", seed=5, partition_id=0, round=1)
    )
    return drawn


def loss_of(split, lm, config):
    drawn = batch_of(split, lm, config)
    count = sum(len(t.response) for t in drawn)
    return mean_loss(lm.model, drawn, lm.tokenizer.pad_token_id, count)


def test_each_gradient_comes_once_and_whole(lm, split):
    parameters = trainable_parameters(lm.model)
    backward(lm.model, batch_of(split, lm, settings()), settings(), lm.tokenizer.pad_token_id)
    expected = [p.grad for p in parameters.values()]
    lm.model.zero_grad(set_to_none=True)
    seen = {}

    def keep(tensor, gradient):
        assert tensor not in seen
        seen[tensor] = gradient.clone()

    with gradients_passed_to(keep, list(parameters.values())):
        loss_of(split, lm, settings()).backward()
    assert EMBEDDING in parameters and lm.model.lm_head.weight is parameters[EMBEDDING]
    assert sorted(seen) == list(range(len(parameters)))
    assert all(torch.equal(seen[i], gradient) for i, gradient in enumerate(expected))


def most_at_once(parameters, loss, kept):
    """Return how many gradients of ``loss`` lived at once at most."""
    alive, most = [], 0

    def count(tensor, gradient):
        nonlocal most
        gc.collect()
        alive.append(weakref.ref(gradient))
        kept(gradient)
        held = sum(p.grad is not None for p in parameters)
        most = max(most, held + sum(g() is not None for g in alive))

    with gradients_passed_to(count, parameters):
        loss.backward()
    return most


def test_never_are_there_two_gradients(lm, split):
    parameters = list(trainable_parameters(lm.model).values())
    assert most_at_once(parameters, loss_of(split, lm, settings()), lambda gradient: None) == 1
    hoard = []
    assert most_at_once(parameters, loss_of(split, lm, settings()), hoard.append) == len(hoard) > 1


def poison(gradient):
    return gradient.index_fill(0, torch.tensor([0]), math.nan)


def is_clean(lm):
    return all(p.grad is None and not p._post_accumulate_grad_hooks for p in lm.model.parameters())


@pytest.mark.parametrize("largest", [0.0, 1.0], ids=["", "clipped"])
def test_a_non_finite_loss_changes_nothing(lm, split, largest):
    with torch.no_grad():
        lm.model.get_input_embeddings().weight[7] = math.nan
    before = flat(lm.model.parameters())
    with pytest.raises(NonFiniteLossError, match=r"round 2, partition 0, step 1 of 3: the loss"):
        train_locally(
            lm.model, split.train, lm.tokenizer, settings(max_grad_norm=largest),
            too_long="error", seed=5, partition_id=0, round=2, num_rounds=4,
            applied=lambda *_: pytest.fail("there was no step"),
        )  # fmt: skip
    assert torch.equal(flat(lm.model.parameters()).nan_to_num(), before.nan_to_num())
    assert is_clean(lm)


@pytest.mark.parametrize("largest", [0.0, 1.0], ids=["", "clipped"])
def test_a_non_finite_gradient_fails_and_leaves_no_hook(lm, split, largest):
    handle = lm.model.get_input_embeddings().weight.register_hook(poison)
    before, told = flat(lm.model.parameters()), []
    with pytest.raises(NonFiniteLossError, match="gradient norm nan"):
        train_locally(
            lm.model, split.train, lm.tokenizer, settings(max_grad_norm=largest),
            too_long="error", seed=5, partition_id=0, round=1, num_rounds=4,
            applied=lambda first, step: told.append(step),
        )  # fmt: skip
    handle.remove()
    assert is_clean(lm)
    assert all(step.isfinite().all() for step in told)
    if largest:
        assert not told and torch.equal(flat(lm.model.parameters()), before)
    before = flat(lm.model.parameters())
    loss_of(split, lm, settings()).backward()  # a hook left behind would step
    assert torch.equal(flat(lm.model.parameters()), before)


def test_an_error_of_who_is_told_is_the_callers(lm, split):
    def fail(first, step):
        raise ZeroDivisionError

    steps = LeanSteps(list(trainable_parameters(lm.model).values()), settings(), fail, seed=1)
    with pytest.raises(ZeroDivisionError):
        steps.take(loss_of(split, lm, settings()), 0, 0.1)
    assert is_clean(lm)


@pytest.mark.parametrize("piece", [777, lean.PIECE])
def test_bfloat16_tells_the_exact_step_and_rounds_to_a_neighbour(split, monkeypatch, piece):
    monkeypatch.setattr(lean, "PIECE", piece)
    config, rate = settings(optimizer_args="weight_decay=0.1"), 0.01
    lm = load_model(ModelConfig(dtype="bfloat16"))
    parameters = list(trainable_parameters(lm.model).values())
    before = flat(parameters)
    loss_of(split, lm, config).backward()
    gradient = flat(p.grad for p in parameters)
    lm.model.zero_grad(set_to_none=True)
    told = torch.zeros_like(before)

    def listen(first, step):
        told[first : first + step.numel()] += step

    LeanSteps(parameters, config, listen, seed=1).take(loss_of(split, lm, config), 0, rate)
    exact = before.clone()  # as torch's SGD steps one float32 vector
    exact.add_(gradient.add(before, alpha=0.1), alpha=-rate)
    assert told.abs().max() > 0
    assert torch.allclose(told, before - exact, rtol=0, atol=2**-24 * float(before.abs().max()))
    after = flat(parameters)
    assert (after != before).any()
    bits = after.numpy().view(np.uint32).astype(np.int64) - exact.numpy().view(np.uint32)
    assert (np.abs(bits) < 2**16 + 2).all()  # a neighbour of what was exact, to the last bit
    nearest = exact.to(torch.bfloat16).float()
    assert (after != nearest).float().mean() > 0.1  # but not always the nearest


def test_steps_far_below_bfloat16_are_not_lost(split):
    """The weights move on average by what is told, where plain bfloat16 all but stands still."""
    config = {"learning_rate": 1e-3, "steps": 2}
    plain = Trained(split, settings("standard", **config), dtype="bfloat16")
    trained = Trained(split, settings(**config), dtype="bfloat16")
    told = trained.told
    moved = (trained.start - trained.weights).double().numpy()
    direction = told / np.linalg.norm(told)
    # Each rounding has a variance of at most |step| × the distance of two neighbours, 2⁻⁷ |w|.
    spread = math.sqrt((direction**2 * trained.moved) @ (2.0**-7 * np.abs(trained.start.numpy())))
    stood = (plain.start - plain.weights).double().numpy()
    assert abs(direction @ moved - np.linalg.norm(told)) < 6 * spread
    assert abs(direction @ stood - np.linalg.norm(told)) > 6 * spread


# Stochastic rounding


def nearest(values, seed, step, start):
    """Return what an unbiased rounding must not be."""
    return torch.from_numpy(values).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)


def mean_is_exact(round_to, draws=4000):
    """Return whether the mean over ``draws`` is each of a few values.

    An element goes up by one of 2¹⁶ steps of its lower bits with probability p, exactly; the mean
    over n draws has a standard deviation of u √(p(1−p)/n), with u the distance of its neighbours.
    It is off by more than 6 of them once in 10⁹; each of 64 values is looked at.
    """
    rng = np.random.default_rng(3)
    values = (rng.standard_normal(64) * 2.0 ** rng.integers(-20, 20, 64)).astype(np.float32)
    below = (values.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32).astype(np.float64)
    above = ((values.view(np.uint32) >> 16 << 16) + np.uint32(1 << 16)).view(np.float32)
    unit = np.abs(above.astype(np.float64) - below)
    share = np.abs(values.astype(np.float64) - below) / unit
    total = np.zeros(values.size)
    for step in range(draws):
        bits = round_to(values, 9, step, 1000)
        total += (bits.astype(np.uint32) << 16).view(np.float32)
    sigma = unit * np.sqrt(share * (1 - share) / draws)
    return (np.abs(total / draws - values) <= 6 * sigma).all()


def test_rounding_is_unbiased():
    assert mean_is_exact(rounding.rounded)
    assert not mean_is_exact(nearest)
    assert not mean_is_exact(lambda *args: rounding.rounded(*args) + np.uint16(1))


@pytest.mark.parametrize("start", [0, 5, 2**33 + 3])
@pytest.mark.parametrize("count", [0, 1, 8, 2047, 2048, 5000])
def test_the_kernel_rounds_as_the_definition(count, start):
    values = np.random.default_rng(count).standard_normal(count).astype(np.float32)
    seed = 2**62 + 12345
    found = rounding.rounded(values, seed, 3, start)
    assert (found == reference.rounded(values, seed, 3, start)).all()
    cut = [
        rounding.rounded(v, seed, 3, start + i) for i, v in ((0, values[:77]), (77, values[77:]))
    ]
    assert (found == np.concatenate(cut)).all()
    if count > 1000:
        for other in ((seed + 1, 3, start), (seed, 4, start), (seed, 3, start + 1)):
            assert (found != rounding.rounded(values, *other)).mean() > 0.2


def test_what_bfloat16_holds_stays():
    values = torch.tensor([0.0, -0.0, 1.0, -2.5, 1e-40, 3e38]).to(torch.bfloat16).float().numpy()
    for step in range(20):
        bits = rounding.rounded(values, 1, step, 0)
        assert ((bits.astype(np.uint32) << 16).view(np.float32) == values).all()


def test_seeds_of_the_rounding_are_its_own():
    seeds = {rounding_seed(s, r, p) for s in (1, 2) for r in (1, 2) for p in (0, 1)}
    assert len(seeds) == 8
