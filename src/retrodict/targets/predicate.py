"""A yes-or-no check on text as a factor: 1 or 0 on complete texts, and psi = 1 or 0 on prefixes, asked one at a time.

    gamma(z) = ... * 1[complete(z)],        psi_t = 1[prefix(z_1..t)]

``prefix`` says whether some text that begins so may still pass; where it says no, everything that begins so must fail
``complete``, or psi vanishes where gamma does not and answers are biased. A token is proposed by weighted rejection
(:class:`retrodict.policies.awrs.AWRS`), since no mask over the vocabulary can be had from such a function.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from retrodict.errors import InputError
from retrodict.guides.base import BaseGuide
from retrodict.protocols import Problems
from retrodict.records import Rollouts
from retrodict.spaces.strings import Strings, StringState
from retrodict.targets.algebra import Factor, Target
from retrodict.targets.verifier import Check, Verifier, VerifierTerm


@dataclass(frozen=True)
class PredicateGuide(BaseGuide):
    """psi of a prefix: 1 where ``prefix`` holds for its text (everywhere without one), else 0. The carry is unused.

    Both checks are asked once for each distinct (problem, text).
    """

    space: Strings
    complete: VerifierTerm
    prefix: VerifierTerm | None
    hard = True
    by_test = True

    @property
    def checks(self) -> int:
        """Texts asked about so far."""
        return len(self.complete.cache) + (0 if self.prefix in (None, self.complete) else len(self.prefix.cache))

    def on(self, problems: Problems) -> PredicateGuide:
        """The same checks on other problems."""
        complete = self.complete.on(problems)
        same = self.prefix is self.complete
        return PredicateGuide(self.space, complete, complete if same else self.prefix and self.prefix.on(problems))

    def start_at(self, rollouts: Rollouts, upto: Int[Tensor, " b"]) -> Int[Tensor, " b"]:
        """Nothing is carried."""
        return rollouts.problem

    def _ask(self, check: VerifierTerm, s: StringState, more: tuple[int, ...] = ()) -> Float[Tensor, " b"]:
        rows = zip(s.problem.tolist(), s.tokens.tolist(), s.n.tolist(), strict=True)
        wanted = [(p, self.space._text([*z[:k], *more])) for p, z, k in rows]
        return torch.tensor(check.values(wanted), dtype=torch.float64, device=s.n.device)

    def log_psi(self, c: Any, s: StringState) -> Float[Tensor, " b"]:
        """0 / -inf of each prefix."""
        return torch.zeros(len(s.n), device=s.n.device) if self.prefix is None else self._ask(self.prefix, s)

    def log_end(self, c: Any, s: StringState) -> Float[Tensor, "b s"]:
        """0 / -inf of stopping now, per stop."""
        ends = range(self.space.n_stops)
        return torch.stack([self._ask(self.complete, s, self.space.stops.text_ids(i)) for i in ends], 1)

    def score(self, rollouts: Rollouts) -> Float[Tensor, " b"]:
        """0 / -inf of complete strings."""
        return self.complete(rollouts)


@dataclass(frozen=True)
class Predicate(Factor):
    """Checks on texts as a factor; see :func:`predicate`."""

    complete: Check
    prefix: Check | None
    name: str = "predicate"

    def bind(self, target: Target) -> tuple[VerifierTerm, PredicateGuide]:
        """The term, and the guide that asks about prefixes."""
        space = target.space
        if not isinstance(space, Strings):
            raise InputError("a predicate is about texts; this target's objects are not strings")
        term = VerifierTerm(Verifier(self.complete, "bool", name=self.name), space, target.problems)
        prefix = term if self.prefix is self.complete else None
        if self.prefix is not None and prefix is None:
            prefix = VerifierTerm(Verifier(self.prefix, "bool", name=f"{self.name} (prefix)"), space, target.problems)
        return term, PredicateGuide(space, term, prefix)

    def __mul__(self, other: Target) -> Target:
        return other * self


def predicate(complete: Check, prefix: Check | None = None, *, name: str = "predicate") -> Predicate:
    """A yes-or-no check as a factor; multiply it into a target.

    Samplers propose from the prior by weighted rejection: no draw breaks ``prefix``, and each is paid for. Without a
    ``prefix`` check only the last step is tested, as with ``rd.verifier(kind="bool")``.

    Args:
        complete: ``complete(texts, rows) -> bools`` on whole texts (the stop's text included where it has one); rows
            are the problems' data rows, as for :func:`retrodict.targets.verifier.verifier`.
        prefix: ``prefix(texts, rows) -> bools``, whether a beginning may still pass; the same function twice where
            every beginning of a text that passes, passes. A prefix may end inside a character, shown as U+FFFD.
        name: how tables call the factor.
    """
    for word, fn in (("complete", complete), ("prefix", prefix)):
        if fn is not None and not callable(fn):
            raise InputError(f"{word} is a function of (texts, rows) that returns bools, not {fn!r}")
    return Predicate(complete, prefix, name)
