"""Relative trajectory balance where many paths reach one object: the law that is learned, and planted mistakes."""

import math
from unittest.mock import patch

import pytest
import torch

import retrodict as rd
from retrodict.errors import InputError
from retrodict.latent.masked_diffusion import (
    bound,
    evidence_bound,
    log_gamma_law,
    masked_target,
    noisy_tokens,
    string_law,
    train_masked,
    tune_masked,
)
from retrodict.latent.masked_text import (
    bracket_law,
    bracket_space,
    draw_strings,
    given_from,
    nested,
    sentence_space,
    sentences,
)
from retrodict.numerics import total_variation
from retrodict.objectives.rtb import rtb
from retrodict.objectives.table import OBJECTIVES
from retrodict.objectives.vargrad import vargrad
from retrodict.policies.net import NetPolicy
from retrodict.rng import generator
from retrodict.testing.diffusion import (
    object_law,
    plus_mean,
    random_masked,
    random_posterior,
    set_posterior,
    without_prior,
)
from retrodict.training.collect import Mixture, collect
from retrodict.training.replay import Replay
from retrodict.training.threads import one_thread

SMALL = {"steps": 60, "samples": 128, "lr": 1e-2, "evaluate": 256}


def distance(target, policy) -> float:
    g = log_gamma_law(target)
    return total_variation(g - g.logsumexp(0), string_law(policy))


@pytest.fixture(scope="module")
def target():
    return random_posterior()


@pytest.fixture(scope="module")
def learned(target):
    return tune_masked(target, from_prior=0.25, **SMALL)


def test_rtb_learns_the_posterior(target, learned):
    assert distance(target, target.prior) > 0.2
    assert distance(target, learned) < 0.02
    assert learned.about["evaluation"]["elbo"] == pytest.approx(
        float(log_gamma_law(target).logsumexp(0)), abs=0.05
    )  # no P_B in it


def test_a_uniform_order_leaves_a_residual_where_orders_disagree(target, learned):
    uniform = tune_masked(target, order="uniform", from_prior=0.25, **SMALL)
    spread = [policy.about["evaluation"]["var_a"] for policy in (learned, uniform)]
    assert spread[0] < 0.01 and spread[1] > 10 * spread[0]


def test_plus_for_minus_is_caught(target):
    with patch.dict(OBJECTIVES, {"vargrad": plus_mean}):
        wrong = tune_masked(target, objective="vargrad", from_prior=1.0, **SMALL)
    assert distance(target, wrong) > 0.1
    assert distance(target, tune_masked(target, objective="vargrad", from_prior=1.0, **SMALL)) < 0.02


def test_backward_paths_beside_a_prior_over_paths_are_caught():
    target, plan = set_posterior(), {"steps": 60, "samples": 128, "lr": 1e-2, "evaluate": 2}
    truth = rd.exact(target).counts()

    def far(asked, objective) -> float:
        with one_thread():
            policy = rd.amortize(
                asked, NetPolicy(target.space, target.problems, hidden=32), objective=objective, **plan
            )
        law = object_law(policy)
        return sum(abs(truth.get(k, 0.0) - law.get(k, 0.0)) for k in {*truth, *law}) / 2

    assert far(target, "rtb") < 0.02
    assert far(without_prior(target), "vargrad") > 0.1


def test_vargrad_is_rtb_without_log_z_on_the_rows_of_training(target):
    policy = tune_masked(target, steps=1, samples=8)
    gen, mixture = generator(0), Mixture(tempered=0.25, from_prior=0.25)
    batch = collect(target, policy, [0], 64, gen, mixture, Replay(), False)
    assert len(batch.own) == 32 and len(batch.new) == 64
    scores, log_gamma = policy.score(batch.rollouts), target.log_gamma(batch.rollouts)
    assert float(vargrad(scores, batch.rollouts, log_gamma)[0]) == pytest.approx(
        float(rtb(scores, batch.rollouts, log_gamma)[0]), rel=1e-5
    )


def test_the_bound_is_the_mean_over_orders_and_masks():
    model = random_masked(3, 2)
    tokens = model.space.enumerate()
    with torch.no_grad():
        estimates = torch.stack([bound(model.net, tokens, generator(0, "cpu", k)) for k in range(1000)])
    error = float(estimates.mean(1).std() / 1000**0.5)
    every = sum(evidence_bound(model, tokens, orders=64, seed=s) for s in range(10)) / 10
    assert float(estimates.mean()) == pytest.approx(every, abs=4 * error + 0.03)
    assert every < float(string_law(model).mean())  # a bound, from below


def test_a_trained_model_is_near_its_language():
    space, law = bracket_space(4), bracket_law(4)
    assert float(law.exp().sum()) == pytest.approx(1)
    text = draw_strings(space, law, 4000)
    model = train_masked(space, text, steps=150, hidden=64, lr=1e-2)
    assert total_variation(law, string_law(model)) < 0.1
    said = -evidence_bound(model, text)
    live = law > -math.inf
    entropy = -float((law[live].exp() * law[live]).sum())
    assert said == pytest.approx(entropy, abs=0.1)


def test_evidence_of_noisy_tokens_sums_to_one_over_evidence():
    space = bracket_space(2)
    total = sum(
        noisy_tokens(space, [a, b], 0.2)(space.left_to_right(space.enumerate())).exp()
        for a in range(4) for b in range(4)
    )  # fmt: skip
    assert torch.allclose(total, torch.ones(16).to(total), atol=1e-6)


def test_sentences_and_brackets():
    assert len({tuple(s) for s in sentences()}) == 128
    space = sentence_space()
    assert space.encode(sentences()).max() < space.vocab
    row = given_from(space, "the _ _ that the dogs _ sleeps .")
    assert row[1:3] == (-1, -1) and row[5] == space.names.index("dogs")
    assert nested(bracket_space(4).encode([list("(())"), list("()()")])).tolist() == [True, False]


@pytest.mark.parametrize(
    "make, said",
    [
        (lambda: train_masked(bracket_space(4), torch.full((3, 4), 9)), "outside"),
        (lambda: train_masked(bracket_space(4), torch.zeros(3, 5, dtype=torch.long)), "rows of 4"),
        (lambda: noisy_tokens(bracket_space(4), [0, 1], 0.1), "give 4"),
        (lambda: noisy_tokens(bracket_space(4), [0, 1, 2, 3], 0.0), "error"),
        (lambda: given_from(bracket_space(4), "(x)_"), "'x'"),
        (lambda: tune_masked(set_posterior()), "masked prior"),
        (lambda: tune_masked(without_prior(random_posterior()), from_prior=0.5), "masked prior"),
        (lambda: Mixture(tempered=0.5, from_prior=0.7), "more than all"),
    ],
)
def test_bad_input(make, said):
    with pytest.raises(InputError, match=said) as error:
        make()
    assert "\n" not in str(error.value)


def test_a_target_with_given_tokens_trains_one_policy_for_all_problems():
    prior = random_masked(2, 3)
    target = masked_target(prior, space=type(prior.space)(2, 3, given=((-1, 1), (0, -1))))
    policy = tune_masked(target, **SMALL)
    for m in range(2):
        g = log_gamma_law(target, m)
        assert total_variation(g - g.logsumexp(0), string_law(policy, m)) < 0.03
