"""The built-in tokenizer: any text survives, the built-in data is short."""

from __future__ import annotations

import pytest

from ferret_flwr.training.synthetic import tasks

TEXTS = [
    "Name the capital.",
    "  two  spaces\n\n### Input:\nand\ttabs \r\n",
    "héllo wörld, 日本語 and 🎉",
    "\x00\x7f",
    "unknownword 12345",
    "",
]


@pytest.mark.parametrize("text", TEXTS)
def test_any_text_survives_a_round_trip(tokenizer, text):
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids[1:]) == text


def test_built_in_data_needs_no_byte_tokens(tokenizer):
    # Another seed than the one the vocabulary was collected from.
    for row in tasks(seed=123, size=1000):
        for token in tokenizer.tokenize(row["output"]):
            assert len(token) > 1 or token in ".:,a" or token.isdigit(), (token, row)


def test_the_alpaca_prompt_is_short(tokenizer, split):
    longest = max(len(tokenizer(row["prompt"])["input_ids"]) for row in split.test)
    assert longest < 40


def test_special_tokens_differ(tokenizer):
    ids = {tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id}
    assert len(ids) == 3
