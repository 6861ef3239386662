"""The layouts of instruction data on disk, each brought to one normal form.

A row of a file goes in, a prompt and a response come out. One entry of ``FORMATS`` per
layout; adding a layout is adding an entry.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from .errors import DataError

_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)


@dataclass(frozen=True)
class Example:
    """One prompt and the response the model should learn to give."""

    prompt: str
    response: str
    category: str = ""


@dataclass(frozen=True)
class Format:
    """How rows of one layout are recognised (all of ``fields``) and read."""

    fields: tuple[str, ...]
    read: Callable[[Mapping[str, Any], str, PreTrainedTokenizerBase | None], Example]


def alpaca_prompt(instruction: str, input: str = "") -> str:
    """Return the Alpaca prompt, the one to use with a model tuned here on anything but chats."""
    template = _WITH_INPUT if input else _WITHOUT_INPUT
    return template.format(instruction=instruction, input=input)


def _read_alpaca(row: Mapping[str, Any], stem: str, _: object) -> Example:
    prompt = alpaca_prompt(_text(row["instruction"]), _text(row.get("input")))
    return Example(prompt, _text(row["output"]), _text(row.get("category")))


def _read_dolly(row: Mapping[str, Any], stem: str, _: object) -> Example:
    prompt = alpaca_prompt(_text(row["instruction"]), _text(row.get("context")))
    return Example(prompt, _text(row["response"]), _text(row.get("category")))


def _read_gsm8k(row: Mapping[str, Any], stem: str, _: object) -> Example:
    prompt = alpaca_prompt(_text(row["question"]))
    return Example(prompt, _text(row["answer"]), _text(row.get("category")))


def _read_natural_instructions(row: Mapping[str, Any], stem: str, _: object) -> Example:
    (instance,) = row["Instances"]  # one, after `unfold`
    prompt = alpaca_prompt(_text(row["Definition"]), _text(instance["input"]))
    return Example(prompt, _text(instance["output"]), stem)


def _read_messages(
    row: Mapping[str, Any], stem: str, tokenizer: PreTrainedTokenizerBase | None
) -> Example:
    messages = list(row["messages"])
    if not messages or messages[-1].get("role") != "assistant":
        raise DataError("the last of 'messages' must have the role 'assistant'")
    if tokenizer is None or not tokenizer.chat_template:
        raise DataError(
            "the format 'messages' needs a chat template, and the tokenizer of 'model.name' has "
            "none; use an instruction-tuned model, or data in another format"
        )
    render: Callable[..., Any] = tokenizer.apply_chat_template
    try:
        prompt = render(messages[:-1], tokenize=False, add_generation_prompt=True)
        whole = render(messages, tokenize=False)
    except Exception as error:  # templates raise what they like
        raise DataError(f"the chat template does not take these 'messages': {error}") from error
    # The template knows how a turn ends; some rewrite earlier turns, then the text must do.
    response = whole[len(prompt) :] if whole.startswith(prompt) else messages[-1]["content"]
    response = response.rstrip("\n").removesuffix(tokenizer.eos_token or "")
    return Example(prompt, response, _text(row.get("category")))


def _text(value: Any) -> str:
    """Return a field as text: a missing one is empty, of a list the first entry is used."""
    if isinstance(value, list | tuple):
        value = value[0] if value else None
    return "" if value is None else str(value)


FORMATS: dict[str, Format] = {
    "alpaca": Format(("instruction", "output"), _read_alpaca),
    "dolly": Format(("instruction", "response"), _read_dolly),
    "gsm8k": Format(("question", "answer"), _read_gsm8k),
    "natural-instructions": Format(("Definition", "Instances"), _read_natural_instructions),
    "messages": Format(("messages",), _read_messages),
}


def unfold(row: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return one row per example: a Natural-Instructions task holds many, other rows are one."""
    instances = row.get("Instances")
    if not isinstance(instances, list):
        return [row]
    return [{**row, "Instances": [instance]} for instance in instances]


def read_row(
    row: Mapping[str, Any],
    format: str,
    *,
    origin: str,
    stem: str = "",
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Example:
    """Return the example in one row.

    Parameters
    ----------
    row
        Field name -> value, as `unfold` gives it.
    format
        A key of ``FORMATS``, or ``"auto"`` for the first whose fields are all there.
    origin
        What an error calls the row: the file and the row's number.
    stem
        Name of the file without its suffix, the category of Natural-Instructions tasks.
    tokenizer
        Used by the format ``messages`` only.

    Raises
    ------
    DataError
        If the row lacks the fields of its format, or a field's content cannot be read.
    """
    candidates = FORMATS if format == "auto" else {format: FORMATS[format]}
    fitting = [f for f in candidates.values() if all(name in row for name in f.fields)]
    if not fitting:
        needs = "; ".join(f"{name}: {', '.join(f.fields)}" for name, f in candidates.items())
        raise DataError(
            f"{origin}: the fields {', '.join(row) or '(none)'} fit no format of "
            f"'dataset.format' = {format!r}, which needs ({needs})"
        )
    try:
        example = fitting[0].read(row, stem, tokenizer)
        "".join(vars(example).values()).encode()  # JSON can hold half a character, tokenizers not
        return example
    except (DataError, UnicodeEncodeError) as error:
        raise DataError(f"{origin}: {error}") from None
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{origin}: unreadable content: {error!r}") from error
