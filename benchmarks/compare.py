"""Compare methods over seeds on one recipe: loss, Rouge-L, bytes, seconds, memory.

``python -m benchmarks.compare benchmarks/plans/builtin.toml --output results/builtin``

runs a plan (see `benchmarks.plan` for its keys). Without a plan,

``python -m benchmarks.compare --recipe examples/gsm8k-smollm2.toml --methods ferret fedavg
--seeds 1 2 --search train.learning-rate 0.003 0.01 --output results/gsm8k``

does the same from the command line. Each run is the real app in a process of its own. Finished runs
are kept in the output folder: the same command goes on where it was stopped, and does again what
has run out of memory. They outlive changes of the code, which the table then tells;
``--fresh-code`` runs again what other code has run.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.plan import Plan, chosen, pairs, read_toml, toml_value, typed
from benchmarks.runner import compare
from ferret_flwr.config import ConfigError
from ferret_flwr.training.errors import DataError, ModelError


def raw_plan(options: argparse.Namespace) -> dict[str, Any]:
    """Return what a plan file would say, from a plan file and the options that change it.

    Raises
    ------
    ConfigError
        If an option is not usable.
    """
    if (options.plan is None) == (options.methods is None):
        raise ConfigError("give a plan file, or --methods; see --help")
    raw: dict[str, Any] = {}
    if options.plan is not None:
        raw = read_toml(options.plan)
    else:
        raw = {"title": ", ".join(options.methods), "variants": {m: {} for m in options.methods}}
    names = list(raw["variants"]) if options.variants is None else chosen(raw, options.variants)
    for key in ("recipe", "seeds", "search-seed", "nodes"):
        value = getattr(options, key.replace("-", "_"))
        if value is not None:
            raw[key] = value
    if options.set:
        raw["settings"] = {**typed(raw, "settings", dict, {}), **pairs(options.set)}
    if options.search_set:
        given = typed(raw, "search-settings", dict, {})
        raw["search-settings"] = {**given, **pairs(options.search_set, "--search-set")}
    Plan.of(raw)  # what follows relies on it
    everyone = [[name, *search] for search in options.search for name in names]
    for name, *search in everyone + options.search_for:
        if len(search) < 2:
            raise ConfigError(f"a search for '{name}' needs a key and values, got {search!r}")
        key, *values = search
        (name,) = chosen(raw, [name])
        table = raw["variants"][name]
        together = {**table.get("search", {}), key: [toml_value(v) for v in values]}
        raw["variants"] = {**raw["variants"], name: {**table, "search": together}}
    return raw


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("plan", type=Path, nargs="?", help="a TOML file, see benchmarks/plans")
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--recipe", help="a run-config file, such as those in examples")
    parser.add_argument("--methods", nargs="+", metavar="NAME", help="instead of a plan")
    parser.add_argument("--variants", nargs="+", metavar="NAME", help="to run; default: all")
    parser.add_argument("--seeds", type=int, nargs="+", metavar="N")
    parser.add_argument("--search-seed", type=int, metavar="N", help="none of --seeds")
    parser.add_argument("--nodes", type=int, metavar="N")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE")
    parser.add_argument(
        "--search",
        nargs="+",
        action="append",
        default=[],
        metavar=("KEY", "VALUE"),
        help="try these with the search seed, for every variant",
    )
    parser.add_argument(
        "--search-for",
        nargs="+",
        action="append",
        default=[],
        metavar=("VARIANT", "KEY"),
        help="VARIANT KEY VALUE ...: the same for one variant",
    )
    parser.add_argument(
        "--search-set",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="for the search's runs, such as fewer rounds",
    )
    parser.add_argument(
        "--fresh-code",
        action="store_true",
        help="run again what was run by other code than today's",
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line; return 0 if every variant has a result."""
    options = _parser().parse_args(arguments)
    try:
        raw = raw_plan(options)
        names = options.variants and chosen(raw, options.variants)
        outcomes = compare(Plan.of(raw), options.output, fresh_code=options.fresh_code, names=names)
    except (ConfigError, DataError, ModelError, OSError) as error:
        print(f"benchmarks.compare: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from here", file=sys.stderr)
        return 130
    print((options.output / "table.md").read_text())
    return 0 if all(outcome.good for outcome in outcomes) else 1


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # leave no run behind either
    sys.exit(main())
