"""The run configuration: what pyproject.toml offers, and what dies at the door."""

import functools
import math
import tomllib
from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest
from flwr.common.config import flatten_dict

import ferret_flwr
from ferret_flwr.config import CONTIGUOUS_ONLY, Config, ConfigError, defaults, flatten, parse

PYPROJECT = Path(ferret_flwr.__file__).parents[1] / "pyproject.toml"

OTHER_CHOICE = {
    "method": "fedavg",
    "model.dtype": "float16",
    "dataset.format": "messages",
    "dataset.partitioner": "natural",
    "dataset.too-long": "truncate",
    "train.schedule": "cosine",
    "strategy.name": "fedmedian",
    "privacy.mechanism": "central-fixed",
    "train.memory": "lean",
    "ferret.number-format": "int8",
    "ferret.family": "truncated-normal",
    "ferret.bases": "per-client",
    "ferret.allocation": "uniform",
    "ferret.rate-schedule": "linear",
}
# What a key is refused without.
NEEDS = {f"ferret.{name.replace('_', '-')}": {"ferret.blocks": 8} for name in CONTIGUOUS_ONLY} | {
    "strategy.trim": {"strategy.name": "trimmed-mean"},
    "strategy.malicious-nodes": {
        "strategy.name": "krum",
        "strategy.min-train-nodes": 5,
        "strategy.min-available-nodes": 5,
    },
    "strategy.keep-nodes": {
        "strategy.name": "multi-krum",
        "strategy.min-train-nodes": 5,
        "strategy.min-available-nodes": 5,
    },
}
NEEDS |= {
    f"privacy.{name}": {"privacy.mechanism": "central-adaptive"}
    for name in ("noise-multiplier", "clipping-norm", "delta", "clipped-share", "clipping-rate")
}
NEEDS["privacy.count-stddev"] = {"privacy.mechanism": "central-adaptive"}
THREE = {"strategy.min-train-nodes": 3, "strategy.min-available-nodes": 3}
NEEDS["privacy.secure-aggregation"] = THREE
NEEDS["privacy.secure-threshold"] = {"privacy.secure-aggregation": True} | THREE


def _other(key, value):
    """Return an allowed value for ``key`` that is not its default."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    if key == "privacy.secure-threshold":
        return 0.75
    if isinstance(value, float):
        return value / 2 + 0.125
    return (OTHER_CHOICE | {"tracking": "wandb mlflow"}).get(key, f"another {key}")


def _at(config, key):
    return functools.reduce(getattr, key.replace("-", "_").split("."), config)


def _errors(run_config):
    """Return the lines of the error that parsing raises, but for the first."""
    with pytest.raises(ConfigError) as caught:
        parse(run_config)
    first, *lines = str(caught.value).splitlines()
    assert first == "the run configuration is not valid:"
    return lines


def test_pyproject_offers_every_key_with_its_default():
    tables = tomllib.loads(PYPROJECT.read_text())["tool"]["flwr"]["app"]["config"]
    offered = flatten_dict(tables)  # as Flower flattens it
    assert list(offered.items()) == list(defaults().items())
    assert [type(v) for v in offered.values()] == [type(v) for v in defaults().values()]


def test_nothing_given_is_all_defaults():
    assert parse({}) == parse(defaults()) == Config()
    assert flatten(Config()) == defaults()
    assert list(flatten(Config())) == list(defaults())


def test_parse_and_flatten_are_inverse_for_every_key():
    for key, value in defaults().items():
        changed = defaults() | NEEDS.get(key, {}) | {key: _other(key, value)}
        assert changed[key] != value
        config = parse(changed)
        assert flatten(config) == changed
        assert {key: _at(config, key) for key in changed} == changed


def test_a_config_is_a_constant():
    config = parse({})
    assert hash(config.model) == hash(Config().model)  # workers are cached by it
    with pytest.raises(FrozenInstanceError):
        config.ferret.coefficients = 1


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("ferret.coefficents", "ferret.coefficients"),
        ("ferret.max_per_block", "ferret.max-per-block"),
        ("learning-rate", "train.learning-rate"),
        ("num-rounds", "num-server-rounds"),
    ],
)
def test_an_unknown_key_close_to_a_known_one(key, meant):
    assert _errors({key: 1}) == [f"unknown key '{key}'; did you mean '{meant}'?"]


def test_an_unknown_key_like_no_other_lists_them_all():
    (line,) = _errors({"xyzzy": 1})
    assert line == f"unknown key 'xyzzy'; known keys: {', '.join(defaults())}"


@pytest.mark.parametrize(
    ("key", "value", "kind"),
    [
        ("train.steps", True, "int"),
        ("train.steps", "8", "int"),
        ("train.steps", 8.0, "int"),
        ("train.learning-rate", "0.1", "float"),
        ("train.learning-rate", False, "float"),
        ("model.gradient-checkpointing", 1, "bool"),
        ("model.gradient-checkpointing", "true", "bool"),
        ("model.name", 7, "str"),
        ("ferret.family", None, "str"),
    ],
)
def test_another_type(key, value, kind):
    assert _errors({key: value}) == [f"'{key}' must be of type {kind}, got {value!r}"]


def test_an_integer_is_a_float():
    rate = parse({"train.learning-rate": 2}).train.learning_rate
    assert rate == 2.0 and isinstance(rate, float)


@pytest.mark.parametrize("key", OTHER_CHOICE)
def test_choices(key):
    allowed = (defaults()[key], OTHER_CHOICE[key])
    (line,) = _errors({key: "neither"})
    assert line.startswith(f"'{key}' must be one of {allowed[0]}, ")
    assert allowed[1] in line and line.endswith(", got 'neither'")
    for value in allowed:
        assert _at(parse({"ferret.blocks": 64, key: value}), key) == value
    _errors({key: allowed[0].upper()})


def test_words():
    assert parse({"tracking": " mlflow  tensorboard"}).tracking.split() == ["mlflow", "tensorboard"]
    (line,) = _errors({"tracking": "wandb tensorbord"})
    allowed = "tensorboard, wandb, mlflow"
    assert (
        line == f"'tracking' must be any of {allowed} with spaces between, got 'wandb tensorbord'"
    )


@pytest.mark.parametrize("name", CONTIGUOUS_ONLY)
def test_what_is_for_contiguous_blocks_needs_them(name):
    key = f"ferret.{name.replace('_', '-')}"
    other = _other(key, defaults()[key])
    (line,) = _errors({key: other, "ferret.coefficients": 320})
    assert line.startswith(f"'{key}' = {other!r} is for contiguous blocks: set 'ferret.blocks', ")
    assert "for example to 20;" in line
    assert _at(parse({key: other, "ferret.blocks": 20}), key) == other


@pytest.mark.parametrize(
    ("key", "edge", "beyond", "allowed"),
    [
        ("num-server-rounds", 1, 0, "at least 1"),
        ("seed", 0, -1, f"at least 0 and at most {2**63 - 1}"),
        ("seed", 2**63 - 1, 2**63, f"at least 0 and at most {2**63 - 1}"),
        ("dataset.holdout", 0.9, 0.91, "at least 0.0 and at most 0.9"),
        ("dataset.alpha", 1e-6, 0.0, "at least 1e-06"),
        ("dataset.max-examples", 0, -1, "at least 0"),
        ("train.learning-rate", 0.0, -0.1, "at least 0.0"),
        ("train.steps", 1, 0, "at least 1"),
        ("train.batch-size", 1, 0, "at least 1"),
        ("train.seq-length", 2, 1, "at least 2"),
        ("train.max-grad-norm", 0, -1, "at least 0.0"),
        ("evaluate.every", 0, -1, "at least 0"),
        ("strategy.fraction-train", 1, 2, "at least 0.0 and at most 1.0"),
        ("strategy.fraction-train", 1.0, math.nextafter(1, 2), "at least 0.0 and at most 1.0"),
        ("ferret.coefficients", 1, 0, "at least 1"),
        ("ferret.max-per-block", 1, 0, "at least 1"),
        ("ferret.energy-decay", 0.0, -1e-9, "at least 0.0 and at most 1.0"),
        ("ferret.server-rate", 0.0, -1.0, "at least 0.0"),
    ],
)
def test_ranges(key, edge, beyond, allowed):
    assert _at(parse({"ferret.blocks": 1, key: edge}), key) == edge
    (line,) = _errors({key: beyond})
    assert line.startswith(f"'{key}' must be {allowed}, got {beyond}")


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("key", [key for key, v in defaults().items() if isinstance(v, float)])
def test_floats_are_finite(key, value):
    assert _errors({key: value}) == [f"'{key}' must be finite, got {value}"]


def test_all_errors_are_told_together():
    lines = _errors({"tran.steps": 1, "train.steps": 0, "seed": "7", "method": "magic"})
    assert len(lines) == 4
    for line, key in zip(lines, ("tran.steps", "method", "seed", "train.steps"), strict=False):
        assert f"'{key}'" in line


def test_more_blocks_than_coefficients():
    (line,) = _errors({"ferret.blocks": 11, "ferret.coefficients": 10})
    assert line == "'ferret.blocks' must be at most 'ferret.coefficients' = 10, got 11"
    assert parse({"ferret.blocks": 10, "ferret.coefficients": 10}).ferret.blocks == 10


def test_nothing_to_evaluate_on():
    nothing = {"dataset.holdout": 0}
    (line,) = _errors(nothing)
    for key, remedy in {
        "dataset.holdout": 0.1,
        "dataset.test-name": "test.jsonl",
        "evaluate.every": 0,
    }.items():
        assert f"'{key}'" in line
        assert _at(parse(nothing | {key: remedy}), key) == remedy


@pytest.mark.parametrize(
    ("key", "value"),
    [("train.gradient-accumulation", 2), ("model.dtype", "float16"), ("method", "fedavg")],
)
def test_what_lean_does_not_do(key, value):
    (line,) = _errors({"train.memory": "lean", key: value})
    assert line.startswith("'train.memory' = 'lean'") and f"'{key}'" in line
    assert f"got {value!r}" in line
    parse({"train.memory": "standard", key: value})
    parse({"train.memory": "lean", "model.dtype": "bfloat16", "train.max-grad-norm": 1.0})


def test_contradictions_are_told_together():
    lines = _errors({"ferret.blocks": 11, "ferret.coefficients": 10, "dataset.holdout": 0.0})
    assert len(lines) == 2
