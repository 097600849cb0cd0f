"""The posterior predictive against enumeration, its error bars, votes, grades and majorities."""

from __future__ import annotations

import pytest
import torch

import retrodict as rd
from retrodict.errors import InputError
from retrodict.policies.amortized import Amortized
from retrodict.records import Problem
from retrodict.spaces.enumerate import enumerate_objects
from retrodict.targets.choice import answer_ids, answers_log_p
from retrodict.training.em import likelihood_of, restricted
from retrodict.training.predictive import averaged, grade, predict, self_consistency

ANSWERS = ("a", "bc", "cab")


def setting() -> tuple[rd.Target, list[Problem]]:
    """A target with evidence, and three problems without."""
    lm = rd.TabularLM.random(".abc", order=3, seed=3, scale=1.5)
    code = lm.tokenizer.encode
    data = [Problem(tuple(code("ab")), tuple(code("bc")))]
    asked = [Problem(tuple(code(x)), row={"n": i}) for i, x in enumerate(("ab", "c", "ba"))]
    return rd.posterior(lm, data, stop=".", max_tokens=3, min_tokens=1), asked


@pytest.mark.parametrize("choice", [False, True])
def test_the_predictive_is_the_sum_over_all_latents(choice: bool) -> None:
    target, asked = setting()
    ids = answer_ids(target.prior.lm, ANSWERS)  # pyright: ignore[reportOptionalMemberAccess, reportAttributeAccessIssue]
    if choice:
        target = restricted(target, ids)
    term = likelihood_of(target)
    policy = Amortized(target.prior.lm, target.space, target.problems)  # pyright: ignore[reportOptionalMemberAccess, reportAttributeAccessIssue, reportArgumentType]
    truth = []
    for p in range(len(asked)):
        rows = enumerate_objects(target.space, p)
        scores = policy.on(asked).score(rows)
        q = scores.log_q.sum(1) + scores.log_stop[torch.arange(len(rows)), rows.n, rows.stop]
        assert abs(float(q.exp().sum()) - 1) < 1e-9
        value = answers_log_p(term.lm, term.space, asked, rows, ids)  # pyright: ignore[reportArgumentType]
        value = value.log_softmax(-1) if choice else value
        truth.append((q[:, None] + value).logsumexp(0))
    found = predict(policy, term, asked, None if choice else ANSWERS, n=400, seed=1, batch=300)
    z = (found.log_p - torch.stack(truth)) / found.se
    assert float(z.abs().max()) < 4.5 and float(found.se.max()) < 0.2
    if choice:
        assert torch.allclose(found.log_p.exp().sum(1), torch.ones(3, dtype=torch.float64))
    again = predict(policy, term, asked, None if choice else ANSWERS, n=400, seed=1, batch=300)
    assert torch.equal(found.log_p, again.log_p) and found.chains == 400
    # a policy that reads the answer would leak it
    with pytest.raises(InputError, match="must not read"):
        predict(Amortized(policy.lm, target.space, asked, "{evidence}{context}"), term, asked, n=2)  # pyright: ignore[reportArgumentType]


def test_candidates_must_say_what_is_asked() -> None:
    target, asked = setting()
    with pytest.raises(InputError, match="candidates"):
        predict(target.prior, likelihood_of(target), asked)  # pyright: ignore[reportArgumentType]
    term = likelihood_of(restricted(target, answer_ids(likelihood_of(target).lm, ANSWERS)))
    with pytest.raises(InputError, match="its own answers"):
        predict(target.prior, term, asked, ("a", "b"))  # pyright: ignore[reportArgumentType]


def test_means_votes_and_errors_by_hand() -> None:
    p = torch.tensor([[[0.8, 0.1], [0.2, 0.3], [0.2, 0.2]]], dtype=torch.float64)
    found = averaged(p.log())
    assert torch.allclose(found.log_p.exp(), torch.tensor([[0.4, 0.2]], dtype=torch.float64))
    assert torch.allclose(found.votes, torch.tensor([[0.5, 0.5]], dtype=torch.float64))  # 1 + 0 + 1/2 of three
    assert torch.allclose(found.probability, torch.tensor([[2 / 3, 1 / 3]], dtype=torch.float64))
    se = p[0, :, 0].std() / 3**0.5 / 0.4
    assert torch.allclose(found.se[0, 0], se)
    assert int(found.best) == 0
    assert bool(averaged(p[:, :1].log()).se.isinf().all())


def test_grades_by_hand() -> None:
    p = torch.tensor([[0.95, 0.05], [0.65, 0.35], [0.25, 0.75], [0.55, 0.45]])
    found = grade(p, torch.tensor([0, 1, 1, 0]))
    assert found.accuracy == 0.75 and abs(found.se - (0.75 * 0.25 / 4) ** 0.5) < 1e-12
    assert abs(found.ece - (0.05 + 0.65 + 0.25 + 0.45) / 4) < 1e-6  # 0.65 is wrong; each in a bin of its own
    assert abs(found.log_loss + float(torch.tensor([0.95, 0.35, 0.75, 0.55]).log().mean())) < 1e-6
    assert found.risk.at(0.5) == 0.0 and found.risk.at(0.75) == pytest.approx(1 / 3)


def test_the_majority_answers() -> None:
    target, asked = setting()
    rows = enumerate_objects(target.space, 0)
    policy = target.prior.on(asked)  # pyright: ignore[reportOptionalMemberAccess, reportAttributeAccessIssue]
    scores = policy.score(rows)
    q = (scores.log_q.sum(1) + scores.log_stop[torch.arange(len(rows)), rows.n, rows.stop]).exp()
    first = [text[0] for text in target.space.show(rows)]
    share = {c: sum(float(x) for x, f in zip(q, first, strict=True) if f == c) for c in "abc"}
    found = self_consistency(policy, asked, lambda text, row: text[0], n=500, seed=0)
    assert len(found) == 3 and sum(found[0].counts.values()) == 500
    best = max(share, key=lambda c: share[c])
    assert found[0].answer == best and abs(found[0].share - share[best]) < 4.5 * (0.25 / 500) ** 0.5
    none = self_consistency(policy, asked, lambda text, row: None if row["n"] else text[0], n=3)
    assert none[0].answer is not None and none[1].answer is None and none[1].share == 0
