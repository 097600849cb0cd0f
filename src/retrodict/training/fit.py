"""Gradient ascent on a weighted sum of log-probabilities of text under one trainable view of a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from retrodict.errors import InputError
from retrodict.models.cached import pad_ids
from retrodict.rng import generator
from retrodict.training.settings import Settings
from retrodict.training.step import clip

LogP = Callable[[Int[Tensor, " r"]], Float[Tensor, " r"]]
"""Indices of rows to their log-probabilities, with gradient."""


def text_log_p(
    lm: Any, heads: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], grad: bool = False
) -> Float[Tensor, " r"]:
    """log p(answer | head) of each row in one teacher-forced pass, differentiable where asked for."""
    ids, n = pad_ids(answers, lm.device)
    log_p, _, _ = lm.score(heads, ids, n, grad=grad)
    inside = torch.arange(ids.shape[1], device=log_p.device) < n[:, None]
    return torch.where(inside, log_p, 0.0).sum(1)


def choice_log_p(
    lm: Any, heads: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], grad: bool = False
) -> Float[Tensor, "r c"]:
    """log p(answer c | head) given that it is one of them: a head is run once, and each answer after it."""
    every = [h for h in heads for _ in answers]
    found = text_log_p(lm, every, [*answers] * len(heads), grad)
    return found.view(len(heads), len(answers)).log_softmax(-1)


def maximise(
    lm: Any,
    log_p: LogP,
    weights: Float[Tensor, " r"],
    *,
    steps: int,
    lr: float,
    batch: int | None = None,
    micro: int = 64,
    seed: int = 0,
    on_metrics: Callable[[dict[str, Any]], None] | None = None,
) -> float:
    """``steps`` of Adam (warm-up, then a cosine, as ``amortize``) up sum_r w_r log p_r; gives the last value.

    With ``batch`` each step takes that many rows, drawn with probability proportional to their weights, which is
    unbiased for the sum at weights of sum 1; without, all rows with their weights.
    """
    parameters: Mapping[str, Tensor] = lm.parameters()
    if not parameters:
        raise InputError(f"{lm.name} has nothing to train; give it an adapter (lm.add_adapter('likelihood'))")
    plan = Settings(steps=steps, lr=lr)
    adam = torch.optim.Adam(list(parameters.values()), lr=lr, betas=(0.9, 0.99))
    gen, value = generator(seed, "cpu", 4), 0.0
    weights = weights.double().cpu()
    for step in range(steps):
        index, w = torch.arange(len(weights)), weights
        if batch is not None:
            index = torch.multinomial(weights, batch, replacement=True, generator=gen)
            w = torch.full((batch,), 1 / batch, dtype=torch.float64)
        adam.zero_grad(set_to_none=True)
        value = ascend(lm, log_p, index, w, micro)
        norm = clip(parameters, plan.clip)
        adam.param_groups[0]["lr"] = plan.rate(step)
        adam.step()
        lm.refresh()
        if on_metrics is not None:
            on_metrics({"step": step, "log_p": value, "grad_norm": norm, "lr": plan.rate(step)})
    return value


def ascend(lm: Any, log_p: LogP, index: Int[Tensor, " r"], weights: Float[Tensor, " r"], micro: int) -> float:
    """Add the gradient of -sum_r w_r log p_r to the parameters', ``micro`` rows at a time; gives the sum."""
    total = 0.0
    for rows, w in zip(index.split(micro), weights.split(micro), strict=True):
        found = log_p(rows)
        loss = -(w.to(found) * found).sum()
        loss.backward()
        lm.settle()
        total -= float(loss.detach())
    return total
