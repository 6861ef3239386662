"""A run's curves in the tools that people watch them with, beside ``results.json``.

Each tool is an extra of the same name and is imported only where the key ``tracking`` names it.
What they write stays in the run's folder and nothing goes over a network, unless the tool's own
environment variables say so.
"""

from __future__ import annotations

import logging
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any

from ferret_flwr.config import ConfigError, Scalar

log = logging.getLogger(__name__)

PROJECT = "ferret-flwr"  # what a run belongs to in tools that group them, unless it is said


class Tracker(ABC):
    """One tool, open for one run.

    Parameters
    ----------
    folder
        The run's folder; its name is the run's.
    settings
        The resolved configuration as flat keys, which the tool shows as hyper-parameters.
    """

    @abstractmethod
    def __init__(self, folder: Path, settings: Mapping[str, Scalar]) -> None:
        """Start the run."""

    @abstractmethod
    def log(self, round: int, metrics: Mapping[str, float]) -> None:
        """Keep the metrics of a round, at once, so that they outlive this process."""

    @abstractmethod
    def close(self, *, failed: bool) -> None:
        """End the run."""


class TensorBoard(Tracker):
    """An event file in ``tensorboard/``, written without torch."""

    def __init__(self, folder: Path, settings: Mapping[str, Scalar]) -> None:
        """Write the hyper-parameters."""
        from tensorboard.plugins.hparams.summary_v2 import hparams_pb
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self.writer = EventFileWriter(str(folder / "tensorboard"))
        self._write(hparams_pb(dict(settings), trial_id=folder.name))

    def log(self, round: int, metrics: Mapping[str, float]) -> None:
        """Write scalars, which TensorBoard holds in float32."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=name, simple_value=value) for name, value in metrics.items()]
        self._write(Summary(value=values), round)

    def close(self, *, failed: bool) -> None:
        """Write how the run ended."""
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2

        end = plugin_data_pb2.SessionEndInfo(
            status=api_pb2.STATUS_FAILURE if failed else api_pb2.STATUS_SUCCESS,
            end_time_secs=time.time(),
        )
        content = plugin_data_pb2.HParamsPluginData(session_end_info=end)
        value = Summary.Value(
            tag=metadata.SESSION_END_INFO_TAG, metadata=metadata.create_summary_metadata(content)
        )
        self._write(Summary(value=[value]))
        self.writer.close()

    def _write(self, summary: Any, step: int = 0) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        self.writer.add_event(Event(wall_time=time.time(), step=step, summary=summary))
        self.writer.flush()


class WeightsAndBiases(Tracker):
    """An offline run in ``wandb/``, for ``wandb sync``; WANDB_MODE=online sends it as it goes."""

    def __init__(self, folder: Path, settings: Mapping[str, Scalar]) -> None:
        """Start the run; take neither this process's output nor its code."""
        mode: Any = os.environ.get("WANDB_MODE", "offline")
        if mode != "online":  # or it looks its server up to tell how it is used
            os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=folder.name,
            dir=folder,
            config=dict(settings),
            mode=mode,
            settings=wandb.Settings(console="off", disable_git=True, disable_code=True),
        )

    def log(self, round: int, metrics: Mapping[str, float]) -> None:
        """Send a row to W&B's own process, which writes it."""
        self.run.log(dict(metrics), step=round, commit=True)

    def close(self, *, failed: bool) -> None:
        """Wait until everything is written."""
        self.run.finish(exit_code=int(failed))


class MLflow(Tracker):
    """A run in ``mlflow.db``, or wherever MLFLOW_TRACKING_URI says."""

    def __init__(self, folder: Path, settings: Mapping[str, Scalar]) -> None:
        """Write the hyper-parameters."""
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        from mlflow import MlflowClient
        from mlflow.entities import Param

        store = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{folder / 'mlflow.db'}"
        self.client = MlflowClient(tracking_uri=store)
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        known = self.client.get_experiment_by_name(name)
        experiment = known.experiment_id if known else self.client.create_experiment(name)
        self.run = self.client.create_run(experiment, run_name=folder.name).info.run_id
        params = [Param(key, str(value)) for key, value in settings.items()]
        for first in range(0, len(params), 100):  # as many as a request may hold
            self.client.log_batch(self.run, params=params[first : first + 100])

    def log(self, round: int, metrics: Mapping[str, float]) -> None:
        """Write a row."""
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        rows = [Metric(name, value, now, round) for name, value in metrics.items()]
        self.client.log_batch(self.run, metrics=rows)

    def close(self, *, failed: bool) -> None:
        """Write how the run ended."""
        self.client.set_terminated(self.run, "FAILED" if failed else "FINISHED")


TRACKERS: dict[str, type[Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
    "mlflow": MLflow,
}


def check_installed(names: Iterable[str]) -> None:
    """Look for the packages of ``names``, keys of ``TRACKERS``; import nothing.

    Raises
    ------
    ConfigError
        Naming what is missing and how to install it.
    """
    missing = [name for name in names if find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"'tracking' = '{' '.join(missing)}' needs what is not installed: "
            f"pip install 'ferret-flwr[{','.join(missing)}]'"
        )


def metrics_of(row: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of a round's row by their own names; failures are counted."""
    numbers = {name: value for name, value in row.items() if isinstance(value, int | float)}
    numbers |= {"failures": len(row["failures"])} if "failures" in row else {}
    return {name: float(value) for name, value in numbers.items() if name != "round"}


class Tracking:
    """The tools of one run. One that fails gets no more rows, and the run goes on.

    As a context it closes them, telling them whether the run has failed.

    Parameters
    ----------
    names
        Keys of ``TRACKERS``.
    folder, settings
        As of a `Tracker`.
    """

    def __init__(self, names: Iterable[str], folder: Path, settings: Mapping[str, Scalar]) -> None:
        """Open the tools.

        Raises
        ------
        ConfigError
            If one cannot be opened, with its reason.
        """
        self.trackers: dict[str, Tracker] = {}
        for name in names:
            try:
                self.trackers[name] = TRACKERS[name](folder, settings)
            except Exception as error:
                self._close_all(failed=True)
                raise ConfigError(f"'tracking' = '{name}' cannot start: {error}") from error

    def log(self, row: Mapping[str, Any]) -> None:
        """Hand a round's row to each tool."""
        for name, tracker in list(self.trackers.items()):
            try:
                tracker.log(row["round"], metrics_of(row))
            except Exception as error:
                log.error("%s gets no more rows: %s", name, error)
                self._close(name, failed=True)

    def __enter__(self) -> Tracking:
        """Return itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the tools."""
        self._close_all(failed=kind is not None)

    def _close_all(self, *, failed: bool) -> None:
        for name in list(self.trackers):
            self._close(name, failed=failed)

    def _close(self, name: str, *, failed: bool) -> None:
        try:
            self.trackers.pop(name).close(failed=failed)
        except Exception as error:
            log.error("%s did not end well: %s", name, error)
