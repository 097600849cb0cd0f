"""A small logical language and the English sentences that may say each of its forms.

    form  ->  verb name | not verb name | Q noun verb                          Q: every, some, no, not every
           |  Q noun Q' noun verb order                                        every over some, or some over every
           |  and l l' | or l l' | not and a a' | or a and b c | and or a b c | ...
           |  verb noun noun using tool | verb noun noun having tool

A form is written in prefix notation; its tokens are what its description length counts. R(f), its realisations, are the
sentences that may say it. Some sentences say several forms: which quantifier is wider ("every dog chased a cat"), what
"not" covers, what "with the telescope" belongs to, how "or" and "and" nest. Each form has a gloss that says it alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from jaxtyping import Int
from torch import Tensor

from retrodict.errors import InputError
from retrodict.records import Rollouts
from retrodict.spaces.phrases import Phrases


@dataclass(frozen=True)
class Verb:
    """A verb: past, infinitive and participle (chased, chase, chased)."""

    past: str
    plain: str
    participle: str = ""


@dataclass(frozen=True)
class Lexicon:
    """The words of a language.

    Attributes:
        names: people, for coordination.
        does: verbs without object, for names and animals alike.
        nouns: animals, singular to plural.
        acts: verbs with object, for animals.
        people: nouns that see and are seen.
        tools: a verb for each thing it is done with, or that somebody has.
    """

    names: tuple[str, ...] = ("Tom", "Anna", "Bob")
    does: tuple[Verb, ...] = (Verb("slept", "sleep"), Verb("ran", "run"), Verb("ate", "eat"))
    nouns: tuple[tuple[str, str], ...] = (("dog", "dogs"), ("cat", "cats"), ("bird", "birds"))
    acts: tuple[Verb, ...] = (Verb("chased", "chase", "chased"), Verb("saw", "see", "seen"),
                              Verb("followed", "follow", "followed"))  # fmt: skip
    people: tuple[str, ...] = ("girl", "boy", "man")
    tools: tuple[tuple[Verb, str], ...] = (
        (Verb("watched", "watch", "watched"), "telescope"), (Verb("filmed", "film", "filmed"), "camera"),
        (Verb("hit", "hit", "hit"), "stick"), (Verb("touched", "touch", "touched"), "umbrella"),
    )  # fmt: skip


@dataclass(frozen=True)
class Form:
    """A logical form.

    Attributes:
        tokens: prefix notation.
        reading: its shape without the words, as "every > some".
        gloss: a sentence that says it and nothing else (it need not be in R(f)).
        says: R(f), each sentence with the name of the way in which it says the form.
    """

    tokens: tuple[str, ...]
    reading: str
    gloss: str
    says: tuple[tuple[str, str], ...] = field(default=())

    @property
    def sentences(self) -> tuple[str, ...]:
        """R(f)."""
        return tuple(s for _, s in self.says)


def scopes(x: Lexicon) -> Iterator[Form]:
    """Two quantifiers and a verb: the sentence does not say which is the wider."""
    for (a, _), (b, _) in itertools.permutations(x.nouns, 2):
        for v in x.acts:
            active, passive = f"every {a} {v.past} a {b}", f"a {b} was {v.participle} by every {a}"
            both = (("active", active), ("passive", passive))
            yield Form(("every", a, "some", b, v.past, "1-2"), "every > some, subject every",
                       f"for each {a}, some {b} or other was {v.participle} by it",
                       (*both, ("explicit", f"for every {a} there was a {b} that it {v.past}")))  # fmt: skip
            yield Form(("some", b, "every", a, v.past, "2-1"), "some > every, subject every",
                       f"one and the same {b} was {v.participle} by all the {a}s",
                       (*both, ("explicit", f"there was a {b} that every {a} {v.past}")))  # fmt: skip
            active, passive = f"a {a} {v.past} every {b}", f"every {b} was {v.participle} by a {a}"
            both = (("active", active), ("passive", passive))
            yield Form(("some", a, "every", b, v.past, "1-2"), "some > every, subject some",
                       f"one and the same {a} {v.past} all the {b}s",
                       (*both, ("explicit", f"there was a {a} that {v.past} every {b}")))  # fmt: skip
            yield Form(("every", b, "some", a, v.past, "2-1"), "every > some, subject some",
                       f"for each {b}, some {a} or other {v.past} it",
                       (*both, ("explicit", f"for every {b} there was a {a} that {v.past} it")))  # fmt: skip


def quantified(x: Lexicon) -> Iterator[Form]:
    """One quantifier, perhaps with "not": "every dog did not bark" is said of none, and of not all."""
    for (a, many), v in itertools.product(x.nouns, x.does):
        shared = (("every ... not", f"every {a} did not {v.plain}"), ("all ... not", f"all {many} did not {v.plain}"))
        yield Form(("every", a, v.past), "every", f"each {a} {v.past}",
                   (("every", f"every {a} {v.past}"), ("all", f"all {many} {v.past}")))  # fmt: skip
        yield Form(("some", a, v.past), "some", f"at least one {a} {v.past}",
                   (("a", f"a {a} {v.past}"), ("some", f"some {a} {v.past}")))  # fmt: skip
        yield Form(("no", a, v.past), "no", f"none of the {many} {v.past}",
                   (("no", f"no {a} {v.past}"), *shared))  # fmt: skip
        yield Form(("not", "every", a, v.past), "not every", f"at least one {a} did not {v.plain}",
                   (("not every", f"not every {a} {v.past}"), ("not all", f"not all {many} {v.past}"),
                    *shared))  # fmt: skip


Literal = tuple[str, Verb]


def _plain(a: Literal) -> str:
    return f"{a[0]} {a[1].past}"


def _denied(a: Literal) -> str:
    return f"{a[0]} did not {a[1].plain}"


def _code(a: Literal) -> tuple[str, str]:
    return a[1].past, a[0]


def literals(x: Lexicon) -> Iterator[Form]:
    """One name, one verb, with or without "not"."""
    for a in itertools.product(x.names, x.does):
        yield Form(_code(a), "a", f"the fact is that {_plain(a)}", (("plain", _plain(a)),))
        yield Form(("not", *_code(a)), "not a", f"the fact is that {_denied(a)}",
                   (("plain", _denied(a)), ("not true", f"it is not true that {_plain(a)}")))  # fmt: skip


def negated(x: Lexicon) -> Iterator[Form]:
    """ "It is not true that a and b": of both, or of the first."""
    for (m, n), (v, w) in itertools.product(itertools.permutations(x.names, 2), itertools.permutations(x.does, 2)):
        a, b = (m, v), (n, w)
        for word in ("and", "or"):
            shared = ("not true", f"it is not true that {_plain(a)} {word} {_plain(b)}")
            pair = "both" if word == "and" else "either"
            yield Form(("not", word, *_code(a), *_code(b)), f"not (a {word} b)",
                       f"the following is false: {pair} {_plain(a)} {word} {_plain(b)}",
                       (shared, ("explicit", f"it is not true that {pair} {_plain(a)} {word} {_plain(b)}"))
                       )  # fmt: skip
            yield Form((word, "not", *_code(a), *_code(b)), f"(not a) {word} b",
                       f"{pair} {_denied(a)}, {word} else {_plain(b)}" if word == "or"
                       else f"{_denied(a)}, and it is a fact that {_plain(b)}",
                       (shared, ("plain", f"{_denied(a)} {word} {_plain(b)}")))  # fmt: skip


def nested(x: Lexicon) -> Iterator[Form]:
    """Three clauses joined by "or" and "and" in either order, bracketed in either way."""
    for names, verbs in itertools.product(itertools.permutations(x.names, 3), itertools.permutations(x.does, 3)):
        each = list(zip(names, verbs, strict=True))
        (a, b, c), (i, j, k) = map(_code, each), map(_plain, each)
        yield Form(("or", *a, "and", *b, *c), "a or (b and c)", f"one of two things: {i}; or both {j} and {k}",
                   (("bare", f"{i} or {j} and {k}"), ("explicit", f"either {i}, or both {j} and {k}")))  # fmt: skip
        yield Form(("and", "or", *a, *b, *c), "(a or b) and c", f"two things: {i} or {j}; and in any case {k}",
                   (("bare", f"{i} or {j} and {k}"), ("explicit", f"either {i} or {j}, and also {k}")))  # fmt: skip
        yield Form(("and", *a, "or", *b, *c), "a and (b or c)", f"two things: {i}; and {j} or {k}",
                   (("bare", f"{i} and {j} or {k}"), ("explicit", f"{i}, and either {j} or {k}")))  # fmt: skip
        yield Form(("or", "and", *a, *b, *c), "(a and b) or c", f"one of two things: both {i} and {j}; or {k}",
                   (("bare", f"{i} and {j} or {k}"), ("explicit", f"either both {i} and {j}, or {k}")))  # fmt: skip


def attachments(x: Lexicon) -> Iterator[Form]:
    """ "The girl watched the boy with the telescope": she has it, or he."""
    for (a, b), (v, t) in itertools.product(itertools.permutations(x.people, 2), x.tools):
        shared = ("with", f"the {a} {v.past} the {b} with the {t}")
        yield Form((v.past, a, b, "using", t), "using", f"the {a} had the {t}, and {v.past} the {b} by means of it",
                   (shared, ("fronted", f"with the {t}, the {a} {v.past} the {b}"),
                    ("used", f"the {a} used the {t} to {v.plain} the {b}")))  # fmt: skip
        yield Form((v.past, a, b, "having", t), "having", f"the {b} had the {t}, and was {v.participle} by the {a}",
                   (shared, ("who had", f"the {a} {v.past} the {b} who had the {t}"),
                    ("passive", f"the {b} with the {t} was {v.participle} by the {a}")))  # fmt: skip


PARTS = {"scopes": scopes, "quantified": quantified, "literals": literals, "negated": negated, "nested": nested,
         "attachments": attachments}  # fmt: skip


def language(lexicon: Lexicon | None = None, parts: tuple[str, ...] = tuple(PARTS)) -> tuple[Form, ...]:
    """All forms of a lexicon, or those of some ``parts``.

    Raises:
        InputError: an unknown part, or a lexicon so small that no form is left.
    """
    unknown = set(parts) - set(PARTS)
    if unknown:
        raise InputError(f"no part {sorted(unknown)[0]!r} of the language; choose among {', '.join(PARTS)}")
    found = tuple(f for part in parts for f in PARTS[part](lexicon or Lexicon()))
    if not found:
        raise InputError("this lexicon makes no form; give it more words")
    return found


class Forms(Phrases):
    """Logical forms as a space: their tokens are moves, and each form is one sequence of them."""

    forms: tuple[Form, ...]

    def __init__(self, forms: tuple[Form, ...]) -> None:
        words = tuple(dict.fromkeys(w for f in forms for w in f.tokens))
        number = {w: i for i, w in enumerate(words)}
        super().__init__(words, tuple(tuple(number[w] for w in f.tokens) for f in forms))
        object.__setattr__(self, "forms", forms)

    def which(self, rollouts: Rollouts) -> Int[Tensor, " b"]:
        """The number of each finished form."""
        return self.phrases_of(rollouts)[:, 0]

    def rows(self) -> Rollouts:
        """Every form once, in the order of ``forms``."""
        rows = self.enumerate()
        return rows.take(torch.argsort(self.which(rows)))
