"""Learning to reason from a check of the answer: TRICE and STaR, on the same policies as every other objective.

z ~ p_theta(z | x), and z is right or wrong. Both climb log p_theta(right | x) = log sum_z p_theta(z | x) 1[z is right].

TRICE (Phan et al. 2023, arXiv:2312.02179) keeps one right z a problem, m, moved by independence Metropolis: a fresh
draw z' takes its place where it is right (c = 1), so that m follows p(z | x, right). With m' the memory after the move,
M problems, those with mask = 1 having a right m', and beta_i the others' share of right draws,

    g = 1/sum(mask) sum_i mask_i [ (1 - beta_i c_i) grad log p(m'_i) - beta_i (1 - c_i) grad log p(z'_i) ]
    beta_i = (sum_j c_j - c_i) / (sum_j mask_j - 1)

where the second part is a control variate of mean zero: a wrong draw is pushed down, and nothing is left to push where
all draws are right. STaR (Zelikman et al. 2022) fits the right draws themselves, from the original weights each round.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from retrodict.errors import InputError
from retrodict.numerics import NEG_INF
from retrodict.objectives.mle import object_log_q
from retrodict.protocols import Policy, Trainable
from retrodict.records import Rollouts, Scores, cat_rollouts
from retrodict.rng import generator
from retrodict.targets.algebra import Target
from retrodict.training.amortize import OnMetrics
from retrodict.training.collect import turn
from retrodict.training.settings import Settings, settings
from retrodict.training.step import clip, push

Correct = Callable[[Rollouts], Bool[Tensor, " b"]]
"""Which rows are right."""


def passes(target: Target, least: float = NEG_INF) -> Correct:
    """Right where every factor but the prior is above ``least`` nats, e.g. a ``bool`` verifier."""
    tests = {name: term for name, term in target.factors.items() if name != "prior"}
    if not tests:
        raise InputError("this target has nothing to check an answer with; multiply a verifier into it")

    def correct(rollouts: Rollouts) -> Bool[Tensor, " b"]:
        values = [term(rollouts).to(rollouts.n.device) > least for term in tests.values()]
        return torch.stack(values).all(0)

    return correct


def trice_weights(
    proposed: Bool[Tensor, " m"], remembered: Bool[Tensor, " m"]
) -> tuple[Float[Tensor, " m"], Float[Tensor, " m"]]:
    """Weights of grad log p of each problem's memory after the move, and of its fresh draw (signed).

    ``proposed`` says which fresh draws are right, ``remembered`` which memories were before the move.
    """
    c = proposed.double()
    mask = (proposed | remembered).double()
    beta = ((c.sum() - c) / (mask.sum() - 1).clamp_min(1)) if len(c) > 1 else torch.zeros_like(c)
    share = mask / mask.sum().clamp_min(1)
    return share * (1 - beta * c), -share * beta * (1 - c)


def signed_mle(
    scores: Scores, rollouts: Rollouts, log_gamma: Tensor | None, weights: Float[Tensor, " b"]
) -> tuple[Tensor, dict[str, float]]:
    """- sum_i w_i log p(row i) for weights of either sign: its negative gradient is sum_i w_i grad log p."""
    log_q = object_log_q(scores, rollouts)
    loss = -torch.where(weights != 0, weights.to(log_q) * log_q, 0.0).sum()
    return loss, {"loss": float(loss.detach())}


@dataclass(frozen=True)
class Memory:
    """One row a problem, and whether it is right. Rows that are not stand for nothing."""

    rows: Rollouts
    right: Bool[Tensor, " m"]

    def put(self, where: Int[Tensor, " k"], rows: Rollouts) -> Memory:
        """The memory with these problems' rows (right ones) in their place."""
        m = len(self.right)
        index = torch.arange(m, device=where.device)
        index[where] = m + torch.arange(len(where), device=where.device)
        right = self.right.clone()
        right[where] = True
        return Memory(bare(cat_rollouts([self.rows, bare(rows)]).take(index)), right)


def bare(rows: Rollouts) -> Rollouts:
    """Rows without the values of any term."""
    return replace(rows, terms={}, versions={}, behaviour={})


def remember(policy: Policy, correct: Correct, problems: int, tries: int, gen: torch.Generator) -> Memory:
    """A first memory: for each problem the first right one of ``tries`` draws (of a prompt with a hint, say)."""
    every = torch.arange(problems, device=gen.device)
    memory = Memory(bare(policy.sample(every, gen)), torch.zeros(problems, dtype=torch.bool, device=gen.device))
    for i in range(tries):
        drawn = memory.rows if i == 0 else policy.sample(every, gen)
        new = (correct(drawn) & ~memory.right).nonzero().squeeze(1)
        if len(new):
            memory = memory.put(new, drawn.take(new))
    return memory


def estimate(
    policy: Policy, correct: Correct, memory: Memory, problems: Sequence[int], gen: torch.Generator
) -> tuple[Memory, Rollouts, Float[Tensor, " b"], dict[str, float]]:
    """One move of the chains and the rows whose weighted sum of grad log p is TRICE's gradient."""
    chosen = torch.tensor(list(problems), device=gen.device)
    drawn = bare(policy.sample(chosen, gen))
    right = correct(drawn)
    of_memory, of_drawn = trice_weights(right, memory.right[chosen])
    hits = right.nonzero().squeeze(1)
    if len(hits):
        memory = memory.put(chosen[hits], drawn.take(hits))
    rows = cat_rollouts([memory.rows.take(chosen), drawn])
    weights = torch.cat([of_memory, of_drawn])
    keep = (weights != 0).nonzero().squeeze(1)
    found = {"accepted": float(right.double().mean()), "remembered": float(memory.right.double().mean())}
    return memory, rows.take(keep), weights[keep], found


def trice(
    policy: Trainable,
    correct: Correct,
    memory: Memory | None = None,
    *,
    tries: int = 4,
    on_metrics: OnMetrics | None = None,
    **given: Any,
) -> Memory:
    """Train a policy by TRICE; gives the last memory. One seed, one result.

    Args:
        policy: p(z | x), trained in place.
        correct: which rows are right, see :func:`passes`.
        memory: where the chains start; by default the right ones among ``tries`` draws of the policy.
        on_metrics: called with each step's numbers.
        **given: ``steps``, ``per_step`` problems each, ``lr``, ``clip``, ``micro``, ``seed`` of ``training.settings``.
    """
    s = settings(**given)
    m = len(policy.problems)
    device = place_of(policy)
    if memory is None:
        memory = remember(policy, correct, m, tries, generator(s.seed, device, 7))
    adam, per_step = adam_of(policy, s), min(m, s.per_step or m)
    for step in range(s.steps):
        order = torch.randperm(m, generator=generator(s.seed, "cpu", 1, step * per_step // m))
        chosen = turn(step, m, per_step, order)
        memory, rows, weights, found = estimate(policy, correct, memory, chosen, generator(s.seed, device, 8, step))
        if len(rows):
            found |= climb(policy, adam, rows, weights, s, step)
        if on_metrics is not None:
            on_metrics({"step": step, **found})
    return memory


def climb(
    policy: Trainable, adam: torch.optim.Adam, rows: Rollouts, weights: Float[Tensor, " b"], s: Settings, step: int
) -> dict[str, float]:
    """One step of Adam up sum_i w_i log p(row i)."""
    adam.zero_grad(set_to_none=True)
    none = torch.zeros(len(rows), dtype=torch.float64, device=rows.n.device)
    pushed = push(policy, lambda sc, r, g: signed_mle(sc, r, g, weights), rows, none, micro=s.micro)
    norm = clip(policy.parameters(), s.clip)
    adam.param_groups[0]["lr"] = s.rate(step)
    adam.step()
    policy.refresh()
    return {"loss": pushed.loss, "grad_norm": norm, "lr": s.rate(step)}


def adam_of(policy: Trainable, s: Settings) -> torch.optim.Adam:
    """Adam as ``amortize`` has it."""
    return torch.optim.Adam(list(policy.parameters().values()), lr=s.lr, betas=(0.9, 0.99))


def place_of(policy: Policy) -> torch.device:
    """Where the policy's model is."""
    return getattr(getattr(policy, "lm", None), "device", torch.device("cpu"))
