"""Ordinary Flower projects, then the same with two lines more: what is learned, what is sent."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
RUN = Path(__file__).parents[1] / "plugin" / "run_project.py"
PROJECTS = ("image-classifier", "message-api", "hf-trainer")
ROUNDS, NODES = 2, 2


def run(folder: Path) -> dict[str, list]:
    """Run the project in ``folder`` in a process of its own."""
    done = subprocess.run(
        [sys.executable, str(RUN), str(folder / "cache"), str(NODES), str(ROUNDS)],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", PROJECTS)
def test_two_lines_learn_the_same_in_a_fraction_of_the_bytes(name, tmp_path):
    ordinary, plugged = tmp_path / "ordinary", tmp_path / "plugged"
    for folder in (ordinary, plugged):
        shutil.copytree(EXAMPLES / name, folder)
    diff = (plugged / "ferret.diff").read_bytes()
    subprocess.run(["patch", "--strip=1"], cwd=plugged, input=diff, check=True)
    fedavg, ferret = run(ordinary), run(plugged)

    start, *_, end = fedavg["losses"]
    assert len(ferret["losses"]) == len(fedavg["losses"]) == 1 + ROUNDS
    assert ferret["losses"][0] == start  # before the first round it is the same model
    assert start - end > 0.2
    assert start - ferret["losses"][-1] > 0.85 * (start - end)

    def most_up(result):
        return max(up for kind, _, up in result["bytes"] if kind == "train")

    assert most_up(ferret) < most_up(fedavg) / 5
    asked_first = 2 * NODES  # requests: each node asks for the initial arrays, and gets them
    later = [down for kind, down, _ in ferret["bytes"] if kind == "train"][asked_first:]
    assert len(later) == (ROUNDS - 1) * NODES
    assert max(later) < most_up(fedavg) / 5


def test_the_diff_is_two_lines_and_their_imports():
    for name in PROJECTS:
        lines = (EXAMPLES / name / "ferret.diff").read_text().splitlines()
        added = [line[1:].strip() for line in lines if line[0] == "+" and line[:3] != "+++"]
        removed = [line for line in lines if line[0] == "-" and line[:3] != "---"]
        imports = [line for line in added if line.startswith("from ferret_flwr.flower import")]
        assert len(imports) == 2 and len(added) == 4 and len(removed) == 2
