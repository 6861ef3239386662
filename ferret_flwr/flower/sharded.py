"""`ShardedClient`: a node whose model is sharded over several processes of one machine."""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numba
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from flwr.app import ArrayRecord, ConfigRecord, Context, RecordDict
from flwr.client import NumPyClient
from flwr.common import NDArrays, Scalar
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as ProtoRecordDict

from ferret_flwr.config import ConfigError
from ferret_flwr.flower.client import FerretClient
from ferret_flwr.flower.late import failure
from ferret_flwr.flower.site import Site

Metrics = dict[str, Scalar]
Make = Callable[[Context], FerretClient]


class ShardedClient(NumPyClient):
    """A Flower client that hands each message to processes of its own, which answer together.

    They are started for the message and end with it, as the process of a ClientApp does. All do
    the same with their part of the model; if one fails, the others are ended, and the answer is
    its error. Each has a copy of ``context``: what is written to its state is lost.

    Parameters
    ----------
    make
        Returns the client, by `FerretClient.of`. Called in each process, where torch's process
        group is ready, so it must be a function of a module.
    context
        What Flower hands to ``client_fn``; ``make`` gets it.
    processes
        How many; with GPUs, the n-th uses the n-th.

    Raises
    ------
    ConfigError
        If ``processes`` is below 1, or the node-config has no ``partition-id``.
    """

    def __init__(self, make: Make, context: Context, processes: int) -> None:
        """Start nothing yet."""
        if processes < 1:
            raise ConfigError(f"'processes' of a ShardedClient must be at least 1, got {processes}")
        self.make = make
        self.context = context
        self.processes = processes
        self.partition_id = Site.partition_of(context)

    def get_properties(self, config: Metrics) -> Metrics:
        """Say which partition this is, or which base model the node has."""
        if config.get("ask") == "partition-id":
            return {"partition-id": self.partition_id}
        return self._answer("get_properties", config).metrics

    def fit(self, parameters: NDArrays, config: Metrics) -> tuple[NDArrays, int, Metrics]:
        """Train one round, see `FerretClient.fit`."""
        answer = self._answer("fit", parameters, config)
        return answer.arrays, answer.examples, answer.metrics

    def evaluate(self, parameters: NDArrays, config: Metrics) -> tuple[float, int, Metrics]:
        """Evaluate the current model, see `FerretClient.evaluate`."""
        answer = self._answer("evaluate", parameters, config)
        return answer.loss, answer.examples, answer.metrics

    def _answer(self, method: str, *arguments: Any) -> _Answer:
        """Return the answer of the first process, or the first error of any."""
        with tempfile.TemporaryDirectory() as name:  # for this account alone
            folder = Path(name)
            try:
                mp.spawn(_run, (self, folder, method, arguments), self.processes)
                answers = _read(folder, "answer")
                if len(answers) < self.processes:
                    raise RuntimeError(f"{len(answers)} of {self.processes} processes answered")
                return answers[0]
            except Exception as error:
                errors = _read(folder, "error")
                if not errors:
                    return _Answer.of(failure(error, self.partition_id))
                return min(errors, key=lambda answer: answer.time)


@dataclass(frozen=True)
class _Answer:
    """What a client has returned, whichever method it was, and when by the machine's clock."""

    time: float
    arrays: NDArrays
    loss: float
    examples: int
    metrics: Metrics

    @classmethod
    def of(cls, returned: Any) -> _Answer:
        """Take apart what a method of a `FerretClient` returns."""
        first, examples, metrics = ([], 0, returned) if isinstance(returned, dict) else returned
        arrays, loss = (first, 0.0) if isinstance(first, list) else ([], float(first))
        return cls(time.monotonic(), arrays, loss, examples, metrics)

    @classmethod
    def read(cls, path: Path) -> _Answer:
        """Read what `write` has written."""
        content = recorddict_from_proto(ProtoRecordDict.FromString(path.read_bytes()))
        numbers: dict[str, Any] = dict(content.config_records["numbers"])
        arrays = content.array_records["arrays"].to_numpy_ndarrays()
        metrics: dict[str, Any] = dict(content.config_records["metrics"])
        return cls(arrays=arrays, metrics=metrics, **numbers)

    def write(self, path: Path) -> None:
        """Write as Flower's messages are, so nothing is pickled."""
        numbers: dict[str, Any] = {"time": self.time, "loss": self.loss, "examples": self.examples}
        content = RecordDict(
            {
                "arrays": ArrayRecord(self.arrays),
                "numbers": ConfigRecord(numbers),
                "metrics": ConfigRecord(dict(self.metrics)),
            }
        )
        path.write_bytes(recorddict_to_proto(content).SerializeToString())


def _read(folder: Path, kind: str) -> list[_Answer]:
    """Return what the processes have left, that of the first one first."""
    return [_Answer.read(path) for path in sorted(folder.glob(f"*.{kind}"))]


def _run(
    rank: int, client: ShardedClient, folder: Path, method: str, arguments: tuple[Any, ...]
) -> None:
    """Answer a message together with the other processes."""
    try:
        _join(rank, client.processes, folder)
        answer = _Answer.of(getattr(client.make(client.context), method)(*arguments))
    except Exception as error:
        answer = _Answer.of(failure(error, client.partition_id))
    failed = "error" in answer.metrics
    path = folder / f"{rank}.part"
    answer.write(path)
    path.rename(path.with_suffix(".error" if failed else ".answer"))  # so nobody finds half of it
    if failed:
        sys.exit(1)
    dist.destroy_process_group()


def _join(rank: int, processes: int, folder: Path) -> None:
    """Do for a process what torchrun does, on this machine alone."""
    for key in ("RANK", "LOCAL_RANK"):
        os.environ[key] = str(rank)
    for key in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        os.environ[key] = str(processes)
    if sys.platform == "linux":  # no other machine can reach it
        for key in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            os.environ.setdefault(key, "lo")
    threads = torch.get_num_threads()
    numba.set_num_threads(max(1, numba.get_num_threads() // processes))  # sets torch's, too, once
    torch.set_num_threads(max(1, threads // processes))
    if torch.cuda.is_available():
        torch.cuda.set_device(rank)
    rendezvous = (folder / "rendezvous").as_uri()
    dist.init_process_group(init_method=rendezvous, rank=rank, world_size=processes)
