"""The algebra of factors, ready-made targets, verifiers, and a user's own problems."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from retrodict.errors import InputError
from retrodict.models.tabular import TabularLM
from retrodict.models.tiny import TinyLM
from retrodict.numerics import NEG_INF
from retrodict.policies.lm import LMPolicy
from retrodict.records import Problem
from retrodict.samplers.exact import exact
from retrodict.samplers.importance import importance
from retrodict.spaces.enumerate import enumerate_objects
from retrodict.spaces.strings import Strings
from retrodict.targets.algebra import Target, temper
from retrodict.targets.constraint import short_words, with_words
from retrodict.targets.prior import Prior
from retrodict.targets.problems import problems, tokenise
from retrodict.targets.ready import continuation, from_prior, infill, of_length, posterior, scored, strings
from retrodict.targets.verifier import VerifierError, verifier

LM = TabularLM.random(".ab ", order=2, seed=1)
Rows = Sequence[Mapping[str, Any]]


def log_z(target: Target) -> float:
    found = exact(target).log_z
    assert found is not None
    return float(found[0, 0])


def likes_a(texts: list[str], rows: Rows) -> list[float]:
    return [0.5 if "a" in t else 0.25 for t in texts]


# -- algebra ------------------------------------------------------------------------------------------------------


def test_force_has_mass_one_and_own_stop_less() -> None:
    masses = {limit: log_z(continuation(LM, "a", stop=".", max_tokens=3, limit=limit))
              for limit in ("force", "own_stop", "exact", "exact_prefix")}  # fmt: skip
    assert abs(masses["force"]) < 1e-9
    assert masses["exact"] < masses["own_stop"] < 0 and masses["exact"] < masses["exact_prefix"] < 0
    assert abs(log_z(of_length(LM, "a", tokens=3, stop=None))) < 1e-9  # three tokens, all of them moves


def test_temperature_is_the_sequence_s() -> None:
    flat, sharp = (continuation(LM, "a", temperature=t, stop=".", max_tokens=2) for t in (1.0, 0.25))
    p, q = exact(flat).counts(), exact(sharp).counts()
    total = sum(w**4 for w in p.values())
    assert all(math.isclose(q[k], w**4 / total, rel_tol=1e-9) for k, w in p.items())


def test_factors_multiply_and_betas_temper() -> None:
    base = infill(LM, "a", "b", stop=".", max_tokens=3, join="")
    target = base * verifier(likes_a) ** 2.0
    assert target.betas == {"prior": 1.0, "likelihood": 1.0, "verifier": 2.0}
    assert target.formula == "prior * likelihood * verifier^2"
    assert math.isclose(log_z(verifier(likes_a) * base), log_z(target.with_betas(verifier=1.0)))
    assert log_z(target) < log_z(base)
    assert (target**0.5).betas == {"prior": 0.5, "likelihood": 0.5, "verifier": 1.0}
    assert target.with_guide(None).guide is None and target.version != base.version


def test_targets_over_one_space_multiply() -> None:
    lm = TabularLM.random(".ab ", order=1, seed=2)
    data, space = [Problem((1,))], strings(LM, ".", 3)
    p = from_prior(LM, data, space)
    other = LMPolicy(lm, space, data)
    q = Target(space, data, {"expert": Prior(other, "expert")}, prior=other)
    product = p * q
    assert set(product.factors) == {"prior", "expert"} and product.prior is p.prior
    rows = product.terms(enumerate_objects(space, 0))
    assert torch.allclose(product.log_gamma(rows), p.log_gamma(rows) + q.log_gamma(rows))
    with pytest.raises(InputError, match="two factors are called 'prior'"):
        p * p
    with pytest.raises(InputError, match="only targets over the same space and problems multiply"):
        p * from_prior(LM, data, strings(LM, ".", 2))


def test_zeros_of_a_factor() -> None:
    x = torch.tensor([NEG_INF, -1.0])
    assert temper(x, 2.0).tolist() == [NEG_INF, -2.0]
    assert temper(x, 0.0).tolist() == [0.0, 0.0]  # a factor to the power zero asks nothing
    hard = scored(LM, "a", verifier(lambda t, r: ["b" not in x for x in t], kind="bool"), stop=".", max_tokens=2)
    assert all("b" not in text for text, _ in exact(hard).best(0, 100))
    floored = scored(LM, "a", verifier(lambda t, r: ["b" not in x for x in t], kind="bool", floor=-3.0), stop=".",
                     max_tokens=2)  # fmt: skip
    mass = math.exp(log_z(hard))
    assert math.isclose(math.exp(log_z(floored)), mass + (1 - mass) * math.exp(-3.0), rel_tol=1e-9)


def test_weights_that_are_all_zero_name_their_factor() -> None:
    never = scored(LM, "a", verifier(lambda t, r: [False] * len(t), kind="bool", name="judge"), stop=".", max_tokens=2)
    p = importance(never, n=8, seed=0)
    assert any("the factor 'judge' is zero on every sample" in note for note in p.trace.notes)
    assert not p.weights.isnan().any() and p.log_z is not None and (p.log_z == NEG_INF).all()


@pytest.mark.parametrize(
    "make, says",
    [
        (
            lambda: infill(LM, "a", ""),
            "infill needs the text after the gap; for plain continuation use rd.continuation",
        ),
        (lambda: continuation(LM, "a", temperature=0.0), "temperature must be positive, not 0.0"),
        (lambda: continuation(LM, "", stop="."), "empty prompt; give the model at least one word to read"),
        (lambda: continuation(TinyLM(context=16), "a" * 10, max_tokens=8), "tokens are 3 over the context of tiny"),
        (lambda: continuation(LM, "a", stop=".") * 3.0, "cannot multiply a target by float; use a target"),
        (
            lambda: continuation(LM, "a", stop=".").with_betas(likelihood=2.0),
            "no factor 'likelihood'; this target has prior",
        ),
        (lambda: verifier(likes_a, kind="probability"), "unknown kind 'probability'; choose one of bool"),
        (lambda: verifier(likes_a, beta=0.0), "beta must be positive, not 0.0; small beta means a sharp reward"),
        (lambda: verifier(likes_a, floor=0.5), "floor must be negative nats, not 0.5; e.g. floor=-20"),
        (lambda: importance(continuation(LM, "a", stop="."), n=0, seed=0), "n must be at least 1, not 0"),
    ],
)
def test_bad_input_gets_one_line(make: Any, says: str) -> None:
    with pytest.raises(InputError) as error:
        make()
    assert says in str(error.value) and "\n" not in str(error.value)


# -- verifiers ----------------------------------------------------------------------------------------------------


def values(fn: Any, **how: Any) -> dict[str, float]:
    target = scored(LM, "a", verifier(fn, **how), stop=".", max_tokens=1)
    rows = target.terms(enumerate_objects(target.space, 0))
    return dict(zip(target.space.show(rows), rows.terms["verifier"].tolist(), strict=True))


def test_what_a_number_means() -> None:
    number = lambda t, r: [0.5] * len(t)  # noqa: E731
    assert values(number, kind="prob")["."] == math.log(0.5)
    assert values(number, kind="log")["."] == 0.5
    assert values(number, kind="reward", beta=0.1)["."] == 5.0
    assert values(number, kind="bool")["."] == 0.0
    zero = lambda t, r: [0] * len(t)  # noqa: E731
    assert values(zero, kind="prob")["."] == NEG_INF == values(zero, kind="bool")["."]
    assert values(zero, kind="prob", floor=-9.0)["."] == -9.0 == values(zero, kind="bool", floor=-9.0)["."]
    assert values(lambda t, r: [1e-9] * len(t), kind="prob", floor=-9.0)["."] == -9.0


def test_a_verifier_sees_whole_texts_once_each_with_their_rows() -> None:
    seen: list[tuple[str, Any]] = []

    def check(texts: list[str], rows: Rows) -> list[float]:
        seen.extend((t, r["id"]) for t, r in zip(texts, rows, strict=True))
        return [1.0] * len(texts)

    data = [Problem((1,), row={"id": i}) for i in range(2)]
    target = posterior(LM, data, stop=".", max_tokens=2, verifier=verifier(check))
    importance(target, n=50, seed=0)
    assert len(seen) == len(set(seen)) and {i for _, i in seen} == {0, 1} and all(t.count(".") <= 1 for t, _ in seen)


@pytest.mark.parametrize(
    "fn, says",
    [
        (lambda t, r: [math.nan if "b" in x else 1.0 for x in t], "returned NaN on the text 'b.'; return a number"),
        (lambda t, r: [None if "b" in x else 1.0 for x in t], "returned None on the text 'b.'; return a number"),
        (lambda t, r: [math.inf] * len(t), "returned an infinite value on the text '.'; return a number"),
        (lambda t, r: [1.0], "returned 1 values for 4 texts; return one each"),
        (lambda t, r: [2.0] * len(t), "gave the probability 2.0 on '.'; use kind='reward'"),
        (
            lambda t, r: [1 / (0 if "b" in x else 1) for x in t],
            "raised ZeroDivisionError: division by zero; on the text 'b.'",
        ),
    ],
)
def test_a_verifier_that_fails_keeps_the_text(fn: Any, says: str) -> None:
    with pytest.raises(VerifierError) as error:
        values(fn)
    assert says in str(error.value) and "\n" not in str(error.value)
    assert error.value.text in (".", "b.")


def test_verifiers_have_no_prefix_values() -> None:
    target = scored(LM, "a", verifier(likes_a), stop=".", max_tokens=2)
    with pytest.raises(InputError, match="'verifier' has no prefix values; use an objective on whole objects"):
        target.log_gamma(enumerate_objects(target.space, 0), every_prefix=True)
    hard = continuation(LM, "a", stop=".", max_tokens=2) * short_words(1)
    with pytest.raises(InputError, match="'words<=1' has no prefix values"):
        hard.log_gamma(enumerate_objects(hard.space, 0), every_prefix=True)


# -- problems -----------------------------------------------------------------------------------------------------


def test_problems_from_rows_and_files(tmp_path: Path) -> None:
    rows = [{"q": "a", "y": "b"}, {"q": "b", "y": "a"}]
    how: dict[str, Any] = {"context": "{q} ", "evidence": "{y}.", "name": "ask {q}"}
    wanted = [("a ", "b.", "ask a"), ("b ", "a.", "ask b")]
    (tmp_path / "r.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    (tmp_path / "r.json").write_text(json.dumps(rows))
    (tmp_path / "r.csv").write_text("q,y\na,b\nb,a\n")
    for source in (rows, tmp_path / "r.jsonl", str(tmp_path / "r.json"), tmp_path / "r.csv"):
        found = problems(source, **how)
        assert [(p.context, p.evidence, p.name) for p in found] == wanted and found[0].row == rows[0]
    ids = tokenise(LM, problems(rows, **how))
    assert ids[0].context == (1, 3) and ids[0].evidence == (2, 0) and tokenise(LM, ids) == ids


@pytest.mark.parametrize(
    "name, text, says",
    [
        ("none.jsonl", None, "no such file"),
        ("r.jsonl", "", "the file is empty; give one JSON object a line"),
        ("r.jsonl", '{"q": "a"}\n{"q": ', "r.jsonl, line 2: not JSON"),
        ("r.jsonl", '{"q": "a"}\n[1]', "line 2: expected a JSON object, found list"),
        ("r.json", '{"q": "a"}', "expected a JSON list of objects"),
        ("r.json", "[{", "line 1: not JSON"),
        ("r.csv", "question\na\n", "line 2: no field 'q'; choose one of question"),
        ("r.jsonl", '{"quest": "a"}', "line 1: no field 'q'"),
        ("r.csv", "q\n", "no rows; give at least one problem"),
    ],
)
def test_files_that_cannot_be_read(tmp_path: Path, name: str, text: str | None, says: str) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(InputError) as error:
        problems(tmp_path / name, context="{q}")
    assert says in str(error.value) and "\n" not in str(error.value)


def test_join_and_what_y_follows() -> None:
    glued = infill(LM, "a", "b", stop=".", max_tokens=2, join="")
    apart = infill(LM, "a", "b", stop=".", max_tokens=2)
    assert glued.problems[0].evidence == (2,) and apart.problems[0].evidence == (3, 2)
    assert glued.note == "Y follows the stop's text"
    ends = posterior(LM, [Problem((1,), (2,))], stop="eos", max_tokens=2)
    assert ends.note == "Y replaces the end of sequence" and cast(Strings, ends.space).stops.ids == LM.end_ids
    plain = posterior(LM, [Problem((1,))], stop=".", max_tokens=2)
    assert set(plain.factors) == {"prior"} and plain.guide is None


def test_words_bind_to_a_model_and_print_themselves() -> None:
    target = continuation(LM, "a", stop=".", max_tokens=4) * with_words(["ab"], ["a"])
    assert target.factors["words"].version == "contains ab; avoids a" and target.guide is not None and target.guide.hard
    with pytest.raises(InputError, match="two factors are called 'words'"):
        target * with_words(["b"])
    with pytest.raises(InputError, match="constraints are about strings of a language model"):
        Target(target.space, target.problems, target.factors) * short_words(2)
