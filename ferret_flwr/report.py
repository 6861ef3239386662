"""What a run leaves behind: one line a round, ``results.json``, a plot."""

from __future__ import annotations

import importlib.metadata
import json
import logging
import math
import platform
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ferret_flwr import __version__
from ferret_flwr.config import Config, Scalar, flatten
from ferret_flwr.files import write_atomic

Row = Mapping[str, Any]
PACKAGES = ("flwr", "torch", "transformers", "datasets", "numba", "numpy", "ray")


def show_progress() -> None:
    """Print this package's log as plain lines."""
    log = logging.getLogger("ferret_flwr")
    if not log.handlers:
        handler = logging.StreamHandler(sys.stdout)
        handler.setFormatter(logging.Formatter("%(message)s"))
        log.addHandler(handler)
        log.setLevel(logging.INFO)
        log.propagate = False


def environment() -> dict[str, str]:
    """Return the versions that a result depends on."""
    found = {"ferret-flwr": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found | {"machine": platform.machine(), "system": platform.system()}


def nbytes_text(nbytes: float) -> str:
    """Return a number of bytes for people, in powers of 1000."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if nbytes < 999.5 or unit == "TB":
            break
        nbytes /= 1000
    return f"{nbytes:.0f} B" if unit == "B" else f"{nbytes:.3g} {unit}"


def weights_nbytes(size: int, dtype: str) -> int:
    """Return what the weights of a model of ``size`` parameters weigh in its own ``dtype``."""
    return size * (2 if dtype in ("bfloat16", "float16") else 4)


def line(row: Row, fedavg_nbytes: int) -> str:
    """Return one round as one line.

    Parameters
    ----------
    row
        As `Recorded` builds it; what is missing is left out.
    fedavg_nbytes
        What full weights weigh, one way for one node.
    """
    parts = [f"round {row['round']:>3}"]
    for key, text in (("train/loss", "train loss"), ("eval/loss", "held-out loss")):
        if key in row:
            parts.append(f"{text} {row[key]:.3f}")
    if "eval/rougeL" in row:
        parts.append(f"Rouge-L {row['eval/rougeL']:.1f}")
    if "comm/uplink_bytes_per_node" in row:
        up, down = row["comm/uplink_bytes_per_node"], row["comm/downlink_bytes_per_node"]
        beside = f" (FedAvg {nbytes_text(fedavg_nbytes)} each)" if up < fedavg_nbytes else ""
        parts.append(f"a node sent {nbytes_text(up)}, received {nbytes_text(down)}{beside}")
    for key, text in (
        ("time/local_s", "train"),
        ("time/project_s", "project"),
        ("time/reconstruct_s", "reconstruct"),
    ):
        if key in row:
            parts.append(f"{text} {row[key]:.2f} s")
    if "ferret/fidelity" in row:
        parts.append(f"cos {row['ferret/fidelity']:.3f}")
    if "privacy/epsilon" in row:
        parts.append(f"ε {row['privacy/epsilon']:.3g} at δ {row['privacy/delta']:g}")
    if row.get("failures"):
        parts.append(f"{len(row['failures'])} nodes left out")
    return " | ".join(parts)


def write_config(folder: Path, config: Config) -> None:
    """Write the resolved configuration as ``config.toml``, usable as a run-config file."""
    lines = [f"{key} = {_toml(value)}" for key, value in flatten(config).items()]
    write_atomic(folder / "config.toml", ("\n".join(lines) + "\n").encode())


def _toml(value: Scalar) -> str:
    return json.dumps(value, ensure_ascii=False)  # TOML knows no escaped surrogate pairs


def _json(value: Any) -> Any:
    """Return what strict JSON can say of ``value``: a diverged loss is null."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_results(folder: Path, config: Config, rows: Sequence[Row], fedavg_nbytes: int) -> None:
    """Write ``results.json``: configuration, versions, and one object a round."""
    content = {
        "config": flatten(config),
        "environment": environment(),
        "fedavg_bytes": fedavg_nbytes,
        "rounds": [{key: _json(value) for key, value in row.items()} for row in rows],
    }
    write_atomic(folder / "results.json", (json.dumps(content, indent=2) + "\n").encode())


def read_rows(folder: Path, rounds: int) -> list[dict[str, Any]]:
    """Return the rows up to round ``rounds`` that a run left in ``folder``, if it left any."""
    try:
        rows = json.loads((folder / "results.json").read_text())["rounds"]
        return [row for row in rows if row["round"] <= rounds]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def plot_runs(runs: Mapping[str, Sequence[Row]], path: Path) -> None:
    """Draw the loss against rounds and against the bytes of all nodes, one colour a run.

    Parameters
    ----------
    runs
        Rows of each run by its name.
    path
        A PNG or SVG file.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    labels = {"eval/loss": "held-out loss", "train/loss": "training loss"}
    drawn = set()
    figure, (by_round, by_bytes) = pyplot.subplots(1, 2, figsize=(10, 4), sharey=True)
    for name, rows in runs.items():
        measured = [row for row in rows if "eval/loss" in row]
        key, shown = ("eval/loss", measured) if measured else ("train/loss", rows)
        shown = [row for row in shown if key in row]
        drawn.add(labels[key])
        rounds = [row["round"] for row in shown]
        losses = [row[key] for row in shown]
        by_round.plot(rounds, losses, marker="o", label=name)
        spent = [(b, loss) for b, loss in zip(_spent(rows, rounds), losses, strict=True) if b]
        if spent:
            by_bytes.plot(*zip(*spent, strict=True), marker="o", label=name)
    by_round.set(xlabel="round", ylabel=" or ".join(sorted(drawn)))
    by_bytes.set(xlabel="bytes sent and received by all nodes", xscale="log")
    by_round.legend()
    for axis in (by_round, by_bytes):
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _spent(rows: Sequence[Row], rounds: Sequence[int]) -> list[int]:
    """Return the bytes spent up to and including each of ``rounds``."""
    total, spent = 0, {}
    for row in rows:
        total += row.get("comm/uplink_bytes", 0) + row.get("comm/downlink_bytes", 0)
        spent[row["round"]] = total
    return [spent[r] for r in rounds]
