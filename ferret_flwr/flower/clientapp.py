"""From the configurations of a run and a node to the client that answers one message."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flwr.app import Context
from flwr.client import Client, NumPyClient
from flwr.common import Scalar

from ferret_flwr import memory
from ferret_flwr.config import Config, ConfigError
from ferret_flwr.flower.cache import LedgerCache
from ferret_flwr.flower.late import LateClient
from ferret_flwr.flower.site import Site
from ferret_flwr.report import show_progress

if TYPE_CHECKING:  # torch is imported when there is something to train
    from ferret_flwr.training.lean import Applied


def client(context: Context) -> Client:
    """Return the client of the node that ``context`` describes, see `Site`."""
    show_progress()
    method = str(context.run_config.get("method", Config().method))
    return LateClient(
        lambda: _node_client(context, Site.of(context)),
        Site.partition_of(context),
        answers_errors=method == "ferret",
    ).to_client()


def _node_client(context: Context, site: Site) -> NumPyClient:
    """Load model and data, and return the client of the run's method."""
    from ferret_flwr.flower.client import FerretClient
    from ferret_flwr.flower.comparison import MethodClient
    from ferret_flwr.methods.registry import METHODS
    from ferret_flwr.training.worker import Node

    config = site.config
    asked = context.run_config.get("method", config.method)
    if asked != config.method:
        raise ConfigError(f"this node takes part in '{config.method}' only, the run is '{asked}'")
    if config.method in METHODS:
        method = METHODS[config.method]
        config = method.configured(config)
        node = Node.of(config, site.partition_id, site.num_partitions, method.adapter)
        return MethodClient(method(config, node.worker), node)
    lean = config.train.memory == "lean"
    if lean:
        memory.return_large_blocks()
    node = Node.of(config, site.partition_id, site.num_partitions)

    def train(
        round: int, _: dict[str, Scalar], applied: Applied | None = None
    ) -> tuple[int, dict[str, Scalar]]:
        result = node.train(round, applied)
        return len(node.examples), {"train/loss": result.loss}

    def evaluate(round: int, _: dict[str, Scalar]) -> tuple[float, int, dict[str, Scalar]]:
        metrics = node.evaluate()
        return metrics.pop("loss"), len(node.held_out), dict(metrics)

    return FerretClient(
        node.worker.parameters,
        train,
        node.worker.in_place if lean else node.worker.follower,
        LedgerCache.of(context, config.ferret.cache_dir, snapshots=config.ferret.snapshots),
        evaluate=evaluate,
        partition_id=site.partition_id,
        most_coefficients=config.ferret.coefficients,
    )
