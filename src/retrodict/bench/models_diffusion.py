"""Diffusion priors and their posteriors by relative trajectory balance, against enumeration and known weights.

Masked. A masked diffusion model of balanced brackets (length 6, 4 symbols); posteriors given some tokens, given noisy
ones, and under a classifier. The law of every policy is exact (``string_law``). The floors beside it are those of
samplers that reveal several tokens a step and have the posterior's own conditionals.

Gaussian. The 25 modes of Venkatraman et al. 2024, of which 9 remain. A policy is held to the weights of the *chain's*
posterior, estimated by 200,000 prior draws (its standard error is in the row), which is what RTB aims at; the
distance to the mixture's own weights, known exactly, stands beside it, and that between the two.

Seconds are processor seconds of this process on one thread.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial
from typing import Any
from unittest.mock import patch

from jaxtyping import Float
from torch import Tensor

from retrodict.bench.rows import Row, at_least, at_most, show_only
from retrodict.latent.gaussian_diffusion import (
    Chain,
    chain_weights,
    draw_points,
    grid_modes,
    mixture_weights,
    mode_target,
    mode_weights,
    reward_of,
    tune,
)
from retrodict.latent.masked_diffusion import (
    classifier,
    evidence_bound,
    exact_reader,
    log_gamma_law,
    masked_target,
    noisy_tokens,
    string_law,
    train_masked,
    tune_masked,
)
from retrodict.latent.masked_text import bracket_law, bracket_space, draw_strings, given_from, nested
from retrodict.numerics import total_variation
from retrodict.objectives.table import OBJECTIVES
from retrodict.policies.masked import MaskedPolicy
from retrodict.records import Problem
from retrodict.rng import child_seed
from retrodict.targets.algebra import Target
from retrodict.testing.diffusion import plus_mean, random_posterior

SUITE = "models"
LENGTH, TEXT = 6, 20_000
"""Tokens of a string, and strings of the text."""
TV, WEIGHT = 0.02, 0.02
"""Largest total variation, and largest error of a mode's weight."""
SECONDS = 120.0
"""Most processor seconds of one seed of the 25 modes."""
SEEDS, POINTS = 3, 20_000


def rows(seed: int = 0) -> Iterator[list[Row]]:
    """All rows of this part."""
    yield from masked(seed)
    yield sign_bug(seed)
    yield from modes(seed)


def masked(seed: int) -> Iterator[list[Row]]:
    """A masked language model and three posteriors of it."""
    name, space, law = f"masked diffusion, {LENGTH} tokens of 4", bracket_space(LENGTH), bracket_law(LENGTH)
    text, held = (draw_strings(space, law, TEXT, child_seed(seed, k)) for k in range(2))
    began = time.process_time()
    prior = train_masked(space, text, seed=seed)
    took, own = time.process_time() - began, string_law(prior)
    at = space.number(held)
    truth, model = float(law[at].mean()), float(own[at].mean())
    yield [
        show_only(SUITE, name, "the language itself", "log-likelihood a held-out string (nats)", truth, "exact"),
        at_least(SUITE, name, "masked diffusion", "log-likelihood a held-out string (nats)", model, truth - 0.02,
                 "exact, summed over all orders; bar: the language's less 0.02"),
        show_only(SUITE, name, "masked diffusion", "its evidence bound (nats)", evidence_bound(prior, held)),
        show_only(SUITE, name, "masked diffusion", "processor seconds", took, "of training"),
    ]  # fmt: skip
    given = bracket_space(LENGTH, given=(given_from(space, "(__)__"),))
    noisy = noisy_tokens(space, [2, -1, -1, 3, 1, -1], 0.05)
    for what, target in {
        "given (__)__": masked_target(prior, space=given),
        "noisy (__)b_": masked_target(prior, noisy),
        "classifier: nested": masked_target(prior, classifier(space, text, nested(text), seed=seed)),
    }.items():
        yield posterior(f"{name}, {what}", target, seed, both="classifier" in target.factors)


def posterior(name: str, target: Target, seed: int, both: bool) -> list[Row]:
    """One posterior: RTB (in ``both`` forms, and with a uniform order), and the floors of parallel reveals."""
    value = log_gamma_law(target)
    truth = value - value.logsumexp(0)

    def far(policy: MaskedPolicy) -> float:
        return total_variation(truth, string_law(policy))

    def tuned(method: str, bar: float | None, **given: Any) -> list[Row]:
        began = time.process_time()
        policy = tune_masked(target, seed=seed, **given)
        held, note = (SUITE, name, method), f"{time.process_time() - began:.0f} processor seconds"
        if bar is None:
            return [show_only(*held, "total variation", far(policy), note)]
        return [at_most(*held, "total variation", far(policy), bar, note)]

    assert isinstance(target.prior, MaskedPolicy)
    found = [show_only(SUITE, name, "prior (tokens given are read)", "total variation", far(target.prior)),
             *tuned("rtb, log Z learned", TV)]  # fmt: skip
    if both:
        found += tuned("rtb, VarGrad form", TV, objective="vargrad")
        found += tuned("rtb, order uniform", None, order="uniform")
    exact = exact_reader(truth, LENGTH)
    for k in (1, 2, LENGTH):
        policy = MaskedPolicy(bracket_space(LENGTH, per_step=k), [Problem((), name="floor")], exact)
        note = "exact any-order conditionals" + ("" if k == 1 else ": no network does better by the bound")
        found.append(show_only(SUITE, name, f"{k} tokens a step, floor", "total variation", far(policy), note))
    return found


def sign_bug(seed: int) -> list[Row]:
    """VarGrad with + for - on rows drawn from the prior, beside the right sign."""
    target = random_posterior(seed)
    value = log_gamma_law(target)
    truth = value - value.logsumexp(0)
    train = partial(tune_masked, target, seed=seed, objective="vargrad", from_prior=1.0, steps=300, lr=1e-2, samples=64)
    right = total_variation(truth, string_law(train()))
    with patch.dict(OBJECTIVES, {"vargrad": plus_mean}):
        wrong = total_variation(truth, string_law(train()))
    name = "9 strings of an untrained masked model, rows from the prior"
    return [
        at_most(SUITE, name, "rtb, VarGrad form", "total variation", right, TV),
        at_least(SUITE, name, "+ for - in VarGrad (planted)", "total variation", wrong, 5 * TV, "the bug must be seen"),
    ]


def modes(seed: int) -> Iterator[list[Row]]:
    """The 25 modes, in both forms of the objective."""
    chain = Chain(grid_modes())
    reward = reward_of(chain.modes)
    target, exact = mode_target(chain, reward), mixture_weights(reward)
    own, error = chain_weights(target, seed=seed)
    name = f"25 modes, {chain.space.steps} steps"
    before = mode_weights(chain.modes, draw_points(chain, POINTS, seed))
    yield [
        show_only(SUITE, name, "prior chain", "largest error of a mode's weight", float((before - 1 / 25).abs().max()),
                  "to 1/25"),
        show_only(SUITE, name, "chain's posterior", "largest error of a mode's weight",
                  float((own - exact).abs().max()), f"to the mixture's; 200,000 draws, s.e. {float(error.max()):.4f}"),
    ]  # fmt: skip
    for method, objective in {"rtb, log Z learned": "rtb", "rtb, VarGrad form": "vargrad"}.items():
        seeds = range(seed, seed + (SEEDS if objective == "rtb" else 1))
        found = [_seed(target, own, exact, objective, s) for s in seeds]
        yield _held(name, method, found)


Found = tuple[float, float, float, float, float]
"""Of a seed: error to the chain's weights and the mixture's, least share of a kept weight, mass of others, seconds."""


def _seed(target: Target, own: Float[Tensor, " k"], exact: Float[Tensor, " k"], objective: str, seed: int) -> Found:
    began = time.process_time()
    policy = tune(target, seed=seed, objective=objective)
    took, kept = time.process_time() - began, exact > 0.01
    assert isinstance(target.prior, Chain)
    q = mode_weights(target.prior.modes, draw_points(policy, POINTS, child_seed(seed, 1)))
    return (float((q - own).abs().max()), float((q - exact).abs().max()), float((q / own)[kept].min()),
            float(q[~kept].sum()), took)  # fmt: skip


def _held(name: str, method: str, found: list[Found]) -> list[Row]:
    """The worst seed is what a bar holds."""
    to_chain, to_mixture, least, others, took = zip(*found, strict=True)
    held, note = (SUITE, name, method), f"{POINTS:,} draws; seeds: {', '.join(f'{x:.4f}' for x in to_chain)}"
    return [
        at_most(*held, "worst error of a mode's weight", max(to_chain), WEIGHT, note),
        show_only(*held, "the same, to the mixture's weights", max(to_mixture)),
        at_least(*held, "least weight of a posterior mode, as a share of its own", min(least), 0.5, "all modes found"),
        show_only(*held, "mass of the modes that go", max(others), "0.0002 in the posterior"),
        at_most(*held, "processor seconds", max(took), SECONDS, "of the slowest seed"),
    ]
