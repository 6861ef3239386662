"""The run configuration: flat Flower keys in, one frozen tree of dataclasses out.

Every key is the kebab-case name of a field behind the name of its group: ``train.learning_rate``
is written ``train.learning-rate``. `parse` is the only reader; nothing behind it sees a raw key.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from typing import Any, get_type_hints

Scalar = bool | int | float | str

OTHER_METHODS = (  # what Ferret is compared with, see `methods.registry`
    "fedavg",
    "fedzo",
    "fedkseed",
    "fedkseed-pro",
    "fedit",
    "fedit-sgd",
    "fedprompt",
    "fedptuning",
    "fetchsgd",
)


class ConfigError(ValueError):
    """A run-config key is unknown, or its value is not allowed."""


def _one_of(default: str, *others: str) -> Any:
    return field(default=default, metadata={"choices": (default, *others)})


def _within(default: int | float, low: float, high: float = float("inf")) -> Any:
    return field(default=default, metadata={"range": (low, high)})


@dataclass(frozen=True)
class ModelConfig:
    """Which causal language model is tuned (`model.*`)."""

    name: str = "builtin:tiny"  # built-in, local folder, or Hub id
    revision: str = ""  # commit or tag of a Hub id; "" = the default branch
    gguf_file: str = ""  # a GGUF file inside `name`, dequantised on load
    dtype: str = _one_of("float32", "bfloat16", "float16")
    device: str = "auto"  # as torch names it; "auto" = the first GPU if there is one
    gradient_checkpointing: bool = False
    trust_remote_code: bool = False


@dataclass(frozen=True)
class DatasetConfig:
    """Which examples are read, and how they are divided among the clients (`dataset.*`)."""

    name: str = "builtin:tasks"  # built-in, local JSON/JSONL file or folder, or Hub id
    subset: str = ""  # configuration of a Hub id, as "main" of openai/gsm8k
    revision: str = ""
    split: str = "train"
    test_name: str = ""  # held-out data; "" = hold out a share of `name`
    test_split: str = "test"
    holdout: float = _within(0.1, 0.0, 0.9)  # share held out when `test_name` is ""
    format: str = _one_of("auto", "alpaca", "dolly", "gsm8k", "natural-instructions", "messages")
    max_examples: int = _within(0, 0)  # 0 = all
    partitioner: str = _one_of("iid", "dirichlet", "natural")
    partition_by: str = "category"  # column for dirichlet and natural
    alpha: float = _within(0.5, 1e-6)  # Dirichlet concentration
    too_long: str = _one_of("error", "drop", "truncate")  # response beyond train.seq-length


@dataclass(frozen=True)
class TrainConfig:
    """What one client does in one round (`train.*`)."""

    optimizer: str = "SGD"  # any name in torch.optim
    optimizer_args: str = ""  # "momentum=0.9 weight_decay=0.01"
    learning_rate: float = _within(1.0, 0.0)
    schedule: str = _one_of("constant", "linear", "cosine")  # over all rounds of the run
    warmup_steps: int = _within(0, 0)
    steps: int = _within(20, 1)  # optimizer steps per round
    batch_size: int = _within(16, 1)  # sequences per forward pass
    gradient_accumulation: int = _within(1, 1)  # forward passes per optimizer step
    seq_length: int = _within(64, 2)  # tokens
    max_grad_norm: float = _within(1.0, 0.0)  # 0 = no clipping
    memory: str = _one_of("standard", "lean")  # lean: no copy of the weights, one gradient at once


@dataclass(frozen=True)
class EvaluateConfig:
    """Held-out evaluation (`evaluate.*`)."""

    every: int = _within(1, 0)  # rounds between evaluations on the server; 0 = off
    batch_size: int = _within(64, 1)
    max_examples: int = _within(256, 1)  # examples for the loss
    generate_examples: int = _within(64, 0)  # examples for Rouge-L; 0 = off
    max_new_tokens: int = _within(32, 1)


@dataclass(frozen=True)
class StrategyConfig:
    """Which nodes take part in a round (`strategy.*`)."""

    fraction_train: float = _within(1.0, 0.0, 1.0)
    fraction_evaluate: float = _within(0.0, 0.0, 1.0)
    min_train_nodes: int = _within(1, 1)
    min_available_nodes: int = _within(2, 1)
    round_timeout: float = _within(0.0, 0.0)  # seconds until a round goes on without a node; 0 = no


CONTIGUOUS_ONLY = ("allocation", "max_per_block", "energy_decay", "energy_floor", "warmup_rate")


@dataclass(frozen=True)
class FerretConfig:
    """The projection and the server's step (`ferret.*`)."""

    coefficients: int = _within(8192, 1)  # K, numbers a client sends per round
    blocks: int = _within(0, 0)  # L contiguous blocks, at most K; 0 = K interleaved ones
    family: str = _one_of("rademacher", "truncated-normal")
    bases: str = _one_of("shared", "per-client")
    # Of contiguous blocks only:
    allocation: str = _one_of("energy", "variance", "norm", "uniform")
    max_per_block: int = _within(512, 1)  # cap on K_l
    energy_decay: float = _within(0.5, 0.0, 1.0)  # weight of the past in the moving average
    energy_floor: float = _within(1e-3, 0.0, 1.0)  # share of the mean energy
    warmup_rate: float = _within(0.3, 0.0)  # factor on the rate before energies are known
    # Of any blocks:
    server_rate: float = _within(1.0, 0.0)  # 1.0 = apply the average update
    rate_schedule: str = _one_of("constant", "linear", "cosine")
    max_norm_ratio: float = _within(1000.0, 0.0)  # longer replies are refused; 0 = none
    resume: str = ""  # a ledger file to continue from
    cache_dir: str = ""  # where a node keeps ledgers and snapshots; "" = the user's cache folder
    snapshots: bool = True  # keep parameters there when a replay takes longer than writing them

    def contradictions(self) -> list[str]:
        """Return what is wrong between keys that are each valid alone."""
        wrong = []
        if self.blocks > self.coefficients:
            wrong.append(
                f"'ferret.blocks' must be at most 'ferret.coefficients' = {self.coefficients}, "
                f"got {self.blocks}"
            )
        if not self.blocks:
            default = FerretConfig()
            for name in CONTIGUOUS_ONLY:
                if (value := getattr(self, name)) != getattr(default, name):
                    wrong.append(
                        f"'ferret.{name.replace('_', '-')}' = {value!r} is for contiguous blocks: "
                        f"set 'ferret.blocks', for example to {max(1, self.coefficients // 16)}; "
                        "0 means interleaved ones, with one basis each"
                    )
        return wrong


@dataclass(frozen=True)
class AdapterConfig:
    """What the methods that tune an adapter put on the model (`adapter.*`)."""

    rank: int = _within(8, 1)  # of LoRA
    alpha: float = _within(16.0, 0.0)  # LoRA's scale is alpha / rank
    target_modules: str = ""  # "q_proj v_proj"; "" = PEFT's choice for the architecture
    virtual_tokens: int = _within(20, 1)  # of prompt tuning and p-tuning
    encoder_size: int = _within(128, 1)  # hidden units of p-tuning's encoder


@dataclass(frozen=True)
class ZerothOrderConfig:
    """How the zeroth-order methods probe the loss (`zeroth-order.*`)."""

    epsilon: float = _within(5e-4, 1e-12)  # step of the finite difference
    directions: int = _within(1, 1)  # per local step of FedZO
    seeds: int = _within(4096, 1)  # FedKSeed's pool, K


@dataclass(frozen=True)
class SketchConfig:
    """FetchSGD's count sketch (`sketch.*`)."""

    rows: int = _within(5, 1)
    columns: int = _within(16384, 1)
    top_k: int = _within(1024, 1)  # entries of the model that a round changes
    momentum: float = _within(0.9, 0.0, 1.0)


@dataclass(frozen=True)
class Config:
    """Everything one run needs to know."""

    num_server_rounds: int = _within(10, 1)
    method: str = _one_of("ferret", *OTHER_METHODS)
    seed: int = _within(42, 0, 2**63 - 1)
    results_dir: str = "results"
    model: ModelConfig = ModelConfig()
    dataset: DatasetConfig = DatasetConfig()
    train: TrainConfig = TrainConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    strategy: StrategyConfig = StrategyConfig()
    ferret: FerretConfig = FerretConfig()
    adapter: AdapterConfig = AdapterConfig()
    zeroth_order: ZerothOrderConfig = ZerothOrderConfig()
    sketch: SketchConfig = SketchConfig()


def _leaves(cls: type, prefix: str = "") -> dict[str, tuple[type, Any, Mapping[str, Any]]]:
    """Key -> (type, default, metadata) of every leaf field below ``cls``."""
    hints = get_type_hints(cls)
    found: dict[str, tuple[type, Any, Mapping[str, Any]]] = {}
    for f in fields(cls):
        key = prefix + f.name.replace("_", "-")
        if is_dataclass(hints[f.name]):
            found |= _leaves(hints[f.name], key + ".")
        else:
            assert f.default is not MISSING, f"{key} has no default"
            found[key] = (hints[f.name], f.default, f.metadata)
    return found


def defaults() -> dict[str, Scalar]:
    """Return every key with its default value, in the order of the dataclasses."""
    return {key: default for key, (_, default, _) in _leaves(Config).items()}


def flatten(config: Config) -> dict[str, Scalar]:
    """Return ``config`` as flat keys, the inverse of `parse`."""

    def walk(node: Any, prefix: str) -> dict[str, Scalar]:
        out: dict[str, Scalar] = {}
        for f in fields(node):
            key, value = prefix + f.name.replace("_", "-"), getattr(node, f.name)
            out |= walk(value, key + ".") if is_dataclass(value) else {key: value}
        return out

    return walk(config, "")


def parse(run_config: Mapping[str, Scalar]) -> Config:
    """Check a flat run configuration and return it as a `Config`.

    Parameters
    ----------
    run_config
        Flat keys as in ``[tool.flwr.app.config]``. Missing keys take their defaults.

    Raises
    ------
    ConfigError
        Naming every unknown key and every value that is not allowed, with what is.
    """
    leaves = _leaves(Config)
    wrong = [_unknown(key, leaves) for key in run_config if key not in leaves]
    values = {}
    for key, (kind, default, metadata) in leaves.items():
        try:
            values[key] = _checked(key, run_config.get(key, default), kind, metadata)
        except ConfigError as error:
            wrong.append(str(error))
    if not wrong:
        config = _build(Config, values)
        wrong = config.ferret.contradictions() + _contradictions(config)
    if wrong:
        raise ConfigError("\n".join(["the run configuration is not valid:", *wrong]))
    return config


def _unknown(key: str, leaves: Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(key, leaves, n=1)
    hint = f"did you mean '{close[0]}'?" if close else f"known keys: {', '.join(leaves)}"
    return f"unknown key '{key}'; {hint}"


def _checked(key: str, value: Any, kind: type, metadata: Mapping[str, Any]) -> Any:
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        raise ConfigError(f"'{key}' must be of type {kind.__name__}, got {value!r}")
    if "choices" in metadata and value not in metadata["choices"]:
        raise ConfigError(f"'{key}' must be one of {', '.join(metadata['choices'])}, got {value!r}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"'{key}' must be finite, got {value!r}")
    low, high = metadata.get("range", (None, None))
    if low is not None and not low <= value <= high:
        upper = "" if high == float("inf") else f" and at most {high}"
        raise ConfigError(f"'{key}' must be at least {low}{upper}, got {value!r}")
    return value


def _contradictions(config: Config) -> list[str]:
    """Return what is wrong between keys that are each valid alone."""
    wrong = []
    if config.strategy.min_train_nodes > config.strategy.min_available_nodes:
        wrong.append(
            f"'strategy.min-train-nodes' must be at most 'strategy.min-available-nodes' = "
            f"{config.strategy.min_available_nodes}, got {config.strategy.min_train_nodes}"
        )
    if config.strategy.fraction_evaluate and not config.dataset.holdout:
        wrong.append(
            "'strategy.fraction-evaluate' needs 'dataset.holdout' above 0: the share of its own "
            "examples that a node evaluates on"
        )
    if config.train.memory == "lean":
        wrong += _not_lean(config)
    held_out = config.dataset.test_name or config.dataset.holdout > 0.0
    if config.evaluate.every and not held_out:
        wrong.append(
            "'dataset.holdout' is 0 and 'dataset.test-name' is empty: nothing is left to "
            "evaluate on; set one of them, or 'evaluate.every' = 0"
        )
    return wrong


def _not_lean(config: Config) -> list[str]:
    """Return what cannot be trained with one gradient at a time."""
    lean, wrong = "'train.memory' = 'lean'", []
    if config.method != "ferret":
        wrong.append(f"{lean} is for 'method' = 'ferret', got {config.method!r}")
    if config.train.gradient_accumulation > 1:
        wrong.append(
            f"{lean} needs 'train.gradient-accumulation' = 1, got "
            f"{config.train.gradient_accumulation}: a step is taken as soon as a gradient is there"
        )
    if config.model.dtype == "float16":
        wrong.append(
            f"{lean} needs 'model.dtype' = 'float32' or 'bfloat16', got 'float16': its smallest "
            "numbers cannot be rounded without bias"
        )
    return wrong


def _build(cls: type, values: Mapping[str, Any], prefix: str = "") -> Any:
    hints = get_type_hints(cls)
    arguments = {}
    for f in fields(cls):
        key = prefix + f.name.replace("_", "-")
        nested = is_dataclass(hints[f.name])
        arguments[f.name] = _build(hints[f.name], values, key + ".") if nested else values[key]
    return cls(**arguments)
