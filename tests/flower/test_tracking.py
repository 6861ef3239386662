"""What the tools show of a run is what ``results.json`` says, however the run ends."""

import json
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import api_pb2
from tensorboard.plugins.hparams.metadata import parse_session_end_info_plugin_data as end_of
from tensorboard.plugins.hparams.metadata import parse_session_start_info_plugin_data as start_of

from ferret_flwr.config import TRACKERS, Config, ConfigError, flatten, parse
from ferret_flwr.flower.serverapp import Run
from ferret_flwr.tracking import TRACKERS as REGISTRY
from ferret_flwr.tracking import Tracking, metrics_of
from tests.flower.conftest import SETTINGS, Federation

Curves = dict[str, dict[int, float]]  # metric -> round -> value
FEW = {"num-server-rounds": 2, "evaluate.max-examples": 8, "evaluate.generate-examples": 2}
ROW = {"round": 3, "eval/loss": 0.5, "nodes": 2, "failures": ["node 1: late"], "note": "text"}


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_MODE", "WANDB_PROJECT", "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def start(tmp_path: Path) -> Callable[..., Run]:
    """Return what prepares a run with these settings."""

    def start(**settings: object) -> Run:
        return Run(parse(SETTINGS | FEW | {"results-dir": str(tmp_path / "results")} | settings))

    return start


def serve(run: Run, federation: Federation) -> None:
    """Run Flower's own loop on the run's own server."""
    components = run.components()
    server = components.server
    for proxy in federation.proxies:
        server.client_manager().register(proxy)
    server.set_max_workers(1)  # the nodes share one model
    server.fit(components.config.num_rounds, timeout=None)


def results(run: Run) -> Curves:
    """Return the numbers of ``results.json``."""
    curves: Curves = {}
    for row in json.loads((run.folder / "results.json").read_text())["rounds"]:
        for name, value in row.items():
            if name != "round":
                number = len(value) if name == "failures" else value
                curves.setdefault(name, {})[row["round"]] = number
    return curves


def events(run: Run) -> EventAccumulator:
    return EventAccumulator(str(run.folder / "tensorboard"), size_guidance={"scalars": 0}).Reload()


def shown(run: Run) -> Curves:
    """Return what TensorBoard reads."""
    read = events(run)
    return {t: {e.step: e.value for e in read.Scalars(t)} for t in read.Tags()["scalars"]}


def in_float32(curves: Curves) -> Curves:
    return {t: {r: float(np.float32(v)) for r, v in c.items()} for t, c in curves.items()}


def status(run: Run) -> int:
    """Return how TensorBoard says that the run ended."""
    content = events(run).summary_metadata["_hparams_/session_end_info"].plugin_data.content
    return end_of(content).status


def test_the_key_names_what_there_is() -> None:
    assert tuple(REGISTRY) == TRACKERS


def test_numbers_are_kept_and_failures_counted() -> None:
    assert metrics_of(ROW) == {"eval/loss": 0.5, "nodes": 2.0, "failures": 1.0}


def test_tensorboard_shows_every_number(start: Callable[..., Run], federation: Federation) -> None:
    run = start(tracking="tensorboard")
    serve(run, federation)
    curves = results(run)
    assert curves["eval/loss"].keys() == {0, 1, 2}
    assert curves["train/loss"].keys() == {1, 2}
    assert shown(run) == in_float32(curves)
    assert status(run) == api_pb2.STATUS_SUCCESS
    content = events(run).summary_metadata["_hparams_/session_start_info"].plugin_data.content
    values = {key: value for key, value in start_of(content).hparams.items()}
    told = {key: getattr(value, value.WhichOneof("kind")) for key, value in values.items()}
    assert told == flatten(run.config)


def test_a_resumed_run_goes_on_at_its_round(
    start: Callable[..., Run], federation: Federation
) -> None:
    first = start()
    serve(first, federation)
    assert not (first.folder / "tensorboard").exists()
    second = start(
        **{"tracking": "tensorboard", "ferret.resume": str(first.folder), "num-server-rounds": 3}
    )
    serve(second, federation)
    curves = shown(second)
    assert list(curves["eval/loss"]) == [0, 1, 2, 3]
    assert curves == in_float32(results(second))


def test_a_failed_run_says_so(start: Callable[..., Run], federation: Federation) -> None:
    def fit(ins, timeout, group_id):  # type: ignore[no-untyped-def]
        raise ConnectionError("gone")

    for proxy in federation.proxies:
        proxy.fit = fit  # type: ignore[method-assign]
    run = start(tracking="tensorboard")
    with pytest.raises(RuntimeError, match="no round was published"):
        serve(run, federation)
    assert status(run) == api_pb2.STATUS_FAILURE
    assert shown(run) == in_float32(results(run))
    assert shown(run)["failures"] == {1: 2.0, 2: 2.0}


def test_a_tool_that_fails_costs_its_curves_only(
    start: Callable[..., Run], federation: Federation, caplog: pytest.LogCaptureFixture
) -> None:
    run = start(tracking="tensorboard")
    run.tracking.trackers["tensorboard"].writer.close()  # type: ignore[attr-defined]
    serve(run, federation)
    assert results(run)["eval/loss"].keys() == {0, 1, 2}
    assert [text for text in caplog.messages if "no more rows" in text] == [
        "tensorboard gets no more rows: Writer is closed"
    ]


@pytest.mark.parametrize("name", TRACKERS)
def test_a_missing_package_is_told_at_the_door(
    start: Callable[..., Run], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError) as caught:
        start(tracking=name)
    assert str(caught.value) == (
        f"'tracking' = '{name}' needs what is not installed: pip install 'ferret-flwr[{name}]'"
    )
    assert not (tmp_path / "results").exists()


def test_a_tool_that_cannot_start_stops_the_run_and_ends_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nowhere://")
    with pytest.raises(ConfigError, match="'tracking' = 'mlflow' cannot start: .*nowhere"):
        Tracking(["tensorboard", "mlflow"], tmp_path, flatten(Config()))
    read = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert "_hparams_/session_end_info" in read.summary_metadata


def test_mlflow_shows_every_number(start: Callable[..., Run], federation: Federation) -> None:
    mlflow = pytest.importorskip("mlflow")
    run = start(tracking="mlflow")
    serve(run, federation)
    client = mlflow.MlflowClient(f"sqlite:///{run.folder / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("ferret-flwr")
    (kept,) = client.search_runs([experiment.experiment_id])
    assert kept.info.run_name == run.folder.name
    assert kept.info.status == "FINISHED"
    assert kept.data.params == {key: str(value) for key, value in flatten(run.config).items()}
    curves = {
        name: {m.step: m.value for m in client.get_metric_history(kept.info.run_id, name)}
        for name in kept.data.metrics
    }
    assert curves == results(run)


def log_records(path: Path) -> Iterator[bytes]:
    """Yield what W&B wrote: LevelDB's log format behind seven bytes of its own."""
    content, at, parts = path.read_bytes(), 7, b""
    while at < len(content):
        left = 2**15 - at % 2**15  # in this block; no header spans two
        if left < 7:
            at += left
            continue
        _, length, kind = struct.unpack_from("<IHB", content, at)
        parts += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or its last part
            yield parts
            parts = b""


def test_wandb_keeps_every_number_offline(
    start: Callable[..., Run], federation: Federation
) -> None:
    pytest.importorskip("wandb")
    from wandb.proto.wandb_internal_pb2 import Record

    run = start(tracking="wandb")
    serve(run, federation)
    (path,) = run.folder.glob("wandb/offline-run-*/run-*.wandb")
    records = [Record.FromString(content) for content in log_records(path)]
    told = {u.key: json.loads(u.value_json) for r in records for u in r.run.config.update}
    assert flatten(run.config).items() <= told.items()
    curves: Curves = {}
    for record in records:
        items = {i.key or i.nested_key[0]: json.loads(i.value_json) for i in record.history.item}
        for name, value in items.items():
            if not name.startswith("_"):  # its own
                curves.setdefault(name, {})[items["_step"]] = value
    assert curves == results(run)
    assert [r.exit.exit_code for r in records if r.HasField("exit")] == [0]
