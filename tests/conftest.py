"""What tests of several folders need."""

from collections.abc import Iterator

import numba
import pytest
import torch


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Waking another thread costs more than small arrays do."""
    before = numba.get_num_threads(), torch.get_num_threads()
    numba.set_num_threads(1)
    torch.set_num_threads(1)
    yield
    numba.set_num_threads(before[0])
    torch.set_num_threads(before[1])
