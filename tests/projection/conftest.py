"""Fixtures of the projection tests."""

import numba
import pytest


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    """Use one thread unless a test asks for more."""


@pytest.fixture(params=[1, 2])
def threads(request, _one_thread):
    """Run the test with one and with two numba threads."""
    if request.param > numba.config.NUMBA_NUM_THREADS:
        pytest.skip(f"numba has {numba.config.NUMBA_NUM_THREADS} thread on this machine")
    numba.set_num_threads(request.param)
    return request.param
