"""Causal language models with their tokenizers: built-in, from a folder, a GGUF file or the Hub."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ferret_flwr.config import ModelConfig

from .errors import ModelError
from .randomness import uniform
from .tokenizer import tiny_tokenizer


@dataclass(frozen=True)
class LanguageModel:
    """A model and the tokenizer that belongs to it."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


def _tiny() -> LanguageModel:
    """Return a two-layer Llama, untrained, with the same bits on every machine."""
    tokenizer = tiny_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):  # construction draws weights that are replaced below
        model = LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            drawn = torch.from_numpy(uniform(parameter.numel(), "builtin:tiny", name))
            bound = (3.0 / config.hidden_size) ** 0.5  # variance 1 / hidden_size
            parameter.data.copy_((drawn * bound).view_as(parameter))
    return LanguageModel(model, tokenizer)


BUILTIN_MODELS: dict[str, Callable[[], LanguageModel]] = {"builtin:tiny": _tiny}


def load_model(config: ModelConfig) -> LanguageModel:
    """Return the model that ``config`` names, on the CPU, with a tokenizer that can pad.

    Dropout is set to 0 wherever the model's config has it: its masks would come from torch's
    global generator, and two runs with one seed would differ.

    Parameters
    ----------
    config
        ``name`` is a built-in, a folder, a ``.gguf`` file, or a Hub id (at ``revision``);
        ``gguf_file`` is a file inside ``name``.

    Raises
    ------
    ModelError
        If there is no such model, or its weights are incomplete.
    """
    dtype = getattr(torch, config.dtype)
    if config.name.startswith("builtin:"):
        if config.name not in BUILTIN_MODELS:
            raise ModelError(_not_found(config, "there is no such built-in"))
        loaded = BUILTIN_MODELS[config.name]()
        torch.nn.Module.to(loaded.model, dtype=dtype)
    else:
        loaded = _load_pretrained(config, dtype)
    if config.gradient_checkpointing:
        checkpoint = (  # the second is the first's old name, to go in transformers 6
            getattr(loaded.model, "activation_checkpointing_enable", None)
            or loaded.model.gradient_checkpointing_enable
        )
        checkpoint({"use_reentrant": False})
    return loaded


def stored_tensors(
    config: ModelConfig, parameters: Mapping[str, torch.Tensor]
) -> Iterator[torch.Tensor] | None:
    """Read ``parameters`` again from the model's folder, one at a time, as they were loaded.

    Returns
    -------
    iterator or None
        The tensors in their order and types; None if the folder has no safetensors with all of
        them under their names. Whether it holds the same numbers is for the caller to see.
    """
    files = _safetensors(Path(config.name).expanduser())
    if config.gguf_file or not parameters.keys() <= files.keys():
        return None
    return (
        _read(files[name], name).to(tensor.dtype).view(tensor.shape)
        for name, tensor in parameters.items()
    )


def _safetensors(folder: Path) -> dict[str, Path]:
    """Return in which file of a folder each tensor is."""
    found: dict[str, Path] = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            found |= dict.fromkeys(file.keys(), path)
    return found


def _read(path: Path, name: str) -> torch.Tensor:
    """Read one tensor; the file, which counts as memory as far as it was read, is closed again."""
    with safe_open(path, framework="pt") as file:
        return file.get_tensor(name)


def _load_pretrained(config: ModelConfig, dtype: torch.dtype) -> LanguageModel:
    source, options = _source(config)
    gguf = {"gguf_file": options.pop("gguf_file")} if "gguf_file" in options else {}
    weights = gguf or {"use_safetensors": True}  # what other formats hold would be unpickled
    try:
        settings = AutoConfig.from_pretrained(source, **options, **gguf)
        tokenizer = AutoTokenizer.from_pretrained(source, **options, **gguf)
        for key, value in settings.to_dict().items():
            if isinstance(value, float) and value and ("dropout" in key or "pdrop" in key):
                setattr(settings, key, 0.0)
        load: Callable[..., Any] = AutoModelForCausalLM.from_pretrained
        model, report = load(
            source, config=settings, dtype=dtype, output_loading_info=True, **options, **weights
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        first, *_ = str(error).strip().splitlines() or [type(error).__name__]
        here = Path(config.name).expanduser().absolute()
        reason = first if here.exists() else f"there is no {here}, and as a Hub id: {first}"
        raise ModelError(_not_found(config, reason.rstrip("."))) from error
    if report["missing_keys"]:
        raise ModelError(
            f"'model.name' = {config.name!r} lacks the weights {sorted(report['missing_keys'])}: "
            "every node would draw its own; use a complete checkpoint"
        )
    _ensure_pad_token(tokenizer)
    return LanguageModel(_without_quantizer(model) if gguf else model, tokenizer)


def _source(config: ModelConfig) -> tuple[str, dict[str, Any]]:
    """Return what to hand to `from_pretrained`, checked as far as the file system can tell."""
    options: dict[str, Any] = {"trust_remote_code": config.trust_remote_code}
    path = Path(config.name).expanduser()
    if path.suffix == ".gguf" and not config.gguf_file:
        path, gguf_file = path.parent, path.name
    else:
        gguf_file = config.gguf_file
    if gguf_file:
        options["gguf_file"] = gguf_file
    if path.is_dir():
        if gguf_file and not (path / gguf_file).is_file():
            raise ModelError(_not_found(config, f"the folder {path} has no file {gguf_file!r}"))
        return str(path), options | {"local_files_only": True}
    if path.is_absolute() or config.name.startswith((".", "~")) or config.name.count("/") > 1:
        raise ModelError(_not_found(config, f"there is no folder {path}"))
    return config.name, options | {"revision": config.revision or "main"}


def _not_found(config: ModelConfig, reason: str) -> str:
    return (
        f"'model.name' = {config.name!r} cannot be loaded: {reason}; allowed are a built-in "
        f"({', '.join(BUILTIN_MODELS)}), a folder as written by save_pretrained, a .gguf file, "
        "or the id of a model on the Hugging Face Hub (needs a network or its cache)"
    )


def _ensure_pad_token(tokenizer: PreTrainedTokenizerBase) -> None:
    """Let a tokenizer without pad token pad with one it has: new ones would need new embeddings."""
    if tokenizer.eos_token is None:
        raise ModelError("the tokenizer of 'model.name' has no EOS token to end a response with")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token


def _without_quantizer(model: PreTrainedModel) -> PreTrainedModel:
    """Return the dequantised ``model`` as a plain one, which `save_pretrained` accepts."""
    settings = model.config
    if hasattr(settings, "quantization_config"):
        del settings.quantization_config
    with torch.random.fork_rng(devices=[]):
        plain = AutoModelForCausalLM.from_config(settings, dtype=model.dtype)
    plain.load_state_dict(model.state_dict())
    plain.generation_config = model.generation_config
    return plain
