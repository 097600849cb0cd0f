"""Byte automata against Python's re; lifted to tokens; what they leave reachable; masks and products."""

from __future__ import annotations

import random
import re
from typing import Any, cast

import numpy as np
import pytest
import torch

from retrodict.errors import InputError
from retrodict.guides.automata import ByteDFA, max_word_length, words
from retrodict.guides.base import ProductGuide
from retrodict.guides.dfa import DFAGuide, lift
from retrodict.guides.lookahead import LookaheadGuide
from retrodict.guides.mask import TokenMask
from retrodict.models.tabular import TabularLM
from retrodict.models.tiny import TinyLM
from retrodict.numerics import NEG_INF
from retrodict.policies.base import rollout
from retrodict.policies.guided import GuidedPolicy
from retrodict.policies.lm import LMPolicy
from retrodict.records import Problem
from retrodict.rng import generator
from retrodict.samplers.exact import exact
from retrodict.spaces.enumerate import enumerate_objects
from retrodict.spaces.stops import Stops
from retrodict.spaces.strings import Strings
from retrodict.targets.constraint import short_words, with_words
from retrodict.targets.ready import continuation, including, posterior

LETTERS = "A-Za-z\x80-\xff"


def random_texts(alphabet: str, seed: int, count: int = 4000, longest: int = 14) -> list[str]:
    draw = random.Random(seed)
    return ["".join(draw.choice(alphabet) for _ in range(draw.randrange(longest + 1))) for _ in range(count)]


def whole_word(word: str, text: bytes) -> bool:
    pattern = f"(?<![{LETTERS}]){re.escape(word.encode().decode('latin-1'))}(?![{LETTERS}])"
    return re.search(pattern, text.decode("latin-1"), re.IGNORECASE | re.ASCII) is not None


@pytest.mark.parametrize("limit", [1, 2, 3])
def test_word_length_against_re(limit: int) -> None:
    dfa = max_word_length(limit)
    for text in random_texts("aZ .,1é", limit):
        data = text.encode()
        assert dfa.accepts(data) == (re.search(rb"[A-Za-z]{%d}" % (limit + 1), data) is None), text


@pytest.mark.parametrize(
    "contain, avoid",
    [(["ab"], []), ([], ["ab"]), (["ab", "a"], ["b"]), (["ab", "abb"], ["ba", "bab"]), (["b", "Ab", "ba"], []),
     (["é"], ["ab"])],
)  # fmt: skip
def test_words_against_re(contain: list[str], avoid: list[str]) -> None:
    dfa = words(contain, avoid)
    accepted = 0
    draw = random.Random(len(contain) + 10 * len(avoid))
    pieces = ["a", "b", "ab", "Ba", "é", " ", " ", ".", "-"]
    for _ in range(6000):
        data = "".join(draw.choice(pieces) for _ in range(draw.randrange(14))).encode()
        wanted = all(whole_word(w, data) for w in contain) and not any(whole_word(w, data) for w in avoid)
        assert dfa.accepts(data) == wanted, data
        accepted += wanted
    assert accepted > 10


def test_lifted_automaton_reads_bytes_across_tokens() -> None:
    tokens = [b"", b"a", b"b ", b" ab", b"ba", "é".encode(), b"abab", b".", "é".encode()[:1]]
    for dfa in (words(["ab"], ["ba"]), max_word_length(2)):
        classes, of = lift(dfa, tokens)
        table = classes[:, of]
        draw = random.Random(0)
        for _ in range(2000):
            ids = [draw.randrange(len(tokens)) for _ in range(draw.randrange(7))]
            state = 0
            for i in ids:
                state = int(table[state, i])
            assert bool(dfa.accept[state]) == dfa.accepts(b"".join(tokens[i] for i in ids))
        assert (table[:, 0] == torch.arange(len(table))).all()  # an empty token changes nothing


def even_letters() -> ByteDFA:
    """An automaton of our own: an even number of a's."""
    table = np.stack([np.full(256, 0), np.full(256, 1)]).astype(np.int32)
    table[0, ord("a")], table[1, ord("a")] = 1, 0
    return ByteDFA(table, np.array([True, False]), "an even number of a")


@pytest.mark.parametrize("limit", ["force", "own_stop"])
@pytest.mark.parametrize("tokens", [2, 3, 4])
def test_required_words_stay_reachable_under_the_limit(limit: Any, tokens: int) -> None:
    lm = TabularLM.random(".ab ", order=2, seed=4)
    target = including(lm, "a ", contain=["ab"], stop=".", max_tokens=tokens, limit=limit)
    policy = GuidedPolicy(cast(LMPolicy, target.prior), cast(DFAGuide, target.guide))
    drawn = rollout(policy, torch.zeros(300, dtype=torch.long), generator(0))
    texts = target.space.show(drawn)
    assert all(re.search(r"(?<![ab])ab(?![ab])", t) for t in texts), texts
    assert len(set(texts)) > (1 if tokens > 2 else 0)


def test_the_stop_is_read_before_acceptance_is_asked() -> None:
    """A stop with text may finish a word, or be one letter too many."""
    lm = TabularLM.random(".ab ", order=2, seed=4)
    target = continuation(lm, " ", stop="a", max_tokens=3) * short_words(1)
    texts = {k: t for k, t in zip(exact(target).keys, exact(target).shown, strict=True)}
    alive = {texts[k] for k, w in zip(exact(target).keys, exact(target).weights[0].tolist(), strict=True) if w > 0}
    assert "b a" in alive and "ba" not in alive and all(not re.search("[ab]{2}", t) for t in alive)


def test_the_shortest_string_is_known() -> None:
    lm = TabularLM.random(".ab ", order=2, seed=4)
    space = Strings(4, Stops((0,), in_text=True), 4, tokenizer=lm.tokenizer)
    guide = DFAGuide(words(["ab", "a"]), space, lm.token_bytes)
    assert guide.fewest() in ((4, "ab a."), (4, "a ab."))
    rows = enumerate_objects(space, 0)
    accepted = {t for t, ok in zip(space.show(rows), (guide.score(rows) == 0).tolist(), strict=True) if ok}
    assert accepted == {"ab a.", "a ab."}


@pytest.mark.parametrize(
    "make, says",
    [
        (lambda lm: including(lm, "a", contain=["abab"], stop=".", max_tokens=3),
         "nothing satisfies 'contains abab' within 3 tokens: the shortest takes 4, e.g. 'abab.'"),
        (lambda lm: including(lm, "a", contain=["cab"], stop=".", max_tokens=9),
         "nothing satisfies 'contains cab' within 9 tokens: no string does"),
        (lambda lm: including(lm, "a", contain=["ab"], avoid=["Ab"], stop="."),
         "'ab' is both required and forbidden; drop it from one list"),
        (lambda lm: including(lm, "a", contain=["a b"], avoid=["b"], stop="."),
         "no text satisfies this: contains 'a b'; avoids b; its parts contradict each other, so drop one"),
        (lambda lm: including(lm, "a", avoid=[""], stop="."), "avoid holds an empty phrase, which every text contains"),
        (lambda lm: including(lm, "a", stop="."), "give words to contain or to avoid"),
        (lambda lm: with_words("rain"), "contain is a list of phrases; write ['rain'] instead of 'rain'"),
        (lambda lm: words([chr(97 + i) * 3 for i in range(24)]), "over 100,000 states; give fewer or shorter phrases"),
        (lambda lm: DFAGuide(max_word_length(1), Strings(4, Stops(), 2), []), "does not tell its tokens' bytes"),
    ],
)  # fmt: skip
def test_bad_input_gets_one_line(make: Any, says: str) -> None:
    with pytest.raises(InputError) as error:
        make(TabularLM.random(".ab ", order=1))
    assert says in str(error.value) and "\n" not in str(error.value)


def test_a_user_automaton() -> None:
    lm = TabularLM.random(".ab ", order=2, seed=4)
    space = Strings(4, Stops((0,), in_text=True), 4, tokenizer=lm.tokenizer)
    guide = DFAGuide(even_letters(), space, lm.token_bytes)
    guide.check()
    rows = enumerate_objects(space, 0)
    even = torch.tensor([t.count("a") % 2 == 0 for t in space.show(rows)])
    assert torch.equal(guide.score(rows) == 0, even)


def test_masks_remember_what_broke_them() -> None:
    mask = TokenMask([1, 3], 4)
    space = Strings(4, Stops((0,)), 3)
    rows = enumerate_objects(space, 0)
    clean = torch.tensor([2 not in k for k in space.keys(rows)])
    assert torch.equal(mask.score(rows) == 0, clean)
    s = space.start(torch.zeros(2, dtype=torch.long))
    move = torch.tensor([1, 2])
    c, s = mask.step(mask.start(s.problem), s, move), space.step(s, move)
    assert mask.log_psi(c, s).tolist() == [0.0, NEG_INF]
    assert mask.log_next(c, s).tolist() == [[NEG_INF, 0.0, NEG_INF, 0.0], [NEG_INF] * 4]


def test_products_add_up() -> None:
    a, b = TokenMask([1, 2], 4), TokenMask([2, 3], 4)
    both = ProductGuide(a, b)
    assert both.hard
    s = Strings(4, Stops((0,)), 3).start(torch.zeros(1, dtype=torch.long))
    c = both.start(s.problem)
    listed = both.log_next(c, s)
    assert listed is not None and listed.tolist() == [[NEG_INF, NEG_INF, 0.0, NEG_INF]]
    assert both.end_terms(c) == {}


@pytest.mark.parametrize("power", [1.0, 0.5])
def test_lookahead_is_the_likelihood_of_ending_here(power: float) -> None:
    lm = TinyLM(".ab ", seed=1, dtype=torch.float64)
    data = [Problem((1, 2), (2, 1)), Problem((2,), (3,))]
    target = posterior(lm, data, stop=".", max_tokens=3)
    guide = LookaheadGuide(lm, cast(Strings, target.space), data, power)
    rows = enumerate_objects(target.space, 1)
    c = guide.start_at(rows, rows.n)
    s = target.space.replay(rows, rows.n)
    likelihood = target.factors["likelihood"](rows)
    assert torch.allclose(guide.end_terms(c)["likelihood"][:, 0], likelihood)
    alone = float(lm.encode([[2]])[1][0].log_softmax(-1)[3])
    assert torch.allclose(guide.log_psi(c, s), power * likelihood + (1 - power) * alone)
