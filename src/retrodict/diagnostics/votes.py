"""Final answers of weighted chains: the posterior predictive of the answer, and the votes that approximate it.

    share(y | X) = sum over chains k of W_k 1[answer(Z_k) = y]

With equal weights this is self-consistency (Wang et al. 2023, arXiv 2203.11171); with those of importance sampling or
SMC it estimates the posterior predictive p(y | X, verifier), biased O(1/n) as all self-normalised averages are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from retrodict.errors import InputError
from retrodict.particles import Particles
from retrodict.records import Problems

Answer = Callable[[str, Mapping[str, Any]], str | None]
"""(a chain's text, its data row) to its final answer, or None where it gives none."""


@dataclass(frozen=True)
class Votes:
    """What the chains of each problem answer.

    Attributes:
        answers: the winner of each problem; None where no chain of positive weight answered.
        share: its share of the weight, the confidence that calibration is about.
        shares: every answer's share, the largest first. Chains without an answer keep theirs, so it may sum below one.
    """

    answers: tuple[str | None, ...]
    share: Float[Tensor, " m"]
    shares: tuple[Mapping[str, float], ...]


def votes(p: Particles, problems: Problems, answer: Answer) -> Votes:
    """Count the final answers by weight; of equals the first in order wins.

    Raises:
        InputError: another number of problems than the particles have.
    """
    if len(problems) != p.m:
        raise InputError(f"{len(problems)} problems for particles of {p.m}; give those of the target")
    weights, found = p.weights.tolist(), []
    for i, problem in enumerate(problems):
        total: dict[str, float] = {}
        for text, w in zip(p.shown[i * p.k : (i + 1) * p.k], weights[i], strict=True):
            y = answer(text, problem.row) if w > 0 else None
            if y is not None:
                total[y] = total.get(y, 0.0) + w
        found.append(dict(sorted(total.items(), key=lambda item: -item[1])))
    share = torch.tensor([max(f.values(), default=0.0) for f in found], dtype=torch.float64).clamp_max(1.0)
    return Votes(tuple(next(iter(f), None) for f in found), share, tuple(found))
