"""A guide that speaks at the end of each step of a chain: a process reward, or a verifier of what is finished so far.

    log psi_t(z) = power * log r(X, z_1..c),        c = where the last completed step of z_1..t ends, 0 before any

Between boundaries psi is carried over, so SMC's weight there is what it is without a guide; at a boundary the weight is
the RATIO (r_c / r_c')^power of the new reward to the one before. The products telescope, and at the stop the target's
own factors replace r: the answer is gamma whatever r is. Multiplying by r at each step instead (particle filtering of
Puri et al. 2025, arXiv 2502.01618, as released) aims at p(z) prod_c r_c, which grows sharper with every step written.
The best r is E_p[gamma / p | z_1..c]; r of the empty text is the level of chains that have not finished a step yet.

Boundaries: wherever the text contains a new ``boundary`` (a newline, ", "), and the end of each of a tool's answers.
r is read through ``values``, once for each distinct (problem, text), by batches: a bound verifier has it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from retrodict.errors import InputError
from retrodict.guides.base import BaseGuide
from retrodict.guides.lookahead import FLOOR
from retrodict.protocols import Problems
from retrodict.records import FORCED, Rollouts
from retrodict.spaces.strings import Strings, StringState
from retrodict.spaces.tools import ToolState, ToolStrings


@runtime_checkable
class StepReward(Protocol):
    """log r of (problem, text of the completed steps) pairs, in nats."""

    def values(self, wanted: Sequence[tuple[int, str]]) -> list[float]: ...


class StepGuide(BaseGuide):
    """psi of a chain from the reward of its completed steps; see the module's formula. The carry is log psi itself."""

    def __init__(
        self, reward: StepReward, space: Strings, boundary: str | Sequence[str] = "\n", power: float = 1.0
    ) -> None:
        self.reward, self.space, self.power = reward, space, power
        self.marks = (boundary,) if isinstance(boundary, str) else tuple(boundary)
        if space.tokenizer is None:
            raise InputError("step boundaries are found in text; this space has no tokenizer")
        if "" in self.marks:
            raise InputError("an empty boundary would end a step after every token; write '\\n' or ', '")
        if not self.marks and not isinstance(space, ToolStrings):
            raise InputError("no boundary and no tool, so no step would ever end; write boundary='\\n'")
        if not power > 0:
            raise InputError(f"power must be positive, not {power}; it is the exponent of the reward, 1/beta")
        self._may: dict[int, bool] = {}

    def on(self, problems: Problems) -> StepGuide:
        """The same reward on other problems."""
        moved: Any = self.reward.on(problems) if hasattr(self.reward, "on") else self.reward  # pyright: ignore[reportAttributeAccessIssue]
        return StepGuide(moved, self.space, self.marks, self.power)

    # -- where steps end ------------------------------------------------------------------------------------------

    def _end(self, text: str) -> int:
        """Where the last boundary in a text ends; 0 where there is none."""
        return max((at + len(m) for m in self.marks if (at := text.rfind(m)) >= 0), default=0)

    def _may_end(self, token: int) -> bool:
        """Whether a token can complete a boundary; one decoding a token, ever."""
        if token not in self._may:
            text = self._text([token])
            self._may[token] = "\ufffd" in text or any(m[-1] in text for m in self.marks)
        return self._may[token]

    def _text(self, ids: Sequence[int]) -> str:
        assert self.space.tokenizer is not None
        return self.space.tokenizer.decode(list(ids))

    def completed(self, rollouts: Rollouts, upto: Int[Tensor, " b"]) -> list[str]:
        """Text of the completed steps of the first ``upto`` moves of each row; "" where no step is complete."""
        out = []
        for z, kind, k in zip(rollouts.moves.tolist(), rollouts.kind.tolist(), upto.tolist(), strict=True):
            whole = [i for i in range(1, k + 1) if kind[i - 1] == FORCED and (i == len(kind) or kind[i] != FORCED)]
            tool, text = self._text(z[: whole[-1]]) if whole else "", self._text(z[:k])
            out.append(max(tool, text[: self._end(text)], key=len))
        return out

    def remarks(self, rollouts: Rollouts) -> tuple[str, ...]:
        """Says where no chain completed a step: the guide never spoke."""
        if not len(rollouts) or any(self.completed(rollouts, rollouts.n)):
            return ()
        marks = " or ".join(map(repr, self.marks)) or "a tool's answer"
        return (f"no step boundary ({marks}) in any of {len(rollouts)} chains, so the step guide never spoke; "
                "name one that the model writes",)  # fmt: skip

    # -- the guide --------------------------------------------------------------------------------------------------

    def _value(self, wanted: Sequence[tuple[int, str]], like: Tensor) -> Float[Tensor, " k"]:
        values = torch.tensor(self.reward.values(wanted), dtype=torch.float64, device=like.device)
        return self.power * values.clamp_min(FLOOR)

    def start(self, problem: Int[Tensor, " b"]) -> Float[Tensor, " b"]:
        """The reward of no steps at all."""
        return self._value([(p, "") for p in problem.tolist()], problem)

    def start_at(self, rollouts: Rollouts, upto: Int[Tensor, " b"]) -> Float[Tensor, " b"]:
        """psi of recorded prefixes."""
        return self._value(list(zip(rollouts.problem.tolist(), self.completed(rollouts, upto), strict=True)), upto)

    def step(self, c: Float[Tensor, " b"], s: StringState, move: Int[Tensor, " b"]) -> Float[Tensor, " b"]:
        """The rows whose move ends a step get its reward; the others keep theirs."""
        whole = (s.n + 1 == s.planned) & (s.n < s.planned) if isinstance(s, ToolState) else torch.zeros_like(s.ended)
        ends = torch.tensor([self._may_end(token) for token in move.tolist()], device=move.device)
        some = (ends | whole).nonzero().squeeze(1)
        columns = (some, s.problem[some], s.tokens[some], s.n[some], move[some], whole[some])
        rows, wanted = [], []
        for i, problem, z, n, token, tool in zip(*(x.tolist() for x in columns), strict=True):
            text = self._text([*z[:n], token])
            end = len(text) if tool else self._end(text)
            if tool or end > self._end(self._text(z[:n])):
                rows.append(i)
                wanted.append((problem, text[:end]))
        if not rows:
            return c
        return c.index_put((torch.tensor(rows, device=c.device),), self._value(wanted, c))

    def log_psi(self, c: Float[Tensor, " b"], s: StringState) -> Float[Tensor, " b"]:
        """The carry."""
        return c
