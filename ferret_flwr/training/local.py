"""One client's training in one round: a pure function of weights, examples, settings and seed."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice

import torch
import torch.nn.functional as F
from transformers import PreTrainedTokenizerBase

from ferret_flwr.config import ConfigError, TrainConfig

from .adapters import virtual_tokens
from .data import IGNORED, Examples, Tokens, collate
from .errors import NonFiniteLossError
from .lean import Applied, LeanSteps, rounding_seed
from .optimizers import learning_rate, make_optimizer
from .stream import example_stream
from .tensors import trainable_parameters

log = logging.getLogger(__name__)

Progress = Callable[[int, int, float], None]  # (steps done, steps, loss of the step)


@dataclass(frozen=True)
class LocalResult:
    """What one client did in one round."""

    loss: float  # mean over all response tokens of the round
    first_loss: float  # of the first step
    last_loss: float  # of the last step
    num_examples: int
    num_tokens: int  # response tokens that were learned
    num_dropped: int  # examples replaced because they were too long
    steps: int
    seconds: float


def train_locally(
    model: torch.nn.Module,
    examples: Examples,
    tokenizer: PreTrainedTokenizerBase,
    config: TrainConfig,
    *,
    too_long: str,
    seed: int,
    partition_id: int,
    round: int,
    num_rounds: int,
    progress: Progress | None = None,
    applied: Applied | None = None,
) -> LocalResult:
    """Train ``model`` in place for the steps of one round.

    The gradient of a step is that of the mean loss over all its response tokens, however they are
    spread over ``gradient_accumulation`` forward passes. The optimizer starts fresh.

    Parameters
    ----------
    model
        A causal language model, on any device, in any floating-point type.
    examples
        The client's share, from `training.partition`.
    tokenizer
        The tokenizer of ``model``.
    config
        ``steps``, ``batch_size`` and the rest of `train.*`.
    too_long
        `dataset.too-long`, see `tokenize`.
    seed, partition_id
        Which order the examples come in, see `stream.example_stream`.
    round, num_rounds
        The round, from 1, and how many there are: where the schedule and the stream stand.
    progress
        Called after each step with the steps done, their number and the loss.
    applied
        Needed if ``memory`` is ``"lean"``, and used only then: told of each step, see `LeanSteps`.

    Raises
    ------
    NonFiniteLossError
        If a loss or gradient norm is not finite; the step is not applied, earlier ones are. Lean
        without ``max_grad_norm`` may have applied a part of it.
    DataError
        If an example is too long and ``too_long`` is ``"error"``, or none fits.
    ConfigError
        If the optimizer does not exist, or ``seq_length`` is beyond what the model can take.
    """
    start = time.perf_counter()
    check_seq_length(model, config)
    parameters = list(trainable_parameters(model).values())
    if config.memory == "lean":
        assert applied is not None, "what lean steps have changed is told nowhere else"
        steps = LeanSteps(parameters, config, applied, rounding_seed(seed, round, partition_id))
        take = _lean_steps(model, steps, tokenizer.pad_token_id)
    else:
        take = _standard_steps(model, parameters, config, tokenizer.pad_token_id)
    batches = local_batches(
        examples, tokenizer, config, too_long, seed=seed, partition_id=partition_id, round=round
    )
    losses: list[float] = []
    counts: list[int] = []
    dropped = 0
    was_training = model.training
    model.train()
    try:
        for step, (drawn, skipped) in enumerate(batches):
            dropped += skipped
            rate = learning_rate(
                (round - 1) * config.steps + step, num_rounds * config.steps, config
            )
            try:
                loss, count = take(drawn, step, rate)
            except NonFiniteLossError as error:
                raise NonFiniteLossError(
                    f"round {round}, partition {partition_id}, step {step + 1} of {config.steps}: "
                    f"{error}. Try a lower 'train.learning-rate', 'train.max-grad-norm' = 1.0, or "
                    "'model.dtype' = 'float32'"
                ) from error
            losses.append(loss)
            counts.append(count)
            if progress is not None:
                progress(step + 1, config.steps, loss)
    finally:
        model.zero_grad(set_to_none=True)
        model.train(was_training)
    if dropped:
        log.warning("%d drawn examples were longer than 'train.seq-length', and replaced", dropped)
    return LocalResult(
        loss=math.fsum(x * n for x, n in zip(losses, counts, strict=True)) / sum(counts),
        first_loss=losses[0],
        last_loss=losses[-1],
        num_examples=config.steps * config.batch_size * config.gradient_accumulation,
        num_tokens=sum(counts),
        num_dropped=dropped,
        steps=config.steps,
        seconds=time.perf_counter() - start,
    )


TakeStep = Callable[[list[Tokens], int, float], tuple[float, int]]
"""(examples, number of the step in the round, learning rate) -> (loss, response tokens)."""


def _standard_steps(
    model: torch.nn.Module,
    parameters: list[torch.nn.Parameter],
    config: TrainConfig,
    pad_id: int,
) -> TakeStep:
    """Return steps of one optimizer once all gradients are there."""
    optimizer = make_optimizer(parameters, config)

    def take(drawn: list[Tokens], number: int, rate: float) -> tuple[float, int]:
        loss, count = backward(model, drawn, config, pad_id)
        norm = gradient_norm(parameters)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise NonFiniteLossError(
                f"the loss is {loss} and the gradient norm {norm}; the step was not applied"
            )
        if config.max_grad_norm:
            torch.nn.utils.clip_grads_with_norm_(
                parameters, config.max_grad_norm, torch.tensor(norm)
            )
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss, count

    return take


def _lean_steps(model: torch.nn.Module, steps: LeanSteps, pad_id: int) -> TakeStep:
    """Return steps that are taken within the backward pass."""

    def take(drawn: list[Tokens], number: int, rate: float) -> tuple[float, int]:
        count = sum(len(t.response) for t in drawn)
        loss = mean_loss(model, drawn, pad_id, count)
        steps.take(loss, number, rate)
        return float(loss.detach()), count

    return take


def local_batches(
    examples: Examples,
    tokenizer: PreTrainedTokenizerBase,
    config: TrainConfig,
    too_long: str,
    *,
    seed: int,
    partition_id: int,
    round: int,
) -> Iterator[tuple[list[Tokens], int]]:
    """Yield what each step of one round learns from, the same for every method.

    Parameters
    ----------
    examples, tokenizer, config, too_long, seed, partition_id, round
        As in `train_locally`.

    Yields
    ------
    tuple of list of Tokens and int
        ``batch_size`` times ``gradient_accumulation`` examples, and how many dropped ones they
        stand in for.

    Raises
    ------
    DataError
        As `train_locally`.
    """
    per_step = config.batch_size * config.gradient_accumulation
    stream = example_stream(
        examples, tokenizer, config.seq_length, too_long, seed=seed, partition_id=partition_id,
        start=(round - 1) * config.steps * per_step,
    )  # fmt: skip
    for _ in range(config.steps):
        drawn = list(islice(stream, per_step))
        yield [tokens for tokens, _ in drawn], sum(skipped for _, skipped in drawn)


def negative_log_likelihood(
    model: torch.nn.Module, batch: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return -log p of each learned token, in float32, and the row it is in.

    Parameters
    ----------
    model
        A causal language model.
    batch
        As from `collate`, each of shape (B, T).

    Returns
    -------
    nll, row
        Shape (N,) each, N the number of labels that are not ignored.
    """
    logits = model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
    ).logits  # (B, T, V), behind an adapter's virtual tokens
    targets = batch["labels"][:, 1:]
    learned = targets != IGNORED
    row, column = learned.nonzero(as_tuple=True)
    # Selected before the conversion to float32, as most of it is prompt and padding; and at once,
    # or each slice would have a gradient as large as all logits.
    selected = logits[row, column + logits.shape[1] - batch["labels"].shape[1]]  # (N, V)
    del logits  # nothing needs them for the backward pass
    nll = F.cross_entropy(selected.float(), targets[learned], reduction="none")
    return nll, row


def mean_loss(model: torch.nn.Module, drawn: list[Tokens], pad_id: int, count: int) -> torch.Tensor:
    """Return the loss of one forward pass: -log p of all learned tokens over ``count``."""
    batch = collate(drawn, pad_id, next(model.parameters()).device)
    return negative_log_likelihood(model, batch)[0].sum() / count


def backward(
    model: torch.nn.Module, drawn: list[Tokens], config: TrainConfig, pad_id: int
) -> tuple[float, int]:
    """Accumulate the gradient of the mean loss over the response tokens of ``drawn``.

    Returns
    -------
    tuple of float and int
        The loss, and how many tokens it is the mean over.
    """
    device = next(model.parameters()).device
    count = sum(len(t.response) for t in drawn)
    total = torch.zeros((), device=device)
    for i in range(0, len(drawn), config.batch_size):
        loss = mean_loss(model, drawn[i : i + config.batch_size], pad_id, count)
        loss.backward()
        total += loss.detach()
    return float(total), count


@torch.inference_mode()
def batch_loss(
    model: torch.nn.Module, drawn: list[Tokens], config: TrainConfig, pad_id: int
) -> float:
    """Return the mean loss over the response tokens of ``drawn``, by forward passes only.

    Raises
    ------
    ConfigError
        If ``seq_length`` is beyond what the model can take.
    """
    check_seq_length(model, config)
    device = next(model.parameters()).device
    total = 0.0
    was_training = model.training
    model.eval()
    try:
        for i in range(0, len(drawn), config.batch_size):
            batch = collate(drawn[i : i + config.batch_size], pad_id, device)
            total += float(negative_log_likelihood(model, batch)[0].sum())
    finally:
        model.train(was_training)
    return total / sum(len(t.response) for t in drawn)


def gradient_norm(parameters: list[torch.nn.Parameter]) -> float:
    """Return the Euclidean norm of all gradients, accumulated in float32 whatever their type."""
    device = parameters[0].device  # of the result; a model may be spread over several
    norms = [
        torch.linalg.vector_norm(p.grad, dtype=torch.float32).to(device)
        for p in parameters
        if p.grad is not None
    ]
    return float(torch.linalg.vector_norm(torch.stack(norms)))


def check_seq_length(model: torch.nn.Module, config: TrainConfig) -> None:
    """Raise `ConfigError` if ``seq_length`` is beyond what the model can take."""
    limit = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    virtual = virtual_tokens(model)
    if limit and config.seq_length + virtual > limit:
        also = f" with the {virtual} of 'adapter.virtual-tokens'" if virtual else ""
        raise ConfigError(
            f"'train.seq-length' = {config.seq_length}{also} is beyond the {limit} positions of "
            "the model"
        )
