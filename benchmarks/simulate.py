"""One run of the real app in Flower's simulation, in a process of its own.

A fresh process per run makes its peak memory its own, and leaves nothing of one run to the next. In
it runs the server; one Ray actor, which has all cores, serves the nodes one after the other.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.header import processors
from ferret_flwr.config import Config, flatten
from ferret_flwr.files import write_atomic

ROOT = Path(__file__).parents[1]
PATIENCE_SECONDS = 10  # until a process that was asked to end is killed


class RunError(RuntimeError):
    """A run ended without results."""


def simulate(config: Config, nodes: int, folder: Path, log: Path) -> list[dict[str, Any]]:
    """Run the app in a new process and return its rows.

    Parameters
    ----------
    config
        Of the run; where it keeps its files is decided here.
    nodes
        How many take part.
    folder
        For the run's files; removed in the end, and what an earlier try has left before that.
    log
        Gets everything that the run prints.

    Raises
    ------
    RunError
        With the last thing that the run printed.
    """
    shutil.rmtree(folder, ignore_errors=True)
    places = {"results-dir": str(folder / "results"), "ferret.cache-dir": str(folder / "cache")}
    job = {"settings": flatten(config) | places, "nodes": nodes}
    write_atomic(folder / "job.json", json.dumps(job).encode())
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    log.parent.mkdir(parents=True, exist_ok=True)
    try:
        with log.open("w") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.simulate", str(folder / "job.json")],
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
                start_new_session=True,
            )
            try:
                status = process.wait()
            finally:
                _end(process)
        rows = _rows(folder)
        if not rows or rows[-1]["round"] < config.num_server_rounds:
            raise RunError(f"{_last_line(log)} (exit status {status}, see {log})")
        return rows  # the app may fail after them, if no round could be used
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the process and its children, which are a process group, if they still run."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(PATIENCE_SECONDS)
            return


def _rows(folder: Path) -> list[dict[str, Any]]:
    """Return what the run has left, if anything."""
    left = list(folder.glob("results/*/results.json"))
    return json.loads(left[0].read_text())["rounds"] if left else []


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines()]
    return next((line for line in reversed(lines) if line), "it printed nothing")


def _configured(build: Callable[[Any], Any], settings: Mapping[str, Any], context: Any) -> Any:
    """Call a server_fn or client_fn with the run configuration, which Flower leaves empty here."""
    return build(replace(context, run_config=dict(settings)))


def main() -> None:
    """Run the job that a file describes, in this process."""
    import torch
    from flwr.clientapp import ClientApp
    from flwr.serverapp import ServerApp
    from flwr.simulation import run_simulation

    from client_app import client_fn
    from server_app import server_fn

    job = json.loads(Path(sys.argv[1]).read_text())
    cores = processors()
    gpus = torch.cuda.device_count()
    start = time.perf_counter()
    run_simulation(
        server_app=ServerApp(server_fn=partial(_configured, server_fn, job["settings"])),
        client_app=ClientApp(client_fn=partial(_configured, client_fn, job["settings"])),
        num_supernodes=job["nodes"],
        backend_config={
            "init_args": {"num_cpus": cores, "num_gpus": gpus, "include_dashboard": False},
            "client_resources": {"num_cpus": cores, "num_gpus": min(gpus, 1)},
        },
    )
    print(f"{time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    main()
