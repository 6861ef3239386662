"""Nodes of two processes, of which the first waits for the second."""

import os

import torch.distributed as dist


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
