"""Hard constraints as factors: the same automaton is the term (0 or -inf) and the guide that proposes within it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from retrodict.errors import InputError
from retrodict.guides.automata import ByteDFA, max_word_length, words
from retrodict.guides.dfa import DFAGuide
from retrodict.guides.grammar import Grammar, GrammarGuide
from retrodict.guides.grammar import json_schema as schema_grammar
from retrodict.guides.grammar import lark as lark_grammar
from retrodict.guides.regex import one_of as choices_dfa
from retrodict.guides.regex import regex as regex_dfa
from retrodict.guides.shortest import check_fits
from retrodict.policies.lm import LMPolicy
from retrodict.protocols import Guide, LanguageModel
from retrodict.records import Rollouts
from retrodict.spaces.strings import Strings
from retrodict.targets.algebra import Factor, Target


@dataclass(frozen=True)
class HardTerm:
    """0 where a guide accepts the complete object, -inf where not."""

    guide: DFAGuide | GrammarGuide
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
        space, lm = _strings_of(target)
        guide = DFAGuide(self.dfa, space, lm.token_bytes, lm.device)
        guide.check()
        return HardTerm(guide, self.name), guide

    def __mul__(self, other: Target) -> Target:
        return other * self


@dataclass(frozen=True)
class GrammarConstraint(Factor):
    """A grammar as a factor."""

    grammar: Grammar
    name: str = "grammar"

    def bind(self, target: Target) -> tuple[HardTerm, Guide]:
        """Parsers over the tokens of the target's model; refuses where the shortest text found is over the limit."""
        space, lm = _strings_of(target)
        guide = GrammarGuide(self.grammar, space, lm.token_bytes, lm.device)
        check_fits(guide)
        return HardTerm(guide, self.name), guide

    def __mul__(self, other: Target) -> Target:
        return other * self


def _strings_of(target: Target) -> tuple[Strings, LanguageModel]:
    """The space and the model that a constraint on texts is about."""
    if not isinstance(target.space, Strings) or not isinstance(target.prior, LMPolicy):
        raise InputError("constraints are about strings of a language model; this target has none as its prior")
    return target.space, target.prior.lm


def short_words(limit: int) -> Constraint:
    """No run of more than ``limit`` letters."""
    return Constraint(max_word_length(limit), f"words<={limit}")


def with_words(contain: Iterable[str] | Sequence[str] = (), avoid: Iterable[str] | Sequence[str] = ()) -> Constraint:
    """Whole words (or phrases) that must occur, or must not; ASCII case is ignored."""
    return Constraint(words(contain, avoid), "words")


def regex(pattern: str) -> Constraint:
    """The whole text matches a regular expression (syntax: ``guides.regex``)."""
    return Constraint(regex_dfa(pattern), "regex")


def one_of(choices: Sequence[str]) -> Constraint:
    """The text is one of a list, and nothing around it."""
    return Constraint(choices_dfa(choices), "one of")


def json_schema(schema: Mapping[str, Any] | str, whitespace: bool = True) -> GrammarConstraint:
    """The text is JSON that a schema allows; without ``whitespace``, as ``json.dumps`` writes it.

    Raises InputError where the schema does not compile or has a keyword that llguidance lacks, MissingExtra without
    the extra [constraints].
    """
    return GrammarConstraint(schema_grammar(schema, whitespace), "json schema")


def lark(grammar: str) -> GrammarConstraint:
    """The text is in the language of a Lark grammar; errors as :func:`json_schema`, with line and column."""
    return GrammarConstraint(lark_grammar(grammar), "lark")
