"""Strings: limits, menus, stops, what p pays for them, bad input; and enumeration."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from retrodict.errors import InputError
from retrodict.models.tabular import CharTokenizer, TabularLM
from retrodict.numerics import NEG_INF
from retrodict.records import CHOOSE, FORCED, FREE, MUST_MOVE, MUST_STOP, Menu, cat_rollouts
from retrodict.spaces.enumerate import enumerate_objects
from retrodict.spaces.limits import LIMITS, Limit
from retrodict.spaces.stops import EndsWith, Matches, Stops
from retrodict.spaces.strings import Strings, StringState
from retrodict.targets.ready import continuation, stops_of, until

DOT = Stops((0,), in_text=True, label="'.'")
CHARS = CharTokenizer(".ab ")
LM = TabularLM.random(".ab ")


def space(stops: Stops = DOT, length: int = 3, limit: Limit = "force", least: int = 0, **more: Any) -> Strings:
    return Strings(4, stops, length, limit, least, tokenizer=CHARS, **more)


def at(s: Strings, n: int) -> StringState:
    return StringState(torch.zeros(1, dtype=torch.long), torch.zeros(1, s.max_moves, dtype=torch.long),
                       torch.tensor([n]), torch.zeros(1, dtype=torch.bool))  # fmt: skip


@pytest.mark.parametrize(
    "limit, least, may",
    [
        ("force", 0, [1, 1, 1, 1]),
        ("force", 2, [0, 0, 1, 1]),
        ("own_stop", 1, [0, 1, 1, 1]),
        ("exact", 0, [0, 0, 0, 1]),
        ("exact_prefix", 0, [0, 0, 0, 1]),
    ],
)
def test_menus(limit: Limit, least: int, may: list[int]) -> None:
    s = space(limit=limit, least=least)
    menus = [s.menu(at(s, n)) for n in range(4)]
    assert [int(m.can_stop) for m in menus] == may
    assert [int(m.must) for m in menus] == [CHOOSE] * 3 + [MUST_STOP]
    assert menus[0].legal is not None and menus[0].legal.tolist() == [[False, True, True, True]]  # a stop is no move


def test_banned_ids_are_no_moves() -> None:
    s = space(banned=(3,))
    assert s.legal_ids().tolist() == [False, True, True, False]
    assert len(enumerate_objects(s, 0)) == 1 + 2 + 4 + 8


@pytest.mark.parametrize("limit, price", [("force", 0.0), ("own_stop", -1.5), ("exact", -1.5), ("exact_prefix", 0.0)])
def test_what_the_forced_stop_costs(limit: Limit, price: float) -> None:
    two = Stops((0, 3), in_text=True)
    raw, no = torch.tensor([[-1.5, -2.5]]), torch.tensor([False])
    s = space(two, limit=limit)
    assert s.log_p_stop(raw, torch.tensor([3]), no).tolist() == [[price, NEG_INF]]  # the first id, and it alone
    early = s.log_p_stop(raw, torch.tensor([1]), no).tolist()
    assert early == ([[NEG_INF] * 2] if limit.startswith("exact") else [[-1.5, -2.5]])


def test_minimal_length_costs_a_stop_everything() -> None:
    s = space(least=2)
    raw, no = torch.tensor([[-1.5]]), torch.tensor([False])
    assert [s.log_p_stop(raw, torch.tensor([n]), no).item() for n in range(4)] == [NEG_INF, NEG_INF, -1.5, 0.0]


def test_end_ids_are_added_up_and_stops_in_the_text_are_not() -> None:
    log_p = torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log()
    assert torch.allclose(space(Stops((0, 2))).raw_stop(log_p).exp(), torch.tensor([[0.625]]))
    assert torch.allclose(space(Stops((0, 2), in_text=True)).raw_stop(log_p).exp(), torch.tensor([[0.5, 0.125]]))
    assert space(Stops((0, 2))).n_stops == 1 and space(Stops((0, 2), in_text=True)).n_stops == 2
    assert space(Stops()).raw_stop(log_p).tolist() == [[0.0]]


@pytest.mark.parametrize("limit, at_limit", [("force", 0.0), ("own_stop", NEG_INF)])
def test_a_predicate_ends_the_string_for_free(limit: Limit, at_limit: float) -> None:
    s = space(until("b"), limit=limit)
    raw = torch.zeros(1, 1)
    assert s.log_p_stop(raw, torch.tensor([1]), torch.tensor([True])).item() == 0.0
    assert s.log_p_stop(raw, torch.tensor([1]), torch.tensor([False])).item() == NEG_INF
    assert s.log_p_stop(raw, torch.tensor([3]), torch.tensor([False])).item() == at_limit
    texts = s.show(enumerate_objects(s, 0))
    assert all("b" not in t[:-1] for t in texts) and all("b" in t or len(t) == 3 for t in texts)


def test_predicates() -> None:
    assert EndsWith("ab")("xxab") and not EndsWith("ab")("xxa")
    assert Matches(r"\d{2}$")("in 42") and not Matches(r"\d{2}$")("in 4")
    assert Stops((1,), in_text=True).text_ids(0) == (1,) and Stops((1,)).text_ids(0) == ()


def test_keys_and_texts() -> None:
    two = space(Stops((0, 3), in_text=True), length=1)
    rows = enumerate_objects(two, 0)
    assert sorted(two.keys(rows)) == sorted([(-1,), (-2,), (1, -1), (2, -1)])  # at the limit only the first stop
    assert set(two.show(rows)) == {".", " ", "a.", "b."}
    bare = replace(two, tokenizer=None)
    assert "1 0" in bare.show(rows)


def test_enumeration_counts() -> None:
    assert len(enumerate_objects(space(), 0)) == 1 + 3 + 9 + 27
    assert len(enumerate_objects(space(least=2), 0)) == 9 + 27
    assert len(enumerate_objects(space(limit="exact"), 0)) == 27
    assert len(enumerate_objects(space(Stops(), limit="exact_prefix"), 0)) == 64
    assert len(enumerate_objects(space(length=0), 0)) == 1


def test_enumeration_records_what_could_have_stopped() -> None:
    rows = enumerate_objects(space(least=1), 0)
    full = rows.take((rows.n == 3).nonzero().squeeze(1))
    assert full.can_stop.tolist() == [[False, True, True, True]] * 27


def test_enumeration_follows_forced_moves() -> None:
    class Forced(Strings):
        def menu(self, s: StringState) -> Menu:
            menu = super().menu(s)
            second = (s.n == 1) & (menu.must != MUST_STOP)
            return Menu(menu.legal, menu.can_stop & ~second, torch.where(second, MUST_MOVE, menu.must),
                        torch.full_like(s.n, 2))  # fmt: skip

    s = Forced(4, DOT, 3, tokenizer=CHARS)
    rows = enumerate_objects(s, 0)
    assert len(rows) == 1 + 3 + 9 and set(s.show(rows)) >= {".", "ab.", "bbb."}
    assert (rows.kind[rows.n == 3] == torch.tensor([FREE, FORCED, FREE])).all()


def test_enumeration_refuses_what_is_too_large_and_says_how_large() -> None:
    big = Strings(1000, Stops((0,)), 6)
    with pytest.raises(
        InputError, match=r"too large to enumerate: over [\d,]+ objects after 3 of 6 moves, about 9.9e\+17"
    ):
        enumerate_objects(big, 0)
    with pytest.raises(InputError, match=r"over 2,4\d\d,\d\d\d,\d\d\d objects after 2 of 9 moves"):
        enumerate_objects(Strings(50_000, Stops((0,)), 9), 0)
    with pytest.raises(InputError, match=r"limit 20\); use a sampler, or fewer tokens"):
        enumerate_objects(space(), 0, max_objects=20)


def test_replay_and_take_are_stepping() -> None:
    s = space(until("ab"))
    rows = enumerate_objects(s, 0)
    state = s.start(rows.problem)
    for t in range(3):
        on = (rows.n > t).nonzero().squeeze(1)
        rows, state = rows.take(on), s.step(s.take(state, on), rows.moves[on, t])
        again = s.replay(rows, torch.full_like(rows.n, t + 1))
        assert all(torch.equal(getattr(state, f), getattr(again, f)) for f in ("tokens", "n", "ended", "problem"))


@pytest.mark.parametrize(
    "make, says",
    [
        (lambda: space(limit="forced"), "unknown limit 'forced'; did you mean 'force'?"),  # type: ignore[arg-type]
        (lambda: space(least=4), "min length 4 is over max length 3; lower min_tokens or raise max_tokens"),
        (lambda: space(length=-1), "lengths cannot be negative"),
        (lambda: space(Stops((9,))), "token id 9 is outside the vocabulary (0 to 3)"),
        (lambda: space(banned=(-1,)), "token id -1 is outside the vocabulary"),
        (lambda: space(until("a"), limit="exact"), "a predicate stop cannot go with an exact or a minimal length"),
        (lambda: space(until("a"), least=1), "a predicate stop cannot go with"),
        (lambda: space(Stops(), limit="own_stop"), "limit 'own_stop' needs a stop; give stop=..."),
        (lambda: until(""), "until('') would end at once"),
        (lambda: stops_of(LM, "ab"), "cannot produce the stop 'ab' as one token (it takes 2); use stop=rd.until('ab')"),
        (lambda: stops_of(LM, "z"), "character 'z' is not in this model's alphabet"),
        (lambda: continuation(LM, "a", stop=".", max_tokens=2, min_tokens=3), "min length 3 is over max length 2"),
    ],
)
def test_bad_input_gets_one_line(make: Any, says: str) -> None:
    with pytest.raises(InputError) as error:
        make()
    assert says in str(error.value) and "\n" not in str(error.value)


def test_limits_are_all_tested() -> None:
    assert set(LIMITS) == {"force", "own_stop", "exact", "exact_prefix"}


def test_with_limits_and_stops_of() -> None:
    s = space().with_limits(max_moves=5, limit="own_stop", min_moves=1)
    assert (s.max_moves, s.limit, s.min_moves) == (5, "own_stop", 1)
    assert stops_of(LM, "eos") == Stops((0,), False, label="eos")
    assert stops_of(LM, None) == Stops() and stops_of(LM, DOT) is DOT
    assert stops_of(LM, 2).ids == (2,) and stops_of(LM, [0, 3]).ids == (0, 3)


def test_joined_records_keep_their_rows() -> None:
    short, long = enumerate_objects(space(length=1), 0), enumerate_objects(space(length=3), 0)
    both = cat_rollouts([short, long])
    assert len(both) == len(short) + len(long) and both.moves.shape[1] == 3
    s = space()
    assert s.keys(both) == space(length=1).keys(short) + s.keys(long)
    assert not both.can_stop[: len(short), 2:].any()
