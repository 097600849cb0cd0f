"""Elicitation: a posterior over graphs from what a language model finds likely to be seen, not to be so.

    R(G) = p_prior(G) E_{D ~ p(D | G)}[p_LM(D)] = p_prior(G) sum_D p(D | G) p_LM(D)

the talk's second formula, in three forms.

    exact       the sum over D, where D can be listed.
    naive       log R_K(G) = log p_prior(G) + log 1/K sum_k p_LM(D_k), D_k ~ p(. | G), drawn anew at each visit. R_K is
                unbiased and log R_K is low (Jensen): what reads R_K linearly (importance weights, pseudo-marginal
                chains) is exact at every K; squared-error objectives average log R_K and aim at

                    log R*_K(G) = log p_prior(G) + E[log 1/K sum_k p_LM(D_k)]     <= log R(G), -> log R(G)

                which ``naive_log_r`` gives exactly, so that the bias can be read off without noise.
    augmented   D is part of the object: R(G, D) = p_prior(G) p(D | G) p_LM(D), and a sample of (G, D) is one of G when
                D is left out. Exact for every method at any cost of variance, with nothing estimated.

The expected logarithm comes from log x = integral over u of [exp(-e^u) - exp(-x e^u)] and independence of the D_k:

    E[log sum_k v_k] = integral over u of [exp(-e^u) - phi(e^u)^K] du,    phi(s) = sum_D p(D | G) exp(-s v_D)

Sources: Andrieu and Roberts 2009 (pseudo-marginal MCMC); Frullani's integral.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from retrodict.errors import InputError
from retrodict.numerics import NEG_INF, log_mean_exp
from retrodict.records import CHOOSE, Menu, Problem, Rollouts
from retrodict.rng import generator
from retrodict.spaces.dags import Dags, DagState, parent_masks
from retrodict.structures.describe import by_prefix
from retrodict.structures.mcmc_structure import apply, check_chains, log_ratio, neighbours
from retrodict.structures.posterior import GraphPosterior, log_scores, sampled
from retrodict.structures.priors import hard
from retrodict.structures.relations import Relations

LogPrior = Callable[[Bool[Tensor, "n d d"]], Float[Tensor, " n"]]
LogLM = Callable[[Int[Tensor, "..."]], Float[Tensor, "..."]]
"""log p_LM of coded D: ``Teller.log_p``, or a table's look-up."""


def uniform(graphs: Bool[Tensor, "n d d"]) -> Float[Tensor, " n"]:
    """The prior under which every graph weighs the same."""
    return torch.zeros(len(graphs), dtype=torch.float64)


def exact_log_r(
    log_prior: Float[Tensor, " n"], law: Float[Tensor, "n m"], log_lm: Float[Tensor, " m"]
) -> Float[Tensor, " n"]:
    """log R of each graph: the sum over every D."""
    return log_prior + (law + log_lm).logsumexp(1)


def naive_log_r(
    log_prior: Float[Tensor, " n"], law: Float[Tensor, "n m"], log_lm: Float[Tensor, " m"], k: int
) -> Float[Tensor, " n"]:
    """log R*_K of each graph: where a squared-error objective with K draws ends up. By quadrature, to rounding.

    The integrand is analytic in a strip, so the trapezoidal rule on a grid of 0.1 is exact to float64.
    """
    if k < 1:
        raise InputError(f"the mean needs at least one draw of D, not {k}")
    lift = torch.where(law > NEG_INF, log_lm, NEG_INF).amax(1, keepdim=True)
    low = float((log_lm.amax() - log_lm.amin()).clamp_max(700.0))
    grid = torch.arange(-45.0 - math.log(k), 7.0 + low, 0.1, dtype=torch.float64)
    value = (log_lm - lift).exp()  # at most 1 where p(D | G) > 0
    out = torch.empty(len(law), dtype=torch.float64)
    for g in range(len(law)):
        seen = law[g] > NEG_INF
        log_phi = (law[g, seen, None] - value[g, seen, None] * grid.exp()).logsumexp(0)
        out[g] = 0.1 * ((-grid.exp()).exp() - (k * log_phi).exp()).sum()
    return log_prior + lift.squeeze(1) + out - math.log(k)


# -- naive: an estimate where the value would stand -------------------------------------------------------------------


@dataclass(frozen=True)
class Naive:
    """log R_K as a term over graphs: K draws of D for every value asked for, new ones each time.

    ``noise`` says how it is meant: ``linear`` (R_K is unbiased: importance sampling, SMC) or ``log`` (what
    squared-error objectives average: their target is then R*_K, and not R).
    """

    space: Dags
    relations: Relations
    log_lm: LogLM
    k: int
    gen: torch.Generator
    log_prior: LogPrior = uniform
    noise: str = "linear"
    name: str = "elicited"
    prefixes: bool = True

    @property
    def version(self) -> str:
        """The number of draws."""
        return f"naive, K = {self.k}"

    def on(self, problems: Sequence[Problem]) -> Any:
        """The same for every problem."""
        return self

    def log_hat(self, graphs: Bool[Tensor, "n d d"]) -> Float[Tensor, " n"]:
        """A fresh estimate of each graph's log R."""
        return self.log_prior(graphs) + log_mean_exp(self.log_lm(self.relations.draw(graphs, self.k, self.gen)), 1)

    def __call__(self, rollouts: Rollouts, every_prefix: bool = False) -> Tensor:
        """``[b]``, or of every prefix ``[b, t+1, 1]`` (-inf past the end)."""
        if not every_prefix:
            return self.log_hat(self.space.graphs(rollouts))
        return by_prefix(self.space, rollouts, lambda graphs: self.log_hat(graphs)[:, None])


# -- augmented: D as the way to stop ----------------------------------------------------------------------------------


class Told(Dags):
    """Graphs with a D: edges are added as in ``Dags``, and each D is a stop of its own.

    A state that takes no more edges still has a choice of D, so nothing is ever forced.
    """

    def menu(self, s: DagState) -> Menu:
        """That of the graphs; the stop is never forced."""
        menu = super().menu(s)
        return Menu(menu.legal, menu.can_stop, torch.full_like(menu.must, CHOOSE))

    def keys(self, rollouts: Rollouts) -> list[tuple[int, ...]]:
        """The edges, then the stop: -1 - D."""
        return [(*key[:-1], -1 - s) for key, s in zip(super().keys(rollouts), rollouts.stop.tolist(), strict=True)]


@dataclass(frozen=True)
class Augmented:
    """log p_prior(G) + log p(D | G) + log p_LM(D): a term over graphs with their D, for d up to 4."""

    space: Told
    relations: Relations
    log_lm: Float[Tensor, " m"]
    log_prior: LogPrior = uniform
    name: str = "elicited"
    noise: str = "none"
    prefixes: bool = True
    version: str = "augmented"

    def on(self, problems: Sequence[Problem]) -> Any:
        """The same for every problem."""
        return self

    def joint(self, graphs: Bool[Tensor, "n d d"]) -> Float[Tensor, "n m"]:
        """log R(G, D) of every D."""
        return self.log_prior(graphs)[:, None] + self.relations.law(graphs) + self.log_lm

    def __call__(self, rollouts: Rollouts, every_prefix: bool = False) -> Tensor:
        """``[b]``, or of every prefix and D ``[b, t+1, m]`` (-inf past the end)."""
        if not every_prefix:
            return self.joint(self.space.graphs(rollouts)).gather(1, rollouts.stop[:, None]).squeeze(1)
        return by_prefix(self.space, rollouts, self.joint)


# -- pseudo-marginal Metropolis-Hastings ------------------------------------------------------------------------------


GROUPS = 16
"""Chains are joined into so many independent runs for intervals."""


def pseudo_marginal(
    space: Dags,
    log_hat: Callable[[Bool[Tensor, "n d d"], torch.Generator], Float[Tensor, " n"]],
    *,
    chains: int = 64,
    steps: int = 2000,
    burn_in: int = 500,
    thin: int = 1,
    seed: int = 0,
) -> GraphPosterior:
    """Metropolis-Hastings on graphs with an unbiased estimate of R in place of R; moves as in ``structure_mcmc``.

    The estimate of the present graph is the one it was accepted with: that makes (G, estimate) the state, R times a
    density that integrates to 1 its target, and G's share exact at every K. Drawn anew, it would be biased.

    Args:
        space: graphs; its limits are kept by rejection.
        log_hat: log of an unbiased positive estimate of R(G), new at each call, from the generator it is given.
        chains: side by side; intervals are over groups of them.
        steps: of each chain after ``burn_in``; every ``thin``-th graph is kept.
        seed: one seed, one result.
    """
    check_chains(chains, steps, burn_in, thin)
    gen, limits = generator(seed), hard(space)

    def estimate(graphs: Bool[Tensor, "n d d"]) -> Float[Tensor, " n"]:
        return log_scores(limits, parent_masks(graphs)) + log_hat(graphs, gen)

    now = space.start(torch.zeros(chains, dtype=torch.long)).graph
    value, open_now = estimate(now), neighbours(now)
    kept, accepted = [], 0
    for step in range(burn_in + steps):
        new = apply(now, torch.multinomial(open_now.flatten(1).float(), 1, generator=gen)[:, 0])
        open_new, fresh = neighbours(new), estimate(new)
        odds = log_ratio(value, fresh, open_now.flatten(1).sum(1), open_new.flatten(1).sum(1))
        take = torch.rand(chains, generator=gen, dtype=torch.float64).log() < odds
        now, value = torch.where(take[:, None, None], new, now), torch.where(take, fresh, value)
        open_now = torch.where(take[:, None, None, None], open_new, open_now)
        if step >= burn_in:
            accepted += int(take.sum())
            if (step - burn_in) % thin == 0:
                kept.append(now)
    run = (torch.arange(chains) % GROUPS).repeat(len(kept))
    cost = {"steps": float(steps), "chains": float(chains), "acceptance": accepted / (steps * chains)}
    return sampled(space.names, "pseudo-marginal", torch.cat(kept), torch.zeros(len(run)).double(), run, cost)
