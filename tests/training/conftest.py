"""The built-in model and data, shared by the tests of `ferret_flwr.training`."""

from __future__ import annotations

import pytest
import torch

from ferret_flwr.config import DatasetConfig, ModelConfig
from ferret_flwr.training.data import Split, load_examples
from ferret_flwr.training.models import LanguageModel, load_model
from ferret_flwr.training.tokenizer import tiny_tokenizer


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Small matrices on a shared machine: threads would wait for each other, not work."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="session")
def split() -> Split:
    return load_examples(DatasetConfig(), seed=7)


@pytest.fixture
def lm() -> LanguageModel:
    return load_model(ModelConfig())
