"""Secure aggregation: Flower's SecAgg+ in the place of a round's training requests.

The server learns the mean of the nodes' coefficients and no node's own. What a message must not
say in clear is kept back on the node, see `mods.privacy_mod`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.common import FitIns, Parameters, Scalar, ndarrays_to_parameters, parameters_to_ndarrays
from flwr.common.serde import recorddict_to_proto
from flwr.compat.common import recorddict_compat as compat
from flwr.server import LegacyContext
from flwr.server.client_manager import ClientManager
from flwr.server.client_proxy import ClientProxy
from flwr.server.server import FitResultsAndFailures
from flwr.server.strategy import FedAvg
from flwr.server.workflow import SecAggPlusWorkflow
from flwr.server.workflow.constant import MAIN_CONFIGS_RECORD, MAIN_PARAMS_RECORD, Key
from flwr.server.workflow.secure_aggregation.secaggplus_workflow import WorkflowState
from flwr.serverapp import Grid

from ferret_flwr.config import ConfigError
from ferret_flwr.flower.recording import Recorded, RecordingServer, Weighed
from ferret_flwr.flower.replies import FitResult
from ferret_flwr.flower.strategy import Ferret
from ferret_flwr.ledger import Ledger

log = logging.getLogger(__name__)

FIRST_RANGE = 8.0  # Flower's own
MARGIN = 32.0  # over the root mean square of what one node may send; 22 bits leave room for it
WIDER = 16.0  # after a round that was not published
LEVELS = 2**22
HALTED = "too few nodes stayed to its end"
ALONE = "a mask takes at least two nodes, asked were {}"
MOST_NODES = 2**32 // LEVELS - 1  # whose sum does not wrap around


def clipping_range(ledger: Ledger, nodes: int) -> float:
    """Return what no coefficient of a node should exceed, from what is public.

    The last published mean γ tells the size of a coefficient; one node's may be √n times as large
    where the nodes' updates have nothing in common.
    """
    if not ledger.entries or not ledger.entries[-1].rate:
        return FIRST_RANGE
    last = ledger.entries[-1]
    mean = last.coefficients.astype(np.float64) / (last.rate * last.plan.unbiased_scale())
    return MARGIN * math.sqrt(nodes) * float(np.sqrt(np.square(mean).mean())) or FIRST_RANGE


def quantisation_error(clipping: float, nodes: int) -> float:
    """Return the most that the standard deviation of one coefficient's error in the mean can be.

    Each node rounds up or down at random, so without bias, between levels that are 2·range/2²²
    apart: the variance is at most a quarter of the step's square.
    """
    return 2 * clipping / LEVELS / (2 * math.sqrt(nodes))


class WeighedGrid:
    """Sends and receives for the workflow, and counts the bytes of each node.

    Parameters
    ----------
    grid
        Flower's own.
    weigh
        Called with a node's name, bytes down and bytes up.
    """

    def __init__(self, grid: Grid, weigh: Callable[[str, int, int], None]) -> None:
        """Count nothing yet."""
        self.grid = grid
        self.weigh = weigh

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Pass on."""
        messages = list(messages)
        for message in messages:
            self.weigh(str(message.metadata.dst_node_id), _nbytes(message.content), 0)
        replies = list(self.grid.send_and_receive(messages, timeout=timeout))
        for reply in replies:
            if reply.has_content():
                self.weigh(str(reply.metadata.src_node_id), 0, _nbytes(reply.content))
        return replies


def _nbytes(content: RecordDict) -> int:
    return recorddict_to_proto(content).ByteSize()


class Unmasked(FedAvg):
    """Stands between the workflow and the strategy, which it hands float32 and Flower's proxies.

    Parameters
    ----------
    recorded
        The strategy.
    """

    def __init__(self, recorded: Recorded) -> None:
        """Keep it."""
        super().__init__()
        self.recorded = recorded
        self.asked = 0
        self.ended = False  # whether the round came as far as the mean
        self.result: tuple[Parameters | None, dict[str, Scalar]] = (None, {})

    def configure_fit(
        self, server_round: int, parameters: Parameters, client_manager: ClientManager
    ) -> list[tuple[ClientProxy, FitIns]]:
        """Return the requests for proxies that have a node id; refuse more than can be summed."""
        chosen = self.recorded.configure_fit(server_round, parameters, client_manager)
        self.asked = len(chosen)
        if self.asked > MOST_NODES:
            raise ConfigError(
                f"'privacy.secure-aggregation' takes at most {MOST_NODES} nodes a round, got "
                f"{self.asked}: lower 'strategy.fraction-train'"
            )
        return [(c.proxy if isinstance(c, Weighed) else c, request) for c, request in chosen]

    def aggregate_fit(
        self,
        server_round: int,
        results: list[FitResult],
        failures: list[FitResult | BaseException],
    ) -> tuple[Parameters | None, dict[str, Scalar]]:
        """Hand on the mean, which is in the place of each node's coefficients."""
        if results:
            (mean,) = parameters_to_ndarrays(results[0][1].parameters)
            parameters = ndarrays_to_parameters([mean.astype(np.float32)])
            for _, reply in results:
                reply.parameters = parameters
        self.ended = True
        self.result = self.recorded.aggregate_fit(server_round, results, failures)
        return self.result


class Workflow(SecAggPlusWorkflow):
    """Flower's SecAgg+ for nodes that leave early, too.

    Flower 1.41 asks for the shares of all nodes that were asked to begin. Who left before it gave
    its shares away has none, and no part in anybody's mask: it is as if it had not been asked.
    """

    def share_keys_stage(self, grid: Grid, context: LegacyContext, state: WorkflowState) -> bool:
        """Go on with those that have given their shares away."""
        enough = super().share_keys_stage(grid, context, state)
        there = set(state.active_node_ids)
        state.sampled_node_ids = there
        state.nid_to_neighbours = {nid: state.nid_to_neighbours[nid] & there for nid in there}
        return enough


class SecureServer(RecordingServer):
    """A server whose rounds are SecAgg+.

    Parameters
    ----------
    client_manager, strategy, on_end, context
        As `RecordingServer`'s; the strategy records `Ferret`.
    threshold
        Share of a round's nodes that must stay to its end, and can then undo the masks of the
        others.
    """

    def __init__(
        self,
        client_manager: ClientManager,
        strategy: Recorded,
        on_end: Callable[[], None],
        context: AbstractContextManager[Any],
        threshold: float,
    ) -> None:
        """Start with Flower's own range."""
        super().__init__(client_manager, strategy, on_end, context)
        assert isinstance(strategy.strategy, Ferret)
        self.recorded = strategy
        self.ferret = strategy.strategy
        self.threshold = threshold
        self._wider = 1.0

    def fit_round(
        self, server_round: int, timeout: float | None
    ) -> tuple[Parameters | None, dict[str, Scalar], FitResultsAndFailures]:
        """Run one round; what fails in it leaves the ledger as it is."""
        proxies = list(self.client_manager().all().values())
        nodes = min(len(proxies), MOST_NODES)
        ledger = self.ferret.ledger
        assert ledger is not None
        clipping = self._wider * clipping_range(ledger, nodes)
        workflow = Workflow(
            num_shares=1.0,
            reconstruction_threshold=self.threshold,
            max_weight=1.0,  # every node's weight
            clipping_range=clipping,
            timeout=timeout,
        )
        strategy = Unmasked(self.recorded)
        context = LegacyContext(
            Context(0, 0, {}, RecordDict(), {}),
            strategy=strategy,
            client_manager=self.client_manager(),
        )
        context.state.config_records[MAIN_CONFIGS_RECORD] = ConfigRecord(
            {Key.CURRENT_ROUND: server_round}
        )
        context.state.array_records[MAIN_PARAMS_RECORD] = compat.parameters_to_arrayrecord(
            self.parameters, keep_input=True
        )
        grid = WeighedGrid(proxies[0].grid, self.recorded.weigh)  # type: ignore[attr-defined]
        workflow(grid, context)  # type: ignore[arg-type]
        if not strategy.ended:
            reason = HALTED if strategy.asked > 1 else ALONE.format(strategy.asked)
            log.error("round %d: %s", server_round, reason)
            self.recorded.row |= {"nodes": 0, "failures": [reason]}
        after = self.ferret.ledger
        published = after is not None and len(after) > len(ledger)
        self._wider = 1.0 if published else self._wider * WIDER
        self.recorded.row["secure/range"] = clipping
        self.recorded.row["secure/quantisation_error"] = quantisation_error(clipping, nodes)
        return *strategy.result, ([], [])
