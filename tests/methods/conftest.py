"""What all tests of the methods need: one thread, and the process's worker for themselves."""

import pytest

from ferret_flwr.methods.fedkseed import rebuild
from ferret_flwr.methods.fetchsgd import sparse_model
from ferret_flwr.training import worker as workers


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    """Let every test here run in one thread."""


@pytest.fixture(autouse=True)
def _own_worker():
    """Keep the worker, which these tests move, from other tests."""
    caches = workers.worker, rebuild, sparse_model
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()
