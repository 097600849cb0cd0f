"""The part of ``retrodict bench models`` about programs from pictures: q(program | picture) against enumeration.

Pictures are the model's own draws, held out. The posterior over all programs is exact (``pictures.Catalogue``). q is
measured twice: its own law on the programs that hold 99.9% of the posterior (total variation and KL, no Monte Carlo),
and by its draws, as any sampler is. The others are given the seconds that q's draws took, training apart: importance
sampling from the prior, and SMC whose twist is the fit of what is drawn so far. Seconds are processor seconds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from retrodict.bench.rows import Row, at_least, at_most, show_only
from retrodict.particles import Particles
from retrodict.policies.net import NetPolicy
from retrodict.records import Rollouts
from retrodict.rng import child_seed, generator
from retrodict.samplers.importance import ancestral, importance
from retrodict.samplers.smc import smc
from retrodict.structures.pictures import (
    Catalogue,
    Distance,
    PictureModel,
    amortize_pictures,
    distance,
    picture,
    picture_target,
    stroke_policy,
)
from retrodict.structures.strokes import SIZE, Strokes
from retrodict.targets.algebra import Target

SUITE, NAME = "models", "programs from pictures"
HELD = 60
"""Held-out pictures."""
WAKE = 256
"""Pictures of the wake steps."""
DRAWS = 128
"""Of q, for each picture."""
BAR = 0.2
"""Mean total variation to the posterior: of q's own law, and of its weighted draws."""


def rows(seed: int = 0, steps: int = 0) -> Iterator[list[Row]]:
    """All rows of the part; ``steps`` of training in the place of the plan's."""
    space = Strokes()
    model = PictureModel(picture_target(space, [picture(torch.zeros(SIZE, SIZE))]))
    began = time.process_time()
    catalogue = Catalogue(model.target)
    yield [shown("language", "items", len(space.phrases)), shown("language", "programs", len(catalogue.programs)),
           shown("language", "distinct pictures", len(catalogue.drawings)),
           shown("enumeration", "seconds", time.process_time() - began, "once, for all pictures")]  # fmt: skip
    held, truth = model.simulate(HELD, generator(seed, "cpu", 1))
    wake, _ = model.simulate(WAKE, generator(seed, "cpu", 2))
    judge = Judge(catalogue, held, truth)
    yield judge.exact()
    policy = stroke_policy(wake, seed=seed)
    before = judge.law("q untrained: look-ahead of one item", policy.on(held.problems))
    yield before[0]
    began = time.process_time()
    amortize_pictures(wake, policy, seed=seed, **({"e_steps": steps} if steps else {}))
    seconds = time.process_time() - began
    q = policy.on(held.problems)
    after = judge.law("q", q)
    yield [shown("q", "seconds of training", seconds, "once, for all pictures"), *after[0],
           at_most(SUITE, NAME, "q", "total variation", after[1], BAR, f"mean of {HELD} pictures"),
           at_most(SUITE, NAME, "q", "KL(posterior, q), against untrained", after[2], before[2])]  # fmt: skip
    yield sampled(judge, q, child_seed(seed, 3))


def shown(method: str, metric: str, value: float, note: str = "") -> Row:
    """A row without a bar."""
    return show_only(SUITE, NAME, method, metric, value, note)


class Judge:
    """Held-out pictures whose programs are known, and the exact posterior of each."""

    def __init__(self, catalogue: Catalogue, held: Target, truth: Rollouts) -> None:
        self.catalogue, self.held = catalogue, held
        space = catalogue.space
        self.number = {key: i for i, key in enumerate(space.keys(catalogue.programs))}
        self.true = torch.tensor([self.number[key] for key in space.keys(truth)])
        self.items = (space.phrases_of(truth) >= 0).sum(1)
        self.posterior = torch.stack([catalogue.log_posterior(p) for p in held.problems]).exp()

    def exact(self) -> list[Row]:
        """What the posterior itself reaches: no method can be expected to do better."""
        p = self.posterior
        nats = -torch.where(p > 0, p * p.log(), 0.0).sum(1).mean()
        return [shown("exact posterior", "entropy (nats)", float(nats)), *self.found("exact posterior", p)]

    def found(self, method: str, p: Float[Tensor, "m n"]) -> list[Row]:
        """How a distribution over programs does at finding the program that drew the picture, or its picture."""
        row = torch.arange(len(p))
        mine = p[row, self.true]
        above = (p > mine[:, None]).sum(1).double().masked_fill(mine == 0, 1e9)
        same = self.catalogue.which[None] == self.catalogue.which[self.true][:, None]
        return [
            shown(method, "true program in top 1", float((above < 1).double().mean())),
            shown(method, "true program in top 5", float((above < 5).double().mean())),
            shown(method, "mass on programs that draw the true picture", float((p * same).sum(1).mean())),
        ]

    def law(self, method: str, policy: NetPolicy) -> tuple[list[Row], float, float]:
        """q's own law: rows, mean total variation and mean KL."""
        found: list[Distance] = [distance(self.catalogue, policy, m) for m in range(HELD)]
        tv, kl = (torch.tensor([getattr(f, name) for f in found]) for name in ("tv", "kl"))
        each = [shown(method, f"total variation, {k} item{'s' * (k > 1)}", float(tv[self.items == k].mean()))
                for k in self.items.unique().tolist()]  # fmt: skip
        slack = max(f.slack for f in found)
        told = [shown(method, "mean total variation", float(tv.mean()), f"exact to {slack:.1g}"), *each,
                shown(method, "KL(posterior, q) (nats)", float(kl.mean()))]  # fmt: skip
        return told, float(tv.mean()), float(kl.mean())

    def of(self, particles: Particles) -> Float[Tensor, "m n"]:
        """The distribution over all programs that weighted draws stand for."""
        at = torch.tensor([self.number[key] for key in particles.keys]).view(particles.log_w.shape)
        return torch.zeros_like(self.posterior).scatter_add_(1, at, particles.weights)

    def off(self, p: Float[Tensor, "m n"]) -> float:
        """Mean total variation to the posterior."""
        return float((p - self.posterior).abs().sum(1).mean()) / 2


def sampled(judge: Judge, q: NetPolicy, seed: int) -> list[Row]:
    """Draws of q, plain and weighted, against samplers from the prior at equal seconds."""
    held, out = judge.held, []
    plain, took = timed(lambda n: ancestral(held, q, n=n, seed=seed), DRAWS)
    weighted, seconds = timed(lambda n: importance(held, q, n=n, seed=seed, runs=1), DRAWS)
    others: dict[str, Callable[[int], Particles]] = {
        "importance from the prior": lambda n: importance(held, n=n, seed=seed, runs=1),
        "SMC from the prior": lambda n: smc(held, n=n, seed=seed, runs=1),
    }
    answers = {"q, draws": (plain, took, DRAWS), "q, weighted": (weighted, seconds, DRAWS)}
    for name, call in others.items():
        _, cost = timed(call, DRAWS)
        n = max(DRAWS, int(DRAWS * seconds / cost))
        answers[name] = (*timed(call, n), n)
    off = {}
    for name, (particles, took, n) in answers.items():
        p = judge.of(particles)
        off[name] = judge.off(p)
        out += [shown(name, "total variation of the weighted draws", off[name], f"{n} draws a picture"),
                shown(name, "seconds", took, f"{HELD} pictures"), *judge.found(name, p)]  # fmt: skip
    best = min(off[name] for name in others)
    return [*out, at_most(SUITE, NAME, "q, weighted", "total variation", off["q, weighted"], BAR, f"{DRAWS} draws"),
            at_least(SUITE, NAME, "q, weighted", "total variation saved over the better of the others",
                     best - off["q, weighted"], 0.0, "at equal seconds, training apart")]  # fmt: skip


def timed(call: Callable[[int], Particles], n: int) -> tuple[Particles, float]:
    """An answer and its processor seconds."""
    began = time.process_time()
    found = call(n)
    return found, time.process_time() - began
