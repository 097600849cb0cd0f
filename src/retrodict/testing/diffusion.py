"""Small posteriors of priors over paths, and the mistakes that relative trajectory balance ships with, planted."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from retrodict.latent.masked_diffusion import StringTerm, masked_target
from retrodict.objectives.groups import groups, mean, summary
from retrodict.objectives.mle import object_log_q
from retrodict.objectives.residual import residual
from retrodict.policies.masked import MaskedMLP, MaskedPolicy
from retrodict.policies.net import NetPolicy
from retrodict.protocols import Policy
from retrodict.records import Problem, Rollouts, Scores
from retrodict.rng import generator
from retrodict.spaces.enumerate import enumerate_objects
from retrodict.spaces.masked import Masked
from retrodict.spaces.sets import Subsets
from retrodict.targets.algebra import Target
from retrodict.targets.prior import Prior
from retrodict.testing.sets import SetTerm


def plus_mean(scores: Scores, rollouts: Rollouts, log_gamma: Tensor) -> tuple[Tensor, dict[str, float]]:
    """RTB in VarGrad form with + for -: mean of (a + mean a)^2, as GFNOrg/diffusion-finetuning 21bfa22 released it.

    On policy its expected gradient is right, with more variance; from any other samples it has another optimum.
    """
    _, _, a = residual(scores, rollouts, log_gamma, backward=False)
    of, count = groups(rollouts.problem, least=2, name="rtb")
    loss = mean((a + mean(a, of, count)[of]).square(), of, count).mean()
    return loss, summary(loss, a, of, count)


def without_prior(target: Target) -> Target:
    """The same factors, the prior's path density taken for one of objects: objectives then multiply it by P_B."""
    return replace(target, prior=None)


def random_masked(length: int = 2, vocab: int = 3, seed: int = 0, scale: float = 3.0) -> MaskedPolicy:
    """An untrained masked model, far from even: its conditionals disagree between orders."""
    net = MaskedMLP(length, vocab, hidden=32, seed=seed)
    with torch.no_grad():
        weight = net.parameters["out.weight"][: length * vocab]
        weight.copy_(scale * torch.randn(weight.shape, generator=generator(seed, "cpu", 1)) / weight.shape[1] ** 0.5)
    return MaskedPolicy(Masked(length, vocab), [Problem((), name="strings")], net)


def random_rewards(space: Masked, seed: int = 0, scale: float = 2.0) -> StringTerm:
    """log r of every string, drawn at random."""
    size = (space.vocab,) * space.length
    table = scale * torch.randn(size, generator=generator(seed, "cpu", 2), dtype=torch.float64)
    return StringTerm("reward", space, lambda tokens: table[tokens.unbind(1)])


def random_posterior(seed: int = 0) -> Target:
    """Rewards on the strings of an untrained masked model."""
    prior = random_masked(seed=seed)
    return masked_target(prior, random_rewards(prior.space, seed))


def set_posterior(atoms: int = 3, seed: int = 0) -> Target:
    """A prior over the *paths* to subsets, times a table of subsets: sets of n members have n! paths."""
    space, problems = Subsets(atoms), [Problem((), name="sets")]
    prior = NetPolicy(space, problems, hidden=32, seed=seed)
    table = torch.randn(2**atoms, generator=generator(seed), dtype=torch.float64)
    return Target(space, problems, {"prior": Prior(prior, prefixes=False), "table": SetTerm(table)}, prior=prior)


def object_law(policy: Policy, problem: int = 0) -> dict[tuple[int, ...], float]:
    """The probability of every object of a small space under a policy: a sum over its paths."""
    rows = enumerate_objects(policy.space, problem)
    law: dict[tuple[int, ...], float] = {}
    mass = object_log_q(policy.score(rows), rows).double().exp().tolist()
    for key, p in zip(policy.space.keys(rows), mass, strict=True):
        law[key] = law.get(key, 0.0) + p
    return law
