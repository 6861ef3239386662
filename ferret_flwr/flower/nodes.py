"""Nodes by name and in order, and which of them a round samples."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from flwr.common import EvaluateRes, FitRes, GetPropertiesIns
from flwr.server.client_manager import SimpleClientManager
from flwr.server.client_proxy import ClientProxy
from flwr.server.criterion import Criterion

from ferret_flwr.projection.kernels.philox import derive_seed, philox4x32, split_key

log = logging.getLogger(__name__)

ASK_SECONDS = 60.0
ASK_AT_ONCE = 64


def node_name(client: ClientProxy, metrics: Mapping[str, Any]) -> str:
    """Return what messages call a node."""
    if "partition-id" in metrics:
        return f"node {client.cid} (partition {metrics['partition-id']!r})"
    return f"node {client.cid}"


def by_partition(result: tuple[ClientProxy, FitRes | EvaluateRes]) -> tuple[int, str]:
    """Return a sorting key: partitions stay what they are, node ids change from run to run."""
    client, reply = result
    partition = reply.metrics.get("partition-id", -1)
    return (partition if isinstance(partition, int) else -1), client.cid


class SeededClientManager(SimpleClientManager):
    """Samples nodes as a pure function of the run's seed, the round, and the partitions there are.

    Flower's own draws from Python's global generator, over node ids that are random in simulation.

    Parameters
    ----------
    seed
        The run's seed.
    """

    def __init__(self, seed: int) -> None:
        """Know no node yet."""
        super().__init__()
        self.seed = seed
        self.round = 0
        self._draws = 0  # of this round
        self._partitions: dict[str, int] = {}

    def start_round(self, round: int) -> None:
        """Draw for ``round`` from now on."""
        self.round, self._draws = round, 0

    def sample(
        self,
        num_clients: int,
        min_num_clients: int | None = None,
        criterion: Criterion | None = None,
    ) -> list[ClientProxy]:
        """Return ``num_clients`` nodes, or none if there are fewer."""
        self.wait_for(min_num_clients if min_num_clients is not None else num_clients)
        self._draws += 1
        clients = [c for c in list(self.clients.values()) if not criterion or criterion.select(c)]
        if num_clients > len(clients):
            log.warning("%d nodes are asked for, %d are connected", num_clients, len(clients))
            return []
        if num_clients == len(clients):
            return clients
        self._ask([client for client in clients if client.cid not in self._partitions])
        ordered = sorted(clients, key=lambda c: (self._partitions.get(c.cid, -1), c.cid))
        keys = self._random_words(len(ordered))
        return [ordered[i] for i in np.argsort(keys, kind="stable")[:num_clients]]

    def _random_words(self, count: int) -> np.ndarray:
        """Return one 64-bit number for each node: the smallest are drawn."""
        counters = np.zeros((count, 4), dtype=np.uint32)
        counters[:, 0] = np.arange(count)
        words = philox4x32(counters, split_key(derive_seed(self.seed, self.round, self._draws)))
        return words[:, 0].astype(np.uint64) << np.uint64(32) | words[:, 1]

    def _ask(self, clients: list[ClientProxy]) -> None:
        """Learn which partitions ``clients`` hold; a node that cannot say is sorted by its id."""
        question = GetPropertiesIns(config={"ask": "partition-id"})

        def ask(client: ClientProxy) -> int:
            try:
                answer = client.get_properties(question, timeout=ASK_SECONDS, group_id=0)
                return int(answer.properties.get("partition-id", -1))
            except Exception as error:  # it may be gone; the round will tell
                log.warning("node %s did not say which partition it holds: %s", client.cid, error)
                return -1

        if clients:
            log.info("asking %d nodes which partition they hold", len(clients))
            with ThreadPoolExecutor(ASK_AT_ONCE) as pool:
                answers = list(pool.map(ask, clients))
            self._partitions |= {c.cid: a for c, a in zip(clients, answers, strict=True)}
