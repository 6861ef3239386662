"""What a comparison leaves behind: ``table.md``, ``results.json``, and the plots."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import plots
from benchmarks.header import counted
from benchmarks.plan import DECIDED, Plan
from benchmarks.summary import Outcome, Record, curve, final_loss, over_seeds, trouble
from ferret_flwr.config import defaults
from ferret_flwr.files import write_atomic
from ferret_flwr.report import nbytes_text

Format = Callable[[float], str]
MOST_ROUNDS = 11  # columns of the table by round


def seconds_text(seconds: float) -> str:
    """Return seconds with three digits, or all of them."""
    return f"{seconds:.0f}" if seconds >= 99.95 else f"{seconds:.3g}"


def _digits(count: int) -> Format:
    return lambda value: f"{value:.{count}f}"


COLUMNS: tuple[tuple[str, str, Format], ...] = (
    ("held-out loss", "loss", _digits(3)),
    ("Rouge-L", "rougeL", _digits(1)),
    ("a node sends", "up", nbytes_text),
    ("receives", "down", nbytes_text),
    ("all traffic", "bytes", nbytes_text),
    ("local, s", "local_s", seconds_text),
    ("reach the model, s", "reach_s", seconds_text),
    ("projection, s", "project_s", seconds_text),
    ("aggregation, s", "aggregate_s", seconds_text),
    ("server's model, s", "replica_s", seconds_text),
    ("round, s", "round_s", seconds_text),
    ("node memory", "node_bytes", nbytes_text),
    ("node GPU memory", "gpu_bytes", nbytes_text),
    ("server memory", "server_bytes", nbytes_text),
)
LEGEND = (
    "Mean ± standard deviation over {seeds}, or as many as a name says. Loss and Rouge-L are those "
    "after the last round; their deviation is that of the change since round 0, as seeds hold out "
    "other examples. What a node sends and receives is per round, all traffic is that of all nodes "
    "and rounds, both as measured on the wire. Seconds are those of the median round: *local* is a "
    "node's training alone; *reach the model* is what a node takes from what it received to the "
    "global model, the most of all nodes, since these share one process, which does it once; "
    "*projection* is that of a node's update; *aggregation* is without the server's own copy of the"
    " model, which is *server's model*; *round* is without the server's evaluation, with all nodes "
    "taking turns. Memory is the most that a process held during a round, its libraries among it: a"
    " figure of this implementation, where a method may need less."
)
EXACT = (
    "a node holds float32 copies of the parameters, so that every step back, and the model that "
    "all nodes reach, is exact to the bit; the method itself does not need them."
)
NOTES = {  # by method; {k} is `sketch.top-k`, {increment} what so many entries weigh
    "fedzo": EXACT,
    "fedkseed": EXACT,
    "fedkseed-pro": EXACT,
    "fetchsgd": (
        "what a node receives is for nodes that keep nothing, 8 bytes for each entry of the model "
        "that any round has changed; nodes that are there in every round would do with the paper's "
        "8k bytes a round, {increment} with k = {k}."
    ),
}


def write(plan: Plan, outcomes: Sequence[Outcome], folder: Path) -> None:
    """Write the tables of everything there is so far."""
    write_atomic(folder / "table.md", markdown(plan, outcomes).encode())
    write_atomic(folder / "results.json", _results(plan, outcomes))


def draw(plan: Plan, outcomes: Sequence[Outcome], folder: Path) -> None:
    """Draw what went well."""
    good = {outcome.label: outcome.good for outcome in outcomes if outcome.good}
    if good:
        note = "; ".join(f"{name}: {text}" for name, text in _provenance(plan, outcomes))
        plots.curves(good, folder / "curves.png", note)
        plots.costs(good, folder / "costs.png", note)


def markdown(plan: Plan, outcomes: Sequence[Outcome]) -> str:
    """Return all tables as one Markdown page."""
    parts = [f"# {plan.title}", _main_table(outcomes)]
    parts.append(LEGEND.format(seeds=counted(len(plan.seeds), "seed")))
    parts += _notes(plan, outcomes) + _mixtures(outcomes) + _troubles(outcomes)
    for key, title, digits in (("eval/loss", "Held-out loss", 3), ("eval/rougeL", "Rouge-L", 1)):
        table = _by_round(outcomes, key, _digits(digits))
        parts += [f"## {title} by round", table] if table else []
    searched = [outcome for outcome in outcomes if len(outcome.searched) > 1]
    if searched:
        text = (
            f"The final held-out loss with seed {plan.search_seed} decides, which is in no figure "
            "above; bold is what was taken."
        )
        if plan.search_settings:
            text += f" Its runs have {_settings_text(plan.search_settings.items())}."
        parts += ["## Search", text, _search_table(searched)]
    parts += ["## Configuration", _configuration(plan, outcomes)]
    return "\n\n".join(parts) + "\n"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _main_table(outcomes: Sequence[Outcome]) -> str:
    numbers = {outcome.name: over_seeds(outcome.good) for outcome in outcomes}
    columns = [c for c in COLUMNS if any(c[1] in found for found in numbers.values())]
    rows = []
    for outcome in outcomes:
        found = numbers[outcome.name]
        cells = [spread(*found[key], text) if key in found else "" for _, key, text in columns]
        if not found:
            cells = ["failed", *cells[1:]]
        rows.append([outcome.label, *cells])
    return table(["", *(title for title, _, _ in columns)], rows)


def spread(mean: float, std: float, text: Format) -> str:
    """Return mean ± standard deviation, without what would be shown as no spread at all."""
    if not std or math.isnan(std) or text(mean + std) == text(mean - std):
        return text(mean)
    return f"{text(mean)} ± {text(std)}"


def _notes(plan: Plan, outcomes: Sequence[Outcome]) -> list[str]:
    """Return what the legend has to add about single methods, one line for equal texts."""
    texts: dict[str, list[str]] = {}
    for outcome in outcomes:
        settings = defaults() | _settings_of(plan, outcome)
        note, k = NOTES.get(settings["method"]), settings["sketch.top-k"]
        if note:
            text = note.format(k=k, increment=nbytes_text(8 * k))
            texts.setdefault(text, []).append(outcome.name)
    lines = [f"- {', '.join(names)}: {text}" for text, names in texts.items()]
    return ["\n".join(lines)] if lines else []


def _mixtures(outcomes: Sequence[Outcome]) -> list[str]:
    """Return in what the runs of one table differ that should be the same."""
    lines = []
    for what in ("code", "hardware"):
        kinds: dict[str, list[str]] = {}
        for outcome in outcomes:
            for run in outcome.finished:
                kinds.setdefault(_kind(run, what), []).append(outcome.name)
        if len(kinds) > 1:
            each = [f"{kind} ({', '.join(dict.fromkeys(v))})" for kind, v in kinds.items()]
            lines.append(f"- **{len(kinds)} kinds of {what}**: {'; '.join(each)}")
    return ["These runs, the search's among them, mix:\n\n" + "\n".join(lines)] if lines else []


def _kind(run: Record, what: str) -> str:
    """Return a run's code or hardware for people."""
    return run.get(what, "unknown")[: 16 if what == "code" else None]


def _troubles(outcomes: Sequence[Outcome]) -> list[str]:
    """Return a list of the runs that are in no figure."""
    lines = []
    for outcome in outcomes:
        runs = outcome.runs if outcome.choice is not None else [r for _, r in outcome.searched]
        for run in filter(trouble, runs):
            lines.append(f"- {outcome.name}, seed {run['seed']}: {trouble(run)}")
    return ["Not in these figures:\n\n" + "\n".join(lines)] if lines else []


def _by_round(outcomes: Sequence[Outcome], key: str, text: Format) -> str:
    curves = {o.label: {int(p[0]): p[1:] for p in curve(o.good, key, "round")} for o in outcomes}
    measured = sorted({r for points in curves.values() for r in points})
    if not measured:
        return ""
    last = len(measured) - 1
    steps = min(last, MOST_ROUNDS - 1)
    shown = [measured[i * last // steps if steps else 0] for i in range(steps + 1)]
    rows = [
        [name, *(spread(*points[r], text) if r in points else "" for r in shown)]
        for name, points in curves.items()
    ]
    return table(["round", *map(str, shown)], rows)


def _search_table(outcomes: Sequence[Outcome]) -> str:
    rows = []
    for outcome in outcomes:
        for choice, run in outcome.searched:
            bold = "**" if choice == outcome.choice else ""
            loss = trouble(run) or f"{bold}{final_loss(run):.3f}{bold}"
            if bold and outcome.at_edge:
                keys = ", ".join(f"`{key}`" for key in outcome.at_edge)
                loss += f", at the edge of the search ({keys})"
            rows.append([outcome.name, f"{bold}{_settings_text(choice.items())}{bold}", loss])
    return table(["", "tried", "held-out loss"], rows)


def _settings_text(settings: Iterable[tuple[str, Any]]) -> str:
    return ", ".join(f"`{key} = {json.dumps(value)}`" for key, value in settings)


def _configuration(plan: Plan, outcomes: Sequence[Outcome]) -> str:
    lines = [f"- {name}: {text}" for name, text in _provenance(plan, outcomes)]
    known = defaults()
    resolved = {o.name: {**known, **_settings_of(plan, o)} for o in outcomes}
    keys = [key for key in known if key not in DECIDED]
    same = {key for key in keys if len({str(s[key]) for s in resolved.values()}) == 1}
    common = next(iter(resolved.values()))
    changed = [(k, common[k]) for k in keys if k in same and common[k] != known[k]]
    lines.append(f"- all: {_settings_text(changed) or 'the defaults'}")
    if len(same) < len(keys):
        for name, settings in resolved.items():
            own = _settings_text((key, settings[key]) for key in keys if key not in same)
            lines.append(f"- {name}: {own}")
    return "\n".join(lines)


def _settings_of(plan: Plan, outcome: Outcome) -> dict[str, Any]:
    """Return the configuration of a variant's runs, or what it would have been."""
    for run in outcome.runs:
        if "config" in run:
            return run["config"]
    settings = next(v.settings for v in plan.variants if v.name == outcome.name)
    return settings | (outcome.choice or {})


def _provenance(plan: Plan, outcomes: Sequence[Outcome]) -> list[tuple[str, str]]:
    """Return what figures need beside them, each different value once."""
    runs = [run for outcome in outcomes for run in outcome.finished]
    versions = {", ".join(f"{k} {v}" for k, v in run["environment"].items()) for run in runs}
    data = {f"{name} {digest[:16]}" for run in runs for name, digest in run["data"].items()}
    bases = {f"{run['config']['model.name']} {run['base']}" for run in runs}
    return [
        ("seeds", f"{', '.join(map(str, plan.seeds))}; {counted(plan.nodes, 'node')}"),
        ("model (fingerprint)", " or ".join(sorted(bases))),
        ("data (SHA-256)", ", ".join(sorted(data))),
        ("code (SHA-256)", " or ".join(sorted({_kind(run, "code") for run in runs}))),
        ("hardware", " or ".join(sorted({_kind(run, "hardware") for run in runs}))),
        ("versions", " or ".join(sorted(versions))),
    ]


def _results(plan: Plan, outcomes: Sequence[Outcome]) -> bytes:
    """Return ``results.json``: every run with all that belongs to it, and the table's numbers."""

    def searched(choice: dict[str, Any], run: Record) -> dict[str, Any]:
        loss = _json(final_loss(run))
        return {"settings": choice, "loss": loss, "trouble": trouble(run), "run": run}

    content = {
        "title": plan.title,
        "seeds": plan.seeds,
        "search-seed": plan.search_seed,
        "nodes": plan.nodes,
        "variants": [
            {
                "name": outcome.name,
                "searched": [searched(*pair) for pair in outcome.searched],
                "choice": outcome.choice,
                "figures": {
                    key: {"mean": mean, "std": _json(std)}
                    for key, (mean, std) in over_seeds(outcome.good).items()
                },
                "runs": outcome.runs,
            }
            for outcome in outcomes
        ],
    }
    return (json.dumps(content, indent=1) + "\n").encode()


def _json(value: float) -> float | None:
    return value if math.isfinite(value) else None
