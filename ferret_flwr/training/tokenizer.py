"""The tokenizer of `builtin:tiny`, built in memory: bytes for any text, one token for known words.

Byte-level BPE without a single merge: a piece of text is one token if the vocabulary holds it as
a whole, and its bytes otherwise. So every text survives a round trip, and the sequences of the
built-in data are short.
"""

from __future__ import annotations

import functools
import re

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from .formats import alpaca_prompt
from .synthetic import tasks

_SPECIAL = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
_HOLE = "\x00"
# What the Alpaca prompts have between their holes: pieces of their own, hence one token each.
_FRAMES = sorted(
    {
        frame
        for prompt in (alpaca_prompt(_HOLE), alpaca_prompt(_HOLE, _HOLE))
        for frame in prompt.split(_HOLE)
    },
    key=lambda frame: (-len(frame), frame),
)
_PIECE = r" ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+"
_CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'] + ':\n' + m['content'] }}"
    "{{ (eos_token if m['role'] == 'assistant' else '') + '\n' }}{% endfor %}"
    "{{ 'assistant:\n' if add_generation_prompt else '' }}"
)


def _splitter() -> pre_tokenizers.PreTokenizer:
    pattern = "|".join([*(re.escape(f).replace("\\\n", "\\n") for f in _FRAMES), _PIECE])
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


@functools.cache
def _vocabulary() -> dict[str, int]:
    """Return token -> id: special tokens, the 256 bytes, then the words of the built-in data."""
    splitter = _splitter()
    texts = {
        text for row in tasks(seed=0) for text in (row["instruction"], row["input"], row["output"])
    }
    pieces = {piece for text in [*texts, *_FRAMES] for piece, _ in splitter.pre_tokenize_str(text)}
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = sorted(pieces.difference(alphabet))
    return {token: i for i, token in enumerate([*_SPECIAL.values(), *alphabet, *words])}


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Return the tokenizer of `builtin:tiny`, the same on every machine and in every process."""
    vocabulary = _vocabulary()
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = _splitter()
    tokenizer.decoder = decoders.ByteLevel()
    bos = _SPECIAL["bos_token"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, vocabulary[bos])]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **_SPECIAL
    )
    fast.chat_template = _CHAT_TEMPLATE
    return fast
