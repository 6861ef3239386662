"""What stands beside every figure: hardware, versions, seed, commit."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ferret_flwr.report import environment

ROOT = Path(__file__).parents[1]


def processor() -> str:
    """Return the name of the processor."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def processors() -> int:
    """Return how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def hardware() -> str:
    """Return the processor, the cores that this process may use, and the GPU if there is one."""
    import torch  # not to list the benchmarks

    parts = [processor(), counted(processors(), "core")]
    if torch.cuda.is_available():
        parts.append(torch.cuda.get_device_name())
    return ", ".join(parts)


def counted(number: int, what: str) -> str:
    """Return a number of things: "1 core", "2 cores"."""
    return f"{number} {what}{'' if number == 1 else 's'}"


def commit() -> str:
    """Return the checkout's commit, with ``-dirty`` behind it if files differ from it."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


def header(seed: int | Sequence[int], *packages: str) -> dict[str, Any]:
    """Return what the figures of a benchmark depend on.

    Parameters
    ----------
    seed
        That everything random in it follows from, or several.
    packages
        Whose versions matter besides those that every run writes down.
    """
    return {
        "hardware": hardware(),
        "versions": environment() | {name: version(name) for name in packages},
        "seed": seed,
        "commit": commit(),
    }


def versions_text(versions: dict[str, str]) -> str:
    """Return versions as one line."""
    return ", ".join(f"{name} {number}" for name, number in versions.items())


def header_text(about: Mapping[str, Any]) -> str:
    """Return a `header` as one line."""
    seed = str(about["seed"]).strip("[]()")
    versions = versions_text(about["versions"])
    return f"{about['hardware']}; {versions}; seed {seed}; commit {about['commit']}"


def print_figures(figures: Mapping[str, Any], indent: str = "") -> None:
    """Print nested figures, a name to a line, those of a `header` among them."""
    for name, value in figures.items():
        if isinstance(value, list) and all(isinstance(row, dict) for row in value):
            for row in value:
                print(indent + "  ".join(f"{k} {_text(v)}" for k, v in row.items()))
        elif isinstance(value, dict) and any(isinstance(v, dict | list) for v in value.values()):
            print(f"{indent}{name}")
            print_figures(value, indent + "  ")
        elif isinstance(value, dict):
            row = ", ".join(f"{k} {_text(v)}" for k, v in value.items())
            print(f"{indent}{name:<36}{row}")
        else:
            print(f"{indent}{name:<36}{_text(value)}")


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
