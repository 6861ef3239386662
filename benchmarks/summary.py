"""From the rows of runs to the numbers of a table: one number a run, mean and spread over seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ferret_flwr.config import Scalar

Row = Mapping[str, Any]
Record = dict[str, Any]  # a finished run, or one with nothing but an "error"
Figures = dict[str, float]
LONGEST = 200  # characters of a reason
NO_MEMORY = ("MemoryError", "can't allocate memory")  # of Python, numpy, Ray and torch


@dataclass(frozen=True)
class Outcome:
    """What became of one variant.

    Attributes
    ----------
    name
        The variant's.
    searched
        What was tried with the search seed: settings, and the run that they gave.
    choice
        The settings that the runs have; None if none was any good.
    runs
        One a seed that is reported.
    """

    name: str
    searched: list[tuple[dict[str, Scalar], Record]]
    choice: dict[str, Scalar] | None
    runs: list[Record]

    @property
    def good(self) -> list[Record]:
        """Return the runs that went well."""
        return [run for run in self.runs if not trouble(run)]

    @property
    def finished(self) -> list[Record]:
        """Return all runs that left rows, those of the search among them."""
        return [r for r in [*self.runs, *(run for _, run in self.searched)] if "rounds" in r]

    @property
    def label(self) -> str:
        """Return the name, and how many of the seeds its figures are over unless they all are."""
        count = len(self.good)
        partial = 0 < count < len(self.runs)
        return f"{self.name} ({count} of {len(self.runs)} seeds)" if partial else self.name

    @property
    def at_edge(self) -> list[str]:
        """Return the keys of the choice whose value is the least or the largest that was tried.

        Beyond it may lie something better. Neither what is no number has an edge, nor one value.
        """
        keys = []
        for key, value in (self.choice or {}).items():
            tried = {settings[key] for settings, _ in self.searched}
            numbers = all(type(v) in (int, float) for v in tried)
            if numbers and len(tried) > 1 and value in (min(tried), max(tried)):
                keys.append(key)
        return keys


def trouble(run: Record) -> str:
    """Return why a run counts as failed, "" if it does not.

    In a simulation nobody goes away: a node without a usable reply has a model that diverged, or an
    error, and the rounds after it say nothing of the method.
    """
    if "error" in run:
        return f"failed: {_short(run['error'])}"
    for row in run["rounds"]:
        if row.get("failures"):
            return f"round {row['round']}: {_short(row['failures'][0])}"
        if "eval/loss" in row and not _finite(row["eval/loss"]):
            return f"round {row['round']}: the held-out loss is not finite"
    return ""


def out_of_memory(run: Record) -> bool:
    """Return whether a node of a finished run said that it had no memory left."""
    reasons = [str(reason) for row in run["rounds"] for reason in row.get("failures", ())]
    return any(sign in reason for sign in NO_MEMORY for reason in reasons)


def final_loss(run: Record) -> float:
    """Return the held-out loss after the last round; a failed run's is infinite."""
    return math.inf if trouble(run) else float(run["rounds"][-1]["eval/loss"])


def best(searched: Sequence[tuple[dict[str, Scalar], Record]]) -> dict[str, Scalar] | None:
    """Return the settings with the lowest final loss, the first of equals; None if all failed."""
    choice, run = min(searched, key=lambda pair: final_loss(pair[1]))
    return choice if math.isfinite(final_loss(run)) else None


def figures(run: Record) -> Figures:
    """Return the numbers of one run; what was not measured is missing.

    Returns
    -------
    dict
        ``loss`` and ``rougeL`` after the last round; ``up`` and ``down``, bytes of a node and round
        on average, and ``bytes``, all in all; ``local_s``, ``reach_s``, ``project_s``,
        ``aggregate_s``, ``replica_s`` and ``round_s`` (without the evaluation), each of the
        median round; ``node_bytes`` and ``server_bytes`` of memory (and ``gpu_bytes``), the most
        of all rounds.
    """
    last, rounds = run["rounds"][-1], [row for row in run["rounds"] if row.get("nodes")]
    trained = sum(row["nodes"] for row in rounds)
    up, down = (sum(r[f"comm/{way}_bytes"] for r in rounds) for way in ("uplink", "downlink"))
    found: dict[str, float | None] = {
        "loss": last["eval/loss"],
        "rougeL": last.get("eval/rougeL"),
        "up": up / trained,
        "down": down / trained,
        "bytes": up + down,
        "local_s": _over(rounds, statistics.median, "time/local_s"),
        "reach_s": _over(rounds, statistics.median, "time/reconstruct_s"),
        "project_s": _over(rounds, statistics.median, "time/project_s"),
        "aggregate_s": _over(rounds, statistics.median, "time/aggregate_s"),
        "replica_s": _over(rounds, statistics.median, "time/replica_s"),
        "round_s": statistics.median(map(round_seconds, rounds)),
        "node_bytes": _over(rounds, max, "memory/node_peak_bytes"),
        "gpu_bytes": _over(rounds, max, "memory/node_gpu_peak_bytes"),
        "server_bytes": _over(rounds, max, "memory/server_peak_bytes"),
    }
    return {key: float(value) for key, value in found.items() if value is not None}


def round_seconds(row: Row) -> float:
    """Return what a round took, without the server's evaluation."""
    return row["time/round_s"] - row.get("time/evaluate_s", 0.0)


def over_seeds(runs: Sequence[Record]) -> dict[str, tuple[float, float]]:
    """Return mean and sample standard deviation of each figure; NaN for that of one run.

    Those of ``loss`` and ``rougeL`` are `curve`'s.
    """
    each = [figures(run) for run in runs]
    found = {
        key: mean_std([numbers[key] for numbers in each])
        for key in (each[0] if each else ())
        if all(key in numbers for numbers in each)
    }
    for key in ("loss", "rougeL"):
        if key in found:
            found[key] = curve(runs, f"eval/{key}", "round")[-1][1:]
    return found


def mean_std(values: Sequence[float]) -> tuple[float, float]:
    """Return mean and sample standard deviation, NaN for one value."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else math.nan


def curve(runs: Sequence[Record], key: str, x: str) -> list[tuple[float, float, float]]:
    """Return the mean of ``key`` over runs, round by round.

    Parameters
    ----------
    runs
        Of one variant.
    key
        Of a row, such as ``eval/loss``.
    x
        What it is drawn against, each summed up to the round: ``round``, ``bytes`` of all nodes,
        or ``seconds`` without evaluation.

    Returns
    -------
    list of tuple
        x (the mean), mean, and standard deviation, for each round that all runs measured. The
        deviation is that of the change since a run's first value: seeds hold other examples out,
        and so begin at other losses, which says nothing of a method.
    """
    points: dict[int, list[tuple[float, float, float]]] = {}
    for run in runs:
        spent, first = 0.0, None
        for row in run["rounds"]:
            if x == "bytes":
                spent += row.get("comm/uplink_bytes", 0) + row.get("comm/downlink_bytes", 0)
            elif "time/round_s" in row:
                spent += round_seconds(row)
            if _finite(row.get(key)):
                at = row["round"] if x == "round" else spent
                first = row[key] if first is None else first
                points.setdefault(row["round"], []).append((at, row[key], row[key] - first))
    return [
        (statistics.fmean(at), statistics.fmean(values), mean_std(changes)[1])
        for at, values, changes in (zip(*points[r], strict=True) for r in sorted(points))
        if len(values) == len(runs)
    ]


def _over(rounds: Sequence[Row], take: Callable[[list[float]], float], key: str) -> float | None:
    values = [row[key] for row in rounds if key in row]
    return take(values) if values else None


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _short(text: str) -> str:
    """Return the gist of an error, which Flower puts at the end of Ray's traceback."""
    line = " ".join(text.rpartition("occurred. Message: ")[2].split("'>")[0].split())
    return line if len(line) <= LONGEST else line[: LONGEST - 1] + "…"
