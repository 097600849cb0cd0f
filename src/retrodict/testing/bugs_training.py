"""Planted bugs of training: the mistakes that amortized inference ships with, as wrappers around the honest parts.

Each is trained by the same plan as the right version, and what it learned is read off by the honest law. The right
version is held to total variation 1e-2; a bug counts as caught at five times that. Splitting a batch leaves the optimum
where it was and spoils the way there, so that one is caught by its gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from retrodict.objectives.anchor import anchored
from retrodict.objectives.groups import groups, mean
from retrodict.objectives.residual import residual
from retrodict.objectives.subtb import subtb
from retrodict.objectives.table import OBJECTIVES
from retrodict.records import Rollouts, Scores
from retrodict.rng import generator
from retrodict.targets.algebra import Target
from retrodict.testing.trained import BAR, Table, fresh, total_variation, train, training_targets
from retrodict.training import collect
from retrodict.training.step import push, split

CAUGHT = 5 * BAR
"""Total variation from which a planted bug counts as seen."""

Loss = Callable[[Scores, Rollouts, Tensor], tuple[Tensor, dict[str, float]]]


@dataclass(frozen=True)
class TrainingBug:
    """A planted bug: what is wrong, which objective and target it is shown on, and how far off it ends."""

    name: str
    objective: str
    target: str
    found: Callable[[str, str], float]
    metric: str = "total variation"

    def caught(self) -> float:
        """How far off; to be compared with CAUGHT."""
        return self.found(self.objective, self.target)


def _distance(target: Target, policy: Table) -> float:
    honest = fresh(target)
    honest.logits = policy.logits
    return total_variation(target, honest)


def _policy_bug(kind: type[Table], **mixture: Any) -> Callable[[str, str], float]:
    def found(objective: str, name: str) -> float:
        target = training_targets()[name]
        return _distance(target, train(target, objective, kind=kind, **mixture))

    return found


def _loss_bug(planted: Loss, mixture: str = "on policy") -> Callable[[str, str], float]:
    def found(objective: str, name: str) -> float:
        target = training_targets()[name]
        with patch.dict(OBJECTIVES, {objective: planted}):
            return _distance(target, train(target, objective, mixture))

    return found


# -- what q is ----------------------------------------------------------------------------------------------------


class FreeStop(Table):
    """Scores the stop at the limit as if one could go on there: the rest of q's mass is beyond the space."""

    def score(self, rollouts: Rollouts, raw: bool = False, grad: bool = False) -> Scores:
        """Nothing is forced where only a stop is left."""
        forced = (self.legal.sum(1) == 1) & self.legal[:, self.moves :].any(1)
        with torch.set_grad_enabled(grad):
            law = self.logits.masked_fill(~(self.legal | forced[:, None]), float("-inf")).log_softmax(-1)
            return self.read(law, rollouts)


HOT = 1.5
"""Temperature of the draws behind :class:`HotScore`."""


class HotScore(Table):
    """Takes the density that its draws came from for log q."""

    def score(self, rollouts: Rollouts, raw: bool = False, grad: bool = False) -> Scores:
        """At the temperature of the draws."""
        with torch.set_grad_enabled(grad):
            return self.read((self.law() / HOT).log_softmax(-1), rollouts)


# -- what is lost -------------------------------------------------------------------------------------------------


def no_anchor(scores: Scores, rollouts: Rollouts, log_gamma: Tensor) -> tuple[Tensor, dict[str, float]]:
    """SubTB whose line begins at the first state that may stop, and not at log Z."""
    a, _, _ = residual(scores, rollouts, log_gamma)
    first = rollouts.can_stop.long().argmax(1)
    root = a[torch.arange(len(a)), first, 0]
    return subtb(replace(scores, log_norm=root), rollouts, log_gamma)


def next_state_only(scores: Scores, rollouts: Rollouts, log_gamma: Tensor) -> tuple[Tensor, dict[str, float]]:
    """Modified DB between a state and the very next one: nothing reaches over what a tool puts in."""
    a, mask, _, _ = anchored("db", scores, rollouts, log_gamma)
    pair = mask[:, 1:] & mask[:, :-1]
    square = torch.where(pair, a[:, 1:] - a[:, :-1], 0.0).square()
    of, count = groups(rollouts.problem)
    return mean(square.sum(1) / pair.sum(1).clamp_min(1), of, count).mean(), {}


def plus_mean(scores: Scores, rollouts: Rollouts, log_gamma: Tensor) -> tuple[Tensor, dict[str, float]]:
    """VarGrad with the mean added."""
    _, _, a = residual(scores, rollouts, log_gamma)
    of, count = groups(rollouts.problem)
    return mean((a + mean(a, of, count)[of]).square(), of, count).mean(), {}


def batch_mean(scores: Scores, rollouts: Rollouts, log_gamma: Tensor) -> tuple[Tensor, dict[str, float]]:
    """VarGrad with one mean for a batch of several problems."""
    _, _, a = residual(scores, rollouts, log_gamma)
    return (a - a.mean()).square().mean(), {}


def no_backward(scores: Scores, rollouts: Rollouts, log_gamma: Tensor) -> tuple[Tensor, dict[str, float]]:
    """VarGrad that does not count paths."""
    _, _, a = residual(scores, rollouts, log_gamma, backward=False)
    of, count = groups(rollouts.problem)
    return mean((a - mean(a, of, count)[of]).square(), of, count).mean(), {}


# -- what a batch is ----------------------------------------------------------------------------------------------


def valued_by_object(target: Target, rows: Rollouts, every_prefix: bool) -> tuple[Rollouts, int]:
    """Values of every prefix, shared between paths to one object whose prefixes differ."""
    keys = [(p, *key) for p, key in zip(rows.problem.tolist(), target.space.keys(rows), strict=True)]
    firsts = {key: i for i, key in reversed(list(enumerate(keys)))}
    valued = target.terms(rows, every_prefix)
    index = torch.tensor([firsts[key] for key in keys])
    return rows.with_terms({k: v[index] for k, v in valued.terms.items()}, valued.versions), len(firsts)


def _shared_values(objective: str, name: str) -> float:
    target = training_targets()[name]
    with patch.object(collect, "with_terms", valued_by_object):
        return _distance(target, train(target, objective))


MICRO = 3
"""Rows of a micro-batch, which does not divide a problem's samples."""


def gradient_error(which: str, objective: str, name: str, micro: int = MICRO) -> float:
    """Of one batch, as a share of the norm of its gradient by autograd.

    ``which`` is ``pushed`` in micro-batches, or ``split``: with a loss for each micro-batch.
    """
    target = training_targets()[name]
    policy = fresh(target)
    chosen = torch.arange(len(target.problems)).repeat_interleave(8)
    rows = target.terms(policy.sample(chosen, generator(0)), every_prefix=True)
    every = objective in ("pooled", "subtb", "db")
    log_gamma = target.log_gamma(rows, every_prefix=every)
    log_z = torch.full((len(rows),), -1.0, dtype=torch.float64)
    loss_of = OBJECTIVES[objective]

    def grad(run: Callable[[], Any]) -> Tensor:
        policy.logits.grad = None
        run()
        assert policy.logits.grad is not None
        return policy.logits.grad.flatten().clone()

    def loss(index: Tensor) -> Tensor:
        part = rows.take(index)
        scores = replace(policy.score(part, grad=True), log_norm=log_z[index])
        return loss_of(scores, part, log_gamma[index])[0] * len(index) / len(rows)

    whole = grad(lambda: loss(torch.arange(len(rows))).backward())
    if which == "pushed":
        found = grad(lambda: push(policy, loss_of, rows, log_gamma, log_z.requires_grad_(), micro))
    else:
        found = grad(lambda: [loss(index).backward() for index in split(rows.n, micro)])
    return float((found - whole).norm() / whole.norm())


TRAINING_BUGS: tuple[TrainingBug, ...] = (
    TrainingBug("forced stop left free", "vargrad", "infill, force", _policy_bug(FreeStop)),
    TrainingBug("q not stopped at L under own_stop", "pooled", "infill, own_stop", _policy_bug(FreeStop)),
    TrainingBug("no anchor under a least length", "subtb", "tempered, force", _loss_bug(no_anchor)),
    TrainingBug("modified DB stops at a tool call", "db", "tool", _loss_bug(next_state_only)),
    TrainingBug("+ mean in VarGrad", "vargrad", "infill, own_stop", _loss_bug(plus_mean)),
    TrainingBug("behaviour temperature in log q", "vargrad", "infill, own_stop",
                _policy_bug(HotScore, tempered=1.0, temperatures=(HOT, HOT))),
    TrainingBug("batch-wide mean", "vargrad", "problems apart", _loss_bug(batch_mean)),
    TrainingBug("P_B missing", "vargrad", "sets", _loss_bug(no_backward)),
    TrainingBug("values of prefixes shared between paths", "pooled", "sets", _shared_values),
    TrainingBug("accumulation over split groups", "vargrad", "infill, own_stop", partial(gradient_error, "split"),
                "gradient error"),
)  # fmt: skip
