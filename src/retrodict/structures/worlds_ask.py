"""Beliefs asked of a language model, one statement at a time, with or without a text in front of the questions.

    l_f(s) = log p(yes | form f of "is s true?") - log p(no | the same)
    p(s)   = sigmoid(mean over forms f of [l_f(s) - mean over content-free statements of l_f])

A form is a wording and the order in which the options are named. Averages of log-odds and the null correction are as
in ``lm_prior``; the content-free statements are asked after the same text, so that a text which makes every answer
"yes" changes nothing, and one that argues for a statement does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from retrodict.structures.ask import Asker
from retrodict.structures.lm_prior import ORDERS
from retrodict.structures.worlds import Belief

WORDINGS = (
    "{context}Question: Is it true that {statement}?\nAnswer ({first} or {second}):",
    "{context}Statement: {statement}.\nQuestion: Is this statement correct?\nAnswer ({first} or {second}):",
)
OPTIONS = (" Yes", " No")
"""With a capital, as models begin an answer."""
NULL = ("this is so", "it is like that", "N/A")
"""Statements that say nothing."""


@dataclass(frozen=True)
class Asked:
    """Answers about n statements in f forms: log-odds of yes, those of the null statements, mass of other answers."""

    each: Float[Tensor, "n f"]
    null: Float[Tensor, " f"]
    outside: Float[Tensor, "n f"]

    @property
    def log_odds(self) -> Float[Tensor, " n"]:
        """Null-corrected mean over forms."""
        return (self.each - self.null).mean(1)


def ask(asker: Asker, statements: Sequence[str], context: str = "") -> Asked:
    """Ask whether each statement is true, in every form, after ``context``."""
    before = context.rstrip() + "\n\n" if context.strip() else ""
    said = [s.strip().rstrip(".") for s in (*statements, *NULL)]
    prompts = [
        wording.format(context=before, statement=s, first=first, second=second)
        for s in said
        for wording in WORDINGS
        for first, second in ORDERS
    ]
    found = asker.options(prompts, OPTIONS)
    n, f = len(statements), len(WORDINGS) * len(ORDERS)
    odds = (found[:, 0] - found[:, 1]).view(-1, f)
    return Asked(odds[:n], odds[n:].mean(0), asker.outside(found, OPTIONS).view(-1, f)[:n])


def believed(
    asker: Asker, beliefs: Sequence[Belief], context: str = "", slope: float = 1.0, bias: float = 0.0
) -> list[Belief]:
    """The statements with the probabilities that the model gives them; ``slope`` and ``bias`` calibrate log-odds."""
    p = torch.sigmoid(slope * ask(asker, [b.says for b in beliefs], context).log_odds + bias)
    return [replace(b, p=x) for b, x in zip(beliefs, p.tolist(), strict=True)]
