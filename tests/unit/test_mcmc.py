"""Markov chain samplers beyond their exactness gates: p^alpha, blocks, ladders, starts, noisy scores, refusals."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import pytest
import torch

import retrodict as rd
import retrodict.models.load as door
from retrodict.cli.main import main
from retrodict.numerics import NEG_INF
from retrodict.policies.awrs import AWRS
from retrodict.policies.base import rollout
from retrodict.policies.tempered import TemperedPolicy
from retrodict.rng import generator
from retrodict.samplers.annealed import annealed
from retrodict.samplers.common import log_b_of, proposal, rows_for
from retrodict.samplers.mh.block import Block
from retrodict.samplers.mh.chains import begin, under, weighed
from retrodict.samplers.mh.kernels import BLOCK, KERNELS, SUFFIX
from retrodict.samplers.pimh import one_each, pimh
from retrodict.samplers.power import power
from retrodict.samplers.tempering import ladder, log_swap, tempering
from retrodict.spaces.tools import Tool
from retrodict.targets.predicate import predicate
from retrodict.testing import cases, check_policy, enumerate_target, evidence_gates, invariance, law_gates, transition
from retrodict.testing.mcmc import CountlessBlock, log_rung
from retrodict.testing.targets import TableGuide

CASES = {c.name: c for c in cases()}


def two_letters() -> rd.TabularLM:
    """p(aa, ab, ba, bb) = (0, .4, .3, .3) after a full stop."""
    rows = torch.tensor([[0.0, 1, 0], [0.5, 0.5, 0], [0.4, 0.6, 0], [0.4, 0.6, 0]], dtype=torch.float64)
    return rd.TabularLM(rows.log(), 1, "ab.")


def story(limit: str = "own_stop", tokens: int = 3) -> rd.Target:
    lm = rd.TabularLM.random(".ab ", order=3, seed=1)
    return rd.infill(lm, "ab", "ba", stop=".", max_tokens=tokens, limit=limit, join="")


def shared(x: tuple[int, ...], y: tuple[int, ...]) -> int:
    """How many of the first entries agree."""
    differs = (i for i, (a, b) in enumerate(zip(x, y, strict=False)) if a != b)
    return next(differs, min(len(x), len(y)))


def holds(gates: list) -> None:
    assert all(g.holds for g in gates), gates


# -- p^alpha -------------------------------------------------------------------------------------------------------


def test_token_temperature_is_not_the_power_of_the_sequence():
    lm, four = two_letters(), 4.0
    target = rd.of_length(lm, ".", tokens=2, stop=None) ** four
    (exact,) = enumerate_target(target, local := TemperedPolicy(target.prior, 1 / four))
    first_a = torch.tensor([key[0] == 0 for key in exact.keys])
    assert float((exact.gamma / exact.z)[first_a].sum()) == pytest.approx(0.6124, abs=1e-4)
    assert float(exact.law(exact.log_q)[first_a].sum()) == pytest.approx(0.1649, abs=1e-4)
    p = rd.mh(target, local, n=2000, steps=60, keep=1, seed=0)  # leaves 1 in 250 of the start
    holds(law_gates([exact], p, [exact.gamma / exact.z]))


@pytest.mark.parametrize("temperature", [0.25, 2.0])
@pytest.mark.parametrize("name", ["two stops, likelihood^0.5", "until, force", "sets"])
def test_tempered_policy_keeps_the_laws_of_a_policy(name, temperature):
    base = proposal(CASES[name].target, CASES[name].policy)
    policy = TemperedPolicy(base, temperature)
    check_policy(policy)
    cool = rollout(base, torch.zeros(40, dtype=torch.long), generator(3), behaviour={"temperature": temperature})
    same = rollout(policy, torch.zeros(40, dtype=torch.long), generator(3))
    assert torch.equal(cool.moves, same.moves) and torch.allclose(cool.log_b, same.log_b)
    assert name == "sets" or not torch.allclose(
        cool.log_q, same.log_q
    )  # a behaviour leaves log q alone, a policy is its density


def test_tempered_policy_is_known_as_the_prior():
    target = story()
    policy = TemperedPolicy(target.prior, 0.5)
    p = rd.importance(target, policy, n=32, seed=0, runs=2)
    assert p.objects.terms["prior"].dim() == 3  # read off the drawing pass, not scored again
    anew = target.prior.score(p.objects, raw=True)
    assert torch.isfinite(anew.log_q).all()
    with pytest.raises(rd.InputError, match="temperature must be positive, not 0"):
        TemperedPolicy(target.prior, 0.0)


def test_power_is_mh_on_the_tempered_sequence():
    lm = rd.TabularLM.random(".ab", order=2, seed=4)
    how = {"stop": ".", "max_tokens": 3, "limit": "own_stop"}
    target = rd.continuation(lm, "a", temperature=1 / 3, **how)
    p = power(lm, "a", alpha=3.0, n=3000, steps=8, seed=0, **how)
    exact = enumerate_target(target)
    holds(law_gates(exact, p, [exact[0].gamma / exact[0].z]))
    with pytest.raises(rd.InputError, match="alpha must be positive"):
        power(lm, "a", alpha=0.0, n=4, seed=0)


# -- block moves -----------------------------------------------------------------------------------------------------


def test_blocks_are_counted():
    for n, width in itertools.product(range(6), range(1, 5)):
        blocks = [(i, j) for i in range(n + 1) for j in range(i, n + 1) if j - i <= width]
        got = Block(width).log_count(torch.tensor([n])).exp()
        assert float(got) == pytest.approx(len(blocks))


@pytest.mark.parametrize("name", ["two stops, likelihood^0.5", "until, own_stop", "another model proposes", "sets"])
@pytest.mark.parametrize("width", [1, 3])
def test_block_kernel_leaves_the_posterior_alone(name, width):
    case = CASES[name]
    policy = proposal(case.target, case.policy)
    for exact in enumerate_target(case.target, case.policy):
        assert invariance(policy, exact, transition(policy, exact, Block(width))) < 1e-10
        assert invariance(policy, exact, transition(policy, exact, CountlessBlock(width))) > 1e-4


def test_block_moves_keep_both_sides_and_score_as_the_policy_does():
    target = story("force", 8)
    policy = proposal(target, None)
    now = begin(target, policy, rows_for(target, 400, torch.device("cpu")), generator(0), None)
    new, back = BLOCK.propose(target, policy, now.rows, generator(1))
    changed, inner = 0, 0
    for old, z, ratio in zip(target.space.keys(now.rows), target.space.keys(new), back.tolist(), strict=True):
        if old == z:
            continue
        left, right = shared(old, z), shared(old[::-1], z[::-1])
        changed += ratio > NEG_INF
        inner += right > 1  # more than the stop is kept
        assert max(len(old), len(z)) - left - right <= BLOCK.width
    assert changed > 200 and inner > 50
    again = weighed(target, under(target, policy, new))
    assert torch.allclose(log_b_of(new), again.log_q)
    assert torch.allclose(target.log_gamma(new), again.log_gamma)


def test_block_kernel_reaches_every_stop():
    case = CASES["two stops, likelihood^0.5"]
    exact = enumerate_target(case.target)
    p = rd.mh(case.target, n=600, steps=25, keep=1, kernel="block", seed=0)
    holds(law_gates(exact, p, [exact[0].gamma / exact[0].z]))


def test_block_kernel_refuses_what_a_tool_wrote():
    lm = rd.TabularLM.random(".=a1", order=2, seed=0)
    target = rd.posterior(lm, [rd.TextProblem("a", name="t", chat=False)], stop=".", max_tokens=6,
                          tool=Tool(lambda text: "1", trigger="=", room=3))  # fmt: skip
    with pytest.raises(rd.InputError, match="use kernel='suffix'"):
        rd.mh(target, n=64, steps=2, kernel="block", seed=0)


# -- ladders ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inverted", [False, True])
def test_swaps_leave_the_product_law_alone(inverted):
    """Three rungs of a target with seven objects: the swap of either pair, on all 343 joint states."""
    lm = rd.TabularLM.random(".ab", order=2, seed=2)
    target = rd.infill(lm, "a", "b", stop=".", max_tokens=2, limit="own_stop", join="")
    (exact,) = enumerate_target(target)
    log_w = exact.log_gamma - exact.log_q
    levels = ladder(2)
    laws = [torch.softmax(log_rung(exact, float(b)), 0) for b in levels]
    joint = torch.einsum("i,j,k->ijk", *laws).flatten()
    count = len(log_w)
    states = torch.cartesian_prod(*[torch.arange(count)] * 3)
    number = lambda s: (s * torch.tensor([count * count, count, 1])).sum(1)  # noqa: E731
    for low in (0, 1):
        x, y = states[:, low], states[:, low + 1]
        ratio = log_swap(log_w[x], log_w[y], levels[low, None], levels[low + 1, None])
        accept = (-ratio if inverted else ratio).clamp_max(0.0).exp()
        swapped = states.clone()
        swapped[:, low], swapped[:, low + 1] = y, x
        matrix = torch.zeros(count**3, count**3, dtype=torch.float64)
        matrix.index_put_((number(states), number(swapped)), accept, accumulate=True)
        matrix.index_put_((number(states), number(states)), 1 - accept, accumulate=True)
        off = float((joint @ matrix - joint).abs().max())
        assert off > 1e-3 if inverted else off < 1e-10


def test_swaps_with_dead_states():
    dead, b = torch.tensor([NEG_INF, -1.0, NEG_INF]), torch.zeros(3).double()
    other = torch.tensor([-1.0, NEG_INF, NEG_INF])
    ratio = log_swap(dead.double(), other.double(), b, b + 1)  # rungs 0 and 1: the upper one may not hold a dead state
    assert ratio[0] == NEG_INF and ratio[1] == 0 and ratio[2] == NEG_INF


def test_tempering_converges_from_the_policy():
    exact = enumerate_target(target := story())
    p = tempering(target, n=600, steps=25, rungs=4, keep=1, seed=0)
    holds(law_gates(exact, p, [exact[0].gamma / exact[0].z]))
    assert 0.1 < p.trace.counts["swapped"] / p.trace.counts["swaps"] < 1
    assert p.evidence is None and p.chains == 600


def test_one_rung_of_annealing_is_importance_sampling():
    target = story("own_stop", 4)
    one = annealed(target, n=20, seed=3, runs=3, rungs=1)
    plain = rd.importance(target, n=20, seed=3, runs=3)
    assert torch.allclose(one.log_z, plain.log_z) and torch.allclose(one.log_w, plain.log_w)
    assert not one.trace.resampled.any()


def test_annealing_beats_importance_sampling_run_by_run():
    """Same draws of the prior at the start; the evidence of a likelihood of some 20 nats."""
    lm = rd.TabularLM.random(". abcd", order=2, seed=1)
    target = rd.infill(lm, "ab", "cadab", stop=".", max_tokens=6, join="")
    truth = rd.exact(target).log_z[0, 0]
    lead = annealed(target, n=32, seed=0, runs=20, rungs=6)
    plain = rd.importance(target, n=32, seed=0, runs=20)
    assert (lead.log_z - truth).square().mean() < (plain.log_z - truth).square().mean()
    assert lead.trace.ess.shape == (6, 20) and lead.trace.roots.shape == (20,)
    assert lead.trace.ancestors.shape == (6, 20, 32)


def test_ladder():
    assert ladder(4).tolist() == [0.0, 1 / 16, 0.25, 9 / 16, 1.0]
    for call, said in [(lambda: tempering(story(), n=2, seed=0, rungs=1), "at least 2 rungs"),
                       (lambda: annealed(story(), n=2, seed=0, rungs=0), "rungs must be at least 1"),
                       (lambda: annealed(story(), n=2, seed=0, resampling="no"), "unknown resampling"),
                       (lambda: annealed(story(), n=2, seed=0, kernel="blok"), "did you mean 'block'"),
                       (lambda: annealed(story(), n=2, seed=0, ess_threshold=2.0), "between 0 and 1")]:  # fmt: skip
        with pytest.raises(rd.InputError, match=said):
            call()


def test_ladders_over_a_density_that_is_estimated():
    """A constraint that is only a test has tokens drawn by weighted rejection, whose density is an estimate."""
    lm = rd.TabularLM.random(".ab ", order=3, seed=1, scale=0.7)
    plain = rd.infill(lm, "a", "b", stop=".", max_tokens=2, limit="own_stop", join="", lookahead=None)

    def short(texts: list[str], rows: list) -> list[bool]:
        return ["aa" not in t and "bb" not in t for t in texts]

    target = plain * predicate(short, short)
    assert isinstance(proposal(target, None), AWRS)
    exact = enumerate_target(target)
    holds(evidence_gates(exact, lambda runs, seed: annealed(target, n=8, runs=runs, seed=seed, rungs=2), 100))
    p = tempering(target, n=400, steps=12, rungs=3, keep=1, seed=0)
    holds(law_gates(exact, p, [exact[0].gamma / exact[0].z]))
    with pytest.raises(rd.InputError, match="only a test estimates it"):
        rd.mh(target, n=4, steps=1, kernel="block", seed=0)


# -- starts ----------------------------------------------------------------------------------------------------------


def test_chains_start_from_weighted_particles():
    target = story("own_stop", 4)
    exact = enumerate_target(target)
    start = rd.smc(target, n=500, runs=8, seed=0)
    p = rd.mh(target, n=2000, steps=1, keep=1, kernel="suffix", seed=0, start=start)
    assert p.k == 2000
    found = {key: w for key, w in p.counts().items() if w > 0.05}
    truth = dict(zip(exact[0].keys, (exact[0].gamma / exact[0].z).tolist(), strict=True))
    assert found and all(abs(w - truth[key]) < 0.05 for key, w in found.items())  # one step from the policy is far off
    cold = rd.mh(target, n=2000, steps=1, keep=1, seed=0)
    worst = max(truth, key=truth.get)
    assert abs(cold.counts().get(worst, 0.0) - truth[worst]) > abs(p.counts()[worst] - truth[worst])


def test_a_start_is_scored_under_the_policy_whoever_drew_it():
    """SMC's record holds the density of its bent proposal; taken for the prior's, it would bias every step."""
    target = story("own_stop", 4)
    bent = target.with_guide(TableGuide(target.space))
    drawn = rd.smc(bent, n=300, runs=1, seed=0).objects
    policy = proposal(target, None)
    now = begin(target, policy, rows_for(target, 300, torch.device("cpu")), generator(0), drawn)
    assert not torch.allclose(log_b_of(drawn), log_b_of(now.rows))
    plain = policy.score(drawn)
    whole = torch.where(torch.arange(drawn.moves.shape[1]) < drawn.n[:, None], plain.log_q, 0.0).sum(1)
    whole = whole + plain.log_stop[torch.arange(300), drawn.n, drawn.stop]
    assert torch.allclose(now.log_q, whole)
    junk = replace(drawn, log_b=drawn.log_b - 3.0, log_q=drawn.log_q - 3.0, terms={})
    one = rd.mh(target, n=300, steps=5, seed=1, start=drawn)
    two = rd.mh(target, n=300, steps=5, seed=1, start=junk)
    assert one.keys == two.keys and torch.allclose(one.objects.terms["prior"], two.objects.terms["prior"])


def test_starts_that_cannot_be_used():
    target = story()
    rows = rd.smc(target, n=6, runs=1, seed=0)
    with pytest.raises(rd.InputError, match="one row a chain"):
        rd.mh(target, n=5, seed=0, start=rows.objects)
    with pytest.raises(rd.InputError, match="every weight is zero"):
        rd.mh(target, n=5, seed=0, start=replace(rows, log_w=torch.full_like(rows.log_w, NEG_INF)))
    many = CASES["batch of problems"].target
    with pytest.raises(rd.InputError, match="start holds 1 problems and the target 3"):
        rd.mh(many, n=5, seed=0, start=rows)
    long = [i for i, text in enumerate(rows.shown) if "aa" in text or "ab" in text or "ba" in text or "bb" in text]
    with pytest.raises(rd.InputError, match="cannot be drawn by the policy"):
        rd.mh(target * rd.short_words(1), n=1, seed=0, start=rows.objects.take(torch.tensor(long[:1])))


# -- particle-independent MH -----------------------------------------------------------------------------------------


def test_pimh_takes_the_bias_of_small_populations_away():
    """Two particles a run are far from the posterior; chains of such runs are not."""
    target = story("own_stop", 4)
    exact = enumerate_target(target)
    law = exact[0].gamma / exact[0].z
    p = pimh(target, n=2, runs=600, steps=15, keep=1, seed=0)
    holds(law_gates(exact, p, [law]))
    few = rd.smc(target, n=2, runs=4000, seed=0)
    rows, log_z = one_each(few, generator(0))
    assert len(rows) == 4000 and torch.equal(log_z, few.log_z.flatten())
    held = replace(p, objects=rows, keys=tuple(target.space.keys(rows)), log_w=torch.zeros(1, 4000))
    assert not all(g.holds for g in law_gates(exact, held, [law]))
    assert p.evidence is None and p.chains == 600


def test_pimh_where_runs_die_out():
    case = CASES["including, own_stop"]
    target = replace(case.target, guide=None)
    p = pimh(target, n=2, runs=50, steps=20, keep=2, seed=0)
    alive = p.log_w[0] > NEG_INF
    assert 0 < int(alive.sum()) <= 100 and bool(torch.isfinite(p.log_w[0][alive]).all())


# -- noisy scores ----------------------------------------------------------------------------------------------------


def test_a_score_noisy_in_its_logarithm_is_said():
    class Shaky:
        name, noise, version, prefixes = "shaky", "log", "1", False
        gen = generator(0)

        def __call__(self, rollouts: rd.Rollouts, every_prefix: bool = False) -> torch.Tensor:
            return torch.randn(len(rollouts), generator=self.gen, dtype=torch.float64)

    plain = story()
    target = replace(plain, factors={**plain.factors, "shaky": Shaky()}, betas={**plain.betas, "shaky": 1.0})
    p = rd.mh(target, n=4, steps=2, seed=0)
    assert any("E[exp(estimate)]" in note for note in p.trace.notes)
    kept = p.objects.terms["shaky"]
    assert torch.equal(target.terms(p.objects).terms["shaky"], kept)  # what was accepted with is kept


# -- the table and the command line ---------------------------------------------------------------------------------


def test_kernels_by_name():
    assert KERNELS["suffix"] is SUFFIX and KERNELS["block"] is BLOCK
    with pytest.raises(rd.InputError, match="did you mean 'suffix'"):
        rd.mh(story(), n=2, seed=0, kernel="sufix")


@pytest.mark.parametrize("words", [
    ["annealed", "--rungs", "3", "--runs", "2", "--kernel", "block"],
    ["tempering", "--rungs", "3", "--steps", "4", "--keep", "2"], ["pimh", "--steps", "3", "--runs", "2"],
])  # fmt: skip
def test_command_line(words, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(door, "load", lambda name, **how: rd.TinyLM(".abcde", seed=1))
    target = ["--target", "infill", "--before", "abc", "--after", "de", "--join", "", "--max-tokens", "4"]
    assert main(["sample", *target, "--model", "tiny", "--n", "8", "--name", "r", "--sampler", *words]) == 0
    assert json.loads(next((tmp_path / "runs").glob("*/samples.jsonl")).read_text().splitlines()[0])


def test_command_line_refuses_what_a_sampler_does_not_read(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    target = ["--target", "continuation", "--prompt", "ab", "--model", "tiny"]
    assert main(["sample", *target, "--sampler", "smc", "--rungs", "3"]) == 2
    assert "--rungs is unused: smc reads" in capsys.readouterr().err
