"""How many threads the kernels take, and that torch keeps its share."""

import os
import subprocess
import sys

import pytest

SCRIPT = """
import torch

from ferret_flwr.projection.layout import Layout
from ferret_flwr.projection.projection import fingerprint

import numba
import numpy as np

before = torch.get_num_threads()
fingerprint([np.ones(1000, np.float32)], Layout(("weight",), ((1000,),)))
print(numba.get_num_threads(), before, torch.get_num_threads())
"""
ALL = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


@pytest.mark.parametrize(
    ("environment", "threads"),
    [
        ({"OMP_NUM_THREADS": "1"}, 1),
        ({"OMP_NUM_THREADS": "1,2"}, 1),  # of nested loops
        ({"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "2"}, 2),  # numba's own word counts
        ({}, ALL),
    ],
)
def test_kernels_keep_to_a_process_s_share(environment, threads):
    inherited = {k: v for k, v in os.environ.items() if not k.endswith("_NUM_THREADS")}
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env=inherited | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    ours, before, after = map(int, result.stdout.split())
    assert ours == threads
    if environment.keys() == {"OMP_NUM_THREADS"}:
        assert before == after == threads
