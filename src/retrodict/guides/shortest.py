"""The shortest text of a grammar, in a model's tokens: said before sampling where a length limit is too small for it.

Best-first search over byte prefixes. The cost of a prefix is the fewest legal tokens that spell it or run over its end;
it never falls as a prefix grows, so that the first complete text to come off the heap is the shortest. Bytes that leave
no choice are read at once. Of prefixes of one length that the same bytes may follow, the cheapest is kept, which makes
the inside of a JSON string one path and not a tree. That is a heuristic: two rules may allow the same next byte and
differ later. The search is bounded, and where it gives up nothing is claimed.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from retrodict.errors import InputError
from retrodict.guides.grammar import Grammar, GrammarGuide, engine, tokens_of
from retrodict.spaces.strings import Strings

BUDGET = 20_000
"""Prefixes looked at: about a second."""
LONGEST = 4096
"""Bytes of a prefix that is still followed."""
FAR = 1 << 30
BYTES = tuple(bytes([i]) for i in range(256))


@dataclass(frozen=True)
class Shortest:
    """``tokens`` (the stop apart) and ``text`` of the shortest text found; ``None`` where the search ended without one.

    ``whole``: the search was not cut off.
    """

    tokens: int | None
    text: str
    whole: bool


@dataclass(frozen=True)
class _Spelling:
    """How a byte prefix is spelled: the fewest tokens that end with it, and those begun (their bytes, and how many)."""

    exact: int
    begun: tuple[tuple[bytes, int], ...]

    @property
    def cost(self) -> int:
        """Fewest tokens that spell the prefix or run over its end."""
        return min([self.exact, *(n for _, n in self.begun)])


class _Vocabulary:
    """The legal tokens of a space, and what they begin with."""

    def __init__(self, space: Strings, token_bytes: Sequence[bytes]) -> None:
        legal = space.legal_ids().tolist()
        self.tokens = {b for b, ok in zip(token_bytes, legal, strict=True) if ok and b}
        self.heads = {b[:i] for b in self.tokens for i in range(1, len(b))}

    def extend(self, s: _Spelling, byte: bytes) -> _Spelling:
        """The spelling after one more byte."""
        starts = (*s.begun, (b"", s.exact + 1)) if s.exact < FAR else s.begun
        longer = [(head + byte, n) for head, n in starts]
        exact = min((n for word, n in longer if word in self.tokens), default=FAR)
        return _Spelling(exact, tuple(x for x in longer if x[0] in self.heads))


@dataclass(order=True)
class _Item:
    """On the heap: a prefix to grow, or (``text`` complete) an answer, which goes first among equals."""

    cost: int
    length: int
    grows: bool
    number: int
    text: bytes = field(compare=False)
    spelling: _Spelling = field(compare=False)
    matcher: Any = field(compare=False)
    bytes_next: np.ndarray = field(compare=False)


class _Search:
    """The heap, and the cheapest prefix of each kind."""

    def __init__(self, space: Strings, token_bytes: Sequence[bytes]) -> None:
        self.words = _Vocabulary(space, token_bytes)
        self.ends = [token_bytes[i] for i in space.stops.ids] if space.stops.in_text else [b""]
        self.heap: list[_Item] = []
        self.best: dict[tuple[int, bytes], int] = {}

    def put(self, cost: int, grows: bool, text: bytes, spelling: _Spelling, matcher: Any, after: np.ndarray) -> None:
        item = _Item(cost, len(text), grows, len(self.best) + len(self.heap), text, spelling, matcher, after)
        heapq.heappush(self.heap, item)

    def push(self, text: bytes, spelling: _Spelling, matcher: Any) -> None:
        """Read what is forced; put the prefix on the heap, and every complete text met on the way."""
        while spelling.cost < FAR and len(text) < LONGEST:
            after = _bits(matcher)
            if spelling.exact < FAR and any(_complete(matcher, e) for e in self.ends):
                self.put(spelling.exact, False, text, spelling, matcher, after)
            if len(after) != 1:
                key = (len(text), after.tobytes())
                if len(after) and spelling.cost < self.best.get(key, FAR):
                    self.best[key] = spelling.cost
                    self.put(spelling.cost, True, text, spelling, matcher, after)
                return
            text, spelling = text + after.tobytes(), self.words.extend(spelling, after.tobytes())
            matcher.try_consume_tokens(after.tolist())


def shortest(grammar: Grammar, space: Strings, token_bytes: Sequence[bytes], budget: int = BUDGET) -> Shortest:
    """The complete text of the fewest tokens."""
    search, looked = _Search(space, token_bytes), 0
    search.push(b"", _Spelling(0, ()), grammar.compact().matcher(tokens_of(BYTES)))
    while search.heap:
        top = heapq.heappop(search.heap)
        if not top.grows:
            return Shortest(top.cost, top.text.decode(errors="replace"), True)
        looked += len(top.bytes_next)
        if looked > budget:
            return Shortest(None, "", False)
        for byte in top.bytes_next.tolist():
            child = top.matcher.deep_copy()
            if child.try_consume_tokens([byte]):
                search.push(top.text + BYTES[byte], search.words.extend(top.spelling, BYTES[byte]), child)
    return Shortest(None, "", True)


def check_fits(guide: GrammarGuide) -> None:
    """InputError where the shortest text that the search finds is over the space's limit, or there is none."""
    space, found = guide.space, shortest(guide.grammar, guide.space, guide.token_bytes)
    head = f"nothing satisfies the {guide.grammar.kind} within {space.max_free} tokens: "
    if found.tokens is None and found.whole:
        stop = f" and the stop {space.stops.label} can end" if space.stops.in_text else ""
        raise InputError(f"{head}no text that the model's tokens can spell{stop}")
    if found.tokens is not None and found.tokens > space.max_free:
        raise InputError(f"{head}the shortest takes {found.tokens} tokens, {found.text!r}; raise max_tokens")


def _bits(matcher: Any) -> np.ndarray:
    """The bytes that may come next."""
    out = np.zeros((1, 9), dtype=np.int32)
    if not matcher.is_error():
        engine().numpy.fill_next_token_bitmask(matcher, out, 0)
    return np.flatnonzero(np.unpackbits(out.view(np.uint8), bitorder="little")[:256]).astype(np.uint8)


def _complete(matcher: Any, end: bytes) -> bool:
    """Whether the text with a stop's bytes after it is complete."""
    if not end:
        return matcher.is_accepting()
    copy = matcher.deep_copy()
    return copy.try_consume_tokens(list(end)) == len(end) and copy.is_accepting()
