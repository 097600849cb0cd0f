"""A language model's prior over graphs, edge by edge: one yes-or-no question for every ordered pair of variables.

    l_f(i, j) = log p(yes | question f about i, j) - log p(no | the same)
    l(i, j)   = mean over forms f of [l_f(i, j) - mean over content-free pairs of l_f]
    p(i -> j) = sigmoid(slope * l(i, j) + bias)
    log p(G)  = alpha * sum over i != j of [A_ij log p(i -> j) + (1 - A_ij) log(1 - p(i -> j))]

A form is a verb and the order in which the two options are named. Log-odds are averaged, not probabilities: a
preference for the option named first, or for one verb, then cancels exactly where it is a constant. What is left of a
preference for "yes" as such is taken off by questions about nothing in particular (contextual calibration, Zhao et al.
2021, arXiv:2102.09690). ``slope`` and ``bias`` are fitted on pairs whose answer is known (Platt 1999); 1 and 0
without. ``alpha`` sets the prior against the data, 0 for none: log-probabilities of a model and of data differ by
orders of magnitude. Edges are independent in this prior, but for what the space of graphs forbids; it is a sum over
parent sets, so one edge changes it by one look-up. Related: Long et al. 2023 (random verbs, options A and B).

Bias: whatever the model believes. Nothing here makes a small model know causes; measure it against known graphs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from retrodict.errors import InputError
from retrodict.structures.ask import Asker

VERBS = ("directly cause", "directly affect", "directly influence", "have a direct effect on")
ORDERS = (("yes", "no"), ("no", "yes"))
"""How the two options are named in the question."""
OPTIONS = (" yes", " no")
"""How they are scored: whole strings after "Answer:"."""
QUESTION = "{context}Question: Does {cause} {verb} {effect}? Answer {first} or {second}.\nAnswer:"
NEUTRAL = (("one thing", "another thing"), ("N/A", "N/A"), ("X", "Y"))
"""Pairs about nothing in particular."""

Variables = Mapping[str, str] | Sequence[str]
"""Names, or names with the words that describe them."""


def phrases_of(variables: Variables) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names, and how each is called in a question: its description, or its name with spaces for underscores.

    Raises InputError for fewer than two variables, or two that are called the same.
    """
    names = tuple(variables)
    told = variables if isinstance(variables, Mapping) else {}
    phrases = tuple((told.get(n) or n.replace("_", " ")).strip() for n in names)
    if len(names) < 2:
        raise InputError(f"give at least two variables, not {len(names)}")
    for i, phrase in enumerate(phrases):
        if phrase in phrases[:i]:
            first = names[phrases.index(phrase)]
            raise InputError(f"the variables {first!r} and {names[i]!r} are both called {phrase!r}; describe one anew")
    return names, phrases


@dataclass(frozen=True)
class EdgeAnswers:
    """What was asked and answered: d variables, f forms of the question, the options yes and no.

    Attributes:
        names, phrases: the variables, and how the questions call them.
        forms: (verb, option named first) of each form.
        log_p: log p(option | question), 0 on the diagonal.
        null: the same for questions about nothing in particular, one row a neutral pair.
        outside: mass of answers that are neither option.
        version: of the model and the wording.
    """

    names: tuple[str, ...]
    phrases: tuple[str, ...]
    forms: tuple[tuple[str, str], ...]
    log_p: Float[Tensor, "d d f 2"]
    null: Float[Tensor, "m f 2"]
    outside: Float[Tensor, "d d f"]
    version: str

    @property
    def each(self) -> Float[Tensor, "d d f"]:
        """log p(yes) - log p(no), form by form."""
        return self.log_p[..., 0] - self.log_p[..., 1]

    @property
    def null_log_odds(self) -> Float[Tensor, " f"]:
        """What each form says of nothing in particular: the mean over the neutral pairs."""
        return (self.null[..., 0] - self.null[..., 1]).mean(0)

    def log_odds(self) -> Float[Tensor, "d d"]:
        """Null-corrected and averaged over forms; 0 on the diagonal."""
        return (self.each - self.null_log_odds).mean(2).fill_diagonal_(0.0)

    def rows(self) -> list[dict[str, Any]]:
        """One mapping a pair and form, for tables."""
        out, null = [], self.null_log_odds.tolist()
        for i, cause in enumerate(self.names):
            for j, effect in enumerate(self.names):
                for f, (verb, first) in enumerate(self.forms):
                    if i != j:
                        yes, no = self.log_p[i, j, f].tolist()
                        out.append({"cause": cause, "effect": effect, "verb": verb, "first": first,
                                    "log_p_yes": yes, "log_p_no": no, "log_odds": yes - no, "null": null[f],
                                    "outside": float(self.outside[i, j, f])})  # fmt: skip
        return out


def ask_edges(
    asker: Asker,
    variables: Variables,
    *,
    context: str = "",
    verbs: Sequence[str] = VERBS,
    question: str = QUESTION,
) -> EdgeAnswers:
    """Ask about every ordered pair, in every verb and option order.

    Args:
        asker: scores and caches.
        variables: names, or names with descriptions, which then stand in the questions.
        context: what comes before each question: the field it belongs to, or examples.
        verbs: as they follow "Does X".
        question: a template of {context} {cause} {verb} {effect} {first} {second}.
    """
    names, phrases = phrases_of(variables)
    forms = [(verb, first, second) for verb in verbs for first, second in ORDERS]
    d, f = len(names), len(forms)

    def prompts(cause: str, effect: str) -> list[str]:
        return [question.format(context=context, cause=cause, verb=v, effect=e, first=a, second=b)
                for (v, a, b), e in ((form, effect) for form in forms)]  # fmt: skip

    pairs = [(i, j) for i in range(d) for j in range(d) if i != j]
    found = asker.options([p for i, j in pairs for p in prompts(phrases[i], phrases[j])], OPTIONS)
    null = asker.options([p for a, b in NEUTRAL for p in prompts(a, b)], OPTIONS).view(len(NEUTRAL), f, 2)
    log_p, outside = torch.zeros(d, d, f, 2, dtype=torch.float64), torch.zeros(d, d, f, dtype=torch.float64)
    cause, effect = torch.tensor(pairs).unbind(1)
    log_p[cause, effect] = found.view(-1, f, 2)
    outside[cause, effect] = asker.outside(found, OPTIONS).view(-1, f)
    version = f"edges:{asker.lm.name}/{asker.lm.version}/{f} forms of {question!r} after {context!r}"
    return EdgeAnswers(names, phrases, tuple((v, a) for v, a, _ in forms), log_p, null, outside, version)


# -- calibration ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Calibration:
    """p = sigmoid(slope * log-odds + bias); 1 / slope is a temperature."""

    slope: float = 1.0
    bias: float = 0.0

    def __call__(self, log_odds: Float[Tensor, "d d"]) -> Float[Tensor, "d d"]:
        """Calibrated log-odds."""
        return self.slope * log_odds + self.bias


RIDGE = 10.0
"""Standard deviation, in nats, of the pull of slope towards 1 and bias towards 0: known pairs may be separable."""


def calibrate(known: Sequence[tuple[Float[Tensor, "_ _"], Bool[Tensor, "_ _"]]]) -> Calibration:
    """Slope and bias by logistic regression on the ordered pairs of known graphs (log-odds, adjacency).

    A model that is worse than chance on them gets slope 0, hence the known graphs' share of edges for every pair; it
    is not read backwards.
    """
    off = [~torch.eye(len(a), dtype=torch.bool) for _, a in known]
    if not known:
        raise InputError("calibration needs at least one known graph: (log-odds, adjacency)")
    x = torch.cat([log_odds[keep] for (log_odds, _), keep in zip(known, off, strict=True)]).double()
    y = torch.cat([a[keep] for (_, a), keep in zip(known, off, strict=True)]).double()
    slope, bias = _logistic(torch.stack([x, torch.ones_like(x)], 1), y, torch.tensor([1.0, 0.0]).double())
    if slope < 0:
        return Calibration(0.0, _logistic(torch.ones_like(x)[:, None], y, torch.zeros(1).double())[0])
    return Calibration(slope, bias)


def _logistic(x: Float[Tensor, "n k"], y: Float[Tensor, " n"], start: Float[Tensor, " k"]) -> list[float]:
    """Newton's method on the penalised likelihood, which is strictly concave; steps are halved until it rises."""
    pull = torch.eye(x.shape[1]).double() / RIDGE**2

    def value(w: Tensor) -> Tensor:
        z = x @ w
        return (y * z - torch.nn.functional.softplus(z)).sum() - 0.5 * (w - start) @ pull @ (w - start)

    w = start.clone()
    for _ in range(100):
        p = torch.sigmoid(x @ w)
        slope = x.T @ (y - p) - pull @ (w - start)
        step = torch.linalg.solve((x * (p * (1 - p))[:, None]).T @ x + pull, slope)
        while value(w + step) < value(w) and step.abs().max() > 1e-12:
            step = step / 2
        w = w + step
        if step.abs().max() < 1e-10:
            break
    return w.tolist()


# -- the prior ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EdgePrior:
    """log p(G) = alpha * log of a product of independent edges with the given log-odds; modular.

    Normalised over all directed graphs at alpha = 1; over acyclic ones, or at another alpha, a constant is missing.
    ``alpha`` = 0 is the uniform prior.
    """

    log_odds: Float[Tensor, "d d"]
    alpha: float = 1.0
    source: str = "edges"

    def __post_init__(self) -> None:
        if not (math.isfinite(self.alpha) and self.alpha >= 0):
            raise InputError(f"alpha must be 0 or more, not {self.alpha}; 0 is the uniform prior, 1 the model's own")
        if not bool(self.log_odds.isfinite().all()):
            raise InputError("log-odds of edges must be finite; forbid or require an edge in the space instead")

    @property
    def version(self) -> str:
        """Where the log-odds come from, and the exponent."""
        return f"{self.source}^{self.alpha:g}"

    @property
    def d(self) -> int:
        """Number of variables."""
        return len(self.log_odds)

    @property
    def probabilities(self) -> Float[Tensor, "d d"]:
        """p(i -> j) at alpha = 1, before any constraint; 0 on the diagonal."""
        return torch.sigmoid(self.log_odds.double()).fill_diagonal_(0.0)

    def gather(self, child: Int[Tensor, " n"], parents: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
        """See ``modular.Modular``."""
        node = torch.arange(self.d)
        present = (parents[:, None] >> node & 1).bool()
        into = self.log_odds.double().T[child]
        each = torch.nn.functional.logsigmoid(torch.where(present, into, -into))
        return self.alpha * each.masked_fill(node == child[:, None], 0.0).sum(1)


def edge_prior(answers: EdgeAnswers, alpha: float = 1.0, calibration: Calibration | None = None) -> EdgePrior:
    """The prior that a model's answers amount to."""
    fitted = calibration or Calibration()
    source = f"{answers.version}/{fitted.slope:g}x+{fitted.bias:g}"
    return EdgePrior(fitted(answers.log_odds()), alpha, source)
