"""The optimizer of a client and its learning rate over the whole run."""

from __future__ import annotations

import ast
import difflib
import inspect
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch

from ferret_flwr.config import ConfigError, TrainConfig


def learning_rate(step: int, total: int, config: TrainConfig) -> float:
    """Return the learning rate of one step of the run.

    Parameters
    ----------
    step
        0 for the first step of the first round.
    total
        Steps of all rounds together.
    config
        ``learning_rate`` is the peak, reached after ``warmup_steps`` on a straight line;
        ``schedule`` says how it falls to 0, which it would reach at step ``total``.
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    left = (total - step) / max(1, total - config.warmup_steps)  # 1 .. 0
    return config.learning_rate * SCHEDULES[config.schedule](left)


SCHEDULES = {
    "constant": lambda left: 1.0,
    "linear": lambda left: left,
    "cosine": lambda left: 0.5 - 0.5 * math.cos(math.pi * left),
}


def make_optimizer(
    parameters: Iterable[torch.nn.Parameter], config: TrainConfig
) -> torch.optim.Optimizer:
    """Return the optimizer that ``config`` names, over ``parameters``.

    Raises
    ------
    ConfigError
        If there is no such optimizer, or it does not take its arguments or these parameters.
    """
    known = _known()
    if config.optimizer not in known:
        by_lower = {name.lower(): name for name in known}
        close = difflib.get_close_matches(config.optimizer.lower(), by_lower, n=1)
        hint = f"did you mean {by_lower[close[0]]!r}? " if close else ""
        raise ConfigError(
            f"'train.optimizer' = {config.optimizer!r} is not in torch.optim; {hint}"
            f"available: {', '.join(known)}"
        )
    kind = known[config.optimizer]
    arguments = _arguments(config.optimizer, kind, config.optimizer_args)
    try:
        return kind(list(parameters), lr=config.learning_rate, **arguments)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"'train.optimizer' = {config.optimizer!r} with 'train.optimizer-args' = "
            f"{config.optimizer_args!r}: {error}"
        ) from error


def check_optimizer(config: TrainConfig) -> None:
    """Take one step on a dummy parameter, so that a wrong setting is found before round 1.

    Raises
    ------
    ConfigError
        If `make_optimizer` raises it, or the optimizer cannot step on dense gradients alone.
    """
    dummy = torch.nn.Parameter(torch.zeros(2, 2))
    dummy.grad = torch.zeros(2, 2)
    optimizer = make_optimizer([dummy], config)
    try:
        optimizer.step()
    except (TypeError, RuntimeError) as error:
        raise ConfigError(
            f"'train.optimizer' = {config.optimizer!r} cannot be used here: {error}"
        ) from error


def _known() -> dict[str, Callable[..., torch.optim.Optimizer]]:
    return {
        name: kind
        for name, kind in vars(torch.optim).items()
        if isinstance(kind, type)
        and issubclass(kind, torch.optim.Optimizer)
        and kind is not torch.optim.Optimizer
    }


def _arguments(name: str, kind: Callable[..., Any], text: str) -> dict[str, Any]:
    """Parse "momentum=0.9 weight_decay=0.01" to keyword arguments of the optimizer ``name``."""
    # lr is train.learning-rate
    allowed = [key for key in inspect.signature(kind).parameters if key not in ("params", "lr")]
    arguments = {}
    for item in text.split():
        key, equals, value = item.partition("=")
        if not equals or key not in allowed:
            raise ConfigError(
                f"'train.optimizer-args': {item!r} is not 'name=value' with a name that "
                f"{name} takes: {', '.join(allowed)}"
            )
        try:
            arguments[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            raise ConfigError(
                f"'train.optimizer-args': the value of {item!r} is not a number, a truth value "
                "or a tuple without spaces"
            ) from None
    return arguments
