"""Grammars as guides: masks against brute force, what is refused, and what is said about dead ends."""

from __future__ import annotations

import itertools
import json
import random
import re
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("llguidance")

import retrodict as rd  # noqa: E402
from retrodict.cli.main import main  # noqa: E402
from retrodict.errors import InputError, MissingExtra  # noqa: E402
from retrodict.guides import grammar as grammars  # noqa: E402
from retrodict.guides import regex as regexes  # noqa: E402
from retrodict.guides.dfa import DFAGuide  # noqa: E402
from retrodict.guides.grammar import GrammarGuide  # noqa: E402
from retrodict.guides.shortest import shortest  # noqa: E402
from retrodict.spaces.enumerate import enumerate_objects  # noqa: E402
from retrodict.spaces.stops import Stops  # noqa: E402
from retrodict.spaces.strings import Strings  # noqa: E402
from retrodict.targets.constraint import json_schema, lark, one_of, regex  # noqa: E402
from retrodict.testing.grammars import BALANCED, END, SPELLED, cases, pieced  # noqa: E402
from retrodict.testing.laws import check_guide  # noqa: E402
from retrodict.testing.targets import Case  # noqa: E402

PERSON = {
    "type": "object", "required": ["name", "age"], "additionalProperties": False,
    "properties": {"name": {"type": "string", "minLength": 1}, "age": {"type": "integer", "minimum": 10}},
}  # fmt: skip
ASCII = "\0" + "".join(map(chr, range(32, 127))) + "\n"  # the first is the end


def _target(lm: rd.TabularLM, max_tokens: int = 5) -> rd.Target:
    return rd.continuation(lm, lm.tokenizer.decode([1]), stop=END, max_tokens=max_tokens, limit="own_stop")


@pytest.fixture(scope="module")
def letters() -> rd.TabularLM:
    return rd.TabularLM.random(".ab ", order=2, seed=1)


# -- regular expressions and choices ------------------------------------------------------------------------------

PATTERNS = [
    "a(b|c)*", "[^a]b?", "(ab){2,3}a{0,2}", "a|", "()", "[a-c]+\\.", "é+|[à-ü]", "(?:a|b)+?c$", "^a$", "\\d{2}|\\w",
    "[^\\s]", "[]a]", "[a-]", "[\\]x]+", "(?P<n>a)b", "(a*)*b", "(a|b|)c", ".", "\\x61\\u00e9", "a{2}b{1,}", "[^\\W1]",
]  # fmt: skip


@pytest.mark.parametrize("pattern", PATTERNS)
def test_regex_automaton_agrees_with_re(pattern: str) -> None:
    dfa, pick = regexes.regex(pattern), random.Random(0)
    texts = ["".join(t) for n in range(4) for t in itertools.product("abc.é😀1\n]-x", repeat=n)]
    for text in [*pick.sample(texts, 600), "abab", "ababab", "abababaa", "aabb", "aé"]:
        assert dfa.accepts(text.encode()) == bool(re.fullmatch(pattern, text, re.ASCII)), text


@pytest.mark.parametrize("low, high", [(0, 0x10FFFF), (0x80, 0x7FF), (0x900, 0x20000), (0xE5, 0x10ABC), (0x20, 0x20)])
def test_utf8_ranges_cover_each_code_point_once(low: int, high: int) -> None:
    count = 0
    for form in regexes.utf8(low, high):
        size = 1
        for a, b in form:
            size *= b - a + 1
        count += size
    assert count == sum(not 0xD800 <= c <= 0xDFFF for c in range(low, high + 1))


@pytest.mark.parametrize(
    "pattern, said",
    [("(ab", "column 1: unclosed group"), ("a)", "column 2: a '\\)' that closes nothing"), ("*a", "column 1: '\\*' re"),
     ("a{3,1}", "column 2: the count"), ("a{x}", "column 2: a count is"), ("[ab", "column 1: unclosed class"),
     ("a(?=b)", "column 2: look-around"), ("\\q", "column 1: unknown escape"), ("[b-a]", "column 2: a range"),
     ("a^b", "column 2: '\\^' inside"), ("\\xZZ", "column 1: \\\\x takes"), ("a{9999}", "more than 1000 repeats"),
     ("(a|b)*a(a|b){15}", "more than 20,000 states")],
)  # fmt: skip
def test_regex_errors_name_the_column(pattern: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        regex(pattern)


def test_llguidance_reads_a_regex_as_the_automaton_does(letters: rd.TabularLM) -> None:
    """Two independent implementations: the same objects are legal."""
    pattern = "(ab|b)*a?( a)?"
    ours, theirs = _target(letters, 4) * regex(pattern), _target(letters, 4) * lark(f"start: /{pattern}/")
    rows = enumerate_objects(ours.space, 0)
    assert torch.equal(ours.factors["regex"](rows), theirs.factors["lark"](rows))


@pytest.mark.parametrize("choices", ["ab", []])
def test_one_of_takes_a_list_of_texts(choices: object) -> None:
    with pytest.raises(InputError, match="list of texts"):
        one_of(choices)  # pyright: ignore[reportArgumentType]


def test_regex_and_choices_see_the_limit_coming(letters: rd.TabularLM) -> None:
    target = _target(letters, 4) * regex("(a|b)*( a| b)*b")
    p = rd.importance(target, n=200, runs=1, seed=0)
    assert (p.log_w > -1e30).all() and isinstance(target.guide, DFAGuide)


# -- masks against brute force ------------------------------------------------------------------------------------


def _brute(guide: GrammarGuide, space: Strings) -> int:
    """Compare every mask and stop of every prefix with the parser's own answer to each token; gives how many."""
    rows = enumerate_objects(space, 0)
    prefixes = sorted({tuple(z[:k]) for z, n in zip(rows.moves.tolist(), rows.n.tolist(), strict=True)
                       for k in range(n + 1)})  # fmt: skip
    for z in prefixes:
        prefix = guide.root.after(*z)
        carry = grammars.GrammarCarry([prefix], torch.zeros(1, dtype=torch.long))
        mask = guide.log_next(carry, space.start(torch.zeros(1, dtype=torch.long)))[0]
        for token in range(space.vocab_size):
            assert (mask[token] == 0) == (prefix.after(token).matcher is not None), (z, token)
    return len(prefixes)


@pytest.mark.parametrize("text", [BALANCED, SPELLED, 'start: /[ab]*/ "b"', 'start: "a" | "ab" | start start'])
def test_masks_are_what_the_parser_takes(text: str) -> None:
    lm = pieced([".", "a", "b", "ab", "bb"])
    target = _target(lm, 3) * lark(text)
    assert isinstance(target.guide, GrammarGuide) and isinstance(target.space, Strings)
    assert _brute(target.guide, target.space) > 80


def test_legality_is_of_bytes_not_of_tokens() -> None:
    """Every spelling of a legal text is legal, and reachable through the masks."""
    lm = pieced([".", "a", "b", "ab", "bb"])
    target = _target(lm, 5) * lark(SPELLED)
    rows = enumerate_objects(target.space, 0)
    legal = target.factors["lark"](rows) == 0
    texts = [lm.tokenizer.decode(z[:n]) for z, n in zip(rows.moves.tolist(), rows.n.tolist(), strict=True)]
    assert legal.tolist() == [bool(re.fullmatch("abb(ab|b)*", t)) for t in texts]
    drawn = set(rd.importance(target, n=4000, runs=1, seed=0).keys)
    spelled = {k for k, ok in zip(target.space.keys(rows), legal.tolist(), strict=True) if ok and len(k) <= 4}
    assert spelled <= drawn and len(spelled) >= 8


@pytest.mark.parametrize("case", cases(), ids=lambda c: c.name)
def test_laws_of_a_guide(case: Case) -> None:
    assert case.target.guide is not None
    check_guide(case.target.guide, case.target.space)


def test_rows_with_one_prefix_share_a_parser(letters: rd.TabularLM) -> None:
    target = _target(letters) * lark('start: /[ab]*/ " "')
    guide, space = target.guide, target.space
    assert isinstance(guide, GrammarGuide) and isinstance(space, Strings)
    problem = torch.zeros(6, dtype=torch.long)
    s, c = space.start(problem), guide.start(problem)
    move = torch.tensor([1, 2, 1, 1, 2, 1])
    c, s = guide.step(c, s, move), space.step(s, move)
    assert len(c.prefixes) == 2
    taken = guide.take(c, torch.tensor([1, 1, 0]))
    assert taken.prefixes is c.prefixes and taken.rows.tolist() == [1, 1, 0]
    one, other = (guide.log_next(guide.step(c, s, torch.full((6,), m)), s) for m in (1, 3))  # the carry is not used up
    assert torch.equal(one, guide.log_next(guide.step(c, s, torch.full((6,), 1)), s)) and not torch.equal(one, other)


# -- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, said",
    [("start: a b\na: /x/", "Lark grammar, line 1, column 8: unknown name: \"b\""),
     ('start: x\nx: ("a"\n', "Lark grammar, line 2"), ('begin: "a"', "no start rule"), ("", "Empty grammar"),
     ("start: /(ab/", "unclosed group")],
)  # fmt: skip
def test_lark_errors_name_line_and_column(text: str, said: str) -> None:
    with pytest.raises(InputError, match=said) as error:
        lark(text)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "schema, said",
    [({"type": "array", "uniqueItems": True}, 'unsupported keywords "uniqueItems"'), ({"type": "foo"}, "Invalid type"),
     ('{"a":\n 3,}', "line 2, column 4"), ({"enum": []}, "Unsatisfiable"), ("[1]", "is an object"),
     ({"type": {1}}, "not JSON serializable"), ({"$ref": "http://x/y"}, "retriev")],
)  # fmt: skip
def test_schema_errors_are_one_line(schema: object, said: str) -> None:
    with pytest.raises(InputError, match=said) as error:
        json_schema(schema)  # pyright: ignore[reportArgumentType]
    assert "\n" not in str(error.value)


def test_without_llguidance_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(MissingExtra, match=r"retrodict\[constraints\]"):
        lark('start: "a"')
    assert regex("a*").dfa.accepts(b"aa") and one_of(["a"]).dfa.accepts(b"a")  # these need no extra


def test_models_that_do_not_tell_their_bytes_are_refused(letters: rd.TabularLM) -> None:
    mute = rd.TabularLM.random(".ab ", order=2, seed=1)
    mute.token_bytes = []
    for factor in (lark('start: "a"'), regex("a")):
        with pytest.raises(InputError, match="does not tell its tokens' bytes"):
            _target(mute) * factor


def test_a_guide_of_another_tokenizer_is_refused(letters: rd.TabularLM) -> None:
    other = rd.TabularLM.random(".ba ", order=2, seed=1)
    for factor in (lark('start: "a"'), regex("a")):
        with pytest.raises(InputError, match="other tokens than those of tabular"):
            _target(other).with_guide((_target(letters) * factor).guide)
        assert _target(letters).with_guide((_target(letters) * factor).guide).guide is not None


# -- lengths ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "factor, tokens, said",
    [(lark(BALANCED), 1, "the shortest takes 2 tokens, 'ab'"), (regex("a{3}b"), 3, "the shortest takes 4, e.g. 'aaab'"),
     (one_of(["abab", "aba"]), 2, "the shortest takes 3, e.g. 'aba'"), (lark('start: "a" start'), 4, "no text"),
     (lark('start: "x"'), 4, "no text that the model's tokens can spell"), (regex("x"), 4, "no string does")],
)  # fmt: skip
def test_what_cannot_fit_is_refused_with_the_shortest_text(
    letters: rd.TabularLM, factor: object, tokens: int, said: str
) -> None:
    with pytest.raises(InputError, match=said):
        _target(letters, tokens) * factor  # pyright: ignore[reportOperatorIssue]


@pytest.mark.parametrize("case", [c for c in cases() if "lark" in c.target.factors], ids=lambda c: c.name)
def test_the_shortest_text_is_the_shortest(case: Case) -> None:
    guide, space = case.target.guide, case.target.space
    assert isinstance(guide, GrammarGuide) and isinstance(space, Strings)
    rows = enumerate_objects(space, 0)
    legal = case.target.factors["lark"](rows) == 0
    found = shortest(guide.grammar, space, guide.token_bytes)
    need = int(rows.n[legal].min())
    assert found.whole and (found.tokens == need or space.limit == "exact" and found.tokens <= need)


def test_shortest_json_in_tokens_and_in_text() -> None:
    lm = rd.TabularLM.random(ASCII, order=1, seed=0)
    space = Strings(lm.vocab_size, END, 64, tokenizer=lm.tokenizer)
    for whitespace, text in ((True, '{"name":"X","age":10}'), (False, '{"name": "X", "age": 10}')):
        found = shortest(grammars.json_schema(PERSON, whitespace), space, lm.token_bytes)
        assert re.sub('e":( ?)"."', r'e":\1"X"', found.text) == text and found.tokens == len(text)
    long = grammars.lark("start: /(a|b|c|d)*(a|b)(a|b|c|d){12}e/")
    assert not shortest(long, space, lm.token_bytes, budget=20).whole


def test_dead_ends_weigh_nothing_and_are_counted(letters: rd.TabularLM) -> None:
    """A parser does not see the limit; the answer says how many ran into it, and Z-hat stays right."""
    target = _target(letters, 4) * lark(BALANCED)
    for sampler in (rd.importance, rd.smc):
        p = sampler(target, n=64, runs=1, seed=0)
        dead = int((p.log_w == float("-inf")).sum())
        assert dead > 0 and p.trace.notes[0] == (
            f"{dead} of 64 particles ran into the limit of 4 tokens inside the grammar; raise max_tokens"
        )
    stuck = _target(letters, 4) * lark('start: "a" x | "b"\nx: "c" x')
    notes = rd.importance(stuck, n=64, runs=1, seed=0).trace.notes
    assert "came to a dead end inside the grammar" in notes[0]
    none = rd.importance(_target(letters, 4) * lark('start: /[ab]*/ " "?'), n=64, runs=1, seed=0)
    assert all("limit of" not in n for n in none.trace.notes if "inside" not in n)


def test_the_stops_own_text_is_read(letters: rd.TabularLM) -> None:
    with pytest.raises(InputError, match="and the stop '.' can end"):
        rd.continuation(letters, "a", stop=".", max_tokens=4) * lark('start: "a"')
    target = rd.continuation(letters, "a", stop=".", max_tokens=4) * lark('start: "a"+ "."')
    p = rd.smc(target, n=32, runs=1, seed=0)
    assert all(re.fullmatch(r"a+\.", t) for t, w in zip(p.shown, p.log_w[0], strict=True) if w > -1e30)


# -- the command line -----------------------------------------------------------------------------------------------

SAMPLE = ["sample", "--target", "continuation", "--prompt", "x"]


@pytest.mark.parametrize(
    "words, said",
    [(["--regex", "(ab"], "--regex: regex '(ab', column 1"), (["--lark", "none"], "--lark: cannot read 'none'"),
     (["--lark", "start: b"], 'unknown name: "b"'), (["--json-schema", "none.json"], "--json-schema: cannot read"),
     (["--one-of"], "--one-of: give at least one")],
)  # fmt: skip
def test_flags_are_checked_before_a_model_loads(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*SAMPLE, *words]) == 2
    assert said in capsys.readouterr().err


def test_recipe_with_a_schema_in_it(tmp_path: Path) -> None:
    from retrodict.cli.config import load

    recipe = Path(__file__).parents[2] / "recipes" / "json_schema.yaml"
    plan = load("sample", str(recipe), {})
    assert [f.name for f in plan.factors] == ["json schema"] and plan.resolved["json_schema"]["type"] == "object"
    file = tmp_path / "person.json"
    file.write_text(json.dumps(PERSON))
    text = recipe.read_text()
    start, end = text.index("json_schema:\n"), text.index("stop:")
    other = tmp_path / "recipe.yaml"
    other.write_text(f"{text[:start]}json_schema: {file}\n{text[end:]}")
    assert [f.name for f in load("sample", str(other), {}).factors] == ["json schema"]
    other.write_text(f"{text[:start]}json_schema: 3\n{text[end:]}")
    with pytest.raises(InputError, match="key 'json_schema': expected a file, or a schema"):
        load("sample", str(other), {})


def test_stops_without_text(letters: rd.TabularLM) -> None:
    """Ends that leave no text count as one stop, and the grammar never reads them."""
    lm = rd.TabularLM.random(".!ab", order=2, seed=2)
    target = rd.continuation(lm, "a", stop=Stops((0, 1), label="ends"), max_tokens=3) * lark('start: "a"* "b"')
    p = rd.smc(target, n=32, runs=1, seed=0)
    assert all(re.fullmatch("a*b", s) for s, w in zip(p.shown, p.log_w[0], strict=True) if w > -1e30)
