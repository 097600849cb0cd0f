"""One q for many stories: trained on some openings, judged on stories from openings that it never saw.

A held-out story's gap is its upper bound of log Z, from the exact middle, minus its lower bound, from fresh draws of q:
KL(q, posterior) + KL(posterior, q) on average. The prior, which does not read Y, has a gap too; the bar is half of it.

    vargrad    on training stories, whose exact middles it never sees
    sleep      -log q(Z | X, Y) on the model's own triples (X, Z, Y), fresh ones each step, which are no one's problem

Sleep sees exact middles, though of other stories than any that is judged: it is what simulation allows where one may
sample the model but has no problem of one's own to learn from, and stands beside the bar, not under it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from retrodict.bench.quality import Plan, Point, clock, judge
from retrodict.bench.rows import Row, at_least, show_only, write
from retrodict.errors import InputError, nearest
from retrodict.models.load import load
from retrodict.objectives.mle import mle
from retrodict.policies.amortized import Amortized
from retrodict.records import Rollouts
from retrodict.rng import child_seed
from retrodict.targets.algebra import Target
from retrodict.targets.simulate import simulate
from retrodict.tasks.infilling import stories
from retrodict.tasks.infilling import target as begun
from retrodict.training.amortize import grow
from retrodict.training.loop import advance, begin
from retrodict.training.settings import settings
from retrodict.training.step import clip, push

SUITE = "infill_many"
METHODS = ("vargrad", "sleep")
BAR = 0.5


def run(
    seconds: float = 900.0,
    methods: str = "vargrad,sleep",
    problems: int = 64,
    held_out: int = 16,
    per_step: int = 4,
    samples: int = 8,
    batch: int = 16,
    draws: int = 16,
    max_tokens: int = 8,
    after: int = 10,
    lr: float = 1e-3,
    rank: int = 32,
    sees: str = "xy",
    model: str = "smollm2",
    dtype: str = "",
    seed: int = 0,
    partial: str = "",
) -> list[Row]:
    """The prior's gap on held-out stories, and each method's before and after training.

    Args:
        seconds: of training, for each method: those that the processor computed for (on a GPU those on the clock).
        methods: of METHODS, joined by commas.
        problems, held_out: stories to train on (vargrad), and to judge on.
        per_step, samples: stories of a step, and draws of each (vargrad).
        batch: stories of a step (sleep).
        draws: of each held-out story behind a lower bound.
        max_tokens, after: limits on the middle and on what follows.
        lr, rank: of the adapter; ``sees`` what it reads.
        model, dtype: see ``rd.load``; "" for its defaults.
        seed: one seed, one result (up to timing: how many steps fit is measured).
        partial: a JSON file of the rows so far.
    """
    for m in methods.split(","):
        if m not in METHODS:
            raise InputError(f"unknown method {m!r}{nearest(m, METHODS)}")
    lm: Any = load(model, **({"dtype": dtype} if dtype else {}))
    size: dict[str, Any] = {"max_tokens": max_tokens, "after": after}
    train, _ = stories(lm, problems, seed, **size)
    test, exact = stories(lm, held_out, seed, held_out=True, **size)
    plan, rows = Plan(samples, rank, draws, seed), []
    name = f"infill_many, {held_out} held-out stories, Z <= {max_tokens}, Y <= {after} tokens"

    def told(method: str, p: Point) -> None:
        when = f"after {p.mark:.0f} s"
        rows.extend([show_only(SUITE, name, method, f"gap (nats) {when}", p.gap, f"+- {p.se:.2f} over stories"),
                     show_only(SUITE, name, method, f"lower bound (nats) {when}", p.lower),
                     show_only(SUITE, name, method, f"steps {when}", p.steps)])  # fmt: skip
        print(f"{method}, {p.mark:.0f} s: gap {p.gap:.2f} +- {p.se:.2f}, {p.steps} steps", flush=True)
        if partial:
            write(rows, Path(partial))

    assert test.prior is not None
    prior = judge(test, exact, test.prior, plan, 0.0, 0)
    told("prior", prior)
    for method in methods.split(","):
        policy = grow(train, sees=sees, rank=rank, seed=seed)
        step = _sleep(lm, policy, batch, size, lr, seed) if method == "sleep" else _learn(
            train, policy, per_step, samples, lr, seed)  # fmt: skip
        told(method, judge(test, exact, policy.on(test.problems), plan, 0.0, 0))
        used, done = 0.0, 0
        while used < seconds:
            began = clock(lm.device)
            step()
            used, done = used + clock(lm.device) - began, done + 1
        end = judge(test, exact, policy.on(test.problems), plan, seconds, done)
        told(method, end)
        held = (SUITE, name, method, "share of the prior's gap closed", 1 - end.gap / prior.gap)
        rows.append(at_least(*held, BAR) if method == "vargrad" else show_only(*held, "sees middles of other stories"))
    return rows


def _learn(train: Target, policy: Amortized, per_step: int, samples: int, lr: float, seed: int) -> Callable[[], Any]:
    """One step of the training loop, at a constant step size."""
    given = settings(objective="vargrad", samples=samples, per_step=per_step, lr=lr, lr_end=1.0, steps=10**6, seed=seed)
    training = begin(train, policy, given)
    return lambda: advance(training)


def _sleep(lm: Any, policy: Amortized, batch: int, size: dict[str, Any], lr: float, seed: int) -> Callable[[], Any]:
    """One step of maximum likelihood on triples that the model writes for it, X from the training openings."""
    start = begun(lm, max_tokens=size["max_tokens"], seed=seed)
    adam = torch.optim.Adam(list(policy.parameters().values()), lr=lr, betas=(0.9, 0.99))
    done = 0

    def step() -> None:
        nonlocal done
        some = start.on([start.problems[(done * batch + i) % len(start.problems)] for i in range(batch)])
        dream, rows = _dream(some, batch, child_seed(seed, 41, done), size["after"])
        adam.zero_grad(set_to_none=True)
        push(policy.on(dream.problems), mle, rows, torch.zeros(len(rows), dtype=torch.float64, device=lm.device))
        clip(policy.parameters(), 1.0)
        adam.step()
        policy.refresh()
        done += 1

    return step


def _dream(start: Target, n: int, seed: int, after: int) -> tuple[Target, Rollouts]:
    dream, rows = simulate(start, n, seed, tokens=after, until=".")
    return dream, rows.to(start.prior.lm.device)  # pyright: ignore[reportOptionalMemberAccess, reportAttributeAccessIssue]
