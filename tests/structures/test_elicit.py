"""Elicitation at d = 3, where every sum is finite: 25 graphs and 27 reports."""

import itertools
import math
import string

import pytest
import torch

from retrodict.errors import InputError
from retrodict.models.tabular import TabularLM
from retrodict.numerics import log_mean_exp, total_variation
from retrodict.objectives.residual import residual
from retrodict.records import Problem
from retrodict.rng import generator
from retrodict.spaces.dags import Dags, all_dags, graph_codes
from retrodict.spaces.enumerate import enumerate_objects
from retrodict.structures.ask import Asker
from retrodict.structures.elicit import (
    Augmented,
    Naive,
    Told,
    exact_log_r,
    naive_log_r,
    pseudo_marginal,
    uniform,
)
from retrodict.structures.mcmc_structure import apply, neighbours
from retrodict.structures.relations import APART, NONE, TOGETHER, Relations, Teller
from retrodict.targets.algebra import Target
from retrodict.testing.trained import Table

SPACE, GRAPHS, SEEN = Dags(3), all_dags(3), Relations(3, error=0.05)
LOG_LM = 2.0 * torch.randn(27, generator=generator(3), dtype=torch.float64)
EXACT = exact_log_r(uniform(GRAPHS), SEEN.law(GRAPHS), LOG_LM)
PROBLEM = [Problem((), name="graphs")]


def log_lm(codes):
    return LOG_LM[codes]


PLACE = {c: i for i, c in enumerate(graph_codes(GRAPHS).tolist())}


def place(graphs):
    """The number of each graph among the 25."""
    return torch.tensor([PLACE[c] for c in graph_codes(graphs).tolist()])


def share(graphs, weights):
    """log share of each of the 25 graphs."""
    return torch.zeros(25).double().index_add(0, place(graphs), weights).log()


def test_what_a_graph_lets_one_see():
    clean = Relations(3, error=0.0)
    law = clean.law(GRAPHS)
    assert torch.allclose(law.exp().sum(1), torch.ones(25).double())
    empty = law[0].exp()
    assert empty[clean.code(torch.tensor([NONE, NONE, NONE]))] == 1.0
    chain = torch.tensor([[0, 1, 0], [0, 0, 1], [0, 0, 0]]).bool()  # 0 -> 1 -> 2: signs multiply
    fork = torch.tensor([[0, 0, 0], [1, 0, 1], [0, 0, 0]]).bool()
    collider = torch.tensor([[0, 1, 0], [0, 0, 0], [0, 1, 0]]).bool()
    p = clean.law(torch.stack([chain, fork, collider])).exp()
    told = clean.code(torch.tensor([[TOGETHER, APART, APART], [TOGETHER, NONE, APART]]))
    assert torch.allclose(p[:, told], torch.tensor([[0.25, 0.0], [0.25, 0.0], [0.0, 0.25]]).double())
    assert torch.equal(SEEN.reports(SEEN.code(SEEN.reports(torch.arange(27)))), SEEN.reports(torch.arange(27)))


def test_draws_follow_the_law():
    graphs = GRAPHS[[0, 7, 20]]
    codes = SEEN.draw(graphs, 20_000, generator(1))
    law = SEEN.law(graphs).exp()
    for row, p in zip(codes, law, strict=True):
        freq = torch.bincount(row, minlength=27).double() / 20_000
        assert ((freq - p).abs() <= 4.5 * (p * (1 - p) / 20_000).sqrt() + 1e-4).all()


def test_the_expected_logarithm_is_exact():
    law, zero = SEEN.law(GRAPHS), uniform(GRAPHS)
    one = naive_log_r(zero, law, LOG_LM, 1)
    torch.testing.assert_close(one, (law.exp() * LOG_LM).sum(1), rtol=0, atol=1e-11)
    want = torch.zeros(25).double()
    for a, b in itertools.product(range(27), repeat=2):
        mean = torch.logaddexp(LOG_LM[a], LOG_LM[b]) - math.log(2)
        want += (law[:, a] + law[:, b]).exp() * mean
    torch.testing.assert_close(naive_log_r(zero, law, LOG_LM, 2), want, rtol=0, atol=1e-11)
    torch.testing.assert_close(naive_log_r(zero, law, LOG_LM + 300.0, 2), want + 300.0, rtol=0, atol=1e-9)


def test_the_naive_form_is_low_and_less_so_with_more_draws():
    found = [naive_log_r(uniform(GRAPHS), SEEN.law(GRAPHS), LOG_LM, k) for k in (1, 4, 16, 64, 4096)]
    for few, many in itertools.pairwise([*found, EXACT]):
        assert (few <= many + 1e-12).all()
    far = [total_variation(x, EXACT) for x in found]
    assert far == sorted(far, reverse=True) and far[0] > 0.1 and far[-1] < 1e-3


def test_importance_reads_the_estimate_linearly_and_is_unbiased_at_one_draw():
    term = Naive(SPACE, SEEN, log_lm, 1, generator(2))
    total = torch.zeros(25).double()
    for _ in range(1000):
        total += term.log_hat(GRAPHS).exp()
    assert term.noise == "linear" and total_variation((total / 1000).log(), EXACT) < 0.025


def test_the_augmented_form_marginalises_to_the_exact_sum():
    space = Told(3, n_stops=27)
    target = Target(space, PROBLEM, {"elicited": Augmented(space, SEEN, LOG_LM)})
    paths = enumerate_objects(space, 0)
    assert len({tuple(k) for k in space.keys(paths)}) == 25 * 27
    mass = (target.log_gamma(paths) + paths.log_pb.double().sum(1)).softmax(0)
    at = place(space.graphs(paths))
    found = torch.zeros(25).double().index_add(0, at, mass)
    torch.testing.assert_close(found, EXACT.softmax(0), rtol=0, atol=1e-12)
    every = target.log_gamma(paths, every_prefix=True)
    torch.testing.assert_close(every[torch.arange(len(paths)), paths.n, paths.stop], target.log_gamma(paths))
    alone = torch.zeros(25).double().index_add(0, at, target.log_gamma(paths).softmax(0))
    assert (alone - EXACT.softmax(0)).abs().sum() / 2 > 0.1  # planted: P_B left out


def test_objectives_are_at_rest_at_the_augmented_posterior():
    space = Told(3, n_stops=27)
    target = Target(space, PROBLEM, {"elicited": Augmented(space, SEEN, LOG_LM)})
    policy, paths = Table(space, PROBLEM, 9), enumerate_objects(space, 0)
    flow = torch.zeros_like(policy.logits)
    node, rows = policy.at(paths), torch.arange(len(paths))
    mass = (target.log_gamma(paths) + paths.log_pb.double().sum(1)).exp()
    for t in range(paths.moves.shape[1]):
        on = rows[paths.n > t]
        flow.index_put_((node[on, t], paths.moves[on, t]), mass[on], accumulate=True)
    flow.index_put_((node[rows, paths.n], 9 + paths.stop), mass, accumulate=True)
    policy.logits = flow.log()
    a, mask, _ = residual(policy.score(paths), paths, target.log_gamma(paths, every_prefix=True))
    torch.testing.assert_close(a[mask], EXACT.logsumexp(0).expand(int(mask.sum())), rtol=0, atol=1e-9)
    assert mask.shape[2] == 27


def test_the_chain_on_graphs_and_reports_is_balanced():
    """One draw of D a graph: the kernel on (G, D), enumerated, leaves R(G, D) as it is."""
    moves = neighbours(GRAPHS).flatten(1)
    n = moves.sum(1).double()
    go = torch.zeros(25, 25).double()
    i, move = moves.nonzero().unbind(1)
    go.index_put_((i, place(apply(GRAPHS[i], move))), 1 / n[i], accumulate=True)
    law, lm = SEEN.law(GRAPHS).exp(), LOG_LM.exp()
    ratio = (lm[None, None, None, :] / lm[None, :, None, None]) * (n[:, None, None, None] / n[None, None, :, None])
    full = (go[:, None, :, None] * law[None, None] * ratio.clamp_max(1.0)).reshape(25 * 27, 25 * 27)
    full = full + torch.diag(1 - full.sum(1))
    sigma = (law * lm).flatten() / (law * lm).sum()
    assert (sigma @ full - sigma).abs().max() < 1e-12
    torch.testing.assert_close(sigma.view(25, 27).sum(1), EXACT.softmax(0), rtol=0, atol=1e-12)


def one(graphs, gen):
    return log_lm(SEEN.draw(graphs, 1, gen)).squeeze(1)


def test_pseudo_marginal_chains_keep_their_estimate():
    found = pseudo_marginal(SPACE, one, chains=256, steps=240, burn_in=60, seed=4)
    far = total_variation(share(found.graphs, found.weights), EXACT)
    wrong = total_variation(redrawn(256, 240, 60), EXACT)
    assert far < 0.06 < 0.08 < wrong and 0.1 < found.counts["acceptance"] < 0.9, (far, wrong)
    low, high = found.interval()
    p = (EXACT.softmax(0)[:, None, None] * GRAPHS).sum(0)
    assert (low - 0.03 <= p).all() and (p <= high + 0.03).all()


def redrawn(chains, steps, burn_in):
    """Planted: the present graph's estimate is drawn anew at every step (Monte Carlo within Metropolis)."""
    gen, total = generator(5), torch.zeros(25).double()
    now = torch.zeros(chains, 3, 3, dtype=torch.bool)
    for step in range(burn_in + steps):
        here = neighbours(now).flatten(1)
        new = apply(now, torch.multinomial(here.float(), 1, generator=gen)[:, 0])
        odds = one(new, gen) - one(now, gen) + here.sum(1).log() - neighbours(new).flatten(1).sum(1).log()
        take = torch.rand(chains, generator=gen, dtype=torch.float64).log() < odds
        now = torch.where(take[:, None, None], new, now)
        if step >= burn_in:
            total += torch.bincount(place(now), minlength=25)
    return total.log()


def test_chains_keep_the_limits_of_the_space():
    space = Dags(3, required=((0, 1),), forbidden=((1, 2),), max_parents=1)
    found = pseudo_marginal(space, lambda g, gen: torch.zeros(len(g)).double(), chains=64, steps=60, burn_in=10)
    assert set(graph_codes(found.graphs).tolist()) == set(graph_codes(space.enumerate()).tolist())


def test_reports_are_told_in_words_and_averaged():
    lm = TabularLM.random(" .,:'" + string.ascii_letters, order=1, seed=4, scale=0.3)
    asker = Asker(lm)
    teller = Teller(asker, SEEN, ("rain", "mud", "sun"), gain=False)
    code = int(SEEN.code(torch.tensor([TOGETHER, NONE, APART])))
    texts = [teller.text(code, t) for t in teller.templates]
    assert texts[1] == (
        " More rain goes with more mud. There is no relation between rain and sun. More mud goes with less sun."
    )
    prompt = "This is what is known about rain, mud, sun."
    want = log_mean_exp(asker.log_p([(prompt, t) for t in texts]))
    torch.testing.assert_close(teller.log_p(torch.tensor([[code], [code]])), want.expand(2, 1))
    scored = asker.counts.scored
    teller.log_p(torch.tensor([code] * 9))
    assert asker.counts.scored == scored


def test_bad_input():
    with pytest.raises(InputError, match="draw D beyond"):
        Relations(5).law(torch.zeros(1, 5, 5).bool())
    with pytest.raises(InputError, match="share of wrong reports"):
        Relations(3, error=1.0)
    with pytest.raises(InputError, match="at least one draw"):
        naive_log_r(uniform(GRAPHS), SEEN.law(GRAPHS), LOG_LM, 0)
    with pytest.raises(InputError, match="2 variables for relations among 3"):
        Teller(Asker(TabularLM.random("ab")), SEEN, ("a", "b"))
