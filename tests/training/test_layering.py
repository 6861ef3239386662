"""The package trains without Flower: no module of it imports flwr or ray."""

from __future__ import annotations

import pkgutil
import subprocess
import sys
from pathlib import Path

import ferret_flwr.training

SCRIPT = """
import importlib, sys
for blocked in ("flwr", "ray"):
    sys.modules[blocked] = None  # importing it raises
for name in {modules}:
    importlib.import_module("ferret_flwr.training." + name)
from ferret_flwr.config import DatasetConfig
from ferret_flwr.training.data import load_examples
from ferret_flwr.training.partition import partition
for partitioner in ("iid", "dirichlet", "natural"):
    config = DatasetConfig(partitioner=partitioner)
    train = load_examples(config, seed=0).train
    partition(train, config, partition_id=0, num_partitions=2, seed=0)
"""


def test_no_flower_in_sight():
    modules = [module.name for module in pkgutil.iter_modules(ferret_flwr.training.__path__)]
    script = SCRIPT.format(modules=modules)
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_nothing_seeds_the_global_generator():
    for file in Path(ferret_flwr.training.__path__[0]).glob("*.py"):
        assert "manual_seed" not in file.read_text(), file
