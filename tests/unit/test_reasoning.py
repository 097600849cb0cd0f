"""Step guides, votes, the reasoning tasks and their bench, on tables (no language model)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch

from retrodict.bench import reasoning as bench
from retrodict.diagnostics.votes import votes
from retrodict.errors import InputError, MissingExtra
from retrodict.guides.base import ProductGuide
from retrodict.guides.steps import StepGuide
from retrodict.models.tabular import TabularLM
from retrodict.records import Problem
from retrodict.samplers.exact import exact
from retrodict.samplers.importance import ancestral, importance
from retrodict.samplers.smc import smc
from retrodict.spaces.strings import Strings
from retrodict.targets.algebra import Target
from retrodict.targets.ready import continuation, infill, posterior
from retrodict.targets.steps import stepwise
from retrodict.targets.verifier import Verifier, VerifierError, verifier
from retrodict.tasks import reasoning, reasoning_gym
from retrodict.tasks.reasoning import HOPE, SLIP, equations, ordered, task
from retrodict.testing import check_guide
from retrodict.testing.steps import majority_law, step_cases
from retrodict.training.predictive import self_consistency

LM = TabularLM.random(".ab ", order=3, seed=1, scale=0.6)
ALPHABET = "".join(dict.fromkeys(".0123456789+-=, ?:\n" + "QuestionAnswerThe answer is" + "NumbersAscendingDescending"))
TEXT = TabularLM.random(ALPHABET, order=1, seed=0, scale=0.3)


class Asked:
    """A process reward that keeps what it was asked."""

    def __init__(self) -> None:
        self.calls: list[list[tuple[str, str]]] = []

    def __call__(self, texts: list[str], rows: list[Mapping[str, Any]]) -> list[float]:
        self.calls.append([(str(r.get("name", "")), t) for t, r in zip(texts, rows, strict=True)])
        return [0.1 + 0.2 * min(t.count("b"), 4) for t in texts]


def story(**more: Any) -> Target:
    return continuation(LM, "a", stop=".", max_tokens=6, **more)


def guide_of(target: Target) -> StepGuide:
    assert isinstance(target.guide, StepGuide)
    return target.guide


# -- the guide --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", step_cases(), ids=lambda c: c.name)
def test_a_step_guide_keeps_the_laws(case: Any) -> None:
    guide = case.target.guide
    guide = guide.guides[-1] if isinstance(guide, ProductGuide) else guide
    check_guide(guide, case.target.space, len(case.target.problems))


def test_psi_changes_at_boundaries_only() -> None:
    target = stepwise(story(), verifier(Asked()), boundary=" ", power=2.0)
    guide, space = guide_of(target), target.space
    s, c = space.start(torch.zeros(1, dtype=torch.long)), guide.start(torch.zeros(1, dtype=torch.long))
    seen = [float(guide.log_psi(c, s)[0])]
    for move in LM.tokenizer.encode("ab bb "):
        z = torch.tensor([move])
        c, s = guide.step(c, s, z), space.step(s, z)
        seen.append(float(guide.log_psi(c, s)[0]))
    none, one, three = (2 * math.log(0.1 + 0.2 * k) for k in (0, 1, 3))
    assert seen == pytest.approx([none, none, none, one, one, one, three])


def test_ess_moves_at_boundaries_only() -> None:
    """The prior proposes, so between boundaries (and stops) weights stay what they were."""
    target = stepwise(story(limit="exact_prefix"), verifier(Asked()), boundary="bb")
    p = smc(target, n=64, runs=1, seed=0, ess_threshold=0.0)
    assert p.trace.ess is not None
    first = [text.find("bb") for text in p.shown]
    step = min(x for x in first if x >= 0) + 2  # moves until the first boundary
    ess = p.trace.ess[:, 0]
    assert torch.allclose(ess[: step - 1], torch.tensor(64.0, dtype=ess.dtype)) and ess[step - 1] < 63.9


def test_each_prefix_is_asked_about_once_and_in_batches() -> None:
    asked = Asked()
    data = [Problem((2,), row={"name": "x"}), Problem((2,), row={"name": "y"})]
    target = stepwise(posterior(LM, data, stop=".", max_tokens=6), verifier(asked), boundary=" ")
    p = smc(target, n=32, runs=2, seed=0)
    everything = [pair for call in asked.calls for pair in call]
    assert len(everything) == len(set(everything))
    assert all(text == "" or text.endswith(" ") for _, text in everything)
    assert len(asked.calls) <= len(p.trace.ess if p.trace.ess is not None else ()) + 1  # a call a step at most


def test_several_boundaries_and_the_last_of_them() -> None:
    guide = guide_of(stepwise(story(), verifier(Asked()), boundary=(" ", "ba")))
    assert [guide._end(t) for t in ("", "a", "a b", "a ba", "baa", "ba a")] == [0, 0, 2, 4, 2, 3]


def test_it_multiplies_the_guide_that_is_there() -> None:
    target = stepwise(infill(LM, "ab", "ba", stop=".", max_tokens=3, join=""), verifier(Asked()), boundary=" ")
    assert isinstance(target.guide, ProductGuide) and len(target.guide.guides) == 2
    moved = target.on(list(target.problems)[:1])
    assert isinstance(moved.guide, ProductGuide)


def test_a_reward_of_zero_is_no_dead_end() -> None:
    """Chains that the process reward rules out are still worth what the target says, if nothing else survives."""
    target = stepwise(story(), verifier(lambda texts, rows: [0.0 for _ in texts]), boundary=" ")
    p = smc(target, n=64, runs=4, seed=0, ess_threshold=0.0)
    assert p.log_z is not None and torch.allclose(p.log_z, torch.zeros_like(p.log_z), atol=1e-6)


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "reward, message",
    [
        (verifier(lambda t, r: [math.nan for _ in t]), "returned NaN on the text ''"),
        (verifier(lambda t, r: [-0.5 if " " in x else 0.5 for x in t]), "gave the probability -0.5 on"),
        (verifier(lambda t, r: [1 / 0 for _ in t]), "raised ZeroDivisionError"),
        (verifier(lambda t, r: [0.5]), "returned 1 values for"),
    ],
)
def test_rewards_that_cannot_be_used(reward: Verifier, message: str) -> None:
    data = [Problem((2,)), Problem((3,))]
    target = stepwise(posterior(LM, data, stop=".", max_tokens=6), reward, boundary=" ")
    with pytest.raises(VerifierError, match=message):
        smc(target, n=16, seed=0)


def test_no_boundary_ever_seen_is_said() -> None:
    said = smc(stepwise(story(), verifier(Asked()), boundary="zz"), n=8, runs=1, seed=0).trace.notes
    assert said == (
        "no step boundary ('zz') in any of 8 chains, so the step guide never spoke; name one that the model writes",
    )
    assert not smc(stepwise(story(), verifier(Asked()), boundary=" "), n=8, runs=1, seed=0).trace.notes


def test_steps_of_what() -> None:
    reward = verifier(Asked())
    with pytest.raises(InputError, match="an empty boundary"):
        stepwise(story(), reward, boundary="")
    with pytest.raises(InputError, match="no boundary and no tool"):
        stepwise(story(), reward, boundary=())
    with pytest.raises(InputError, match="power must be positive, not 0"):
        stepwise(story(), reward, power=0.0)
    bare = story()
    assert isinstance(bare.space, Strings)
    with pytest.raises(InputError, match="no tokenizer"):
        stepwise(replace(bare, space=replace(bare.space, tokenizer=None)), reward)


# -- votes ------------------------------------------------------------------------------------------------------------


def first_letter(text: str, row: Mapping[str, Any]) -> str | None:
    return text[0] if text[:1] in ("a", "b") else None


def test_votes_by_weight() -> None:
    p = ancestral(story(), n=5, seed=0)
    shown = ("a.", "b.", ".", "b.", "a.")
    log_w = torch.tensor([[0.1, 0.3, 0.25, 0.15, 0.2]], dtype=torch.float64).log()
    found = votes(replace(p, shown=shown, log_w=log_w), story().problems, first_letter)
    assert found.answers == ("b",)
    assert dict(found.shares[0]) == pytest.approx({"b": 0.45, "a": 0.3}) and float(found.share[0]) == pytest.approx(
        0.45
    )
    equal = votes(replace(p, shown=shown, log_w=torch.zeros(1, 5)), story().problems, first_letter)
    assert equal.answers == ("a",)  # of equals the first
    dead = votes(replace(p, shown=shown, log_w=torch.full((1, 5), -math.inf)), story().problems, first_letter)
    assert dead.answers == (None,) and float(dead.share[0]) == 0.0
    with pytest.raises(InputError, match="2 problems for particles of 1"):
        votes(p, [*story().problems] * 2, first_letter)


def test_weighted_votes_are_the_posterior_predictive() -> None:
    target = story() * verifier(Asked())
    truth = exact(target)
    law: dict[str | None, float] = {}
    for key, w in truth.counts().items():
        y = first_letter(dict(zip(truth.keys, truth.shown, strict=True))[key], {})
        law[y] = law.get(y, 0.0) + w
    for p in (importance(target, n=4000, runs=1, seed=0), smc(target, n=4000, runs=1, seed=1)):
        found = votes(p, target.problems, first_letter).shares[0]
        assert {y: found[y] for y in "ab"} == pytest.approx({y: law[y] for y in "ab"}, abs=0.04)


def test_self_consistency_of_a_policy_has_the_same_law() -> None:
    """``training.predictive.self_consistency`` draws and counts by itself; its winners follow the exact law too."""
    target, runs = story(), 2000
    p = exact(target)
    chance = {y: sum(w for t, w in zip(p.shown, p.weights[0].tolist(), strict=True) if first_letter(t, {}) == y)
              for y in ("a", "b", None)}  # fmt: skip
    law, share = majority_law(torch.tensor(list(chance.values()), dtype=torch.float64), 4)
    assert target.prior is not None
    found = self_consistency(target.prior, [target.problems[0]] * runs, first_letter, n=4, seed=3)
    seen = torch.tensor([sum(f.answer == y for f in found) / runs for y in chance], dtype=torch.float64)
    assert float(((seen - law).abs() / (law * (1 - law) / runs).clamp_min(1e-12).sqrt()).max()) < 4.5
    assert sum(f.share for f in found) / runs == pytest.approx(share, abs=0.03)


def test_majority_law_by_hand() -> None:
    law, share = majority_law(torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64), 2)
    a = 0.25 + 2 * 0.5 * 0.2 + 0.5 * 0.3  # both a; a and none; a first of one each
    b = 0.09 + 2 * 0.3 * 0.2 + 0.5 * 0.3
    assert law.tolist() == pytest.approx([a, b, 0.04])
    assert share == pytest.approx(0.25 + 0.09 + 0.5 * (0.2 + 0.12 + 0.3))


# -- checks of steps --------------------------------------------------------------------------------------------------

SUM = {"expression": "6 - 0 + 4"}
LIST = {"numbers": ["7", "2", "7"], "direction": "ascending"}


@pytest.mark.parametrize(
    "text, expected",
    [
        ("", (0, 2)),
        (" 6 - 0 = 6", (0, 1)),
        (" 6 - 0 = 6,", (0, 1)),
        (" 6 - 0 = 5, 5 + 4 = 1.", (0, 0)),  # results are nobody's business
        (" 6 - 0 = 6, 6 - 4 = 2.", (1, 0)),  # another sign
        (" 0 - 6 = -6,", (1, 1)),
        (" 6 - 0 = 6, 6 + 4 = 10, 10 + 1 = 11.", (1, 0)),  # one too many
        (" 6.", (1, 1)),
        (" let us see, 6 - 0 = 6", (2, 0)),
    ],
)
def test_equations(text: str, expected: tuple[int, int]) -> None:
    assert equations(text, SUM) == expected


@pytest.mark.parametrize(
    "text, expected",
    [
        ("", (0, 3)),
        (" 2,", (0, 2)),
        (" 2, 7, 7\n", (0, 0)),
        (" 7, 2,", (1, 1)),
        (" 2, 2, 7\n", (1, 0)),
        (" 2, 5, 7, 7\n", (1, 0)),
        (" two, 7", (1, 1)),
        (" ², 7", (1, 1)),
    ],
)
def test_ordered(text: str, expected: tuple[int, int]) -> None:
    assert ordered(text, LIST) == expected
    down = {**LIST, "direction": "descending"}
    if text == " 7, 2,":
        assert ordered(text, down) == (0, 1)


# -- tasks and bench --------------------------------------------------------------------------------------------------


def test_arithmetic_without_a_model_of_its_own() -> None:
    made = task("arithmetic", TEXT, 3, seed=1)
    row = made.target.problems[0].row
    assert task("arithmetic", TEXT, 3, seed=1).target.problems[0].row == row
    found, total = str(row["expression"]), 0
    for sign, number in zip(("+ " + found).split(" ")[::2], found.split(" ")[::2], strict=True):
        total += int(number) if sign == "+" else -int(number)
    assert made.right(str(total), row) and not made.right(str(total + 1), row)
    assert made.answer(f" 1 + 2 = {total}.", row) == str(total) and made.answer(" 1 + 2.", row) is None
    assert all(p.evidence == () for p in made.target.problems)  # nobody reads the answer
    p = smc(made.guided, n=4, runs=1, seed=0)
    assert p.m == 3 and len(made.correct(votes(p, made.target.problems, made.answer))) == 3


def test_rewards_of_a_task() -> None:
    made = task("arithmetic", TEXT, 1, seed=1)
    first, sign, second, *_ = str(made.target.problems[0].row["expression"]).split(" ")
    texts, rows = ["", f" {first} {sign} {second} = 1,", " 1,"], [made.target.problems[0].row] * 3
    assert list(made.reward.fn(texts, rows)) == pytest.approx([HOPE**2, HOPE, SLIP * HOPE])


def test_the_bench_on_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "load", lambda name, **_: TEXT)
    rows = bench.run(tasks="arithmetic", questions=2, chains=3)
    methods = list(dict.fromkeys(r.method for r in rows))
    assert methods == ["plain chain", "self-consistency", "best of n", "weighted votes", "particle filter"]
    values = {(r.method, r.metric): r.value for r in rows}
    assert all(0 <= values[m, "accuracy"] <= 1 and values[m, "tokens"] > 0 for m in methods)
    assert [r.bar for r in rows if r.bar] == ["<= 1.1"]


def test_unknown_names() -> None:
    with pytest.raises(InputError, match="unknown task 'arithmetics'; did you mean 'arithmetic'"):
        task("arithmetics", TEXT)
    with pytest.raises(InputError, match="unknown task 'sums'"):
        bench.run(tasks="sums")
    with pytest.raises(InputError, match="at least one question, not 0"):
        task("arithmetic", TEXT, 0)


def test_best_only_takes_the_first_of_equals() -> None:
    p = importance(story() * verifier(Asked()), n=4, runs=1, seed=0)
    p = replace(p, log_w=torch.tensor([[0.0, 2.0, 2.0, 1.0]], dtype=torch.float64))
    assert bench.best_only(p).weights.tolist() == [[0.0, 1.0, 0.0, 0.0]]


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr(reasoning_gym.importlib, "import_module", missing)
    with pytest.raises(MissingExtra, match=r"pip install 'retrodict\[reasoning\]'"):
        task("chain_sum", TEXT)


@pytest.fixture
def gym() -> None:
    pytest.importorskip("reasoning_gym")


@pytest.mark.usefixtures("gym")
def test_questions_of_reasoning_gym() -> None:
    with pytest.raises(InputError, match="no data set 'chain_sums'"):
        reasoning_gym.questions("chain_sums", 1, 0)
    sums, lists = task("chain_sum", TEXT, 4, seed=5), task("number_sorting", TEXT, 4, seed=5)
    for p in sums.target.problems:
        assert sums.right(str(p.row["answer"]), p.row) and not sums.right("99", p.row)
    for p in lists.target.problems:
        numbers = sorted(p.row["numbers"], key=int, reverse=p.row["direction"] == "descending")
        text = f" {', '.join(numbers)}\n"
        found = lists.answer(text, p.row)
        assert found is not None and lists.right(found, p.row) and ordered(text, p.row) == (0, 0)
        assert not lists.right("['1']", p.row)
    assert [p.row for p in sums.target.problems] == [p.row for p in task("chain_sum", TEXT, 4, seed=5).target.problems]


def test_recipe_is_a_guided_target() -> None:
    made = reasoning.recipe(TEXT)
    assert len(made.problems) == 8 and isinstance(made.guide, StepGuide)
