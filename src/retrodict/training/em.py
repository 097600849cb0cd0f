"""Expectation-maximisation over a textual latent: q learns to explain, then p learns from the explanations.

    E   q(Z | X)  ->  p(Z | X, Y)                                             any objective, or any sampler
    M   phi += lr * grad sum_k w_k log p_phi(Y | X, Z_k)                      Z_k drawn in the E-step, sum w = 1

The prior p(Z | X) stays as it is; p(Y | X, Z) becomes a view of the same weights with an adapter of its own. At the
exact posterior the gradient of M is that of log p(Y | X) (Fisher's identity) and EM never lowers it (Dempster et al.
1977); with draws of q it raises the bound that q gives. Source: Hu et al. 2024, subjectivity.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor

from retrodict.errors import InputError
from retrodict.particles import Particles
from retrodict.protocols import Trainable
from retrodict.records import Rollouts
from retrodict.rng import child_seed
from retrodict.samplers.importance import ancestral, importance
from retrodict.targets.algebra import Target
from retrodict.targets.choice import Choice
from retrodict.targets.likelihood import Likelihood
from retrodict.training.amortize import OnMetrics, amortize
from retrodict.training.fit import LogP, choice_log_p, maximise, text_log_p

Evidence = Likelihood | Choice
EStep = Callable[[Target, int], Particles]
"""(target, seed) -> a weighted sample of the posterior."""


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


def weighted_rows(particles: Particles) -> tuple[Rollouts, Float[Tensor, " r"]]:
    """The objects of positive weight; weights sum to 1 over a problem's, and to 1 over all problems that have any."""
    w = particles.weights
    alive = (w > 0).any(1)
    if not bool(alive.any()):
        raise InputError("every particle has weight zero, so there is nothing to learn from; draw more")
    flat = (w / alive.sum()).flatten()
    keep = (flat > 0).nonzero().squeeze(1)
    return particles.objects.take(keep), flat[keep]


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
    """Alternate E and M; one seed, one result.

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
        on_metrics: called with each step's numbers, with ``round`` and ``phase`` ("e" or "m").
        **given: settings of :func:`amortize` for the E-steps.

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
    for i in range(rounds):
        if e_step is not None:
            particles = e_step(target, child_seed(seed, 1, i))
        else:
            if e_steps:
                policy = amortize(target, policy, steps=e_steps, seed=child_seed(seed, 1, i),
                                  on_metrics=_tagged(on_metrics, i, "e"), **given)  # fmt: skip
            particles = _draws(target, policy, draws, weighted, child_seed(seed, 2, i))
        m_step(likelihood_of(target), particles, steps=m_steps, lr=m_lr, batch=m_batch, micro=m_micro,
               seed=child_seed(seed, 3, i), on_metrics=_tagged(on_metrics, i, "m"))  # fmt: skip
    return policy, target


def _draws(target: Target, policy: Any, n: int, weighted: bool, seed: int) -> Particles:
    if weighted:
        return importance(target, policy, n=n, seed=seed, runs=1)
    return ancestral(target, policy, n=n, seed=seed)


def _tagged(on_metrics: OnMetrics | None, i: int, phase: str) -> OnMetrics | None:
    return None if on_metrics is None else lambda found: on_metrics({**found, "round": i, "phase": phase})
