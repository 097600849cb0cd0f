"""Models: the engine against the plain loop, caches that grow, prompts that cannot be read."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from retrodict.errors import InputError
from retrodict.models.tabular import CharTokenizer, TabularLM, naive_suffixes
from retrodict.models.tiny import TinyLM
from retrodict.rng import generator

GEN = generator(0)
PROMPTS = [[1], [2, 3, 4], [5, 6], [7, 8, 1, 2, 3]]
MOVES = torch.randint(9, (4, 6), generator=GEN)
N = torch.tensor([6, 0, 3, 5])


@pytest.mark.parametrize("dtype, tol", [(torch.float64, 1e-10), (torch.float32, 1e-4)])
@pytest.mark.parametrize("every", [True, False])
@pytest.mark.parametrize("skip", [0, 1, 2])
def test_packed_suffixes_equal_the_naive_loop(dtype: torch.dtype, tol: float, every: bool, skip: int) -> None:
    lm = TinyLM(seed=2, dtype=dtype)
    tails = [[torch.randint(9, (skip + 1 + (r + s) % 3,), generator=GEN).tolist() for r in range(4)] for s in range(3)]
    packed = lm.score_suffixes(PROMPTS, MOVES, N, tails, every, skip)
    naive = naive_suffixes(lm, PROMPTS, MOVES, N, tails, every, skip)
    at = torch.arange(7)
    asked = at <= N[:, None] if every else at == N[:, None]
    assert packed.dtype == dtype
    assert (packed[asked].double() - naive[asked]).abs().max() < tol


def test_naive_suffixes_are_what_the_definition_says() -> None:
    lm = TinyLM(seed=2, dtype=torch.float64)
    tail = [3, 1]
    value = naive_suffixes(lm, PROMPTS[:1], MOVES[:1], N[:1], [[tail]])[0, 4, 0]
    ids, total = [*PROMPTS[0], *MOVES[0, :4].tolist()], 0.0
    for token in tail:
        total += float(lm.encode([ids])[1][0].log_softmax(-1)[token])
        ids.append(token)
    assert abs(float(value) - total) < 1e-12


def test_suffixes_in_chunks_equal_those_in_one_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = TinyLM(seed=3, dtype=torch.float64)
    tails = [[[1, 2, 3]] * 4]
    whole = lm.score_suffixes(PROMPTS, MOVES, N, tails)
    moved = lm.score(PROMPTS, MOVES, N, (0,))
    monkeypatch.setattr("retrodict.models.cached.CHUNK", 1)
    inside = torch.arange(7) <= N[:, None]
    assert torch.allclose(lm.score_suffixes(PROMPTS, MOVES, N, tails)[inside], whole[inside], atol=1e-12)
    for a, b in zip(lm.score(PROMPTS, MOVES, N, (0,)), moved, strict=True):
        assert torch.allclose(a, b, atol=1e-12)


def test_a_cache_without_room_grows() -> None:
    lm = TinyLM(seed=1, dtype=torch.float64)
    cache, _ = lm.encode([[1, 2], [3]], room=0)
    tokens = torch.randint(9, (2, 40), generator=GEN)
    for t in range(40):
        cache, logits = lm.step(cache, tokens[:, t])
    whole = lm.encode([[1, 2, *tokens[0].tolist()], [3, *tokens[1].tolist()]])[1]
    assert torch.allclose(logits, whole, atol=1e-10)


def test_rows_that_are_gathered_apart_stay_apart() -> None:
    lm = TinyLM(seed=1, dtype=torch.float64)
    cache, _ = lm.encode([[1, 2], [3]], room=8)
    cache = lm.take(cache, torch.tensor([1, 1, 0]))
    cache, _ = lm.step(cache, torch.tensor([4, 5, 6]))
    cache = lm.take(cache, torch.tensor([2, 0, 1, 1]))
    _, logits = lm.step(cache, torch.tensor([7, 7, 7, 8]))
    whole = lm.encode([[1, 2, 6, 7], [3, 4, 7], [3, 5, 7], [3, 5, 8]])[1]
    assert torch.allclose(logits, whole, atol=1e-10)


def test_prompts_that_cannot_be_read() -> None:
    lm = TinyLM(context=16)
    with pytest.raises(InputError, match="empty prompt: the model needs at least one token"):
        lm.encode([[1], []])
    with pytest.raises(InputError, match=r"prompt of 17 tokens is over the context of tiny\(9, seed=0\) \(16 tokens\)"):
        lm.encode([[1] * 17])


def test_views_and_seeds() -> None:
    lm = TinyLM(seed=1)
    assert lm.view(None) is lm and lm.version != TinyLM(seed=2).version
    assert torch.equal(lm.encode([[1]])[1], TinyLM(seed=1).encode([[1]])[1])
    table = TabularLM.random("ab", seed=1)
    assert table.view(None) is table
    with pytest.raises(InputError, match="a tabular model has no adapter 'x'"):
        table.view("x")


def test_counts_of_tokens_and_forwards() -> None:
    lm = TinyLM()
    cache, _ = lm.encode([[1, 2], [3, 4]])
    lm.step(cache, torch.tensor([1, 2]))
    assert (lm.forwards, lm.tokens_run) == (2, 6)


def test_table() -> None:
    lm = TabularLM.random("abc", order=2, seed=3)
    assert torch.equal(lm.encode([[0, 1, 2]])[1], lm.encode([[2, 1, 2]])[1])  # two tokens of history
    assert not torch.equal(lm.encode([[1]])[1], lm.encode([[]])[1])  # it knows what to say first
    assert lm.version != TabularLM.random("abc", order=2, seed=4).version
    with pytest.raises(InputError, match="alphabet of 2 characters for a table of 3 tokens"):
        TabularLM(lm.table, 2, "ab")


def test_characters() -> None:
    chars: Any = CharTokenizer(".ab")
    assert chars.decode(chars.encode("ab.")) == "ab."
    with pytest.raises(InputError, match="character 'z' is not in this model's alphabet '.ab'"):
        chars.encode("az")
