"""Time the server's side of a round against its replies, and its memory against the nodes.

Strategy, recording, client manager and Flower's own node proxies are the app's; behind the proxies
a `Crowd` answers in this process, through the bytes that would cross the wire, with drawn
coefficients that pass every check. The nodes' seconds are left out, and neither side has a model.

Seconds are those of the processor, in the one thread that does it all, so that what else the
machine does is not counted; nor is waiting for the disk, to which each round writes the ledger.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import RecordDict
from flwr.common import Code, FitIns, FitRes, GetPropertiesRes, Status, parameters_to_ndarrays
from flwr.common import ndarrays_to_parameters as to_parameters
from flwr.common.constant import MessageTypeLegacy
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.compat.common import recorddict_compat as compat
from flwr.proto.recorddict_pb2 import RecordDict as ProtoRecordDict
from flwr.server.compat.grid_client_proxy import GridClientProxy
from flwr.server.strategy import FedAvg

from benchmarks.header import header, print_figures
from ferret_flwr.config import FerretConfig
from ferret_flwr.flower import Ferret, wire
from ferret_flwr.flower.nodes import SeededClientManager
from ferret_flwr.flower.recording import Recorded, Row
from ferret_flwr.ledger import Header, Ledger

ELEMENTS = 134_515_008  # SmolLM2-135M
BASES = 8192
REPLIES = (10, 100, 1000)
NODES = (100, 1000, 10_000)
SAMPLE = 50  # nodes of a round where their number grows
WARM_UPS, ROUNDS, SEED = 2, 5, 20240910
MANY_ROUNDS = 10  # in which the nodes fall behind
NOTHING = to_parameters([np.zeros(1, dtype=np.float32)])  # what Ferret returns as weights
PHASES = ("configure", "flower", "weigh", "aggregate")


class Crowd:
    """All nodes behind their proxies.

    Parameters
    ----------
    salt
        A node's id is its partition, with these bits flipped.

    Attributes
    ----------
    seconds
        Spent as the nodes, not as the server.
    flower
        Spent by Flower's own code for a message on the server.
    """

    def __init__(self, salt: int = 0) -> None:
        """Nobody has been asked anything."""
        self.salt = salt
        self.seconds = self.flower = 0.0

    def reply(self, node: int, kind: str, content: bytes) -> bytes:
        """Answer a message of ``kind`` to ``node``."""
        start = time.thread_time()
        answer = _answer(_parse(content), kind, node ^ self.salt)
        reply = recorddict_to_proto(answer).SerializeToString()
        self.seconds += time.thread_time() - start
        return reply


class Proxy(GridClientProxy):
    """Flower's proxy of a node, which sends its messages to a `Crowd`."""

    def fit(self, ins: FitIns, timeout: float | None, group_id: int | None) -> FitRes:
        """Take the time without the node's."""
        start, theirs = time.thread_time(), self.grid.seconds
        reply = super().fit(ins, timeout, group_id)
        self.grid.flower += time.thread_time() - start - (self.grid.seconds - theirs)
        return reply

    def _send_receive_recorddict(
        self, recorddict: RecordDict, message_type: str, timeout: float | None, group_id: int | None
    ) -> RecordDict:
        content = recorddict_to_proto(recorddict).SerializeToString()
        return _parse(self.grid.reply(self.node_id, message_type, content))


def _parse(content: bytes) -> RecordDict:
    return recorddict_from_proto(ProtoRecordDict.FromString(content))


def _answer(request: RecordDict, kind: str, partition: int) -> RecordDict:
    ok = Status(Code.OK, "")
    if kind == MessageTypeLegacy.GET_PROPERTIES:
        properties = GetPropertiesRes(ok, {"partition-id": partition})
        return compat.getpropertiesres_to_recorddict(properties)
    asked = compat.recorddict_to_fitins(request, keep_input=False)
    reply = train(wire.decode(parameters_to_ndarrays(asked.parameters), asked.config), partition)
    return compat.fitres_to_recorddict(reply, keep_input=False)


def train(request: wire.Request, partition: int) -> FitRes:
    """Return the reply of ``partition``, which has been training for no time at all."""
    plan, known = request.plan, request.since + len(request.entries)
    assert plan is not None
    generator = np.random.default_rng([SEED, plan.round, partition])
    gamma = generator.standard_normal(plan.num_coefficients, dtype=np.float32)
    metrics = {
        "round": plan.round,
        "seed": wire.node_seed(plan, request.bases, partition),
        "fingerprint": request.head[:16] if known else request.header.base,
        "cached": known,
        "partition-id": partition,
        "train/loss": 1.0,
        "ferret/fidelity": 0.3,
        "time/local_s": 1.0,
        "time/project_s": 0.1,
        "time/reconstruct_s": 0.1,
    }
    return FitRes(Status(Code.OK, ""), to_parameters([gamma]), 1 + partition % 100, metrics)


class Federation:
    """A server with ``nodes`` registered, of which each round asks ``sample``.

    Parameters
    ----------
    nodes, sample
        How many.
    bases
        K.
    folder
        Where the ledger is written.
    seed
        The run's.
    salt
        As in `Crowd`.
    """

    def __init__(
        self,
        nodes: int,
        sample: int,
        bases: int,
        folder: Path,
        *,
        seed: int = SEED,
        salt: int = 0,
    ) -> None:
        """Register the nodes."""
        self.crowd = Crowd(salt)
        self.manager = SeededClientManager(seed)
        for partition in range(nodes):
            self.manager.register(Proxy(partition ^ salt, self.crowd, run_id=1))
        self.rows: list[Row] = []
        self.number = 0
        inner = FedAvg(
            fraction_fit=sample / nodes,
            min_fit_clients=sample,
            min_available_clients=nodes,
            fraction_evaluate=0.0,
            fit_metrics_aggregation_fn=lambda _: {},
        )
        self.strategy = Ferret(
            inner,
            FerretConfig(coefficients=bases),
            seed=seed,
            ledger=Ledger(Header("0" * 16, ELEMENTS, "1" * 16)),
            ledger_path=folder / f"{nodes}-{sample}.safetensors",
        )
        self.recorded = Recorded(self.strategy, self.rows.append)

    def run(self, between: Callable[[str], None] = lambda _: None) -> dict[str, float]:
        """Do one round, as Flower's server would, and return the server's seconds by phase.

        Parameters
        ----------
        between
            Called with the name of each phase that has ended.
        """
        self.number += 1
        crowd = self.crowd
        start = time.thread_time()
        requests = self.recorded.configure_fit(self.number, NOTHING, self.manager)
        configured = time.thread_time() - start
        between("configure")
        start, crowd.seconds, crowd.flower = time.thread_time(), 0.0, 0.0
        results = [
            (client, client.fit(instruction, timeout=None, group_id=self.number))
            for client, instruction in requests
        ]
        weighed = time.thread_time() - start - crowd.seconds - crowd.flower
        between("messages")
        del requests
        start = time.thread_time()
        self.recorded.aggregate_fit(self.number, results, [])
        self.recorded.configure_evaluate(self.number, NOTHING, self.manager)
        aggregated = time.thread_time() - start
        between("aggregate")
        used, ledger = self.rows[-1].get("nodes"), self.strategy.ledger
        if used != len(results) or ledger is None or len(ledger) != self.number:
            raise SystemExit(f"not timed: {used} of {len(results)} replies were used: {self.rows}")
        taken = (configured, crowd.flower, weighed, aggregated)
        return dict(zip(PHASES, taken, strict=True))


def time_replies(replies: Sequence[int], bases: int, folder: Path) -> list[dict[str, Any]]:
    """Return the server's median seconds of a round, for each number of replies."""
    table = []
    for count in replies:
        server = Federation(count, count, bases, folder)
        rounds = [server.run() for _ in range(WARM_UPS + ROUNDS)][WARM_UPS:]
        seconds = {phase: statistics.median(r[phase] for r in rounds) for phase in PHASES}
        total = statistics.median(sum(r.values()) for r in rounds)
        table.append({"replies": count, "seconds": total} | seconds)
    (x0, y0), (x1, y1) = ((row["replies"], row["seconds"]) for row in table[:2])
    for row in table:
        row["expected"] = y0 + (y1 - y0) / (x1 - x0) * (row["replies"] - x0)
        row["seconds_over_expected"] = row["seconds"] / row["expected"]
        row["milliseconds_per_reply"] = 1000 * row["seconds"] / row["replies"]
        row["peak_bytes_per_reply"] = peak_of_round(row["replies"], bases, folder) / row["replies"]
    return table


def peak_of_round(replies: int, bases: int, folder: Path) -> int:
    """Return how many bytes more than before a round were in use at once in it."""
    server = Federation(replies, replies, bases, folder)
    for _ in range(WARM_UPS):
        server.run()
    with traced() as memory:
        server.run()
        return memory()[1]


@contextmanager
def traced() -> Any:
    """Count the bytes that Python allocates: yields a function that returns now and peak."""
    gc.collect()
    tracemalloc.start()
    try:

        def memory() -> tuple[int, int]:
            gc.collect()
            return tracemalloc.get_traced_memory()

        yield memory
    finally:
        tracemalloc.stop()


def weigh_nodes(nodes: int, sample: int, bases: int, folder: Path, rounds: int) -> dict[str, int]:
    """Return the bytes that a server holds with ``nodes`` registered.

    Returns
    -------
    dict
        ``identities`` once they are registered, ``held`` after the rounds without the ledger
        itself, and the ``peak``.
    """
    with traced() as memory:
        server = Federation(nodes, sample, bases, folder)
        identities, _ = memory()
        for _ in range(rounds):
            server.run()
        held, peak = memory()
        assert server.strategy.ledger is not None
        held -= sum(entry.coefficients.nbytes for entry in server.strategy.ledger.entries)
    return {"nodes": nodes, "identities": identities, "held": held, "peak": peak}


def measure(replies: Sequence[int], nodes: Sequence[int], bases: int) -> dict[str, Any]:
    """Return every figure of the benchmark, with what it was measured on."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        Federation(2, 2, bases, folder).run()  # imports and first calls
        by_replies = time_replies(replies, bases, folder)
        by_nodes = [weigh_nodes(n, min(n, SAMPLE), bases, folder, MANY_ROUNDS) for n in nodes]
    few, many = by_nodes[0], by_nodes[-1]
    per_node = {
        f"{key}_bytes_per_node": (many[key] - few[key]) / (many["nodes"] - few["nodes"])
        for key in ("identities", "held", "peak")
    }
    return {
        "by_replies": by_replies,
        "by_nodes": by_nodes,
        **per_node,
        "sample": SAMPLE,
        "elements": ELEMENTS,
        "bases": bases,
        "rounds": ROUNDS,
        "threads": 1,
    } | header(SEED, "protobuf")


def plot(figures: dict[str, Any], path: Path) -> None:
    """Draw both tables, with the lines that they are expected on."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4))
    rows = figures["by_replies"]
    replies = [row["replies"] for row in rows]
    left.plot(replies, [r["seconds"] for r in rows], "o-", label="server, in all")
    left.plot(replies, [r["expected"] for r in rows], "k--", label="line through the first two")
    for phase in PHASES:
        left.plot(replies, [r[phase] for r in rows], ".-", alpha=0.5, label=phase)
    left.set(xlabel="replies in a round", ylabel="server seconds")
    rows = figures["by_nodes"]
    nodes = [row["nodes"] for row in rows]
    for key, label in (
        ("peak", "peak"),
        ("held", "held between rounds"),
        ("identities", "Flower's proxies alone"),
    ):
        right.plot(nodes, [r[key] for r in rows], "o-", label=label)
    right.set(xlabel=f"registered nodes, {figures['sample']} of them in a round", ylabel="bytes")
    for axis in (left, right):
        axis.set(xscale="log", yscale="log")
        axis.grid(alpha=0.3)
        axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def show(figures: dict[str, Any]) -> None:
    """Print the figures as tables."""
    for key in ("by_replies", "by_nodes"):
        rows = figures.pop(key)
        print("".join(f"{name:>24}" for name in rows[0]))
        for row in rows:
            cells = (f"{v:.4g}" if isinstance(v, float) else f"{v}" for v in row.values())
            print("".join(f"{cell:>24}" for cell in cells))
        print()
    print_figures(figures)


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--plot", type=Path, help="a PNG or SVG file")
    parser.add_argument("--bases", type=int, default=BASES, help="K, default %(default)s")
    parser.add_argument("--replies", type=int, nargs="+", default=REPLIES, metavar="N")
    parser.add_argument("--nodes", type=int, nargs="+", default=NODES, metavar="N")
    arguments = parser.parse_args()
    if min(len(arguments.replies), len(arguments.nodes)) < 2:
        parser.error("a line needs two points: give at least two numbers")
    figures = measure(arguments.replies, arguments.nodes, arguments.bases)
    if arguments.plot:
        plot(figures, arguments.plot)
    if arguments.json:
        print(json.dumps(figures, indent=2))
    else:
        show(figures)


if __name__ == "__main__":
    main()
