"""Measurements of the project's own claims: ``python -m benchmarks`` lists and runs them."""

import ferret_flwr  # noqa: F401  # before numba, which it gives this process's share of threads
