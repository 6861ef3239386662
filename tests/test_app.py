"""The app as its user starts it: `flwr run`, a private Flower home, real processes."""

import json
import os
import shutil
import socket
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoTokenizer

from ferret_flwr.cli import main
from ferret_flwr.config import parse
from ferret_flwr.ledger import Ledger
from tests.flower.test_rounds_match import plain_loop

ROOT = Path(__file__).parents[1]
APP = ("ferret_flwr", "server_app.py", "client_app.py", "pyproject.toml", "README.md", "LICENSE")
SETTINGS = {
    "num-server-rounds": 2,
    "tracking": "tensorboard",
    "train.steps": 3,
    "train.batch-size": 4,
    "evaluate.max-examples": 16,
    "evaluate.generate-examples": 4,
    "ferret.coefficients": 512,
}


class Flower:
    """A copy of the app in a folder of its own, with a local SuperLink of its own."""

    def __init__(self, home: Path) -> None:
        self.folder, self.home = home / "app", home / "flower"
        self.folder.mkdir()
        folder = self.folder
        for name in APP:
            source = ROOT / name
            if source.is_dir():
                ignored = shutil.ignore_patterns("__pycache__")
                shutil.copytree(source, folder / name, ignore=ignored)
            else:
                shutil.copy(source, folder / name)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.environment = os.environ | {
            "FLWR_HOME": str(self.home),
            "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(port),
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            "XDG_CACHE_HOME": str(home / "cache"),
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": "",
        }

    def run(self, **settings: object) -> str:
        """Run to the end and return everything printed; keys are written with their dots."""
        text = " ".join(f"{key}={json.dumps(value)}" for key, value in settings.items())
        done = subprocess.run(
            ["flwr", "run", ".", "--stream", "--run-config", text],
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=400,
            check=False,
        )
        return done.stdout + done.stderr

    def results(self) -> Path:
        """Return the newest folder of results."""
        return max((self.folder / "results").iterdir())

    def stop(self) -> None:
        """End the SuperLink and whatever it started."""
        for process in Path("/proc").glob("[0-9]*"):
            try:
                environment = (process / "environ").read_bytes()
            except OSError:
                continue
            if f"FLWR_HOME={self.home}".encode() in environment.split(b"\0"):
                os.kill(int(process.name), 9)


@pytest.fixture(scope="module")
def flower(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Flower]:
    app = Flower(tmp_path_factory.mktemp("app"))
    yield app
    app.stop()


@pytest.fixture(scope="module")
def run(flower: Flower) -> tuple[str, Path]:
    """Return what one run printed and left behind."""
    printed = flower.run(**SETTINGS)
    assert "the tuned model is in" in printed, printed[-4000:]
    return printed, flower.results()


def test_prints_one_line_a_round(run: tuple[str, Path]) -> None:
    printed, _ = run
    for number in range(SETTINGS["num-server-rounds"] + 1):
        lines = [line for line in printed.splitlines() if line.startswith(f"round   {number} ")]
        assert len(lines) == 1, printed[-4000:]
    for text in ("held-out loss", "Rouge-L", "a node sent", "FedAvg", "reconstruct", "cos"):
        assert text in lines[0]


def test_leaves_everything_behind(run: tuple[str, Path]) -> None:
    _, folder = run
    config = tomllib.loads((folder / "config.toml").read_text())
    assert config["train"]["steps"] == SETTINGS["train.steps"]
    results = json.loads((folder / "results.json").read_text())
    rounds = results["rounds"]
    assert [row["round"] for row in rounds] == [0, 1, 2]
    assert results["config"]["ferret.coefficients"] == 512
    assert results["environment"]["torch"] == torch.__version__
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    last = rounds[-1]
    assert last["nodes"] == 2
    assert last["failures"] == []
    assert 4 * 512 < last["comm/uplink_bytes_per_node"] < 4 * 512 + 2000
    assert last["comm/uplink_bytes"] == pytest.approx(2 * last["comm/uplink_bytes_per_node"], 0.1)
    for key in ("train/loss", "eval/loss", "eval/rougeL", "ferret/fidelity", "time/local_s"):
        assert np.isfinite(last[key])


def test_tensorboard_reads_what_the_results_say(run: tuple[str, Path]) -> None:
    _, folder = run
    read = EventAccumulator(str(folder / "tensorboard")).Reload()
    shown = {(tag, e.step): e.value for tag in read.Tags()["scalars"] for e in read.Scalars(tag)}
    said = {
        (name, row["round"]): np.float32(len(value) if name == "failures" else value)
        for row in json.loads((folder / "results.json").read_text())["rounds"]
        for name, value in row.items()
        if name != "round"
    }
    assert shown == said


def test_equals_a_plain_loop(run: tuple[str, Path]) -> None:
    _, folder = run
    ledger = Ledger.load(folder / "ledger.safetensors")
    expected = plain_loop(parse(SETTINGS), rounds=2)
    assert ledger.fingerprint == expected.fingerprint
    assert ledger.head == expected.head


def test_ledger_applied_is_the_final_model(run: tuple[str, Path], tmp_path: Path) -> None:
    _, folder = run
    ledger, output = str(folder / "ledger.safetensors"), tmp_path / "applied"
    arguments = ["ledger", "apply", ledger, "--base", "builtin:tiny", "--output", str(output)]
    assert main(arguments) == 0
    final = load_file(folder / "final" / "model.safetensors")
    applied = load_file(output / "model.safetensors")
    assert final.keys() == applied.keys()
    assert all(final[name].tobytes() == applied[name].tobytes() for name in final)
    AutoModelForCausalLM.from_pretrained(folder / "final")
    AutoTokenizer.from_pretrained(folder / "final")


def test_resumes_to_the_same_bits(flower: Flower, run: tuple[str, Path], tmp_path: Path) -> None:
    _, folder = run
    whole = Ledger.load(folder / "ledger.safetensors")
    half = tmp_path / "half.safetensors"
    whole.until(1).save(half)
    shutil.copy(folder / "results.json", tmp_path)
    printed = flower.run(**SETTINGS | {"ferret.resume": str(half), "evaluate.every": 0})
    assert "the server held no model" in printed, printed[-4000:]
    assert Ledger.load(flower.results() / "ledger.safetensors").head == whole.head
    rows = json.loads((flower.results() / "results.json").read_text())["rounds"]
    before = json.loads((folder / "results.json").read_text())["rounds"]
    assert [row["round"] for row in rows] == [0, 1, 2]
    assert rows[:2] == before[:2]


def test_bad_configuration_stops_before_the_first_round(flower: Flower) -> None:
    before = sorted((flower.folder / "results").glob("*"))
    printed = flower.run(**SETTINGS | {"ferret.family": "cauchy", "train.steps": 0})
    assert "'ferret.family' must be one of rademacher, truncated-normal, got 'cauchy'" in printed
    assert "'train.steps' must be at least 1, got 0" in printed
    assert "[ROUND 1]" not in printed
    assert sorted((flower.folder / "results").glob("*")) == before


def test_lean_training_runs_from_the_same_app(flower: Flower, run: tuple[str, Path]) -> None:
    printed = flower.run(**SETTINGS | {"train.memory": "lean"})
    assert "the tuned model is in" in printed, printed[-4000:]
    lines = [line for line in printed.splitlines() if line.startswith("round   2 ")]
    assert len(lines) == 1 and "project" in lines[0] and "cos" not in lines[0]
    rows, standard = (
        json.loads((folder / "results.json").read_text())["rounds"]
        for folder in (flower.results(), run[1])
    )
    for row, other in zip(rows[1:], standard[1:], strict=True):
        assert row["failures"] == []
        # float32's rounding of the coefficients, magnified by training; a round is worth far more
        assert row["eval/loss"] == pytest.approx(other["eval/loss"], rel=1e-4)
        assert "ferret/fidelity" not in row
    assert rows[2]["eval/loss"] != pytest.approx(standard[1]["eval/loss"], rel=1e-4)


def test_fedavg_runs_from_the_same_app(flower: Flower) -> None:
    printed = flower.run(**SETTINGS | {"method": "fedavg", "num-server-rounds": 1})
    assert "the tuned model is in" in printed, printed[-4000:]
    last = json.loads((flower.results() / "results.json").read_text())["rounds"][-1]
    assert last["comm/uplink_bytes_per_node"] > 4 * 110_000
    assert last["comm/downlink_bytes_per_node"] > 4 * 110_000


def test_server_without_evaluation_needs_no_torch(tmp_path: Path) -> None:
    """Build the server and publish a round with torch and transformers blocked."""
    script = """
import sys
sys.modules.update(dict.fromkeys(["torch", "transformers", "datasets", "matplotlib"]))
import numpy as np
from ferret_flwr.flower.serverapp import Run
from ferret_flwr.config import parse
from ferret_flwr.ledger import Header, Ledger
run = Run(parse({"evaluate.every": 0, "results-dir": sys.argv[1]}))
run.components()
coordinator = run.strategy.coordinator
coordinator.begin(Ledger(Header("0" * 16, 100_000, "1" * 16)))
assert coordinator.publish(np.ones(coordinator.next_round().num_coefficients), [])
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (ledger,) = tmp_path.glob("*/ledger.safetensors")
    assert len(Ledger.load(ledger)) == 1
