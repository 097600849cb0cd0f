"""TRICE's gradient against enumeration, with its control variate; TRICE and STaR learn what they say they learn."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import retrodict as rd
from retrodict.errors import InputError
from retrodict.objectives.mle import object_log_q
from retrodict.records import Rollouts, cat_rollouts
from retrodict.rng import generator
from retrodict.spaces.enumerate import enumerate_objects
from retrodict.testing.table import TablePolicy
from retrodict.training.star import equal_by_problem, kept, restore, star
from retrodict.training.trice import Memory, estimate, passes, remember, signed_mle, trice, trice_weights

NEED = {"x": "a", "y": "b", "z": "c"}
COPIES, REPEATS = 8, 250


class Shared(TablePolicy):
    """A table with one part for each of three questions, whichever copy is asked."""

    def start(self, problem: Tensor) -> list[tuple[int, ...]]:
        """Each row's node."""
        return super().start(problem % 3)


def task(copies: int = 1) -> tuple[rd.Target, TablePolicy]:
    """Three questions whose right answers contain a given text; a table as the model."""
    lm = rd.TabularLM.random(".abc", order=1, seed=1)
    rows = [{"ask": c, "need": NEED[k]} for c, k in zip("abc", "xyz", strict=True)] * copies
    data = rd.problems(rows, context="{ask}")
    check = rd.verifier(lambda texts, rows: [r["need"] in t for t, r in zip(texts, rows, strict=True)], kind="bool")
    target = rd.posterior(lm, data, stop=".", max_tokens=3, min_tokens=1, verifier=check)
    return target, Shared(target.space, target.problems, moves=4, seed=2, scale=0.5)


class Everything:
    """All objects: log q and its gradient, which are right, and where each key is."""

    def __init__(self, target: rd.Target, policy: TablePolicy) -> None:
        self.target, self.policy = target, policy
        self.rows = cat_rollouts([enumerate_objects(target.space, p) for p in range(len(target.problems))])
        self.right = passes(target)(self.rows)
        keys = zip(self.rows.problem.tolist(), target.space.keys(self.rows), strict=True)
        self.at = {k: i for i, k in enumerate(keys)}
        self.log_q = object_log_q(policy.score(self.rows, grad=True), self.rows)
        one = torch.eye(len(self.rows), dtype=self.log_q.dtype)
        (self.grads,) = torch.autograd.grad(self.log_q, policy.logits, one, retain_graph=True, is_grads_batched=True)
        self.grads = self.grads.flatten(1)

    def log_right(self) -> Tensor:
        """log p(right | x) of each problem."""
        m = len(self.target.problems)
        return torch.stack([self.log_q[(self.rows.problem == p) & self.right].logsumexp(0) for p in range(m)])

    def index(self, rows: Rollouts) -> Tensor:
        """Where rows are among all objects."""
        keys = zip((rows.problem % 3).tolist(), self.target.space.keys(rows), strict=True)
        return torch.tensor([self.at[k] for k in keys], dtype=torch.long)

    def memory(self, gen: torch.Generator, copies: int) -> Memory:
        """Exact draws from p(z | x, right), ``copies`` of each question: the chains' own law."""
        pick = torch.multinomial(torch.stack([self.law(p) for p in range(3)]), copies, True, generator=gen)
        rows = self.rows.take(pick.T.flatten())
        return Memory(replace(rows, problem=torch.arange(3 * copies)), torch.ones(3 * copies, dtype=torch.bool))

    def law(self, p: int) -> Tensor:
        """p(z | x, right) of a question, over all rows."""
        w = self.log_q.detach().exp() * self.right * (self.rows.problem == p)
        return w / w.sum()


@pytest.fixture(scope="module")
def everything() -> Everything:
    return Everything(*task())


@pytest.fixture(scope="module")
def draws(everything: Everything) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of many estimates at stationarity: gradients, those with the planted sign, those without control variate, and
    where the memory went."""
    x, gen, (target, policy) = everything, generator(0), task(COPIES)
    correct, every = passes(target), range(3 * COPIES)
    out: list[list[Tensor]] = [[], [], [], []]
    for _ in range(REPEATS):
        memory, rows, weights, _ = estimate(policy, correct, x.memory(gen, COPIES), every, gen)
        g, at = x.grads[x.index(rows)], x.index(memory.rows)
        out[0].append(weights @ g)
        out[1].append(weights.abs() @ g)  # a wrong draw pushed up: the sign of the control variate lost
        out[2].append(x.grads[at].mean(0))
        out[3].append(at)
    return tuple(torch.stack(o) for o in out)  # pyright: ignore[reportReturnType]


def worst_z(found: Tensor, truth: Tensor) -> float:
    """The largest |mean - truth| in standard errors, over coordinates that vary."""
    se = found.std(0) / len(found) ** 0.5
    return float(((found.mean(0) - truth).abs() / se)[se > 1e-9].max())


def test_the_gradient_is_unbiased_at_stationarity(everything: Everything, draws: tuple[Tensor, Tensor, Tensor]) -> None:
    value = everything.log_right().mean()
    (truth,) = torch.autograd.grad(value, everything.policy.logits, retain_graph=True)
    right, planted, plain, _ = draws
    assert worst_z(right, truth.flatten()) < 4.5
    assert worst_z(plain, truth.flatten()) < 4.5
    assert worst_z(planted, truth.flatten()) > 8
    assert float(right.var(0).sum()) < 0.9 * float(plain.var(0).sum())  # what the control variate is for


def test_the_chain_keeps_the_law_of_right_answers(everything: Everything, draws: tuple[Tensor, ...]) -> None:
    count = torch.bincount(draws[3].flatten(), minlength=len(everything.rows)).double()
    law, n = torch.stack([everything.law(p) for p in range(3)]).sum(0), REPEATS * COPIES
    z = (count - n * law) / (n * law * (1 - law)).clamp_min(1e-12).sqrt()
    assert float(z[law > 0].abs().max()) < 4.5 and float(count[law == 0].sum()) == 0


def test_weights_by_hand() -> None:
    t, f = True, False
    memory, drawn = trice_weights(torch.tensor([t, f, f, f]), torch.tensor([t, t, f, t]))
    # mask 1 1 0 1; beta of the first (1-1)/2, of the second and fourth (1-0)/2
    assert torch.allclose(memory, torch.tensor([1, 1, 0, 1], dtype=torch.float64) / 3)
    assert torch.allclose(drawn, torch.tensor([0, -0.5, 0, -0.5], dtype=torch.float64) / 3)
    memory, drawn = trice_weights(torch.tensor([t, t]), torch.tensor([f, t]))
    assert not memory.any() and not drawn.any()  # all right: beta = 1, no gradient and no variance
    memory, drawn = trice_weights(torch.tensor([f]), torch.tensor([t]))
    assert float(memory) == 1 and float(drawn) == 0  # alone: no control variate
    assert not any(x.any() for x in trice_weights(torch.tensor([f]), torch.tensor([f])))


def test_signed_weights_give_the_signed_gradient(everything: Everything) -> None:
    x = everything
    rows, w = x.rows.take(torch.tensor([0, 5, 9])), torch.tensor([0.5, -0.25, 0.0])
    loss, _ = signed_mle(x.policy.score(rows, grad=True), rows, None, w)
    (g,) = torch.autograd.grad(loss, x.policy.logits)
    assert torch.allclose(-g.flatten(), w.double() @ x.grads[[0, 5, 9]])


def right_share(target: rd.Target, policy: TablePolicy) -> Tensor:
    return Everything(target, policy).log_right().detach()


def test_trice_climbs_to_right_answers_and_repeats_itself() -> None:
    tables = []
    for _ in range(2):
        target, policy = task()
        before = right_share(target, policy)
        memory = trice(policy, passes(target), steps=150, lr=0.2, seed=1, per_step=2)
        assert bool(memory.right.all()) and bool(passes(target)(memory.rows).all())
        assert float(right_share(target, policy).exp().min()) > 0.85 > float(before.exp().min())
        tables.append(policy.logits.detach())
    assert torch.equal(*tables)


def test_star_starts_from_the_original_weights_each_round() -> None:
    target, policy = task()
    origin = policy.logits.detach().clone()
    seen: list[dict] = []
    star(policy, passes(target), rounds=3, samples=4, steps=30, lr=0.3, growth=1.0, seed=0, on_metrics=seen.append)
    assert [m["round"] for m in seen] == [0, 1, 2] and seen[-1]["solved"] >= seen[0]["solved"]
    assert float(right_share(target, policy).exp().min()) > 0.6
    other = task()[1]
    other.logits.data.copy_(origin)
    rows, _ = kept(policy, passes(target), 3, 4, None, generator(5))
    assert rows is not None and bool(passes(target)(rows).all())
    assert float(equal_by_problem(rows).sum()) == pytest.approx(1)
    restore(policy, {"logits": origin})
    assert torch.equal(policy.logits, origin)


def test_failures_are_drawn_again_with_a_hint() -> None:
    target, policy = task()
    with torch.no_grad():  # never the answer to the first question
        for key, node in policy.nodes.items():
            if key[0] == 0:
                policy.logits[node, 1] = -1e9
    correct = passes(target)
    rows, found = kept(policy, correct, 3, 8, None, generator(0))
    assert rows is not None and 0 not in rows.problem.tolist() and found["hinted"] == 0
    hint = task()[1]
    rows, found = kept(policy, correct, 3, 8, hint, generator(0))
    assert rows is not None and 0 in rows.problem.tolist() and found["hinted"] == pytest.approx(1 / 3)


def test_a_first_memory_holds_right_rows_or_says_it_has_none() -> None:
    target, policy = task()
    memory = remember(policy, passes(target), 3, 50, generator(0))
    assert bool(memory.right.all()) and bool(passes(target)(memory.rows).all())
    assert memory.rows.problem.tolist() == [0, 1, 2]
    never = remember(policy, lambda r: torch.zeros(len(r), dtype=torch.bool), 3, 2, generator(0))
    assert not bool(never.right.any())
    _, rows, weights, _ = estimate(policy, lambda r: torch.zeros(len(r), dtype=torch.bool), never, [0, 1], generator(1))
    assert len(rows) == len(weights) == 0
    with pytest.raises(InputError, match="verifier"):
        passes(replace(target, factors={"prior": target.factors["prior"]}))
