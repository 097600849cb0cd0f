"""The part of ``retrodict bench models`` about logical forms: parsing with a language model as surface-form prior.

Two speakers make 200 ambiguous sentences each, forms drawn by description length: the model itself (f ~ p(f), then
s ~ p_LM(s | f)), for which its parser is right by construction and only its calibration is at stake; and one with fixed
odds of the ways to say a form, written by hand before anything was measured (:data:`HUMAN`), which no parser knows.
Parsers with the same p(f): the model's p(s | f) as it is; the same with alpha fitted on 200 other sentences of the
speaker, and with the form's gloss as its prompt; even odds over R(f); and the model asked by a prompt.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from retrodict.bench.rows import Row, at_least, at_most, show_only
from retrodict.diagnostics.calibration import calibration_error
from retrodict.models.load import load
from retrodict.numerics import NEG_INF, sample_categorical
from retrodict.rng import generator
from retrodict.structures.ask import Asker
from retrodict.structures.forms import Forms, Lexicon, language
from retrodict.structures.forms_parse import (
    GLOSS_PROMPT,
    PROMPT,
    Parser,
    as_text,
    by_model,
    by_ways,
    evenly,
    fitted_alpha,
    marginal,
)
from retrodict.structures.forms_prompt import by_decoding, by_glosses

SUITE = "models"
OWN, EVEN = "posterior, p_LM(s | f)", "posterior, even p(s | f)"
FITTED, GLOSSED = "posterior, alpha fitted", "posterior, glosses, alpha fitted"
SENTENCES = 200
"""Ambiguous sentences from each speaker."""
SAMPLED = 1000
"""Sentences drawn from the model for the marginal over readings."""
HUMAN: Mapping[str, Mapping[str, float]] = {
    "every > some, subject every": {"active": 0.75, "passive": 0.10, "explicit": 0.15},
    "some > every, subject every": {"active": 0.30, "passive": 0.35, "explicit": 0.35},
    "some > every, subject some": {"active": 0.65, "passive": 0.10, "explicit": 0.25},
    "every > some, subject some": {"active": 0.20, "passive": 0.50, "explicit": 0.30},
    "every": {"every": 0.6, "all": 0.4},
    "some": {"a": 0.5, "some": 0.5},
    "no": {"no": 0.80, "every ... not": 0.08, "all ... not": 0.12},
    "not every": {"not every": 0.35, "not all": 0.35, "every ... not": 0.15, "all ... not": 0.15},
    "a": {"plain": 1.0},
    "not a": {"plain": 0.95, "not true": 0.05},
    "not (a and b)": {"not true": 0.60, "explicit": 0.40},
    "(not a) and b": {"not true": 0.02, "plain": 0.98},
    "not (a or b)": {"not true": 0.55, "explicit": 0.45},
    "(not a) or b": {"not true": 0.02, "plain": 0.98},
    "a or (b and c)": {"bare": 0.50, "explicit": 0.50},
    "(a or b) and c": {"bare": 0.25, "explicit": 0.75},
    "a and (b or c)": {"bare": 0.30, "explicit": 0.70},
    "(a and b) or c": {"bare": 0.55, "explicit": 0.45},
    "using": {"with": 0.75, "fronted": 0.05, "used": 0.20},
    "having": {"with": 0.45, "who had": 0.30, "passive": 0.25},
}
"""How one person might say things: actively where the subject is the wider, "not true" of all that follows."""


def rows(seed: int = 0, model: str = "smollm2", cache: str = "") -> Iterator[list[Row]]:
    """All rows of the part.

    Args:
        seed: one seed, one result.
        model: of the surface forms and of the prompt.
        cache: a file of sentence scores to read and to add to; none by default.
    """
    lm, space = load(model), Forms(language(Lexicon()))
    asker = Asker(lm, cache or None)
    own, even = Parser(space, by_model(asker, space.forms)), Parser(space, evenly)
    human = Parser(space, by_ways(HUMAN))
    yield [show_only(SUITE, "forms", "language", "forms", len(space.forms)),
           show_only(SUITE, "forms", "language", "sentences", len(own.sentences),
                     f"{len(own.ambiguous)} of them say several forms"),
           show_only(SUITE, "forms", "language", "scored by the model", asker.counts.scored)]  # fmt: skip
    form, sentence = own.simulate(SENTENCES, generator(seed, "cpu", 1), ambiguous=True)
    yield compared("forms, model speaker", {OWN: own, EVEN: even}, own, form, sentence, seed)
    form, sentence = human.simulate(SENTENCES, generator(seed, "cpu", 1), ambiguous=True)
    parsers, notes = {OWN: own, EVEN: even}, {}
    for method, prompt in {FITTED: PROMPT, GLOSSED: GLOSS_PROMPT}.items():
        known = human.simulate(SENTENCES, generator(seed, "cpu", 4), ambiguous=True)
        alpha = fitted_alpha(asker, space, *known, prompt=prompt)
        parsers[method] = Parser(space, by_model(asker, space.forms, prompt, alpha))
        notes[method] = f"alpha {alpha:g} from {SENTENCES} other sentences"
    yield compared("forms, hand-written speaker", parsers, human, form, sentence, seed, notes)
    yield prompted("forms, hand-written speaker", lm, parsers, form, sentence)
    yield sampled(own, asker, seed)


def top(log_p: Float[Tensor, "b n"], form: Int[Tensor, " b"]) -> tuple[Tensor, Tensor]:
    """The largest probability of each row, and the chance that it is the form's (ties count as their share)."""
    best = log_p.amax(1, keepdim=True)
    ties = log_p > best - 1e-9
    hit = ties.gather(1, form[:, None]).squeeze(1).double() / ties.sum(1)
    return best.squeeze(1).exp(), hit


def noise(p: Float[Tensor, " b"], seed: int) -> float:
    """The 99th percentile of the calibration error of probabilities that are right."""
    gen = generator(seed, "cpu", 2)
    drawn = [calibration_error(p, torch.rand(len(p), generator=gen, dtype=torch.float64) < p) for _ in range(1000)]
    return float(torch.tensor(drawn).quantile(0.99))


def compared(
    name: str, parsers: Mapping[str, Parser], speaker: Parser, form: Int[Tensor, " b"], sentence: Int[Tensor, " b"],
    seed: int, notes: Mapping[str, str] | None = None,
) -> list[Row]:  # fmt: skip
    """Log-loss, top-1 and calibration of each parser on one speaker's sentences, and the log-loss saved over even odds.

    The probabilities of the speaker's own parser must be calibrated: its bar is what chance does to right ones.
    """
    best = float(speaker.log_loss(form, sentence).mean())
    out = [show_only(SUITE, name, "the speaker's own posterior", "log-loss", best, "the least there is, on average")]
    for method, parser in parsers.items():
        note = (notes or {}).get(method, "")
        p, hit = top(posterior(parser, sentence), form)
        error = calibration_error(p, hit)
        out.append(show_only(SUITE, name, method, "log-loss", float(parser.log_loss(form, sentence).mean()), note))
        out.append(show_only(SUITE, name, method, "top-1", float(hit.mean())))
        if parser is speaker:
            out.append(at_most(SUITE, name, method, "calibration error", error, noise(p, seed),
                               "bar: 99th percentile under right probabilities"))  # fmt: skip
        else:
            out.append(show_only(SUITE, name, method, "calibration error", error))
        if method != EVEN:
            gain = parsers[EVEN].log_loss(form, sentence) - parser.log_loss(form, sentence)
            always = expected_loss(speaker, parsers[EVEN]) - expected_loss(speaker, parser)
            error = float(gain.std()) / math.sqrt(len(gain))
            out.append(at_least(SUITE, name, method, "log-loss saved over even p(s | f)", float(gain.mean()), 0.0,
                                f"standard error {error:.3f}; in expectation, exactly, {always:.3f}"))  # fmt: skip
    return out


def expected_loss(speaker: Parser, parser: Parser) -> float:
    """The expectation of a parser's log-loss over all of a speaker's ambiguous sentences, exactly."""
    at = speaker.ambiguous
    p = speaker.log_joint[:, at].flatten().softmax(0)
    loss = (parser.log_evidence[at] - parser.log_joint[:, at]).flatten()
    return float(torch.where(p > 0, p * loss, 0.0).sum())


def posterior(parser: Parser, sentence: Int[Tensor, " b"]) -> Float[Tensor, "b n"]:
    """log p(f | s) of sentences by number."""
    return (parser.log_joint - parser.log_evidence).T[sentence]


def prompted(
    name: str, lm: Any, parsers: Mapping[str, Parser], form: Int[Tensor, " b"], sentence: Int[Tensor, " b"]
) -> list[Row]:
    """The same model asked by a prompt, each distinct sentence once; every parser but the even one against it."""
    each, back = sentence.unique(return_inverse=True)
    log_p = by_glosses(lm, parsers[OWN], each)[back]
    p, hit = top(log_p, form)
    told, _ = by_decoding(lm, parsers[OWN], each)
    scored, greedy = "prompt, glosses scored", "prompt, greedy decoding"
    right, error = float((told[back] == form).double().mean()), calibration_error(p, hit)
    out = [
        show_only(SUITE, name, scored, "log-loss", -float(log_p.gather(1, form[:, None]).mean())),
        show_only(SUITE, name, scored, "top-1", float(hit.mean())),
        show_only(SUITE, name, scored, "calibration error", error),
        show_only(SUITE, name, greedy, "top-1", right),
        show_only(SUITE, name, greedy, "share that is a gloss of the language",
                  float((told[back] >= 0).double().mean())),
    ]  # fmt: skip
    for method, parser in parsers.items():
        if method != EVEN:
            mine, found = top(posterior(parser, sentence), form)
            above = float(found.mean()) - max(float(hit.mean()), right)
            out.append(at_least(SUITE, name, method, "top-1 above the better prompt", above, 0.0))
            out.append(at_most(SUITE, name, method, "calibration error, against the prompt's",
                               calibration_error(mine, found), error))  # fmt: skip
    return out


def sampled(own: Parser, asker: Asker, seed: int) -> list[Row]:
    """The marginal over readings of sentences drawn from the model within the language, against the sum over all."""
    log_lm = sentence_scores(own, asker)
    share = log_lm.softmax(0)
    drawn = sample_categorical(log_lm.expand(SAMPLED, -1), generator(seed, "cpu", 3))
    found, (names, p) = marginal(own, drawn), own.readings()
    exact = (share[:, None] * p).sum(0)
    off = (found.share - exact).abs() / found.se.clamp_min(1e-4)
    name = f"forms of {SAMPLED:,} sentences of the model"
    order = exact.argsort(descending=True)[:5].tolist()
    out = [show_only(SUITE, name, "marginal", names[i], float(found.share[i]),
                     f"95% interval {found.interval()[i, 0]:.3f} to {found.interval()[i, 1]:.3f}, exact {exact[i]:.3f}")
           for i in order]  # fmt: skip
    return [*out, at_most(SUITE, name, "marginal", "largest error in standard errors", float(off.max()), 4.0,
                          f"{len(names)} readings; every sentence of the language summed")]  # fmt: skip


def sentence_scores(parser: Parser, asker: Asker) -> Float[Tensor, " s"]:
    """log p_LM of every sentence of the language."""
    found = asker.log_p([(PROMPT, as_text(s)) for s in parser.sentences])
    assert bool((found > NEG_INF).all())
    return found
