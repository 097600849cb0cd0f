"""Programs from pictures: p(program | picture) for a small language of strokes, exactly and in one pass.

    p(z, x) = p(z) prod over 256 pixels of  flip^[x != render(z)] (1 - flip)^[x == render(z)]

p(z) is by description length (``policies.choices``), noise flips every pixel with probability ``flip``. A picture is a
problem; q reads it through ``row["features"]``, so one policy serves all pictures. :class:`Catalogue` lists every
program and its picture once: the posterior of any number of pictures is then one product of matrices, the oracle.

q is learned by sleep (pairs z, x drawn from the model; the exact posterior is its optimum for pictures that the model
draws) and, mixed in, by any objective on given pictures (``training.learn``). After Ellis et al. 2018
(arXiv:1707.09627), who learn proposals for drawing commands.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from retrodict.errors import InputError
from retrodict.guides.base import BaseGuide
from retrodict.numerics import sample_categorical
from retrodict.objectives.mle import object_log_q
from retrodict.policies.choices import EvenChoices
from retrodict.policies.net import NetPolicy
from retrodict.protocols import Problems
from retrodict.records import Problem, Rollouts
from retrodict.spaces.phrases import PhraseState
from retrodict.structures.pictures_net import LookAhead
from retrodict.structures.strokes import SIZE, Strokes
from retrodict.targets.algebra import Target
from retrodict.targets.prior import Prior
from retrodict.training.learn import learn
from retrodict.training.threads import one_thread

PLAN: dict[str, Any] = {"e_steps": 800, "sleep": 0.9, "dreams": 256, "objective": "vargrad", "samples": 16,
                        "per_step": 16, "lr": 3e-3, "lr_end": 0.02}  # fmt: skip
"""Of every ten steps nine are sleep, on 256 new pairs each, and one is VarGrad on 16 draws for each of 16 pictures."""


def picture(image: Tensor | Sequence[Any], name: str = "") -> Problem:
    """A picture as a problem: 16 x 16 pixels, 0 or 1.

    Raises:
        InputError: another size, or values other than 0 and 1.
    """
    x = torch.as_tensor(image)
    if tuple(x.shape) != (SIZE, SIZE):
        size = " x ".join(map(str, x.shape))
        raise InputError(f"a picture of {size} pixels, and these programs draw {SIZE} x {SIZE}: crop or rescale it")
    if not bool(((x == 0) | (x == 1)).all()):
        raise InputError("a picture's pixels must be 0 or 1; threshold it first, as in image > 0.5")
    return Problem((), row={"features": x.float().flatten()}, name=name)


def pixels(problems: Problems) -> Float[Tensor, "m 256"]:
    """The pictures of problems."""
    return torch.stack([p.row["features"] for p in problems])


@dataclass(frozen=True)
class PixelNoise:
    """log p(x | z): every pixel of the drawing is flipped with probability ``flip``, independently."""

    space: Strokes
    problems: Problems
    flip: float
    name: str = "pixels"
    noise: str = "none"
    prefixes: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.flip < 0.5:
            raise InputError(f"the chance of a flip lies between 0 and 0.5, not {self.flip:g}")

    @property
    def version(self) -> str:
        """The noise."""
        return f"flip {self.flip:g}"

    @cached_property
    def x(self) -> Float[Tensor, "m 256"]:
        """The pictures."""
        return pixels(self.problems)

    def on(self, problems: Problems) -> PixelNoise:
        """The same noise on other pictures."""
        return replace(self, problems=problems)

    def __call__(self, rollouts: Rollouts, every_prefix: bool = False) -> Tensor:
        """``[b]``, or after every prefix ``[b, t+1, 1]``: of what the whole items draw so far."""
        x = self.x[rollouts.problem]
        if not every_prefix:
            return self.of(x, self.space.render(rollouts))
        return self.of(x[:, None], self.space.canvases(rollouts))[:, :, None]

    def of(self, x: Float[Tensor, "*b 256"], drawing: Bool[Tensor, "*b2 256"]) -> Float[Tensor, "..."]:
        """log p(x | drawing)."""
        off = (x.bool() ^ drawing).sum(-1, dtype=torch.float64)
        return off * math.log(self.flip) + (SIZE**2 - off) * math.log1p(-self.flip)


class CanvasGuide(BaseGuide):
    """psi = p(x | what is drawn so far): SMC then keeps programs whose first items fit."""

    def __init__(self, noise: PixelNoise) -> None:
        self.noise = noise

    def on(self, problems: Problems) -> CanvasGuide:
        """The same for other pictures."""
        return CanvasGuide(self.noise.on(problems))

    def start_at(self, rollouts: Rollouts, upto: Int[Tensor, " b"]) -> Int[Tensor, " b"]:
        """The problems."""
        return rollouts.problem

    def log_psi(self, c: Int[Tensor, " b"], s: PhraseState) -> Float[Tensor, " b"]:
        """Of whole items; one that is begun draws nothing yet."""
        return self.noise.of(self.noise.x[c], self.noise.space.canvas(s))


def picture_target(space: Strokes, problems: Problems, flip: float = 0.1, stop: float = 0.5) -> Target:
    """The posterior over programs of each picture (``picture`` makes the problems)."""
    prior, noise = EvenChoices(space, problems, stop), PixelNoise(space, problems, flip)
    factors = {"prior": Prior(prior), "pixels": noise}
    return Target(space, problems, factors, prior=prior, guide=CanvasGuide(noise))


@dataclass(frozen=True)
class PictureModel:
    """The generative model, for ``training.learn``: nothing in it is learned, so M changes nothing."""

    target: Target

    def simulate(self, n: int, gen: torch.Generator) -> tuple[Target, Rollouts]:
        """n programs and a noisy picture of each."""
        prior, noise = self.target.prior, self.target.factors["pixels"]
        assert prior is not None and isinstance(noise, PixelNoise)
        rows = prior.sample(torch.zeros(n, dtype=torch.long), gen)
        clean = noise.space.render(rows)
        flips = torch.rand(clean.shape, generator=gen) < noise.flip
        seen = [picture(x) for x in (clean ^ flips).view(-1, SIZE, SIZE)]
        return self.target.on(seen), replace(rows, problem=torch.arange(n))

    def m_step(self, particles: Any, seed: int) -> float:
        """Nothing to learn."""
        return 0.0


def stroke_policy(target: Target, hidden: int = 256, layers: int = 2, seed: int = 0) -> NetPolicy:
    """An untrained policy for a target over strokes: a one-item look-ahead (``pictures_net``)."""
    space, prior, noise = target.space, target.prior, target.factors["pixels"]
    if not (isinstance(space, Strokes) and isinstance(prior, EvenChoices) and isinstance(noise, PixelNoise)):
        raise InputError("a stroke policy is for a target of picture_target; build it with that")
    return NetPolicy(space, target.problems, LookAhead(space, noise.flip, prior.stop, hidden, layers, seed))


def amortize_pictures(target: Target, policy: NetPolicy | None = None, **given: Any) -> NetPolicy:
    """q(program | picture), for the target's pictures and for all others that its model draws.

    Args:
        target: from ``picture_target``; its pictures are those of the wake steps.
        policy: a network over its space; that of ``stroke_policy`` by default.
        given: arguments of ``training.learn``; they replace those of :data:`PLAN`.
    """
    policy = policy or stroke_policy(target, seed=int(given.get("seed", 0)))
    with one_thread():
        learn(PictureModel(target), policy, rounds=1, draws=1, **{**PLAN, **given})
    return policy


# -- the exact posterior -----------------------------------------------------------------------------------------------


class Catalogue:
    """Every program of a space with its log p and its picture; programs that draw the same share a picture.

    Attributes:
        programs: one row each.
        log_prior: log p(program), float64.
        drawings: the distinct pictures, ``which`` the one that each program draws.
        log_drawing: log of the summed prior of the programs of each picture.
    """

    def __init__(self, target: Target) -> None:
        space, prior, noise = target.space, target.prior, target.factors["pixels"]
        assert isinstance(space, Strokes) and isinstance(prior, EvenChoices) and isinstance(noise, PixelNoise)
        self.space, self.noise, self.programs = space, noise, space.enumerate()
        self.log_prior: Float[Tensor, " n"] = object_log_q(prior.score(self.programs), self.programs)
        drawn = space.render(self.programs)
        packed = np.packbits(drawn.numpy(), axis=1).view(f"V{SIZE**2 // 8}").ravel()
        _, first, which = np.unique(packed, return_index=True, return_inverse=True)
        self.which: Int[Tensor, " n"] = torch.from_numpy(which)
        self.drawings: Bool[Tensor, "d 256"] = drawn[torch.from_numpy(first)]
        mass = torch.zeros(len(first), dtype=torch.float64).index_add(0, self.which, self.log_prior.exp())
        self.log_drawing: Float[Tensor, " d"] = mass.log()
        self.ink = self.drawings.T.float()

    def log_joint(self, x: Float[Tensor, "m 256"]) -> Float[Tensor, "m d"]:
        """log p(drawing) + log p(x | drawing), of each distinct drawing, float64."""
        odds = math.log(self.noise.flip) - math.log1p(-self.noise.flip)
        off = x.sum(1, keepdim=True) + self.ink.sum(0) - 2 * x @ self.ink
        return self.log_drawing + off.double() * odds + SIZE**2 * math.log1p(-self.noise.flip)

    def log_posterior(self, problem: Problem) -> Float[Tensor, " n"]:
        """log p(program | picture) of every program."""
        joint = self.log_joint(pixels([problem]))[0]
        share = self.log_prior - self.log_drawing[self.which]
        return share + joint[self.which] - joint.logsumexp(0)

    def log_evidence(self, problem: Problem) -> float:
        """log p(picture)."""
        return float(self.log_joint(pixels([problem]))[0].logsumexp(0))


@dataclass(frozen=True)
class Distance:
    """How far q is from the exact posterior of a picture.

    Attributes:
        tv: total variation; known to within ``slack``, half the posterior mass of the programs that were not scored.
        kl: KL(posterior, q) over the programs scored, in nats.
        best, among: q's log-probability of these programs (``best`` the posterior's order, likeliest first).
    """

    tv: float
    slack: float
    kl: float
    best: Int[Tensor, " k"]
    among: Float[Tensor, " k"]


@torch.no_grad()
def distance(catalogue: Catalogue, policy: NetPolicy, problem: int, mass: float = 0.999, most: int = 4000) -> Distance:
    """q against the exact posterior, on the fewest programs that hold ``mass`` of it (at most ``most``).

    Outside them lie p_out of the posterior and q_out of q, and 1/2 sum |p - q| there is 1/2 (p_out + q_out) up to
    min(p_out, q_out): the value given takes the upper end.
    """
    log_p = catalogue.log_posterior(policy.problems[problem])
    top = log_p.topk(min(most, len(log_p)))
    keep = int((top.values.exp().cumsum(0) < mass).sum()) + 1
    best, p = top.indices[:keep], top.values[:keep].exp()
    rows = catalogue.programs.take(best)
    log_q = object_log_q(policy.score(replace(rows, problem=torch.full((len(best),), problem))), rows).double()
    p_out, q_out = (max(0.0, 1 - float(x.sum())) for x in (p, log_q.exp()))
    tv = (float((p - log_q.exp()).abs().sum()) + p_out + q_out) / 2
    return Distance(tv, min(p_out, q_out), float((p * (p.log() - log_q)).sum()), best, log_q)


# -- what follows from a posterior -------------------------------------------------------------------------------------


def predictive(
    space: Strokes, programs: Rollouts, weights: Float[Tensor, " b"], more: int = 0
) -> Float[Tensor, "16 16"]:
    """The chance of ink at every pixel under weighted programs; their loops run ``more`` times more than written."""
    chance = torch.zeros(SIZE**2, dtype=torch.float64)
    for program, w in zip(space.phrases_of(programs), weights.double() / weights.double().sum(), strict=True):
        chance += w * space.extended(program, more)
    return chance.view(SIZE, SIZE)


def posterior_draws(catalogue: Catalogue, problem: Problem, n: int, gen: torch.Generator) -> Rollouts:
    """n exact draws from the posterior of a picture."""
    return catalogue.programs.take(sample_categorical(catalogue.log_posterior(problem).expand(n, -1), gen))
