"""A small language model of Python's documentation. It knows nothing of Flower."""

import tempfile
from importlib import import_module

import torch
from datasets import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

LENGTH = 64  # bytes of text in an example; a byte is a token
MODULES = ("argparse", "collections", "datetime", "decimal", "fractions", "functools", "inspect",
           "itertools", "json", "logging", "random", "re", "statistics", "string", "subprocess",
           "threading", "typing", "unittest.mock", "urllib.request", "zipfile")  # fmt: skip


def make_model() -> GPT2LMHeadModel:
    """Return a model of bytes with random weights, the same ones each time."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=256, n_positions=LENGTH, n_embd=128, n_layer=2, n_head=4,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def documentation() -> list[int]:
    """Return the docstrings of some modules, classes and functions, as bytes."""
    texts = []
    for name in MODULES:
        module = import_module(name)
        members = [module, *(getattr(module, member) for member in sorted(dir(module)))]
        texts += [m.__doc__ for m in members if isinstance(getattr(m, "__doc__", None), str)]
    return list("\n\n".join(dict.fromkeys(texts)).encode())


def load_data(partition_id: int | None = None, num_partitions: int = 1) -> Dataset:
    """Return a node's share of the examples, or every tenth one, to test on, for None."""
    text = documentation()
    pieces = [text[i : i + LENGTH] for i in range(0, len(text) - LENGTH, LENGTH)]
    test = pieces[::10]
    train = [piece for i, piece in enumerate(pieces) if i % 10]
    chosen = test[:200] if partition_id is None else train[partition_id::num_partitions]
    return Dataset.from_dict({"input_ids": chosen, "labels": chosen})


def make_trainer(model, data: Dataset, steps: int = 1, rate: float = 0.0, seed: int = 0) -> Trainer:
    """Return a Trainer for a few steps of SGD."""
    folder = tempfile.mkdtemp()
    arguments = TrainingArguments(
        folder, max_steps=steps, learning_rate=rate, lr_scheduler_type="constant", optim="sgd",
        per_device_train_batch_size=16, per_device_eval_batch_size=50, seed=seed, use_cpu=True,
        save_strategy="no", report_to=[], disable_tqdm=True, logging_strategy="no",
    )  # fmt: skip
    return Trainer(model, arguments, train_dataset=data, eval_dataset=data)


def train(model, data: Dataset, steps: int, rate: float, seed: int) -> float:
    """Train in place; return the mean loss."""
    return make_trainer(model, data, steps, rate, seed).train().training_loss


def test(model, data: Dataset) -> float:
    """Return the loss."""
    return make_trainer(model, data).evaluate()["eval_loss"]
