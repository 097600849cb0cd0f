"""Continuations of different lengths after the rows of a cache."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from retrodict.protocols import Carry, LanguageModel


def peek_ragged(
    lm: LanguageModel, cache: Carry, rows: Int[Tensor, " b"], suffixes: Sequence[Sequence[int]], skip: int = 0
) -> Float[Tensor, " b"]:
    """log p of each row's own suffix after ``rows`` of a cache; its first ``skip`` tokens are fed, not scored.

    Rows of equal length go together, and equal (row, suffix) pairs are run once.
    """
    out = torch.zeros(len(rows), device=rows.device, dtype=torch.float64)
    groups: dict[int, dict[tuple[int, tuple[int, ...]], list[int]]] = {}
    for i, (row, suffix) in enumerate(zip(rows.tolist(), suffixes, strict=True)):
        if len(suffix) > skip:
            groups.setdefault(len(suffix), {}).setdefault((row, tuple(suffix)), []).append(i)
    for pairs in groups.values():
        ids = torch.tensor([suffix for _, suffix in pairs], device=rows.device)
        value = lm.peek(cache, ids, torch.tensor([row for row, _ in pairs], device=rows.device))[:, skip:].sum(1)
        for x, where in zip(value.double(), pairs.values(), strict=True):
            out[where] = x
    return out
