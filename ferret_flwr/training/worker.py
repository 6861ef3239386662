"""What a process keeps in memory: a model, its replica, and the data of the nodes it serves."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch

from ferret_flwr.config import AdapterConfig, Config, DatasetConfig, ModelConfig
from ferret_flwr.follower import Follower
from ferret_flwr.projection.arrays import Array
from ferret_flwr.projection.layout import Layout
from ferret_flwr.projection.projection import fingerprint
from ferret_flwr.replica import Replica
from ferret_flwr.training.adapters import adapted
from ferret_flwr.training.data import Examples, Split, Tokens, load_examples
from ferret_flwr.training.errors import DataError, ModelError
from ferret_flwr.training.evaluation import evaluate
from ferret_flwr.training.in_place import InPlaceFollower, versions
from ferret_flwr.training.lean import Applied
from ferret_flwr.training.local import LocalResult, local_batches, train_locally
from ferret_flwr.training.models import LanguageModel, load_model, stored_tensors
from ferret_flwr.training.optimizers import check_optimizer
from ferret_flwr.training.partition import partition
from ferret_flwr.training.tensors import (
    as_array,
    devices_of,
    masters_in_turn,
    masters_of,
    masters_on,
    placed,
    trainable_parameters,
)

log = logging.getLogger(__name__)

PROGRESS_SECONDS = 5.0
OFFLOADED = ("cpu", "disk")  # to where accelerate leaves what a GPU has no room for


class Progress:
    """Says every few seconds that it is time to tell how far a long work is."""

    def __init__(self) -> None:
        """Start the clock."""
        self._last = time.monotonic()

    def due(self) -> bool:
        """Return whether it is time, and start the clock again if so."""
        due = time.monotonic() - self._last > PROGRESS_SECONDS
        if due:
            self._last = time.monotonic()
        return due


class Worker:
    """One language model in this process and the canonical parameters behind it.

    Parameters
    ----------
    config
        Which model.
    adapter, settings
        A kind of ``adapters.ADAPTERS`` to tune in place of the model's own parameters; "" for none.
    device
        Where the replica is to live as torch tensors; by default each of them is where the model's
        is if that is a GPU, and in host memory as a NumPy array if not.
    """

    def __init__(
        self,
        config: ModelConfig,
        adapter: str = "",
        settings: AdapterConfig | None = None,
        device: torch.device | None = None,
    ) -> None:
        """Load the base model."""
        self.config = config
        self.lm: LanguageModel = load_model(config)
        self.model_size = sum(p.numel() for p in trainable_parameters(self.lm.model).values())
        self.adapter = adapter
        self._fingerprint = _fingerprint_of(self.lm) if adapter else ""
        if adapter:
            self.lm = adapted(self.lm, adapter, settings or AdapterConfig())
        _place(self.lm.model, config.device)
        self.parameters = trainable_parameters(self.lm.model)
        self.layout = Layout.of(self.parameters)
        self.devices = [device] * len(self.parameters) if device else devices_of(self.parameters)
        self.follower = Follower(
            self.layout, self._base, config.dtype, lambda arrays: placed(arrays, self.devices)
        )
        self.in_place = InPlaceFollower(self.layout, self.parameters, self._bases, config.dtype)
        self._versions_of_base = versions(self.parameters)
        self._splits: dict[tuple[DatasetConfig, int], Split] = {}

    @property
    def base_fingerprint(self) -> str:
        """Return the fingerprint of the base model, without the adapter."""
        self._fingerprint = self._fingerprint or fingerprint(self._base(), self.layout)
        return self._fingerprint

    def _base(self) -> list[Array]:
        """Return m_0, from the model if it is still there."""
        assert not self.adapter, "what an adapter starts from is nowhere to be loaded"
        if self._at_base():
            return masters_on(self.parameters, self.devices)
        return masters_on(trainable_parameters(load_model(self.config).model), self.devices)

    def _at_base(self) -> bool:
        """Return whether nobody has written to the model."""
        return versions(self.parameters) == self._versions_of_base

    def _bases(self) -> Iterator[Callable[[], Iterator[np.ndarray]]]:
        """Yield ways to read m_0 tensor by tensor: from the model, its file, or a new model."""
        assert not self.adapter, "what an adapter starts from is nowhere to be loaded"
        if self._at_base():
            yield lambda: masters_in_turn(self.parameters.values())
        if (stored := stored_tensors(self.config, self.parameters)) is not None:
            yield lambda: masters_in_turn(stored)
        yield lambda: masters_in_turn(trainable_parameters(load_model(self.config).model).values())

    def split(self, dataset: DatasetConfig, seed: int) -> Split:
        """Return the examples to train on and the held-out ones, read once."""
        key = dataset, seed
        if key not in self._splits:
            self._splits[key] = load_examples(dataset, seed=seed, tokenizer=self.lm.tokenizer)
        return self._splits[key]


def _fingerprint_of(lm: LanguageModel) -> str:
    parameters = trainable_parameters(lm.model)
    return fingerprint(masters_of(parameters), Layout.of(parameters))


def _place(model: torch.nn.Module, device: str) -> None:
    """Move ``model`` to ``device``, or raise `ModelError` naming the key."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        if device == "balanced":
            _balance(model)
        else:
            model.to(device)
    except (RuntimeError, AssertionError, ImportError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ModelError(f"'model.device' = {device!r} cannot be used: {reason}") from error


def _balance(model: torch.nn.Module) -> None:
    """Spread ``model`` over all GPUs, whole layers each, as ``device_map="balanced"`` does."""
    from accelerate import dispatch_model, infer_auto_device_map
    from accelerate.utils import get_balanced_memory

    if not torch.cuda.is_available():
        model.to("cpu")
        return
    kept = list(getattr(model, "_no_split_modules", None) or ())
    memory = get_balanced_memory(model, no_split_module_classes=kept)
    where = infer_auto_device_map(model, max_memory=memory, no_split_module_classes=kept)
    if left := {n for n, at in where.items() if at in OFFLOADED}:
        raise RuntimeError(f"the GPUs have no room for {', '.join(sorted(left))}")
    dispatch_model(model, where)


@lru_cache(maxsize=1)
def worker(config: ModelConfig, adapter: str = "", settings: AdapterConfig | None = None) -> Worker:
    """Return the worker that all nodes of this process share."""
    return Worker(config, adapter, settings)


def _for_node(config: DatasetConfig, num_partitions: int | None) -> DatasetConfig:
    """Return ``config`` without what the server alone evaluates on, and what divides the data."""
    if num_partitions is None:
        return replace(config, test_name="", holdout=0.0, partitioner="iid")
    return replace(config, test_name="", holdout=0.0) if config.test_name else config


@dataclass(frozen=True)
class Node:
    """One partition of the data with the process's model.

    Attributes
    ----------
    worker, examples
        The model, and the node's training examples.
    held_out
        The share of its examples that the node does not train on but evaluates on; empty unless
        nodes evaluate.
    config, partition_id
        The run, and which of its partitions.
    """

    worker: Worker
    examples: Examples
    held_out: Examples
    config: Config
    partition_id: int

    @classmethod
    def of(
        cls, config: Config, partition_id: int, num_partitions: int | None, adapter: str = ""
    ) -> Node:
        """Load model and data of one partition, or all data if there are no partitions.

        Raises
        ------
        ConfigError, ModelError, DataError
            Naming what is wrong.
        """
        check_optimizer(config.train)
        shared = worker(config.model, adapter, config.adapter) if adapter else worker(config.model)
        examples = partition(
            shared.split(_for_node(config.dataset, num_partitions), config.seed).train,
            config.dataset,
            partition_id=partition_id,
            num_partitions=num_partitions,
            seed=config.seed,
        )
        share = config.dataset.holdout if config.strategy.fraction_evaluate else 0.0
        count = round(share * len(examples))
        if count == len(examples) or (share and not count):
            raise DataError(
                f"partition {partition_id} has {len(examples)} examples, of which "
                f"'dataset.holdout' = {share} leaves none to train or none to evaluate on"
            )
        return cls(
            shared,
            examples[count:],
            examples[:count],
            config,
            partition_id,
        )

    def train(self, round: int, applied: Applied | None = None) -> LocalResult:
        """Train the worker's model in place for one round, showing how far it is.

        Parameters
        ----------
        round
            From 1.
        applied
            Is told each step if ``train.memory`` is ``"lean"``.
        """
        progress = Progress()

        def show(step: int, steps: int, loss: float) -> None:
            if step < steps and progress.due():
                log.info(
                    "round %d, partition %d: step %d of %d, loss %.3f",
                    round,
                    self.partition_id,
                    step,
                    steps,
                    loss,
                )

        return train_locally(
            self.worker.lm.model,
            self.examples,
            self.worker.lm.tokenizer,
            self.config.train,
            too_long=self.config.dataset.too_long,
            seed=self.config.seed,
            partition_id=self.partition_id,
            round=round,
            num_rounds=self.config.num_server_rounds,
            progress=show,
            applied=applied,
        )

    def batches(self, round: int) -> Iterator[tuple[list[Tokens], int]]:
        """Yield what each step of a round learns from, see `local_batches`."""
        return local_batches(
            self.examples,
            self.worker.lm.tokenizer,
            self.config.train,
            self.config.dataset.too_long,
            seed=self.config.seed,
            partition_id=self.partition_id,
            round=round,
        )

    def evaluate(self) -> dict[str, float]:
        """Evaluate the worker's model on the node's own held-out examples."""
        return score(self.worker.lm, self.held_out, self.config)


def score(lm: LanguageModel, examples: Examples, config: Config) -> dict[str, float]:
    """Evaluate ``lm`` as ``config`` says, showing how far it is."""
    progress = Progress()

    def show(done: int, total: int) -> None:
        if done < total and progress.due():
            log.info("evaluating: %d of %d examples", done, total)

    return evaluate(
        lm,
        examples,
        config.evaluate,
        seq_length=config.train.seq_length,
        too_long=config.dataset.too_long,
        progress=show,
    )


def live_replica(worker: Worker) -> Replica:
    """Return a replica of its own for a server that only evaluates and saves.

    A float32 model is its own master, so nothing is copied: the replica moves the model.
    """
    parameters = worker.parameters.values()
    if all(p.dtype == torch.float32 and p.is_contiguous() for p in parameters):
        for parameter in parameters:  # torch does not see what the replica writes
            torch.autograd.graph.increment_version(parameter)
        tensors = [p.detach() for p in parameters]
        arrays = [
            tensor if device else as_array(tensor)
            for tensor, device in zip(tensors, worker.devices, strict=True)
        ]
        return Replica(worker.layout, arrays, worker.config.dtype)
    masters = masters_on(worker.parameters, worker.devices)
    return Replica(worker.layout, masters, worker.config.dtype)
