"""Arithmetic with a calculator, amortized from ten annotated questions (Hu et al. 2024, arXiv:2310.04363, section 4.3).

    gamma(Z) = p(Z | X) p(Y | X, Z)      X: worked examples and the question      q(Z | X) sees what p sees before Z

Ten questions come with their steps; many more with their answers only. All methods start from the ten: supervised
fine-tuning stops there; the amortized ones go on with draws and a replay buffer that holds the annotations, at a reward
temperature that falls (gamma^(1/T), T from 1.1 to 0.5); PPO and GRPO go on with draws of their own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from retrodict.errors import InputError
from retrodict.objectives.table import NEED_PREFIXES
from retrodict.policies.amortized import Amortized
from retrodict.protocols import LanguageModel, Policy, Trainable
from retrodict.records import Rollouts, cat_rollouts
from retrodict.rng import generator
from retrodict.spaces.tools import ToolStrings
from retrodict.targets.algebra import Target
from retrodict.tasks.arithmetic import Question, generate, load, problems, space, target
from retrodict.training.collect import final_log_gamma
from retrodict.training.loop import Run, advance, begin
from retrodict.training.replay import written
from retrodict.training.settings import settings
from retrodict.training.trice import adam_of, climb, place_of

ANNOTATED = 10
"""Annotated questions that training may see."""
OFTEN = 5
"""How many times as often as any other an annotated question is drawn."""
TOKENS = 26
"""Free tokens of a string in training; the steps of four operands take at most 22."""
TOKENS_EVALUATED = 34
"""Free tokens of a string in evaluation; the steps of five operands take at most 30."""

DRAWN: dict[str, Any] = {"tempered": 0.25, "temperatures": (0.7, 1.5), "replay": 0.25, "priority": "reward"}
METHODS: Mapping[str, Mapping[str, Any]] = {
    "vargrad": {"objective": "vargrad", **DRAWN},
    "vargrad_own": {"objective": "vargrad", "reward_temperature": None},
    "pooled": {"objective": "pooled", **DRAWN},
    "subtb": {"objective": "subtb", **DRAWN},
    "ppo": {"objective": "ppo", "options": {"beta": 1.0}},
    "grpo": {"objective": "grpo", "options": {"beta": 1.0}},
    "grpo_reward": {"objective": "grpo"},
}
"""What each method goes on with after the annotations. ``vargrad_own``: q's own draws alone, at T = 1. ``ppo`` and
``grpo``: reward log p(Y | X, Z) and KL to the prior, R = log gamma - log q, of which the posterior is the optimum;
``grpo_reward``: log p(Y | X, Z) alone."""


# -- questions --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Data:
    """Questions to train on (annotated, and with answers only), and to be judged on, by number of operands."""

    annotated: Sequence[Question]
    unannotated: Sequence[Question]
    dev: Mapping[int, Sequence[Question]]


def questions(folder: str | Path | None = None, *, annotated: int = ANNOTATED, unannotated: int = 400, dev: int = 80,
              seed: int = 0) -> Data:  # fmt: skip
    """Questions of 3 and 4 operands to train on, and of 3, 4 and 5 to be judged on; none of these is trained on.

    Args:
        folder: with annotated_50.json, hard_dev.json and dev_{3,4,5}_operands.json (of the form that ``load`` reads);
            without one the questions are generated.
        annotated, unannotated: how many to train on.
        dev: how many of each number of operands to be judged on.
        seed: of generated questions.
    """
    if folder is None:
        judged = {k: generate(dev, operands=(k,), seed=seed + 100) for k in (3, 4, 5)}
        told = generate(2 * annotated + 50, seed=seed + 1)
        rest = [replace(q, rationale=None) for q in generate(unannotated + 500, seed=seed + 2)]
    else:
        root = Path(folder)
        judged = {k: load(root / f"dev_{k}_operands.json")[:dev] for k in (3, 4, 5)}
        told = [q for q in load(root / "annotated_50.json") if q.rationale]
        rest = load(root / "hard_dev.json")
    seen = {q.query for each in judged.values() for q in each}
    told = [q for q in told if q.query not in seen][:annotated]
    seen |= {q.query for q in told}
    rest = [q for q in rest if q.query not in seen][:unannotated]
    if len(told) < annotated or len(rest) < unannotated:
        raise InputError(f"there are {len(told)} annotated and {len(rest)} other questions, and {annotated} and "
                         f"{unannotated} were asked for; ask for fewer")  # fmt: skip
    return Data(told, rest, judged)


def written_ids(where: ToolStrings, question: Question) -> list[int]:
    """Moves of an annotated question: its steps, and after each "=" what the calculator writes.

    Raises:
        InputError: nobody wrote its steps.
    """
    if question.rationale is None:
        raise InputError(f"{question.query!r} has no written steps; give one with str_rationale")
    assert where.tokenizer is not None
    ids: list[int] = []
    for i, step in enumerate(question.rationale.split(", ")):
        ids += where.tokenizer.encode(f"{', ' if i else ' '}{step}")
        answer = where.tool.ask(where.tokenizer.decode(ids))
        ids += where.tokenizer.encode(answer) if answer else []
    return ids


def annotated_rows(policy: Policy, where: ToolStrings, data: Sequence[Question]) -> Rollouts:
    """Problem i's written steps as row i, for all of ``data``."""
    return cat_rollouts([written(policy, i, [written_ids(where, q)]) for i, q in enumerate(data)])


# -- training ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """A target with the annotated questions first, ``OFTEN`` times over, and a policy that starts as the prior."""

    target: Target
    policy: Amortized
    data: Data

    @property
    def space(self) -> ToolStrings:
        """Where the steps live."""
        assert isinstance(self.target.space, ToolStrings)
        return self.target.space

    def annotated(self) -> Rollouts:
        """The written steps, a row for each annotated question."""
        return annotated_rows(self.policy, self.space, self.data.annotated)


def task(lm: Any, data: Data, *, rank: int = 16, seed: int = 0, name: str = "arithmetic") -> Task:
    """Target and policy of a run: q reads what p reads (worked examples, question), and so starts as the prior."""
    where = space(lm, max_tokens=TOKENS)
    rows = problems(lm, [*data.annotated] * OFTEN + [*data.unannotated])
    view = lm.add_adapter(name, rank, None, "all-linear", seed)
    return Task(target(lm, rows, where), Amortized(view, where, rows), data)


def recipe(lm: LanguageModel, *, max_tokens: int = TOKENS) -> Target:
    """p(Z | X) p(Y | X, Z) of 256 generated questions without annotations, as a recipe names it."""
    return target(lm, problems(lm, generate(256, seed=2)), space(lm, max_tokens=max_tokens))


def imitate(policy: Trainable, rows: Rollouts, *, steps: int, lr: float, seed: int = 0) -> list[float]:
    """Supervised fine-tuning: Adam up the mean of log q(row); gives each step's mean negative log-likelihood."""
    plan = settings(steps=steps, lr=lr, seed=seed)
    adam, weights = adam_of(policy, plan), torch.full((len(rows),), 1 / len(rows), dtype=torch.float64)
    weights = weights.to(rows.n.device)
    return [climb(policy, adam, rows, weights, plan, step)["loss"] for step in range(steps)]


def seeded(run: Run, rows: Rollouts) -> int:
    """Put each annotated question's row into the buffers of its copies; gives the rows that are there."""
    target, prefixes = run.target, run.objective in NEED_PREFIXES
    valued = target.terms(replace(rows, terms={}, versions={}), prefixes)
    for copy in range(OFTEN):
        here = replace(valued, problem=valued.problem + copy * len(rows))
        run.replay.add(here, final_log_gamma(target, here), target.space.keys(here), 0)
    return len(run.replay)


def learn(
    task: Task,
    method: str,
    rows: Rollouts,
    *,
    seconds: float = float("inf"),
    on_metrics: Callable[[dict[str, Any]], None] | None = None,
    **given: Any,
) -> dict[str, Any]:
    """Train the task's policy in place by a method; gives the last step's metrics, steps, tokens and seconds.

    Args:
        task: from :func:`task`.
        method: a row of METHODS.
        rows: of :meth:`Task.annotated`: they start the replay buffer of the methods that have one.
        seconds: no step begins after these.
        on_metrics: called with each step's numbers.
        **given: settings over the method's own: ``steps``, ``samples``, ``per_step``, ``lr``, ``seed``, ...
    """
    told = {**METHODS[method], **given}
    told.setdefault("options", {})
    if told["objective"] in ("vargrad", "pooled", "subtb"):
        told.setdefault("reward_temperature", (1.1, 0.5, int(0.8 * told.get("steps", 100))))
    goal = task.target.with_betas(prior=0.0) if method == "grpo_reward" else task.target
    run = begin(goal, task.policy, settings(**told))
    if run.settings.mixture.replay:
        seeded(run, rows)
    began, tokens, metrics = time.perf_counter(), 0, {}
    while run.step < run.settings.steps and time.perf_counter() - began < seconds:
        metrics = advance(run)
        tokens += metrics.get("tokens", 0)
        if on_metrics is not None:
            on_metrics(metrics)
    return {**metrics, "steps": run.step, "tokens": tokens, "seconds": time.perf_counter() - began}


# -- evaluation -------------------------------------------------------------------------------------------------------


def chains(
    policy: Amortized, lm: LanguageModel, data: Sequence[Question], n: int, *, seed: int = 0, temperature: float = 1.0,
    batch: int = 512,
) -> Rollouts:  # fmt: skip
    """n chains of thought for each question, ``batch`` rows at a time, in a space with room for five operands."""
    wide = Amortized(policy.lm, space(lm, max_tokens=TOKENS_EVALUATED), problems(lm, data), policy.sees)
    device = place_of(wide)
    which = torch.arange(len(data), device=device).repeat_interleave(n)
    gen = generator(seed, device, 11)
    how = None if temperature == 1.0 else {"temperature": temperature}
    return cat_rollouts([wide.sample(part, gen, how) for part in which.split(batch)])


def kept_values(policy: Trainable) -> dict[str, Tensor]:
    """The parameters as they are now, for ``training.star.restore``."""
    return {name: p.detach().clone() for name, p in policy.parameters().items()}
