"""HMMs: filtering, EM, files, and the look-ahead that is exact where the model is an HMM."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from retrodict.bench.reference import PROMPTS
from retrodict.errors import InputError
from retrodict.guides import hmm_fit
from retrodict.guides.hmm import HMM, load_hmm, tokens_of
from retrodict.guides.hmm_fit import Tables, baum_welch, cached_hmm, cross_entropy, fit_hmm, soft_step
from retrodict.guides.hmm_guide import HMMGuide
from retrodict.guides.hmm_text import OPENINGS, Written, write
from retrodict.models.tabular import TabularLM
from retrodict.records import Problem
from retrodict.rng import generator
from retrodict.samplers.exact import exact
from retrodict.samplers.smc import smc
from retrodict.spaces.stops import Stops
from retrodict.targets.algebra import Target
from retrodict.targets.constraint import short_words
from retrodict.targets.hmm import with_hmm
from retrodict.targets.ready import continuation, including, infill, posterior, until
from retrodict.testing.hmms import fitted, markov, random_hmm


def chain() -> TabularLM:
    """A first-order chain: an HMM in all but name."""
    return TabularLM.random(".ab ", order=1, seed=1)


def representable() -> dict[str, Target]:
    """Constraints, windows and suffixes under every limit, on a model that is an HMM."""
    lm, end = chain(), Stops((0,), label="end")
    say = [Problem((1,), (2, 3), name="say")]
    out: dict[str, Target] = {
        "two stops": posterior(lm, say, stop=(0, 1), max_tokens=4, min_tokens=1, limit="own_stop")
    }
    for limit in ("force", "own_stop", "exact"):
        rest = {"stop": ".", "max_tokens": 5, "limit": limit}
        out |= {
            f"words, {limit}": including(lm, "a ", contain=["ab"], avoid=["ba"], **rest),
            f"short, {limit}": continuation(lm, "a ", **rest) * short_words(1),
            f"window, {limit}": continuation(lm, "a", **rest),
            f"infill, {limit}": infill(lm, "ab", "ba", join="", **rest),
            f"suffix for the end, {limit}": posterior(lm, say, stop=end, max_tokens=4, limit=limit),
            f"words and suffix, {limit}": infill(lm, "ab", "ba", join="", **rest) * short_words(1),
        }
    return out


def optimal(target: Target, hmm: HMM, look: bool) -> HMMGuide:
    """psi at power one and at the HMM's own level."""
    words = with_hmm(target, hmm).guide
    assert isinstance(words, HMMGuide)
    return HMMGuide(hmm, words.space, target.problems, words.automaton, 1.0, target.prior if look else None)


@pytest.mark.parametrize("look", [False, True], ids=["HMM alone", "a look further"])
@pytest.mark.parametrize("name", representable())
def test_optimal_twist_has_no_variance(name: str, look: bool) -> None:
    lm, target = chain(), representable()[name]
    guide = optimal(target, markov(lm.table.softmax(-1), first=4), look)
    log_z = smc(target.with_guide(guide), n=2, seed=0, runs=20).log_z
    truth = exact(target).log_z
    assert log_z is not None and truth is not None
    assert float((log_z - truth).abs().max()) < 1e-9
    assert float(log_z.std()) < 1e-9


def test_a_table_off_by_one_move_has_variance() -> None:
    """The test above can fail: psi of one move more is no optimal twist."""
    lm, target = chain(), representable()["words, own_stop"]
    guide = optimal(target, markov(lm.table.softmax(-1), first=4), False)
    guide.tables, guide.scale = guide.tables.roll(-1, 1), guide.scale.roll(-1, 1)
    log_z = smc(target.with_guide(guide), n=2, seed=0, runs=20).log_z
    assert log_z is not None and float(log_z.std()) > 1e-2


def brute(hmm: HMM, x: tuple[int, ...]) -> float:
    """p(x) by the sum over all paths of states."""
    total, h = 0.0, range(hmm.states)
    for z in itertools.product(h, repeat=len(x) + 1):
        p = float(hmm.initial[z[0]])
        for i, token in enumerate(x):
            p *= float(hmm.transition[z[i], z[i + 1]] * hmm.emission[z[i + 1], token])
        total += p
    return total


def test_filter_is_the_sum_over_paths() -> None:
    hmm = random_hmm(3, 4, seed=2)
    texts = torch.tensor([[0, 1, 3], [2, 2, 0]])
    log_p = hmm.log_prob(texts, torch.tensor([3, 2]))
    assert float(log_p[0].sum().exp()) == pytest.approx(brute(hmm, (0, 1, 3)), rel=1e-12)
    assert float(log_p[1].sum().exp()) == pytest.approx(brute(hmm, (2, 2)), rel=1e-12)
    one = hmm.read([[0, 1, 3], [2]])
    assert torch.allclose(one.sum(1), torch.ones(2, dtype=torch.float64))
    assert torch.allclose(one[1], hmm.step(hmm.start(1), torch.tensor([2]))[0][0])


def test_samples_follow_the_model_and_end() -> None:
    hmm = random_hmm(3, 4, seed=2)
    hmm = HMM(hmm.initial, hmm.transition, hmm.emission, ends=(0,))
    tokens, n = hmm.sample(4000, 3, generator(0))
    share = float(((tokens[:, 0] == 1) & (tokens[:, 1] == 2)).double().mean())
    assert share == pytest.approx(brute(hmm, (1, 2)), abs=0.02)
    assert bool((n[tokens[:, 0] == 0] == 1).all()) and int(n.max()) == 3


def _record(tokens: torch.Tensor, n: torch.Tensor) -> Written:
    """Texts alone."""
    none = torch.zeros(0, dtype=torch.long)
    return Written(tokens, n, torch.zeros_like(n), none, none, none[:, None], torch.zeros(0, 1), torch.zeros(0, 1),
                   torch.zeros(0))  # fmt: skip


def test_em_never_lowers_the_likelihood_and_finds_a_small_hmm() -> None:
    truth = HMM(torch.tensor([1.0, 0.0]), torch.tensor([[0.9, 0.1], [0.2, 0.8]]),
                torch.tensor([[0.8, 0.1, 0.1], [0.05, 0.15, 0.8]]))  # fmt: skip
    tokens, n = truth.sample(400, 30, generator(0))
    data, flat = _record(tokens, n), torch.full((3,), 1 / 3)
    guess = random_hmm(2, 3, seed=1, scale=0.5).to(torch.float32)
    m, seen = Tables(guess.initial, guess.transition, guess.emission), []
    for _ in range(30):
        m, nats = baum_welch(m, data, flat, pseudo=(0.0, 0.0))
        seen.append(nats)
    assert all(b <= a + 1e-6 for a, b in itertools.pairwise(seen)), "likelihood fell"
    best = -float(truth.log_prob(tokens, n).sum()) / float(n.sum())
    assert seen[-1] < best + 1e-3
    order = m.b[:, 0].argsort(descending=True)
    assert torch.allclose(m.a[order][:, order], truth.transition, atol=0.05)
    assert torch.allclose(m.b[order], truth.emission, atol=0.05)


def test_soft_steps_use_what_the_model_says() -> None:
    lm = chain()
    data = write(lm, [[1], [2]], texts=60, length=10, seed=0)
    total = data.probs.sum(1)
    assert torch.allclose(total, torch.ones_like(total), atol=1e-5)  # every token of so small a vocabulary is kept
    rows = torch.tensor([[*row[at - 1 : at + 1]] for row, at in
                         zip(data.tokens[data.row].tolist(), data.at.tolist(), strict=True)])  # fmt: skip
    said = torch.zeros(len(rows), 4).scatter_add(1, data.ids, data.probs)
    assert torch.allclose(said, lm.table.softmax(-1).float()[rows[:, 0]], atol=1e-5)
    guess = random_hmm(4, 4, seed=1, scale=0.5).to(torch.float32)
    m = Tables(guess.initial, guess.transition, guess.emission)
    before = cross_entropy(m, data)
    assert cross_entropy(soft_step(m, data, torch.full((4,), 0.25)), data) < before


def test_fit_is_better_than_the_unigram_and_repeats() -> None:
    a, b = (fit_hmm(chain(), ["a", "b", " "], states=5, texts=200, length=10, seed=3) for _ in range(2))
    assert torch.equal(a.emission, b.emission) and torch.equal(a.transition, b.transition)
    assert a.card["model_nats"] < a.card["nats"] < a.card["unigram_nats"]


def test_saved_and_loaded(tmp_path: Path) -> None:
    hmm = fitted().to(torch.float32)
    again = load_hmm(hmm.save(tmp_path / "guide"))
    assert torch.equal(hmm.emission, again.emission) and again.ends == hmm.ends
    assert again.card["tokenizer"] == hmm.card["tokenizer"] == tokens_of(TabularLM.random(".ab ", order=1))
    with pytest.raises(InputError, match=r"no hmm.safetensors"):
        load_hmm(tmp_path)


def test_a_guide_of_another_tokenizer_is_refused() -> None:
    other = continuation(TabularLM.random(".xy ", order=1), "x", stop=".", max_tokens=3)
    with pytest.raises(InputError, match=r"speaks the tokens of tabular"):
        with_hmm(other, fitted())


def test_predicate_stops_are_refused() -> None:
    target = continuation(chain(), "a", stop=until("b"), max_tokens=3)
    with pytest.raises(InputError, match="predicate stops"):
        with_hmm(target, random_hmm(2, 4))


def test_psi_is_zero_only_where_the_automaton_says_so() -> None:
    """An HMM that gives a token no chance floors psi; it does not kill the strings that have it."""
    lm = chain()
    emission = torch.tensor([[0.5, 0.5, 0.0, 0.0], [0.0, 0.5, 0.0, 0.5]], dtype=torch.float64)
    hmm = HMM(torch.ones(2, dtype=torch.float64) / 2, torch.full((2, 2), 0.5, dtype=torch.float64), emission)
    target = continuation(lm, "a", stop=".", max_tokens=3, limit="own_stop") * short_words(2)
    guided = with_hmm(target, hmm)
    assert guided.guide is not None
    s = guided.space.start(torch.zeros(1, dtype=torch.long))
    c = guided.guide.start(torch.zeros(1, dtype=torch.long))
    log_next = guided.guide.log_next(c, s)
    assert log_next is not None and bool(log_next[:, 1:].isfinite().all())


def test_fitted_once_and_then_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RETRODICT_CACHE", str(tmp_path))
    once = iter([fitted()])
    monkeypatch.setattr(hmm_fit, "fit_hmm", lambda *a, **k: next(once))  # a second fit would fail
    first, again = cached_hmm(chain()), cached_hmm(chain())
    assert torch.equal(first.emission, again.emission)
    assert len(list((tmp_path / "hmm").iterdir())) == 1


def test_openings_are_none_of_the_benchmarks() -> None:
    """The guide of the benchmark's prompts is fitted on other ones."""
    starts = {" ".join(p.split()[:3]) for p in PROMPTS}
    assert not starts & {" ".join(o.split()[:3]) for o in OPENINGS}
