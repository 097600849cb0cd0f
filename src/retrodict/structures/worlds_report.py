"""What consistency changes: statements that moved, calibration, and texts that poison beliefs.

A text in front of the questions is judged by its effect on the posterior over worlds, from q (without it) to q' (with):

    KL(q' || q) = sum_i [E_q'[A_i] (l'_i - l_i) + log(1 - p'_i)/(1 - p_i)] - (log Z' - log Z),   l_i = log p_i/(1 - p_i)

which needs marginals and evidences only, since both are products of the same kind on the same legal worlds. A text is
flagged where its KL is above that of texts known to be harmless; the statements that it moved say what it did, and the
rise of -log Z that it did so against what else is believed. (KL is as exact as the two posteriors.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from retrodict.diagnostics.calibration import brier, calibration_error
from retrodict.errors import InputError
from retrodict.structures.worlds import Constraint
from retrodict.structures.worlds_solve import Worlds, posterior

SURE = 1e-12
"""Probabilities are kept this far from 0 and 1 where their log-odds are shown."""


def logit(p: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """log p/(1 - p), at most 27.6 in size."""
    return torch.special.logit(p.clamp(SURE, 1 - SURE))


@dataclass(frozen=True)
class Shift:
    """A statement's probability before and after consistency."""

    says: str
    before: float
    after: float
    log_odds: float
    truth: bool | None


def shifts(w: Worlds) -> list[Shift]:
    """Every statement, those whose log-odds moved most first."""
    before, after = w.before, w.after
    moved = logit(after) - logit(before)
    rows = [Shift(b.says, float(before[i]), float(after[i]), float(moved[i]), b.truth) for i, b in enumerate(w.beliefs)]
    return sorted(rows, key=lambda r: -abs(r.log_odds))


def calibration(w: Worlds) -> dict[str, float]:
    """Brier score, ECE and accuracy before and after, on the statements whose truth is known; {} where none is."""
    known = [i for i, b in enumerate(w.beliefs) if b.truth is not None]
    if not known:
        return {}
    truth, out = torch.tensor([bool(w.beliefs[i].truth) for i in known]), {"known": float(len(known))}
    for when, p in (("before", w.before[known]), ("after", w.after[known].clamp(0.0, 1.0))):
        out |= {f"brier_{when}": brier(p, truth), f"ece_{when}": calibration_error(p, truth),
                f"accuracy_{when}": float(((p > 0.5) == truth).double().mean())}  # fmt: skip
    return out


def costs(w: Worlds, **settings: int) -> list[tuple[Constraint, float]]:
    """The inconsistency mass of each constraint alone, dearest first."""
    rows = [(c, posterior(w.beliefs, [c], **settings).inconsistency) for c in w.constraints]
    return sorted(rows, key=lambda row: -row[1])


# -- poisoned prompts --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Effect:
    """What a text in front of the questions did to the posterior.

    Attributes:
        kl: KL(posterior with it || without), nats.
        beliefs: the same between the beliefs asked alone, before any constraint.
        inconsistency: rise of the inconsistency mass, and ``strain`` that of -log Z, nats.
        moved: statements whose log-odds moved most, with the shift.
    """

    kl: float
    beliefs: float
    inconsistency: float
    strain: float
    moved: tuple[tuple[str, float], ...]


def effect(without: Worlds, with_: Worlds, show: int = 5) -> Effect:
    """The effect of a text, from the posteriors without and with it over the same statements and constraints."""
    if [b.says for b in without.beliefs] != [b.says for b in with_.beliefs] or without.constraints != with_.constraints:
        raise InputError("an effect is between posteriors over the same statements under the same constraints")
    p, q, mean = without.before, with_.before, with_.after
    per = _cross(mean, q) - _cross(mean, p)
    alone = _cross(q, q) - _cross(q, p)
    moved = logit(mean) - logit(without.after)
    order = moved.abs().argsort(descending=True)[:show].tolist()
    return Effect(
        float(per.sum()) - (with_.log_z - without.log_z), float(alone.sum()),
        with_.inconsistency - without.inconsistency, without.log_z - with_.log_z,
        tuple((with_.beliefs[i].says, float(moved[i])) for i in order),
    )  # fmt: skip


def _cross(mean: Float[Tensor, " n"], p: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """E[A] log p + (1 - E[A]) log(1 - p), with 0 log 0 = 0."""
    return torch.special.xlogy(mean, p) + torch.special.xlogy(1 - mean, 1 - p)


def flags(effects: Mapping[str, Effect], harmless: Sequence[str], above: float = 1.0) -> dict[str, bool]:
    """Texts whose KL is over ``above`` times the largest of the texts known to be harmless."""
    unknown = [n for n in harmless if n not in effects]
    if unknown or not harmless:
        raise InputError(f"no harmless text {unknown[0]!r} was asked about" if unknown else "name a harmless text")
    bar = above * max(effects[n].kl for n in harmless)
    return {name: e.kl > bar for name, e in effects.items() if name not in harmless}
