"""Integer arithmetic with a calculator: X a question, Z the steps, Y the answer (Hu et al. 2024, arXiv:2310.04363).

    X  Question: 6 - 0 - 4 - 8 = ? Answer:        Z   6 - 0 = 6, 6 - 4 = 2, 2 - 8 = -6.        Y   The answer is -6.

The calculator writes what follows each "=" of Z and reads two operands at most, so the policy must say the right steps
and may not say their results. Files annotate the steps without results ("6 - 0 =, 6 - 4 =, 2 - 8 ="): those are the
tool's. Z ends with ".", and Y follows it; together they are the file's ". The answer is -6.".

What must be one token: the stop ".", and a token that ends with the trigger "=". SmolLM2 has both, as do the other
vocabularies that split digits one by one: " 14 - 3 =" is the seven tokens " ", "1", "4", " -", " ", "3", " =", so a
space before a digit is a token of its own, and a sign before a digit brings its space (" -", "6").
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from retrodict.diagnostics.calibration import RiskCoverage, calibration_error, risk_coverage
from retrodict.errors import InputError
from retrodict.protocols import LanguageModel
from retrodict.records import FORCED, Problem, Rollouts
from retrodict.rng import generator
from retrodict.spaces.limits import Limit
from retrodict.spaces.strings import Strings
from retrodict.spaces.tools import Tool, ToolStrings, with_tool
from retrodict.targets.algebra import Target
from retrodict.targets.likelihood import Likelihood
from retrodict.targets.problems import problems as read
from retrodict.targets.ready import from_prior, strings
from retrodict.tools.calculator import calculator

SHOTS = (
    "Question: 7 + 2 - 5 = ? Answer: 7 + 2 = 9, 9 - 5 = 4. The answer is 4.\n"
    "Question: 3 - 8 + 6 + 4 = ? Answer: 3 - 8 = -5, -5 + 6 = 1, 1 + 4 = 5. The answer is 5.\n"
    "Question: 4 + 9 - 1 = ? Answer: 4 + 9 = 13, 13 - 1 = 12. The answer is 12.\n"
)
"""Three worked examples that p reads before each question."""

CHARACTERS = "0123456789+-=,"
"""What steps are made of, besides spaces."""

MAX_TOKENS = 40
"""Free tokens of a string. The steps of a question of k operands take at most 9 (k - 1)."""

ROOM = 24
"""Tokens that the calculator may write into a string."""

_QUERY = re.compile(r"Question: ([0-9](?: [-+] [0-9])+) = \? Answer:\Z")


@dataclass(frozen=True)
class Question:
    """One question. ``rationale`` is the annotated steps without results, or ``None`` where nobody wrote them."""

    query: str
    answer: int
    rationale: str | None = None


# -- data -----------------------------------------------------------------------------------------------------------


def steps(query: str) -> tuple[str, int]:
    """The steps of a question from left to right, without results, and its answer.

    Raises:
        InputError: the query is not of the form "Question: 6 - 0 + 4 = ? Answer:".
    """
    found = _QUERY.match(query)
    if found is None:
        raise InputError(f"{query!r} is not a question of this task; write 'Question: 6 - 0 + 4 = ? Answer:'")
    first, *rest = found[1].split(" ")
    value, said = int(first), []
    for sign, operand in zip(rest[::2], rest[1::2], strict=True):
        said.append(f"{value} {sign} {operand} =")
        value = value + int(operand) if sign == "+" else value - int(operand)
    return ", ".join(said), value


def generate(n: int, *, operands: Sequence[int] = (3, 4), seed: int = 0) -> list[Question]:
    """n different questions of one-digit operands with + and -, annotated; the counts of ``operands`` take turns.

    Raises:
        InputError: a count below two, or more questions than there are.
    """
    if not operands or min(operands) < 2:
        raise InputError(f"a question has at least 2 operands, not {min(operands, default=0)}")
    if n < 0:
        raise InputError(f"the number of questions cannot be negative: {n}")
    each = {k: n // len(operands) + 1 for k in operands}
    short = next((k for k in operands if each[k] > 10 * 20 ** (k - 1) // 2), None)
    if short is not None:
        raise InputError(f"{n} different questions are too many for {short} operands; ask for fewer, or more operands")
    gen, seen = generator(seed), dict[str, Question]()
    while len(seen) < n:
        k = operands[len(seen) % len(operands)]
        digits = torch.randint(10, (k,), generator=gen).tolist()
        signs = torch.randint(2, (k - 1,), generator=gen).tolist()
        terms = "".join(f" {'+-'[s]} {d}" for s, d in zip(signs, digits[1:], strict=True))
        query = f"Question: {digits[0]}{terms} = ? Answer:"
        rationale, answer = steps(query)
        seen.setdefault(query, Question(query, answer, rationale))
    return list(seen.values())


def load(path: str | Path) -> list[Question]:
    """Questions from a file of rows {str_query, num_sol, str_rationale, str_sol}, the last two where they are known.

    Raises:
        InputError: no such file, a row without query or answer, or an answer that is no integer or is not the one that
            str_sol gives; file, row and field are named.
    """
    out = []
    for i, row in enumerate((p.row for p in read(path, context="{str_query}", evidence="{num_sol}")), 1):
        answer, rationale = row["num_sol"], row.get("str_rationale")
        if isinstance(answer, bool) or not isinstance(answer, int):
            raise InputError(f"{path}, row {i}: field 'num_sol' is {answer!r}; give an integer")
        for name, value in (("str_query", row["str_query"]), ("str_rationale", rationale or "")):
            if not isinstance(value, str):
                raise InputError(f"{path}, row {i}: field {name!r} is {value!r}; give a string")
        if row.get("str_sol", _solution(answer)) != _solution(answer):
            raise InputError(f"{path}, row {i}: field 'str_sol' is {row['str_sol']!r}, and num_sol is {answer}")
        out.append(Question(row["str_query"], answer, rationale))
    return out


def _solution(answer: int) -> str:
    return f". The answer is {answer}."


# -- problems ---------------------------------------------------------------------------------------------------------


def problems(lm: LanguageModel, questions: Sequence[Question], shots: str = SHOTS) -> list[Problem]:
    """Ids of the questions under a model: X with the worked examples before it, Y what follows the steps' "."."""
    out = []
    for q in questions:
        context = lm.tokenizer.encode(shots + q.query)
        evidence = lm.tokenizer.encode(_solution(q.answer).removeprefix("."))
        out.append(Problem(tuple(context), tuple(evidence), None, vars(q), q.query))
    return out


def space(
    lm: LanguageModel,
    *,
    operands: int | None = 2,
    max_tokens: int = MAX_TOKENS,
    limit: Limit = "force",
    any_token: bool = False,
) -> ToolStrings:
    """Steps with a calculator in them, ended by ".".

    Args:
        lm: the model, for its vocabulary.
        operands: how many operands the calculator reads, see :func:`retrodict.tools.calculator.calculator`.
        max_tokens, limit: limit on free tokens, and what happens there.
        any_token: let q say anything. By default it says spaces and CHARACTERS, one a token; p keeps its raw
            log-probabilities, so the posterior is that given that the steps are made of those.

    Raises:
        InputError: the tokenizer has no token that ends with "=", or cannot write a step in single characters.
    """
    if not any(lm.tokenizer.decode([i]).endswith("=") for i in vocabulary(lm)):
        raise InputError(f"{lm.name} has no token for '=', which must call the calculator; use another model")
    made = strings(lm, ".", max_tokens, limit) if any_token else characters_only(lm, max_tokens, limit)
    return with_tool(made, Tool(calculator(operands), trigger="=", room=ROOM, name="calculator"))


def characters_only(lm: LanguageModel, max_tokens: int = MAX_TOKENS, limit: Limit = "force") -> Strings:
    """Strings of spaces and CHARACTERS, one a token, ended by "."; no calculator.

    Raises:
        InputError: the tokenizer cannot write a step in single characters.
    """
    made, ids = strings(lm, ".", max_tokens, limit), vocabulary(lm)
    missing = sorted({c for c in CHARACTERS if not any(lm.tokenizer.decode([i]).strip() == c for i in ids)})
    if missing:
        raise InputError(f"{lm.name} has no token for {missing[0]!r} alone; use any_token=True")
    keep = {*ids, *made.stops.ids}
    banned = tuple(i for i in range(lm.vocab_size) if i not in keep)
    return Strings(lm.vocab_size, made.stops, max_tokens, limit, 0, banned, lm.tokenizer)


def vocabulary(lm: LanguageModel) -> list[int]:
    """Ids of a space, and of each of CHARACTERS with or without a space before it."""
    wanted = {b" ", *(c.encode() for c in CHARACTERS), *(b" " + c.encode() for c in CHARACTERS)}
    return [i for i, text in enumerate(lm.token_bytes) if text in wanted]


def target(lm: LanguageModel, data: Sequence[Problem], where: ToolStrings) -> Target:
    """p(Z | X, Y): the prior over free moves times p(Y | X, Z with its insertions)."""
    prior = from_prior(lm, data, where)
    likelihood = Likelihood(lm, where, data)
    factors = {**prior.factors, "likelihood": likelihood}
    return Target(where, data, factors, prior=prior.prior, note="Y follows the stop's text; the tool's text is free")


# -- evaluation -------------------------------------------------------------------------------------------------------


def predictions(rollouts: Rollouts, lm: LanguageModel) -> list[int | None]:
    """Each chain's prediction: the last number that the tool wrote into it; None where it wrote none."""
    out: list[int | None] = []
    for moves, kind, n in zip(rollouts.moves.tolist(), rollouts.kind.tolist(), rollouts.n.tolist(), strict=True):
        end = max((i + 1 for i in range(n) if kind[i] == FORCED), default=0)
        start = end
        while start > 0 and kind[start - 1] == FORCED:
            start -= 1
        text = lm.tokenizer.decode(moves[start:end]).strip()
        out.append(int(text) if re.fullmatch(r"-?[0-9]+", text) else None)
    return out


@dataclass(frozen=True)
class Accuracy:
    """How often answers are right, and how well the share of the vote says so.

    Attributes:
        vote: share of questions whose most voted answer is right.
        chain: share of right answers among single chains, the mean over questions.
        answered: share of chains with an answer.
        ece: expected calibration error of the share of the vote, see ``diagnostics.calibration``.
        risk: risk and coverage, the most agreed answers first.
        predicted: the winner of each question, None where no chain answered.
        share: its share of the vote.
    """

    vote: float
    chain: float
    answered: float
    ece: float
    risk: RiskCoverage
    predicted: tuple[int | None, ...]
    share: Float[Tensor, " m"]


def accuracy(
    rollouts: Rollouts, questions: Sequence[Question], lm: LanguageModel, weights: Float[Tensor, " b"] | None = None
) -> Accuracy:
    """Predict by counting, p(y | X) = sum of the weights of the chains that end in y, and compare with the answers.

    Args:
        rollouts: chains; ``rollouts.problem`` is the question's index.
        questions: in the order of the problems.
        weights: of the chains, if they are not equal (``particles.weights.flatten()``).

    Chains without an answer keep their share of the vote, and win nothing. Ties go to the answer that came first.

    Raises:
        InputError: a question without a chain.
    """
    share_of: list[dict[int, float]] = [{} for _ in questions]
    total = [0.0] * len(questions)
    w = torch.ones(len(rollouts), dtype=torch.float64) if weights is None else weights.double().cpu()
    for q, y, x in zip(rollouts.problem.tolist(), predictions(rollouts, lm), w.tolist(), strict=True):
        total[q] += x
        if y is not None:
            share_of[q][y] = share_of[q].get(y, 0.0) + x
    seen = set(rollouts.problem.tolist())
    lost = next((i for i in range(len(questions)) if i not in seen), None)
    if lost is not None or not questions:
        raise InputError(f"question {lost} has no chain; draw at least one for each" if questions else "no questions")
    votes = [{y: x / t for y, x in s.items()} if t else {} for s, t in zip(share_of, total, strict=True)]
    predicted = tuple(max(v, key=lambda y: v[y]) if v else None for v in votes)
    share = torch.tensor([max(v.values(), default=0.0) for v in votes], dtype=torch.float64).clamp_max(1.0)
    right = torch.tensor([y == q.answer for y, q in zip(predicted, questions, strict=True)])
    chain = sum(v.get(q.answer, 0.0) for v, q in zip(votes, questions, strict=True)) / len(questions)
    answered = sum(sum(v.values()) for v in votes) / len(questions)
    return Accuracy(float(right.double().mean()), chain, answered, calibration_error(share, right),
                    risk_coverage(share, right), predicted, share)  # fmt: skip
