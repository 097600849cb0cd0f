"""Continuations of different lengths after the rows of a cache."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from retrodict.models.cached import pad_ids
from retrodict.protocols import Carry, LanguageModel


def peek_ragged(
    lm: LanguageModel, cache: Carry, rows: Int[Tensor, " b"], suffixes: Sequence[Sequence[int]], skip: int = 0
) -> Float[Tensor, " b"]:
    """log p of each row's own suffix after ``rows`` of a cache; its first ``skip`` tokens are fed, not scored.

    One pass: shorter suffixes are padded on the right, which no real token sees; equal pairs of row and suffix are
    run once.
    """
    out = torch.zeros(len(rows), device=rows.device, dtype=torch.float64)
    pairs: dict[tuple[int, tuple[int, ...]], int] = {}
    place = [pairs.setdefault((r, tuple(y)), len(pairs)) for r, y in zip(rows.tolist(), suffixes, strict=True)]
    ids, length = pad_ids([y for _, y in pairs], rows.device)
    if ids.shape[1] <= skip:
        return out
    log_p = lm.peek(cache, ids, torch.tensor([r for r, _ in pairs], device=rows.device)).double()
    at = torch.arange(ids.shape[1], device=rows.device)
    value = torch.where((at >= skip) & (at < length[:, None]), log_p, 0.0).sum(1)
    return value[torch.tensor(place, device=rows.device)]
