"""LoRA adapters through peft: made, shared between the views of one model, and saved in a form that loads anywhere."""

from __future__ import annotations

import json
import math
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from retrodict.errors import InputError
from retrodict.models.hf.gguf import quiet
from retrodict.models.hf.tokens import first_line
from retrodict.particles_io import write_atomically
from retrodict.rng import generator

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
"""The files of a PEFT folder."""


@dataclass
class Held:
    """What all views of one model share: the module, which PEFT wraps once, and how often each adapter moved."""

    module: Any
    updates: dict[str, int] = field(default_factory=dict)


def grow(held: Held, name: str, rank: int, alpha: float | None, targets: str | list[str], seed: int) -> None:
    """Give the module a trainable LoRA adapter (Hu et al. 2022): y += (alpha / rank) B A x.

    A is uniform in +-1/sqrt(in) from ``seed``, B is 0, both in float32 or better. ``alpha`` is 2 * rank by default.
    Raises InputError for a name that is taken or a target that the model has not.
    """
    from peft import LoraConfig, PeftModel, get_peft_model

    if rank < 1:
        raise InputError(f"rank must be at least 1, not {rank}")
    if name in getattr(held.module, "peft_config", {}):
        raise InputError(f"the model has an adapter {name!r} already; give another name")
    scale = 2.0 * rank if alpha is None else alpha
    config = LoraConfig(r=rank, lora_alpha=scale, lora_dropout=0.0, target_modules=targets, task_type="CAUSAL_LM")  # pyright: ignore[reportArgumentType]
    try:
        with _own_draws():
            if isinstance(held.module, PeftModel):
                held.module.add_adapter(name, config)
            else:
                held.module = get_peft_model(held.module, config, adapter_name=name)
    except ValueError as error:
        raise InputError(f"no adapter can be put on {targets!r}: {str(error).splitlines()[0]}") from error
    held.module.eval()
    held.updates[name] = 0
    for i, (key, p) in enumerate(held.module.named_parameters()):
        mine = f".{name}." in key and ".lora_" in key
        if mine and ".lora_A." in key:
            bound = 1 / math.sqrt(p.shape[1])
            draw = torch.rand(p.shape, generator=generator(seed, "cpu", i), dtype=torch.float64)
            p.data.copy_((2 * draw - 1) * bound)
        p.requires_grad_(mine or p.requires_grad and ".lora_" in key)


def adapter_folder(folder: str | os.PathLike[str]) -> Path:
    """A folder as a path. Raises InputError where it holds no PEFT adapter in safetensors."""
    path = Path(folder).expanduser()
    if not (path / CONFIG).is_file():
        raise InputError(f"no adapter in {str(path)!r}: a PEFT folder with {CONFIG} is needed")
    if not (path / WEIGHTS).is_file():
        raise InputError(f"the adapter in {str(path)!r} has no {WEIGHTS}; save it in that form")
    return path


def drop(held: Held, name: str) -> None:
    """Take an adapter away again; without any other the module is no longer PEFT's."""
    held.module.delete_adapter(name)
    held.updates.pop(name, None)
    if not held.module.peft_config:
        held.module = held.module.unload()


def read(held: Held, name: str, folder: Path) -> None:
    """Give the module the adapter of a PEFT folder, whoever wrote it, and leave it trainable.

    Raises InputError for an adapter of another model, and leaves the module as it was.
    """
    before = {n for n, p in held.module.named_parameters() if p.requires_grad}
    held.module = put(held.module, name, folder).eval()
    for key, p in held.module.named_parameters():
        p.requires_grad_(key in before or f".{name}." in key and ".lora_" in key)
    held.updates[name] = 0


def put(module: Any, name: str, folder: Path) -> Any:
    """The module under PEFT with the adapter of a folder among its own.

    Raises InputError where the folder does not fit the module: a layer or a shape that it has not, weights left out.
    """
    from peft import PeftConfig, PeftModel, get_peft_model, set_peft_model_state_dict
    from safetensors.torch import load_file

    under = isinstance(module, PeftModel)
    wrapped: Any = module if under else None
    try:
        config = PeftConfig.from_pretrained(str(folder), local_files_only=True)
        tensors = load_file(folder / WEIGHTS)
        _fits(module.get_base_model() if under else module, tensors)
        with _own_draws(), quiet():
            if wrapped is None:
                wrapped = get_peft_model(module, config, adapter_name=name)
            else:
                wrapped.add_adapter(name, config)
            told = set_peft_model_state_dict(wrapped, tensors, adapter_name=name)
        lost = [k for k in told.missing_keys if name in k.split(".")]
        if lost or told.unexpected_keys:
            raise ValueError(f"missing adapter keys, {lost[0]} among them" if lost else
                             f"weights for nothing, {told.unexpected_keys[0]} among them")  # fmt: skip
    except Exception as error:  # json, safetensors, PEFT and OSError each have their own
        if wrapped is not None and name in wrapped.peft_config:
            wrapped.delete_adapter(name)
            if not under:
                wrapped.unload()
        raise InputError(f"adapter {name!r} in {str(folder)!r} cannot be used: {first_line(error)}") from error
    return wrapped


def _fits(base: Any, tensors: dict[str, torch.Tensor]) -> None:
    """Refuse LoRA weights of a layer or a shape that the base has not, before anything is put on it."""
    layers = dict(base.named_modules())
    for key, value in tensors.items():
        found = re.fullmatch(r"base_model\.model\.(.+)\.lora_([AB])\.weight", key)
        if found is None:
            continue
        layer = layers.get(found[1])
        if layer is None:
            raise ValueError(f"it is of another model: this one has no {found[1]}")
        side, old = ("in_features", "nx") if found[2] == "A" else ("out_features", "nf")
        mine, theirs = getattr(layer, side, getattr(layer, old, None)), value.shape[found[2] == "A"]
        if mine is not None and mine != theirs:
            raise ValueError(f"it is of another model: {found[1]} has {side} {mine} here, {theirs} there")


@contextmanager
def _own_draws() -> Iterator[None]:
    """What PEFT draws to fill a new adapter leaves the global random state as it was; its warnings are not ours."""
    state = torch.random.get_rng_state()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # weights that a folder leaves out are counted, not warned of
            yield
    finally:
        torch.random.set_rng_state(state)


def save(held: Held, name: str, base: str, folder: str | os.PathLike[str]) -> None:
    """``adapter_config.json`` and ``adapter_model.safetensors`` of one adapter, each whole or not at all.

    ``base`` is what the folder says it belongs to: a name, never a path of this machine.
    """
    from peft import get_peft_model_state_dict
    from safetensors.torch import save as to_bytes

    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    config = held.module.peft_config[name].to_dict()
    config = {k: sorted(v) if isinstance(v, set) else getattr(v, "value", v) for k, v in config.items()}
    config |= {"base_model_name_or_path": base, "inference_mode": True}
    tensors = get_peft_model_state_dict(held.module, adapter_name=name)
    tensors = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    write_atomically(path / WEIGHTS, to_bytes(tensors, {"format": "pt"}))
    write_atomically(path / CONFIG, json.dumps(config, indent=2, default=str).encode())
