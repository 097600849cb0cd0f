"""Particles: a weighted sample from a target, the answer of every sampler."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from retrodict.numerics import ess, jackknife_log_mean, normalise
from retrodict.records import Rollouts, Trace

if TYPE_CHECKING:
    import pandas
    import rich.table


@dataclass(frozen=True, repr=False)
class Particles:
    """A weighted sample of complete objects, problem by problem.

    The mean over k of exp(log_w) is the evidence estimate of the problem where the method gives one, so pooling
    independent runs is concatenation along k.

    Attributes:
        objects: m*k rows, problem-major (row p*k+i is particle i of problem p).
        log_w: unnormalised log-weights in nats; -inf for a particle of weight zero.
        log_z: log-evidence estimate of each independent run (each unbiased on the natural scale), or ``None``
            for methods that give none (MH, best-of-n).
        shown: each object as a person reads it.
        keys: each object's identity (two rows are the same object iff their keys are equal).
        trace: what the sampler did.
        names: the problems' names.
    """

    objects: Rollouts
    log_w: Float[Tensor, "m k"]
    log_z: Float[Tensor, "m r"] | None
    shown: tuple[str, ...]
    keys: tuple[tuple[int, ...], ...]
    trace: Trace
    names: tuple[str, ...] = field(default=())

    @property
    def m(self) -> int:
        """Number of problems."""
        return self.log_w.shape[0]

    @property
    def k(self) -> int:
        """Particles a problem."""
        return self.log_w.shape[1]

    @property
    def weights(self) -> Float[Tensor, "m k"]:
        """Self-normalised weights; a row of zeros where every particle of the problem has weight zero."""
        return normalise(self.log_w)

    @property
    def ess(self) -> Float[Tensor, " m"]:
        """Effective sample size of the final weights. See ``min_ess`` for the number that tells more."""
        return ess(self.log_w)

    @property
    def min_ess(self) -> Float[Tensor, " m"]:
        """Smallest ESS (before any resampling) over steps and runs, and of the final weights."""
        if self.trace.ess is None or not self.trace.ess.numel():
            return self.ess
        runs = self.trace.ess.shape[1] // self.m
        return torch.minimum(self.trace.ess.amin(0).view(self.m, runs).amin(1), self.ess * 1.0)

    @property
    def evidence(self) -> tuple[Float[Tensor, " m"], Float[Tensor, " m"]] | None:
        """log of the mean evidence over runs and its jackknife standard error (inf for one run), in nats."""
        return None if self.log_z is None else jackknife_log_mean(self.log_z)

    @property
    def chains(self) -> int:
        """Markov chains a problem, laid end to end along k; 1 for methods without chains."""
        settings = self.trace.settings
        return int(settings.get("chains") or (settings.get("n", 1) if "keep" in settings else 1))

    def distinct(self, problem: int = 0) -> int:
        """Number of distinct objects of positive weight."""
        return len(self.counts(problem))

    def counts(self, problem: int = 0) -> dict[tuple[int, ...], float]:
        """Total self-normalised weight of each distinct object (by key) of one problem, heaviest first."""
        total: Counter[tuple[int, ...]] = Counter()
        for key, w in zip(
            self.keys[problem * self.k : (problem + 1) * self.k], self.weights[problem].tolist(), strict=True
        ):
            if w > 0:
                total[key] += w
        return dict(total.most_common())

    def best(self, problem: int = 0, n: int = 3) -> list[tuple[str, float]]:
        """The n distinct objects of the largest total weight, as text, with that weight."""
        text = dict(zip(self.keys[problem * self.k :], self.shown[problem * self.k :][: self.k], strict=False))
        return [(text[key], w) for key, w in list(self.counts(problem).items())[:n]]

    def resample(self, n: int, seed: int, problem: int = 0) -> list[str]:
        """n texts drawn from the weighted sample of one problem (with replacement)."""
        from retrodict.rng import generator

        pick = torch.multinomial(self.weights[problem].cpu(), n, replacement=True, generator=generator(seed))
        return [self.shown[problem * self.k + i] for i in pick.tolist()]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything to one safetensors file, whole or not at all; :meth:`load` reads it back."""
        from retrodict import particles_io

        particles_io.save(self, path)

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Particles:
        """Read a file that :meth:`save` wrote; a damaged or foreign one raises InputError."""
        from retrodict import particles_io

        return particles_io.load(path)

    def to_pandas(self) -> pandas.DataFrame:
        """One row an object: problem, name, text, n, stop, weight, log_w and each term (nats)."""
        from retrodict import particles_io

        return particles_io.to_pandas(self)

    def to_arviz(self, n: int | None = None, seed: int = 0) -> Any:
        """Equal-weight draws as ArviZ reads them (n a problem, resampled with ``seed``)."""
        from retrodict import particles_io

        return particles_io.to_arviz(self, n, seed)

    def __repr__(self) -> str:
        from retrodict import particles_io

        return particles_io.describe(self)

    def __rich__(self) -> rich.table.Table:
        from retrodict import particles_io

        return particles_io.rich_table(self)

    def _repr_html_(self) -> str:
        from retrodict import particles_io

        return particles_io.html_table(self)
