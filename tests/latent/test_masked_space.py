"""Masked sequences: the space, and laws of policies over it against sums over all paths."""

import math

import pytest
import torch

import retrodict as rd
from retrodict.errors import InputError
from retrodict.latent.masked_diffusion import exact_reader, log_gamma_law, masked_target, string_law
from retrodict.policies.masked import MaskedPolicy
from retrodict.records import Problem
from retrodict.rng import generator
from retrodict.spaces.enumerate import enumerate_objects
from retrodict.spaces.masked import Masked
from retrodict.testing.diffusion import object_law, random_masked, random_posterior, random_rewards


def test_every_order_leads_to_each_sequence():
    space = Masked(3, 2)
    rows = enumerate_objects(space, 0)
    keys = space.keys(rows)
    assert len(rows) == 8 * math.factorial(3) and len(set(keys)) == 8
    assert rows.log_pb.double().exp().prod(1).sum() == pytest.approx(8)
    assert (space.replay(rows, rows.n).tokens == space.tokens(rows)).all()
    assert space.tokens(space.left_to_right(space.enumerate())).tolist() == space.enumerate().tolist()


def test_what_is_seen_waits_for_whole_steps():
    space = Masked(5, 2, per_step=2)
    s, moves = space.start(torch.zeros(1, dtype=torch.long)), [0, 3, 5, 6, 8]
    for i, move in enumerate(moves):
        s = space.step(s, torch.tensor([move]))
        same = space.after(s.problem, torch.tensor([moves]), torch.tensor([i + 1]))
        assert (same.tokens == s.tokens).all() and (same.seen == s.seen).all()
        assert int(space.revealed(s.seen)) == (0, 2, 2, 4, 5)[i]


@pytest.mark.parametrize("per_step", [1, 2, 3])
@pytest.mark.parametrize("given", [(), ((-1, 1, -1),)])
def test_laws_are_sums_over_paths(per_step, given):
    space = Masked(3, 2, per_step=per_step, given=given)
    policy = MaskedPolicy(space, [Problem(())], random_masked(3, 2).net, order="learned")
    with torch.no_grad():
        policy.net.parameters["out.bias"][-3:] = torch.tensor([1.0, -1.0, 0.5])
    law = string_law(policy).exp()
    listed = object_law(policy)
    for tokens, p in zip(space.enumerate().tolist(), law.tolist(), strict=True):
        assert p == pytest.approx(listed.get((*tokens, -1), 0.0), abs=1e-6)
    assert float(law.sum()) == pytest.approx(1, abs=1e-5)


def test_one_token_a_step_is_the_exact_model_and_more_are_not():
    log_p = (3 * torch.randn(27, generator=generator(0), dtype=torch.float64)).log_softmax(0)
    found = [
        string_law(MaskedPolicy(Masked(3, 3, per_step=k), [Problem(())], exact_reader(log_p, 3))) for k in (1, 2, 3)
    ]
    assert (found[0].exp() - log_p.exp()).abs().max() < 1e-12
    alone = log_p.exp().view(3, 3, 3)
    product = torch.einsum("i,j,k->ijk", alone.sum((1, 2)), alone.sum((0, 2)), alone.sum((0, 1)))
    assert (found[2].exp() - product.flatten()).abs().max() < 1e-12
    far = [float((x.exp() - log_p.exp()).abs().sum() / 2) for x in found]
    assert far[2] > far[1] > 0.05


def test_replayed_scores_are_those_of_sampling():
    policy = MaskedPolicy(Masked(4, 3, per_step=2), [Problem(())], random_masked(4, 3).net, order="learned")
    rows = policy.sample(torch.zeros(64, dtype=torch.long), generator(0))
    assert torch.allclose(policy.score(rows).log_q, rows.log_q, atol=1e-5)


def test_samplers_agree_with_the_listed_posterior():
    target = random_posterior()
    log_z = float(log_gamma_law(target).logsumexp(0))
    exact = rd.exact(target)
    assert float(exact.log_z) == pytest.approx(log_z, abs=1e-5)
    for sampler, n in ((rd.importance, 2000), (rd.smc, 500)):
        found = sampler(target, n=n, seed=0, runs=8)
        value, error = found.evidence
        assert abs(float(value) - log_z) < 4.5 * float(error) + 1e-3
    assert float(error) < 0.1


def test_given_tokens_cost_their_probability():
    prior = random_masked(3, 3)
    space = Masked(3, 3, given=((-1, 2, -1), (0, -1, -1)))
    target = masked_target(prior, space=space)
    whole = string_law(prior)
    for m, row in enumerate(space.given):
        fits = torch.tensor(
            [all(y in (-1, x) for x, y in zip(z, row, strict=True)) for z in space.enumerate().tolist()]
        )
        assert torch.allclose(log_gamma_law(target, m)[fits], whole[fits], atol=1e-5)
        assert (log_gamma_law(target, m)[~fits] == -math.inf).all()
    drawn = rd.importance(target, n=50, seed=0).objects
    assert (space.tokens(drawn)[:200, 1] == 2).all() and (space.tokens(drawn)[200:, 0] == 0).all()
    assert len(target.on(target.problems).space.given) == 2


def test_evidence_by_importance_takes_no_backward_paths():
    prior = random_masked(3, 2)
    target = masked_target(prior, random_rewards(prior.space))
    rows = target.terms(prior.sample(torch.zeros(4000, dtype=torch.long), generator(0)))
    log_w = target.log_gamma(rows) - rows.log_q.double().sum(1)
    log_z = float(log_gamma_law(target).logsumexp(0))
    assert float(log_w.logsumexp(0)) - math.log(4000) == pytest.approx(log_z, abs=0.1)
    wrong = log_w + rows.log_pb.double().sum(1)  # planted: P_B beside a prior over paths
    assert float(wrong.logsumexp(0)) - math.log(4000) == pytest.approx(log_z - math.lgamma(4), abs=0.1)


@pytest.mark.parametrize(
    "make, said",
    [
        (lambda: Masked(0, 2), "at least 1"),
        (lambda: Masked(3, 2, per_step=4), "per_step"),
        (lambda: Masked(3, 2, given=((0, 5, 0),)), "given"),
        (lambda: Masked(2, 2, names=("a",)), "names"),
        (lambda: Masked(2, 2, names=("a", "b")).encode([["a", "c"]]), "'c'"),
        (lambda: Masked(2, 2, names=("a", "b")).encode([["a"]]), "1 tokens"),
        (lambda: Masked(30, 4).enumerate(), "too many"),
        (lambda: Masked(2, 2, given=((0, -1),)).start(torch.tensor([1])) and Masked(2, 2, given=((0, -1),)).menu(
            Masked(2, 2).start(torch.tensor([1]))), "has none"),
    ],
)  # fmt: skip
def test_bad_input_gets_one_line(make, said):
    with pytest.raises(InputError, match=said) as error:
        make()
    assert "\n" not in str(error.value)
