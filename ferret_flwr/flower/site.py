"""What the owner of a node decides in its node-config, and what a run may not decide for it."""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flwr.app import Context

from ferret_flwr.config import Config, ConfigError, flatten, parse
from ferret_flwr.projection.plan import RoundPlan

OWN_KEYS = ("partition-id", "num-partitions")

# Run-config keys that a node may set for itself: what lies on its disk, what its devices hold, and
# that it sends coefficients and no weights, how many, and with what noise.
NODE_KEYS = (
    "method",
    "model.name",
    "model.revision",
    "model.gguf-file",
    "model.dtype",
    "model.device",
    "model.gradient-checkpointing",
    "model.trust-remote-code",
    "dataset.name",
    "dataset.subset",
    "dataset.revision",
    "dataset.split",
    "dataset.format",
    "dataset.max-examples",
    "train.batch-size",
    "train.gradient-accumulation",
    "train.memory",
    "privacy.mechanism",
    "privacy.noise-multiplier",
    "privacy.clipping-norm",
    "privacy.delta",
    "privacy.secure-aggregation",
    "ferret.coefficients",
    "ferret.cache-dir",
    "ferret.snapshots",
)
# What describes the run's model or data and says nothing about a node's own.
DESCRIBE = {
    "model.name": ("model.revision", "model.gguf-file"),
    "dataset.name": ("dataset.subset", "dataset.revision", "dataset.split", "dataset.format"),
}
FILES = (".json", ".jsonl", ".gguf")
HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)


@dataclass(frozen=True)
class Site:
    """One node: the run's configuration as it holds there, and which data are its own.

    Attributes
    ----------
    config
        The run's, with the node's own settings in place of the run's.
    partition_id
        The node's number: it orders the replies and the node's examples.
    num_partitions
        Among how many nodes the data are divided; None if the node has data of its own.
    """

    config: Config
    partition_id: int
    num_partitions: int | None

    @classmethod
    def of(cls, context: Context, *, simulated: bool | None = None) -> Site:
        """Read run-config and node-config of Flower's ``context``.

        In a simulation the nodes are on the machine of whoever submits the run, so its paths are
        theirs. Elsewhere a run comes from the network, and its paths are not opened.

        Parameters
        ----------
        context
            Of the node and the run.
        simulated
            Whether the engine is Flower's simulation; None to find out.

        Raises
        ------
        ConfigError
            Naming the node and the key that is wrong or missing, and what is allowed.
        """
        own = context.node_config
        run = dict(context.run_config)
        check_keys(own)
        for key in (key for name in DESCRIBE if name in own for key in DESCRIBE[name]):
            run.pop(key, None)
        if not (_in_simulation() if simulated is None else simulated):
            _check_trust(run, own)
        settings = {key: own[key] for key in NODE_KEYS if key in own}
        if "model.name" not in own and not run.get("model.trust-remote-code"):
            settings.pop("model.trust-remote-code", None)  # its word is for a model of its own
        config = parse(run | settings)
        partition_id = cls.partition_of(context)
        partitions = _number(context, "num-partitions", optional="dataset.name" in own)
        return cls(config, partition_id, partitions)

    @staticmethod
    def partition_of(context: Context) -> int:
        """Return the node's number, or raise `ConfigError`."""
        number = _number(context, "partition-id")
        assert number is not None
        return number


def _in_simulation() -> bool:
    """Tell whether this process is a worker of Flower's simulation engine."""
    ray = sys.modules.get("ray")
    return ray is not None and ray.is_initialized()


def check_keys(own: Mapping[str, Any]) -> None:
    """Refuse what looks like one of our keys but is none; other apps may have theirs."""
    groups = {key.split(".")[0] for key in flatten(Config()) if "." in key}
    known = (*OWN_KEYS, *NODE_KEYS)
    for key in own:
        if key not in known and "." in key and key.split(".")[0] in groups:
            close = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean '{close[0]}'?" if close else f"allowed are {', '.join(known)}"
            raise ConfigError(f"its node-config cannot set '{key}'; {hint}")


def check_own(own: Mapping[str, Any]) -> None:
    """Refuse a node-config that a client without the app's mods could not obey.

    Raises
    ------
    ConfigError
        Naming the keys.
    """
    check_keys(own)
    if asked := sorted(key for key in own if key.startswith("privacy.")):
        raise ConfigError(
            f"its node-config sets {asked}, but this app's client adds no noise: give its "
            "ClientApp mods=[on_coefficients(LocalDpMod(...))]"
        )


def check_asked(plan: RoundPlan, most: int) -> None:
    """Refuse a plan with more coefficients than the node gives: they are what a reply can reveal.

    Raises
    ------
    ConfigError
        Naming both numbers.
    """
    if plan.num_coefficients > most:
        raise ConfigError(
            f"the server asks for K = {plan.num_coefficients} coefficients, this node gives at "
            f"most {most}, see 'ferret.coefficients' of a node-config"
        )


def _check_trust(run: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Refuse paths that come with the run, and code of a model that the node does not trust."""
    for key, is_harmless in HARMLESS.items():
        value = str(run.get(key, ""))
        if key not in own and value and not is_harmless(value):
            raise ConfigError(
                f"the run's '{key}' = {value!r} names a path, and a node opens no path that comes "
                f"with a run; start its SuperNode with --node-config '{key}=\"...\"'"
            )
    if run.get("model.trust-remote-code") and not own.get("model.trust-remote-code"):
        raise ConfigError(
            "the run wants to execute code that comes with its model; to allow it, start the "
            "SuperNode with --node-config 'model.trust-remote-code=true'"
        )


def _is_name(value: str) -> bool:
    """Tell whether ``value`` is a built-in or a Hub id, and nothing on this node's disk."""
    if value.startswith("builtin:"):
        return True
    path = Path(value)
    return bool(HUB_ID.fullmatch(value)) and path.suffix not in FILES and not path.exists()


def _is_data(value: str) -> bool:
    """Tell a name of data; one without an owner may be a reader of what lies in the folder."""
    return _is_name(value) and (value.startswith("builtin:") or "/" in value)


def _is_label(value: str) -> bool:
    """Tell a branch, a split or a configuration; libraries join them to paths."""
    return ".." not in value and not value.startswith(("/", "~"))


# Keys that may name a path, and what tells that a run's value names none.
HARMLESS: dict[str, Callable[[str], bool]] = {
    "model.name": _is_name,
    "model.gguf-file": lambda value: Path(value).name == value,
    "model.revision": _is_label,
    "dataset.name": _is_data,
    "dataset.subset": _is_label,
    "dataset.revision": _is_label,
    "dataset.split": _is_label,
    "ferret.cache-dir": lambda value: False,
}


def _number(context: Context, key: str, *, optional: bool = False) -> int | None:
    own = context.node_config
    if key not in own and optional:
        return None
    value = own.get(key)
    if type(value) is not int or value < 0:
        found = f"is {value!r}" if key in own else "is missing"
        raise ConfigError(
            f"'{key}' {found} in the node-config of node {context.node_id}; start its SuperNode "
            "with --node-config 'partition-id=0 num-partitions=2'"
        )
    return value
