"""Time to quality: the evidence gap of an amortized policy against seconds of training, objective by objective.

The problems are stories that the model wrote itself, so the gap has both sides: upper minus lower bound of log Z, which
is KL(q, posterior) + KL(posterior, q) on average over stories (Grosse et al. 2015). Exact middles are used for the
upper bound only. Every method starts from the same model, draws as many objects a step, and has its step size chosen by
the gap on other stories after a shorter run. Seconds are those of training, evaluation apart: on a CPU those that it
computed for (all threads together), so that a busy neighbour does not bend a curve; on a GPU those on the clock.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from retrodict.bench.rows import Row, show_only, write
from retrodict.errors import InputError, nearest
from retrodict.models.load import load
from retrodict.objectives.mle import mle, object_log_q
from retrodict.records import Rollouts
from retrodict.rng import generator
from retrodict.samplers.smc import smc
from retrodict.targets.algebra import Target
from retrodict.tasks.infilling import stories
from retrodict.training.amortize import grow
from retrodict.training.loop import advance, begin
from retrodict.training.settings import settings
from retrodict.training.step import clip, push

SUITE = "quality"
METHODS: dict[str, dict[str, Any]] = {
    "subtb": {"objective": "subtb"},
    "vargrad": {"objective": "vargrad"},
    "pooled": {"objective": "pooled"},
    "ppo": {"objective": "ppo", "options": {"beta": 1.0}},
    "sir": {"objective": "sir"},
    "sft": {},
}
"""What each is trained with. PPO's reward has the entropy of q in it, so that its optimum is the posterior too; "sir"
is the weighted EM step; "sft" imitates SMC samples drawn beforehand, whose seconds count."""


@dataclass(frozen=True)
class Plan:
    """The numbers of one run."""

    samples: int
    rank: int
    draws: int
    seed: int
    smc_particles: int = 64


def run(
    problems: int = 4,
    seconds: float = 150.0,
    every: float = 30.0,
    tune: float = 30.0,
    lrs: str = "5e-4,2e-3",
    methods: str = "subtb,vargrad,pooled,ppo,sft,sir",
    samples: int = 8,
    draws: int = 32,
    max_tokens: int = 8,
    after: int = 6,
    rank: int = 16,
    model: str = "smollm2",
    dtype: str = "",
    device: str = "",
    seed: int = 0,
    partial: str = "",
) -> list[Row]:
    """The curve of each method; each point is printed as soon as it is there.

    Args:
        problems: stories that are trained on (and as many others that step sizes are chosen on).
        seconds, every: of training for each method, and between two points of its curve.
        tune: of training for each step size tried; 0 takes the first of ``lrs``.
        lrs: step sizes to choose from, joined by commas.
        methods: rows of METHODS, joined by commas.
        samples: objects of each story in a step.
        draws: fresh draws of each story behind a point.
        max_tokens, after: limits on the middle and on what follows.
        rank: of the adapter.
        model, dtype, device: see ``rd.load``; "" for its defaults.
        seed: one seed, one result (up to timing: how many steps fit is measured).
        partial: a JSON file of the rows so far.
    """
    names = methods.split(",")
    for name in names:
        if name not in METHODS:
            raise InputError(f"unknown method {name!r}{nearest(name, METHODS)}")
    rates = [float(x) for x in lrs.split(",")]
    lm: Any = load(model, **{k: v for k, v in (("dtype", dtype), ("device", device)) if v})
    goal, exact = stories(lm, problems, seed, max_tokens=max_tokens, after=after)
    other, other_exact = stories(lm, problems, seed + 1, max_tokens=max_tokens, after=after)
    plan, rows = Plan(samples, rank, draws, seed), []
    name = f"{problems} stories of the model's own, Z <= {max_tokens}, Y <= {after} tokens, {samples} samples a step"
    for method in names:
        lr = rates[0]
        if tune > 0 and len(rates) > 1:
            found = {r: curve(other, other_exact, method, r, tune, tune, plan)[-1].gap for r in rates}
            lr = min(found, key=lambda r: found[r])
        rows.append(show_only(SUITE, name, method, "step size", lr))

        def told(p: Point, method: str = method, lr: float = lr) -> None:
            new = [("gap (nats)", p.gap, f"+- {p.se:.2f} over stories"), ("lower bound (nats)", p.lower, ""),
                   ("steps", p.steps, "")]  # fmt: skip
            rows.extend(show_only(SUITE, name, method, f"{what} after {p.mark:.0f} s", v, n) for what, v, n in new)
            print(f"{method}, lr {lr:g}, {p.mark:.0f} s: gap {p.gap:.2f} +- {p.se:.2f}, {p.steps} steps", flush=True)
            if partial:
                write(rows, Path(partial))

        curve(goal, exact, method, lr, seconds, every, plan, told)
    return rows


@dataclass(frozen=True)
class Point:
    """A policy after some seconds of training: upper minus lower bound, its error over problems, the lower bound."""

    mark: float
    gap: float
    se: float
    lower: float
    steps: int


def curve(goal: Target, exact: Rollouts, method: str, lr: float, seconds: float, every: float, plan: Plan,
          told: Callable[[Point], None] = lambda p: None) -> list[Point]:  # fmt: skip
    """Points of one method at 0, every, 2 every, ... seconds of training."""
    policy = grow(goal, sees="x", rank=plan.rank, seed=plan.seed)
    step = (_imitate if method == "sft" else _learn)(goal, policy, method, lr, plan)
    used, done, mark, points = 0.0, 0, 0.0, []
    while True:
        if used >= mark:
            points.append(judge(goal, exact, policy, plan, mark, done))
            told(points[-1])
            if mark >= seconds:
                return points
            mark = min(mark + every, seconds)
        began = clock(policy.lm.device)
        step()
        used, done = used + clock(policy.lm.device) - began, done + 1


def clock(device: torch.device) -> float:
    """Seconds that count, see above."""
    if device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


@torch.no_grad()
def judge(goal: Target, exact: Rollouts, policy: Any, plan: Plan, mark: float, done: int) -> Point:
    """Bounds from fresh draws of q and from the exact middles."""
    m = len(goal.problems)
    gen = generator(plan.seed, policy.lm.device, 31)
    rows = policy.sample(torch.arange(m, device=gen.device).repeat_interleave(plan.draws), gen)
    lower = _log_w(goal, policy, rows).view(m, -1).mean(1)
    gap = _log_w(goal, policy, exact.to(gen.device)) - lower
    return Point(mark, float(gap.mean()), float(gap.std() / m**0.5), float(lower.mean()), done)


def _log_w(goal: Target, policy: Any, rows: Rollouts) -> Tensor:
    """log gamma - log q of whole objects."""
    return goal.log_gamma(rows) - object_log_q(policy.score(rows), rows).double()


def _learn(goal: Target, policy: Any, method: str, lr: float, plan: Plan) -> Callable[[], Any]:
    """One step of the training loop, at a constant step size: how many will fit is not known."""
    given = settings(samples=plan.samples, lr=lr, lr_end=1.0, steps=10**6, seed=plan.seed,
                     per_step=len(goal.problems), **METHODS[method])  # fmt: skip
    training = begin(goal, policy, given)
    return lambda: advance(training)


def _imitate(goal: Target, policy: Any, method: str, lr: float, plan: Plan) -> Callable[[], Any]:
    """One step of supervised fine-tuning on SMC samples, which the first step draws."""
    m, gen = len(goal.problems), generator(plan.seed, "cpu", 32)
    adam = torch.optim.Adam(list(policy.parameters().values()), lr=lr, betas=(0.9, 0.99))
    kept: list[Rollouts] = []

    def step() -> None:
        if not kept:
            p = smc(goal, n=plan.smc_particles, runs=1, seed=plan.seed)
            index = torch.multinomial(p.weights, plan.smc_particles, replacement=True, generator=gen)
            kept.append(p.objects.take((index + torch.arange(m)[:, None] * p.k).flatten()).to(policy.lm.device))
        pick = torch.randint(plan.smc_particles, (m, plan.samples), generator=gen)
        rows = kept[0].take((pick + torch.arange(m)[:, None] * plan.smc_particles).flatten().to(policy.lm.device))
        adam.zero_grad(set_to_none=True)
        push(policy, mle, rows, torch.zeros(len(rows), dtype=torch.float64, device=rows.n.device))
        clip(policy.parameters(), 1.0)
        adam.step()
        policy.refresh()

    return step
