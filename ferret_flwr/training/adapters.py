"""Adapters by PEFT: a few parameters of their own on a model whose own are frozen.

An adapter is float32 whatever the model's type, as PEFT has it: it is small, and an optimizer's
steps would vanish in bfloat16. Its first values are drawn here, at the scale at which PEFT draws
them, because PEFT takes them from torch's global generator.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from transformers.pytorch_utils import Conv1D

from ferret_flwr.config import AdapterConfig

from .errors import ModelError
from .randomness import Draws, uniform
from .tensors import trainable_parameters

if TYPE_CHECKING:
    from .models import LanguageModel

COMMON_TOKENS = 5000  # Lester et al. start from these; a vocabulary begins with what is frequent


def _lora(config: AdapterConfig) -> Any:
    """Low-rank updates: W x + (alpha / rank) B A x (Hu et al., ICLR 2022)."""
    from peft import LoraConfig

    return LoraConfig(
        task_type="CAUSAL_LM",
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type] # any number will do
        lora_dropout=0.0,
        target_modules=config.target_modules.split() or None,
    )


def _prompt(config: AdapterConfig) -> Any:
    """Embeddings before the input that are themselves tuned (Lester et al., EMNLP 2021)."""
    from peft import PromptTuningConfig

    return PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=config.virtual_tokens)


def _p_tuning(config: AdapterConfig) -> Any:
    """Embeddings before the input that a tuned MLP computes (Liu et al., 2021, "P-tuning")."""
    from peft import PromptEncoderConfig

    return PromptEncoderConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=config.virtual_tokens,
        encoder_hidden_size=config.encoder_size,
        encoder_dropout=0.0,
    )


ADAPTERS: dict[str, Callable[[AdapterConfig], Any]] = {
    "lora": _lora,
    "prompt": _prompt,
    "p-tuning": _p_tuning,
}


def adapted(lm: LanguageModel, kind: str, config: AdapterConfig) -> LanguageModel:
    """Return ``lm`` with a fresh adapter on it, its own parameters frozen.

    Parameters
    ----------
    lm
        Of any dtype; its model becomes part of the returned one.
    kind
        One of ``ADAPTERS``.
    config
        How large the adapter is, and where.

    Returns
    -------
    LanguageModel
        A `peft.PeftModel`. Its trainable parameters are the adapter's, in float32, with the same
        bits in every process.

    Raises
    ------
    ModelError
        If PEFT is not installed, or has nothing to put the adapter on.
    """
    try:
        from peft import get_peft_model

        settings = ADAPTERS[kind](config)
    except ImportError as error:
        raise ModelError(
            "this method tunes an adapter and needs PEFT: pip install 'ferret-flwr[train]'"
        ) from error
    if kind == "lora":
        _check_targets(lm.model, config)
    try:
        with torch.random.fork_rng(devices=[]):  # PEFT draws weights that are replaced below
            model = get_peft_model(lm.model, settings)
    except ValueError as error:
        raise ModelError(
            f"PEFT cannot put a {kind!r} adapter on this model: {error}; what LoRA could tune, by "
            f"name in 'adapter.target-modules', is {_listed(lm.model)}"
        ) from error
    _redraw(model)
    if kind == "prompt":
        _begin_with_words(model, len(lm.tokenizer))
    return replace(lm, model=model)


def _linear_layers(model: Any) -> list[str]:
    """Return the names of the layers that LoRA fits, without those that are tied to embeddings."""
    tied = model.get_input_embeddings().weight
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D) and module.weight is not tied
    ]


def _listed(model: Any) -> str:
    return ", ".join(sorted({name.rpartition(".")[2] for name in _linear_layers(model)})) or "none"


def _check_targets(model: Any, config: AdapterConfig) -> None:
    """Raise `ModelError` for a target that PEFT would pass over in silence."""
    layers = [f".{name}" for name in _linear_layers(model)]
    for target in config.target_modules.split():
        if not any(layer.endswith(f".{target}") for layer in layers):
            raise ModelError(
                f"'adapter.target-modules' = {config.target_modules!r}: the model has no linear "
                f"layer {target!r} of its own; it has {_listed(model)}"
            )


@torch.no_grad()
def _redraw(model: Any) -> None:
    """Replace what PEFT drew by uniform values of the same variance, keyed by name.

    Linear layers, LoRA's A among them, are uniform within 1 / √fan-in in PEFT, too, and embeddings
    are of variance 1. LoRA's B stays 0, and so the model what it is.
    """
    for name, parameter in trainable_parameters(model).items():
        if parameter.any():
            layer = model.get_submodule(name.rpartition(".")[0])
            linear = isinstance(layer, torch.nn.Linear)
            bound = layer.in_features**-0.5 if linear else 3.0**0.5
            drawn = torch.from_numpy(uniform(parameter.numel(), "adapter", name))
            parameter.copy_((drawn * bound).view_as(parameter))


@torch.no_grad()
def _begin_with_words(model: Any, num_tokens: int) -> None:
    """Set a prompt to the embeddings of common tokens, Lester et al.'s "sampled vocabulary"."""
    (prompt,) = trainable_parameters(model).values()  # (virtual tokens, hidden size)
    draws = Draws("adapter", "prompt")
    ids = [draws.below(min(num_tokens, COMMON_TOKENS)) for _ in prompt]
    prompt.copy_(model.get_input_embeddings()(torch.tensor(ids)))


def is_adapted(model: torch.nn.Module) -> bool:
    """Tell whether ``model`` is one that `adapted` returned."""
    return hasattr(model, "active_peft_config")


def virtual_tokens(model: torch.nn.Module) -> int:
    """Return how many tokens the adapter puts before every input."""
    return getattr(model.active_peft_config, "num_virtual_tokens", 0) if is_adapted(model) else 0


def with_virtual_tokens(
    model: Any, ids: torch.Tensor, mask: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Return inputs of the base model with the virtual tokens between padding and input.

    PEFT itself generates with them before the padding: a prompt's answer would depend on the
    prompts beside it.

    Parameters
    ----------
    model
        As `adapted` returned it, with virtual tokens.
    ids, mask
        Token ids and attention mask, padded on the left, shape (B, T).

    Returns
    -------
    dict
        ``inputs_embeds``, shape (B, V + T, hidden size), and ``attention_mask``, shape (B, V + T).
    """
    words = model.get_input_embeddings()(ids)
    virtual = model.get_prompt(batch_size=1)[0].to(words.dtype)  # (V, hidden size)
    pads = (mask == 0).sum(1).tolist()
    rows = [
        torch.cat([row[:pad], virtual, row[pad:]]) for row, pad in zip(words, pads, strict=True)
    ]
    ones = mask.new_ones(len(mask), len(virtual))
    return {"inputs_embeds": torch.stack(rows), "attention_mask": torch.cat([mask, ones], dim=1)}


def merged(model: Any) -> Any:
    """Return a plain model that computes what ``model`` with LoRA does, up to its dtype's rounding.

    It is a copy: subtracting again what was added would not give the base's bits back.
    """
    return copy.deepcopy(model).merge_and_unload()
