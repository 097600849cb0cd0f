"""Byte automata read in tokens: masks that see across token boundaries and know how many moves remain.

A token moves every state of a byte automaton at once; tokens that move all states alike share a class, so that the
automaton over tokens is [state, class], with the class of each token beside it. The guide allows a token only if
some number of further moves that the length limit permits can end in acceptance, so that a hard constraint has no
dead end unless nothing satisfies it at all.

    alive_0(s)   = the stop that the limit forces is accepted in s
    alive_m(s)   = (a stop is allowed with m moves left, and accepted in s)  or  alive_{m-1}(s') for some token s -> s'
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from retrodict.errors import InputError
from retrodict.guides.automata import ByteDFA, contains, distinct
from retrodict.guides.base import BaseGuide
from retrodict.numerics import NEG_INF
from retrodict.records import Rollouts
from retrodict.spaces.limits import free_stop, may_stop
from retrodict.spaces.stops import EndsWith
from retrodict.spaces.strings import Strings, StringState

MAX_CELLS = 100_000_000
"""Cells of a token automaton, states x classes."""


@dataclass(frozen=True, eq=False)
class TokenDFA:
    """An automaton over tokens. State 0 is the first.

    Attributes:
        next: next state of each state after any token of a class. Stops and banned tokens have classes too: restrict
            sums over tokens to ``space.legal_ids()``.
        of: class of each token.
        ends: whether each stop is accepted in a state; the stop's own text is read first where it belongs to the
            latent.
        label: how tables and errors call it.
    """

    next: Int[Tensor, "state class"]
    of: Int[Tensor, " v"]
    ends: Bool[Tensor, "state s"]
    label: str

    def dense(self) -> Int[Tensor, "state v"]:
        """The next state of each state after each token."""
        return self.next[:, self.of]

    def size(self) -> tuple[int, int]:
        """(states, classes)."""
        return self.next.shape[0], self.next.shape[1]


def token_dfa(
    dfa: ByteDFA, space: Strings, token_bytes: Sequence[bytes], device: torch.device | str = "cpu"
) -> TokenDFA:
    """A byte automaton over the tokens of a space, e.g. ``token_dfa(dfa, space, lm.token_bytes)``."""
    if not token_bytes:
        raise InputError("this model does not tell its tokens' bytes; automaton constraints need them")
    table, of = lift(dfa, token_bytes)
    accept = torch.from_numpy(dfa.accept)
    ends = [accept[table[:, of[i]]] for i in space.stops.ids] if space.stops.in_text else [accept]
    return TokenDFA(table.to(device), of.to(device), torch.stack(ends, 1).to(device), dfa.label)


def lift(dfa: ByteDFA, token_bytes: Sequence[bytes]) -> tuple[Int[Tensor, "state class"], Int[Tensor, " v"]]:
    """Next state of each state after each class of tokens, and the class of each token.

    Tokens are read byte by byte, all at once; those that have moved every state alike so far are moved on as one.
    """
    length, (states, k) = np.array([len(b) for b in token_bytes]), dfa.table.shape
    data = np.zeros((len(token_bytes), int(length.max())), dtype=np.int64)
    data[np.arange(data.shape[1]) < length[:, None]] = dfa.of[np.frombuffer(b"".join(token_bytes), dtype=np.uint8)]
    maps = np.arange(states, dtype=np.int32)[None]  # [map, state]; every token starts as the identity
    of = np.zeros(len(token_bytes), dtype=np.int64)
    for j in range(data.shape[1]):
        on = np.flatnonzero(length > j)
        pairs, back = _present(of[on] * k + data[on, j], len(maps) * k)
        _check_size(dfa, states, len(maps) + len(pairs))
        moved = dfa.table[maps[pairs // k], (pairs % k)[:, None]]
        of[on] = len(maps) + back
        used, of = _present(of, len(maps) + len(pairs))
        maps, same = distinct(np.concatenate([maps, moved])[used])
        of = same[of]
    return torch.from_numpy(np.ascontiguousarray(maps.T).astype(np.int64)), torch.from_numpy(of)


def _present(codes: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """``np.unique(codes, return_inverse=True)`` of codes below ``size``, in linear time."""
    there = np.zeros(size, dtype=bool)
    there[codes] = True
    return np.flatnonzero(there), (there.cumsum() - 1)[codes]


def _check_size(dfa: ByteDFA, states: int, classes: int) -> None:
    if states * classes > MAX_CELLS:
        raise InputError(
            f"the token automaton of '{dfa.label}' is too large: {states:,} states x {classes:,} kinds of tokens; "
            "give fewer or shorter phrases, or a lower word count"
        )


def until(dfa: TokenDFA, end: TokenDFA) -> tuple[TokenDFA, Bool[Tensor, " state"]]:
    """An automaton that also runs the search for a text which ends the string, and the states where it has ended.

    State (i, j) of the two is number i * len(end) + j.
    """
    k, n = len(end.next), end.size()[1]
    pair, of = (dfa.of * n + end.of).unique(return_inverse=True)
    table = (dfa.next[:, None, pair // n] * k + end.next[None, :, pair % n]).flatten(0, 1)
    both = TokenDFA(table, of, dfa.ends.repeat_interleave(k, 0), dfa.label)
    return both, end.ends[:, 0].repeat(len(dfa.next))


def window(dfa: TokenDFA, space: Strings, over: Bool[Tensor, " state"] | None = None) -> Bool[Tensor, "left state"]:
    """Whether acceptance can be reached from each state with 0, 1, ..., L moves left, as the space lets strings end.

    An exact or least length, the one stop that is left at L, and the end of ``rd.until`` (``over``: states where the
    string has ended) are seen. Other predicates and a tool's insertions are not: there the table may say yes too often.
    """
    top, stops, tool = space.max_moves, space.stops, space.max_free != space.max_moves
    blind = tool or stops.predicate is not None and over is None
    source, to, done = moves(dfa, space, None if tool else over)
    last, early = dfa.ends[:, 0].cpu(), dfa.ends.any(1).cpu()
    alive = torch.zeros(top + 1, len(dfa.next), dtype=torch.bool)
    for left in range(top + 1):
        can = bool(may_stop(space.limit, torch.tensor(top - left), space.min_moves, top)) if stops.acts else blind
        if left == 0:
            can = blind or stops.predicate is None or free_stop(space.limit)
        alive[left] = (early if left else last) & (done | can | blind)
        if left:
            alive[left, source[alive[left - 1, to]]] = True
    return alive.to(dfa.next.device)


def moves(dfa: TokenDFA, space: Strings, over: Bool[Tensor, " state"] | None) -> tuple[Tensor, Tensor, Tensor]:
    """Edges of the tokens that a string may go on with, and the states where it has ended, on the CPU."""
    legal = torch.ones(space.vocab_size, dtype=torch.bool) if space.max_free != space.max_moves else space.legal_ids()
    source, to = edges(dfa, legal.to(dfa.of.device))
    done = torch.zeros(len(dfa.next), dtype=torch.bool) if over is None else over.cpu()
    on = ~done[source]
    return source[on], to[on], done


def edges(dfa: TokenDFA, legal: Bool[Tensor, " v"]) -> tuple[Int[Tensor, " e"], Int[Tensor, " e"]]:
    """Distinct (state, next state) over the legal tokens, on the CPU."""
    states = len(dfa.next)
    reached = dfa.next[:, dfa.of[legal].unique()]
    code = (torch.arange(states, device=reached.device)[:, None] * states + reached).unique().cpu()
    return code // states, code % states


class DFAGuide(BaseGuide):
    """A hard guide from a byte automaton: psi = 1 while acceptance is reachable in the moves that remain, else 0.

    Attributes:
        dfa: the minimal byte automaton.
        tokens: over tokens; where ``rd.until`` ends strings, with the search for its text.
        over: states in which such a string has ended; None elsewhere.
        alive: :func:`window` of both.
    """

    hard = True

    def __init__(self, dfa: ByteDFA, space: Strings, token_bytes: Sequence[bytes], device: torch.device | str = "cpu"):
        self.dfa, self.space, self.token_bytes, self.label = dfa.minimal(), space, token_bytes, dfa.label
        self.tokens = token_dfa(self.dfa, space, token_bytes, device)
        self.over = None
        if isinstance(space.stops.predicate, EndsWith):
            end = contains(space.stops.predicate.text, whole=False, ignore_case=False)
            self.tokens, self.over = until(self.tokens, token_dfa(end, space, token_bytes, device))
        self.alive = window(self.tokens, space, self.over)

    def meet(self, other: DFAGuide) -> DFAGuide:
        """One guide for both: what it leaves open satisfies their conjunction, which a product of guides cannot see."""
        guide = DFAGuide(self.dfa & other.dfa, self.space, self.token_bytes, self.alive.device)
        guide.check()
        return guide

    def check(self) -> None:
        """Raise InputError where no string of the space satisfies the constraint."""
        if bool(self.alive[-1, 0]):
            return
        need, space = self.fewest(), self.space
        low = space.max_moves if space.limit.startswith("exact") or not space.stops.acts else space.min_moves
        span = f"within {space.max_moves}" if not low else f"in {low} to {space.max_moves}"
        span = f"in exactly {low}" if low == space.max_moves else span
        why = "no string does" if need is None else f"the shortest takes {need[0]}, e.g. {need[1]!r}"
        raise InputError(f"nothing satisfies '{self.label}' {span} tokens: {why}")

    def fewest(self) -> tuple[int, str] | None:
        """Tokens (its stop apart) and text of a shortest string that meets the constraint, were its length free.

        None where no string does.
        """
        table, of, legal = self.tokens.next.cpu(), self.tokens.of.cpu(), self.space.legal_ids()
        source, to, over = moves(self.tokens, self.space, self.over)
        ends = self.tokens.ends.any(1).cpu()
        levels = [ends if self.over is None or free_stop(self.space.limit) else ends & over]
        while not levels[-1][0]:
            level = levels[-1].clone()
            level[source[levels[-1][to]]] = True
            if torch.equal(level, levels[-1]):
                return None
            levels.append(level)
        state, text = 0, b""
        for level in levels[-2::-1]:
            token = int((level[table[state]][of] & legal).nonzero()[-1])
            state, text = int(table[state, of[token]]), text + self.token_bytes[token]
        if self.space.stops.in_text:
            text += self.token_bytes[self.space.stops.ids[int(self.tokens.ends[state].nonzero()[0])]]
        return len(levels) - 1, text.decode(errors="replace")

    def start(self, problem: Int[Tensor, " b"]) -> Int[Tensor, " b"]:
        """Automaton state 0."""
        return torch.zeros(len(problem), dtype=torch.long, device=self.alive.device)

    def start_at(self, rollouts: Rollouts, upto: Int[Tensor, " b"]) -> Int[Tensor, " b"]:
        """Run the first ``upto`` moves."""
        state = self.start(rollouts.problem)
        for t in range(int(upto.max()) if len(upto) else 0):
            state = torch.where(upto > t, self.tokens.next[state, self.tokens.of[rollouts.moves[:, t]]], state)
        return state

    def step(self, c: Int[Tensor, " b"], s: StringState, move: Int[Tensor, " b"]) -> Int[Tensor, " b"]:
        """Next automaton state."""
        return self.tokens.next[c, self.tokens.of[move]]

    def log_psi(self, c: Int[Tensor, " b"], s: StringState) -> Float[Tensor, " b"]:
        """0 where acceptance can still be reached, -inf where not."""
        return torch.where(self.alive[self.space.max_moves - s.n, c], 0.0, NEG_INF)

    def log_next(self, c: Int[Tensor, " b"], s: StringState) -> Float[Tensor, "b v"]:
        """0 / -inf for every token, read off its class (at the limit, where there is no next token, off the last)."""
        left = (self.space.max_moves - s.n - 1).clamp_min(0)
        allowed = self.alive[left[:, None], self.tokens.next[c]]  # [b, class]
        return torch.where(allowed, 0.0, NEG_INF).index_select(1, self.tokens.of)

    def log_end(self, c: Int[Tensor, " b"], s: StringState) -> Float[Tensor, "b s"]:
        """0 / -inf for every stop."""
        return torch.where(self.tokens.ends[c], 0.0, NEG_INF)

    def score(self, rollouts: Rollouts) -> Float[Tensor, " b"]:
        """0 / -inf of complete strings."""
        state = self.start_at(rollouts, rollouts.n)
        return torch.where(self.tokens.ends[state, rollouts.stop], 0.0, NEG_INF)
