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
TRACKERS = ("tensorboard", "wandb", "mlflow")  # see `tracking`


class ConfigError(ValueError):
    """A run-config key is unknown, or its value is not allowed."""


def _one_of(default: str, *others: str) -> Any:
    return field(default=default, metadata={"choices": (default, *others)})


def _some_of(*choices: str) -> Any:
    return field(default="", metadata={"words": choices})


def _within(default: int | float, low: float, high: float = float("inf")) -> Any:
    return field(default=default, metadata={"range": (low, high)})


@dataclass(frozen=True)
class ModelConfig:
    """Which causal language model is tuned (`model.*`)."""

    name: str = "builtin:tiny"  # built-in, local folder, or Hub id
    revision: str = ""  # commit or tag of a Hub id; "" = the default branch
    gguf_file: str = ""  # a GGUF file inside `model.name`, dequantised on load
    dtype: str = _one_of("float32", "bfloat16", "float16")  # of the parameters in training
    device: str = "auto"  # as torch names it; "auto" = the first GPU, "balanced" = all GPUs
    gradient_checkpointing: bool = False  # less memory, more time
    trust_remote_code: bool = False  # run code that comes with the model


@dataclass(frozen=True)
class DatasetConfig:
    """Which examples are read, and how they are divided among the clients (`dataset.*`)."""

    name: str = "builtin:tasks"  # built-in, local JSON/JSONL file or folder, or Hub id
    subset: str = ""  # configuration of a Hub id, as "main" of openai/gsm8k
    revision: str = ""  # commit or tag of a Hub id; "" = the default branch
    split: str = "train"  # of a Hub id
    test_name: str = ""  # held-out data; "" = hold out a share of `dataset.name`
    test_split: str = "test"  # of a Hub id
    holdout: float = _within(0.1, 0.0, 0.9)  # share held out when `dataset.test-name` is ""
    format: str = _one_of("auto", "alpaca", "dolly", "gsm8k", "natural-instructions", "messages")
    max_examples: int = _within(0, 0)  # 0 = all
    partitioner: str = _one_of("iid", "dirichlet", "natural")  # how examples are divided
    partition_by: str = "category"  # column for dirichlet and natural
    alpha: float = _within(0.5, 1e-6)  # Dirichlet concentration
    too_long: str = _one_of("error", "drop", "truncate")  # response beyond train.seq-length


@dataclass(frozen=True)
class TrainConfig:
    """What one client does in one round (`train.*`)."""

    optimizer: str = "SGD"  # any name in torch.optim
    optimizer_args: str = ""  # "momentum=0.9 weight_decay=0.01"
    learning_rate: float = _within(1.0, 0.0)  # at its highest
    schedule: str = _one_of("constant", "linear", "cosine")  # over all rounds of the run
    warmup_steps: int = _within(0, 0)  # over which the rate rises, once a run
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
    batch_size: int = _within(64, 1)  # sequences per forward pass
    max_examples: int = _within(256, 1)  # examples for the loss
    generate_examples: int = _within(64, 0)  # examples for Rouge-L; 0 = off
    max_new_tokens: int = _within(32, 1)  # of an answer


@dataclass(frozen=True)
class StrategyConfig:
    """Which nodes take part in a round, and how their coefficients become one (`strategy.*`)."""

    name: str = _one_of("fedavg", "fedmedian", "trimmed-mean", "krum", "multi-krum", "bulyan")
    trim: float = _within(0.2, 0.0, 0.49)  # share that trimmed-mean cuts off at either end
    malicious_nodes: int = _within(0, 0)  # that krum, multi-krum and bulyan must bear
    keep_nodes: int = _within(1, 1)  # whose mean multi-krum takes
    fraction_train: float = _within(1.0, 0.0, 1.0)  # share of the nodes
    fraction_evaluate: float = _within(0.0, 0.0, 1.0)  # share of the nodes, on data of their own
    min_train_nodes: int = _within(1, 1)  # at least so many train
    min_available_nodes: int = _within(2, 1)  # a round waits for them
    round_timeout: float = _within(0.0, 0.0)  # seconds until a round goes on without a node; 0 = no

    def contradictions(self) -> list[str]:
        """Return what is wrong between keys that are each valid alone."""
        wrong = []
        if self.min_train_nodes > self.min_available_nodes:
            wrong.append(
                f"'strategy.min-train-nodes' must be at most 'strategy.min-available-nodes' = "
                f"{self.min_available_nodes}, got {self.min_train_nodes}"
            )
        default = StrategyConfig()
        for name, owners in BELONGS_TO.items():
            if self.name not in owners and (value := getattr(self, name)) != getattr(default, name):
                wrong.append(
                    f"'strategy.{name.replace('_', '-')}' = {value!r} is for 'strategy.name' = "
                    f"{' or '.join(map(repr, owners))}, got '{self.name}'"
                )
        times = NODES_PER_LIAR.get(self.name, 0)
        least = times * self.malicious_nodes + 3
        if times and self.min_train_nodes < least:
            wrong.append(
                f"'strategy.name' = '{self.name}' bears 'strategy.malicious-nodes' = "
                f"{self.malicious_nodes} among at least {least} nodes a round: set "
                f"'strategy.min-train-nodes' to {least} or more, got {self.min_train_nodes}"
            )
        if self.name == "multi-krum" and self.keep_nodes > (
            most := self.min_train_nodes - self.malicious_nodes
        ):
            wrong.append(
                "'strategy.keep-nodes' must leave the malicious ones out: at most "
                f"'strategy.min-train-nodes' - 'strategy.malicious-nodes' = {most}, "
                f"got {self.keep_nodes}"
            )
        return wrong


# Keys of strategies that not all have, and the strategies.
BELONGS_TO = {
    "trim": ("trimmed-mean",),
    "malicious_nodes": ("krum", "multi-krum", "bulyan"),
    "keep_nodes": ("multi-krum",),
}
# n >= 2f + 3 nodes bear f liars (Blanchard et al., 2017), or 4f + 3 (El Mhamdi et al., 2018).
NODES_PER_LIAR = {"krum": 2, "multi-krum": 2, "bulyan": 4}


@dataclass(frozen=True)
class PrivacyConfig:
    """What hides a node's part in a round (`privacy.*`), see docs/privacy.md."""

    mechanism: str = _one_of("none", "central-fixed", "central-adaptive", "local")
    noise_multiplier: float = _within(1.0, 1e-3)  # z, of the noise of clipping_norm on the sum
    clipping_norm: float = _within(1.0, 1e-9)  # C; of central-adaptive the first round's
    delta: float = _within(1e-5, 1e-15, 0.5)  # of (epsilon, delta)
    # Of central-adaptive only:
    clipped_share: float = _within(0.5, 0.0, 1.0)  # of the nodes' updates that should be clipped
    clipping_rate: float = _within(0.2, 1e-6)  # how fast the norm follows that
    count_stddev: float = _within(1.0, 1e-3)  # of the noise on the number of clipped updates
    # Whatever the mechanism:
    secure_aggregation: bool = False  # the server learns the sum of the nodes' numbers only
    secure_threshold: float = _within(0.6, 0.5, 1.0)  # share of the nodes that must stay

    def contradictions(self) -> list[str]:
        """Return what is wrong between keys that are each valid alone."""
        wrong = []
        default = PrivacyConfig()
        if self.secure_threshold != default.secure_threshold and not self.secure_aggregation:
            wrong.append("'privacy.secure-threshold' needs 'privacy.secure-aggregation' = true")
        for f in fields(self)[1:]:
            if f.name.startswith("secure"):
                continue
            owners = PRIVACY_ONLY.get(f.name, ("central-fixed", "central-adaptive", "local"))
            value = getattr(self, f.name)
            if self.mechanism not in owners and value != getattr(default, f.name):
                wrong.append(
                    f"'privacy.{f.name.replace('_', '-')}' = {value!r} is for 'privacy.mechanism' "
                    f"= {' or '.join(map(repr, owners))}, got '{self.mechanism}'"
                )
        if self.mechanism == "central-adaptive" and self.noise_multiplier >= 2 * self.count_stddev:
            wrong.append(
                "'privacy.noise-multiplier' must be less than twice 'privacy.count-stddev' = "
                f"{self.count_stddev}, got {self.noise_multiplier}: the count tells more"
            )
        return wrong


PRIVACY_ONLY = {
    "clipped_share": ("central-adaptive",),
    "clipping_rate": ("central-adaptive",),
    "count_stddev": ("central-adaptive",),
}
CONTIGUOUS_ONLY = ("allocation", "max_per_block", "energy_decay", "energy_floor", "warmup_rate")


@dataclass(frozen=True)
class FerretConfig:
    """The projection and the server's step (`ferret.*`)."""

    coefficients: int = _within(8192, 1)  # K, numbers a client sends per round
    blocks: int = _within(0, 0)  # L contiguous blocks, at most K; 0 = K interleaved ones
    number_format: str = _one_of("float32", "float16", "int8")  # of a coefficient on the wire
    family: str = _one_of("rademacher", "truncated-normal")  # of the bases' elements
    bases: str = _one_of("shared", "per-client")  # whose they are
    # Of contiguous blocks only:
    allocation: str = _one_of("energy", "variance", "norm", "uniform")  # each block's share of K
    max_per_block: int = _within(512, 1)  # cap on K_l
    energy_decay: float = _within(0.5, 0.0, 1.0)  # weight of the past in the moving average
    energy_floor: float = _within(1e-3, 0.0, 1.0)  # share of the mean energy
    warmup_rate: float = _within(0.3, 0.0)  # factor on the rate before energies are known
    # Of any blocks:
    server_rate: float = _within(1.0, 0.0)  # 1.0 = apply the average update
    rate_schedule: str = _one_of("constant", "linear", "cosine")  # over all rounds of the run
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

    num_server_rounds: int = _within(10, 1)  # counted from the first round of the ledger
    method: str = _one_of("ferret", *OTHER_METHODS)  # how the model is tuned
    seed: int = _within(42, 0, 2**63 - 1)  # all that is random follows from it
    results_dir: str = "results"  # gets a folder for each run
    tracking: str = _some_of(*TRACKERS)  # who shows the curves, beside results.json; "" = nobody
    model: ModelConfig = ModelConfig()
    dataset: DatasetConfig = DatasetConfig()
    train: TrainConfig = TrainConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    strategy: StrategyConfig = StrategyConfig()
    privacy: PrivacyConfig = PrivacyConfig()
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
    if "words" in metadata and not set(str(value).split()) <= set(metadata["words"]):
        words = ", ".join(metadata["words"])
        raise ConfigError(f"'{key}' must be any of {words} with spaces between, got {value!r}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"'{key}' must be finite, got {value!r}")
    low, high = metadata.get("range", (None, None))
    if low is not None and not low <= value <= high:
        upper = "" if high == float("inf") else f" and at most {high}"
        raise ConfigError(f"'{key}' must be at least {low}{upper}, got {value!r}")
    return value


def _contradictions(config: Config) -> list[str]:
    """Return what is wrong between keys that are each valid alone."""
    wrong = config.strategy.contradictions() + config.privacy.contradictions()
    if config.privacy.mechanism != "none" or config.privacy.secure_aggregation:
        wrong += _private_contradictions(config)
    if config.strategy.name != "fedavg":
        if config.method != "ferret":
            wrong.append(
                f"'strategy.name' = '{config.strategy.name}' needs 'method' = 'ferret': the other "
                f"methods have their own way to aggregate, got '{config.method}'"
            )
        if config.ferret.bases == "per-client":
            wrong.append(
                "'ferret.bases' = 'per-client' needs 'strategy.name' = 'fedavg': numbers on "
                f"different bases cannot be compared, got '{config.strategy.name}'"
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


def _private_contradictions(config: Config) -> list[str]:
    """Return what would make false what `privacy.*` promises."""
    mechanism = config.privacy.mechanism
    needs: dict[str, tuple[Scalar, str]] = {
        "method": ("ferret", "what the other methods send is not clipped"),
        "ferret.bases": ("shared", "with bases of their own every node's numbers are published"),
        "strategy.fraction-evaluate": (0.0, "what nodes evaluate has no noise"),
    }
    if config.privacy.secure_aggregation or mechanism == "local":
        needs["ferret.number-format"] = ("float32", "noise and masks are added to float32")
    if mechanism == "local":
        needs["ferret.blocks"] = (0, "nodes clip coefficients, which are as long as the update so")
        needs["ferret.family"] = ("rademacher", "nodes clip coefficients by the update's length")
    elif mechanism != "none":
        needs["strategy.name"] = ("fedavg", "the noise is for a mean")
    asked = f"'privacy.mechanism' = '{mechanism}'"
    wrong = []
    if config.privacy.secure_aggregation:
        asked = "'privacy.secure-aggregation'"
        needs["strategy.name"] = ("fedavg", "the server sees the mean and nothing else")
        if mechanism.startswith("central"):
            wrong.append(
                f"{asked} hides from the server what '{mechanism}' would clip: use 'local'"
            )
        if config.strategy.min_train_nodes < 3:
            wrong.append(
                f"{asked} needs 'strategy.min-train-nodes' of at least 3, that one may leave; got "
                f"{config.strategy.min_train_nodes}"
            )
    flat = flatten(config)
    return wrong + [
        f"{asked} needs '{key}' = {value!r}: {why}; got {flat[key]!r}"
        for key, (value, why) in needs.items()
        if flat[key] != value
    ]


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
