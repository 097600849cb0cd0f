"""HMMs as latent-variable models: forward, Baum-Welch, posterior paths and an amortized policy, against enumeration."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import retrodict as rd
from retrodict.errors import InputError
from retrodict.guides.hmm import HMM
from retrodict.latent.enumerated import distances, log_gamma_table
from retrodict.latent.hmm import (
    HiddenMarkov,
    PathGuide,
    ffbs,
    log_evidence,
    path_policy,
    posterior_paths,
    random_hmm,
    sample_paths,
)
from retrodict.numerics import total_variation
from retrodict.policies.choices import EvenChoices
from retrodict.policies.guided import GuidedPolicy
from retrodict.rng import generator
from retrodict.training.learn import Dreams, Recursive, Summable, learn
from retrodict.training.threads import one_thread


def model(m: int = 30, t: int = 4, seed: int = 5) -> HiddenMarkov:
    """Sequences of one HMM, and another to start from."""
    _, x = sample_paths(random_hmm(2, 3, seed=0, scale=2.0), m, t, generator(seed))
    return HiddenMarkov(x, random_hmm(2, 3, seed=1))


def held_out(hmm: HMM) -> float:
    """Mean log p of fresh sequences."""
    _, x = sample_paths(random_hmm(2, 3, seed=0, scale=2.0), 500, 4, generator(9))
    return float(log_evidence(hmm, x).mean())


def test_the_forward_algorithm_is_the_sum_over_paths() -> None:
    m = model()
    assert isinstance(m, Dreams) and isinstance(m, Recursive) and isinstance(m, Summable)
    assert torch.allclose(log_gamma_table(m.target).logsumexp(1), m.log_evidence(), atol=1e-11)
    silent = HMM(m.hmm.initial, m.hmm.transition.T / m.hmm.transition.T.sum(1, keepdim=True), m.hmm.emission)
    wrong = HiddenMarkov(m.x, silent)  # the planted bug: transitions read backwards
    assert float((log_gamma_table(wrong.target).logsumexp(1) - m.log_evidence()).abs().max()) > 0.05


def test_baum_welch_is_em_on_enumerated_paths_and_never_falls() -> None:
    both = [model(12), model(12)]
    told = learn(both[0], rounds=5, track=True)
    learn(both[1], rounds=5, e_step=lambda t, _: rd.exact(t))
    for name in ("initial", "transition", "emission"):
        assert torch.allclose(getattr(both[0].hmm, name), getattr(both[1].hmm, name), atol=1e-7)
    values = [r.log_evidence for r in told.rounds]
    assert all(b >= a - 1e-10 for a, b in zip(values, values[1:], strict=False))  # pyright: ignore[reportOperatorIssue, reportOptionalOperand]


def test_filtering_forwards_and_sampling_backwards_draws_the_posterior() -> None:
    m = model(2, t=3)
    n = 20_000
    z = posterior_paths(m.hmm, m.x, n, generator(1)).view(2, n, 4)
    code = (z * torch.tensor([8, 4, 2, 1])).sum(2)
    for i in range(2):
        counts = torch.bincount(code[i], minlength=16).double()
        assert total_variation(counts.log(), log_gamma_table(m.target)[i]) < 0.02
    assert torch.allclose(ffbs(3)(m.target, 0).evidence[0], m.log_evidence())  # pyright: ignore[reportOptionalSubscript]


def test_exact_paths_as_an_e_step_learn_what_baum_welch_learns() -> None:
    both = [model(150), model(150)]
    learn(both[0], rounds=10)
    learn(both[1], rounds=10, e_step=ffbs(12))
    assert held_out(both[0].hmm) > held_out(model().hmm) + 0.1
    assert abs(held_out(both[0].hmm) - held_out(both[1].hmm)) < 0.02


def test_an_amortized_policy_learns_the_paths_and_the_model() -> None:
    both = [model(60), model(60)]
    q = path_policy(both[1], hidden=32)
    before = float(distances(both[1].target, q).mean())
    with one_thread():
        told = learn(both[1], q, rounds=8, e_steps=14, draws=8, weighted=True, samples=6, per_step=12, lr=2e-2,
              threshold=(0.2, 0.2, 1), objective="vargrad")  # fmt: skip
    learn(both[0], rounds=sum(r.value is not None for r in told.rounds))
    assert float(distances(both[1].target, q).mean()) < 0.08 < 0.3 < before
    assert abs(held_out(both[0].hmm) - held_out(both[1].hmm)) < 0.02


def test_smc_with_any_policy_is_an_unbiased_particle_filter() -> None:
    m = model(2, t=5)
    t, even = m.target, EvenChoices(m.space, m.problems)
    for policy in (even, GuidedPolicy(even, t.guide)):  # pyright: ignore[reportArgumentType]
        found = rd.smc(t, policy, n=100, seed=0, runs=100)
        ratio = (found.log_z - m.log_evidence()[:, None]).exp()  # pyright: ignore[reportOptionalOperand]
        error = ratio.std(1) / 100**0.5
        assert bool(((ratio.mean(1) - 1).abs() < 4.5 * error).all()) and float(error.max()) < 0.03
    rows = rd.exact(t).objects
    assert torch.allclose(t.guide.start_at(rows, rows.n).log_p, t.log_gamma(rows), atol=1e-12)  # pyright: ignore[reportOptionalMemberAccess]
    late = replace(t, guide=PathGuide(m.hmm, m.x.roll(1, 1)))  # another guide only costs variance
    found = rd.smc(late, even, n=100, seed=0, runs=100)
    ratio = (found.log_z - m.log_evidence()[:, None]).exp()  # pyright: ignore[reportOptionalOperand]
    assert bool(((ratio.mean(1) - 1).abs() < 4.5 * ratio.std(1) / 100**0.5).all())


def test_simulated_pairs_are_of_the_model_itself() -> None:
    m = model()
    target, rows = m.simulate(4000, generator(0))
    share = torch.bincount(rows.moves[:, 0], minlength=2).double() / 4000
    assert torch.allclose(share, m.hmm.initial, atol=0.03)
    fits = target.log_gamma(rows).mean()
    broken = target.log_gamma(replace(rows, moves=rows.moves.roll(1, 0))).mean()  # the planted bug: z of another x
    assert float(fits - broken) > 0.1


def test_bad_sequences_are_named() -> None:
    hmm = random_hmm(2, 3)
    with pytest.raises(InputError, match="sequence 1 has symbol 3, and the model emits 0 to 2"):
        HiddenMarkov(torch.tensor([[0, 1], [2, 3]]), hmm)
    m = model()
    with pytest.raises(InputError, match="sequence 0 has 2 symbols, not 4"):
        m.target.on([rd.Problem((), row={"symbols": (0, 1)})])
    with pytest.raises(InputError, match="has symbol 7"):
        m.target.on([rd.Problem((), row={"symbols": (0, 1, 7, 1)})])
