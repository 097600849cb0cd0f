"""STaR: fit the chains that reached the right answer, from the original weights each round (Zelikman et al. 2022).

    round:  z_k ~ p(z | x), keep the right ones;  failures: z ~ p(z | x, hint), keep the right ones
            theta <- Adam from the original weights up the mean over problems of the mean over kept z of log p(z | x)

Bias: each problem counts once however rare its right chains are, and hinted chains come from another distribution, so
the fixed point is not the maximum of log p(right | x); ``training.trice`` climbs that one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from retrodict.errors import InputError
from retrodict.protocols import Policy, Trainable
from retrodict.records import Rollouts, cat_rollouts
from retrodict.rng import generator
from retrodict.training.amortize import OnMetrics
from retrodict.training.settings import settings
from retrodict.training.trice import Correct, adam_of, bare, climb, place_of


def kept(
    policy: Policy, correct: Correct, problems: int, samples: int, hint: Policy | None, gen: torch.Generator,
    temperature: float = 1.0,
) -> tuple[Rollouts | None, Mapping[str, float]]:  # fmt: skip
    """The right ones of ``samples`` draws of each problem; where there is none, of as many draws of ``hint``."""
    every = torch.arange(problems, device=gen.device).repeat_interleave(samples)
    drawn = policy.sample(every, gen, {"temperature": temperature})
    right = correct(drawn)
    parts = [bare(drawn.take(right.nonzero().squeeze(1)))]
    solved = right.view(problems, samples).any(1)
    failed = (~solved).nonzero().squeeze(1)
    hinted = 0
    if hint is not None and len(failed):
        again = hint.sample(failed.repeat_interleave(samples), gen, {"temperature": temperature})
        good = correct(again)
        hinted = int(good.view(len(failed), samples).any(1).sum())
        parts.append(bare(again.take(good.nonzero().squeeze(1))))
    parts = [p for p in parts if len(p)]
    found = {"solved": float(solved.double().mean()), "hinted": hinted / problems}
    return (cat_rollouts(parts) if parts else None), found


def star(
    policy: Trainable,
    correct: Correct,
    *,
    rounds: int = 5,
    samples: int = 4,
    hint: Policy | None = None,
    growth: float = 1.2,
    temperature: float = 1.0,
    on_metrics: OnMetrics | None = None,
    **given: Any,
) -> Trainable:
    """Train a policy by STaR, in place. One seed, one result.

    Args:
        policy: p(z | x). Its weights now are the original ones that every round starts from.
        correct: which rows are right.
        rounds: sampling rounds.
        samples: draws of each problem in a round.
        hint: a policy over the same space whose prompt holds the answer (rationalisation); on the policy's own model
            it follows the weights: ``Amortized(policy.lm, space, problems, sees="(Answer:{evidence}) {context}")``.
        growth: of the number of gradient steps from round to round.
        temperature: of the draws.
        on_metrics: called with the numbers of each round.
        **given: ``steps`` of the first round, ``lr``, ``clip``, ``micro``, ``seed``: as for amortize.
    """
    s = settings(**given)
    if rounds < 1 or samples < 1:
        raise InputError(f"rounds and samples must be at least 1, not {rounds} and {samples}")
    origin = {n: p.detach().clone() for n, p in policy.parameters().items()}
    m, device = len(policy.problems), place_of(policy)
    for i in range(rounds):
        rows, found = kept(policy, correct, m, samples, hint, generator(s.seed, device, 9, i), temperature)
        if rows is not None:
            steps = round(s.steps * growth**i)
            plan = settings(**{**given, "steps": steps})
            restore(policy, origin)
            adam, weights = adam_of(policy, plan), equal_by_problem(rows)
            for step in range(steps):
                found = {**found, **climb(policy, adam, rows, weights, plan, step)}
        if on_metrics is not None:
            on_metrics({"round": i, "rows": 0 if rows is None else len(rows), **found})
    return policy


@torch.no_grad()
def restore(policy: Trainable, values: Mapping[str, Tensor]) -> None:
    """Give the parameters these values."""
    for name, p in policy.parameters().items():
        p.copy_(values[name])
    policy.refresh()


def equal_by_problem(rows: Rollouts) -> Tensor:
    """Weights of sum 1: the same for each problem that has rows, and for each row of a problem."""
    _, of, count = rows.problem.unique(return_inverse=True, return_counts=True)
    return (1.0 / count[of].double()) / len(count)
