"""From rows to batches of token ids: hold out, tokenise, pad."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields

import torch
from transformers import PreTrainedTokenizerBase

from ferret_flwr.config import DatasetConfig

from .errors import DataError
from .formats import read_row
from .randomness import permutation
from .sources import read_source

IGNORED = -100  # the label of a token that is not learned

# Each has prompt, response, category and origin, and the column to partition by. A plain list: a
# process that only trains on a JSON file need not import `datasets`, which takes seconds.
Examples = Sequence[Mapping[str, str]]


@dataclass(frozen=True)
class Split:
    """Examples to train on, and held-out ones."""

    train: Examples
    test: Examples


@dataclass(frozen=True)
class Tokens:
    """A prompt and its response as ids; labels are ``IGNORED`` on the prompt."""

    input_ids: list[int]
    labels: list[int]

    @property
    def prompt(self) -> list[int]:
        """The ids in front of the response."""
        return self.input_ids[: self._num_prompt]

    @property
    def response(self) -> list[int]:
        """The ids of the response, with EOS unless it was cut off."""
        return self.input_ids[self._num_prompt :]

    @property
    def _num_prompt(self) -> int:
        return self.labels.count(IGNORED)


def load_examples(
    config: DatasetConfig, *, seed: int, tokenizer: PreTrainedTokenizerBase | None = None
) -> Split:
    """Read the data that ``config`` names and hold out its test split.

    Both splits come in a random order that depends on ``seed`` only, so that the first N rows are
    a fair sample. Nothing is tokenised yet.

    Parameters
    ----------
    config
        ``name`` is a built-in, a .json or .jsonl file, a folder of such files, or a Hub id;
        ``max_examples`` limits what is taken from it before the share ``holdout`` is held out.
    seed
        The run's seed: all nodes with the same data and seed agree on the split.
    tokenizer
        Needed for the format ``messages`` only, for its chat template.

    Raises
    ------
    DataError
        Naming the file and row that cannot be read, and what is allowed.
    """
    train = _examples(config.name, config.revision, config.split, config, seed, tokenizer)
    if config.test_name:
        revision = config.revision if config.test_name == config.name else ""
        test = _examples(config.test_name, revision, config.test_split, config, seed, tokenizer)
        return Split(train, test)
    held_out = round(len(train) * config.holdout)
    if config.holdout and not 0 < held_out < len(train):
        raise DataError(
            f"'dataset.holdout' = {config.holdout} of {len(train)} examples leaves a split empty"
        )
    return Split(train[held_out:], train[:held_out])


def _examples(
    name: str,
    revision: str,
    split: str,
    config: DatasetConfig,
    seed: int,
    tokenizer: PreTrainedTokenizerBase | None,
) -> Examples:
    """Return at most ``max_examples`` of the examples in ``name``, in an order set by ``seed``."""
    rows = read_source(name, config.subset, revision, split, seed)
    if not len(rows):
        raise DataError(f"'dataset.name' = {name!r} has no examples")
    column = config.partition_by if config.partitioner != "iid" else "category"
    examples = []
    for i in permutation(len(rows), "order of examples", seed)[: config.max_examples or None]:
        row = rows[int(i)]
        example = read_row(
            row.values, config.format, origin=row.origin, stem=row.stem, tokenizer=tokenizer
        )
        values = {**vars(example), "origin": row.origin}
        if column not in values:
            if column not in row.values:
                raise DataError(
                    f"{row.origin}: there is no column 'dataset.partition-by' = {column!r}; "
                    f"there are {', '.join(row.values)}"
                )
            values[column] = str(row.values[column])
        examples.append(values)
    return examples


def tokenize(
    example: Mapping[str, str], tokenizer: PreTrainedTokenizerBase, seq_length: int, too_long: str
) -> Tokens | None:
    """Return prompt, response and EOS as ids, or None if the example is dropped.

    Parameters
    ----------
    example
        A row of `load_examples`.
    tokenizer
        One with an EOS token.
    seq_length
        Most tokens of prompt, response and EOS together.
    too_long
        What happens to a longer example, one of `dataset.too-long`. ``"error"``: see below.
        ``"drop"``: None is returned. ``"truncate"``: the prompt loses tokens from its left, and
        once only its last token is left, the response (EOS first) from its end.

    Raises
    ------
    DataError
        If the example is too long and ``too_long`` is ``"error"``.
    """
    text = example["prompt"]
    # A chat template writes BOS itself.
    add_special = not (tokenizer.bos_token and text.startswith(tokenizer.bos_token))
    prompt = tokenizer(text, add_special_tokens=add_special)["input_ids"]
    if prompt and prompt[-1] == tokenizer.eos_token_id and add_special:
        prompt = prompt[:-1]
    response = tokenizer(example["response"], add_special_tokens=False)["input_ids"]
    response = [*response, tokenizer.eos_token_id]
    excess = len(prompt) + len(response) - seq_length
    if excess > 0:
        if too_long == "drop":
            return None
        if too_long == "error":
            raise DataError(
                f"{example.get('origin', 'an example')} has {excess + seq_length} tokens "
                f"(prompt {len(prompt)}, response with EOS {len(response)}), more than "
                f"'train.seq-length' = {seq_length}; raise it, or set 'dataset.too-long' to "
                f"{' or '.join(c for c in _TOO_LONG if c != 'error')}"
            )
        prompt = prompt[min(excess, len(prompt) - 1) :]
        response = response[: seq_length - len(prompt)]
    return Tokens(prompt + response, [IGNORED] * len(prompt) + response)


_TOO_LONG = next(f for f in fields(DatasetConfig) if f.name == "too_long").metadata["choices"]


def collate(
    batch: Iterable[Tokens], pad_id: int, device: torch.device | str = "cpu"
) -> dict[str, torch.Tensor]:
    """Pad on the right to the longest of ``batch``.

    Returns
    -------
    dict
        ``input_ids``, ``attention_mask`` and ``labels``, each int64 of shape (B, T).
    """
    batch = list(batch)
    width = max(len(tokens.input_ids) for tokens in batch)

    def padded(rows: Iterable[Sequence[int]], value: int) -> torch.Tensor:
        return torch.tensor([[*r, *[value] * (width - len(r))] for r in rows], device=device)

    return {
        "input_ids": padded((t.input_ids for t in batch), pad_id),
        "attention_mask": padded(([1] * len(t.input_ids) for t in batch), 0),
        "labels": padded((t.labels for t in batch), IGNORED),
    }
