"""Hard constraints as factors: the same automaton is the term (0 or -inf) and the guide that proposes within it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor

from retrodict.errors import InputError
from retrodict.guides.dfa import ByteDFA, DFAGuide, max_word_length, words
from retrodict.policies.lm import LMPolicy
from retrodict.protocols import Guide
from retrodict.records import Rollouts
from retrodict.spaces.strings import Strings
from retrodict.targets.algebra import Factor, Target


@dataclass(frozen=True)
class HardTerm:
    """0 where a guide accepts the complete object, -inf where not."""

    guide: DFAGuide
    name: str
    noise: str = "none"
    prefixes: bool = False

    @property
    def version(self) -> str:
        """The constraint in words."""
        return self.guide.label

    def __call__(self, rollouts: Rollouts, every_prefix: bool = False) -> Tensor:
        """0 / -inf of complete objects."""
        if every_prefix:
            raise InputError(f"the factor {self.name!r} has no prefix values; use an objective on whole objects")
        return self.guide.score(rollouts)


@dataclass(frozen=True)
class Constraint(Factor):
    """A byte automaton as a factor."""

    dfa: ByteDFA
    name: str = "constraint"

    def bind(self, target: Target) -> tuple[HardTerm, Guide]:
        """Lift to the tokens of the target's model; refuses what nothing in the space satisfies."""
        space, prior = target.space, target.prior
        if not isinstance(space, Strings) or not isinstance(prior, LMPolicy):
            raise InputError(
                "word constraints are about strings of a language model; this target has none as its prior"
            )
        guide = DFAGuide(self.dfa, space, prior.lm.token_bytes, prior.lm.device)
        guide.check()
        return HardTerm(guide, self.name), guide

    def __mul__(self, other: Target) -> Target:
        return other * self


def short_words(limit: int) -> Constraint:
    """No run of more than ``limit`` letters."""
    return Constraint(max_word_length(limit), f"words<={limit}")


def with_words(contain: Iterable[str] | Sequence[str] = (), avoid: Iterable[str] | Sequence[str] = ()) -> Constraint:
    """Whole words that must occur, or must not. Raises InputError where a word is in both lists or is not one word."""
    if isinstance(contain, str) or isinstance(avoid, str):
        raise InputError("contain and avoid are lists of words; write ['rain'] instead of 'rain'")
    return Constraint(words(contain, avoid), "words")
