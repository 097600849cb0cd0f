"""One object for EM, wake-sleep and their mixtures: its laws on a mixture whose every posterior is a table."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import retrodict as rd
from retrodict.errors import InputError
from retrodict.latent.enumerated import distances, log_gamma_table
from retrodict.latent.mixture import Mixture, petals, start
from retrodict.numerics import NEG_INF
from retrodict.particles import Particles
from retrodict.policies.net import NetPolicy
from retrodict.rng import generator
from retrodict.training.amortize import grow
from retrodict.training.em import Rationales, grow_likelihood
from retrodict.training.learn import Dreams, LatentModel, Recursive, Summable, at_step, learn, weighted_rows
from retrodict.training.threads import one_thread


def mixture(m: int = 60, seed: int = 0) -> Mixture:
    """Points of the petals, and a start for them."""
    _, x = petals().sample(m, generator(seed))
    return Mixture(x, start(x, (4, 4), seed, sd=0.7))


def ascent(model: Mixture, particles: Particles) -> Tensor:
    """The gradient that M ascends, in the means: sum_k w_k grad log p(x, z_k)."""
    rows, w = weighted_rows(particles)
    means = [mu.clone().requires_grad_() for mu in model.theta.means]
    joint = replace(model.theta, means=tuple(means)).log_joint(model.x)
    at = rows.moves[:, 0] * model.theta.sizes[1] + rows.moves[:, 1]
    return torch.cat(torch.autograd.grad((w * joint[rows.problem, at]).sum(), means))


def fisher(model: Mixture) -> Tensor:
    """The gradient of the mean of log p(x), by autograd through the sum."""
    means = [mu.clone().requires_grad_() for mu in model.theta.means]
    theta = replace(model.theta, means=tuple(means))
    return torch.cat(torch.autograd.grad(theta.log_evidence(model.x).mean(), means))


def unweighted(p: Particles) -> Particles:
    """The planted bug: every draw counts the same."""
    return replace(p, log_w=torch.where(p.log_w > NEG_INF, 0.0, p.log_w))


def test_a_mixture_is_every_kind_of_model() -> None:
    model = mixture()
    assert all(isinstance(model, kind) for kind in (LatentModel, Dreams, Summable, Recursive))
    table = log_gamma_table(model.target)
    assert torch.allclose(table.logsumexp(1), model.log_evidence(), atol=1e-12)


def test_with_an_exact_e_step_log_p_never_falls_by_recursion_or_by_enumeration() -> None:
    both = [mixture(20), mixture(20)]
    first = learn(both[0], rounds=6, track=True)
    again = learn(both[1], rounds=6, e_step=lambda t, _: rd.exact(t), track=True)
    assert torch.allclose(both[0].theta.centres(), both[1].theta.centres(), atol=1e-6)
    for learned in (first, again):
        values = [r.log_evidence for r in learned.rounds]
        assert all(b >= a - 1e-10 for a, b in zip(values, values[1:], strict=False))  # pyright: ignore[reportOperatorIssue, reportOptionalOperand]
    bug = mixture(20)
    spoiled = [r.log_evidence for r in learn(bug, rounds=6, e_step=lambda t, _: unweighted(rd.exact(t)),
                                             track=True).rounds]  # fmt: skip
    assert spoiled[-1] < first.rounds[-1].log_evidence - 0.2  # pyright: ignore[reportOptionalOperand, reportOperatorIssue]


def test_the_gradient_of_m_is_that_of_log_p_with_weights_in_the_mean_over_seeds() -> None:
    model = mixture(8)
    model.theta = replace(model.theta, sd=1.2)
    model._target = None
    truth = fisher(model)
    assert torch.allclose(ascent(model, rd.exact(model.target)), truth, atol=1e-10)
    q = NetPolicy(model.space, model.problems, seed=3)  # untrained: weights do all the work
    runs = [rd.importance(model.target, q, n=480, seed=s, runs=1) for s in range(20)]
    found = torch.stack([ascent(model, p) for p in runs])
    wrong = torch.stack([ascent(model, unweighted(p)) for p in runs])
    error = found.std(0) / math.sqrt(len(runs))
    assert float(((found.mean(0) - truth).abs() / error).max()) < 5.0  # self-normalised: bias O(1/480)
    assert float(error.max()) < 0.02 * float(truth.abs().max())
    assert float(((wrong.mean(0) - truth).abs() / (wrong.std(0) / math.sqrt(len(runs)))).max()) > 20


def test_sleep_alone_reaches_the_exact_posterior_of_the_models_own_data() -> None:
    model = mixture(16)
    model.theta = petals(sd=0.6)
    model._target = None
    before = model.theta
    q = NetPolicy(model.space, model.problems, hidden=48, seed=0)
    fresh, _ = model.simulate(100, generator(5))
    with one_thread():
        frozen = Frozen(model)
        learn(frozen, q, rounds=1, e_steps=140, sleep=1.0, dreams=160, draws=1, lr=2e-2, lr_end=0.01)
    assert model.theta is before
    assert float(distances(fresh, q.on(fresh.problems)).mean()) < 0.05
    assert float(distances(fresh, NetPolicy(model.space, fresh.problems, hidden=48)).mean()) > 0.5


class Frozen:
    """A model whose M-step does nothing: what is left is q."""

    def __init__(self, model: Mixture) -> None:
        self.model, self.simulate = model, model.simulate

    @property
    def target(self) -> rd.Target:
        """Its own."""
        return self.model.target

    def m_step(self, particles: Particles, seed: int) -> float:
        """Nothing."""
        return 0.0


def amortized(seed: int, **given: Any) -> tuple[Mixture, Any, list[dict[str, Any]]]:
    """A short run."""
    model, seen = mixture(40), []
    q = NetPolicy(model.space, model.problems, hidden=16, seed=0)
    plan = {"rounds": 3, "e_steps": 6, "draws": 4, "samples": 4, "per_step": 8, "lr": 1e-2, "objective": "vargrad"}
    with one_thread():
        learned = learn(model, q, **{**plan, "seed": seed, "on_metrics": seen.append, **given})
    return model, learned, seen


def test_one_optimiser_over_all_rounds_and_one_result_for_one_seed() -> None:
    (a, learned, seen), (b, _, _), (c, _, _) = amortized(1), amortized(1), amortized(2)
    assert torch.equal(a.theta.centres(), b.theta.centres()) and not torch.equal(a.theta.centres(), c.theta.centres())
    assert [m["step"] for m in seen if m["phase"] == "e"] == list(range(18))
    assert [m["phase"] for m in seen] == (["e"] * 6 + ["m"]) * 3
    assert learned.policy.about["objective"] == "vargrad" and learned.policy.about["settings"]["steps"] == 18


def test_sleep_takes_its_share_and_a_threshold_holds_m_back() -> None:
    _, _, seen = amortized(1, sleep=0.5, dreams=8)
    assert [m["phase"] for m in seen if m["phase"] != "m"] == ["e", "sleep"] * 9
    model, learned, seen = amortized(1, threshold=(1e-9, 1e9, 12))
    assert [r.value is None for r in learned.rounds] == [False, False, False]
    model, learned, seen = amortized(1, threshold=(1e-9, 1e-9, 1))
    assert [r.value for r in learned.rounds] == [None] * 3 and model.updates == 0
    losses = [m["loss"] for m in seen]
    smooth = losses[0]
    for x in losses:
        smooth = 0.9 * smooth + 0.1 * x
    assert learned.rounds[-1].loss == pytest.approx(smooth)
    assert [at_step((6.0, 3.0, 10_000), s) for s in (0, 5_000, 10_000, 20_000)] == [6.0, 4.5, 3.0, 3.0]


def test_rounds_may_learn_from_a_part_of_the_data_in_turn() -> None:
    model, met = mixture(10), []

    class Noting(Frozen):
        def m_step(self, particles: Particles, seed: int) -> float:
            at = particles.objects.problem
            assert torch.allclose(self.model.target.log_gamma(replace(particles.objects, terms={}, versions={})),
                                  particles.log_w.flatten() - math.log(particles.k), atol=1e-9)  # fmt: skip
            met.append(sorted(at.unique().tolist()))
            return 0.0

    learn(Noting(model), rounds=4, e_step="exact", per_round=5)
    assert sorted(met[0] + met[1]) == list(range(10)) == sorted(met[2] + met[3]) and met[0] != met[2]


def test_what_does_not_go_together_is_refused_in_one_line() -> None:
    model = mixture(10)
    q = NetPolicy(model.space, model.problems, hidden=8)
    for message, given in {
        "rounds and dreams": {"rounds": 0},
        "unknown E-step 'exakt'": {"rounds": 1, "e_step": "exakt"},
        "whole E-step": {"rounds": 1, "policy": q, "e_step": "exact"},
        "lr= is for an amortized": {"rounds": 1, "lr": 0.1},
        "threshold= is for": {"rounds": 1, "threshold": (1.0, 1.0, 1)},
        "weighted= needs": {"rounds": 1, "weighted": True},
        "per_round is": {"rounds": 1, "per_round": 0},
        "leave out folder": {"rounds": 1, "policy": q, "folder": "x"},
        "between 0 and 1": {"rounds": 1, "policy": q, "sleep": 2.0},
        "reads the loss of E": {"rounds": 1, "policy": q, "threshold": (1.0, 1.0, 1), "e_steps": 0},
        "unknown setting 'lrr'": {"rounds": 1, "policy": q, "lrr": 1.0},
    }.items():
        with pytest.raises(InputError, match=message):
            learn(model, **given)  # pyright: ignore[reportArgumentType]
    with pytest.raises(InputError, match="no simulate"):
        learn(Still(model), q, rounds=1, sleep=0.5)


class Still:
    """A model that cannot simulate."""

    def __init__(self, model: Mixture) -> None:
        self.target = model.target

    def m_step(self, particles: Particles, seed: int) -> float:
        """Nothing."""
        return 0.0


def test_a_language_models_rationales_wake_sleep_and_wait_as_a_mixture_does() -> None:
    lm = rd.TabularLM.random(".abc", order=2, seed=3)
    code = lm.tokenizer.encode
    data = [rd.Problem(tuple(code(x)), tuple(code(y)), name=x) for x, y in (("ab", "bc"), ("c", "a"))]
    t = grow_likelihood(rd.posterior(lm, data, stop=".", max_tokens=2, min_tokens=1, lookahead=None))
    before, seen, model = rd.exact(t).evidence, [], Rationales(t, steps=5, lr=0.2, tokens=2)
    assert isinstance(model, Dreams) and before is not None
    learned = learn(model, grow(t), rounds=3, e_steps=4, sleep=0.5, dreams=6, threshold=(1e9, -1.0, 6), samples=4,
                    weighted=True, on_metrics=seen.append)  # fmt: skip
    assert [m["phase"] for m in seen] == [*["e", "sleep"] * 2, "m", *["e", "sleep"] * 4]
    assert [r.value is None for r in learned.rounds] == [False, True, True]
    after = rd.exact(t).evidence
    assert after is not None and float((after[0] - before[0]).mean()) > 0.1
