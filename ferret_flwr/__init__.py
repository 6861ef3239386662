"""Ferret on Flower: federated full-parameter tuning of language models in kilobytes a round."""

__version__ = "0.1.0"
