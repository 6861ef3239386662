"""What is compared: a TOML file, or the command line's equivalent, checked before anything runs.

A plan file has these keys; keys of the run configuration may be nested tables or dotted::

    title = "..."
    recipe = "examples/gsm8k-smollm2.toml"  # a run-config file; left out: the app's defaults
    seeds = [1, 2]                          # what the figures are over
    search-seed = 3                         # left out: the largest of the seeds + 1
    nodes = 3                               # left out: the recipe's strategy.min-available-nodes
    [settings]                              # for all variants, over the recipe
    num-server-rounds = 8
    [search-settings]                       # for a search's runs, over the settings
    num-server-rounds = 4
    [variants.ferret-16k]                   # method = "ferret-16k" unless it says otherwise
    method = "ferret"
    ferret.coefficients = 16384
    search = { train.learning-rate = [0.003, 0.01] }

A search tries all combinations of its values with the search seed, which no figure is over. What it
chose then runs with the seeds: each has training and held-out examples in an order of its own, so
that the figures are over other examples than the search, unless `evaluate.max-examples` covers all.
"""

from __future__ import annotations

import difflib
import itertools
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ferret_flwr.config import Config, ConfigError, Scalar, parse

Settings = dict[str, Scalar]

KEYS = (
    "title",
    "recipe",
    "seeds",
    "search-seed",
    "nodes",
    "settings",
    "search-settings",
    "variants",
)
DECIDED = {  # run-config keys that a comparison sets itself, and what to use for them
    "seed": "'seeds' and 'search-seed'",
    "strategy.min-available-nodes": "'nodes'",
    "results-dir": "'--output'",
    "ferret.cache-dir": "nothing: a run's cache is its own",
    "ferret.resume": "nothing: a stopped comparison goes on by itself",
}


@dataclass(frozen=True)
class Variant:
    """One line of the table.

    Attributes
    ----------
    name
        How it is called.
    settings
        Its run configuration, flat, without what `Plan.config` adds.
    own
        Those of them that it sets itself.
    search
        Keys and the values to choose from.
    """

    name: str
    settings: Settings
    own: Settings
    search: Mapping[str, tuple[Scalar, ...]]

    @property
    def choices(self) -> list[Settings]:
        """Return every combination of the search's values; one empty one without a search."""
        combinations = itertools.product(*self.search.values())
        return [dict(zip(self.search, values, strict=True)) for values in combinations]


@dataclass(frozen=True)
class Plan:
    """A whole comparison."""

    title: str
    seeds: tuple[int, ...]
    search_seed: int
    search_settings: Settings
    nodes: int
    variants: tuple[Variant, ...]

    @classmethod
    def of(cls, raw: Mapping[str, Any]) -> Plan:
        """Check what a plan file says.

        Raises
        ------
        ConfigError
            Naming the key that is wrong, and what is allowed.
        """
        _check_keys(raw, KEYS, "the plan")
        recipe = read_toml(Path(typed(raw, "recipe", str))) if "recipe" in raw else {}
        recipe = flattened(recipe)
        nodes = typed(
            raw,
            "nodes",
            int,
            recipe.get("strategy.min-available-nodes", Config().strategy.min_available_nodes),
        )
        if nodes < 1:
            raise ConfigError(f"the plan's 'nodes' must be at least 1, got {nodes}")
        common = _own(flattened(typed(raw, "settings", dict, {})), "the plan's 'settings'")
        base = {key: value for key, value in recipe.items() if key not in DECIDED} | common
        tables = typed(raw, "variants", dict)
        if not tables:
            raise ConfigError("the plan's 'variants' are empty: add [variants.ferret], say")
        variants = [_variant(name, table, base) for name, table in tables.items()]
        seeds, search_seed = _seeds(raw)
        where = "the plan's 'search-settings'"
        search_settings = _own(flattened(typed(raw, "search-settings", dict, {})), where)
        if "method" in search_settings:
            raise ConfigError(f"{where} cannot set 'method': each variant searches for itself")
        plan = cls(
            title=typed(raw, "title", str, "Comparison"),
            seeds=seeds,
            search_seed=search_seed,
            search_settings=search_settings,
            nodes=nodes,
            variants=tuple(variants),
        )
        for variant, seed in itertools.product(plan.variants, (*seeds, search_seed)):
            for choice in variant.choices:
                config = plan.config(variant, choice, seed)
                if not config.evaluate.every:
                    raise ConfigError("'evaluate.every' must be at least 1 to compare anything")
        return plan

    def config(self, variant: Variant, choice: Mapping[str, Scalar], seed: int) -> Config:
        """Return the configuration of one run; that of a search has the search's seed.

        Raises
        ------
        ConfigError
            Naming the variant and the keys that are wrong.
        """
        decided = {"seed": seed, "strategy.min-available-nodes": self.nodes}
        instead = self.search_settings | variant.own if seed == self.search_seed else {}
        try:
            return parse({**variant.settings, **instead, **choice, **decided})
        except ConfigError as error:
            raise ConfigError(f"variant '{variant.name}': {error}") from None


def read_toml(path: Path) -> dict[str, Any]:
    """Return what a TOML file says, or raise `ConfigError` saying why it cannot be read."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read '{path}': {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"'{path}' is not valid TOML: {error}") from None


def toml_value(text: str) -> Any:
    """Return a value as TOML reads it; what it does not know is text."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def pairs(given: Iterable[str], option: str = "--set") -> Settings:
    """Return what the ``KEY=VALUE`` of a command line's ``option`` set.

    Raises
    ------
    ConfigError
        If one has no ``=``.
    """
    found = {}
    for pair in given:
        key, equals, value = pair.partition("=")
        if not equals:
            raise ConfigError(f"{option} needs KEY=VALUE, got {pair!r}")
        found[key] = toml_value(value)
    return found


def flattened(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested tables as dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in table.items():
        nested = isinstance(value, Mapping)
        flat |= flattened(value, f"{prefix}{key}.") if nested else {prefix + key: value}
    return flat


def _check_keys(found: Iterable[str], allowed: Iterable[str], where: str) -> None:
    for key in found:
        if key not in allowed:
            raise ConfigError(f"{where} has no key '{key}'; allowed are {', '.join(allowed)}")


def typed(raw: Mapping[str, Any], key: str, kind: type, default: Any = None) -> Any:
    """Return the plan's ``key``, or raise `ConfigError` if it is missing or of another type."""
    value = raw.get(key, default)
    if value is None:
        raise ConfigError(f"the plan needs '{key}'; its keys are {', '.join(KEYS)}")
    if type(value) is not kind:
        raise ConfigError(f"the plan's '{key}' must be of type {kind.__name__}, got {value!r}")
    return value


def _seeds(raw: Mapping[str, Any]) -> tuple[tuple[int, ...], int]:
    """Return the seeds that are reported, and that of the searches."""
    seeds = typed(raw, "seeds", list, [Config().seed])
    if not seeds or any(type(s) is not int for s in seeds) or len(set(seeds)) < len(seeds):
        raise ConfigError(f"the plan's 'seeds' must be different whole numbers, got {seeds!r}")
    search_seed = typed(raw, "search-seed", int, max(seeds) + 1)
    if search_seed in seeds:
        raise ConfigError(
            f"the plan's 'search-seed' must be none of its 'seeds', got {search_seed}: what a "
            "search has seen cannot judge what it chose"
        )
    return tuple(seeds), search_seed


def _own(settings: dict[str, Any], where: str) -> dict[str, Any]:
    """Return ``settings`` if none of them is the comparison's own."""
    for key in settings:
        if key in DECIDED:
            raise ConfigError(f"{where} cannot set '{key}'; use {DECIDED[key]}")
    return settings


def _variant(name: str, table: Any, base: Settings) -> Variant:
    where = f"variant '{name}'"
    if not isinstance(table, Mapping):
        raise ConfigError(f"{where} must be a table of settings, got {table!r}")
    search = table.get("search", {})
    if not isinstance(search, Mapping):
        raise ConfigError(f"{where}: 'search' must be a table of lists, got {search!r}")
    search = _own(flattened(search), f"{where}: its 'search'")
    for key, values in search.items():
        if not isinstance(values, list) or not values:
            raise ConfigError(f"{where}: 'search' must list values for '{key}', got {values!r}")
    own = _own(flattened({key: value for key, value in table.items() if key != "search"}), where)
    return Variant(
        name,
        {**base, "method": name} | own,
        own,
        {key: tuple(values) for key, values in search.items()},
    )


def chosen(raw: Mapping[str, Any], names: Iterable[str]) -> list[str]:
    """Return those of the plan's variants that ``names`` has, in the plan's order.

    Raises
    ------
    ConfigError
        If there is no such variant.
    """
    variants = typed(raw, "variants", dict)
    for name in names:
        if name not in variants:
            close = difflib.get_close_matches(name, variants, n=1)
            hint = f"; did you mean '{close[0]}'?" if close else ""
            raise ConfigError(
                f"the plan has no variant '{name}'{hint}; it has {', '.join(variants)}"
            )
    return [name for name in variants if name in set(names)]
