"""Hidden Markov models with categorical emissions: the latent is the path of states, z_0..z_T for x_1..x_T.

    p(x, z)  =  pi(z_0) prod_t A(z_{t-1}, z_t) B(z_t, x_t)                z_0 emits nothing, as in ``guides.hmm``

Exact (Rabiner 1989): log p(x) by the forward algorithm, EM by Baum-Welch, and posterior paths by forward filtering,
backward sampling: z_T ~ f_T, then z_t proportional to f_t(z_t) A(z_t, z_{t+1}), with f the filtered beliefs.

The posterior is a Markov chain, p(z_t | z_{t-1}, x_t..x_T): a policy that reads the state before and the symbols ahead
(:class:`AheadNet`), with one network for all t, can hold it exactly. ``rd.smc`` with any policy is a particle filter.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import one_hot

from retrodict.errors import InputError
from retrodict.guides.base import BaseGuide
from retrodict.guides.hmm import HMM
from retrodict.guides.hmm_fit import Tables, beliefs, expected_counts
from retrodict.numerics import sample_categorical
from retrodict.particles import Particles
from retrodict.policies.layers import MLP
from retrodict.policies.net import NetPolicy
from retrodict.protocols import Problems
from retrodict.records import Problem, Rollouts, Trace, whole_rollouts
from retrodict.rng import generator
from retrodict.samplers.common import finish
from retrodict.spaces.vectors import Assignments
from retrodict.targets.algebra import Target
from retrodict.training.learn import weighted_rows

LEAST = 1e-8
"""Least probability after an M-step: a zero is never left again, and has no logarithm."""


@dataclass(frozen=True)
class PathTerm:
    """log p(x_m, z) of whole paths."""

    hmm: HMM
    x: Int[Tensor, "m t"]
    version: str
    name: str = "joint"
    noise: str = "none"
    prefixes: bool = False

    def on(self, problems: Problems) -> PathTerm:
        """The same model of other sequences."""
        return replace(self, x=symbols_of(problems, self.x.shape[1], self.hmm.vocab_size))

    def __call__(self, rollouts: Rollouts, every_prefix: bool = False) -> Float[Tensor, " b"]:
        """``[b]``; a prefix of a path is no object."""
        z, x = rollouts.moves, self.x[rollouts.problem]
        pairs = self.hmm.transition[z[:, :-1], z[:, 1:]] * self.hmm.emission[z[:, 1:], x]
        return self.hmm.initial[z[:, 0]].log() + pairs.log().sum(1)


@dataclass(frozen=True)
class PathCarry:
    """b paths of n states: the last one, and log p of the path and the symbols beside it."""

    problem: Int[Tensor, " b"]
    last: Int[Tensor, " b"]
    n: Int[Tensor, " b"]
    log_p: Float[Tensor, " b"]

    def take(self, index: Tensor) -> PathCarry:
        """Rows ``index``."""
        return PathCarry(self.problem[index], self.last[index], self.n[index], self.log_p[index])


class PathGuide(BaseGuide):
    """psi(z_0..z_t) = p(z_0..z_t, x_1..x_t): with it ``rd.smc`` is a particle filter, weighted at every symbol."""

    def __init__(self, hmm: HMM, x: Int[Tensor, "m t"]) -> None:
        self.hmm, self.x = hmm, x

    def on(self, problems: Problems) -> PathGuide:
        """The same model of other sequences."""
        return PathGuide(self.hmm, symbols_of(problems, self.x.shape[1], self.hmm.vocab_size))

    def start(self, problem: Int[Tensor, " b"]) -> PathCarry:
        """Empty paths."""
        zero = torch.zeros_like(problem)
        return PathCarry(problem, zero, zero, torch.zeros(len(problem), dtype=torch.float64))

    def start_at(self, rollouts: Rollouts, upto: Int[Tensor, " b"]) -> PathCarry:
        """Paths of the first ``upto`` states."""
        c = self.start(rollouts.problem)
        for t in range(int(upto.max()) if len(upto) else 0):
            new, on = self.step(c, None, rollouts.moves[:, t]), upto > t
            c = PathCarry(c.problem, *(torch.where(on, getattr(new, f), getattr(c, f)) for f in ("last", "n", "log_p")))
        return c

    def step(self, c: PathCarry, s: Any, move: Int[Tensor, " b"]) -> PathCarry:
        """One more state a row."""
        log_p = c.log_p + self._ahead(c).gather(1, move[:, None]).squeeze(1)
        return PathCarry(c.problem, move, c.n + 1, log_p)

    def take(self, c: PathCarry, index: Tensor) -> PathCarry:
        """Rows ``index``."""
        return c.take(index)

    def log_psi(self, c: PathCarry, s: Any) -> Float[Tensor, " b"]:
        """log p of the path so far and its symbols."""
        return c.log_p

    def log_next(self, c: PathCarry, s: Any) -> Float[Tensor, "b h"]:
        """log psi after each state."""
        return c.log_p[:, None] + self._ahead(c)

    def log_end(self, c: PathCarry, s: Any) -> Float[Tensor, "b 1"]:
        """log gamma, where the path is whole."""
        return c.log_p[:, None]

    def _ahead(self, c: PathCarry) -> Float[Tensor, "b h"]:
        """log of pi, or of A(z, .) B(., x_t)."""
        x = self.x[c.problem, (c.n - 1).clamp(0, self.x.shape[1] - 1)]
        later = self.hmm.transition[c.last] * self.hmm.emission.T[x]
        return torch.where((c.n == 0)[:, None], self.hmm.initial, later).log()


def sequence_problems(x: Int[Tensor, "m t"], vocab_size: int) -> list[Problem]:
    """One problem for each sequence: its symbols, and their one-hots as what policies read."""
    codes = one_hot(x, vocab_size).flatten(1).tolist()
    each = zip(x.tolist(), codes, strict=True)
    return [Problem((), row={"symbols": tuple(s), "features": tuple(c)}, name=str(i)) for i, (s, c) in enumerate(each)]


def symbols_of(problems: Problems, t: int, vocab_size: int) -> Int[Tensor, "m t"]:
    """The sequences of problems. Raises InputError for one of another length or with an unknown symbol."""
    rows = [p.row.get("symbols", ()) for p in problems]
    for i, row in enumerate(rows):
        if len(row) != t:
            raise InputError(f"sequence {i} has {len(row)} symbols, not {t}: paths of one model have one length")
        bad = [s for s in row if not 0 <= s < vocab_size]
        if bad:
            raise InputError(f"sequence {i} has symbol {bad[0]}, and the model emits 0 to {vocab_size - 1}")
    return torch.tensor(rows, dtype=torch.long).view(len(rows), t)


class HiddenMarkov:
    """Sequences of one length and an HMM that learns from them: a model for ``training.learn``.

    Raises InputError for a symbol that the HMM does not emit.
    """

    def __init__(self, x: Int[Tensor, "m t"], hmm: HMM) -> None:
        self.hmm, self.updates = hmm.to(torch.float64), 0
        bad = ((x < 0) | (x >= hmm.vocab_size)).nonzero()
        if len(bad):
            i, t = bad[0].tolist()
            raise InputError(f"sequence {i} has symbol {int(x[i, t])}, and the model emits 0 to {hmm.vocab_size - 1}")
        self.x, self.problems = x, sequence_problems(x, hmm.vocab_size)
        self.space = Assignments((hmm.states,) * (x.shape[1] + 1), tuple(f"z{t}" for t in range(x.shape[1] + 1)))
        self._target: Target | None = None

    @property
    def target(self) -> Target:
        """log gamma = log p(x_m, z)."""
        if self._target is None:
            self._target = self.of(self.problems)
        return self._target

    def of(self, problems: Problems) -> Target:
        """The target of other sequences of this length, under the present parameters."""
        x = symbols_of(problems, self.x.shape[1], self.hmm.vocab_size)
        joint = PathTerm(self.hmm, x, f"hmm@{self.updates}")
        return Target(self.space, problems, {"joint": joint}, guide=PathGuide(self.hmm, x))

    def log_evidence(self) -> Float[Tensor, " m"]:
        """log p(x) of each sequence, by the forward algorithm."""
        return log_evidence(self.hmm, self.x)

    def exact_step(self) -> float:
        """One round of Baum-Welch; gives the mean of log p(x) before it."""
        full = torch.full((len(self.x),), self.x.shape[1])
        first, pairs, counts, log_p = expected_counts(_tables(self.hmm), self.x, full)
        self._set(first, pairs, counts)
        return float(log_p.mean())

    def m_step(self, particles: Particles, seed: int = 0) -> float:
        """Weighted counts of states, transitions and emissions; gives E log p(x, z) after, a mean over sequences."""
        rows, w = weighted_rows(particles)
        z, x, h = rows.moves, self.x[rows.problem], self.hmm.states
        first = torch.zeros(h, dtype=torch.float64).index_add_(0, z[:, 0], w)
        each = w[:, None].expand(x.shape).flatten()
        pairs = torch.zeros(h * h, dtype=torch.float64)
        pairs.index_add_(0, (z[:, :-1] * h + z[:, 1:]).flatten(), each)
        counts = torch.zeros(h * self.hmm.vocab_size, dtype=torch.float64)
        counts.index_add_(0, (z[:, 1:] * self.hmm.vocab_size + x).flatten(), each)
        self._set(first, pairs.view(h, h), counts.view(h, -1))
        return float((w * self.target.factors["joint"](rows)).sum())

    def _set(self, first: Float[Tensor, " h"], pairs: Float[Tensor, "h h"], counts: Float[Tensor, "h v"]) -> None:
        """Counts to probabilities; a state that was never met keeps its row."""

        def rows(new: Tensor, old: Tensor) -> Tensor:
            total = new.sum(-1, keepdim=True)
            p = torch.where(total > 0, new / total.clamp_min(1e-300), old).clamp_min(LEAST)
            return p / p.sum(-1, keepdim=True)

        old = self.hmm
        self.hmm = HMM(rows(first, old.initial), rows(pairs, old.transition), rows(counts, old.emission))
        self._target, self.updates = None, self.updates + 1

    def simulate(self, n: int, gen: torch.Generator) -> tuple[Target, Rollouts]:
        """n sequences of the model itself, and the path of each."""
        z, x = sample_paths(self.hmm, n, self.x.shape[1], gen)
        return self.of(sequence_problems(x, self.hmm.vocab_size)), whole_rollouts(torch.arange(n), z)


def _tables(hmm: HMM) -> Tables:
    return Tables(hmm.initial, hmm.transition, hmm.emission)


def log_evidence(hmm: HMM, x: Int[Tensor, "m t"]) -> Float[Tensor, " m"]:
    """log p(x) of each sequence (nats)."""
    return hmm.log_prob(x, torch.full((len(x),), x.shape[1])).sum(1)


def sample_paths(hmm: HMM, n: int, t: int, gen: torch.Generator) -> tuple[Int[Tensor, "n t1"], Int[Tensor, "n t"]]:
    """States and symbols of n sequences."""
    z, x = [sample_categorical(hmm.initial.log().expand(n, -1), gen)], []
    for _ in range(t):
        z.append(sample_categorical(hmm.transition.log()[z[-1]], gen))
        x.append(sample_categorical(hmm.emission.log()[z[-1]], gen))
    return torch.stack(z, 1), torch.stack(x, 1)


def posterior_paths(hmm: HMM, x: Int[Tensor, "m t"], n: int, gen: torch.Generator) -> Int[Tensor, "r t1"]:
    """n exact posterior paths of each sequence, problem-major: forward filtering, backward sampling."""
    f = beliefs(_tables(hmm), x)[0].log().repeat_interleave(n, 0)
    z = [sample_categorical(f[:, -1], gen)]
    for t in range(x.shape[1] - 1, -1, -1):
        z.append(sample_categorical(f[:, t] + hmm.transition.log().T[z[-1]], gen))
    return torch.stack(z[::-1], 1)


def ffbs(n: int) -> Callable[[Target, int], Particles]:
    """A sampler of n exact posterior paths of each sequence, for targets of :class:`HiddenMarkov`: an E-step."""

    def draw(target: Target, seed: int) -> Particles:
        began, term = time.perf_counter(), target.factors["joint"]
        assert isinstance(term, PathTerm)
        z = posterior_paths(term.hmm, term.x, n, generator(seed))
        rows = whole_rollouts(torch.arange(len(term.x)).repeat_interleave(n), z)
        log_z = log_evidence(term.hmm, term.x)
        trace = Trace("forward filtering, backward sampling", {"n": n, "seed": seed})
        return finish(target, target.terms(rows), log_z[:, None].expand(-1, n), log_z[:, None], trace, began)

    return draw


class AheadNet:
    """A network for ``NetPolicy`` over paths: it reads z_{t-1} and x_t, ..., x_T, moved to the same place for every t.

    Past the end, and where z_0 emits nothing, symbols are zeros.
    """

    def __init__(self, states: int, vocab_size: int, t: int, hidden: int = 64, layers: int = 2, seed: int = 0) -> None:
        self.h, self.v, self.t = states, vocab_size, t
        self.mlp = MLP(states + (t + 1) * vocab_size, states + 1, hidden, layers, seed)
        self.parameters = self.mlp.parameters

    def __call__(self, x: Float[Tensor, "b i"]) -> Float[Tensor, "b o"]:
        """Logits of the next state (and of the forced stop, unused)."""
        h, v, t, b = self.h, self.v, self.t, len(x)
        values, at, symbols = x.split([h * (t + 1), t + 1, t * v], 1)
        at = at.argmax(1)
        before = torch.cat([x.new_zeros(b, 1, h), values.view(b, t + 1, h)], 1)[torch.arange(b), at]
        laid = torch.cat([x.new_zeros(b, 1, v), symbols.view(b, t, v), x.new_zeros(b, t + 1, v)], 1)
        ahead = laid[torch.arange(b)[:, None], at[:, None] + torch.arange(t + 1)]
        return self.mlp(torch.cat([before, ahead.flatten(1)], 1))


def path_policy(model: HiddenMarkov, hidden: int = 64, layers: int = 2, seed: int = 0) -> NetPolicy:
    """An untrained q(z | x) whose family holds the exact posterior's dependences."""
    net = AheadNet(model.hmm.states, model.hmm.vocab_size, model.x.shape[1], hidden, layers, seed)
    return NetPolicy(model.space, model.problems, net)


def random_hmm(states: int, vocab_size: int, seed: int = 0, scale: float = 1.0) -> HMM:
    """Tables of softmaxed normals, float64: where learning may start."""
    gen = generator(seed)

    def rows(*shape: int) -> Tensor:
        return (scale * torch.randn(*shape, generator=gen, dtype=torch.float64)).softmax(-1)

    return HMM(rows(states), rows(states, states), rows(states, vocab_size))
