"""Schedules by their formulas, optimizers by name, and errors that help."""

from __future__ import annotations

import math

import pytest
import torch

from ferret_flwr.config import ConfigError, TrainConfig
from ferret_flwr.training.optimizers import (
    SCHEDULES,
    check_optimizer,
    learning_rate,
    make_optimizer,
)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [2.0, 2.0, 2.0, 2.0]),
        ("linear", [2.0, 1.5, 1.0, 0.5]),
        ("cosine", [1 + math.cos(math.pi * t / 4) for t in range(4)]),
    ],
)
def test_schedules(schedule, expected):
    config = TrainConfig(learning_rate=2.0, schedule=schedule)
    assert [learning_rate(t, 4, config) for t in range(4)] == pytest.approx(expected)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_warmup_is_a_line_to_the_peak(schedule):
    config = TrainConfig(learning_rate=1.0, schedule=schedule, warmup_steps=4)
    assert [learning_rate(t, 20, config) for t in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert learning_rate(19, 20, config) > 0


def test_every_schedule_of_the_config_is_there():
    field = TrainConfig.__dataclass_fields__["schedule"]
    assert set(field.metadata["choices"]) == set(SCHEDULES)


def test_arguments_are_parsed():
    parameter = torch.nn.Parameter(torch.zeros(2))
    args = "momentum=0.9 nesterov=True"
    config = TrainConfig(optimizer="SGD", optimizer_args=args, learning_rate=0.01)
    group = make_optimizer([parameter], config).param_groups[0]
    assert (group["momentum"], group["nesterov"], group["lr"]) == (0.9, True, 0.01)
    config = TrainConfig(optimizer="AdamW", optimizer_args="betas=(0.5,0.6)")
    assert make_optimizer([parameter], config).param_groups[0]["betas"] == (0.5, 0.6)


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "Adafactor", "RMSprop", "Muon"])
def test_usual_optimizers_pass(name):
    check_optimizer(TrainConfig(optimizer=name))


@pytest.mark.parametrize(
    ("optimizer", "args", "message"),
    [
        ("sgd", "", "did you mean 'SGD'"),
        ("Adamm", "", r"did you mean 'Adam.*available: .*RMSprop"),
        ("Optimizer", "", "not in torch.optim"),
        ("SGD", "momentums=0.9", r"'momentums=0.9'.*momentum, .*weight_decay"),
        ("SGD", "lr=0.9", r"'lr=0.9'"),
        ("SGD", "momentum", "'momentum' is not 'name=value'"),
        ("SGD", "momentum=high", "'momentum=high' is not a number"),
        ("SGD", "momentum=-1", "Invalid momentum"),
        ("LBFGS", "", "'LBFGS' cannot be used"),
        ("SparseAdam", "", "'SparseAdam' cannot be used"),
    ],
)
def test_what_cannot_be_used(optimizer, args, message):
    with pytest.raises(ConfigError, match=message):
        check_optimizer(TrainConfig(optimizer=optimizer, optimizer_args=args))
