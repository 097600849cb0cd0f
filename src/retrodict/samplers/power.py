"""Power sampling: draws from p(z | prompt)^alpha, the *sequence* sharpened, by Metropolis-Hastings.

    state     a complete string with its stop (or truncated at the limit)
    proposal  redo the tail from a uniform cut, up to the limit, every token at temperature 1/alpha
    accept    min(1, p(z')^alpha / p(z)^alpha * q(tail) / q(tail') * (n+1)/(n'+1))

over full tails, whatever their lengths. Karan and Du 2025 (arXiv 2510.14901) grow the string in blocks, never past its
first end, compare overlapping parts of tails and leave (n+1)/(n'+1) out, so their chain has another law on strings of
varying length. Here the law is p^alpha; what bias there is comes from finitely many steps.

Chains begin at a weighted SMC sample, pooled of two: one over q, with the exponent rising over the first half
of the string (Power-SMC, arXiv 2602.10273, without its truncated support), which finds long strings; and one over p,
which finds short ones that q hardly ever ends.

Drawing each token at temperature 1/alpha is not this law: where p(aa, ab, ba, bb) = (0, .4, .3, .3) and alpha = 4, it
begins with a 16% of the time, p^4 61%.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from retrodict.errors import InputError
from retrodict.particles import Particles
from retrodict.policies.base import FiniteStepper
from retrodict.policies.tempered import TemperedPolicy
from retrodict.protocols import LanguageModel
from retrodict.records import cat_rollouts
from retrodict.rng import child_seed
from retrodict.samplers.common import OnStep
from retrodict.samplers.mh.run import mh
from retrodict.samplers.smc import smc
from retrodict.spaces.limits import Limit
from retrodict.spaces.stops import Stops
from retrodict.targets.ready import continuation


def power(
    lm: LanguageModel,
    prompt: str,
    *,
    alpha: float = 4.0,
    n: int,
    seed: int,
    steps: int = 20,
    keep: int = 1,
    stop: str | int | Sequence[int] | Stops | None = "eos",
    max_tokens: int = 32,
    min_tokens: int = 0,
    limit: Limit = "force",
    on_step: OnStep | None = None,
) -> Particles:
    """n chains for p(z | prompt)^alpha; the same as ``mh`` on ``continuation(temperature=1/alpha)``, well begun.

    Args:
        lm: the model.
        prompt: what it reads.
        alpha: the power; 1 is the model itself.
        n: chains, and particles of each of the two SMC samples they begin at.
        seed: one seed, one result.
        steps: Metropolis-Hastings steps of each chain.
        keep: states kept of each chain's second half.
        stop, max_tokens, min_tokens, limit: see :func:`continuation`.
        on_step: progress callback.
    """
    if not alpha > 0:
        raise InputError(f"alpha must be positive, not {alpha:g}; 4 sharpens, 1 is the model itself")
    target = continuation(lm, prompt, temperature=1 / alpha, stop=stop, max_tokens=max_tokens, min_tokens=min_tokens,
                          limit=limit)  # fmt: skip
    assert isinstance(target.prior, FiniteStepper)
    policy = TemperedPolicy(target.prior, 1 / alpha)
    ramp = 0 if alpha == 1 else max_tokens // 2
    long = smc(target, policy, n=n, seed=child_seed(seed, 0), runs=1, ramp=ramp, stopped="aside")
    short = smc(target, n=n, seed=child_seed(seed, 1), runs=1, stopped="aside")
    return mh(target, policy, n=n, seed=seed, steps=steps, keep=keep, start=pooled(long, short), on_step=on_step)


def pooled(one: Particles, two: Particles) -> Particles:
    """Two weighted samples of one problem as one: both have mean weight Z, so weights stay what they are."""
    return replace(one, objects=cat_rollouts([one.objects, two.objects]), log_w=torch.cat([one.log_w, two.log_w], 1),
                   log_z=None, shown=one.shown + two.shown, keys=one.keys + two.keys)  # fmt: skip
