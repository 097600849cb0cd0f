"""Logical forms and their sentences: the language, p(s | f) under a model, exact parsing, planted bugs, a sampler."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from retrodict.errors import InputError
from retrodict.models.tabular import TabularLM
from retrodict.numerics import NEG_INF, sample_categorical
from retrodict.objectives.mle import object_log_q
from retrodict.rng import generator
from retrodict.samplers.exact import exact
from retrodict.samplers.importance import importance
from retrodict.structures.ask import Asker
from retrodict.structures.forms import Forms, Lexicon, Verb, language
from retrodict.structures.forms_parse import (
    GLOSS_PROMPT,
    Parser,
    amortize_forms,
    as_text,
    by_model,
    by_ways,
    evenly,
    fitted_alpha,
    forms_target,
    marginal,
    sentence_problem,
    words_of,
)
from retrodict.structures.forms_prompt import by_decoding, by_glosses, prompt_of
from retrodict.testing.laws import check_space

LETTERS = " abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.,'\";:\n()"
SMALL = Lexicon(names=("Tom", "Anna"), does=(Verb("slept", "sleep"), Verb("ran", "run")),
                nouns=(("dog", "dogs"), ("cat", "cats")), acts=(Verb("chased", "chase", "chased"),),
                people=("girl", "boy"))  # fmt: skip


@cache
def space() -> Forms:
    return Forms(language(SMALL, ("scopes", "quantified", "negated", "attachments")))


@cache
def model(seed: int = 0) -> TabularLM:
    return TabularLM.random(LETTERS, order=1, seed=seed, scale=1.0)


@cache
def parser(seed: int = 0, alpha: float = 0.2) -> Parser:
    return Parser(space(), by_model(Asker(model(seed)), space().forms, alpha=alpha))


def test_the_whole_language() -> None:
    """Forms, glosses and R(f) are distinct; no gloss is a sentence; every reading but one-way ones is ambiguous."""
    forms = language()
    assert 300 <= len(forms) <= 2000
    assert len({f.tokens for f in forms}) == len({words_of(f.gloss) for f in forms}) == len(forms)
    assert all(len(set(f.sentences)) == len(f.says) > 0 for f in forms)
    said = {words_of(s) for f in forms for s in f.sentences}
    assert not said & {words_of(f.gloss) for f in forms}
    check_space(Forms(forms), 1)


def test_description_length_by_hand() -> None:
    parsed, forms = Parser(space(), evenly), space().forms
    assert float(parsed.log_prior.exp().sum()) == pytest.approx(1.0, abs=1e-12)
    first = len({f.tokens[0] for f in forms})
    form = next(i for i, f in enumerate(forms) if f.tokens == ("every", "dog", "slept"))
    # after "every dog": slept, ran, or the second quantifier
    assert float(parsed.log_prior[form].exp()) == pytest.approx(1 / first / 2 / 3, rel=1e-9)
    assert torch.equal(space().which(space().rows()), torch.arange(len(forms)))


def test_every_form_is_said_with_probability_one() -> None:
    for parsed in (parser(), Parser(space(), evenly)):
        assert float((parsed.log_say.logsumexp(1)).abs().max()) < 1e-9
        assert float(parsed.log_evidence.logsumexp(0)) == pytest.approx(0.0, abs=1e-9)
        for i, form in enumerate(space().forms):
            said = {parsed.sentences[s] for s in (parsed.log_say[i] > NEG_INF).nonzero().flatten().tolist()}
            assert said == set(form.sentences)


def test_a_sentence_by_hand() -> None:
    """p(f | s) of "every dog chased a cat" from the model's own log-probabilities."""
    lm, sentence = model(), "every dog chased a cat"

    def log_p(text: str) -> float:
        ids = lm.tokenizer.encode(as_text(text))
        found = lm.score([lm.tokenizer.encode("This is what happened.")], torch.tensor([ids]), torch.tensor([len(ids)]))
        return float(found[0].sum())

    weight = {}
    for i, form in enumerate(space().forms):
        if sentence in form.sentences:
            each = torch.tensor([0.2 * log_p(s) for s in form.sentences], dtype=torch.float64)
            mine = each[form.sentences.index(sentence)] - each.logsumexp(0)
            weight[form.tokens] = float((parser().log_prior[i] + mine).exp())
    found = {f.tokens: p for f, p in parser().parse("Every dog chased a cat.")}
    assert len(weight) == 2 and found.keys() == weight.keys()
    assert all(found[k] == pytest.approx(w / sum(weight.values()), rel=1e-6) for k, w in weight.items())


def test_without_the_sum_the_model_cancels() -> None:
    """The planted bug: p_LM(s) alone for p(s | f). Any two models then parse alike; with the sum they do not."""

    def unsummed(parsed: Parser, weigh: Any) -> Tensor:
        log_lm = torch.full(parsed.log_say.shape, NEG_INF, dtype=torch.float64)
        for i, form in enumerate(space().forms):
            log_lm[i, [parsed.index[words_of(s)] for s in form.sentences]] = weigh(form)
        joint = parsed.log_prior[:, None] + log_lm
        return (joint - joint.logsumexp(0)).exp()

    both = [(parser(k), by_model(Asker(model(k)), space().forms)) for k in (0, 1)]
    wrong = [unsummed(*each) for each in both]
    right = [(p.log_joint - p.log_evidence).exp() for p, _ in both]
    assert float((wrong[0] - wrong[1]).abs().max()) < 1e-9
    assert float((right[0] - right[1]).abs().max()) > 0.1


def test_its_own_sentences_are_parsed_with_calibration() -> None:
    """Pairs drawn from p(f) p(s | f): the mean probability of what is drawn is what it should be, and log-loss is
    the conditional entropy; another parser's is larger by the divergence, within 4.5 standard errors."""
    mine, even = parser(alpha=0.6), Parser(space(), evenly)
    form, sentence = mine.simulate(4000, generator(0), ambiguous=True)
    assert set(sentence.tolist()) <= set(mine.ambiguous.tolist())
    p = (mine.log_joint - mine.log_evidence).exp()
    off = p[form, sentence] - p.square().sum(0)[sentence]
    assert abs(float(off.mean())) < 4.5 * float(off.std()) / 4000**0.5
    gain = even.log_loss(form, sentence) - mine.log_loss(form, sentence)
    at = mine.ambiguous
    joint = mine.log_joint[:, at].flatten().softmax(0)
    each = (even.log_evidence[at] - even.log_joint[:, at] + mine.log_joint[:, at] - mine.log_evidence[at]).flatten()
    expected = float(torch.where(joint > 0, joint * each, 0.0).sum())
    assert expected > 0.01
    assert abs(float(gain.mean()) - expected) < 4.5 * float(gain.std()) / 4000**0.5


def test_alpha_is_found_again() -> None:
    mine = parser(alpha=0.5)
    form, sentence = mine.simulate(3000, generator(1), ambiguous=True)
    assert fitted_alpha(Asker(model()), space(), form, sentence) in (0.4, 0.5, 0.7)


def test_glosses_as_prompts() -> None:
    """p_LM(s | gloss of f) differs between forms even for the same R(f)."""
    weigh = by_model(Asker(model()), space().forms, GLOSS_PROMPT)
    first = next(f for f in space().forms if f.reading == "not (a and b)")
    alone = by_model(Asker(model()), space().forms)
    assert not torch.allclose(weigh(first), alone(first))


def test_samplers_agree_with_the_parser() -> None:
    sentences = ["every dog chased a cat", "all cats did not run"]
    target = forms_target(parser(), [sentence_problem(parser(), s) for s in sentences])
    found = exact(target)
    some = importance(target, n=1000, seed=0)
    for m, sentence in enumerate(sentences):
        told = {f.tokens: p for f, p in parser().parse(sentence)}
        words = {key: tuple(space().words[i] for i in key[:-1]) for key in found.counts(m)}
        assert {words[k]: pytest.approx(w, abs=1e-6) for k, w in found.counts(m).items()} == told
        hits = int((some.log_w[m] > NEG_INF).sum())
        for key, w in some.counts(m).items():
            assert abs(w - found.counts(m)[key]) < 4.5 * 0.5 / hits**0.5
    assert found.log_z is not None
    log_z = float(parser().log_evidence[parser().find(sentences[0])])
    assert float(found.log_z[0, 0]) == pytest.approx(log_z, abs=1e-5)


def test_in_one_pass() -> None:
    few = Parser(Forms(language(SMALL, ("scopes",))), evenly)
    policy = amortize_forms(few, e_steps=120, dreams=64)
    rows = replace(few.rows, problem=torch.full((len(few.rows),), few.find("every dog chased a cat")))
    log_q = object_log_q(policy.score(rows), rows).double()
    p = few.posterior("every dog chased a cat").exp()
    assert float((log_q.exp() - p).abs().sum()) / 2 < 0.15


def test_marginal_of_sampled_sentences() -> None:
    mine = parser()
    share = mine.log_evidence.softmax(0)
    drawn = sample_categorical(mine.log_evidence.expand(1000, -1), generator(2))
    found, (names, p) = marginal(mine, drawn), mine.readings()
    assert names == found.readings and float(found.share.sum()) == pytest.approx(1.0)
    prior = torch.zeros(len(names), dtype=torch.float64)
    for i, form in enumerate(space().forms):
        prior[names.index(form.reading)] += mine.log_prior[i].exp()
    assert torch.allclose((share[:, None] * p).sum(0), prior, atol=1e-9)  # of the model's own sentences: p(f)
    assert float(((found.share - prior).abs() / found.se).max()) < 4.5
    assert bool((found.interval()[:, 0] <= found.share).all())


@pytest.mark.parametrize(
    ("sentence", "span"),
    [
        ("every dog chased a horse", r"at 'horse' \(word 5\): after 'every dog chased a' may come cat"),
        ("every big dog chased a cat", r"at 'big' \(word 2\)"),
        ("every dog really slowly chased a cat", r"at 'really slowly' \(words 3 to 4\)"),
        ("every dog chased a cat now", r"at 'now' \(word 6\)"),
        ("every dog chased a", r"may come cat"),
        ("", "a sentence begins with"),
    ],
)
def test_a_sentence_outside_the_grammar(sentence: str, span: str) -> None:
    with pytest.raises(InputError, match=span) as error:
        parser().parse(sentence)
    assert "\n" not in str(error.value)


def test_other_refusals() -> None:
    with pytest.raises(InputError, match="no part 'scope'"):
        language(SMALL, ("scope",))
    with pytest.raises(InputError, match="no odds for the reading"):
        Parser(space(), by_ways({}))
    with pytest.raises(InputError, match="makes no form"):
        language(Lexicon(nouns=()), ("scopes",))


def test_prompting() -> None:
    """The scores of the glosses are the model's own, one by one; decoding is greedy and ends at the line."""
    lm, at = model(), parser().ambiguous[:3]
    prompt = prompt_of((("a b", "c"),))
    found = by_glosses(lm, parser(), at, prompt)
    assert torch.allclose(found.logsumexp(1), torch.zeros(3, dtype=torch.float64), atol=1e-9)
    s = int(at[0])
    head = f"{prompt}{as_text(parser().sentences[s])}\nMeaning:"
    forms = (parser().log_say[:, s] > NEG_INF).nonzero().flatten().tolist()
    asked = Asker(lm).log_p([(head, as_text(space().forms[f].gloss)) for f in forms]).log_softmax(0)
    assert torch.allclose(found[0, forms], asked, atol=1e-6)
    told, texts = by_decoding(lm, parser(), at, prompt, tokens=5)
    ids, free = lm.tokenizer.encode(head), []
    for _ in range(5):
        free.append(int(lm.encode([ids + free])[1].argmax()))
    assert texts[0] == lm.tokenizer.decode(free).split("\n")[0].split(".")[0].strip()
    assert told.tolist() == [-1, -1, -1]
