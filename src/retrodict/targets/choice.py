"""p(Y | X, z) among a fixed set of answers: what a classifier with a latent maximises.

    log f(z) = log p(Y | X, z) - log sum_c p(c | X, z)

Answers are scored as whole strings, so a label that the tokenizer splits costs nothing but its tokens.
Source: Hu et al. 2024, who renormalise over the two label tokens in the M-step of subjectivity.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from retrodict.errors import InputError
from retrodict.numerics import NEG_INF
from retrodict.protocols import LanguageModel, Problems
from retrodict.records import Problem, Rollouts
from retrodict.spaces.strings import Strings

Answer = str | Sequence[int]


def answer_ids(lm: LanguageModel, answers: Sequence[Answer]) -> tuple[tuple[int, ...], ...]:
    """Token ids of answers, which follow the latent as they stand (write the leading space).

    Raises InputError for fewer than two, an empty one, or two that are the same to the tokenizer.
    """
    ids = tuple(tuple(lm.tokenizer.encode(a) if isinstance(a, str) else a) for a in answers)
    if len(ids) < 2:
        raise InputError(f"give at least two answers to choose from, not {len(ids)}")
    for i, a in enumerate(ids):
        if not a:
            raise InputError(f"the answer {answers[i]!r} has no tokens; give it text")
        if a in ids[:i]:
            raise InputError(
                f"the answers {answers[ids.index(a)]!r} and {answers[i]!r} are the same tokens; change one"
            )
    return ids


def answers_log_p(
    lm: LanguageModel,
    space: Strings,
    problems: Problems,
    rollouts: Rollouts,
    answers: Sequence[Sequence[int]],
    every_prefix: bool = False,
) -> Float[Tensor, "b t1 s c"] | Float[Tensor, "b c"]:
    """log p(answer | X, z, stop) of each answer after each latent (after every prefix and stop, where asked for)."""
    rows = rollouts.problem.tolist()
    ends = range(space.n_stops)
    suffixes = [[(*space.stops.text_ids(s), *a)] * len(rows) for s in ends for a in answers]
    heads = [problems[i].context for i in rows]
    skip = len(space.stops.text_ids(0))
    found = lm.score_suffixes(heads, rollouts.moves, rollouts.n, suffixes, every=every_prefix, skip=skip)
    found = found.unflatten(2, (len(ends), len(answers)))
    n = rollouts.n.to(found.device)
    if not every_prefix:
        return found[torch.arange(len(n), device=found.device), n, rollouts.stop.to(found.device)]
    inside = torch.arange(found.shape[1], device=found.device) <= n[:, None]
    return torch.where(inside[:, :, None, None], found, NEG_INF)


@dataclass(frozen=True)
class Choice:
    """The evidence's log-probability after the latent, given that it is one of ``answers``."""

    lm: LanguageModel
    space: Strings
    problems: Problems
    answers: tuple[tuple[int, ...], ...]
    name: str = "likelihood"
    noise: str = "none"
    prefixes: bool = True

    @property
    def version(self) -> str:
        """The model's fingerprint and the answers."""
        return f"{self.lm.version}/among {self.answers}"

    def index(self, problem: Sequence[int]) -> Int[Tensor, " b"]:
        """Which answer is the evidence of each problem. Raises InputError for one that is none of them."""
        of = {a: i for i, a in enumerate(self.answers)}
        missing = [i for i in problem if self.problems[i].evidence not in of]
        if missing:
            name = self.problems[missing[0]].name or missing[0]
            raise InputError(
                f"problem {name}: its evidence is none of the answers; give it as one of them, to the token"
            )
        return torch.tensor([of[self.problems[i].evidence] for i in problem])

    def __call__(self, rollouts: Rollouts, every_prefix: bool = False) -> Tensor:
        """``[b]``, or after every prefix ``[b, t+1, s]`` (-inf past the end)."""
        found = answers_log_p(self.lm, self.space, self.problems, rollouts, self.answers, every_prefix)
        which = self.index(rollouts.problem.tolist()).to(found.device)
        pick = which.view(-1, *[1] * (found.dim() - 1)).expand(*found.shape[:-1], 1)
        mine, norm = found.gather(-1, pick).squeeze(-1), found.logsumexp(-1)
        return torch.where(mine == NEG_INF, NEG_INF, mine - norm)

    def on(self, problems: Sequence[Problem]) -> Choice:
        """The same model and answers on other problems."""
        return replace(self, problems=problems)
