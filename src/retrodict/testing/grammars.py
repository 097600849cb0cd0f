"""Exactness of grammars: samplers under regular expressions, choices, Lark grammars and JSON schemas, and their bugs.

Every language is stated a second time in plain Python (``re``, ``json``, counting), for the recomputation by hand. The
targets differ in who reads the stop, in the length limit, and in whether the same text has several spellings in tokens.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, cast

import torch
from jaxtyping import Float
from torch import Tensor

from retrodict.guides.grammar import GrammarCarry, GrammarGuide, Pieces, Prefix, engine
from retrodict.models.tabular import CharTokenizer, TabularLM
from retrodict.models.tiny import TinyLM
from retrodict.numerics import NEG_INF
from retrodict.records import Rollouts
from retrodict.samplers.importance import importance
from retrodict.samplers.smc import smc
from retrodict.spaces.limits import Limit
from retrodict.spaces.stops import Stops
from retrodict.spaces.strings import StringState
from retrodict.targets.algebra import Target
from retrodict.targets.constraint import Constraint, GrammarConstraint, HardTerm, json_schema, lark, one_of, regex
from retrodict.targets.ready import Stop, continuation, of_length, until
from retrodict.testing.bugs import Bug
from retrodict.testing.gates import METHODS
from retrodict.testing.oracle import Gate, enumerate_target, evidence_gates
from retrodict.testing.targets import Case

if TYPE_CHECKING:
    from retrodict.testing.testtime import Pair

END = Stops((0,), label="end")
BALANCED = 'start: "a" start "b" | "ab"'
NESTED = 'start: "a" | "[" (start ("," start)*)? "]"'
SPELLED = 'start: "abb" ("ab" | "b")*'


def _greedy(pieces: Sequence[str], text: str) -> list[int]:
    """A text in pieces, the longest at each place."""
    out: list[int] = []
    while text:
        out.append(max((i for i, p in enumerate(pieces) if text.startswith(p)), key=lambda i: len(pieces[i])))
        text = text[len(pieces[out[-1]]) :]
    return out


class PieceTokenizer(CharTokenizer):
    """Tokens of several characters."""

    def __init__(self, pieces: Sequence[str]) -> None:
        super().__init__("".join(pieces))
        self.pieces = list(pieces)

    def encode(self, text: str) -> list[int]:
        """The longest piece at each place."""
        return _greedy(self.pieces, text)

    def decode(self, ids: Sequence[int]) -> str:
        """The pieces joined."""
        return "".join(self.pieces[i] for i in ids)


def pieced(pieces: Sequence[str], order: int = 2, seed: int = 3, scale: float = 0.6) -> TabularLM:
    """A random table over pieces, so that one text has several spellings."""
    lm = TabularLM.random("0123456789"[: len(pieces)], order=order, seed=seed, scale=scale)
    lm.tokenizer, lm.token_bytes = PieceTokenizer(pieces), [p.encode() for p in pieces]
    return lm


def _nested(text: str) -> bool:
    """Whether the text is "a" or a bracketed list of such."""
    while text != (less := re.sub(r"\[(a(,a)*)?\]", "a", text)):
        text = less
    return text == "a"


def _few_ones(text: str) -> bool:
    """Whether the text is JSON: a list of at most two whole numbers."""
    try:
        read = json.loads(text)
    except json.JSONDecodeError:
        return False
    return isinstance(read, list) and len(read) <= 2 and all(isinstance(x, int) for x in read)


def _balanced(text: str) -> bool:
    half = len(text) // 2
    return half > 0 and text == "a" * half + "b" * half


def _case(
    name: str, factor: Constraint | GrammarConstraint, holds: Callable[[str], object], lm: TabularLM | TinyLM,
    stop: Stop = END, tokens: int = 4, limit: Limit = "own_stop",
) -> Case:  # fmt: skip
    target = continuation(lm, lm.tokenizer.decode([1]), stop=stop, max_tokens=tokens, limit=limit) * factor
    return Case(name, target, None, {factor.name: lambda t: 0.0 if holds(t) else NEG_INF})


def _other(alphabet: str, seed: int) -> TabularLM:
    return TabularLM.random(alphabet, order=2, seed=seed, scale=0.6)


def cases() -> list[Case]:
    """The small targets."""
    lm, two = TabularLM.random(".ab ", order=3, seed=1, scale=0.6), _other(".!ab", 2)
    lists = {"type": "array", "items": {"type": "integer"}, "maxItems": 2}
    least = of_length(lm, "a ", tokens=3, stop=".") * lark('start: /[ab]+/ " " /[ab ]/* "."')
    return [
        _case("Lark, a^n b^n, dead ends", lark(BALANCED), _balanced, lm, tokens=5),
        _case("Lark, several spellings", lark(SPELLED), lambda t: re.fullmatch("abb(ab|b)*", t),
              pieced([".", "a", "b", "ab", "bb"])),
        _case("JSON schema, force", json_schema(lists), _few_ones, _other(".[]1,", 5), tokens=5, limit="force"),
        _case("Lark, nested", lark(NESTED), _nested, _other(".[]a,", 6), limit="force"),
        _case("Lark reads the stop", lark('start: /a+b?/ "."'), lambda t: re.fullmatch(r"a+b?\.", t), lm, ".",
              limit="force"),
        _case("Lark, two stops", lark('start: "a"* ("." | "b"+ "!")'), lambda t: re.fullmatch(r"a*(\.|b+!)", t), two,
              (0, 1)),
        Case("Lark, exact length", least, None,
             {"lark": lambda t: 0.0 if re.fullmatch(r"[ab]+ [ab ]*\.", t) else NEG_INF}),
        _case("Lark, until", lark('start: /[a ]*/ "b"'), lambda t: re.fullmatch("[a ]*b", t), lm, until("b"),
              limit="force"),
        _case("regex, own_stop", regex("(ab|b)*a?"), lambda t: re.fullmatch("(ab|b)*a?", t), lm),
        _case("regex, several spellings", regex("(ab|b)*a?"), lambda t: re.fullmatch("(ab|b)*a?", t),
              pieced([".", "a", "b", "ab", "ba"]), limit="force"),
        _case("one of, force", one_of(["ab", "abba", "b", "a b"]), lambda t: t in ("ab", "abba", "b", "a b"), lm,
              limit="force"),
        _case("Lark, transformer", lark(BALANCED), _balanced, TinyLM(".ab ", seed=3, dtype=torch.float64)),
    ]  # fmt: skip


USED = {"exact": "exact", "importance": "importance", "smc": "smc, multinomial", "mh": "mh, suffix"}
"""Method here: its row in ``gates.METHODS``."""


def pairs(quick: bool = False) -> list[Pair]:
    """Every method on every target; ``quick`` has the two where most can go wrong."""
    from retrodict.testing.testtime import Pair

    return [
        Pair(f"grammar, {method}", case, METHODS[row][1])
        for case in cases()[: 2 if quick else None]
        for method, row in USED.items()
    ]


# -- planted bugs -------------------------------------------------------------------------------------------------


class _Greedy(Pieces):
    """A tokenizer that writes its one way of spelling a text."""

    def __call__(self, text: str) -> list[int]:
        return _greedy([t.decode() for t in self.tokens[:-1]], text)


class OneSpelling(GrammarGuide):
    """Proposes a forced text in the tokenizer's own spelling only, as llguidance does unless told otherwise."""

    def __init__(self, honest: GrammarGuide) -> None:
        vars(self).update(vars(honest))
        tokens = engine().LLTokenizer(_Greedy(self.token_bytes))
        self.root = Prefix(engine().LLMatcher(tokens, self.grammar.text, log_level=0), self.root.stops)


class Unfinished(GrammarGuide):
    """Lets a text stop inside the grammar, and calls it legal."""

    def __init__(self, honest: GrammarGuide) -> None:
        vars(self).update(vars(honest))

    def log_end(self, c: GrammarCarry, s: StringState) -> Float[Tensor, "b s"]:
        """Every stop, wherever the parser is alive."""
        alive = torch.tensor([[p.matcher is not None] * max(len(p.stops), 1) for p in c.prefixes])
        return torch.where(alive, 0.0, NEG_INF)[c.rows]

    def score(self, rollouts: Rollouts) -> Float[Tensor, " b"]:
        """0 for every text that the grammar can begin with."""
        c = self.start_at(rollouts, rollouts.n)
        return torch.where(torch.tensor([p.matcher is not None for p in c.prefixes])[c.rows], 0.0, NEG_INF)


def _one_spelling(seeds: int) -> list[Gate]:
    lm = pieced([".", "a", "b", "ab", "bb"])
    target = continuation(lm, "a", stop=END, max_tokens=4, limit="own_stop") * lark(SPELLED)
    wrong = target.with_guide(OneSpelling(cast(GrammarGuide, target.guide)))
    return evidence_gates(enumerate_target(target), lambda r, s: importance(wrong, n=16, runs=r, seed=s), seeds)


def _unfinished(seeds: int) -> list[Gate]:
    lm = TabularLM.random(".ab ", order=3, seed=1, scale=0.6)
    target: Target = continuation(lm, "a", stop=END, max_tokens=4, limit="own_stop") * lark("start: /[ab ]*[ab]/")
    guide = Unfinished(cast(GrammarGuide, target.guide))
    wrong = replace(target, factors={**target.factors, "lark": HardTerm(guide, "lark")}, guide=guide)
    return evidence_gates(enumerate_target(target), lambda r, s: smc(wrong, n=16, runs=r, seed=s), seeds)


BUGS: tuple[Bug, ...] = (
    Bug("forced text proposed in one spelling only", "importance", _one_spelling),
    Bug("stop allowed inside the grammar", "smc", _unfinished),
)
