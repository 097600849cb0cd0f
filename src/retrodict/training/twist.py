"""``fit_twist``: learn psi for a target, by the loop of ``amortize`` (Zhao et al. 2024, arXiv:2404.17546, section 4).

Sampling from a language model costs far more than fitting a head on its hidden states. So strings are drawn once, from
the prior within the hard constraint, and kept with what the head reads of them (a bank); the loop then takes its rows
from there, step by step. A second round adds strings of the first twist's own, which are nearer the target; each row is
weighed by the law that it was drawn from.

Each time a row is used its length limit is drawn anew: a string that may have 32 tokens is, cut after 20, one that may
have 20. This shows the head every state at every number of remaining moves.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from retrodict.errors import InputError
from retrodict.guides.twist import TwistGuide, TwistHead, hard_part, token_axes
from retrodict.numerics import NEG_INF
from retrodict.particles_io import read_tensors, write_tensors
from retrodict.policies.base import FiniteStepper
from retrodict.policies.guided import GuidedPolicy
from retrodict.policies.lm import LMPolicy
from retrodict.policies.twisted import Seen, TwistedPolicy
from retrodict.protocols import Problems
from retrodict.records import FORCED, Rollouts, Scores, cat_rollouts, trim
from retrodict.rng import generator
from retrodict.samplers.common import device_of, rows_for
from retrodict.spaces.limits import forced_log_p
from retrodict.targets.algebra import Target, temper
from retrodict.training.amortize import amortize

ROW, LIMIT = "bank.row", "bank.limit"
"""Terms that say which row of a bank a rollout is, and the length limit it is read under."""
BATCH = 128
"""Strings drawn at once for a bank."""


# -- a twist for a target ---------------------------------------------------------------------------------------------


def twist_for(target: Target, head: TwistHead | None = None, *, rank: int = 32, hidden: int = 128,
              seed: int = 0) -> TwistGuide:  # fmt: skip
    """A twist on a target's own prior and hard constraints: with a head that was fitted, or a new one (psi = level).

    The level of a problem is what the factors besides prior and constraints make of the empty string.

    Raises InputError where the prior is no language model, or the head was made for another kind of target.
    """
    prior, hard = target.prior, hard_part(target.guide)
    if not isinstance(prior, LMPolicy) or not hasattr(prior.lm, "states"):
        raise InputError("a twist reads the hidden states of the prior's model, and this target's prior has none: "
                         "use a model from rd.load")  # fmt: skip
    lm, space, table = prior.lm, prior.space, getattr(hard, "next", None)
    needs = {"moves": space.max_free, "stops": space.n_stops, "states": 1 if table is None else len(table),
             "tokens": space.vocab_size}  # fmt: skip
    if head is None:
        axes, size = token_axes(lm, rank), _first_state(lm, [0]).shape[1]
        told = any(p.evidence for p in target.problems) and len({p.evidence for p in target.problems}) > 1
        head = TwistHead(axes, size, **{k: v for k, v in needs.items() if k != "tokens"},
                         about=2 * axes.shape[1] + size if told else 0, hidden=hidden, seed=seed)  # fmt: skip
    for name, need in needs.items():
        have = head.shape[name]
        if have < need if name == "moves" else have != need:
            raise InputError(f"this twist was made for {name} = {have}, and the target has {need}: fit one for it")
    about = partial(_about, lm, head) if head.shape["about"] else None
    return TwistGuide(prior, head, hard, target.betas.get("prior", 1.0), _level(target), about)


def _first_state(lm: Any, ids: Sequence[int]) -> Float[Tensor, "1 e"]:
    return lm.state(lm.encode([list(ids)])[0])


@torch.no_grad()
def _about(lm: Any, head: TwistHead, problems: Problems) -> Float[Tensor, "m a"]:
    """What the head is told of the evidence Y: its tokens' mean, its first token, the model's state after it alone."""
    out = []
    for p in problems:
        y = list(p.evidence) or [0]
        state = (_first_state(lm, y)[0].to(head.axes) - head.mean) / head.scale
        out.append(torch.cat([head.axes[y].mean(0), head.axes[y[0]], state]))
    return torch.stack(out)


def _level(target: Target) -> Float[Tensor, " m"]:
    m, space, device = len(target.problems), target.space, device_of(target, None)
    value = _value(target, _empty(torch.arange(m, device=device), space.n_stops))[:, 0, 0]
    return torch.where(value.isfinite(), value, 0.0).float()


def _empty(problem: Int[Tensor, " b"], stops: int) -> Rollouts:
    """Rows without a move."""
    b, zero = len(problem), torch.zeros(len(problem), 1, device=problem.device)
    none = zero[:, :0]
    return Rollouts(problem=problem, moves=none.long(), kind=none.to(torch.int8), n=torch.zeros_like(problem),
                    stop=torch.zeros_like(problem), can_stop=zero.bool(), log_q=none, log_b=zero, log_pb=none,
                    log_stop=zero[:, :, None].expand(b, 1, stops))  # fmt: skip


def _value(target: Target, r: Rollouts) -> Float[Tensor, "b t1 s"]:
    """What factors besides prior and hard constraints make of ending after each prefix; NaN where they do not say."""
    row = torch.arange(len(r), device=r.n.device)
    value = torch.zeros(r.log_stop.shape, dtype=torch.float64, device=r.n.device)
    for name, term in target.factors.items():
        if name == "prior" or hasattr(term, "guide"):
            continue
        if term.prefixes:
            every = term(r, every_prefix=True)
        else:
            every = torch.full_like(value, math.nan)
            every[row, r.n, r.stop] = term(r).double()
        value = value + temper(every.double(), target.betas[name])
    return value


# -- the bank ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bank:
    """Strings drawn once, problem by problem, and what the head reads of them.

    Attributes:
        rollouts: as drawn.
        seen: hidden states, and the likeliest tokens of every prefix.
        value: what the other factors make of ending after each prefix.
    """

    rollouts: Rollouts
    seen: Seen
    value: Float[Tensor, "b t1 s"]


@torch.no_grad()
def fill(target: Target, twisted: TwistedPolicy, source: FiniteStepper, rows: int, seed: int) -> Bank:
    """A bank of ``rows`` strings a problem, drawn from ``source``."""
    guide, gen = twisted.guide, generator(seed, twisted.guide.lm.device, 5)
    parts = []
    for problem in rows_for(target, rows, gen.device).split(BATCH):
        r = _widest(replace(source.sample(problem, gen), terms={}), guide.space.max_moves)
        parts.append(Bank(r, twisted.seen(r), _value(target, r)))
    return merge(parts)


def merge(parts: Sequence[Bank]) -> Bank:
    """Banks as one, problem by problem."""
    rows = cat_rollouts([p.rollouts for p in parts])
    each = {f.name: [getattr(p.seen, f.name) for p in parts] for f in fields(Seen)}
    joined: dict[str, Any] = {k: None if x[0] is None else torch.cat(x) for k, x in each.items()}
    seen = Seen(**joined)
    order = rows.problem.argsort(stable=True)
    return Bank(rows.take(order), seen.take(order), torch.cat([p.value for p in parts])[order])


def _widest(r: Rollouts, t: int) -> Rollouts:
    """Rows padded to t moves."""
    none = r.take(torch.zeros(0, dtype=torch.long, device=r.n.device))
    wide = {f: torch.zeros(0, t, dtype=getattr(r, f).dtype, device=r.n.device) for f in ("moves", "kind", "log_q",
            "log_pb")} | {f: torch.zeros(0, t + 1, dtype=getattr(r, f).dtype, device=r.n.device) for f in ("can_stop",
            "log_b")}  # fmt: skip
    stop = torch.zeros(0, t + 1, r.log_stop.shape[2], dtype=r.log_stop.dtype, device=r.n.device)
    return cat_rollouts([r, replace(none, **wide, log_stop=stop)])


class Banked:
    """A twisted policy that draws from a bank: ``Trainable``, so that the loop trains its head. ``local`` draws afresh.

    ``cut`` is the share of a step's problems that are read under a shorter length limit.
    """

    def __init__(self, local: TwistedPolicy, bank: Bank, cut: float = 0.5) -> None:
        self.local, self.bank, self.cut, self.about = local, bank, cut, {}
        self.about: dict[str, Any]
        self.space, self.problems = local.space, local.problems
        self.parameters, self.settle, self.refresh = local.parameters, local.settle, local.refresh
        self.per = len(bank.rollouts) // len(self.problems)
        fixed = self.space.stops.predicate is not None or bool((bank.rollouts.kind == FORCED).any())
        if fixed or bool(bank.value.isnan().any()):
            self.cut = 0.0  # what a cut string would be worth is not known

    @property
    def version(self) -> str:
        """The twist's."""
        return self.local.version

    def on(self, problems: Problems) -> TwistedPolicy:
        """Other problems have no rows here."""
        return self.local.on(problems)

    def sample(
        self, problem: Int[Tensor, " b"], gen: torch.Generator, behaviour: Mapping[str, Any] | None = None
    ) -> Rollouts:
        """Rows of each problem, all of one problem under one length limit."""
        device, space = problem.device, self.space
        index = problem * self.per + torch.randint(self.per, problem.shape, generator=gen, device=device)
        m, top = len(self.problems), space.max_free
        low = max(1, space.min_moves)
        limit = torch.randint(low, top + 1, (m,), generator=gen, device=device)
        whole = torch.rand(m, generator=gen, device=device) >= self.cut
        limit = torch.where(whole, top, limit)[problem]
        return self._read(index, limit)

    def _read(self, index: Int[Tensor, " b"], limit: Int[Tensor, " b"]) -> Rollouts:
        bank = self.bank
        r = bank.rollouts.take(index)
        n, row = torch.minimum(r.n, limit), torch.arange(len(index), device=index.device)
        short = r.n > n
        inside = torch.arange(r.moves.shape[1], device=n.device) < n[:, None]
        log_b = r.log_b.clone()
        log_b[row[short], n[short]] = 0.0
        stop = torch.where(n == limit, 0, r.stop)
        seen = self._seen(index, limit)
        path = torch.where(inside, bank.seen.taken[index], 0.0).double().sum(1)
        gamma = path + seen.stop[row, n, stop].double() + bank.value[index][row, n, stop]
        terms = {"gamma": gamma, ROW: index.double(), LIMIT: limit.double()}
        cut = replace(r, n=n, stop=stop, kind=torch.where(inside, r.kind, 0).to(torch.int8), log_b=log_b, terms=terms,
                      versions={"gamma": self.local.guide.lm.version}, behaviour={"staleness": 1})  # fmt: skip
        return trim(cut)

    def _seen(self, index: Int[Tensor, " b"], limit: Int[Tensor, " b"]) -> Seen:
        """What is seen under a shorter limit: fewer moves remain, and at the limit the stop is forced."""
        bank, space = self.bank, self.space
        seen = bank.seen.take(index)
        at = torch.arange(seen.left.shape[1], device=index.device)
        end = (at == limit[:, None])[:, :, None]
        stop = torch.where(end, forced_log_p(space.limit, seen.price) + seen.hard, seen.stop)
        left = (seen.left - (space.max_free - limit)[:, None]).clamp_min(0)
        return replace(seen, left=left, stop=stop, move=seen.move.masked_fill(end, NEG_INF))

    def score(self, rollouts: Rollouts, raw: bool = False, grad: bool = False) -> Scores:
        """Off the bank: only the head is run."""
        index, limit = rollouts.terms[ROW].long(), rollouts.terms[LIMIT].long()
        seen = self._seen(index, limit).take(torch.arange(len(index), device=index.device), rollouts.moves.shape[1])
        with torch.set_grad_enabled(grad):
            return self.local.scores(seen, rollouts)


@dataclass(frozen=True)
class Whole:
    """All factors of a target as one, whose values rows of a bank bring along."""

    target: Target
    version: str
    name: str = "gamma"
    noise: str = "none"
    prefixes: bool = False

    def __call__(self, rollouts: Rollouts, every_prefix: bool = False) -> Tensor:
        """log gamma of fresh rows."""
        return self.target.log_gamma(rollouts)


# -- fitting ----------------------------------------------------------------------------------------------------------


def fit_twist(
    target: Target,
    *,
    objective: str = "softq",
    rows: int = 32,
    rounds: int = 1,
    top: int = 128,
    rank: int = 32,
    hidden: int = 128,
    seed: int = 0,
    folder: str | os.PathLike[str] | None = None,
    resume: bool = False,
    **given: Any,
) -> TwistedPolicy:
    """Learn a twist for a target: its problems are what it is fitted on, ``with_twist`` puts it to others.

    Args:
        target: the target; more problems of its kind make a twist that carries over.
        objective: ``softq | ctl | sixo | fudge | sir`` (DPG), see ``objectives.twists``.
        rows: strings a problem in a bank.
        rounds: banks, each added to those before; the first is drawn from the prior within its constraint, the next
            from the twist so far.
        top: tokens kept of each prefix.
        rank, hidden: size of the head.
        seed: one seed, one result.
        folder, resume: checkpoints and metrics of each round, as for ``amortize``.
        given: settings of ``amortize``: steps, samples, per_step, lr, ...

    Raises:
        InputError: a target without a language model as its prior, and whatever ``amortize`` refuses.
    """
    guide = twist_for(target, rank=rank, hidden=hidden, seed=seed)
    policy, began = TwistedPolicy(guide, top), time.perf_counter()
    base: FiniteStepper = guide.prior if guide.inner is None else GuidedPolicy(guide.prior, guide.inner)
    whole = replace(target, factors={"gamma": Whole(target, guide.lm.version)}, betas={}, guide=None)
    plan = {"steps": 1000, "samples": 16, "lr": 3e-3, "evaluate": 32, "seed": seed} | given
    seconds, banks = 0.0, []
    for k in range(rounds):
        clock = time.perf_counter()
        banks.append(fill(target, policy, policy if k else base, rows, seed + k))
        bank = merge(banks)
        if k == 0:
            standardise(guide.head, bank.seen, bank.rollouts)
        seconds += time.perf_counter() - clock
        where = None if folder is None else Path(folder) / f"round-{k}"
        banked = amortize(whole, Banked(policy, bank), objective=objective, folder=where, resume=resume, **plan)  # pyright: ignore[reportArgumentType]
        policy.about = banked.about
    policy.about |= {"target": target.formula, "seconds_bank": seconds, "seconds": time.perf_counter() - began}
    return policy


def standardise(head: TwistHead, seen: Seen, rollouts: Rollouts) -> None:
    """Mean and spread of the hidden states."""
    inside = torch.arange(seen.left.shape[1], device=rollouts.n.device) <= rollouts.n[:, None]
    x = seen.x[inside].to(head.axes)
    head.mean.copy_(x.mean(0))
    head.scale.copy_(x.std(0).clamp_min(1e-3))


def with_twist(target: Target, policy: TwistedPolicy, power: float = 1.0) -> Target:
    """The target with a fitted twist as its guide; its own soft guide goes, its hard constraints stay.

    A head fitted on few strings is too sure of itself elsewhere; psi^power with ``power`` below 1 makes up for it.
    """
    if not power > 0:
        raise InputError(f"power must be positive, not {power}; 1 is the twist as it was learned")
    theirs = policy.guide.lm
    guide = twist_for(target, policy.guide.head)
    guide.power = power
    _same_model(theirs.version, guide.lm)
    return target.with_guide(guide)


def _same_model(version: str, lm: Any) -> None:
    if version != lm.version:
        raise InputError(f"this twist reads the states of {version}, and the target's model is {lm.version}: "
                         "fit one for it")  # fmt: skip


def save_twist(policy: TwistedPolicy, path: str | os.PathLike[str]) -> Path:
    """One safetensors file: the head, and the model and shape it was made for."""
    head = policy.guide.head
    tensors = {f"parameter.{k}": v for k, v in head.parameters().items()}
    tensors |= {"axes": head.axes, "mean": head.mean, "scale": head.scale}
    meta = {"model": policy.guide.lm.version, "shape": head.shape, "bound": head.bound, "about": _plain(policy.about)}
    return write_tensors(path, "twist", tensors, meta)


def _plain(about: Mapping[str, Any]) -> Any:
    return json.loads(json.dumps(dict(about), default=str))


def load_twist(target: Target, path: str | os.PathLike[str]) -> TwistedPolicy:
    """A saved twist on a target. Raises InputError for one of another model or kind of target, or a damaged file."""
    tensors, meta = read_tensors(path, "twist", "save_twist")
    shape = {k: v for k, v in meta["shape"].items() if k not in ("rank", "tokens")}
    head = TwistHead(tensors["axes"], **shape, bound=meta["bound"])
    _same_model(meta["model"], target.prior.lm if isinstance(target.prior, LMPolicy) else None)
    with torch.no_grad():
        for k, p in head.parameters().items():
            p.copy_(tensors[f"parameter.{k}"])
    head.mean, head.scale = tensors["mean"], tensors["scale"]
    policy = TwistedPolicy(twist_for(target, head))
    policy.about = meta["about"]
    return policy
