"""What test_shard runs on one process and on two that share the weights: ``sharded.py FOLDER``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tiny_llama import tiny_llama

from retrodict.errors import InputError
from retrodict.targets.ready import infill
from retrodict.training.amortize import amortize, grow
from retrodict.training.distributed import shard, world, world_of
from retrodict.training.loop import begin
from retrodict.training.settings import settings

PLAN: dict[str, Any] = {"steps": 3, "samples": 6, "evaluate": 4, "lr": 0.05, "micro": 4, "seed": 3}


def main(folder: Path) -> None:
    """Train, and write the curve, the adapter and how much of a weight is here."""
    torch.set_num_threads(1)
    lm: Any = tiny_llama()
    weight, refused = lm.module.model.layers[1].mlp.down_proj.weight, ""
    whole = weight.numel()
    if world().size > 1:
        shard(lm)
    target = infill(lm, "ab", "cd", stop=".", max_tokens=4)
    told: list[Any] = []
    policy = amortize(target, grow(target, rank=2), folder=folder / "run", on_metrics=told.append, **PLAN)
    held = lm.module.get_base_model().model.layers[1].mlp.down_proj.base_layer.weight
    part = held.to_local().numel() if world().size > 1 else held.numel()
    try:
        begin(target, policy, settings(micro=None), world_of(policy))
    except InputError as error:
        refused = str(error)
    rank = world().rank
    save_file({k: v.detach().contiguous() for k, v in policy.parameters().items()}, folder / f"{rank}.safetensors")
    text = {"metrics": told, "share": part / whole, "about": policy.about, "refused": refused}
    (folder / f"{rank}.json").write_text(json.dumps(text, default=str))
    if rank == 0:
        policy.lm.save_adapter(folder / "adapter")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
