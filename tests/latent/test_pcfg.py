"""Grammars, charts, trees: against plain recursion and enumeration; what is refused; planted bugs seen."""

from __future__ import annotations

import functools
import math
from dataclasses import replace

import pytest
import torch
from brute_trees import every_tree, split_off_by_one

import retrodict as rd
from retrodict.errors import InputError
from retrodict.latent.pcfg import PCFG, expected_counts, grammar, leaves, log_evidence, padded, pcfg_target, simulate
from retrodict.latent.pcfg import tree_counts as counts_of
from retrodict.latent.pcfg_draw import plot_tree
from retrodict.latent.pcfg_learn import every_rule, jittered
from retrodict.latent.pcfg_trees import ParsePosterior, best_trees, exact_trees, laws, sample_trees
from retrodict.policies.net import NetPolicy
from retrodict.rng import generator
from retrodict.testing.laws import check_policy, check_space
from retrodict.testing.pcfgs import SwappedChildren, ambiguous, distinct, with_term

SENTENCES = ("Kim saw her duck", "her duck ducks Kim with her", "Kim slept in ducks of dog park", "the dog saw ducks",
             "Kim saw her duck in ducks with ducks", "ducks duck")  # fmt: skip


@functools.cache
def brute() -> list[dict[str, float]]:
    """All trees of each sentence."""
    return [dict(every_tree(ambiguous(), x)) for x in ambiguous().encode(SENTENCES)]


def full() -> PCFG:
    """Every rule of two symbols and two tags over three words, at random."""
    return jittered(every_rule(2, 2, ("a", "b", "c")), seed=1)


@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_inside_is_the_sum_over_all_trees(n: int) -> None:
    pcfg = full()
    sentence = tuple(int(x) for x in torch.randint(3, (n,), generator=generator(n)))
    brute = dict(every_tree(pcfg, sentence))
    total = torch.tensor(list(brute.values()), dtype=torch.float64).logsumexp(0)
    assert float(log_evidence(pcfg, [sentence])) == pytest.approx(float(total), abs=1e-9)
    target = pcfg_target(pcfg, [sentence])
    listed = laws(target)
    assert len(brute) == len(listed.rows) == float(target.space.trees)
    shown = dict(zip(target.space.show(listed.rows), target.log_gamma(listed.rows).tolist(), strict=True))
    assert shown.keys() == brute.keys()
    assert max(abs(shown[k] - brute[k]) for k in brute) < 1e-9


def test_inside_of_an_ambiguous_grammar() -> None:
    """Up to 8 words, of different lengths in one batch."""
    found = log_evidence(ambiguous(), SENTENCES)
    for trees, value in zip(brute(), found.tolist(), strict=True):
        total = torch.tensor(list(trees.values()), dtype=torch.float64).logsumexp(0)
        assert value == pytest.approx(float(total), abs=1e-9)


def test_a_split_that_is_off_by_one_is_seen() -> None:
    pcfg, sentence = full(), (0, 1, 2, 1)
    total = torch.tensor([p for _, p in every_tree(pcfg, sentence)], dtype=torch.float64).logsumexp(0)
    word, _ = padded([sentence], len(pcfg.words))
    wrong = split_off_by_one(pcfg.binary, leaves(pcfg.lexical, word))
    assert abs(float(wrong - total)) > 0.1


def test_laws_of_the_space_and_of_policies() -> None:
    target = pcfg_target(ambiguous(), SENTENCES)
    check_space(target.space, len(SENTENCES), rows=24)
    check_policy(ParsePosterior(target), 1, rows=16)
    with torch.no_grad():
        check_policy(NetPolicy(target.space, target.problems, hidden=8), 1, rows=16)


def test_the_menu_is_exact() -> None:
    """No dead end under uniform choices, and each tree has one path: what is listed are the trees, once each."""
    target = pcfg_target(ambiguous(), SENTENCES)
    listed = laws(target)
    for p, trees in enumerate(brute()):
        mine = [t for t, q in zip(target.space.show(listed.rows), listed.rows.problem.tolist(), strict=True) if q == p]
        assert sorted(mine) == sorted(trees)
    assert listed.trees.tolist() == target.space.trees.tolist()


def test_the_posterior_as_a_policy() -> None:
    """log q = log p(tree | sentence), so every importance weight is p(sentence) itself."""
    pcfg = ambiguous()
    target = pcfg_target(pcfg, SENTENCES)
    policy = ParsePosterior(target)
    found = laws(target, policy)
    assert float((found.log_p - found.log_q).abs().max()) < 1e-9
    answer = rd.importance(target, policy, n=4, seed=0, runs=2)
    assert float((answer.log_w - log_evidence(pcfg, SENTENCES)[:, None]).abs().max()) < 1e-6
    moved = policy.on(target.problems[3:5])
    assert float(laws(target.on(target.problems[3:5]), moved).total_variation.max()) < 1e-9


def test_exact_draws_top_down() -> None:
    """Frequencies of 4,000 draws within 4.5 standard errors of the posterior, tree by tree."""
    target = pcfg_target(ambiguous(), SENTENCES[1:2])
    listed, n = laws(target), 4000
    rows = sample_trees(target, torch.zeros(n, dtype=torch.long), generator(3))
    drawn = target.space.keys(rows)
    for key, p in zip(target.space.keys(listed.rows), listed.log_p.exp().tolist(), strict=True):
        assert abs(drawn.count(key) / n - p) < 4.5 * math.sqrt(p * (1 - p) / n)
    answer = exact_trees(target, 50, seed=0)
    assert float(answer.ess) == pytest.approx(50)
    assert answer.evidence is not None
    assert float(answer.evidence[0]) == pytest.approx(float(log_evidence(ambiguous(), SENTENCES[1:2])))


def test_best_trees() -> None:
    target = pcfg_target(ambiguous(), SENTENCES)
    rows, value = best_trees(target)
    listed = laws(target)
    gamma = target.log_gamma(listed.rows)
    for p in range(len(SENTENCES)):
        here = (listed.rows.problem == p).nonzero().squeeze(1)
        assert float(value[p]) == pytest.approx(float(gamma[here].max()), abs=1e-12)
    assert rows.n.tolist() == [2 * len(x.split()) - 1 for x in SENTENCES]


def test_expected_counts_are_posterior_means() -> None:
    pcfg = ambiguous()
    target = pcfg_target(pcfg, SENTENCES)
    listed = laws(target)
    means = counts_of(target.space, listed.rows, listed.log_p.exp())  # pyright: ignore[reportArgumentType]
    found, total = expected_counts(pcfg, pcfg.encode(SENTENCES))
    assert float((found.binary - means.binary).abs().max()) < 1e-9
    assert float((found.lexical - means.lexical).abs().max()) < 1e-9
    assert total == pytest.approx(float(log_evidence(pcfg, SENTENCES).sum()), abs=1e-9)


def test_draws_from_the_grammar() -> None:
    """Short sentences come as often as inside says, given the length; their trees are theirs."""
    pcfg, n = ambiguous(), 10_000
    sentences, moves = simulate(pcfg, n, generator(0), longest=4)
    kinds = sorted(set(sentences))
    p = log_evidence(pcfg, kinds).exp()
    share = p / _mass_up_to(pcfg, 4)
    count = torch.tensor([sentences.count(x) for x in kinds]) / n
    often = share > 1e-3
    z = (count - share)[often] / (share * (1 - share) / n).sqrt()[often]
    assert int(often.sum()) > 20 and float(z.abs().max()) < 4.5
    target = pcfg_target(pcfg, sentences[:200])
    rows = target.space.record(torch.arange(200), moves[:200])  # pyright: ignore[reportAttributeAccessIssue]
    assert bool(target.log_gamma(rows).isfinite().all())


def _mass_up_to(pcfg: PCFG, longest: int) -> float:
    """P(a sentence has at most so many words), by convolution over lengths."""
    rule, size = pcfg.binary.exp(), torch.zeros(longest + 1, len(pcfg.labels), dtype=torch.float64)
    size[1] = pcfg.lexical.exp().sum(1)
    for w in range(2, longest + 1):
        size[w] = sum(torch.einsum("abc,b,c->a", rule, size[k], size[w - k]) for k in range(1, w))
    return float(size[:, 0].sum())


def test_any_sampler() -> None:
    """Importance, SMC and Metropolis-Hastings on a target of trees, from an untrained net."""
    pcfg = ambiguous()
    target = pcfg_target(pcfg, SENTENCES[1:3])
    truth, policy = log_evidence(pcfg, SENTENCES[1:3]), NetPolicy(target.space, target.problems, hidden=8)  # pyright: ignore[reportArgumentType]
    for answer in (rd.importance(target, policy, n=100, seed=0), rd.smc(target, policy, n=100, seed=0)):
        assert answer.evidence is not None
        value, error = answer.evidence
        assert bool(((value - truth).abs() < 4.5 * error + 1e-3).all())
    exact = rd.exact(target)
    assert exact.evidence is not None and torch.allclose(exact.evidence[0], truth, atol=1e-9)
    chain = rd.mh(target, policy, n=40, steps=10, seed=0)
    best = dict(exact.best(0, 9))
    assert abs(dict(chain.best(0, 9))[next(iter(best))] - max(best.values())) < 0.15


def test_swapped_children_are_seen() -> None:
    """A rule table read as A -> C B: its trees weigh something else, and the sum is not the inside value."""
    pcfg = ambiguous()
    target = pcfg_target(pcfg, SENTENCES)
    planted = with_term(target, SwappedChildren)
    total = rd.exact(planted).evidence
    assert total is not None and float((total[0] - log_evidence(pcfg, SENTENCES)).abs().min()) > 1
    both = pcfg_target(full(), [(0, 1, 2, 1)])  # a grammar with either order of every two children
    truth, wrong = laws(both), laws(with_term(both, SwappedChildren))
    assert float((truth.log_p.exp() - wrong.log_p.exp()).abs().sum() / 2) > 0.1


@pytest.mark.parametrize(("text", "says"), [
    ("", "needs a rule"),
    ("S = 'a' 1", r"line 1, .* is no rule"),
    ("S -> 'a' 0.5\nS -> dog 0.5", "line 2.*Chomsky normal form has no single symbol"),
    ("S -> 'a' 0.5 | X Y Z 0.5", "line 1.*two symbols or one quoted word"),
    ("S -> 'a' 1.2", "1.2 is no probability"),
    ("S -> 'a' 0.5 | 'a' 0.5", "a second time"),
    ("S -> 'a' 0.5 | 'b' 0.4", "the rules of S sum to 0.9, not 1"),
    ("S -> N M 1.0\nN -> 'a' 1.0", "'M' has no rules of its own; .*N"),
    ("S -> S S 0.6 | 'a' 0.4", "ends with probability 0.667 only"),
])  # fmt: skip
def test_what_a_grammar_may_not_say(text: str, says: str) -> None:
    with pytest.raises(InputError, match=says):
        grammar(text)


@pytest.mark.parametrize(("sentence", "says"), [
    ("Kim saw the unicorn", "no word 'unicorn', which is word 4 of"),
    ("the dog the dog in", "the widest span that one covers is words 1 to 2, 'the dog' .NP"),
    ("the dog park", "as a whole it is NP, not S"),
    ("", "at least one sentence, of a word or more"),
])  # fmt: skip
def test_sentences_outside_the_grammar(sentence: str, says: str) -> None:
    with pytest.raises(InputError, match=says) as caught:
        pcfg_target(ambiguous(), ["Kim slept", sentence])
    assert "\n" not in str(caught.value)


def test_text_and_back() -> None:
    pcfg = ambiguous()
    again = grammar(pcfg.show())
    assert again.labels == pcfg.labels and set(again.words) == set(pcfg.words)
    assert torch.allclose(log_evidence(again, SENTENCES), log_evidence(pcfg, SENTENCES), atol=1e-9)
    assert pcfg.mass == pytest.approx(1.0, abs=1e-6)
    assert log_evidence(pcfg, ["the dog park", ""]).tolist() == [-math.inf, -math.inf]
    with pytest.raises(InputError, match="word numbers go from 0 to"):
        pcfg.encode([(0, 99)])


def test_a_space_moves_to_other_sentences() -> None:
    target = pcfg_target(ambiguous(), SENTENCES)
    moved = target.on(pcfg_target(ambiguous(), SENTENCES[:2]).problems)
    assert moved.space.sentences == target.space.sentences[:2]  # pyright: ignore[reportAttributeAccessIssue]
    assert moved.space == replace(target.space, sentences=target.space.sentences[:2])  # pyright: ignore
    with pytest.raises(InputError, match="made for 8 at most"):
        target.on(pcfg_target(ambiguous(), ["Kim saw her duck in a park with a dog"]).problems)
    assert len(distinct(ambiguous(), 5, seed=0, without=[(0, 0)])) == 5


def test_picture() -> None:
    from matplotlib.figure import Figure

    target = pcfg_target(ambiguous(), SENTENCES[:1])
    rows, _ = best_trees(target)
    axes = Figure().add_subplot()
    plot_tree(axes, target.space, rows)  # pyright: ignore[reportArgumentType]
    written = [t.get_text() for t in axes.texts]
    assert [w for w in written if w in SENTENCES[0].split()] == SENTENCES[0].split() and written[-1] == "S"
    assert len(axes.lines) == 4 + 2 * 3
    with pytest.raises(InputError, match="there is no tree 3; the rollouts have 1"):
        plot_tree(axes, target.space, rows, 3)  # pyright: ignore[reportArgumentType]
