"""Variational autoencoders against exact sums over codes and quadrature over the plane."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

import retrodict as rd
from retrodict.diagnostics.bounds import elbo, iwae_lower
from retrodict.errors import InputError
from retrodict.latent.data import data_problems
from retrodict.latent.discrete_vae import DiscreteVAE, encoder
from retrodict.latent.enumerated import distances, log_gamma_table, log_law
from retrodict.latent.images import bars, blobs
from retrodict.latent.vae import REACH, VAE, bound, fit_elbo, grid
from retrodict.policies.net import NetPolicy
from retrodict.rng import generator
from retrodict.training.learn import learn
from retrodict.training.threads import one_thread


@pytest.fixture(autouse=True)
def _one():
    with one_thread():
        yield


def discrete(n: int = 12, sizes: tuple[int, ...] = (2, 3, 2), gain: float = 2.0, **given) -> DiscreteVAE:
    """A model whose decoder and prior are far from flat."""
    model = DiscreteVAE(bars(n, 3, seed=1), sizes, **given)
    gen = generator(3)
    for w in model.parameters().values():
        w.data += gain * 0.3 * torch.randn(w.shape, generator=gen)
    return model


# -- codes ----------------------------------------------------------------------------------------------------------


def test_the_sum_over_codes_is_that_of_the_target():
    model = discrete()
    exact = rd.exact(model.target).log_z.squeeze(1)
    assert torch.allclose(model.log_evidence(), exact, atol=1e-4)
    row = model.codes.take(torch.tensor([5]))
    f = model.decoder.log_odds(model.embed(row))[0]
    by_hand = sum(math.log(torch.sigmoid(a if x == 1 else -a).item()) for a, x in zip(f, model.images[0], strict=True))
    assert float(model.target.factors["likelihood"](row)) == pytest.approx(by_hand, abs=1e-4)
    assert float(model.log_prior(model.embed(model.codes)).detach().exp().sum()) == pytest.approx(1, abs=1e-5)


def test_exact_steps_climb_log_p_of_x():
    """Fisher's identity: at the exact posterior the gradient of M is that of log p(x)."""
    model, other = (discrete(m_steps=1, lr=1e-8) for _ in range(2))
    model.exact_step()
    z = other.embed(other.codes)
    f = other.decoder.log_odds(z)
    joint = other.images @ f.T - torch.nn.functional.softplus(f).sum(1) + other.log_prior(z)
    (-joint.logsumexp(1).mean()).backward()
    for name, w in model.parameters().items():
        assert torch.allclose(w.grad, other.parameters()[name].grad, atol=1e-5), name


def test_an_m_step_on_weighted_codes_is_the_exact_one():
    model, other = discrete(), discrete()
    model.exact_step()
    particles = rd.exact(other.target)
    other.m_step(particles)
    for name, w in model.parameters().items():
        assert torch.allclose(w, other.parameters()[name], atol=1e-3), name
    ignored = discrete()  # planted: weights left out
    ignored.m_step(replace(particles, log_w=torch.zeros_like(particles.log_w)))
    assert max(float((w - model.parameters()[k]).detach().abs().max()) for k, w in ignored.parameters().items()) > 0.05


class PerStep(NetPolicy):
    """Planted, as in the code released with GFlowNet-EM: log q is divided by the number of moves before TB."""

    def score(self, rollouts, raw=False, grad=False):
        scores = super().score(rollouts, raw, grad)
        return replace(scores, log_q=scores.log_q / rollouts.n[:, None])


def trained(kind: type[NetPolicy], model: DiscreteVAE) -> NetPolicy:
    policy = kind(model.space, model.problems, hidden=32, layers=1)
    rd.amortize(model.target, policy, objective="tb", steps=60, samples=24, lr=4e-2, lr_log_z=0.3, clip=10.0,
                tempered=0.5, temperatures=(1.0, 1.0), epsilon=0.3, evaluate=1)  # fmt: skip
    return NetPolicy(model.space, model.problems, policy.net)


def test_tb_reaches_the_posterior_and_a_log_q_divided_by_its_steps_does_not():
    model = discrete(4, (2, 2, 2), gain=0.7)
    assert float(distances(model.target, trained(NetPolicy, model)).mean()) < 0.04
    wrong = trained(PerStep, model)
    far = float(distances(model.target, wrong).mean())
    sharper = (3 * log_gamma_table(model.target)).softmax(1)  # where it goes: gamma to the power of the steps
    assert far > 0.2
    assert float((sharper - log_law(model.target, wrong).exp()).abs().sum(1).mean() / 2) < far / 2


def test_a_factorised_encoder_has_independent_codes():
    model = discrete(5, (2, 3))
    for kind, independent in (("factorised", True), ("autoregressive", False)):
        q = encoder(model, kind)
        for w in q.parameters().values():
            w.data += 0.3 * torch.randn(w.shape, generator=generator(1))
        law = log_law(model.target, q).exp().view(5, 2, 3)
        product = law.sum(2, keepdim=True) * law.sum(1, keepdim=True)
        assert (float((law - product).abs().max()) < 1e-6) == independent
    with pytest.raises(InputError, match="unknown encoder 'mean'"):
        encoder(model, "mean")


def test_learning_by_wake_sleep_raises_log_p_of_x():
    model = DiscreteVAE(bars(60, 3, seed=1), (2, 2), m_steps=5)
    before = float(model.log_evidence().mean())
    q = encoder(model)
    learn(model, q, rounds=6, e_steps=3, draws=4, objective="vargrad", samples=4, per_step=16, lr=1e-2, sleep=0.25,
          dreams=64)  # fmt: skip
    assert float(model.log_evidence().mean()) > before + 0.2
    best = DiscreteVAE(bars(60, 3, seed=1), (2, 2), m_steps=5)
    learn(best, rounds=6)
    assert float(best.log_evidence().mean()) > float(model.log_evidence().mean()) - 0.05


def test_dreams_are_images_of_the_model():
    model = discrete()
    target, rows = model.simulate(4000, generator(0))
    z = model.embed(model.codes)
    mean = (model.log_prior(z).exp() @ model.decoder.log_odds(z).sigmoid()).detach()
    seen = torch.tensor([p.row["features"] for p in target.problems]).mean(0)
    assert float(((seen - mean) / (mean * (1 - mean) / 4000).sqrt()).abs().max()) < 4.5
    assert rows.problem.tolist() == list(range(4000))


# -- the plane ------------------------------------------------------------------------------------------------------


def test_quadrature_is_exact_where_the_answer_is_known():
    model = VAE(blobs(5, 3, seed=1))
    for name, w in model.parameters().items():
        if name.endswith("weight"):
            w.data.zero_()  # the image does not depend on z
    f = model.decoder.net.parameters["out.bias"].data.normal_(generator=generator(0))
    known = (model.images * f - torch.nn.functional.softplus(f)).sum(1).double()
    assert torch.allclose(model.quadrature(model.images), known, atol=1e-5)
    z, log_w = grid(100)
    assert float(log_w.exp().sum()) == pytest.approx(1, abs=1e-6) and float(z.max()) < REACH
    with pytest.raises(InputError, match="2 points or more"):
        VAE(blobs(5, 3), cells=1)


def test_quadrature_agrees_with_importance_sampling_and_bounds_lie_below():
    model = VAE(blobs(4, 3, seed=1), seed=2)
    truth = model.quadrature(model.images)
    particles = rd.importance(model.target, n=2000, runs=8, seed=0)  # from the prior
    value, se = particles.evidence
    assert float(((value - truth) / se).abs().max()) < 4.5
    q = model.encoder(seed=1)
    particles = rd.importance(model.target, q, n=1000, runs=1, seed=1)
    one, many = elbo(particles.log_w), iwae_lower(particles.log_w.view(4, -1, 50))
    assert one.value < many.value < float(truth.mean()) + 0.01
    value = bound(model, q, torch.arange(4), generator(2), samples=4000).detach().double()
    assert torch.allclose(value, torch.tensor(one.per_problem).double(), atol=0.1)  # closed-form KL, pathwise draws


def test_vargrad_and_the_pathwise_bound_both_train_the_encoder():
    model = VAE(blobs(40, 3, seed=1), seed=2)
    truth = float(model.quadrature(model.images).mean())

    def gap(q):
        return truth - elbo(rd.importance(model.target, q, n=100, runs=1, seed=1).log_w).value

    q = model.encoder(hidden=16)
    before = gap(q)
    rd.amortize(model.target, q, objective="vargrad", steps=40, samples=8, per_step=40, lr=1e-2, evaluate=1)
    assert gap(q) < 0.5 * before
    text = VAE(blobs(40, 3, seed=1), seed=2)
    seen = fit_elbo(text, text.encoder(), steps=60, batch=40, lr=1e-2)
    assert sum(seen[-5:]) / 5 > seen[0] + 0.3
    assert float(text.quadrature(text.images).mean()) > truth + 0.3


def test_exact_em_on_the_grid_raises_log_p_of_x():
    model = VAE(blobs(40, 3, seed=1), m_steps=1, lr=2e-3)
    told = [r.log_evidence for r in learn(model, rounds=6, track=True).rounds]
    assert all(b > a for a, b in zip(told, told[1:], strict=False))
    assert VAE(blobs(40, 3)).simulate(3, generator(0))[1].moves.shape == (3, 1, 2)


# -- bad input ------------------------------------------------------------------------------------------------------


def test_bad_images_are_refused_in_one_line():
    model = DiscreteVAE(bars(4, 3), (2, 2))
    with pytest.raises(InputError, match="problem 0 has 16 pixels in row.*, and the model's have 9"):
        model.of(data_problems(bars(2, 4)))
    with pytest.raises(InputError, match="these images have 16 pixels, and the model's 9"):
        model.log_evidence(bars(2, 4))
    with pytest.raises(InputError, match="1 of 4 images hold pixels other than 0 and 1, first image 2"):
        images = bars(4, 3)
        images[2, 0] = math.nan
        DiscreteVAE(images)
    with pytest.raises(InputError, match="too large to enumerate"):
        DiscreteVAE(bars(4, 3), (8, 8, 8, 8, 8))
    with pytest.raises(InputError, match="an M-step needs"):
        DiscreteVAE(bars(4, 3), (2,), m_steps=0)
