"""What tests of several folders need."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import numba
import pytest
import torch

if not torch.cuda.is_available():  # before Triton is imported, which torch does not do
    os.environ.setdefault("TRITON_INTERPRET", "1")


@contextmanager
def _single() -> Iterator[None]:
    before = numba.get_num_threads(), torch.get_num_threads()
    numba.set_num_threads(1)
    torch.set_num_threads(1)
    yield
    numba.set_num_threads(before[0])
    torch.set_num_threads(before[1])


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Waking another thread costs more than small arrays do."""
    with _single():
        yield


@pytest.fixture(scope="module")
def one_thread_a_module() -> Iterator[None]:
    """Keep one thread for what the tests of a module share, too."""
    with _single():
        yield
