"""Laws of the parts that give values: Target, LanguageModel, sampler. See ``laws``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from retrodict.models.tabular import naive_suffixes
from retrodict.numerics import NEG_INF, at_end, log_mean_exp
from retrodict.particles import Particles
from retrodict.policies.base import FiniteStepper
from retrodict.protocols import LanguageModel
from retrodict.records import Rollouts
from retrodict.rng import generator
from retrodict.samplers.exact import exact
from retrodict.spaces.enumerate import enumerate_objects
from retrodict.targets.algebra import Target, temper
from retrodict.testing.laws import holds, same, tolerance

CONSTANT = 2.5


@dataclass(frozen=True)
class Constant:
    """A factor that is exp(nats) everywhere: it must move log Z by that much and change no sample."""

    nats: float
    name: str = "constant"
    noise: str = "none"
    prefixes: bool = True
    version: str = "1"

    def __call__(self, rollouts: Rollouts, every_prefix: bool = False) -> Tensor:
        """The constant, where there is something to weigh."""
        b, t = rollouts.moves.shape[:2]
        if not every_prefix:
            return torch.full((b,), self.nats, dtype=torch.float64)
        inside = torch.arange(t + 1) <= rollouts.n[:, None]
        value = torch.where(inside, self.nats, NEG_INF).double()
        return value[:, :, None].expand(-1, -1, rollouts.log_stop.shape[2])


def with_constant(target: Target, nats: float) -> Target:
    """The same target times exp(nats)."""
    term = Constant(nats)
    return Target(target.space, target.problems, {**target.factors, term.name: term},
                  target.betas, target.prior, target.guide, target.note)  # fmt: skip


def check_target(target: Target, seed: int = 0) -> None:
    """Laws of a Target on an enumerable space.

    1. Every factor's values do not depend on what else is in the batch.
    2. Where a factor has prefix values, each equals the value of the object that ends there.
    3. log gamma is the sum of beta * log f, and ``** b`` multiplies it by b.
    4. Values already on a record are kept at their version and made anew at another.
    5. Problems are independent: ``on`` another order of problems gives the same values.
    6. A constant factor moves log Z by itself.
    """
    gen = generator(seed)
    for p in range(len(target.problems)):
        rows = enumerate_objects(target.space, p)
        if len(rows) > 400:
            rows = rows.take(torch.randperm(len(rows), generator=gen)[:400])
        done = target.terms(rows)
        tol = max(tolerance(_value(done, name)) for name in target.factors)
        for name, term in target.factors.items():
            _check_batches(name, target, rows, _value(done, name), tol, gen)
            if term.prefixes:
                _check_prefixes(target, name, rows, _value(done, name), tol)
        _check_algebra(target, done, tol)
        if len(target.problems) > 1:
            back = target.on(list(target.problems)[::-1])
            other = len(target.problems) - 1 - p
            moved = Rollouts(**{**vars(rows), "problem": torch.full_like(rows.problem, other), "terms": {}})
            same("the same problem at another place has the same values", back.log_gamma(moved),
                 target.log_gamma(rows), tol)  # fmt: skip
    before, after = exact(target).log_z, exact(with_constant(target, CONSTANT)).log_z
    assert before is not None and after is not None
    same("a constant factor moves log Z by itself", after - before, torch.full_like(before, CONSTANT), 1e-4)


def _value(rollouts: Rollouts, name: str) -> Tensor:
    x = rollouts.terms[name]
    return at_end(x, rollouts.n, rollouts.stop) if x.dim() > 1 else x


def _check_batches(name: str, target: Target, rows: Rollouts, value: Tensor, tol: float, gen: torch.Generator) -> None:
    term = target.factors[name]
    order = torch.randperm(len(rows), generator=gen)
    same(f"the factor {name!r} gives the same values in another order", term(rows.take(order)), value[order], tol)
    for i in order[:5].tolist():
        one = rows.take(torch.tensor([i]))
        same(f"the factor {name!r}: batch equals one by one", term(one)[0], value[i], tol)


def _check_prefixes(target: Target, name: str, rows: Rollouts, value: Tensor, tol: float) -> None:
    space = target.space
    every = target.factors[name](rows, every_prefix=True)
    holds(f"the factor {name!r} has one value a prefix and stop",
          every.shape == (len(rows), rows.moves.shape[1] + 1, space.n_stops))  # fmt: skip
    same(f"the factor {name!r}: the last prefix is the whole object", at_end(every, rows.n, rows.stop), value, tol)
    known = dict(zip(space.keys(rows), value.tolist(), strict=True))
    for i in range(rows.moves.shape[1]):
        for s in range(space.n_stops):
            cut = (rows.n > i) & rows.can_stop[:, i]
            part = rows.take(cut.nonzero().squeeze(1))
            short = Rollouts(**{**vars(part), "n": torch.full_like(part.n, i), "stop": torch.full_like(part.n, s)})
            found = [known.get(k, float("nan")) for k in space.keys(short)]
            whole = torch.tensor(found, dtype=torch.float64)
            there = ~whole.isnan()
            same(f"the factor {name!r}: prefix {i}, stop {s} is the object that ends there",
                 every[cut][there, i, s], whole[there], tol)  # fmt: skip


def _check_algebra(target: Target, done: Rollouts, tol: float) -> None:
    total = target.log_gamma(done)
    parts = [temper(_value(done, name).double(), beta) for name, beta in target.betas.items()]
    same("log gamma is the sum of beta * log f", torch.stack(parts).sum(0), total, tol)
    holds("log gamma is never NaN", ~total.isnan())
    live = total > NEG_INF
    same("gamma ** 2 doubles log gamma", (target**2.0).log_gamma(done)[live], 2 * total[live], tol)
    for name in target.factors:
        doubled = target.with_betas(**{name: target.betas[name] + 1}).log_gamma(done)
        same(f"beta of {name!r} multiplies it alone", doubled[live], (total + _value(done, name).double())[live], tol)
    name = next(iter(target.factors))
    marked = done.with_terms({name: torch.zeros(len(done), dtype=torch.float64)})
    same("a value at its present version is kept", _value(target.terms(marked), name), torch.zeros(()), 0.0)
    stale = marked.with_terms({}, {name: "an older version"})
    same("a stale value is made anew", _value(target.terms(stale), name), _value(done, name), tol)


def check_model(lm: LanguageModel, rows: int = 6, length: int = 5, seed: int = 0, tol: float | None = None) -> None:
    """Laws of a LanguageModel.

    1. Next-token probabilities sum to one.
    2. Cache equals no cache: stepping gives what encoding the whole prefix gives.
    3. Padding is irrelevant: prompts of different lengths in a batch give what each gives alone.
    4. ``take`` gathers, with repeats.
    5. ``score`` equals stepping: moves, stop ids, and the mass of legal tokens.
    6. ``peek`` equals ``score`` and leaves the cache as it was.
    7. ``score_suffixes`` equals scoring every (prompt, prefix, suffix) from the start.
    """
    gen = generator(seed)
    v = lm.vocab_size
    prompts = [torch.randint(v, (1 + i % 4,), generator=gen).tolist() for i in range(rows)]
    moves = torch.randint(v, (rows, length), generator=gen)
    n = torch.randint(length + 1, (rows,), generator=gen)
    n[0] = length
    cache, logits = lm.encode(prompts, room=length)
    tol = (1e-9 if logits.dtype == torch.float64 else 1e-4) if tol is None else tol
    same("next-token probabilities sum to one", _log_p(logits).logsumexp(-1), torch.zeros(()), tol)
    for i, p in enumerate(prompts):
        same("padding is irrelevant: a batch encodes as its rows do alone", _log_p(lm.encode([p])[1])[0],
             _log_p(logits)[i], tol)  # fmt: skip
    stepped = [_log_p(logits)]
    for t in range(length):
        cache, logits = lm.step(cache, moves[:, t].to(lm.device))
        stepped.append(_log_p(logits))
        whole = lm.encode([[*p, *z[: t + 1]] for p, z in zip(prompts, moves.tolist(), strict=True)])[1]
        same(f"cache equals no cache after {t + 1} tokens", stepped[-1], _log_p(whole), tol)
    steps = torch.stack(stepped, 1)
    _check_take(lm, prompts, moves, steps, gen, tol)
    stops, legal = (0, v - 1), torch.arange(v) % 2 == 0
    log_p, log_stop, mass = lm.score(prompts, moves, n, stops, legal.to(lm.device))
    inside, until = torch.arange(length) < n[:, None], torch.arange(length + 1) <= n[:, None]
    each = steps[:, :-1].gather(2, moves[:, :, None]).squeeze(2)
    same("score equals stepping (moves)", log_p.cpu()[inside], each[inside], tol)
    same("score equals stepping (stops)", log_stop.cpu()[until], steps[:, :, list(stops)][until], tol)
    same("score equals stepping (mass of legal tokens)", mass.cpu()[until],
         steps.masked_fill(~legal, NEG_INF).logsumexp(-1)[until], tol)  # fmt: skip
    cache, logits = lm.encode(prompts, room=length)
    before = _log_p(logits).clone()
    same("peek equals score", lm.peek(cache, moves.to(lm.device)).cpu(), each, tol)
    _, logits = lm.step(cache, moves[:, 0].to(lm.device))
    same("peek leaves the cache as it was", _log_p(logits), steps[:, 1], tol)
    same("peek leaves the logits as they were", before, steps[:, 0], tol)
    for skip in (0, 1):
        tails = [[torch.randint(v, (skip + 1 + (i + s) % 3,), generator=gen).tolist() for i in range(rows)]
                 for s in range(2)]  # fmt: skip
        for every in (True, False):
            fast = lm.score_suffixes(prompts, moves, n, tails, every, skip).cpu()
            slow = naive_suffixes(lm, prompts, moves, n, tails, every, skip)
            asked = until if every else torch.arange(length + 1) == n[:, None]
            same(f"score_suffixes equals the naive loop (every={every}, skip={skip})", fast[asked], slow[asked], tol)


def _log_p(logits: Tensor) -> Tensor:
    x = logits.detach().cpu()
    return (x if x.dtype == torch.float64 else x.float()).log_softmax(-1)


def _check_take(
    lm: LanguageModel, prompts: Sequence[Sequence[int]], moves: Tensor, steps: Tensor, gen: torch.Generator, tol: float
) -> None:
    cache, _ = lm.encode(prompts, room=2)
    index = torch.randint(len(prompts), (2 * len(prompts),), generator=gen)
    cache, _ = lm.step(cache, moves[:, 0].to(lm.device))
    _, logits = lm.step(lm.take(cache, index.to(lm.device)), moves[index, 1].to(lm.device))
    same("take gathers the cache", _log_p(logits), steps[index, 2], tol)


def check_sampler(
    sampler: Callable[..., Particles],
    target: Target,
    policy: FiniteStepper | None = None,
    *,
    n: int = 8,
    random: bool = True,
    moved: Mapping[str, Any] | None = None,
    **settings: Any,
) -> None:
    """Laws of a sampler, called as ``sampler(target, policy, n=n, seed=seed, **settings)``.

    ``moved`` are the settings that a constant factor of CONSTANT nats changes (a rejection bound).

    1. Particles are whole: m problems times k particles, problem-major, with keys, texts and names that are theirs.
    2. One seed, one result; another seed, another (where it is ``random``).
    3. Where there is evidence, the mean over runs of Z-hat is the mean weight.
    4. The terms on the record are those the target gives anew.
    5. A constant factor moves log Z-hat by itself and changes no object and no self-normalised weight. (A sampler that
       resamples half-built objects pays the constant at their ends, so ask SMC with ``ess_threshold=0``.)
    """
    p = sampler(target, policy, n=n, seed=1, **settings)
    _check_particles(p, target)
    again = sampler(target, policy, n=n, seed=1, **settings)
    holds("one seed, one result", p.keys == again.keys and torch.equal(p.log_w, again.log_w))
    if random:
        other = [sampler(target, policy, n=n, seed=s, **settings).keys for s in (2, 3, 4)]
        holds("another seed, another result", any(k != p.keys for k in other))
    after = sampler(with_constant(target, CONSTANT), policy, n=n, seed=1, **{**settings, **(moved or {})})
    holds("a constant factor changes no object", after.keys == p.keys)
    same("a constant factor changes no weight", after.weights, p.weights, 1e-6)
    if p.log_z is not None and after.log_z is not None:
        live = p.log_z > NEG_INF
        gap = after.log_z[live] - p.log_z[live]
        same("a constant factor moves log Z-hat by itself", gap, torch.tensor(CONSTANT), 1e-5)


def _check_particles(p: Particles, target: Target) -> None:
    m, rows = len(target.problems), p.m * p.k
    sizes = {"problems": p.m == m, "objects": len(p.objects) == rows, "keys": len(p.keys) == rows,
             "texts": len(p.shown) == rows, "names": len(p.names) == m}  # fmt: skip
    for what, ok in sizes.items():
        holds(f"particles have their number of {what}", ok)
    order = torch.arange(m).repeat_interleave(p.k)
    holds("rows are problem-major", p.objects.problem == order)
    holds("keys are the objects'", p.keys == tuple(target.space.keys(p.objects)))
    holds("texts are the objects'", p.shown == tuple(target.space.show(p.objects)))
    holds("log-weights are numbers or -inf", ~p.log_w.isnan() & (p.log_w < float("inf")))
    holds("counts say what was run", "seconds" in p.trace.counts)
    if p.log_z is not None:
        same("the mean of Z-hat over runs is the mean weight", log_mean_exp(p.log_z.double()),
             log_mean_exp(p.log_w.double()), 1e-6)  # fmt: skip
    live = (p.log_w > NEG_INF).flatten()
    part = p.objects.take(live.nonzero().squeeze(1))
    fresh = target.log_gamma(Rollouts(**{**vars(part), "terms": {}, "versions": {}}))
    same("terms on the record are those the target gives", target.log_gamma(part), fresh, 1e-4)
