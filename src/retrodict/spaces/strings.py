"""Strings of tokens: n free moves, then one stop."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from retrodict.errors import InputError, nearest
from retrodict.numerics import NEG_INF
from retrodict.protocols import Tokenizer
from retrodict.records import CHOOSE, MUST_STOP, Menu, Rollouts
from retrodict.spaces.limits import LIMITS, Limit, forced_log_p, may_stop
from retrodict.spaces.stops import Stops


@dataclass(frozen=True)
class StringState:
    """b partial strings.

    ``ended`` marks rows whose text already satisfies a predicate stop.
    """

    problem: Int[Tensor, " b"]
    tokens: Int[Tensor, "b L"]
    n: Int[Tensor, " b"]
    ended: Bool[Tensor, " b"]


@dataclass(frozen=True)
class Strings:
    """Strings over a model's vocabulary.

    Attributes:
        vocab_size: number of token ids.
        stops: how a string ends; its ids are not moves.
        max_moves: the limit L on free moves (with a tool: the capacity, see ``spaces.tools``).
        limit: what happens at L, see ``spaces.limits``.
        min_moves: a string may not stop on its own before this many moves.
        banned: ids that are never moves (special tokens, by default of the doors).
        tokenizer: for predicates and for people.
    """

    vocab_size: int
    stops: Stops
    max_moves: int
    limit: Limit = "force"
    min_moves: int = 0
    banned: tuple[int, ...] = ()
    tokenizer: Tokenizer | None = None

    def __post_init__(self) -> None:
        if self.limit not in LIMITS:
            raise InputError(f"unknown limit {self.limit!r}{nearest(self.limit, LIMITS)}")
        if self.max_free < 0 or self.min_moves < 0:
            raise InputError(f"lengths cannot be negative: min {self.min_moves}, max {self.max_free}")
        if self.min_moves > self.max_free:
            raise InputError(
                f"min length {self.min_moves} is over max length {self.max_free}; lower min_tokens or raise max_tokens"
            )
        bad = [i for i in (*self.stops.ids, *self.banned) if not 0 <= i < self.vocab_size]
        if bad:
            raise InputError(f"token id {bad[0]} is outside the vocabulary (0 to {self.vocab_size - 1})")
        if self.stops.predicate and (self.limit.startswith("exact") or self.min_moves):
            raise InputError(
                "a predicate stop cannot go with an exact or a minimal length; use a stop token or 'force'"
            )
        if not self.stops.acts and not self.stops.predicate and self.limit in ("own_stop", "exact"):
            raise InputError(f"limit {self.limit!r} needs a stop; give stop=..., or use 'force' or 'exact_prefix'")
        object.__setattr__(self, "_held", {})

    def _make_legal(self) -> Bool[Tensor, " v"]:
        off = [*self.stops.ids, *self.banned]
        legal = torch.ones(self.vocab_size, dtype=torch.bool)
        legal[off] = False
        return legal

    @property
    def n_stops(self) -> int:
        """Number of distinct stops of an object."""
        return self.stops.n

    @property
    def max_free(self) -> int:
        """The limit L: how many moves a policy may make. What a space puts in itself does not count."""
        return self.max_moves

    def legal_ids(self, device: torch.device | str = "cpu") -> Bool[Tensor, " v"]:
        """Ids that may be moves."""
        return self._on(device)[0]

    def _on(self, device: torch.device | str) -> tuple[Bool[Tensor, " v"], Int[Tensor, " s"]]:
        """The legal mask and the stop ids on a device, copied there once."""
        held: dict[str, tuple[Tensor, Tensor]] = self._held  # pyright: ignore[reportAttributeAccessIssue]
        if str(device) not in held:
            ids = torch.tensor(self.stops.ids, dtype=torch.long, device=device)
            held[str(device)] = (self._make_legal().to(device), ids)
        return held[str(device)]

    # -- the process --------------------------------------------------------------------------------------------

    def start(self, problem: Int[Tensor, " b"]) -> StringState:
        """b empty strings."""
        b, device = len(problem), problem.device
        tokens = torch.zeros(b, self.max_moves, dtype=torch.long, device=device)
        ended = torch.zeros(b, dtype=torch.bool, device=device)
        if self.stops.predicate and self.stops.predicate(""):
            ended = ~ended
        return StringState(problem, tokens, torch.zeros(b, dtype=torch.long, device=device), ended)

    def counted(self, s: StringState) -> Int[Tensor, " b"]:
        """Moves that count towards the limits."""
        return s.n

    def menu(self, s: StringState) -> Menu:
        """Legal moves and stops of each state."""
        n = self.counted(s)
        full = n >= self.max_free
        must = torch.where(full | s.ended, MUST_STOP, CHOOSE)
        can = full | s.ended
        if self.stops.acts:
            can = can | may_stop(self.limit, n, self.min_moves, self.max_free)
        return Menu(self.legal_ids(s.n.device).expand(len(s.n), -1), can, must)

    def step(self, s: StringState, move: Int[Tensor, " b"]) -> StringState:
        """Append one token a row."""
        tokens = s.tokens.scatter(1, s.n[:, None], move[:, None])
        n = s.n + 1
        ended = s.ended
        if self.stops.predicate is not None:
            text = [self._text(row[:k]) for row, k in zip(tokens.tolist(), n.tolist(), strict=True)]
            ended = torch.tensor([self.stops.predicate(t) for t in text], dtype=torch.bool, device=move.device)
        return StringState(s.problem, tokens, n, ended)

    def take(self, s: StringState, index: Tensor) -> StringState:
        """Rows ``index``."""
        return StringState(s.problem[index], s.tokens[index], s.n[index], s.ended[index])

    def replay(self, rollouts: Rollouts, upto: Int[Tensor, " b"]) -> StringState:
        """The states after the first ``upto`` moves of recorded strings."""
        t = rollouts.moves.shape[1]
        tokens = torch.zeros(len(rollouts), self.max_moves, dtype=torch.long, device=rollouts.moves.device)
        tokens[:, :t] = torch.where(torch.arange(t, device=upto.device) < upto[:, None], rollouts.moves, 0)
        ended = torch.zeros(len(rollouts), dtype=torch.bool, device=upto.device)
        if self.stops.predicate is not None:
            text = [self._text(row[:k]) for row, k in zip(tokens.tolist(), upto.tolist(), strict=True)]
            ended = torch.tensor([self.stops.predicate(x) for x in text], dtype=torch.bool, device=upto.device)
        return StringState(rollouts.problem, tokens, upto, ended)

    def log_pb(self, s: StringState) -> Float[Tensor, " b"]:
        """A string is reached by one path: 0."""
        return torch.zeros(len(s.n), device=s.n.device)

    # -- what p pays for the stop --------------------------------------------------------------------------------

    def log_p_stop(
        self, raw: Float[Tensor, "b s"], n: Int[Tensor, " b"], ended: Bool[Tensor, " b"]
    ) -> Float[Tensor, "b s"]:
        """log p of each stop after n moves that count, given the model's own log-probabilities ``raw`` of the stop ids.

        Applies the limit, the minimal length and the predicate (-inf where the string may not end there).
        """
        full = n >= self.max_free
        at_limit = forced_log_p(self.limit, raw)
        if self.stops.predicate is not None:
            free = torch.zeros_like(raw)
            rest = torch.where((full & ~ended)[:, None], at_limit if self.limit == "force" else free + NEG_INF, free)
            return torch.where((ended | full)[:, None], rest, free + NEG_INF)
        if not self.stops.acts:
            return torch.where(full[:, None], at_limit, torch.full_like(raw, NEG_INF))
        can = may_stop(self.limit, n, self.min_moves, self.max_free)
        free = torch.where(can[:, None], raw, torch.full_like(raw, NEG_INF))
        return torch.where(full[:, None], at_limit, free)

    def log_p_stops(self, raw: Float[Tensor, "b s"], s: StringState) -> Float[Tensor, "b s"]:
        """:meth:`log_p_stop` at each state."""
        return self.log_p_stop(raw, self.counted(s), s.ended)

    def raw_stop(self, log_p: Float[Tensor, "b v"]) -> Float[Tensor, "b s"]:
        """Log-probability of each stop from that of every token: end ids that leave no text are added up."""
        if not self.stops.acts:
            return log_p.new_zeros(len(log_p), 1)
        picked = log_p[:, self._on(log_p.device)[1]]
        return picked if self.stops.in_text else picked.logsumexp(-1, keepdim=True)

    # -- identity -------------------------------------------------------------------------------------------------

    def keys(self, rollouts: Rollouts) -> list[tuple[int, ...]]:
        """Identity of each object: its tokens, then its stop (as a negative number)."""
        return [
            (*row[:k], -1 - s)
            for row, k, s in zip(rollouts.moves.tolist(), rollouts.n.tolist(), rollouts.stop.tolist(), strict=True)
        ]

    def show(self, rollouts: Rollouts) -> list[str]:
        """Each object's text, with the stop's own text where it belongs to the latent."""
        return [self._text([*k[:-1], *self.stops.text_ids(-1 - k[-1])]) for k in self.keys(rollouts)]

    def _text(self, ids: Sequence[int]) -> str:
        return " ".join(map(str, ids)) if self.tokenizer is None else self.tokenizer.decode(ids)

    def with_limits(self, **changes: int | str) -> Strings:
        """A copy with another ``max_moves``, ``min_moves`` or ``limit``."""
        return replace(self, **changes)  # pyright: ignore[reportArgumentType]
