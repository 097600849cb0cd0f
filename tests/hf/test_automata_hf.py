"""Byte automata over the 49,152 tokens of a real model: a walk over tokens is the walk over their bytes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

import retrodict as rd  # noqa: E402
from retrodict.guides.automata import banned, contains_all, in_order, max_word_length, only, word_count  # noqa: E402
from retrodict.guides.dfa import DFAGuide, lift  # noqa: E402
from retrodict.numerics import NEG_INF  # noqa: E402
from retrodict.targets.lexical import lexical  # noqa: E402

pytestmark = pytest.mark.hf

AUTOMATA = {
    "three words": contains_all(["rain", "morning", "garden"]),
    "substrings": contains_all(["ing", "the ", "ou"], whole=False),
    "in order": in_order(["the", "of the", "and"]),
    "avoids": banned(["the", "and then", "is"]),
    "4 to 9 words": word_count(4, 9),
    "short words": max_word_length(5),
    "characters": only(" abcdefghijklmnopqrstuvwxyzéü.,"),
}


@pytest.fixture(scope="module")
def lm() -> object:
    return rd.load("smollm2", dtype="float32")


@pytest.mark.parametrize("name", AUTOMATA)
def test_a_walk_over_tokens_is_the_walk_over_their_bytes(lm, name: str) -> None:  # noqa: ANN001
    """Random tokens, and random pieces of text that meet the conditions now and then."""
    dfa, tokens = AUTOMATA[name], lm.token_bytes
    table, of = lift(dfa, tokens)
    assert table.shape[1] < 300 and len(of) == len(tokens)
    assert name != "three words" or table.shape == (83, 50)
    assert len(torch.unique(table, dim=1).T) == table.shape[1]  # no two classes are one
    gen = np.random.default_rng(0)
    words = "rain morning garden the of and then is sing out, in you. about té".split()
    for i in range(400):
        ids = gen.integers(17, len(tokens), size=gen.integers(9)).tolist()
        if i % 2:
            ids = lm.tokenizer.encode(" ".join(gen.choice(words, size=gen.integers(1, 12))))
        state, accepted = 0, []
        for j in range(len(ids) + 1):
            accepted.append(bool(dfa.accept[state]))
            assert accepted[-1] == dfa.accepts(b"".join(tokens[k] for k in ids[:j]))
            state = int(table[state, of[ids[j]]]) if j < len(ids) else state


def test_all_draws_say_what_they_must(lm) -> None:  # noqa: ANN001
    """Every spelling of the words in tokens counts, and no draw is a dead end."""
    base = rd.continuation(lm, "The weather report says:", stop=".", max_tokens=16)
    target = base * lexical(contain=["rain", "wind"], avoid=["sun"]) * lexical(words=(5, 9), suffix="today.")
    assert isinstance(target.guide, DFAGuide)
    p = rd.smc(target, n=8, seed=0, runs=1)
    assert (p.log_w > NEG_INF).all()
    for text in p.shown:
        words = text.lower().rstrip(".").split()
        assert 5 <= len(words) <= 9 and text.endswith("today.") and "rain" in text.lower() and "wind" in text.lower()


def test_what_does_not_fit_is_said_before_sampling(lm) -> None:  # noqa: ANN001
    """With the fewest tokens that hold it all, and a text of that length."""
    phrases = ["Mississippi river", "an extraordinary garden", "in the morning"]
    with pytest.raises(rd.InputError, match="within 6 tokens: the shortest takes [0-9]+, e.g. '") as error:
        rd.continuation(lm, "Once", stop=".", max_tokens=6) * lexical(contain=phrases)
    example = str(error.value).split("e.g. ")[1].strip("'").lower()
    assert all(p.lower() in example for p in phrases)
