"""What can go wrong in local training, one class per cause a caller may want to catch."""

from __future__ import annotations


class DataError(ValueError):
    """A file, a row or a column of the data cannot be used."""


class ModelError(ValueError):
    """`model.name` cannot be loaded, or cannot be used as it is."""


class NonFiniteLossError(ValueError):
    """A loss or gradient norm is NaN or infinite; the step it belongs to was not applied."""
