"""LoRA adapters through peft: made, shared between the views of one model, and saved in a form that loads anywhere."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from retrodict.errors import InputError
from retrodict.particles_io import write_atomically
from retrodict.rng import generator


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
    state = torch.random.get_rng_state()
    try:
        if isinstance(held.module, PeftModel):
            held.module.add_adapter(name, config)
        else:
            held.module = get_peft_model(held.module, config, adapter_name=name)
    except ValueError as error:
        raise InputError(f"no adapter can be put on {targets!r}: {str(error).splitlines()[0]}") from error
    finally:
        torch.random.set_rng_state(state)
    held.module.eval()
    held.updates[name] = 0
    for i, (key, p) in enumerate(held.module.named_parameters()):
        mine = f".{name}." in key and ".lora_" in key
        if mine and ".lora_A." in key:
            bound = 1 / math.sqrt(p.shape[1])
            draw = torch.rand(p.shape, generator=generator(seed, "cpu", i), dtype=torch.float64)
            p.data.copy_((2 * draw - 1) * bound)
        p.requires_grad_(mine or p.requires_grad and ".lora_" in key)


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
    write_atomically(path / "adapter_model.safetensors", to_bytes(tensors, {"format": "pt"}))
    write_atomically(path / "adapter_config.json", json.dumps(config, indent=2, default=str).encode())
