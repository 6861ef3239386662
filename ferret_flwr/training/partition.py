"""One client's share of the training data, by the partitioners of flwr-datasets."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable

import datasets

from ferret_flwr.config import ConfigError, DatasetConfig

from .errors import DataError
from .randomness import permutation

log = logging.getLogger(__name__)

_Load = Callable[[datasets.Dataset, DatasetConfig, int, int, int], datasets.Dataset]


def partition(
    dataset: datasets.Dataset,
    config: DatasetConfig,
    *,
    partition_id: int,
    num_partitions: int,
    seed: int,
) -> datasets.Dataset:
    """Return the share of client ``partition_id``.

    All shares are disjoint. Together they are the whole of ``dataset``, unless the partitioner is
    ``natural`` and there are more groups than clients.

    Parameters
    ----------
    dataset
        The training split of `load_examples`.
    config
        ``partitioner`` and, for dirichlet and natural, ``partition_by`` and ``alpha``.
    partition_id
        0 .. ``num_partitions`` - 1.
    num_partitions
        Number of clients.
    seed
        The run's seed, the same on every client.

    Raises
    ------
    DataError
        If the column does not exist or says nothing, or the share would be empty.
    ConfigError
        If ``partition_id`` is out of range, or the partitioner is unknown.
    """
    if not 0 <= partition_id < num_partitions:
        raise ConfigError(
            f"'partition-id' must be 0 .. {num_partitions - 1} with 'num-partitions' = "
            f"{num_partitions}, got {partition_id}"
        )
    if config.partitioner not in PARTITIONERS:
        raise ConfigError(
            f"'dataset.partitioner' must be one of {', '.join(PARTITIONERS)}, "
            f"got {config.partitioner!r}"
        )
    if len(dataset) < num_partitions:
        raise DataError(
            f"{len(dataset)} training examples cannot be divided among {num_partitions} clients"
        )
    load = PARTITIONERS[config.partitioner]
    share = load(dataset, config, partition_id, num_partitions, seed)
    if not len(share):
        raise DataError(
            f"partition {partition_id} of {num_partitions} is empty with 'dataset.partitioner' = "
            f"{config.partitioner!r} and 'dataset.alpha' = {config.alpha}; raise alpha, or use "
            "fewer clients"
        )
    return share


def _iid(
    dataset: datasets.Dataset, config: DatasetConfig, partition_id: int, clients: int, seed: int
) -> datasets.Dataset:
    from flwr_datasets.partitioner import IidPartitioner

    partitioner = IidPartitioner(clients)  # contiguous shards, hence the shuffle
    partitioner.dataset = dataset.select(permutation(len(dataset), "iid", seed))
    return partitioner.load_partition(partition_id)


def _dirichlet(
    dataset: datasets.Dataset, config: DatasetConfig, partition_id: int, clients: int, seed: int
) -> datasets.Dataset:
    from flwr_datasets.partitioner import DirichletPartitioner

    _groups(dataset, config)
    # Ten draws look for shares that are all non-empty; then empty ones are accepted, and only
    # the clients that have one fail.
    for least in (1, 0):
        partitioner = DirichletPartitioner(
            clients, config.partition_by, config.alpha, min_partition_size=least, seed=seed
        )
        partitioner.dataset = dataset
        try:
            with warnings.catch_warnings(action="ignore"):
                return partitioner.load_partition(partition_id)
        except ValueError:
            if not least:
                raise
    raise AssertionError("unreachable")


def _natural(
    dataset: datasets.Dataset, config: DatasetConfig, partition_id: int, clients: int, seed: int
) -> datasets.Dataset:
    from flwr_datasets.partitioner import NaturalIdPartitioner

    groups = _groups(dataset, config)
    if len(groups) < clients:
        raise DataError(
            f"'dataset.partitioner' = 'natural' gives each client one group of the column "
            f"{config.partition_by!r}, which has {len(groups)} groups for {clients} clients"
        )
    if len(groups) > clients:
        log.warning(
            "%d groups of the column %r for %d clients: left out are %s",
            len(groups), config.partition_by, clients, ", ".join(groups[clients:]),
        )  # fmt: skip
    partitioner = NaturalIdPartitioner(config.partition_by)
    partitioner.dataset = dataset
    with contextlib.redirect_stderr(io.StringIO()):  # its progress bar cannot be switched off
        return partitioner.load_partition(partition_id)


def _groups(dataset: datasets.Dataset, config: DatasetConfig) -> list[str]:
    """Return the sorted values of the column to divide by."""
    if config.partition_by not in dataset.column_names:
        raise DataError(
            f"there is no column 'dataset.partition-by' = {config.partition_by!r}; there are "
            f"{', '.join(dataset.column_names)}"
        )
    groups = sorted(dataset.unique(config.partition_by))
    if groups == [""]:
        raise DataError(
            f"the column 'dataset.partition-by' = {config.partition_by!r} is empty in this data; "
            "name another column, or set 'dataset.partitioner' = 'iid'"
        )
    return groups


PARTITIONERS: dict[str, _Load] = {"iid": _iid, "dirichlet": _dirichlet, "natural": _natural}
