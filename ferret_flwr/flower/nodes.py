"""Nodes by name and in order, and which of them a round samples."""

from __future__ import annotations

import logging
from collections import Counter
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

MOST_AT_ONCE = 256  # threads that wait for nodes
ASK_SECONDS = 300.0  # the first to be asked have a process to start
ASK_AT_ONCE = 64  # more is slower: Flower looks through all that is under way for each node
ASK_TIMES = 2  # then a silent node is left alone
UNKNOWN = -1  # the partition of a node that did not say
MOST_TOLD = 4000  # characters of a node's reason


def node_name(client: ClientProxy, metrics: Mapping[str, Any]) -> str:
    """Return what messages call a node."""
    return name_of(client.cid, metrics)


def name_of(node: str, about: Mapping[str, Any]) -> str:
    """Return what messages call the node with Flower's id ``node``."""
    if "partition-id" in about:
        return f"node {node} (partition {about['partition-id']!r:.40})"
    return f"node {node}"


def told(reason: object) -> str:
    """Return what a node says as a log may show it: not long, and no line that passes for ours."""
    lines = str(reason)[:MOST_TOLD].splitlines()
    return "\n    ".join("".join(c if c.isprintable() else " " for c in line) for line in lines)


def failure_text(failure: tuple[ClientProxy, FitRes | EvaluateRes] | BaseException) -> str:
    """Return what messages say of a node whose reply Flower counts as a failure."""
    if isinstance(failure, BaseException):  # behind a `Weighed` proxy it has the node's name
        text = told(failure)
        return text if text.startswith("node ") else f"a node failed: {text}"
    client, reply = failure
    return f"{node_name(client, reply.metrics)} failed: {told(reply.status.message)}"


def by_partition(result: tuple[ClientProxy, FitRes | EvaluateRes]) -> tuple[int, str]:
    """Return a sorting key: partitions stay what they are, node ids change from run to run."""
    client, reply = result
    partition = reply.metrics.get("partition-id", UNKNOWN)
    return (partition if isinstance(partition, int) else UNKNOWN), client.cid


class SeededClientManager(SimpleClientManager):
    """Samples nodes as a pure function of the run's seed, the round, and the partitions there are.

    Flower's own draws from Python's global generator, over node ids that are random in simulation.
    Here each partition has a number of its own in each round and the smallest are drawn, so a node
    that is missing changes nobody's place but its own.

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
        self._silences: Counter[str] = Counter()  # nodes that did not say -> how often

    def start_round(self, round: int) -> None:
        """Draw for ``round`` from now on."""
        self.round, self._draws = round, 0

    def unregister(self, client: ClientProxy) -> None:
        """Forget the node: it may come back with another partition, or never."""
        super().unregister(client)
        self._partitions.pop(client.cid, None)
        self._silences.pop(client.cid, None)

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
        self._ask(clients)
        clients.sort(key=lambda c: (self._partitions.get(c.cid, UNKNOWN), c.cid))
        partitions = np.array([self._partitions.get(c.cid, UNKNOWN) for c in clients])
        smallest = np.argsort(self._random_words(partitions), kind="stable")[:num_clients]
        return [clients[i] for i in smallest]

    def _random_words(self, partitions: np.ndarray) -> np.ndarray:
        """Return a 64-bit number for each of ``partitions``, which are in order."""
        counters = np.zeros((len(partitions), 4), dtype=np.uint32)
        counters[:, 0] = partitions & 0xFFFFFFFF
        counters[:, 1] = partitions >> 32 & 0xFFFFFFFF
        same = np.searchsorted(partitions, partitions)
        counters[:, 2] = np.arange(len(partitions)) - same  # tells nodes of one partition apart
        words = philox4x32(counters, split_key(derive_seed(self.seed, self.round, self._draws)))
        return words[:, 0].astype(np.uint64) << np.uint64(32) | words[:, 1]

    def _ask(self, clients: list[ClientProxy]) -> None:
        """Learn which partitions ``clients`` hold, once; those that cannot say go by their ids."""
        unknown = [
            client
            for client in clients
            if client.cid not in self._partitions and self._silences[client.cid] < ASK_TIMES
        ]
        if not unknown:
            return
        log.info("asking %d nodes which partition they hold", len(unknown))
        waiting = iter(unknown)  # shared: each thread takes the next node, and none is queued

        def ask() -> dict[str, int]:
            return {client.cid: _partition_of(client) for client in waiting}

        with ThreadPoolExecutor(ASK_AT_ONCE) as pool:
            asking = [pool.submit(ask) for _ in range(min(ASK_AT_ONCE, len(unknown)))]
        for answers in asking:
            for cid, partition in answers.result().items():
                if partition == UNKNOWN:
                    self._silences[cid] += 1
                else:
                    self._partitions[cid] = partition


def _partition_of(client: ClientProxy) -> int:
    """Ask a node which partition it holds."""
    question = GetPropertiesIns(config={"ask": "partition-id"})
    try:
        answer = client.get_properties(question, timeout=ASK_SECONDS, group_id=0)
        partition = answer.properties.get("partition-id")
        if not isinstance(partition, int) or not 0 <= partition < 2**63:
            raise ValueError(f"it calls itself partition {partition!r}")
        return partition
    except Exception as error:  # it may be gone; the round will tell
        log.warning("node %s did not say which partition it holds: %s", client.cid, told(error))
        return UNKNOWN
