"""The runs of a plan: what is left to do, and what finished runs are kept as."""

from __future__ import annotations

import hashlib
import itertools
import json
import statistics
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from benchmarks.header import hardware
from benchmarks.inputs import base_fingerprint, code_hash, data_hashes
from benchmarks.plan import Plan, Settings, Variant
from benchmarks.simulate import RunError, simulate
from benchmarks.summary import Outcome, Record, best, final_loss, out_of_memory, trouble
from benchmarks.tables import draw, write
from ferret_flwr import __version__
from ferret_flwr.config import Config, ConfigError, defaults, flatten
from ferret_flwr.files import write_atomic
from ferret_flwr.methods.registry import METHODS
from ferret_flwr.report import environment
from ferret_flwr.training.errors import DataError, ModelError
from ferret_flwr.training.optimizers import check_optimizer

Rows = list[dict[str, Any]]
Start = Callable[[Config, int, Path, Path], Rows]  # as `simulate`


class Comparison:
    """A plan and the folder that its runs are kept in.

    Parameters
    ----------
    plan
        What to run.
    folder
        Gets ``runs/``, and what `write` writes.
    start
        Runs one configuration.
    fresh_code
        Whether finished runs count as not there if other code than today's has run them.
    names
        The variants to run; None for all.
    """

    def __init__(
        self,
        plan: Plan,
        folder: Path,
        start: Start = simulate,
        fresh_code: bool = False,
        names: Collection[str] | None = None,
    ) -> None:
        """Check models, data and optimizers, which every run would otherwise stumble over."""
        self.plan = plan
        self.folder = folder
        self.variants = [v for v in plan.variants if names is None or v.name in names]
        self.start = start
        self.fresh_code = fresh_code
        self.seconds: dict[str, list[float]] = {v.name: [] for v in plan.variants}  # a round's
        self.todo = {v.name: _searches(v) + len(plan.seeds) for v in self.variants}
        self.total = sum(self.todo.values())
        for variant in self.variants:
            for choice in variant.choices:
                for seed in self._seeds(variant):
                    _check(variant, choice, plan.config(variant, choice, seed))
            for seed in self._seeds(variant):
                self._inputs(plan.config(variant, variant.choices[0], seed))

    def outcome(self, variant: Variant) -> Outcome:
        """Search, if there is something to search, and run the best with all seeds."""
        found = self._outcome(variant, self.run)
        if found.choice is None:
            self.total -= self.todo[variant.name]
            self.todo[variant.name] = 0
        return found

    def finished(self, variant: Variant) -> Outcome | None:
        """Return what became of ``variant``; None if not all of its runs are done, or usable."""

        def kept(variant: Variant, choice: Settings, seed: int) -> Record:
            record = self._read(self._inputs(self.plan.config(variant, choice, seed)))
            if record is None:
                raise LookupError
            return record

        try:
            return self._outcome(variant, kept)
        except (LookupError, ConfigError, DataError, ModelError):
            return None

    def _outcome(
        self, variant: Variant, run: Callable[[Variant, Settings, int], Record]
    ) -> Outcome:
        choice, searched = variant.choices[0], []
        if _searches(variant):
            seed = self.plan.search_seed
            searched = [(tried, run(variant, tried, seed)) for tried in variant.choices]
            winner = best(searched)
            if winner is None:
                return Outcome(variant.name, searched, None, [])
            choice = winner
        runs = [run(variant, choice, seed) for seed in self.plan.seeds]
        return Outcome(variant.name, searched, choice, runs)

    def run(self, variant: Variant, choice: Settings, seed: int) -> Record:
        """Return a finished run, which may have been finished before."""
        config = self.plan.config(variant, choice, seed)
        inputs = self._inputs(config)
        path = self._path(inputs)
        number = self.total - sum(self.todo.values()) + 1
        chosen = "".join(f", {key} = {value}" for key, value in choice.items())
        print(f"[{number}/{self.total}] {variant.name}{chosen}, seed {seed}: ", end="", flush=True)
        record, earlier = self._read(inputs), True
        if record is None:
            earlier, code, began = False, code_hash(), time.perf_counter()
            work, log = path.with_suffix(".work"), path.with_suffix(".log")
            try:
                rows = self.start(config, self.plan.nodes, work, log)
            except RunError as error:
                record = {"seed": seed, "error": str(error)}
            else:
                record = inputs | {
                    "seed": seed,
                    "environment": environment(),
                    "hardware": hardware(),
                    "code": code,
                    "seconds": time.perf_counter() - began,
                    "rounds": rows,
                }
                write_atomic(path, (json.dumps(record, indent=1) + "\n").encode())
        if "seconds" in record:
            self.seconds[variant.name].append(record["seconds"] / config.num_server_rounds)
        self.todo[variant.name] -= 1
        print(self._line(record, earlier), flush=True)
        return record

    def warnings(self) -> list[str]:
        """Return what today's runs would not have in common with finished ones."""
        lines = []
        for what, today, advice in (
            ("code", code_hash(), "--fresh-code runs them again"),
            ("hardware", hardware(), "seconds and memory of the two do not compare"),
        ):
            others = [name for name, run in self._kept() if run.get(what) != today]
            if others:
                names = ", ".join(dict.fromkeys(others))
                lines.append(
                    f"warning: finished runs are of other {what} than today's ({len(others)}, of "
                    f"{names}); {advice}"
                )
        return lines

    def _kept(self) -> list[tuple[str, Record]]:
        """Return the finished runs that may be used, and their variants' names."""
        found = []
        for variant in self.variants:
            for choice, seed in itertools.product(variant.choices, self._seeds(variant)):
                record = self._read(self._inputs(self.plan.config(variant, choice, seed)))
                if record is not None:
                    found.append((variant.name, record))
        return found

    def _seeds(self, variant: Variant) -> list[int]:
        """Return the seeds that a run of ``variant`` may have."""
        return [*self.plan.seeds, *([self.plan.search_seed] if _searches(variant) else [])]

    def _path(self, inputs: Record) -> Path:
        return self.folder / "runs" / f"{_digest(inputs)}.json"

    def _read(self, inputs: Record) -> Record | None:
        """Return a finished run, unless a default that it had is another one today.

        One that has run out of memory says nothing of the method: it counts as not there.
        """
        try:
            record = json.loads(self._path(inputs).read_text())
        except FileNotFoundError:
            return None
        today = inputs["config"]
        same = all(today.get(key, value) == value for key, value in record["config"].items())
        stale = self.fresh_code and record.get("code") != code_hash()
        return record if same and not stale and not out_of_memory(record) else None

    def _inputs(self, config: Config) -> Record:
        """Return what a run's figures depend on, but the machine, its libraries, and the code."""
        return {
            "config": _own_settings(_resolved(config)),
            "nodes": self.plan.nodes,
            "data": data_hashes(config.dataset, config.seed),
            "base": base_fingerprint(config.model),
            "ferret-flwr": __version__,
        }

    def _line(self, record: Record, earlier: bool) -> str:
        parts = [trouble(record) or f"held-out loss {final_loss(record):.3f}"]
        if not trouble(record) and "eval/rougeL" in record["rounds"][-1]:
            parts.append(f"Rouge-L {record['rounds'][-1]['eval/rougeL']:.1f}")
        if "seconds" in record:
            parts.append(f"{record['seconds']:.0f} s" + (" (done before)" if earlier else ""))
        left = sum(self.todo.values())
        expected = self._expected_seconds()
        about = "" if expected is None or not left else f", about {_duration(expected)}"
        return ", ".join(parts) + f"; {left} left{about}"

    def _expected_seconds(self) -> float | None:
        """Return how long the runs left will take: as their variant's so far, or as any."""
        known = [s for seconds in self.seconds.values() for s in seconds]
        if not known:
            return None
        return sum(
            self._rounds_left(variant) * statistics.fmean(self.seconds[variant.name] or known)
            for variant in self.variants
        )

    def _rounds_left(self, variant: Variant) -> int:
        """Return the rounds of ``variant``'s runs left, of which a search's may have fewer."""
        reported = min(self.todo[variant.name], len(self.plan.seeds))
        searches = self.todo[variant.name] - reported
        return sum(
            count * self.plan.config(variant, variant.choices[0], seed).num_server_rounds
            for count, seed in ((reported, self.plan.seeds[0]), (searches, self.plan.search_seed))
        )


def _searches(variant: Variant) -> int:
    """Return the number of runs that choose ``variant``'s settings: none if there is no choice."""
    return len(variant.choices) if len(variant.choices) > 1 else 0


def _resolved(config: Config) -> Config:
    """Return ``config`` with what its method decides, which is what a run has in the end."""
    return METHODS[config.method].configured(config) if config.method in METHODS else config


def _check(variant: Variant, choice: Settings, config: Config) -> None:
    """Refuse an optimizer that does not exist, and a search that the method would not obey.

    Raises
    ------
    ConfigError
        Naming the key.
    """
    resolved = _resolved(config)
    check_optimizer(resolved.train)
    for key in choice:
        asked, taken = flatten(config)[key], flatten(resolved)[key]
        if asked != taken:
            raise ConfigError(
                f"variant '{variant.name}': its 'search' asks for '{key}' = {asked}, where the "
                f"method '{config.method}' would take {taken}; try another value"
            )


def _own_settings(config: Config) -> Settings:
    """Return ``config`` as flat keys, without those of other methods."""
    kinds = METHODS.values()
    groups = {kind.group for kind in kinds} | {"ferret"}
    own = METHODS[config.method].group if config.method in METHODS else "ferret"
    return {
        key: value
        for key, value in flatten(config).items()
        if key.split(".")[0] not in groups - {own}
    }


def _digest(inputs: Record) -> str:
    """Return a name that stays when a version of the app adds a key: defaults are left out."""
    default = defaults()
    changed = {key: value for key, value in inputs["config"].items() if value != default[key]}
    text = json.dumps(inputs | {"config": changed}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _duration(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 60 else f"{seconds:.0f} s"


def compare(
    plan: Plan,
    folder: Path,
    start: Start = simulate,
    fresh_code: bool = False,
    names: Collection[str] | None = None,
) -> list[Outcome]:
    """Run what is not there yet; write tables after each variant, and draw in the end.

    They are of all of the plan's variants that are finished, whenever that was.

    Parameters
    ----------
    plan, folder, start, fresh_code, names
        As of a `Comparison`.

    Returns
    -------
    list of Outcome
        Of the variants called ``names``.

    Raises
    ------
    DataError, ModelError, ConfigError
        Before any run, naming what is wrong.
    """
    comparison = Comparison(plan, folder, start, fresh_code, names)
    for line in comparison.warnings():
        print(line, flush=True)
    done: dict[str, Outcome] = {}
    everything: list[Outcome] = []
    for variant in comparison.variants:
        done[variant.name] = comparison.outcome(variant)
        all_of_them = [done.get(v.name) or comparison.finished(v) for v in plan.variants]
        everything = [outcome for outcome in all_of_them if outcome is not None]
        write(plan, everything, folder)
    draw(plan, everything, folder)
    return list(done.values())
