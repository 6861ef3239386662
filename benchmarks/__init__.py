"""Measurements of the project's own claims: ``python -m benchmarks`` lists and runs them."""
