"""What a round cost and gave: counted as messages pass, for any strategy."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
from flwr.common import (
    DisconnectRes,
    EvaluateIns,
    EvaluateRes,
    FitIns,
    FitRes,
    GetParametersIns,
    GetParametersRes,
    GetPropertiesIns,
    GetPropertiesRes,
    Parameters,
    ReconnectIns,
    Scalar,
)
from flwr.server import History, Server
from flwr.server.client_manager import ClientManager
from flwr.server.client_proxy import ClientProxy
from flwr.server.strategy import Strategy

from ferret_flwr import memory
from ferret_flwr.flower.nodes import (
    MOST_AT_ONCE,
    SeededClientManager,
    by_partition,
    failure_text,
    node_name,
)
from ferret_flwr.flower.wire import message_nbytes

log = logging.getLogger(__name__)

Row = dict[str, Any]
TRAINED = ("train/loss", "ferret/fidelity")
AVERAGED = (
    *TRAINED,
    "time/local_s",
    "time/project_s",
)
LARGEST = ("time/reconstruct_s",)  # nodes of one process share the work of the first
MEMORY = ("peak_bytes", "gpu_peak_bytes")


class Weighed(ClientProxy):
    """A node's proxy that counts what passes through it and names the node when it fails.

    Parameters
    ----------
    proxy
        Flower's own.
    traffic
        Bytes down and up, counted here.
    """

    def __init__(self, proxy: ClientProxy, traffic: list[int]) -> None:
        """Stand for the same node."""
        super().__init__(proxy.cid)
        self.proxy = proxy
        self.traffic = traffic

    def fit(self, ins: FitIns, timeout: float | None, group_id: int | None) -> FitRes:
        """Weigh the request and the reply."""
        self.traffic[0] += message_nbytes(ins.parameters, ins.config)
        with self._named():
            reply = self.proxy.fit(ins, timeout, group_id)
        self.traffic[1] += message_nbytes(reply.parameters, reply.metrics)
        return reply

    def evaluate(
        self, ins: EvaluateIns, timeout: float | None, group_id: int | None
    ) -> EvaluateRes:
        """Weigh the request and the reply."""
        self.traffic[0] += message_nbytes(ins.parameters, ins.config)
        with self._named():
            reply = self.proxy.evaluate(ins, timeout, group_id)
        self.traffic[1] += message_nbytes(Parameters([], ""), reply.metrics)
        return reply

    def get_properties(
        self, ins: GetPropertiesIns, timeout: float | None, group_id: int | None
    ) -> GetPropertiesRes:
        """Pass on."""
        return self.proxy.get_properties(ins, timeout, group_id)

    def get_parameters(
        self, ins: GetParametersIns, timeout: float | None, group_id: int | None
    ) -> GetParametersRes:
        """Pass on."""
        return self.proxy.get_parameters(ins, timeout, group_id)

    def reconnect(
        self, ins: ReconnectIns, timeout: float | None, group_id: int | None
    ) -> DisconnectRes:
        """Pass on."""
        return self.proxy.reconnect(ins, timeout, group_id)

    @contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            raise RuntimeError(f"node {self.cid} failed: {error}") from error


class Recorded(Strategy):
    """Passes every call on to ``strategy`` and builds one row a round from what it sees.

    Parameters
    ----------
    strategy
        Any Flower strategy.
    on_row
        Called with each finished row, round 0 first.
    first_round
        Rounds done before this run, which a resumed one counts on from.
    """

    def __init__(
        self, strategy: Strategy, on_row: Callable[[Row], None], first_round: int = 0
    ) -> None:
        """Start an empty row."""
        self.strategy = strategy
        self.on_row = on_row
        self.first_round = first_round
        self.row: Row = {}
        self._started = time.perf_counter()
        self._traffic: dict[str, list[int]] = {}  # node -> bytes down, up

    def initialize_parameters(self, client_manager: ClientManager) -> Parameters | None:
        """Pass on."""
        return self.strategy.initialize_parameters(client_manager)

    def configure_fit(
        self, server_round: int, parameters: Parameters, client_manager: ClientManager
    ) -> list[tuple[ClientProxy, FitIns]]:
        """Start the round's row and weigh what passes to and from its nodes."""
        memory.start()
        self._started, self._traffic = time.perf_counter(), {}
        self.row = {"round": self.first_round + server_round}
        if isinstance(client_manager, SeededClientManager):
            client_manager.start_round(self.row["round"])
        requests = self.strategy.configure_fit(
            server_round=server_round, parameters=parameters, client_manager=client_manager
        )
        self.row["time/plan_s"] = time.perf_counter() - self._started
        return [(self._weighed(client), request) for client, request in requests]

    def aggregate_fit(
        self,
        server_round: int,
        results: list[tuple[ClientProxy, FitRes]],
        failures: list[tuple[ClientProxy, FitRes] | BaseException],
    ) -> tuple[Parameters | None, dict[str, Scalar]]:
        """Sort the replies, so that no sum depends on their arrival, and average their reports."""
        results = sorted(results, key=by_partition)
        start = time.perf_counter()
        aggregate = self.strategy.aggregate_fit(
            server_round=server_round, results=results, failures=failures
        )
        replica_seconds = getattr(self.strategy, "replica_seconds", 0.0)
        self.row["time/aggregate_s"] = time.perf_counter() - start - replica_seconds
        self.row["time/replica_s"] = replica_seconds  # only to evaluate and to save
        refused = getattr(self.strategy, "refused", {})
        used = [r for r in results if node_name(r[0], r[1].metrics) not in refused]
        self.row |= _averages(used) | _node_peaks(used)
        if getattr(self.strategy, "wrapper", None):  # for differential privacy: these have no noise
            self.row = {key: value for key, value in self.row.items() if key not in TRAINED}
        self.row["nodes"] = len(used)
        self.row["failures"] = self._left_out(failures)
        return aggregate

    def evaluate(
        self, server_round: int, parameters: Parameters
    ) -> tuple[float, dict[str, Scalar]] | None:
        """Add the server's evaluation; before the first round it is a row of its own."""
        start = time.perf_counter()
        result = self.strategy.evaluate(server_round=server_round, parameters=parameters)
        if server_round == 0:
            self.row = {"round": self.first_round}
        if result is not None:
            loss, metrics = result
            self.row |= {"eval/loss": loss} | metrics
            self.row["time/evaluate_s"] = time.perf_counter() - start
        if server_round == 0:
            self._finish()
        return result

    def configure_evaluate(
        self, server_round: int, parameters: Parameters, client_manager: ClientManager
    ) -> list[tuple[ClientProxy, EvaluateIns]]:
        """Weigh what the nodes are sent to evaluate; if nothing, the row is finished."""
        requests = self.strategy.configure_evaluate(
            server_round=server_round, parameters=parameters, client_manager=client_manager
        )
        if not requests:
            self._finish()
        return [(self._weighed(client), request) for client, request in requests]

    def aggregate_evaluate(
        self,
        server_round: int,
        results: list[tuple[ClientProxy, EvaluateRes]],
        failures: list[tuple[ClientProxy, EvaluateRes] | BaseException],
    ) -> tuple[float | None, dict[str, Scalar]]:
        """Add the nodes' evaluation and finish the row."""
        loss, metrics = self.strategy.aggregate_evaluate(
            server_round=server_round, results=results, failures=failures
        )
        if loss is not None:
            self.row["eval/nodes_loss"] = loss
        left_out = [*self.row.get("failures", []), *self._left_out(failures)]
        self.row["failures"] = list(dict.fromkeys(left_out))
        self._finish()
        return loss, metrics

    def weigh(self, cid: str, down: int, up: int) -> None:
        """Count bytes of a node whose messages pass through no proxy."""
        traffic = self._traffic.setdefault(cid, [0, 0])
        traffic[0] += down
        traffic[1] += up

    def _left_out(self, failures: Sequence[Any]) -> list[str]:
        """Return which nodes did not count, and why."""
        refused = getattr(self.strategy, "refused", {})
        return [*map(failure_text, failures), *(f"{k}: {v}" for k, v in refused.items())]

    def _weighed(self, client: ClientProxy) -> ClientProxy:
        return Weighed(client, self._traffic.setdefault(client.cid, [0, 0]))

    def _finish(self) -> None:
        down, up = zip(*self._traffic.values(), strict=True) if self._traffic else ((), ())
        if self._traffic:
            self.row |= {
                "comm/downlink_bytes": sum(down),
                "comm/uplink_bytes": sum(up),
                "comm/downlink_bytes_per_node": max(down),
                "comm/uplink_bytes_per_node": max(up),
            }
            self.row["time/round_s"] = time.perf_counter() - self._started
        self._traffic = {}
        self.row |= {k.replace("/", "/server_"): v for k, v in memory.peaks().items()}
        self.on_row(self.row)


def _averages(results: list[tuple[ClientProxy, FitRes]]) -> Row:
    """Return what the nodes report, of those that report it: means weighted by examples."""
    row = {}
    for key in LARGEST:
        seconds = [reply.metrics.get(key) for _, reply in results]
        reported = [float(s) for s in seconds if isinstance(s, int | float)]
        if reported:
            row[key] = max(reported)
    for key in AVERAGED:
        pairs = [
            (float(reply.metrics[key]), reply.num_examples)
            for _, reply in results
            if isinstance(reply.metrics.get(key), int | float) and reply.num_examples > 0
        ]
        if pairs:
            values, weights = zip(*pairs, strict=True)
            row[key] = float(np.average(values, weights=weights))
    return row


def _node_peaks(results: list[tuple[ClientProxy, FitRes]]) -> Row:
    """Return the most memory that a node reports."""
    row = {}
    for name in MEMORY:
        told = [reply.metrics.get(f"memory/{name}") for _, reply in results]
        peaks = [peak for peak in told if type(peak) is int and peak >= 0]
        if peaks:
            row[f"memory/node_{name}"] = max(peaks)
    return row


class RecordingServer(Server):
    """Flower's server, which calls ``on_end`` when the last round is over.

    It runs in ``context``, which so learns whether it failed.

    Parameters
    ----------
    client_manager, strategy
        As Flower's.
    on_end
        Called once.
    context
        Left when all is done, or with what went wrong.
    """

    def __init__(
        self,
        client_manager: ClientManager,
        strategy: Strategy,
        on_end: Callable[[], None],
        context: AbstractContextManager[Any],
    ) -> None:
        """Ask all nodes of a round at once, where Flower would ask a handful."""
        super().__init__(client_manager=client_manager, strategy=strategy)
        self.set_max_workers(MOST_AT_ONCE)
        self.on_end = on_end
        self.context = context

    def fit(self, num_rounds: int, timeout: float | None) -> tuple[History, float]:
        """Run the rounds."""
        with self.context:
            result = super().fit(num_rounds, timeout)
            self.on_end()
        return result
