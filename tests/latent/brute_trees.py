"""Trees and their sums by plain recursion, written without the library's charts: what these are held to."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from retrodict.latent.pcfg import PCFG


def every_tree(pcfg: PCFG, sentence: tuple[int, ...], label: int = 0) -> Iterator[tuple[str, float]]:
    """(brackets, log-probability) of each tree of a label over a sentence, Catalan times labels."""
    if len(sentence) == 1:
        p = float(pcfg.lexical[label, sentence[0]])
        if p > -math.inf:
            yield f"({pcfg.labels[label]} {pcfg.words[sentence[0]]})", p
        return
    for left in range(len(pcfg.labels)):
        for right in range(len(pcfg.labels)):
            rule = float(pcfg.binary[label, left, right])
            if rule == -math.inf:
                continue
            for k in range(1, len(sentence)):
                for a, p in every_tree(pcfg, sentence[:k], left):
                    for b, q in every_tree(pcfg, sentence[k:], right):
                        yield f"({pcfg.labels[label]} {a} {b})", rule + p + q


def split_off_by_one(rule: Float[Tensor, "s s s"], leaf: Float[Tensor, "m l s"]) -> Float[Tensor, " m"]:
    """Planted: log beta(root) of whole sentences where the last place to split is forgotten in spans of 3 or more."""
    m, length, s = leaf.shape
    beta: dict[tuple[int, int], Tensor] = {(i, i + 1): leaf[:, i] for i in range(length)}
    for w in range(2, length + 1):
        for i in range(length - w + 1):
            ends = range(i + 1, i + w) if w == 2 else range(i + 1, i + w - 1)
            beta[i, i + w] = torch.stack([
                (rule + beta[i, k][:, None, :, None] + beta[k, i + w][:, None, None, :]).flatten(2).logsumexp(2)
                for k in ends
            ]).logsumexp(0)  # fmt: skip
    return beta[0, length][:, 0]
