"""The algebra of byte automata against Python's re, str and sets; lifted to tokens; what people write with it."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from retrodict.errors import InputError
from retrodict.guides.automata import (
    ByteDFA,
    anything,
    banned,
    contains,
    contains_all,
    ends_with,
    in_order,
    max_word_length,
    meet,
    only,
    starts_with,
    word_count,
)
from retrodict.guides.dfa import lift, token_dfa
from retrodict.models.tabular import TabularLM
from retrodict.numerics import NEG_INF
from retrodict.samplers.exact import exact
from retrodict.spaces.stops import Stops
from retrodict.spaces.strings import Strings
from retrodict.targets.lexical import lexical
from retrodict.targets.ready import continuation, of_length

LETTERS = "A-Za-z\x80-\xff"
PIECES = ["a", "b", "B", "ab", " ", "  ", ".", "\n", "é", "-"]
TEXTS = st.lists(st.sampled_from(PIECES), max_size=9).map("".join)
PHRASES = st.lists(st.sampled_from(["a", "b", "Ab", "a b", "ab.", "é", ".", "aa", "-a", " "]), max_size=3, unique=True)


def pattern(phrase: str, whole: bool, ignore_case: bool) -> re.Pattern[str]:
    data = phrase.encode().decode("latin-1")
    before = f"(?<![{LETTERS}])" if whole and re.match(f"[{LETTERS}]", data) else ""
    after = f"(?![{LETTERS}])" if whole and re.search(f"[{LETTERS}]$", data) else ""
    return re.compile(before + re.escape(data) + after, re.ASCII | (re.IGNORECASE if ignore_case else 0))


def found(phrase: str, text: str, whole: bool, ignore_case: bool = True, start: int = 0) -> int:
    """Where the first occurrence ends, in bytes; -1 for none."""
    hit = pattern(phrase, whole, ignore_case).search(text.encode().decode("latin-1"), start)
    return hit.end() if hit else -1


def ordered(phrases: Sequence[str], text: str, whole: bool) -> bool:
    at = 0
    for p in phrases:
        at = found(p, text, whole, start=at)
        if at < 0:
            return False
    return True


ASKED: dict[str, tuple[ByteDFA, Callable[[str], bool]]] = {
    "starts": (starts_with("a b"), lambda t: t.startswith("a b")),
    "starts, any case": (starts_with("ab", True), lambda t: t.lower().startswith("ab")),
    "ends": (ends_with("aba"), lambda t: t.endswith("aba")),
    "ends, again": (ends_with("aab a", True), lambda t: t.lower().endswith("aab a")),
    "ends, beyond ASCII": (ends_with("é."), lambda t: t.endswith("é.")),
    "words, 1 to 3": (word_count(1, 3), lambda t: 1 <= len(t.split()) <= 3),
    "words, none": (word_count(0, 0), lambda t: not t.split()),
    "words, 2 and more": (word_count(2), lambda t: len(t.split()) >= 2),
    "short": (max_word_length(2), lambda t: not re.search("[a-zA-Z]{3}", t)),
    "only": (only("ab é"), lambda t: set(t) <= set("ab é")),
    "only, one": (only("."), lambda t: set(t) <= {"."}),
    "anything": (anything(), lambda t: True),
}


@pytest.mark.parametrize("name", ASKED)
def test_each_condition_against_python(name: str) -> None:
    dfa, wanted = ASKED[name]
    gen, yes = np.random.default_rng(0), 0
    for _ in range(2000):
        text = "".join(gen.choice([*PIECES, "a b", "aba", "aab a", "é."], size=gen.integers(6)))
        assert dfa.accepts(text.encode()) == wanted(text), text
        yes += wanted(text)
    assert 30 < yes and (yes < 1970 or name == "anything")


@given(PHRASES, PHRASES, st.booleans(), st.lists(TEXTS, min_size=20, max_size=40))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_phrases_against_re(contain: list[str], avoid: list[str], whole: bool, texts: list[str]) -> None:
    every, ordinal, never = contains_all(contain, whole), in_order(contain, whole), banned(avoid, whole)
    for text in texts:
        data = text.encode()
        assert every.accepts(data) == all(found(p, text, whole) >= 0 for p in contain), text
        assert ordinal.accepts(data) == ordered(contain, text, whole), text
        assert never.accepts(data) == all(found(p, text, whole) < 0 for p in avoid), text


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("phrases", [["ab", "ab"], ["a", "a b", "."], ["a", " ", "b"], ["aa", "a"], ["ab.", "b"]])
def test_order_against_re(phrases: list[str], whole: bool) -> None:
    """Each text is built around the phrases, so that many hold them: in this order, in another, or overlapping."""
    dfa, yes = in_order(phrases, whole), 0
    gen = np.random.default_rng(len(phrases))
    for _ in range(1000):
        text = "".join(gen.choice([*phrases, " ", " ", ".", "a"], size=gen.integers(1, 9)))
        assert dfa.accepts(text.encode()) == ordered(phrases, text, whole), text
        yes += ordered(phrases, text, whole)
    assert 30 < yes < 970


def test_case_counts_where_it_is_asked_for() -> None:
    dfa = contains("aB", whole=False, ignore_case=False)
    assert dfa.accepts(b"xaBx") and not dfa.accepts(b"xabx")


AUTOMATA = st.sampled_from(
    [*(d for d, _ in ASKED.values()), contains("a b"), banned(["b", "aa"]), in_order(["a", "b"])]
)


@given(AUTOMATA, AUTOMATA, st.lists(TEXTS, min_size=20, max_size=40))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_the_algebra_is_that_of_sets(a: ByteDFA, b: ByteDFA, texts: list[str]) -> None:
    both, either, neither = a & b, a | b, ~a & ~b
    for data in (t.encode() for t in texts):
        x, y = a.accepts(data), b.accepts(data)
        assert (both.accepts(data), either.accepts(data), neither.accepts(data)) == (x and y, x or y, not (x or y))
        assert (~a).accepts(data) != x


def equal(a: ByteDFA, b: ByteDFA) -> bool:
    a, b = a.minimal(), b.minimal()
    return all(np.array_equal(x, y) for x, y in ((a.table, b.table), (a.accept, b.accept), (a.of, b.of)))


@given(AUTOMATA, AUTOMATA)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_minimal_forms_are_canonical(a: ByteDFA, b: ByteDFA) -> None:
    assert equal(a & b, b & a) and equal(~(~a & ~b), a | b) and equal(a & a, a)
    nothing = a & ~a
    assert nothing.table.tolist() == [[0]] and not nothing.accept.any()
    one = (a & b).minimal()
    assert len(one) == len(one.minimal()) and len(np.unique(one.of)) == one.table.shape[1]


@given(st.integers(1, 9), st.integers(1, 4), st.integers(0, 10**6))
@settings(max_examples=80, deadline=None, derandomize=True)
def test_minimising_keeps_the_language_of_any_automaton(states: int, classes: int, seed: int) -> None:
    """Against the definition: two states are one iff no word of fewer bytes than states tells them apart."""
    gen = np.random.default_rng(seed)
    dfa = ByteDFA(gen.integers(states, size=(states, classes)).astype(np.int32), gen.random(states) < 0.4, "random",
                  gen.integers(classes, size=256))  # fmt: skip
    small = dfa.minimal()
    reached, level = {0}, {0}
    while level:
        level = {int(t) for s in level for t in dfa.table[s, np.unique(dfa.of)]} - reached
        reached |= level
    signature = {s: (bool(dfa.accept[s]),) for s in reached}
    for _ in range(states):
        rows = {s: (signature[s], *(signature[int(t)] for t in dfa.table[s, np.unique(dfa.of)])) for s in reached}
        kinds = {r: i for i, r in enumerate(dict.fromkeys(rows.values()))}
        signature = {s: (kinds[rows[s]],) for s in reached}
    assert len(small) == len(set(signature.values()))
    for _ in range(60):
        data = bytes(gen.integers(256, size=gen.integers(9)).tolist())
        assert small.accepts(data) == dfa.accepts(data)


def test_the_product_of_searches_is_the_automaton_of_all() -> None:
    """The product of three single searches has the size that a table of found words x trie comes down to."""
    assert len(contains_all(["rain", "morning", "garden"])) == 83
    assert equal(meet([contains("a"), contains("b c")]), contains_all(["b c", "a"]))
    assert equal(banned(["ab", "b"]), banned(["ab"]) & banned(["b"]))


# -- tokens ----------------------------------------------------------------------------------------------------------

TOKENS = [b"", b"a", b"b ", b" ab", b"ba", "é".encode(), b"abab", b".", "é".encode()[:1], b"Ab", b"aB", b"."]


@given(AUTOMATA, st.lists(st.lists(st.integers(0, len(TOKENS) - 1), max_size=7), min_size=20, max_size=30))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_a_walk_over_tokens_is_the_walk_over_their_bytes(dfa: ByteDFA, rows: list[list[int]]) -> None:
    table, of = lift(dfa, TOKENS)
    assert len({tuple(c) for c in table.T.tolist()}) == table.shape[1] == len(of.unique())
    assert (table[:, of[0]] == torch.arange(len(table))).all()  # an empty token changes nothing
    for ids in rows:
        state = 0
        for i in ids:
            state = int(table[state, of[i]])
        assert bool(dfa.accept[state]) == dfa.accepts(b"".join(TOKENS[i] for i in ids))


def test_tokens_that_move_all_states_alike_share_a_class() -> None:
    space = Strings(len(TOKENS), Stops((11,), in_text=True), 4)
    dfa = token_dfa(contains("ab"), space, TOKENS)
    assert dfa.of[9] == dfa.of[10] and dfa.of[7] == dfa.of[11] and dfa.of[1] != dfa.of[4]
    assert dfa.dense().shape == (len(dfa.next), len(TOKENS)) and dfa.size() == tuple(dfa.next.shape)
    assert dfa.ends.shape == (len(dfa.next), 1)


# -- what people write ----------------------------------------------------------------------------------------------


def test_one_factor_for_all_conditions() -> None:
    lm = TabularLM.random(".ab ", order=2, seed=4)
    factor = lexical(
        contain=["ab"], in_order=["a", "b"], avoid=["ba"], words=(3, None), prefix="a", suffix=".", max_letters=2
    )
    target = of_length(lm, "a ", tokens=6, stop=".") * factor
    p = exact(target)
    alive = {t for t, w in zip(p.shown, p.log_w[0].tolist(), strict=True) if w > NEG_INF}
    assert alive == {"a b ab.", "ab a b.", "a ab b."}
    assert factor.name in target.formula


@pytest.mark.parametrize(
    "make, says",
    [
        (lambda lm: lexical(), "no condition given; write what the text must say, e.g. lexical(contain=['rain'])"),
        (lambda lm: lexical(contain="rain"), "contain is a list of phrases; write ['rain'] instead of 'rain'"),
        (lambda lm: lexical(in_order="rain"), "in_order is a list of phrases"),
        (lambda lm: lexical(avoid=["a", ""]), "avoid holds an empty phrase, which every text contains; drop it"),
        (lambda lm: lexical(contain=["Rain"], avoid=["rain"]), "'rain' is both required and forbidden; drop it"),
        (lambda lm: lexical(contain=["a b"], avoid=["b"]), "no text satisfies this: contains 'a b'; avoids b; its"),
        (lambda lm: lexical(suffix=" rain", avoid=["rain"]), "satisfies this: avoids rain; ends with ' rain'; its"),
        (lambda lm: lexical(prefix="long", max_letters=3), "its parts contradict each other, so drop one"),
        (lambda lm: lexical(words=(5, 3)), "a word count goes from low to high, not from 5 to 3; e.g. (5, 12), or"),
        (lambda lm: lexical(max_letters=-1), "the longest run of letters cannot be -1; give 0 or more"),
        (lambda lm: continuation(lm, "a", stop=".", max_tokens=3) * lexical(words=3),
         "nothing satisfies '3 words' within 3 tokens: the shortest takes 4, e.g. 'b b .'"),
        (lambda lm: continuation(lm, "a", stop="a", max_tokens=3) * lexical(suffix="b"), "tokens: no string does"),
        (lambda lm: continuation(lm, "a", stop=".", max_tokens=5, min_tokens=3) * lexical(only="a.", words=1,
          max_letters=2),
         "'1 word; no word over 2 letters; only the characters 'a.'' in 3 to 5 tokens: the shortest takes 0, e.g. '.'"),
        (lambda lm: of_length(lm, "a", tokens=4, stop=".") * lexical(in_order=["a"], max_letters=2, only="a."),
         "in exactly 4 tokens: the shortest takes 1, e.g. 'a.'"),
        (lambda lm: of_length(lm, "a", tokens=4, stop=None) * lexical(prefix="aaaab"),
         "nothing satisfies 'starts with 'aaaab'' in exactly 4 tokens: the shortest takes 5, e.g. 'aaaab'"),
        (lambda lm: continuation(lm, "a", stop=".", max_tokens=4) * lexical(contain=["ab"]) * lexical(contain=["ba"]),
         "nothing satisfies 'contains ab; contains ba' within 4 tokens: the shortest takes 5, e.g. '"),
    ],
)  # fmt: skip
def test_bad_input_gets_one_line(make: Any, says: str) -> None:
    lm = TabularLM.random(".ab ", order=1)
    with pytest.raises(InputError) as error:
        make(lm)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_too_large_says_what_shrinks_it(monkeypatch: pytest.MonkeyPatch) -> None:
    phrases = [chr(97 + i) * 3 for i in range(6)]
    states = len(contains_all(phrases))
    monkeypatch.setattr("retrodict.guides.automata.MAX_STATES", 99)
    with pytest.raises(InputError, match="has over 99 states; give fewer or shorter phrases, or a lower word count"):
        lexical(contain=phrases)
    monkeypatch.undo()
    monkeypatch.setattr("retrodict.guides.dfa.MAX_CELLS", 2 * states)
    lm = TabularLM.random(".abcdef ", order=1)
    with pytest.raises(InputError, match=f"is too large: {states} states x .* kinds of tokens; give fewer or shorter"):
        continuation(lm, "a", stop=".", max_tokens=30) * lexical(contain=phrases)
