"""An estimate of what a step holds at its peak, before the run: weights, activations with gradient, logits, caches.

For a decoder of L layers, width d, feed-forward f, h heads and context c, a token that runs with gradient keeps about
L (10 d + 4 f + 3 h c) numbers, or L d where layers are run again in the backward pass; one chunk of logits is kept. The
reward's packed pass holds one layer's activations of a chunk of its branches.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from retrodict.models.cached import CHUNK
from retrodict.objectives.table import NEED_PREFIXES
from retrodict.protocols import Trainable
from retrodict.targets.algebra import Target
from retrodict.training.settings import Settings

SHARE = 0.8
"""Of the free memory, what a run plans to use."""


@dataclass(frozen=True)
class Estimate:
    """Bytes: what is there whatever the batch is, and what each row with gradient adds."""

    fixed: int
    per_row: int
    rows: int

    def peak(self, micro: int) -> int:
        """Bytes at the peak of a step whose micro-batches have ``micro`` rows."""
        return self.fixed + self.per_row * min(micro, self.rows)


def estimate(target: Target, policy: Trainable, s: Settings) -> Estimate | None:
    """Peak memory of a step, or None for a policy without a transformer."""
    config = getattr(getattr(getattr(policy, "lm", None), "module", None), "config", None)
    if config is None:
        return None
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    lm: Any = policy.lm  # pyright: ignore[reportAttributeAccessIssue]
    size = torch.finfo(lm.dtype).bits // 8
    layers, d, f = (
        config.num_hidden_layers,
        config.hidden_size,
        getattr(config, "intermediate_size", 4 * config.hidden_size),
    )
    heads = config.num_attention_heads
    longest = max(len(p.context) + len(p.evidence) for p in target.problems)
    tokens = longest + target.space.max_moves
    kept = layers * d if s.checkpointing else layers * (10 * d + 4 * f + 3 * heads * tokens)
    weights = sum(p.numel() * p.element_size() for p in lm.module.parameters())
    trained = sum(p.numel() for p in policy.parameters().values())
    per_step = min(len(target.problems), s.per_step or min(len(target.problems), 8))
    rows = per_step * s.samples
    wide = getattr(config, "num_key_value_heads", heads) * d // heads
    cache = rows * layers * 2 * wide * tokens * size
    y = max(len(p.evidence) for p in target.problems)
    branches = target.space.max_moves + 1 if s.objective in ("auto", *NEED_PREFIXES) else 1
    valued = min(rows * branches * y, max(branches * y, CHUNK // 2048))  # tokens of one chunk of the reward's pass
    reward = valued * (size * (6 * d + 4 * f) + (4 + 2 * size) * heads * tokens)
    fixed = weights + 12 * trained + 3 * cache + reward + 3 * 4 * CHUNK
    return Estimate(fixed, size * kept * tokens, rows)


def free_memory(device: torch.device) -> int:
    """Bytes that can still be taken on a device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 8 << 30


def micro_batch(target: Target, policy: Trainable, s: Settings) -> int | None:
    """Rows that run with gradient at once: as asked, or as many as fit by the estimate; None for all."""
    if s.micro is not None:
        return s.micro
    found = estimate(target, policy, s)
    if found is None:
        return None
    room = SHARE * free_memory(policy.lm.device) - (found.fixed - _there(policy))  # pyright: ignore[reportAttributeAccessIssue]
    return max(1, min(found.rows, int(room / found.per_row)))


def _there(policy: Trainable) -> int:
    """Bytes of the weights, which are loaded already."""
    return sum(p.numel() * p.element_size() for p in policy.lm.module.parameters())  # pyright: ignore[reportAttributeAccessIssue]
