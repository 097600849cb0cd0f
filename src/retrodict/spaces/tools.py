"""Strings with a tool inside: where the text asks for it, a tool's answer is appended.

    gamma(z) = prod over free moves p(z_k | X, z_<k) * p(stop | X, z) * p(Y | X, z)

z_<k and z hold the inserted tokens, which are read and never paid for: they are no actions, so log p = log q = log b =
0. A string may not stop inside an insertion (p(stop) = 0 there, and no a_i), and limits count free moves only. The
answer must be a function of the text, or paths to one string would not agree on what is free; wrap a tool that is
slow, or that answers the same question twice in two ways, in ``functools.cache``.

After Hu et al. 2024 (arXiv:2310.04363), who let a calculator write after each "=" of a chain of thought.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from retrodict.errors import InputError
from retrodict.numerics import NEG_INF
from retrodict.records import FORCED, FREE, MUST_MOVE, Menu, Rollouts
from retrodict.spaces.strings import Strings, StringState

Answer = Callable[[str], str | None]
"""What a tool writes after the latent's text so far; ``None`` for nothing."""


class ToolError(InputError):
    """A tool raised or returned something unusable; ``text`` is what it was given."""

    def __init__(self, message: str, text: str) -> None:
        super().__init__(message)
        self.text = text


@dataclass(frozen=True)
class Tool:
    """A tool that writes into the latent.

    Attributes:
        fn: from the latent's text so far to what is inserted there, or ``None``.
        trigger: the tool is asked where a free move makes the text end with this; ``""`` asks after every free move.
        room: inserted tokens that a string can hold. The tool stays silent where an answer would exceed it.
        name: how errors call it.
    """

    fn: Answer
    trigger: str = "="
    room: int = 16
    name: str = "tool"

    def __post_init__(self) -> None:
        if self.room < 1:
            raise InputError(f"room is how many tokens the tool may write into a string, at least 1, not {self.room}")

    def ask(self, text: str) -> str | None:
        """The answer to a text.

        Raises:
            ToolError: the tool raised, or returned neither a string nor None; the text is named.
        """
        try:
            answer = self.fn(text)
        except Exception as error:
            raise ToolError(f"{self.name!r} raised {type(error).__name__}: {error}; on the text {text!r}",
                            text) from error  # fmt: skip
        if answer is not None and not isinstance(answer, str):
            raise ToolError(f"{self.name!r} returned {answer!r} on the text {text!r}; return a string or None", text)
        return answer


@dataclass(frozen=True)
class ToolState(StringState):
    """b partial strings; ``tokens`` already holds what is being inserted.

    ``free`` counts free moves. ``planned`` is n, or where the insertion in progress ends.
    """

    free: Int[Tensor, " b"]
    planned: Int[Tensor, " b"]


@dataclass(frozen=True)
class ToolStrings(Strings):
    """Strings into which a tool writes; :func:`with_tool` makes them.

    ``max_moves`` is the capacity, free moves and insertions together; the limit L is ``max_free``.
    """

    tool: Tool = field(kw_only=True)

    def __post_init__(self) -> None:
        if self.tokenizer is None:
            raise InputError("a space with a tool needs a tokenizer: the tool reads text and writes text")
        super().__post_init__()

    @property
    def max_free(self) -> int:
        """The limit L on free moves."""
        return self.max_moves - self.tool.room

    # -- the process --------------------------------------------------------------------------------------------

    def start(self, problem: Int[Tensor, " b"]) -> ToolState:
        """b empty strings; the tool is not asked before the first move."""
        s = super().start(problem)
        return ToolState(s.problem, s.tokens, s.n, s.ended, torch.zeros_like(s.n), s.n)

    def counted(self, s: StringState) -> Int[Tensor, " b"]:
        """Free moves."""
        assert isinstance(s, ToolState)
        return s.free

    def menu(self, s: StringState) -> Menu:
        """As without a tool; inside an insertion its next token is forced."""
        assert isinstance(s, ToolState)
        menu = super().menu(s)
        inside = s.n < s.planned
        forced = s.tokens.gather(1, s.n.clamp_max(self.max_moves - 1)[:, None]).squeeze(1)
        return Menu(menu.legal, menu.can_stop & ~inside, torch.where(inside, MUST_MOVE, menu.must), forced)

    def step(self, s: StringState, move: Int[Tensor, " b"]) -> ToolState:
        """Append one token a row, and ask the tool about rows whose free move completes the trigger."""
        assert isinstance(s, ToolState)
        put = s.n < s.planned
        new = super().step(s, move)
        free, planned = s.free + (~put).long(), torch.where(put, s.planned, new.n)
        ended = new.ended & (new.n >= planned)  # a predicate waits for the end of the insertion
        tokens = new.tokens
        rows = (~put & ~ended & self._may_trigger(move)).nonzero().squeeze(1)
        if len(rows):
            planned = planned.index_put((rows,), self._insert(tokens, rows, new.n[rows], free[rows]))
        return ToolState(s.problem, tokens, new.n, ended, free, planned)

    def take(self, s: StringState, index: Tensor) -> ToolState:
        """Rows ``index``."""
        assert isinstance(s, ToolState)
        return ToolState(s.problem[index], s.tokens[index], s.n[index], s.ended[index], s.free[index],
                         s.planned[index])  # fmt: skip

    def replay(self, rollouts: Rollouts, upto: Int[Tensor, " b"]) -> ToolState:
        """The states after the first ``upto`` moves, read off the record (no tool runs), also within an insertion."""
        s = super().replay(rollouts, upto)
        t = rollouts.moves.shape[1]
        at = torch.arange(t, device=upto.device)
        free = ((rollouts.kind == FREE) & (at < upto[:, None])).sum(1)
        beyond = (rollouts.kind != FORCED) & (at >= upto[:, None])  # what follows the insertion, if upto is in one
        planned = torch.cat([torch.where(beyond, at, t), torch.full_like(upto, t)[:, None]], 1).amin(1)
        tokens = torch.zeros_like(s.tokens)
        tokens[:, :t] = torch.where(at < planned[:, None], rollouts.moves, 0)
        return ToolState(s.problem, tokens, upto, s.ended & (upto >= planned), free, planned)

    def log_p_stops(self, raw: Float[Tensor, "b s"], s: StringState) -> Float[Tensor, "b s"]:
        """As without a tool; -inf inside an insertion."""
        assert isinstance(s, ToolState)
        return super().log_p_stops(raw, s).masked_fill((s.n < s.planned)[:, None], NEG_INF)

    # -- the tool -------------------------------------------------------------------------------------------------

    def _may_trigger(self, move: Int[Tensor, " b"]) -> Tensor:
        """Whether each token can be the last of a text that ends with the trigger; one decoding a token, ever."""
        held: dict[int, bool] = self._held.setdefault("triggers", {})  # pyright: ignore[reportAttributeAccessIssue]
        ids, trigger = move.tolist(), self.tool.trigger
        for i in {*ids} - held.keys():
            text = self._text([i])
            split = "\ufffd" in text  # a part of a character
            held[i] = split or text.endswith(trigger) or bool(text) and trigger.endswith(text)
        return torch.tensor([held[i] for i in ids], dtype=torch.bool, device=move.device)

    def _insert(
        self, tokens: Int[Tensor, "b L"], rows: Int[Tensor, " k"], n: Int[Tensor, " k"], free: Int[Tensor, " k"]
    ) -> Int[Tensor, " k"]:
        """Write the tool's answers into ``tokens``; gives where each row's insertion ends (n where there is none)."""
        answers: dict[tuple[int, ...], list[int]] = {}  # rows with one text ask once
        cells: list[tuple[int, int, int]] = []
        ends = n.tolist()
        for i, (row, ids, moved) in enumerate(zip(rows.tolist(), tokens[rows].tolist(), free.tolist(), strict=True)):
            said = tuple(ids[: ends[i]])
            if said not in answers:
                answers[said] = self._answer(self._text(said))
            answer = answers[said]
            if answer and len(said) - moved + len(answer) <= self.tool.room:
                cells += [(row, len(said) + j, x) for j, x in enumerate(answer)]
                ends[i] += len(answer)
        if cells:
            row, column, x = torch.tensor(cells, device=tokens.device).unbind(1)
            tokens[row, column] = x
        return torch.tensor(ends, device=n.device)

    def _answer(self, text: str) -> list[int]:
        """Ids of the tool's answer to a text, where it ends with the trigger."""
        answer = self.tool.ask(text) if text.endswith(self.tool.trigger) else None
        if not answer:
            return []
        assert self.tokenizer is not None
        try:
            return list(self.tokenizer.encode(answer))
        except InputError as error:
            raise ToolError(f"{self.tool.name!r} answered {answer!r} to the text {text!r}: {error}", text) from error

    def with_limits(self, **changes: int | str) -> ToolStrings:
        """A copy with another ``max_moves`` (of free moves), ``min_moves`` or ``limit``."""
        if "max_moves" in changes:
            changes = {**changes, "max_moves": int(changes["max_moves"]) + self.tool.room}
        return replace(self, **changes)  # pyright: ignore[reportArgumentType]


def with_tool(space: Strings, tool: Tool) -> ToolStrings:
    """The same strings, at most ``space.max_moves`` free moves, with a tool's answers in them."""
    if isinstance(space, ToolStrings):
        raise InputError("this space has a tool already; let one function ask both")
    return ToolStrings(space.vocab_size, space.stops, space.max_moves + tool.room, space.limit, space.min_moves,
                       space.banned, space.tokenizer, tool=tool)  # fmt: skip
