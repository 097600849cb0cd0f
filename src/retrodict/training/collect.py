"""What a step learns from: fresh draws at one or several temperatures, draws with exploration, and replayed ones.

All objectives of the GFlowNet family are off-policy, so any mixture is valid; what was drawn from is recorded in
``log_b`` and never enters log q (Hu et al. 2024, section 3.3).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from retrodict.errors import InputError
from retrodict.numerics import at_end
from retrodict.protocols import Trainable
from retrodict.records import Rollouts, cat_rollouts
from retrodict.samplers.common import log_pb_of
from retrodict.targets.algebra import Target
from retrodict.training.replay import Replay


@dataclass(frozen=True)
class Mixture:
    """Shares of the samples of a problem in one step; what is left over is drawn from q itself at T = 1.

    Attributes:
        tempered: share drawn at a temperature uniform in ``temperatures``, one for each step.
        replay: share taken from the problem's buffer, once it has any.
        epsilon: of the tempered share, the chance of a uniform move.
        from_prior: share drawn from the target's prior, so that nothing it can do is forgotten.
    """

    tempered: float = 0.0
    temperatures: tuple[float, float] = (0.5, 2.0)
    replay: float = 0.0
    epsilon: float = 0.0
    from_prior: float = 0.0

    def __post_init__(self) -> None:
        for name in ("tempered", "replay", "from_prior"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name} is a share of the samples, between 0 and 1, not {getattr(self, name)}")
        if self.tempered + self.replay + self.from_prior > 1 + 1e-9:
            raise InputError(f"tempered {self.tempered}, replay {self.replay} and from_prior {self.from_prior} are "
                             "more than all samples")  # fmt: skip
        low, high = self.temperatures
        if not 0 < low <= high:
            raise InputError(f"temperatures are a range above 0, low first, not {self.temperatures}")
        if not 0 <= self.epsilon < 1:
            raise InputError(f"epsilon is a chance below 1, not {self.epsilon}")

    def counts(self, samples: int) -> tuple[int, int, int, int]:
        """Samples of a problem from q itself, tempered, replayed, and from the prior."""
        tempered, replayed, prior = (round(x * samples) for x in (self.tempered, self.replay, self.from_prior))
        return max(0, samples - tempered - replayed - prior), tempered, replayed, prior


@dataclass(frozen=True)
class Batch:
    """Rows of one step with their term values.

    ``own`` are those that q itself drew, at temperature one (none where an older adapter did, see
    ``training.remote``); ``new`` all that were drawn, not replayed.
    """

    rollouts: Rollouts
    own: Int[Tensor, " f"]
    new: Int[Tensor, " d"]
    scored: int
    temperature: float
    seconds: float = 0.0
    """Spent on values, not on drawing."""


def with_terms(target: Target, rows: Rollouts, every_prefix: bool) -> tuple[Rollouts, int]:
    """Term values of rows, each distinct trajectory valued once; and how many were.

    Two paths to one object have prefixes of their own, and a prior over paths gives them values of their own.
    """
    if rows.versions and all(rows.versions.get(f) == term.version for f, term in target.factors.items()):
        return target.terms(rows, every_prefix), 0  # rows of a bank bring theirs (training.twist)
    if rows.moves.is_floating_point():  # no two draws are alike
        return target.terms(replace(rows, terms={}, versions={}), every_prefix), len(rows)
    seen: dict[str, int] = {}
    index, firsts = [], []
    each = zip(rows.problem.tolist(), rows.moves.tolist(), rows.n.tolist(), rows.stop.tolist(), strict=True)
    for i, (p, moves, n, stop) in enumerate(each):
        path = f"{p} {stop} {moves[:n]}"
        if path not in seen:
            seen[path] = len(firsts)
            firsts.append(i)
        index.append(seen[path])
    at = torch.tensor(firsts, device=rows.n.device)
    valued = target.terms(replace(rows.take(at), terms={}, versions={}), every_prefix)
    back = torch.tensor(index, device=rows.n.device)
    return rows.with_terms({k: v[back] for k, v in valued.terms.items()}, valued.versions), len(firsts)


def now(device: torch.device) -> float:
    """Seconds on a clock, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def collect(
    target: Target,
    policy: Trainable,
    problems: Sequence[int],
    samples: int,
    gen: torch.Generator,
    mixture: Mixture,
    replay: Replay | None,
    every_prefix: bool,
) -> Batch:
    """``samples`` rows of each problem, by the mixture. Sampling and term values carry no gradient."""
    device = gen.device
    own, tempered, replayed, prior = mixture.counts(samples)
    chosen = torch.tensor(list(problems), device=device)
    old: list[Rollouts] = []
    if replay is not None and replayed:
        rows, served = replay.draw(chosen.repeat_interleave(replayed), gen)
        missing = torch.ones(len(chosen) * replayed, dtype=torch.bool, device=device)
        missing[served] = False
        own_of = own + missing.view(-1, replayed).sum(1)  # an empty buffer's share is drawn fresh
        if len(rows):
            old = [rows]
    else:
        own_of = torch.full_like(chosen, own + replayed)
    low, high = mixture.temperatures
    temperature = low + (high - low) * float(torch.rand((), generator=gen, device=device))
    drawn: list[Rollouts] = []
    if int(own_of.sum()):
        drawn.append(policy.sample(chosen.repeat_interleave(own_of), gen))
    if tempered:
        how: dict[str, Any] = {"temperature": temperature} | ({"epsilon": mixture.epsilon} if mixture.epsilon else {})
        drawn.append(policy.sample(chosen.repeat_interleave(tempered), gen, how))
    if prior and target.prior is not None:
        drawn.append(target.prior.sample(chosen.repeat_interleave(prior), gen))
    began = now(device)
    new, scored = with_terms(target, cat_rollouts(drawn), every_prefix) if drawn else (None, 0)
    kept = [target.terms(r, every_prefix) for r in old]
    rows = counted(target, cat_rollouts(kept if new is None else [new, *kept]))
    count = torch.arange(len(rows), device=device)
    stale = bool(drawn and drawn[0].behaviour.get("staleness"))
    return Batch(rows, count[: 0 if stale else int(own_of.sum())], count[: 0 if new is None else len(new)], scored,
                 temperature, now(device) - began)  # fmt: skip


def counted(target: Target, rows: Rollouts) -> Rollouts:
    """Rows as an objective may take them: where there is a prior over paths, it has counted them, not P_B."""
    return rows if target.prior is None else replace(rows, log_pb=torch.zeros_like(rows.log_pb))


def final_log_gamma(target: Target, rollouts: Rollouts) -> Float[Tensor, " b"]:
    """log gamma of each row's own end, P_B included."""
    value = target.log_gamma(rollouts, False)
    return (value if value.dim() == 1 else at_end(value, rollouts.n, rollouts.stop)) + log_pb_of(target, rollouts)


def turn(step: int, problems: int, per_step: int, order: Int[Tensor, " m"]) -> list[int]:
    """Problems of a step: the whole order in turn, wrapping round."""
    return [int(order[(step * per_step + i) % problems]) for i in range(per_step)]
