"""What a round cost and gave: counted as messages pass, for any strategy."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from flwr.common import EvaluateIns, EvaluateRes, FitIns, FitRes, Parameters, Scalar
from flwr.server import History, Server
from flwr.server.client_manager import ClientManager, SimpleClientManager
from flwr.server.client_proxy import ClientProxy
from flwr.server.strategy import Strategy

from ferret_flwr.flower.wire import message_nbytes

log = logging.getLogger(__name__)

Row = dict[str, Any]
AVERAGED = (
    "train/loss",
    "ferret/fidelity",
    "time/local_s",
    "time/project_s",
    "time/reconstruct_s",
)


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
        """Start the round's row and weigh the requests."""
        self._started, self._traffic = time.perf_counter(), {}
        self.row = {"round": self.first_round + server_round}
        requests = self.strategy.configure_fit(
            server_round=server_round, parameters=parameters, client_manager=client_manager
        )
        for client, request in requests:
            self._count(client, 0, message_nbytes(request.parameters, request.config))
        self.row["time/plan_s"] = time.perf_counter() - self._started
        return requests

    def aggregate_fit(
        self,
        server_round: int,
        results: list[tuple[ClientProxy, FitRes]],
        failures: list[tuple[ClientProxy, FitRes] | BaseException],
    ) -> tuple[Parameters | None, dict[str, Scalar]]:
        """Weigh the replies and average what they report."""
        for client, reply in results:
            self._count(client, 1, message_nbytes(reply.parameters, reply.metrics))
        self.row |= _averages(results)
        start = time.perf_counter()
        aggregate = self.strategy.aggregate_fit(
            server_round=server_round, results=results, failures=failures
        )
        refused = getattr(self.strategy, "refused", {})
        self.row["time/aggregate_s"] = time.perf_counter() - start
        self.row["nodes"] = len(results) - len(refused)
        self.row["failures"] = [*map(str, failures), *(f"{k}: {v}" for k, v in refused.items())]
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
        """Weigh the requests to evaluate; without any, the row is finished."""
        requests = self.strategy.configure_evaluate(
            server_round=server_round, parameters=parameters, client_manager=client_manager
        )
        for client, request in requests:
            self._count(client, 0, message_nbytes(request.parameters, request.config))
        if not requests:
            self._finish()
        return requests

    def aggregate_evaluate(
        self,
        server_round: int,
        results: list[tuple[ClientProxy, EvaluateRes]],
        failures: list[tuple[ClientProxy, EvaluateRes] | BaseException],
    ) -> tuple[float | None, dict[str, Scalar]]:
        """Add the nodes' evaluation and finish the row."""
        for client, reply in results:
            self._count(client, 1, message_nbytes(Parameters([], ""), reply.metrics))
        loss, metrics = self.strategy.aggregate_evaluate(
            server_round=server_round, results=results, failures=failures
        )
        if loss is not None:
            self.row["eval/nodes_loss"] = loss
        self._finish()
        return loss, metrics

    def _count(self, client: ClientProxy, direction: int, nbytes: int) -> None:
        self._traffic.setdefault(client.cid, [0, 0])[direction] += nbytes

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
        self.on_row(self.row)


def _averages(results: list[tuple[ClientProxy, FitRes]]) -> Row:
    """Return the example-weighted means of what the nodes report, of those that report it."""
    row = {}
    for key in AVERAGED:
        pairs = [
            (float(reply.metrics[key]), reply.num_examples)
            for _, reply in sorted(results, key=lambda result: result[0].cid)
            if key in reply.metrics and reply.num_examples > 0
        ]
        if pairs:
            values, weights = zip(*pairs, strict=True)
            row[key] = float(np.average(values, weights=weights))
    return row


class RecordingServer(Server):
    """Flower's server, which calls ``on_end`` when the last round is over or has failed."""

    def __init__(self, strategy: Strategy, on_end: Callable[[], None]) -> None:
        """Use Flower's own client manager."""
        super().__init__(client_manager=SimpleClientManager(), strategy=strategy)
        self.on_end = on_end

    def fit(self, num_rounds: int, timeout: float | None) -> tuple[History, float]:
        """Run the rounds."""
        try:
            return super().fit(num_rounds, timeout)
        finally:
            self.on_end()
