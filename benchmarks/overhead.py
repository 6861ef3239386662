"""Time what a round takes besides local training, phase by phase, beside FedAvg.

Server, strategy, recording and client are the app's own; one node answers in the server's process,
through the bytes that would cross the wire. A phase's seconds are those of its own, without the
phases that it calls. Importing is not among them, evaluating is left out.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

from benchmarks.header import header, header_text
from benchmarks.plan import flattened, pairs, read_toml

METHODS = ("ferret", "fedavg")
TRAIN = "train"
REST = "Flower and the rest"
PHASES = {  # what is measured: "module:class or function.method" -> phase
    "ferret_flwr.training.worker:load_model": "node: load the model",
    "ferret_flwr.training.worker:load_examples": "node: read the data",
    "ferret_flwr.training.worker:masters_on": "node: copy the base",
    "ferret_flwr.flower.cache:LedgerCache.complete": "node: ledger cache",
    "ferret_flwr.flower.cache:LedgerCache.keep": "node: ledger cache",
    "ferret_flwr.follower:Follower.follow": "node: replay",
    "ferret_flwr.methods.ferret:load_masters": "node: load the weights",
    "ferret_flwr.training.worker:train_locally": TRAIN,
    "ferret_flwr.methods.ferret:project": "node: project",
    "ferret_flwr.methods.ferret:fidelity": "node: fidelity",
    "ferret_flwr.methods.fedavg:FedAvg.load": "node: load the weights",
    "ferret_flwr.methods.fedavg:FedAvg.local_round": "node: copy and check the weights",
    "ferret_flwr.projection.projection:fingerprint": "fingerprints",
    "ferret_flwr.flower.coordinator:next_plan": "server: plan",
    "ferret_flwr.flower.strategy:Ferret.aggregate_fit": "server: check and aggregate",
    "ferret_flwr.flower.coordinator:Coordinator.publish": "server: check and aggregate",
    "ferret_flwr.flower.comparison:MethodStrategy.aggregate_fit": "server: check and aggregate",
    "ferret_flwr.replica:Replica.follow": "reconstruct",
    "ferret_flwr.ledger:Ledger.save": "save the ledger",
    "benchmarks.overhead:pack": "pack and unpack",
    "benchmarks.overhead:unpack": "pack and unpack",
}


class Stopwatch:
    """Seconds of each phase, without those of the phases within; for one thread at a time."""

    def __init__(self) -> None:
        """Start outside all phases."""
        self.seconds: dict[str, float] = {}
        self._stack = [REST]
        self._since = time.perf_counter()

    def _turn(self) -> None:
        now = time.perf_counter()
        phase = self._stack[-1]
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._since
        self._since = now

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the block for ``name``."""
        self._turn()
        self._stack.append(name)
        try:
            yield
        finally:
            self._turn()
            self._stack.pop()

    def lap(self) -> dict[str, float]:
        """Return the seconds since the last call, and start again."""
        self._turn()
        seconds, self.seconds = self.seconds, {}
        return seconds

    def watch(self, place: str, phase: str) -> None:
        """Count every call of the function at ``place`` for ``phase``."""
        module_name, path = place.split(":")
        *owners, name = path.split(".")
        owner: Any = __import__(module_name, fromlist=["_"])
        for part in owners:
            owner = getattr(owner, part)
        function = getattr(owner, name)

        @wraps(function)
        def timed(*arguments: Any, **named: Any) -> Any:
            with self.phase(phase):
                return function(*arguments, **named)

        setattr(owner, name, timed)


def pack(content: Any) -> bytes:
    """Return a message's content as it crosses the wire."""
    from flwr.common.serde import recorddict_to_proto

    return recorddict_to_proto(content).SerializeToString()


def unpack(content: bytes) -> Any:
    """Return a message's content from the wire."""
    from flwr.common.serde import recorddict_from_proto
    from flwr.proto.recorddict_pb2 import RecordDict

    return recorddict_from_proto(RecordDict.FromString(content))


def rounds(settings: dict[str, Any], folder: Path) -> list[dict[str, float]]:
    """Be the process: run the rounds, and return the seconds of each."""
    import benchmarks.overhead as here  # not __main__, in which nothing is watched

    watch = Stopwatch()
    for place, phase in PHASES.items():
        watch.watch(place, phase)

    from flwr.app import Context, Message, RecordDict
    from flwr.server.compat.grid_client_proxy import GridClientProxy
    from flwr.supercore.task_identity import TaskIdentity

    import client_app
    from ferret_flwr.config import parse
    from ferret_flwr.flower.recording import RecordingServer, Row
    from ferret_flwr.flower.serverapp import Run

    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1

    class Proxy(GridClientProxy):
        def _send_receive_recorddict(
            self, recorddict: RecordDict, message_type: str, timeout: Any, group_id: Any
        ) -> RecordDict:
            request = Message(
                here.unpack(here.pack(recorddict)), dst_node_id=1, message_type=message_type
            )
            context = Context(1, 1, node, RecordDict(), run)
            reply = client_app.app(request, context)
            return here.unpack(here.pack(reply.content))

    run = settings["run"] | {"results-dir": str(folder / "results")}
    node = {"partition-id": 0, "num-partitions": settings["nodes"]}
    node |= {key: run[key] for key in ("model.name", "dataset.name")}
    node["ferret.cache-dir"] = str(folder / "cache")
    server = Run(parse(run)).components().server
    assert isinstance(server, RecordingServer)
    server.set_max_workers(1)
    server.client_manager().register(Proxy(1, None, run_id=1))  # type: ignore[arg-type]
    laps: list[dict[str, float]] = []
    recorded: Any = server.strategy

    def end_round(row: Row) -> None:
        if row.get("nodes") != 1:
            raise SystemExit(f"not timed: the reply was not used: {row}")
        laps.append(watch.lap())

    recorded.on_row = end_round
    recorded.evaluate = lambda server_round, parameters: None
    server.on_end = lambda: None  # leaves no model and no plot
    watch.lap()
    server.fit(run["num-server-rounds"], None)
    return laps


def measure(settings: dict[str, Any]) -> list[dict[str, float]]:
    """Return the seconds of each round in a new process."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "job.json").write_text(json.dumps(settings))
        subprocess.run(
            [sys.executable, "-m", "benchmarks.overhead", "--answer", folder],
            check=True,
        )
        return json.loads((folder / "laps.json").read_text())


def show(columns: dict[str, dict[str, float]]) -> str:
    """Return the table, and what all but training is of FedAvg's training."""
    phases = [*dict.fromkeys([TRAIN, *PHASES.values(), REST])]
    used = [phase for phase in phases if any(phase in column for column in columns.values())]
    lines = [f"{'seconds':<28}" + "".join(f"{name:>18}" for name in columns)]
    for phase in used:
        cells = [f"{c[phase]:>18.3f}" if phase in c else f"{'':>18}" for c in columns.values()]
        lines.append(f"{phase:<28}" + "".join(cells))
    beyond = [sum(c.values()) - c[TRAIN] for c in columns.values()]
    lines.append(f"{'all but training':<28}" + "".join(f"{s:>18.3f}" for s in beyond))
    trained = [c[TRAIN] for name, c in columns.items() if name.startswith("fedavg")]
    shares = "".join(f"{s / min(trained):>17.1%} " for s in beyond)
    return "\n".join([*lines, f"{'of training by FedAvg':<28}{shares}"])


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overhead", description=__doc__)
    parser.add_argument("--recipe", type=Path, help="a run-config file; default: the app's own")
    parser.add_argument("--rounds", type=int, default=2, help="default %(default)s")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="over the recipe")
    parser.add_argument("--answer", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.answer:
        settings = json.loads((options.answer / "job.json").read_text())
        (options.answer / "laps.json").write_text(json.dumps(rounds(settings, options.answer)))
        return
    from ferret_flwr.config import Config, flatten

    recipe = flattened(read_toml(options.recipe)) if options.recipe else {}
    common = {"num-server-rounds": options.rounds, "strategy.min-available-nodes": 1}
    nodes = recipe.get("strategy.min-available-nodes", 3)
    columns: dict[str, dict[str, float]] = {}
    for method in METHODS:
        own = recipe | common | dict(pairs(options.set)) | {"method": method}
        laps = measure({"run": flatten(Config()) | own, "nodes": nodes})
        columns |= {f"{method}, round {i}": lap for i, lap in enumerate(laps, start=1)}
    print(show(columns))
    print(header_text(header(Config().seed)))


if __name__ == "__main__":
    main()
