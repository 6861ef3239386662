"""Nodes of two processes, of which the first mostly waits for the second."""

import os
import sys

import numpy as np
import torch.distributed as dist
from flwr.client import NumPyClient

from tests.sharded.model import make_client


def raises(context):  # type: ignore[no-untyped-def]
    """Raise an error in the second process."""
    if dist.get_rank() == 1:
        raise ValueError("the data has gone")
    dist.barrier()


def ends(context):  # type: ignore[no-untyped-def]
    """End the second process."""
    if dist.get_rank() == 1:
        os._exit(9)
    dist.barrier()


def leaves(context):  # type: ignore[no-untyped-def]
    """End both processes as if all were well."""
    sys.exit(0)


def fails_late(context):  # type: ignore[no-untyped-def]
    """Return a client whose second process raises an error in training."""
    client = make_client(context)
    if dist.get_rank() == 1:
        client.train_model = lambda round, config: raises(context)
    return client


class Long(NumPyClient):
    """Answers with 200 kB, more than a pipe holds; the second process may fail meanwhile."""

    def __init__(self, context) -> None:  # type: ignore[no-untyped-def]
        pass

    def fit(self, parameters, config):  # type: ignore[no-untyped-def]
        if config["fails"] and dist.get_rank() == 1:
            raise ValueError("the data has gone")
        return [np.arange(50_000, dtype=np.float32)], 3, {}
