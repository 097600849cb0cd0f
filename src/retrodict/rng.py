"""Randomness: one seed, one result. No function in this library touches a global random state."""

from __future__ import annotations

import numpy as np
import torch

from retrodict.errors import InputError


def generator(seed: int, device: torch.device | str = "cpu", *path: int) -> torch.Generator:
    """A torch generator for ``seed``; ``path`` names an independent child stream (run 3, step 7, ...)."""
    if seed < 0:
        raise InputError(f"seed must be 0 or more, not {seed}")
    state = np.random.SeedSequence(seed, spawn_key=path).generate_state(2, np.uint32)
    gen = torch.Generator(device=device)
    gen.manual_seed(int(state[0]) << 31 ^ int(state[1]))
    return gen


def child_seed(seed: int, *path: int) -> int:
    """An independent integer seed for a child stream."""
    return int(np.random.SeedSequence(seed, spawn_key=path).generate_state(1, np.uint32)[0])
