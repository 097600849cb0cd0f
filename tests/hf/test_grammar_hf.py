"""Grammars on a real vocabulary: every draw parses, masks and weights are those of a brute-force recomputation."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("llguidance")

import retrodict as rd  # noqa: E402
from retrodict.guides.grammar import GrammarCarry, GrammarGuide, tokens_of  # noqa: E402
from retrodict.guides.shortest import BYTES  # noqa: E402
from retrodict.rng import generator  # noqa: E402
from retrodict.targets.constraint import json_schema, lark, regex  # noqa: E402

pytestmark = pytest.mark.hf

SCHEMA = {
    "type": "object", "required": ["name", "age", "pet"], "additionalProperties": False,
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 20},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "pet": {"enum": ["cat", "dog", "fish"]},
    },
}  # fmt: skip
RECORDS = '{"name": "Ann", "age": 31, "pet": "dog"}\n{"name": "Tom", "age": 8, "pet": "fish"}\n'
SUMS = "Sums: 3 + 4 * 2; (7 - 1) * 5; 12 / (2 + 2);"
SUM = r"""
start: " " expr ";"
expr: term ((" + " | " - ") term)*
term: atom ((" * " | " / ") atom)*
atom: /[1-9][0-9]{0,2}/ | "(" expr ")"
"""


@pytest.fixture(scope="module")
def lm() -> Any:
    return rd.load("smollm2", dtype="float32")


@pytest.fixture(scope="module")
def person(lm: Any) -> rd.Target:
    return rd.continuation(lm, RECORDS, stop="\n", max_tokens=36, limit="own_stop") * json_schema(SCHEMA)


def _is_person(text: str) -> bool:
    x = json.loads(text)
    return (
        set(x) == {"name", "age", "pet"} and isinstance(x["name"], str) and 1 <= len(x["name"]) <= 20
        and type(x["age"]) is int and 0 <= x["age"] <= 120 and x["pet"] in ("cat", "dog", "fish")
    )  # fmt: skip


def _is_sum(text: str) -> bool:
    """A recursive-descent parser of the same sums, by itself."""
    words = re.findall(r" [+\-*/] |[1-9]\d{0,2}|[()]", body := text[1:-1])

    def expr(i: int) -> int:
        i = atom(i)
        while 0 < i < len(words) and words[i][0] == " ":
            i = atom(i + 1)
        return i

    def atom(i: int) -> int:
        if i >= len(words) or i < 0:
            return -1
        if words[i].isdigit():
            return i + 1
        end = expr(i + 1) if words[i] == "(" else -1
        return end + 1 if 0 < end < len(words) and words[end] == ")" else -1

    return text[0] == " " and text[-1] == ";" and "".join(words) == body and expr(0) == len(words)


def _legal(p: rd.Particles) -> list[str]:
    return [t for t, w in zip(p.shown, p.log_w[0].tolist(), strict=True) if w > -1e30]


def test_every_json_record_is_valid(person: rd.Target) -> None:
    p = rd.smc(person, n=72, runs=1, seed=0)
    assert len(_legal(p)) >= 64 and all(map(_is_person, _legal(p)))
    assert len({json.loads(t)["name"] for t in _legal(p)}) > 10
    assert p.log_z is not None and float(p.log_z[0, 0]) < -2  # what the masks removed is paid


def test_every_sum_parses(lm: Any) -> None:
    assert _is_sum(" (3 + 14) * 2;") and not any(
        map(_is_sum, [" 3 +;", " (3;", " 3 4;", "3;", " 3", " 03;", " 3);", " ;"])
    )
    target = rd.continuation(lm, SUMS, stop=";", max_tokens=24) * lark(SUM)
    p = rd.smc(target, n=80, runs=1, seed=0)
    assert len(_legal(p)) >= 64 and all(map(_is_sum, _legal(p))) and p.distinct() > 20


def test_weights_are_the_allowed_mass(lm: Any, person: rd.Target) -> None:
    """log w of importance: the sum over steps of the log of the mass that the mask leaves, from plain logits."""
    p = rd.importance(person, n=2, runs=1, seed=1)
    guide, space, rows, zero = person.guide, person.space, p.objects, torch.zeros(1, dtype=torch.long)
    assert isinstance(guide, GrammarGuide) and isinstance(space, rd.Strings)
    prompt, stop = person.problems[0].context, space.stops.ids[0]
    for i in range(2):
        ids, total = rows.moves[i, : rows.n[i]].tolist(), 0.0
        every = lm.encode([[*prompt, *ids[:t]] for t in range(len(ids) + 1)])[1]
        for t, logits in enumerate(every):
            log_p, here = logits.double().log_softmax(-1), guide.root.after(*ids[:t])
            mask = guide.log_next(GrammarCarry([here], zero), space.start(zero))[0] == 0
            mask[list(space.banned)] = False
            mask[stop] = here.ends[0]
            total += float(log_p[mask].logsumexp(0))
        assert abs(total - float(p.log_w[0, i])) < 1e-3 and total < -0.5


@pytest.mark.parametrize("which", ["json", "sum"])
def test_masks_are_those_of_the_bytes(lm: Any, which: str) -> None:
    """A mask over 49,152 tokens allows what a parser over single bytes can read, token by token."""
    factor, prompt = (json_schema(SCHEMA), RECORDS) if which == "json" else (lark(SUM), SUMS)
    text = '{"name": "Bob", "age": 37, "pet": "cat"}' if which == "json" else " (3 + 14) * 2;"
    target = rd.continuation(lm, prompt, stop="\n" if which == "json" else ";", max_tokens=36) * factor
    guide, gen, zero = target.guide, generator(0), torch.zeros(1, dtype=torch.long)
    assert isinstance(guide, GrammarGuide)
    ids = lm.tokenizer.encode(text)
    for t in range(0, len(ids), 3):
        mask = guide.log_next(GrammarCarry([guide.root.after(*ids[:t])], zero), target.space.start(zero))[0] == 0
        some = torch.cat([mask.nonzero()[:100, 0], torch.randint(lm.vocab_size, (300,), generator=gen)])
        slow = guide.grammar.matcher(tokens_of(BYTES))
        assert slow.try_consume_tokens(list(text.encode())) == len(text)
        slow = guide.grammar.matcher(tokens_of(BYTES))
        slow.consume_tokens(list(b"".join(lm.token_bytes[i] for i in ids[:t])))
        for token in some.tolist():
            data = list(lm.token_bytes[token])
            assert bool(mask[token]) == (slow.deep_copy().try_consume_tokens(data) == len(data)), (t, token)


def test_regex_on_a_real_vocabulary(lm: Any) -> None:
    """The automaton sees the limit: nothing is lost however tight it is."""
    target = rd.continuation(lm, "My phone number is", stop="\n", max_tokens=13) * regex(r" \d{3}-\d{3}-\d{4}\n")
    p = rd.smc(target, n=32, runs=1, seed=0)
    assert (p.log_w > -1e30).all() and all(re.fullmatch(r" \d{3}-\d{3}-\d{4}\n", t) for t in p.shown)
    with pytest.raises(rd.InputError, match="the shortest takes 13"):
        rd.continuation(lm, "My phone number is", stop="\n", max_tokens=9) * regex(r" \d{3}-\d{3}-\d{4}\n")
