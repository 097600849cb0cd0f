"""Expectation-maximisation over a textual latent: q learns to explain, then p learns from the explanations.

    E   q(Z | X)  ->  p(Z | X, Y)                                             any objective, or any sampler
    M   phi += lr * grad sum_k w_k log p_phi(Y | X, Z_k)                      Z_k drawn in the E-step, sum w = 1

The prior p(Z | X) stays as it is; p(Y | X, Z) becomes a view of the same weights with an adapter of its own. The
rounds, and what is known of their bias, are those of ``training.learn``. Source: Hu et al. 2024, subjectivity.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from retrodict.errors import InputError
from retrodict.particles import Particles
from retrodict.protocols import Trainable
from retrodict.records import Rollouts
from retrodict.rng import child_seed
from retrodict.targets.algebra import Target
from retrodict.targets.choice import Choice
from retrodict.targets.likelihood import Likelihood
from retrodict.targets.simulate import simulate
from retrodict.training.amortize import grow
from retrodict.training.fit import LogP, choice_log_p, maximise, text_log_p
from retrodict.training.learn import EStep, OnMetrics, learn, weighted_rows

Evidence = Likelihood | Choice


def likelihood_of(target: Target) -> Evidence:
    """The factor that says what Y is worth. Raises InputError where there is none."""
    term = target.factors.get("likelihood")
    if not isinstance(term, Likelihood | Choice):
        raise InputError("this target has no likelihood p(Y | X, Z) to learn; build it from problems with evidence")
    return term


def with_likelihood(target: Target, term: Evidence) -> Target:
    """The target with another likelihood in the place of its own."""
    return replace(target, factors={**target.factors, "likelihood": term})


def restricted(target: Target, answers: tuple[tuple[int, ...], ...]) -> Target:
    """The target whose likelihood is normalised over a set of answers (``targets.choice``)."""
    old = likelihood_of(target)
    term = Choice(old.lm, old.space, old.problems, answers)
    term.index(range(len(target.problems)))
    return with_likelihood(target, term)


def grow_likelihood(
    target: Target,
    *,
    rank: int = 16,
    alpha: float | None = None,
    targets: str | list[str] = "all-linear",
    seed: int = 0,
) -> Target:
    """The target with its likelihood on a trainable view: a new adapter, unless it has one already."""
    term = likelihood_of(target)
    lm: Any = term.lm
    if not hasattr(lm, "add_adapter"):
        raise InputError(f"{lm.name} can be given no adapter, so its likelihood cannot be learned; use rd.load(...)")
    if lm.parameters():
        return target
    free = next(n for n in ("likelihood", *(f"likelihood_{i}" for i in range(2, 999))) if n not in lm.adapters)
    return with_likelihood(target, replace(term, lm=lm.add_adapter(free, rank, alpha, targets, seed)))


def evidence_log_p(term: Evidence, rollouts: Rollouts, grad: bool = False) -> Float[Tensor, " b"]:
    """log p(Y | X, z) of each row by plain teacher forcing on X, z and the stop's text; differentiable if asked for."""
    at = rollouts.problem.tolist()
    rows = zip(at, rollouts.moves.tolist(), rollouts.n.tolist(), rollouts.stop.tolist(), strict=True)
    heads = [[*term.problems[p].context, *z[:n], *term.space.stops.text_ids(s)] for p, z, n, s in rows]
    if isinstance(term, Choice):
        found = choice_log_p(term.lm, heads, term.answers, grad)
        return found.gather(1, term.index(at).to(found.device)[:, None]).squeeze(1)
    return text_log_p(term.lm, heads, [term.problems[p].evidence for p in at], grad)


def m_step(
    term: Evidence,
    particles: Particles,
    *,
    steps: int,
    lr: float = 1e-3,
    batch: int | None = None,
    micro: int = 64,
    seed: int = 0,
    on_metrics: OnMetrics | None = None,
) -> float:
    """Raise sum_k w_k log p(Y | X, Z_k) by Adam; gives its last value (a mean over problems). See ``fit.maximise``."""
    rows, weights = weighted_rows(particles)
    return maximise(term.lm, _log_p(term, rows), weights, steps=steps, lr=lr, batch=batch, micro=micro, seed=seed,
                    on_metrics=on_metrics)  # fmt: skip


def _log_p(term: Evidence, rows: Rollouts) -> LogP:
    def of(index: Int[Tensor, " r"]) -> Float[Tensor, " r"]:
        return evidence_log_p(term, rows.take(index), grad=True)

    return of


@dataclass
class Rationales:
    """prior * likelihood of a language model as a model that ``learn`` knows: only p(Y | X, Z) learns.

    Attributes:
        target: its likelihood is on a trainable view (:func:`grow_likelihood`).
        steps, lr, batch, micro: of an M-step, see :func:`m_step`.
        tokens, until: of the evidence that it writes in its sleep, see ``targets.simulate``.
        on_metrics: called with the numbers of each gradient step of M.
        done: M-steps so far.
    """

    target: Target
    steps: int = 50
    lr: float = 1e-3
    batch: int | None = None
    micro: int = 64
    tokens: int = 16
    until: str | None = None
    on_metrics: OnMetrics | None = None
    done: int = 0

    def m_step(self, particles: Particles, seed: int) -> float:
        """:func:`m_step`."""
        at, told = {"round": self.done, "phase": "m"}, self.on_metrics
        self.done += 1
        return m_step(likelihood_of(self.target), particles, steps=self.steps, lr=self.lr, batch=self.batch,
                      micro=self.micro, seed=seed,
                      on_metrics=None if told is None else lambda found: told({**found, **at}))  # fmt: skip

    def simulate(self, n: int, gen: torch.Generator) -> tuple[Target, Rollouts]:
        """n problems whose evidence the model wrote, and the latents that it wrote them after."""
        seed = int(torch.randint(2**31, (), generator=gen, device=gen.device))
        return simulate(self.target, n, seed, tokens=self.tokens, until=self.until)


def em(
    target: Target,
    policy: Trainable | None = None,
    *,
    rounds: int = 1,
    e_steps: int = 100,
    m_steps: int = 50,
    draws: int = 32,
    weighted: bool = False,
    e_step: EStep | None = None,
    m_lr: float = 1e-3,
    m_batch: int | None = None,
    m_micro: int = 64,
    m_rank: int = 16,
    seed: int = 0,
    on_metrics: OnMetrics | None = None,
    **given: Any,
) -> tuple[Any, Target]:
    """:func:`retrodict.training.learn.learn` for a textual latent; one seed, one result.

    Args:
        target: prior * likelihood; its likelihood's view is trained (a new adapter where it has none). With a
            :class:`Choice` likelihood both steps are those of a classifier, see :func:`restricted`.
        policy: q, trained on from where it is; a new adapter by default.
        rounds: E-steps, each followed by an M-step.
        e_steps: gradient steps of an E-step; 0 leaves the policy as it is.
        m_steps: gradient steps of an M-step; ``m_lr``, ``m_batch`` rows each (all by default), ``m_micro`` at once.
        draws: latents of each problem that an M-step learns from.
        weighted: weight q's draws by gamma / q, which aims at log p(Y | X) and not at q's bound of it.
        e_step: a sampler to use in the policy's place, e.g. ``lambda t, seed: rd.smc(t, n=64, seed=seed)``; its
            weights are respected.
        m_rank: rank of the likelihood's adapter.
        on_metrics: called with each step's numbers, with ``round`` and ``phase`` ("e", "sleep" or "m").
        **given: settings of :func:`amortize` for the E-steps; ``sleep``, ``dreams`` and ``threshold`` of ``learn``.

    Returns:
        The policy (None with ``e_step``) and the target with the likelihood that was learned.
    """
    if e_step is not None and (policy is not None or given or weighted):
        raise InputError("e_step= is the whole E-step; give no policy, weighted= or settings of amortize beside it")
    if rounds < 1 or m_steps < 1 or e_steps < 0:
        raise InputError(f"rounds and m_steps must be at least 1 and e_steps 0: {rounds}, {m_steps}, {e_steps}")
    if {"folder", "resume", "plan"} & set(given):
        raise InputError("em keeps no checkpoints and makes a plan for each round; leave out folder, resume and plan")
    if e_steps == 0 and policy is None and e_step is None:
        raise InputError("e_steps=0 draws from a policy as it is: give policy=")
    target = grow_likelihood(target, rank=m_rank, seed=child_seed(seed, 0))
    grown = {name: given.pop(name) for name in ("sees", "rank", "alpha", "targets") if name in given}
    if policy is None and e_step is None:
        policy = grow(target, seed=child_seed(seed, 1), **grown)
    model = Rationales(target, m_steps, m_lr, m_batch, m_micro, on_metrics=on_metrics)
    learn(model, policy, rounds=rounds, e_step=e_step, e_steps=e_steps, draws=draws, weighted=weighted, seed=seed,
          on_metrics=None if on_metrics is None else lambda found: found["phase"] == "m" or on_metrics(found),
          **given)  # fmt: skip
    return policy, target
