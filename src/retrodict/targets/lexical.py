"""What a text must and must not say, as one factor.

    gamma(z) = p(z | X) 1[z meets every condition]

All conditions go into one minimal automaton over bytes, which is the term (0 or -inf) and the hard guide. The guide
asks whether they can *all* still be met in the tokens that remain, and further such factors on the same target join
its automaton. What the mask excludes is paid for in weights, so every sampler keeps the bias it has without it.
"""

from __future__ import annotations

from collections.abc import Iterable

from retrodict.errors import InputError
from retrodict.guides import automata
from retrodict.guides.automata import ByteDFA
from retrodict.targets.constraint import Constraint


def lexical(
    *,
    contain: Iterable[str] = (),
    in_order: Iterable[str] = (),
    avoid: Iterable[str] = (),
    prefix: str = "",
    suffix: str = "",
    words: int | tuple[int, int | None] | None = None,
    max_letters: int | None = None,
    only: str = "",
    whole: bool = True,
    ignore_case: bool = True,
) -> Constraint:
    """Conditions on the text of a string, its stop's text included where that belongs to the latent.

    Args:
        contain: phrases that must occur, in any order; they may overlap and may contain spaces.
        in_order: phrases that must occur one behind the other.
        avoid: phrases that must not occur.
        prefix, suffix: how the text begins and ends, letter by letter. The text begins where the prompt ends, often
            with a space.
        words: how many words, as ``len(text.split())`` counts: a number, or (low, high), with None for no upper limit.
        max_letters: the longest run of ASCII letters.
        only: the characters that may occur.
        whole: phrases count only as whole words: no letter stands right before or behind them.
        ignore_case: ASCII letters of phrases in either case.

    Raises:
        InputError: nothing asked for, an empty phrase, a phrase both required and forbidden, conditions that no text
            meets, or too many states. Where the target is built, also: nothing meets them within its length.
    """
    parts: list[ByteDFA] = [
        automata.words(contain, avoid, whole, ignore_case),
        automata.in_order(in_order, whole, ignore_case),
    ]
    if prefix:
        parts.append(automata.starts_with(prefix))
    if suffix:
        parts.append(automata.ends_with(suffix))
    if words is not None:
        parts.append(automata.word_count(words, words) if isinstance(words, int) else automata.word_count(*words))
    if max_letters is not None:
        parts.append(automata.max_word_length(max_letters))
    if only:
        parts.append(automata.only(only))
    parts = [p for p in parts if p.label != automata.ANYTHING]
    if not parts:
        raise InputError("no condition given; write what the text must say, e.g. lexical(contain=['rain'])")
    dfa = automata.satisfiable(automata.meet(parts))
    return Constraint(dfa, dfa.label)
