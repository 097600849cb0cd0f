"""Small languages to train masked diffusion on: balanced brackets, and English with agreement at a distance."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from retrodict.errors import InputError
from retrodict.rng import generator
from retrodict.spaces.masked import Masked

BRACKETS = ("a", "b", "(", ")")
WEIGHTS = (0.2, 0.1, 0.4, 0.3)
"""Of each symbol where it is legal, before they are normalised."""
OPEN, CLOSE = 2, 3


def bracket_space(length: int = 6, **given: Any) -> Masked:
    """Strings of letters and brackets, balanced or not. ``given`` are fields of ``Masked``."""
    return Masked(length, len(BRACKETS), names=BRACKETS, join="", **given)  # pyright: ignore[reportArgumentType]


def bracket_law(length: int = 6) -> Float[Tensor, " n"]:
    """log p of every string, in the order of ``Masked.enumerate``: balanced strings, written from left to right.

    At each place one of the symbols is drawn in proportion to WEIGHTS among those after which the rest can still be
    balanced. Strings that are not balanced have log p = -inf.
    """
    p = torch.zeros(len(BRACKETS) ** length, dtype=torch.float64)

    def write(number: int, left: int, depth: int, mass: float) -> None:
        if not left:
            p[number] = mass
            return
        after = {symbol: depth + (symbol == OPEN) - (symbol == CLOSE) for symbol in range(len(BRACKETS))}
        legal = {symbol: d for symbol, d in after.items() if 0 <= d < left}
        total = sum(WEIGHTS[symbol] for symbol in legal)
        for symbol, d in legal.items():
            write(number * len(BRACKETS) + symbol, left - 1, d, mass * WEIGHTS[symbol] / total)

    write(0, length, 0, 1.0)
    return p.log()


def draw_strings(space: Masked, log_p: Float[Tensor, " n"], n: int, seed: int = 0) -> Int[Tensor, "r l"]:
    """n strings of a law over all strings of a space."""
    pick = torch.multinomial(log_p.exp(), n, replacement=True, generator=generator(seed))
    return space.enumerate()[pick]


def nested(tokens: Int[Tensor, "b l"]) -> Bool[Tensor, " b"]:
    """Whether a pair of brackets stands within another (of strings that are balanced)."""
    return ((tokens == OPEN).long() - (tokens == CLOSE).long()).cumsum(1).amax(1) >= 2


DETERMINER, LINK, END = "the", "that", "."
ADJECTIVES = ("old", "small")
NOUNS = (("cat", "cats"), ("dog", "dogs"))
SEES = (("chases", "chase"), ("sees", "see"))
DOES = (("sleeps", "sleep"), ("runs", "run"))
WORDS = (DETERMINER, LINK, END, *ADJECTIVES, *(w for pairs in (NOUNS, SEES, DOES) for pair in pairs for w in pair))


def sentence_space(**given: Any) -> Masked:
    """Sentences of nine words: ``the old cat that the dogs chase sleeps .``"""
    return Masked(9, len(WORDS), names=WORDS, **given)  # pyright: ignore[reportArgumentType]


def sentences() -> list[list[str]]:
    """All 128 sentences: each verb agrees with its own noun, the last one across the clause between."""
    made = []
    for adjective in ADJECTIVES:
        for k in range(2**6):
            bit = [k >> i & 1 for i in range(6)]
            who, whose = NOUNS[bit[0]][bit[1]], NOUNS[bit[2]][bit[3]]
            clause = [DETERMINER, whose, SEES[bit[4]][bit[3]]]
            made.append([DETERMINER, adjective, who, LINK, *clause, DOES[bit[5]][bit[1]], END])
    return made


def given_from(space: Masked, text: str) -> tuple[int, ...]:
    """What a text with ``_`` for each hidden token observes, as ``Masked.given`` has it.

    Raises InputError for another number of tokens, or one that the space does not have.
    """
    words = text.split() if space.join == " " else list(text)
    if not words:
        raise InputError(f"nothing is written; give {space.length} tokens, _ for a hidden one")
    row = space.encode([words])[0]
    return tuple(-1 if x == space.mask else x for x in row.tolist())
