"""Measurements of the project's own claims: run one with `python -m benchmarks.NAME`."""
