"""A language model as a policy over strings. The same class is the prior: p is its ``raw`` log-probabilities."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad

from retrodict.errors import InputError
from retrodict.numerics import NEG_INF, log_prob_of
from retrodict.policies.base import FiniteStepper, over_menu, rollout
from retrodict.protocols import LanguageModel, Problems
from retrodict.records import FORCED, FREE, Menu, Rollouts, Scores
from retrodict.spaces.strings import Strings, StringState


@dataclass
class LMCarry:
    """A cache of distinct prefixes, and which of them each row is. Gathering rows moves no cache."""

    cache: Any
    rows: Int[Tensor, " b"]
    log_p: Float[Tensor, "r v"]
    tidy: bool = True
    """Whether row i is cache row i, for all rows."""


class LMPolicy(FiniteStepper):
    """log q(token | what q reads, prefix) under a view of a language model, renormalised over the space's menu.

    ``reads`` is what the model sees before the latent: ``"context"`` (X; the prior) or ``"q_prompt"``.
    """

    def __init__(
        self,
        lm: LanguageModel,
        space: Strings,
        problems: Problems,
        reads: Literal["context", "q_prompt"] = "context",
    ) -> None:
        self.lm, self.space, self.problems = lm, space, problems
        self.reads: Literal["context", "q_prompt"] = reads

    @property
    def version(self) -> str:
        """Fingerprint of the weights and of what they read."""
        return f"{self.lm.version}/{self.reads}"

    def on(self, problems: Problems) -> LMPolicy:
        """The same view on other problems."""
        return LMPolicy(self.lm, self.space, problems, self.reads)

    def prompts(self, problem: Tensor) -> list[Sequence[int]]:
        """What the model reads for each row."""
        rows = [self.problems[i] for i in problem.tolist()]
        return [r.q_prompt if self.reads == "q_prompt" and r.q_prompt is not None else r.context for r in rows]

    def _carry(self, prompts: Sequence[Sequence[int]], room: int) -> LMCarry:
        seen: dict[tuple[int, ...], int] = {}
        found = [seen.setdefault(tuple(p), len(seen)) for p in prompts]
        rows = torch.tensor(found, dtype=torch.long, device=self.lm.device)
        cache, logits = self.lm.encode(list(seen), room=room)
        return LMCarry(cache, rows, log_prob_of(logits), tidy=len(seen) == len(prompts))

    def start(self, problem: Int[Tensor, " b"]) -> LMCarry:
        """Encode each distinct prompt once."""
        return self._carry(self.prompts(problem), self.space.max_moves)

    def start_at(self, rollouts: Rollouts, upto: Int[Tensor, " b"]) -> LMCarry:
        """Encode prompt and prefix together, each distinct one once."""
        moves = rollouts.moves.tolist()
        prefix = [row[:k] for row, k in zip(moves, upto.tolist(), strict=True)]
        full = [[*p, *z] for p, z in zip(self.prompts(rollouts.problem), prefix, strict=True)]
        return self._carry(full, self.space.max_moves)

    def log_probs(
        self, c: LMCarry, s: StringState, menu: Menu, raw: bool = False
    ) -> tuple[Float[Tensor, "b v"], Float[Tensor, "b s"]]:
        """See ``protocols.Stepper``."""
        log_p = c.log_p if c.tidy else c.log_p[c.rows]
        stop = self.space.raw_stop(log_p)
        if raw:
            return log_p, self.space.log_p_stops(stop, s)
        return over_menu(log_p, stop, menu)

    def step(self, c: LMCarry, s: StringState, move: Int[Tensor, " b"]) -> LMCarry:
        """Append a token a row; rows that hold the same string share one cache row and are run once."""
        if c.tidy:
            cache, logits = self.lm.step(c.cache, move)
            return LMCarry(cache, c.rows, log_prob_of(logits))
        if c.rows.is_cuda:  # one row a particle: steady shapes for the captured step
            cache, logits = self.lm.step(self.lm.take(c.cache, c.rows), move)
            return LMCarry(cache, torch.arange(len(move), device=move.device), log_prob_of(logits))
        pairs, rows = torch.unique(c.rows * self.lm.vocab_size + move, return_inverse=True)
        source = pairs // self.lm.vocab_size
        cache = c.cache
        if len(source) != len(c.log_p) or not torch.equal(source, torch.arange(len(source), device=source.device)):
            cache = self.lm.take(cache, source)
        cache, logits = self.lm.step(cache, pairs % self.lm.vocab_size)
        tidy = len(pairs) == len(rows) and torch.equal(rows, torch.arange(len(rows), device=rows.device))
        return LMCarry(cache, rows, log_prob_of(logits), tidy)

    def take(self, c: LMCarry, index: Tensor) -> LMCarry:
        """Rows ``index``; the cache is gathered only when the next token is run."""
        return LMCarry(c.cache, c.rows[index], c.log_p, tidy=False)

    def sample(
        self, problem: Int[Tensor, " b"], gen: torch.Generator, behaviour: Mapping[str, Any] | None = None
    ) -> Rollouts:
        """Draw one string a row."""
        return rollout(self, problem, gen, behaviour=behaviour)

    def parameters(self) -> dict[str, Tensor]:
        """The trainable tensors of the model's view, by name."""
        found = self.lm.parameters() if hasattr(self.lm, "parameters") else {}  # pyright: ignore[reportAttributeAccessIssue]
        if not found:
            raise InputError(f"{self.lm.name} has nothing to train; give it an adapter (lm.add_adapter('q'))")
        return found

    def settle(self) -> None:
        """Gradients reach the parameters."""
        if hasattr(self.lm, "settle"):
            self.lm.settle()  # pyright: ignore[reportAttributeAccessIssue]

    def refresh(self) -> None:
        """What decoding reads follows the parameters."""
        self.lm.refresh()  # pyright: ignore[reportAttributeAccessIssue]

    def score(self, rollouts: Rollouts, raw: bool = False, grad: bool = False) -> Scores:
        """log q of all moves and all stops in one teacher-forced pass, differentiable where asked for."""
        b, t = rollouts.moves.shape
        space, n = self.space, rollouts.n
        legal = None if raw else space.legal_ids(self.lm.device)
        how = {"grad": True} if grad else {}  # servers and others that cannot need not know the word
        prompts = self.prompts(rollouts.problem)
        log_p, log_ids, mass = self.lm.score(prompts, rollouts.moves, n, space.stops.ids, legal, **how)
        if not space.stops.acts:
            stop = log_p.new_zeros(b, t + 1, 1)
        else:
            stop = log_ids if space.stops.in_text else log_ids.logsumexp(-1, keepdim=True)
        at = torch.arange(t + 1, device=n.device).expand(b, -1)
        ended = torch.zeros(b, t + 1, dtype=torch.bool, device=n.device)
        if space.stops.predicate is not None:
            ended[torch.arange(b, device=n.device), n] = space.replay(rollouts, n).ended
        free, put = rollouts.kind == FREE, pad(rollouts.kind == FORCED, (0, 1))  # put: the space moves on from there
        moved = pad(free.cumsum(1), (1, 0))  # free moves before each state: what limits count
        if raw:
            stop = space.log_p_stop(stop.flatten(0, 1), moved.flatten(), ended.flatten()).view(b, t + 1, -1)
            stop = stop.masked_fill(put[:, :, None], NEG_INF)
            return Scores(torch.where(free, log_p, 0.0), self._inside(stop, at, n))
        norm = mass
        if space.stops.acts:
            norm = torch.where(rollouts.can_stop, torch.logaddexp(mass, stop.logsumexp(-1)), mass)
        log_q = torch.where(free, log_p - norm[:, :t], 0.0)
        log_stop = torch.where(rollouts.can_stop[:, :, None], stop - norm[:, :, None], NEG_INF)
        forced = ended | (moved >= space.max_free) & ~put
        only_first = torch.full_like(log_stop, NEG_INF)
        only_first[:, :, 0] = 0.0
        return Scores(log_q, self._inside(torch.where(forced[:, :, None], only_first, log_stop), at, n))

    @staticmethod
    def _inside(stop: Tensor, at: Tensor, n: Tensor) -> Tensor:
        return torch.where((at <= n[:, None])[:, :, None], stop, NEG_INF)
