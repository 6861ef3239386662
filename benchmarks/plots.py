"""The pictures of a comparison: readable with ten variants, in the plan's order."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.summary import Record, curve, over_seeds
from ferret_flwr.files import atomic_file
from ferret_flwr.report import nbytes_text

Runs = Mapping[str, Sequence[Record]]  # by variant
MARKERS = "osD^vP*X<>"
LINES = ("-", "--", ":")  # from the eleventh variant on
NOTE_WIDTH = 200  # characters
MEASURES = (("eval/loss", "held-out loss"), ("eval/rougeL", "Rouge-L"))
AGAINST = (
    ("round", "round"),
    ("bytes", "sent and received by all nodes"),
    ("seconds", "seconds, without evaluation"),
)
HEADROOM = 0.25  # above the loss at the start, of what the best gained


def _style(number: int) -> dict[str, Any]:
    return {
        "color": f"C{number % 10}",
        "marker": MARKERS[number % len(MARKERS)],
        "linestyle": LINES[number // 10 % len(LINES)],
    }


def curves(runs: Runs, path: Path, note: str) -> None:
    """Draw loss and Rouge-L against rounds, bytes and seconds.

    Lines are means over seeds, bands the standard deviation of the change since round 0.

    Parameters
    ----------
    runs
        Those that went well, by variant.
    path
        A PNG or SVG file.
    note
        Stands below: what the figures depend on.
    """
    plt = pyplot()
    measures = [
        (key, text) for key, text in MEASURES if any(curve(r, key, "round") for r in runs.values())
    ]
    figure, axes = plt.subplots(
        len(measures),
        len(AGAINST),
        figsize=(15, 4 * len(measures) + 1.2),
        sharey="row",
        squeeze=False,
    )
    for line, (key, label) in zip(axes, measures, strict=True):
        for axis, (x, x_label) in zip(line, AGAINST, strict=True):
            for number, (name, own) in enumerate(runs.items()):
                points = [p for p in curve(own, key, x) if p[0] > 0 or x != "bytes"]
                if points:
                    _band(axis, points, name, _style(number))
            axis.set(xlabel=x_label, xscale="log" if x == "bytes" else "linear")
            if x == "bytes":
                _decades(axis)
            elif x == "round":
                axis.xaxis.get_major_locator().set_params(integer=True)
            axis.grid(alpha=0.3)
        line[0].set_ylabel(label)
    if measures[0][0] == "eval/loss":
        _cut_explosions(axes[0][0], runs)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper left", bbox_to_anchor=(0.875, 0.97), frameon=False)
    bands = "bands: standard deviation, over seeds, of the change since round 0"
    finish(figure, path, f"{bands}; {note}", right=0.87)


def _band(
    axis: Any, points: Sequence[tuple[float, float, float]], name: str, style: dict[str, Any]
) -> None:
    x, mean, std = zip(*points, strict=True)
    axis.plot(x, mean, label=name, markersize=4.5, linewidth=1.4, **style)
    if not any(map(math.isnan, std)):
        low, high = ([m + sign * s for m, s in zip(mean, std, strict=True)] for sign in (-1, 1))
        axis.fill_between(x, low, high, color=style["color"], alpha=0.12, linewidth=0)


def _cut_explosions(axis: Any, runs: Runs) -> None:
    """Leave out of the picture what is much worse than the start."""
    points = [p[1] for own in runs.values() for p in curve(own, "eval/loss", "round")]
    first = max(curve(own, "eval/loss", "round")[0][1] for own in runs.values())
    top = first + HEADROOM * (first - min(points))
    if max(points) > top > min(points):
        axis.set_ylim(top=top)


def costs(runs: Runs, path: Path, note: str) -> None:
    """Draw the bytes and the memory of each variant as bars, with their values.

    Parameters
    ----------
    runs, path, note
        As in `curves`.
    """
    plt = pyplot()
    numbers = [over_seeds(own) for own in runs.values()]
    figure, (traffic, memory) = plt.subplots(
        1, 2, figsize=(13, 1.8 + 0.62 * len(runs)), sharey=True
    )
    _bars(traffic, numbers, (("up", "a node sends"), ("down", "a node receives")))
    traffic.set(xlabel="of a round", xscale="log")
    _decades(traffic)
    _bars(memory, numbers, (("node_bytes", "node"), ("server_bytes", "server")))
    memory.set(xlabel="peak memory of the process")
    memory.xaxis.set_major_formatter(_nbytes)
    traffic.set_yticks(range(len(runs)), list(runs))
    traffic.invert_yaxis()
    finish(figure, path, note)


def _bars(
    axis: Any, numbers: Sequence[Mapping[str, tuple[float, float]]], keys: Sequence[tuple[str, str]]
) -> None:
    for place, (key, label) in enumerate(keys):
        found = [(y, own[key][0]) for y, own in enumerate(numbers) if key in own]
        if not found:
            continue
        at, values = zip(*found, strict=True)
        drawn = axis.barh([y + 0.4 * (place - 0.5) for y in at], values, 0.38, label=label)
        axis.bar_label(drawn, [nbytes_text(v) for v in values], padding=3, fontsize=8)
    axis.margins(x=0.18)
    axis.grid(axis="x", alpha=0.3)
    axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False)


def _decades(axis: Any) -> None:
    """Let an axis of bytes show whole powers of ten, of which there are at least two."""
    low, high = (math.log10(limit) for limit in axis.get_xlim())
    first, last = math.floor(low), math.ceil(high)
    axis.set_xlim(10**first, 10 ** max(last, first + 1))
    axis.xaxis.set_major_formatter(_nbytes)
    axis.minorticks_off()


def _nbytes(value: float, _: int) -> str:
    return nbytes_text(value)


def pyplot() -> Any:
    """Return matplotlib's pyplot, drawing to files."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot

    return matplotlib.pyplot


def finish(figure: Any, path: Path, note: str, right: float = 1.0) -> None:
    """Put the note below, and write the file."""
    text = textwrap.fill(note, NOTE_WIDTH)
    height = 0.14 * (text.count("\n") + 2) / figure.get_figheight()
    figure.text(0.01, 0.02 / figure.get_figheight(), text, fontsize=7, color="0.35", va="bottom")
    figure.tight_layout(rect=(0, height, right, 1))
    save(figure, path)


def save(figure: Any, path: Path) -> None:
    """Write a figure, its legend beside it, whole or not at all, and forget it."""
    with atomic_file(path) as file:
        figure.savefig(file, dpi=110, format=path.suffix[1:], bbox_inches="tight")
    pyplot().close(figure)
