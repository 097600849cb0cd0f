"""log p(Y | X, z): how well the latent explains what follows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from retrodict.models.ragged import peek_ragged
from retrodict.numerics import NEG_INF, at_end
from retrodict.policies.base import FiniteStepper
from retrodict.policies.lm import LMPolicy
from retrodict.protocols import LanguageModel, Problems
from retrodict.records import Problem, Rollouts
from retrodict.spaces.strings import Strings


@dataclass(frozen=True)
class Likelihood:
    """The evidence's log-probability after the latent, stop text included where it belongs to the latent.

    Every prefix at once by the packed tree mask.
    """

    lm: LanguageModel
    space: Strings
    problems: Problems
    name: str = "likelihood"
    noise: str = "none"
    prefixes: bool = True

    @property
    def version(self) -> str:
        """The model's fingerprint."""
        return self.lm.version

    def __call__(self, rollouts: Rollouts, every_prefix: bool = False) -> Tensor:
        """log p(Y | X, z): ``[b]``, or after every prefix ``[b, t+1, s]`` (-inf past the end)."""
        rows = [self.problems[i] for i in rollouts.problem.tolist()]
        suffixes = [[(*self.space.stops.text_ids(s), *row.evidence) for row in rows] for s in range(self.space.n_stops)]
        skip = len(self.space.stops.text_ids(0))
        values = self.lm.score_suffixes(
            [r.context for r in rows], rollouts.moves, rollouts.n, suffixes, every=every_prefix, skip=skip
        )
        if not every_prefix:
            return at_end(values, rollouts.n, rollouts.stop)
        inside = torch.arange(values.shape[1], device=values.device) <= rollouts.n[:, None].to(values.device)
        return torch.where(inside[:, :, None], values, NEG_INF)

    def at_end(
        self,
        policy: FiniteStepper,
        c: Any,
        index: Int[Tensor, " e"],
        problem: Int[Tensor, " e"],
        stop: Int[Tensor, " e"],
    ) -> Float[Tensor, " e"] | None:
        """log p(Y | X, z) of rows ``index`` that stop now, read off the cache they were drawn with.

        None where the policy's model did not read what the likelihood's model must have read.
        """
        if not isinstance(policy, LMPolicy) or policy.lm.version != self.lm.version or policy.reads != "context":
            return None
        ends = zip(problem.tolist(), stop.tolist(), strict=True)
        suffixes = [(*self.space.stops.text_ids(s), *self.problems[p].evidence) for p, s in ends]
        return peek_ragged(policy.lm, c.cache, c.rows[index], suffixes, len(self.space.stops.text_ids(0)))

    def on(self, problems: Sequence[Problem]) -> Likelihood:
        """The same model on other problems."""
        return replace(self, problems=problems)
