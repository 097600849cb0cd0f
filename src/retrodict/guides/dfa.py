"""Finite automata over the bytes of a string, lifted to tokens: masks that see across token boundaries.

A byte automaton is a table; lifting it runs every token's bytes from every state at once. The guide allows a token
only if an accepting state can still be reached within the moves that remain, and a stop only in an accepting state,
so that a hard constraint has no dead end under a length limit unless nothing satisfies it at all.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from retrodict.errors import InputError
from retrodict.guides.base import BaseGuide
from retrodict.numerics import NEG_INF
from retrodict.records import Rollouts
from retrodict.spaces.strings import Strings, StringState

MAX_CELLS = 200_000_000
FAR = 1 << 30


@dataclass(frozen=True)
class ByteDFA:
    """A deterministic automaton over bytes: ``table[state, byte]`` is the next state, state 0 the first.

    ``accept`` marks the states in which a string may end. ``label`` is how tables and errors call it.
    """

    table: np.ndarray
    accept: np.ndarray
    label: str

    def accepts(self, text: bytes) -> bool:
        """Whether the automaton accepts a whole string (for tests and for people)."""
        state = 0
        for byte in text:
            state = self.table[state, byte]
        return bool(self.accept[state])


def _is_letter(byte: int) -> bool:
    return chr(byte).isalpha() if byte < 128 else True  # bytes of non-ASCII characters count as letters


LETTER = np.array([_is_letter(b) for b in range(256)])


def max_word_length(limit: int) -> ByteDFA:
    """No run of more than ``limit`` ASCII letters. States 0..limit count the run; the last is dead."""
    ascii_letter = np.array([b < 128 and chr(b).isalpha() for b in range(256)])
    table = np.zeros((limit + 2, 256), dtype=np.int32)
    for state in range(limit + 1):
        table[state] = np.where(ascii_letter, state + 1, 0)
    table[limit + 1] = limit + 1
    return ByteDFA(table, np.arange(limit + 2) <= limit, f"no word over {limit} letters")


def words(contain: Iterable[str] = (), avoid: Iterable[str] = ()) -> ByteDFA:
    """Every word of ``contain`` occurs as a whole word, and none of ``avoid`` does (ASCII case is ignored).

    A word is matched from one non-letter (or the string's end) to the next; phrases may contain spaces or hyphens
    only through their separate words.
    """
    contain, avoid = [w.lower() for w in contain], [w.lower() for w in avoid]
    for w in (*contain, *avoid):
        if not w or not all(LETTER[b] for b in w.encode()):
            raise InputError(f"{w!r} is not one word of letters; give single words, e.g. contain=['rain', 'sun']")
    both = set(contain) & set(avoid)
    if both:
        raise InputError(f"{sorted(both)[0]!r} is both required and forbidden; drop it from one list")
    trie: list[dict[int, int]] = [{}]
    ends: dict[int, str] = {}
    for w in sorted({*contain, *avoid}):
        node = 0
        for byte in w.encode():
            node = trie[node].setdefault(byte, len(trie))
            if node == len(trie):
                trie.append({})
        ends[node] = w
    other = len(trie)  # inside a word that is none of ours
    masks = 1 << len(contain)
    if masks * (other + 1) * 256 > MAX_CELLS:
        raise InputError(f"automaton of {masks * (other + 1):,} states for {len(contain)} words; require fewer words")
    bit = {w: 1 << i for i, w in enumerate(contain)}
    dead = masks * (other + 1)
    table = np.full((dead + 1, 256), dead, dtype=np.int32)
    accept = np.zeros(dead + 1, dtype=bool)
    for mask in range(masks):
        for node in range(other + 1):
            state = mask * (other + 1) + node
            word = ends.get(node)
            closed = -1 if word in avoid else mask | bit.get(word or "", 0)
            accept[state] = closed == masks - 1
            for byte in range(256):
                if not LETTER[byte]:
                    table[state, byte] = dead if closed < 0 else closed * (other + 1)
                else:
                    lower = ord(chr(byte).lower()) if byte < 128 else byte
                    step = other if node == other else trie[node].get(lower, other)
                    table[state, byte] = mask * (other + 1) + step
    said = [f"contains {', '.join(contain)}"] * bool(contain) + [f"avoids {', '.join(avoid)}"] * bool(avoid)
    return ByteDFA(table, accept, "; ".join(said))


def lift(dfa: ByteDFA, token_bytes: Sequence[bytes]) -> Int[Tensor, "state v"]:
    """The automaton over tokens: next state after all bytes of each token, from every state."""
    states, v = len(dfa.table), len(token_bytes)
    if states * v > MAX_CELLS:
        raise InputError(f"token automaton of {states:,} states x {v:,} tokens is too large; use a smaller constraint")
    longest = max(map(len, token_bytes))
    padded = np.zeros((v, longest), dtype=np.int64)
    length = np.array([len(b) for b in token_bytes])
    for i, b in enumerate(token_bytes):
        padded[i, : len(b)] = list(b)
    state = np.repeat(np.arange(states, dtype=np.int32)[:, None], v, 1)
    for j in range(longest):
        on = np.flatnonzero(length > j)
        state[:, on] = dfa.table[state[:, on], padded[on, j][None]]
    return torch.from_numpy(state)


class DFAGuide(BaseGuide):
    """A hard guide from a byte automaton: psi = 1 while acceptance is reachable in the moves that remain, else 0.

    The stop's own text (where it belongs to the latent) is read by the automaton before acceptance is asked.
    """

    hard = True

    def __init__(self, dfa: ByteDFA, space: Strings, token_bytes: Sequence[bytes], device: torch.device | str = "cpu"):
        if not token_bytes:
            raise InputError("this model does not tell its tokens' bytes; automaton constraints need them")
        self.dfa, self.space, self.label = dfa, space, dfa.label
        self.next = lift(dfa, token_bytes).to(device)
        accept = torch.from_numpy(dfa.accept)
        ends = [accept]
        if space.stops.in_text:
            table = self.next.cpu().long()
            ends = [accept[table[:, i]] for i in space.stops.ids]
        self.ends = torch.stack(ends, 1).to(device)  # [state, s]
        self.distance = self._distance()
        live = self.distance < FAR
        self.reach = int(self.distance[live].max()) if live.any() else 0
        self.live_next = torch.where(live[self.next.long()], 0.0, NEG_INF)  # [state, v], where length does not matter

    def _distance(self) -> Int[Tensor, " state"]:
        """Fewest legal tokens from each state to one where a stop is accepted (a large number where none)."""
        legal = self.space.legal_ids().numpy()
        table = self.next.cpu().numpy()
        states = len(table)
        back: list[set[int]] = [set() for _ in range(states)]
        for s in range(states):
            for t in np.unique(table[s, legal]):
                back[t].add(s)
        far = np.full(states, FAR)
        start = np.flatnonzero(self.ends.any(1).cpu().numpy())
        far[start] = 0
        queue = deque(start.tolist())
        while queue:
            t = queue.popleft()
            for s in back[t]:
                if far[s] > far[t] + 1:
                    far[s] = far[t] + 1
                    queue.append(s)
        return torch.from_numpy(far).to(self.next.device)

    def check(self) -> None:
        """Raise InputError where no string of the space satisfies the constraint."""
        need = int(self.distance[0])
        if need > self.space.max_moves:
            what = "no string does" if need >= FAR else f"the shortest takes {need} tokens"
            raise InputError(f"nothing satisfies '{self.label}' within {self.space.max_moves} tokens: {what}")

    def start(self, problem: Int[Tensor, " b"]) -> Int[Tensor, " b"]:
        """Automaton state 0."""
        return torch.zeros(len(problem), dtype=torch.long, device=self.next.device)

    def start_at(self, rollouts: Rollouts, upto: Int[Tensor, " b"]) -> Int[Tensor, " b"]:
        """Run the first ``upto`` moves."""
        state = self.start(rollouts.problem)
        for t in range(int(upto.max()) if len(upto) else 0):
            state = torch.where(upto > t, self.next[state, rollouts.moves[:, t]].long(), state)
        return state

    def step(self, c: Int[Tensor, " b"], s: StringState, move: Int[Tensor, " b"]) -> Int[Tensor, " b"]:
        """Next automaton state."""
        return self.next[c, move].long()

    def _alive(self, state: Tensor, left: Tensor) -> Bool[Tensor, "..."]:
        return self.distance[state] <= left

    def log_psi(self, c: Int[Tensor, " b"], s: StringState) -> Float[Tensor, " b"]:
        """0 where acceptance can still be reached, -inf where not."""
        left = self.space.max_moves - s.n
        return torch.where(self._alive(c, left), 0.0, NEG_INF)

    def log_next(self, c: Int[Tensor, " b"], s: StringState) -> Float[Tensor, "b v"]:
        """0 / -inf for every token."""
        left = self.space.max_moves - s.n - 1
        if (left >= self.reach).all():
            return self.live_next[c]
        return torch.where(self._alive(self.next[c].long(), left[:, None]), 0.0, NEG_INF)

    def log_end(self, c: Int[Tensor, " b"], s: StringState) -> Float[Tensor, "b s"]:
        """0 / -inf for every stop."""
        return torch.where(self.ends[c], 0.0, NEG_INF)

    def score(self, rollouts: Rollouts) -> Float[Tensor, " b"]:
        """0 / -inf of complete strings."""
        state = self.start_at(rollouts, rollouts.n)
        return torch.where(self.ends[state, rollouts.stop], 0.0, NEG_INF)
