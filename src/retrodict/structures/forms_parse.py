"""Parsing as inference: p(form | sentence), with a language model as the judge of how a form is said.

    p(f | s)  ~  p(f) p(s | f),     p(s | f) = p_LM(s)^alpha / sum over s' in R(f) of p_LM(s')^alpha     s in R(f)

p(f) is by description length (``policies.choices``), p_LM the model's probability of the sentence as a text after a
prompt. The sum is what makes the model count: without it p_LM(s) is the same factor for all forms of s and cancels in
p(f | s). It says that a form for which there is a more natural sentence would hardly have been said by this one. With
"{gloss}" in the prompt p_LM(s) is p_LM(s | gloss of f), which differs between forms. Whole sentences differ by many
nats, so that a model at alpha = 1 is far surer of how people speak than it should be; alpha = 0 is even odds over R(f).

Exact: the forms are listed. Bias: the model's, as a judge of sentences; R(f) is closed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from retrodict.errors import InputError, nearest
from retrodict.numerics import NEG_INF, sample_categorical
from retrodict.objectives.mle import object_log_q
from retrodict.policies.choices import EvenChoices
from retrodict.policies.net import NetPolicy
from retrodict.protocols import Problems
from retrodict.records import Problem, Rollouts
from retrodict.structures.ask import Asker
from retrodict.structures.forms import Form, Forms
from retrodict.targets.algebra import Target
from retrodict.targets.prior import Prior
from retrodict.training.learn import learn
from retrodict.training.threads import one_thread

PROMPT = "This is what happened."
"""What a sentence follows, as a text."""
GLOSS_PROMPT = '"{gloss}" means the same as:'
"""What it follows where the form's gloss is told."""
ALPHAS = (0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.7, 1.0)
"""Among these :func:`fitted_alpha` chooses."""
WORD = re.compile(r"[a-z']+|,")

Weigh = Callable[[Form], Float[Tensor, " k"]]
"""Unnormalised log-weights of the sentences of R(f), in their order."""


def as_text(sentence: str) -> str:
    """A sentence as it is written after a prompt."""
    return f" {sentence[0].upper()}{sentence[1:]}."


def words_of(sentence: str) -> tuple[str, ...]:
    """Its words and commas, in lower case: what two spellings of one sentence share."""
    return tuple(WORD.findall(sentence.lower()))


def evenly(form: Form) -> Float[Tensor, " k"]:
    """Every sentence of R(f) is as likely as the others."""
    return torch.zeros(len(form.says), dtype=torch.float64)


def by_model(asker: Asker, forms: Sequence[Form], prompt: str = PROMPT, alpha: float = 1.0) -> Weigh:
    """alpha log p_LM(s) after a prompt, in which "{gloss}" stands for the form's; each distinct pair is scored once."""
    pairs = [(prompt.format(gloss=f.gloss), as_text(s)) for f in forms for s in f.sentences]
    asker.log_p(pairs)  # all at once, in batches

    def weigh(form: Form) -> Float[Tensor, " k"]:
        return alpha * asker.log_p([(prompt.format(gloss=form.gloss), as_text(s)) for s in form.sentences])

    return weigh


def fitted_alpha(
    asker: Asker, space: Forms, form: Int[Tensor, " b"], sentence: Int[Tensor, " b"], prompt: str = PROMPT
) -> float:
    """The alpha of least log-loss on pairs (form, sentence) by number, whose forms are known."""

    def loss(alpha: float) -> float:
        return float(Parser(space, by_model(asker, space.forms, prompt, alpha)).log_loss(form, sentence).mean())

    return min(ALPHAS, key=loss)


def by_ways(odds: Mapping[str, Mapping[str, float]]) -> Weigh:
    """Fixed odds of the ways to say a form of each reading: {reading: {way: odds}}."""

    def weigh(form: Form) -> Float[Tensor, " k"]:
        if form.reading not in odds:
            raise InputError(f"no odds for the reading {form.reading!r}{nearest(form.reading, odds)}")
        missing = [way for way, _ in form.says if way not in odds[form.reading]]
        if missing:
            raise InputError(f"no odds for the way {missing[0]!r} of the reading {form.reading!r}; give them all")
        return torch.tensor([odds[form.reading][way] for way, _ in form.says], dtype=torch.float64).log()

    return weigh


class Parser:
    """p(form, sentence) of a language, listed.

    Attributes:
        space: of the forms; ``rows`` has each once.
        sentences: all that some form may be said by.
        log_prior: log p(f), float64.
        log_say: log p(s | f), -inf outside R(f).
        ambiguous: sentences that say more than one form.
    """

    def __init__(self, space: Forms, weigh: Weigh) -> None:
        self.space, self.rows = space, space.rows()
        self.log_prior: Float[Tensor, " n"] = object_log_q(EvenChoices(space, []).score(self.rows), self.rows)
        self.sentences = tuple(dict.fromkeys(s for f in space.forms for s in f.sentences))
        self.index = {words_of(s): i for i, s in enumerate(self.sentences)}
        size = len(self.rows), len(self.sentences)
        self.log_say: Float[Tensor, "n s"] = torch.full(size, NEG_INF, dtype=torch.float64)
        for i, form in enumerate(space.forms):
            at = [self.index[words_of(s)] for s in form.sentences]
            self.log_say[i, at] = weigh(form).double().log_softmax(0)
        self.log_joint: Float[Tensor, "n s"] = self.log_prior[:, None] + self.log_say
        self.log_evidence: Float[Tensor, " s"] = self.log_joint.logsumexp(0)
        self.ambiguous: Tensor = ((self.log_say > NEG_INF).sum(0) > 1).nonzero().squeeze(1)

    def find(self, sentence: str) -> int:
        """The number of a sentence. Raises InputError, saying which words no form has there, where none says it."""
        words = words_of(sentence)
        if words not in self.index:
            raise InputError(self._outside(sentence, words))
        return self.index[words]

    def _outside(self, sentence: str, words: tuple[str, ...]) -> str:
        """The span between the longest beginning and the longest end that sentences of the language have."""
        heads = {w[:i] for w in self.index for i in range(len(w) + 1)}
        tails = {w[len(w) - i :] for w in self.index for i in range(len(w) + 1)}
        head = max(i for i in range(len(words) + 1) if words[:i] in heads)
        tail = max(i for i in range(len(words) + 1) if words[len(words) - i :] in tails)
        begin = min(head, len(words) - 1) if words else 0
        end = max(len(words) - tail, begin + 1)
        begin = min(begin, end - 1)
        after = sorted({w[head] for w in self.index if w[:head] == words[:head] and len(w) > head})
        goes = f"after {' '.join(words[:head])!r} may come" if head else "a sentence begins with"
        told = " ".join(words[begin:end]) or "nothing"
        where = f"word {end}" if end == begin + 1 else f"words {begin + 1} to {end}"
        return (f"{sentence!r} is outside the grammar at {told!r} ({where}): {goes} "
                f"{', '.join(after[:8]) if after else 'no more'}")  # fmt: skip

    def posterior(self, sentence: str) -> Float[Tensor, " n"]:
        """log p(f | s) of every form; -inf of those that the sentence does not say."""
        s = self.find(sentence)
        return self.log_joint[:, s] - self.log_evidence[s]

    def parse(self, sentence: str) -> list[tuple[Form, float]]:
        """The forms that a sentence may say and their probabilities, likeliest first."""
        p = self.posterior(sentence).exp()
        order = p.argsort(descending=True, stable=True)[: int((p > 0).sum())]
        return [(self.space.forms[i], float(p[i])) for i in order.tolist()]

    def simulate(self, n: int, gen: torch.Generator, ambiguous: bool = False) -> tuple[Tensor, Tensor]:
        """n pairs (form, sentence) by number from p(f) p(s | f); of ambiguous sentences only, where asked for."""
        joint = self.log_joint[:, self.ambiguous] if ambiguous else self.log_joint
        flat = sample_categorical(joint.flatten().expand(n, -1), gen)
        form, at = flat // joint.shape[1], flat % joint.shape[1]
        return form, self.ambiguous[at] if ambiguous else at

    def log_loss(self, form: Int[Tensor, " b"], sentence: Int[Tensor, " b"]) -> Float[Tensor, " b"]:
        """-log p(form | sentence) of pairs by number, in nats."""
        return self.log_evidence[sentence] - self.log_joint[form, sentence]

    def readings(self) -> tuple[tuple[str, ...], Float[Tensor, "s r"]]:
        """The readings, and p(reading | s) of every sentence."""
        names = tuple(dict.fromkeys(f.reading for f in self.space.forms))
        at = torch.tensor([names.index(f.reading) for f in self.space.forms])
        p = (self.log_joint - self.log_evidence).exp().T
        return names, torch.zeros(len(p), len(names), dtype=torch.float64).index_add(1, at, p)


@dataclass(frozen=True)
class Marginal:
    """What share of some sentences say each reading: the mean over sentences of p(reading | s), with its error."""

    readings: tuple[str, ...]
    share: Float[Tensor, " r"]
    se: Float[Tensor, " r"]

    def interval(self, z: float = 1.96) -> Float[Tensor, "r 2"]:
        """Normal interval, cut at 0 and 1."""
        return torch.stack([self.share - z * self.se, self.share + z * self.se], 1).clamp(0.0, 1.0)


def marginal(parser: Parser, sentence: Int[Tensor, " b"]) -> Marginal:
    """The marginal over readings of independent draws of sentences (by number); the error is over the draws."""
    names, p = parser.readings()
    each = p[sentence]
    return Marginal(names, each.mean(0), each.std(0) / math.sqrt(len(each)))


# -- as a target, and in one pass --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Said:
    """log p(s | f) of each problem's sentence: -inf for a form that is not said so."""

    parser: Parser
    problems: Problems
    name: str = "said"
    noise: str = "none"
    prefixes: bool = False
    version: str = "1"

    def __call__(self, rollouts: Rollouts, every_prefix: bool = False) -> Tensor:
        """``[b]``."""
        sentence = torch.tensor([p.row["number"] for p in self.problems])
        return self.parser.log_say[self.parser.space.which(rollouts), sentence[rollouts.problem]]

    def on(self, problems: Problems) -> Said:
        """The same for other sentences."""
        return replace(self, problems=problems)


def sentence_problem(parser: Parser, sentence: str) -> Problem:
    """A sentence as a problem; its features are the words by place. Raises InputError for one outside the grammar."""
    number = parser.find(sentence)
    vocabulary = sorted({w for words in parser.index for w in words})
    longest = max(map(len, parser.index))
    code = torch.zeros(longest, len(vocabulary))
    for i, word in enumerate(words_of(sentence)):
        code[i, vocabulary.index(word)] = 1.0
    return Problem((), row={"number": number, "features": code.flatten()}, name=sentence)


def forms_target(parser: Parser, problems: Problems) -> Target:
    """The posterior over forms of each sentence, for any sampler and policy."""
    prior = EvenChoices(parser.space, problems)
    return Target(parser.space, problems, {"prior": Prior(prior), "said": Said(parser, problems)}, prior=prior)


@dataclass(frozen=True)
class FormModel:
    """The generative model, for ``training.learn``: nothing in it is learned."""

    parser: Parser
    target: Target
    seen: tuple[Problem, ...]

    def simulate(self, n: int, gen: torch.Generator) -> tuple[Target, Rollouts]:
        """n pairs of a form and a sentence that says it."""
        form, sentence = self.parser.simulate(n, gen)
        found = [self.seen[i] for i in sentence.tolist()]
        return self.target.on(found), replace(self.parser.rows.take(form), problem=torch.arange(n))

    def m_step(self, particles: Any, seed: int) -> float:
        """Nothing to learn."""
        return 0.0


def amortize_forms(parser: Parser, **given: Any) -> NetPolicy:
    """q(form | sentence) for all sentences of the language, learned by sleep; ``given`` goes to ``training.learn``.

    The likelihood is zero for nearly all forms, so there is no wake step: a squared error could not learn it.
    """
    seen = tuple(sentence_problem(parser, s) for s in parser.sentences)
    target = forms_target(parser, seen)
    policy = NetPolicy(parser.space, seen, hidden=64, seed=int(given.get("seed", 0)))
    plan: dict[str, Any] = {"e_steps": 400, "dreams": 128, "lr": 1e-2, "lr_end": 0.02, "objective": "vargrad"}
    with one_thread():
        learn(FormModel(parser, target, seen), policy, rounds=1, draws=1, sleep=1.0, **{**plan, **given})
    return policy
