"""Learning a latent-variable model p_theta(x, z) whose posterior is approximate: EM, wake-sleep, GFlowNet-EM.

    E       q(z | x)  ->  p_theta(z | x)           exactly, by any sampler, or by any objective (amortized)
    M       theta up  sum_k w_k log p_theta(x, z_k)                 z_k, w_k from the E-step, sum_k w_k = 1 for each x
    sleep   z, x ~ p_theta,   q up log q(z | x)                                             no data, no posterior

With an exact E-step no round lowers log p(x) (Dempster et al. 1977), and the gradient of M is that of log p(x)
(Fisher's identity). With weighted draws it is that up to O(1/K); with plain draws of q, M raises E_q[log p - log q],
the bound that q gives (Neal and Hinton 1998). Sleep minimises KL(p, q) averaged over the model's own data (Hinton et
al. 1995), which is not the KL of the data that are learned from unless the model is right.

GFlowNet-EM (Hu et al. 2023, arXiv:2302.06576) does M only while the smoothed loss of E is below a threshold, which
falls linearly with the number of E steps (6 to 3 over 10,000 there, smoothing 0.9): q must first be near the posterior.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from retrodict.errors import InputError
from retrodict.particles import Particles
from retrodict.protocols import Trainable
from retrodict.records import Rollouts
from retrodict.rng import child_seed, generator
from retrodict.samplers.common import device_of
from retrodict.samplers.exact import exact
from retrodict.samplers.importance import ancestral, importance
from retrodict.targets.algebra import Target
from retrodict.training.distributed import world_of
from retrodict.training.loop import Run, advance, begin, evaluate
from retrodict.training.settings import settings
from retrodict.training.star import equal_by_problem
from retrodict.training.trice import climb

SMOOTHING = 0.9
"""Of the loss of E that a threshold is compared with."""

EStep = Callable[[Target, int], Particles]
"""(target, seed) -> a weighted sample of the posterior."""
OnMetrics = Callable[[dict[str, Any]], None]
"""Called with each step's numbers, its ``round`` and ``phase``: "e", "sleep" or "m"."""


@runtime_checkable
class LatentModel(Protocol):
    """A model of data x with latents z and parameters theta, which ``m_step`` changes in place."""

    @property
    def target(self) -> Target:
        """log gamma = log p_theta(x_m, z) at the present theta; one problem for each datum x_m."""
        ...

    def m_step(self, particles: Particles, seed: int) -> float:
        """Raise sum_m sum_k w_mk log p_theta(x_m, z_mk), in closed form or by gradient.

        ``particles.objects.problem`` indexes the problems of ``target``, of which a round may use only some. Gives the
        value reached, a mean over data (:func:`weighted_rows` makes the weights).
        """
        ...


@runtime_checkable
class Dreams(LatentModel, Protocol):
    """A model that draws (z, x) from itself: what sleep needs."""

    def simulate(self, n: int, gen: torch.Generator) -> tuple[Target, Rollouts]:
        """n pairs: the target on problems that hold the x, and one row for each of them, its z."""
        ...


@runtime_checkable
class Summable(LatentModel, Protocol):
    """A model whose sum over z is known, by a recursion or by enumeration."""

    def log_evidence(self) -> Float[Tensor, " m"]:
        """log p_theta(x_m) of each datum."""
        ...


@runtime_checkable
class Recursive(LatentModel, Protocol):
    """A model whose exact E-step needs no list of latents (responsibilities, forward-backward, inside-outside)."""

    def exact_step(self) -> float:
        """One round of exact EM from expected statistics; gives the mean of log p(x) before it."""
        ...


@dataclass(frozen=True)
class Round:
    """What one round did.

    Attributes:
        number: from 0.
        loss: smoothed loss of an amortized E-step after it.
        value: what M reached; None where the loss was not below the threshold and M was left out.
        log_evidence: the mean of log p(x) after the round, where it was asked for (``track``).
    """

    number: int
    loss: float | None
    value: float | None
    log_evidence: float | None = None


@dataclass(frozen=True)
class Learned:
    """The answer of :func:`learn`: the policy (None without one), and what each round did."""

    policy: Any
    rounds: tuple[Round, ...]


def weighted_rows(particles: Particles) -> tuple[Rollouts, Float[Tensor, " r"]]:
    """The objects of positive weight; weights sum to 1 over a problem's, and to 1 over all problems that have any."""
    w = particles.weights
    alive = (w > 0).any(1)
    if not bool(alive.any()):
        raise InputError("every particle has weight zero, so there is nothing to learn from; draw more")
    flat = (w / alive.sum()).flatten()
    keep = (flat > 0).nonzero().squeeze(1)
    return particles.objects.take(keep), flat[keep]


def learn(
    model: LatentModel,
    policy: Trainable | None = None,
    *,
    rounds: int,
    e_step: EStep | str | None = None,
    e_steps: int = 100,
    draws: int = 32,
    weighted: bool = False,
    sleep: float = 0.0,
    dreams: int = 128,
    threshold: tuple[float, float, int] | None = None,
    per_round: int | None = None,
    track: bool = False,
    seed: int = 0,
    on_metrics: OnMetrics | None = None,
    **given: Any,
) -> Learned:
    """Alternate E and M; theta is learned in place. One seed, one result.

    Args:
        model: what learns.
        policy: q, for an amortized E-step; trained on over all rounds by one optimiser.
        rounds: E-steps, each followed by an M-step.
        e_step: in the policy's place a sampler, as ``lambda t, seed: rd.smc(t, n=64, seed=seed)``, or "exact": by the
            model's own recursion where it has one, else by enumeration. The default where there is no policy.
        e_steps: gradient steps of an amortized E-step; 0 leaves q as it is.
        draws: latents of each datum that an M-step learns from, drawn from q.
        weighted: weight them by gamma / q, which aims at log p(x) and not at q's bound of it.
        sleep: share of the gradient steps that are sleep; with 1 it is the wake-sleep algorithm.
        dreams: pairs (z, x) of a sleep step.
        threshold: (start, end, steps): M only while the smoothed loss of E is below this, which moves linearly.
        per_round: data that a round's M-step learns from, in turn and in random order; all by default.
        track: keep the mean of log p(x) after each round, where the model gives it.
        on_metrics: called with each step's numbers.
        **given: settings of the training loop: objective, samples, per_step, lr, ... With ``evaluate``, so many fresh
            draws of each datum are judged at the end, in ``policy.about``.

    Raises:
        InputError: choices that do not go together; every weight zero.
    """
    _check(model, policy, rounds, e_step, e_steps, sleep, dreams, threshold, given)
    _check_m(model, policy, weighted, track, per_round)
    wake = None
    if policy is not None:
        wake = WakeSleep(model, policy, rounds * e_steps, sleep, dreams, {**given, "seed": child_seed(seed, 1)})
    told: list[Round] = []
    for i in range(rounds):
        if wake is not None:
            wake.train(e_steps, i, on_metrics)
        value = None
        if wake is None or threshold is None or wake.loss < at_step(threshold, wake.steps):
            value = _maximise(model, wake, e_step, draws, weighted, per_round, i, seed)
            if on_metrics is not None:
                on_metrics({"round": i, "phase": "m", "value": value})
        mean = float(model.log_evidence().mean()) if track and isinstance(model, Summable) else None
        told.append(Round(i, None if wake is None or math.isnan(wake.loss) else wake.loss, value, mean))
    if wake is not None:
        wake.finish("evaluate" in given)
    return Learned(policy, tuple(told))


def at_step(threshold: tuple[float, float, int], step: int) -> float:
    """A threshold after so many E steps."""
    start, end, steps = threshold
    return end + (start - end) * max(0.0, 1 - step / max(1, steps))


def _maximise(
    model: LatentModel, wake: WakeSleep | None, e_step: EStep | str | None, draws: int, weighted: bool,
    per_round: int | None, i: int, seed: int,
) -> float:  # fmt: skip
    """The posterior of the round's data, and the M-step on it."""
    exactly = wake is None and not callable(e_step)
    if exactly and per_round is None and isinstance(model, Recursive):
        return model.exact_step()
    target, chosen = _part(model.target, per_round, i, seed)
    at = child_seed(seed, 2, i)
    if wake is not None:
        particles = wake.draw(target, draws, weighted, at)
    else:
        particles = e_step(target, at) if callable(e_step) else exact(target)
    if chosen is not None:
        objects = replace(particles.objects, problem=chosen[particles.objects.problem])
        particles = replace(particles, objects=objects)
    return model.m_step(particles, child_seed(seed, 3, i))


def _part(target: Target, per_round: int | None, i: int, seed: int) -> tuple[Target, Tensor | None]:
    """A round's share of the data: epochs in random order, each datum once."""
    m = len(target.problems)
    if per_round is None or per_round >= m:
        return target, None
    each = m // per_round
    order = torch.randperm(m, generator=generator(seed, "cpu", 4, i // each))
    chosen = order[(i % each) * per_round :][:per_round]
    return target.on([target.problems[p] for p in chosen.tolist()]), chosen


class WakeSleep:
    """The amortized E-step: one run of the training loop, over all rounds, whose target follows the model."""

    def __init__(
        self, model: LatentModel, policy: Trainable, steps: int, sleep: float, dreams: int, given: dict[str, Any]
    ) -> None:
        self.model, self.policy, self.sleep, self.dreams = model, policy, sleep, dreams
        self.loss = math.nan
        target, plan = model.target, settings(**given, steps=max(1, steps))
        self.run: Run | None = begin(target, policy, plan, world_of(policy)) if steps else None

    @property
    def steps(self) -> int:
        """Gradient steps so far."""
        return 0 if self.run is None else self.run.step

    def train(self, steps: int, i: int, on_metrics: OnMetrics | None) -> None:
        """Gradient steps of one round; every 1 / ``sleep``-th of all is sleep."""
        run = self.run
        for _ in range(steps if run is not None else 0):
            assert run is not None
            if math.floor((run.step + 1) * self.sleep) > math.floor(run.step * self.sleep):
                found, phase = self._dream(run), "sleep"
            else:
                run.target = self.model.target
                found, phase = advance(run), "e"
                if "loss" in found:
                    old = found["loss"] if math.isnan(self.loss) else self.loss
                    self.loss = SMOOTHING * old + (1 - SMOOTHING) * found["loss"]
            run.seconds += sum(v for k, v in found.items() if k.startswith("seconds_"))
            if on_metrics is not None:
                on_metrics({**found, "round": i, "phase": phase})

    def _dream(self, run: Run) -> dict[str, Any]:
        """One step of Adam up log q(z | x) on pairs that the model draws."""
        assert isinstance(self.model, Dreams)
        gen = generator(run.settings.seed, device_of(run.target, self.policy), 10, run.step)
        target, rows = self.model.simulate(self.dreams, gen)
        found = climb(self.policy.on(target.problems), run.adam, rows, equal_by_problem(rows), run.settings, run.step)
        self.policy.refresh()
        run.step += 1
        return {**found, "step": run.step - 1, "objective": "mle"}

    def draw(self, target: Target, n: int, weighted: bool, seed: int) -> Particles:
        """q's draws on some data, plain or weighted by gamma / q."""
        policy: Any = self.policy if target.problems is self.policy.problems else self.policy.on(target.problems)
        if weighted:
            return importance(target, policy, n=n, seed=seed, runs=1)
        return ancestral(target, policy, n=n, seed=seed)

    def finish(self, fresh: bool) -> None:
        """What ``policy.about`` says, as after ``amortize``; with ``fresh`` draws of every datum evaluated."""
        run, policy = self.run, self.policy
        if run is None or not hasattr(policy, "about"):
            return
        target, s = self.model.target, run.settings
        found = evaluate(target, policy, s.evaluate, s.seed) if fresh and run.world.draws else {}
        policy.about = {"target": target.formula, "sees": getattr(policy, "sees", "x"), "settings": s.plain(),  # pyright: ignore[reportAttributeAccessIssue]
                        "objective": run.objective, "seconds": run.seconds, "evaluation": found}  # fmt: skip


def _check(
    model: LatentModel, policy: Trainable | None, rounds: int, e_step: EStep | str | None, e_steps: int, sleep: float,
    dreams: int, threshold: tuple[float, float, int] | None, given: dict[str, Any],
) -> None:  # fmt: skip
    """Refuse what does not go together, in one line."""
    if rounds < 1 or e_steps < 0 or dreams < 1:
        raise InputError(f"rounds and dreams must be at least 1 and e_steps 0: {rounds}, {dreams}, {e_steps}")
    if isinstance(e_step, str) and e_step != "exact":
        raise InputError(f"unknown E-step {e_step!r}; write 'exact', give a sampler, or give policy= to train")
    if policy is not None and e_step is not None:
        raise InputError("e_step= is the whole E-step; give no policy, weighted= or settings of amortize beside it")
    if policy is None and (given or sleep or threshold is not None):
        what = next(iter(given), "sleep" if sleep else "threshold")
        raise InputError(f"{what}= is for an amortized E-step: give policy=")
    taken = {"folder", "resume", "plan", "steps", "evaluate_every"} & set(given)
    if taken:
        raise InputError(f"learning keeps no checkpoints and plans its steps by e_steps: leave out {min(taken)}")
    if not 0 <= sleep <= 1:
        raise InputError(f"sleep is a share of the steps, between 0 and 1, not {sleep}")
    if sleep and not isinstance(model, Dreams):
        raise InputError(f"{type(model).__name__} has no simulate(n, gen), so it cannot sleep: give sleep=0")
    if threshold is not None and (e_steps == 0 or sleep == 1):
        raise InputError("a threshold reads the loss of E, and no step of E is asked for: give e_steps, sleep below 1")


def _check_m(model: LatentModel, policy: Trainable | None, weighted: bool, track: bool, per_round: int | None) -> None:
    """What the M-step reads and what is told of it."""
    if (weighted and policy is None) or (track and not isinstance(model, Summable)):
        raise InputError("weighted= needs a policy= to weight the draws of, and track= a model with log_evidence()")
    if per_round is not None and per_round < 1:
        raise InputError(f"per_round is a number of data, at least 1, not {per_round}")
