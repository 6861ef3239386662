"""A tuned model as a folder that others can load."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from .adapters import is_adapted, merged, virtual_tokens
from .models import LanguageModel


def save_model(lm: LanguageModel, folder: str | Path) -> Path:
    """Write model and tokenizer as a Hugging Face folder, whole or not at all.

    LoRA is written as the plain model that it makes of the base, in the base's dtype. Virtual
    tokens, which no plain model has, are written as PEFT does: without the base model.

    Parameters
    ----------
    lm
        What to save.
    folder
        Where to. An earlier folder of this name is replaced once the new one is complete.

    Returns
    -------
    pathlib.Path
        The folder, fit for ``AutoModelForCausalLM.from_pretrained``, or for
        ``PeftModel.from_pretrained`` on the base model if there are virtual tokens.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
        new, old = Path(scratch, "new"), Path(scratch, "old")
        new.mkdir()  # with the usual permissions, unlike the scratch folder itself
        if virtual_tokens(lm.model):
            lm.model.save_pretrained(new, save_embedding_layers=False)  # "auto" asks the Hub
        else:
            (merged(lm.model) if is_adapted(lm.model) else lm.model).save_pretrained(new)
        lm.tokenizer.save_pretrained(new)
        if folder.exists():
            shutil.move(folder, old)
        new.rename(folder)
    return folder
