"""``retrodict bench reasoning``: ways to spend the same tokens on chains of steps, on three tasks.

    plain chain               one chain near temperature 0
    self-consistency          n draws of the prior, the most frequent answer
    best of n                 the same draws, the answer of the one that the verifier likes best (of equals the first)
    weighted votes            the same draws by importance weight: the posterior predictive of the answer
    particle filter           n particles, resampled where a process reward of completed steps says so; votes by weight

The confidence of an answer is its share of the votes (for the plain chain and best of n there is only 1). The target
and the rewards are those of ``tasks.reasoning``; no verifier sees an answer. One bar: the particle filter's tokens
are at most 10% more than those of the n draws, or the comparison would not be one at equal budgets.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from retrodict.bench.rows import Row, at_most, show_only, write
from retrodict.diagnostics.calibration import calibration_error, risk_coverage
from retrodict.diagnostics.votes import votes
from retrodict.errors import InputError, nearest
from retrodict.models.load import load
from retrodict.numerics import NEG_INF
from retrodict.particles import Particles
from retrodict.samplers.common import positive
from retrodict.samplers.importance import ancestral, importance
from retrodict.samplers.smc import smc
from retrodict.tasks.reasoning import TASKS, Task, task

SUITE = "reasoning"
GREEDY = 0.05
"""Temperature of the chain that stands for the most likely one."""
BUDGET = 1.1
"""Most tokens of the particle filter, as a multiple of those of as many draws."""


def unweighted(p: Particles) -> Particles:
    """The same chains with equal weights."""
    return replace(p, log_w=torch.zeros_like(p.log_w))


def best_only(p: Particles) -> Particles:
    """All weight on the first chain of the largest weight of each problem."""
    only = torch.full_like(p.log_w, NEG_INF)
    return replace(p, log_w=only.scatter(1, p.log_w.argmax(1, keepdim=True), 0.0))


def answers(made: Task, n: int, seed: int) -> dict[str, Particles]:
    """Each method's weighted chains; three of them read the same draws."""
    draws = importance(made.target, n=n, runs=1, seed=seed)
    return {
        "plain chain": ancestral(made.target, n=1, seed=seed, temperature=GREEDY),
        "self-consistency": unweighted(draws),
        "best of n": best_only(draws),
        "weighted votes": draws,
        "particle filter": smc(made.guided, n=n, runs=1, seed=seed),
    }


def graded(made: Task, method: str, p: Particles) -> list[Row]:
    """Accuracy with its standard error, calibration, cost."""
    found = votes(p, made.target.problems, made.answer)
    right = torch.tensor(made.correct(found))
    b, hit = len(right), float(right.double().mean())
    values = {
        "accuracy": hit,
        "standard error of accuracy": math.sqrt(hit * (1 - hit) / b),
        "calibration error": calibration_error(found.share, right),
        "risk at half coverage": risk_coverage(found.share, right).at(0.5),
        "tokens": p.trace.counts["tokens"],
        "seconds": p.trace.counts["seconds"],
    }
    return [show_only(SUITE, made.name, method, metric, v, f"{b} questions, {p.k} chains") for metric, v in
            values.items()]  # fmt: skip


def run(
    tasks: str = "arithmetic,chain_sum,number_sorting",
    questions: int = 24,
    chains: int = 12,
    model: str = "smollm2",
    dtype: str = "",
    device: str = "",
    seed: int = 1,
    partial: str = "",
) -> list[Row]:
    """The table, task by task; about six minutes of one core's time.

    Args:
        tasks: names joined by commas.
        questions: of each task.
        chains: a question, for every method but the plain chain.
        model, dtype, device: see ``rd.load``; "" for its defaults.
        seed: of questions and chains; the constants of the tasks were chosen on a dozen questions of seed 0.
        partial: a JSON file of the rows so far.
    """
    names = [t.strip() for t in tasks.split(",")]
    for name in names:
        if name not in TASKS:
            raise InputError(f"unknown task {name!r}{nearest(name, TASKS)}")
    positive(questions=questions, chains=chains)
    given: dict[str, Any] = {k: v for k, v in (("dtype", dtype), ("device", device)) if v}
    lm, rows = load(model, **given), []
    for name in names:
        made = task(name, lm, questions, seed)
        drawn = answers(made, chains, seed)
        for method, p in drawn.items():
            new = graded(made, method, p)
            rows += new
            print(f"{name}, {method}: " + ", ".join(f"{r.metric} {r.value:.3g}" for r in new), flush=True)
        spent = {m: p.trace.counts["tokens"] for m, p in drawn.items()}
        ratio = spent["particle filter"] / spent["self-consistency"]
        rows.append(at_most(SUITE, name, "particle filter", "tokens, over those of the draws", ratio, BUDGET))
        if partial:
            write(rows, Path(partial))
    return rows
