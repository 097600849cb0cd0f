"""``retrodict.amortize``: from a target to a policy that samples it in one pass."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from retrodict.errors import InputError
from retrodict.policies.amortized import Amortized
from retrodict.policies.card import read_card
from retrodict.policies.lm import LMPolicy
from retrodict.protocols import Trainable
from retrodict.targets.algebra import Target
from retrodict.training.checkpoint import Keeper
from retrodict.training.distributed import world_of
from retrodict.training.loop import OnFailure, Run, begin, evaluate, steps
from retrodict.training.settings import Settings, settings

OnMetrics = Callable[[dict[str, Any]], None]


def grow(
    target: Target,
    *,
    sees: str = "x",
    rank: int = 16,
    alpha: float | None = None,
    targets: str | list[str] = "all-linear",
    seed: int = 0,
    name: str = "amortized",
) -> Amortized:
    """A policy for a target that starts as its prior's model: a new LoRA adapter on the same weights.

    Raises InputError where the prior is no language model that can take an adapter.
    """
    lm, space = _adaptable(target)
    taken, free = set(lm.adapters), name
    while free in taken:
        free = f"{name}_{len(taken)}"
    return Amortized(lm.add_adapter(free, rank, alpha, targets, seed), space, target.problems, sees)


def load_policy(target: Target, adapter: str | os.PathLike[str], sees: str | None = None) -> Amortized:
    """A policy for a target from an adapter: any PEFT folder, one of ``policy.save`` or one that another trainer wrote.

    Args:
        target: what it is to sample; its prior's model is the base, and stays the prior.
        adapter: the folder, or the name of an adapter that the model has already (``rd.load(base, adapter=folder)``
            calls it "default").
        sees: what q reads; by default what the folder's card says, or "x" where it has none.

    Raises:
        InputError: an adapter of another model, or a prior that cannot take one.
    """
    lm, space = _adaptable(target)
    if str(adapter) in lm.adapters:
        return Amortized(lm.view(str(adapter)), space, target.problems, sees or "x")
    view, told = lm.load_adapter(adapter), read_card(adapter)
    policy = Amortized(view, space, target.problems, sees or told.get("sees") or "x")
    policy.about = told.get("about") or {}
    return policy


def _adaptable(target: Target) -> tuple[Any, Any]:
    """The prior's model and space, where it can take an adapter."""
    prior = target.prior
    if not isinstance(prior, LMPolicy) or not hasattr(prior.lm, "add_adapter"):
        raise InputError("only a prior from rd.load can be given an adapter; for any other pass policy=, a Trainable")
    return prior.lm, prior.space


def amortize(
    target: Target,
    policy: Trainable | None = None,
    *,
    sees: str = "x",
    rank: int = 16,
    alpha: float | None = None,
    targets: str | list[str] = "all-linear",
    folder: str | os.PathLike[str] | None = None,
    resume: bool = False,
    save_every: int = 0,
    on_metrics: OnMetrics | None = None,
    on_failure: OnFailure | None = None,
    plan: Settings | None = None,
    **given: Any,
) -> Any:
    """Fine-tune a policy until it draws from the target's posterior in one pass.

    Args:
        target: what to sample; all its problems are trained on.
        policy: what to train; a new LoRA adapter on the prior's model by default.
        sees: what that adapter reads: "x", "xy", or a template (``policies.amortized``).
        rank, alpha, targets: of the adapter (LoRA; ``alpha`` 2 * rank by default).
        folder: where checkpoints and ``metrics.jsonl`` go, a new one unless ``resume``; nothing is written without it.
        resume: go on from the newest checkpoint in ``folder``; the result is that of an uninterrupted run.
        save_every: steps between checkpoints (20 where a folder is given).
        on_metrics: called with each step's numbers.
        on_failure: called with (step, batch, cause) where a step had to be skipped.
        plan, **given: the settings of ``training.settings``: objective, steps, samples, lr, replay, seed, ...

    Returns:
        The trained policy; ``about`` holds the settings, the cost and a last evaluation on fresh draws.

    Raises:
        InputError: settings, target and objective that do not go together; a checkpoint of another run.
        TrainingError: three steps in a row whose loss was not finite.
    """
    if plan is not None and given:
        raise InputError(f"give plan= or settings, not both ({', '.join(given)})")
    s = plan or settings(**given)
    if policy is None:
        policy = grow(target, sees=sees, rank=rank, alpha=alpha, targets=targets, seed=s.seed)
    run = begin(target, policy, s, world_of(policy))
    keeper = Keeper(Path(folder), save_every or 20) if folder is not None else None
    if keeper is not None:
        keeper.start(resume, run)
    elif resume:
        raise InputError("resume needs the folder that the run was started with")
    seconds = train(run, keeper, on_metrics, on_failure)
    found = evaluate(target, policy, s.evaluate, s.seed) if run.world.draws else {}
    about = {"target": target.formula, "sees": getattr(policy, "sees", "x"), "settings": s.plain(),
             "objective": run.objective, "seconds": seconds, "evaluation": found}  # fmt: skip
    if keeper is not None and run.world.first:
        keeper.finish(run, about)
    run.world.wait()
    if hasattr(policy, "about"):
        policy.about = about  # pyright: ignore[reportAttributeAccessIssue]
    return policy


def train(run: Run, keeper: Keeper | None, on_metrics: OnMetrics | None, on_failure: OnFailure | None) -> float:
    """All remaining steps; gives the seconds that the run took. A checkpoint is kept whatever ends them."""

    def failed(step: int, batch: Any, why: str) -> None:
        if not run.world.first:
            return
        if keeper is not None:
            keeper.failure(step, batch, why)
        if on_failure is not None:
            on_failure(step, batch, why)

    try:
        for metrics in steps(run, failed):
            every = run.settings.evaluate_every
            if every and run.step % every == 0 and run.world.draws:
                metrics["evaluation"] = evaluate(run.target, run.policy, run.settings.evaluate, run.settings.seed)
            run.seconds += sum(v for k, v in metrics.items() if k.startswith("seconds_"))
            metrics["seconds"] = run.seconds
            if keeper is not None and run.world.first:
                keeper.step(run, metrics)
            if on_metrics is not None and run.world.first:
                on_metrics(metrics)
    except BaseException:
        if keeper is not None and run.world.first and run.whole:  # half a step is no run to go on from
            keeper.save(run)
        raise
    return run.seconds
