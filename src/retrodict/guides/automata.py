"""An algebra of finite automata over the bytes of a string, and the automata of what people ask of a text.

    L(a & b) = L(a) and L(b),   L(a | b) = L(a) or L(b),   L(~a) = every other string

Tables are [state, byte class]: bytes that no state tells apart share a class. Every result is minimal: states are
merged by Moore's partition refinement (Moore 1956; the result is unique, so the product of searches for single
phrases *is* the minimised automaton of Aho and Corasick 1975). Searches are Shift-And (Baeza-Yates and Gonnet 1992),
made deterministic. Bytes, not characters: an automaton reads UTF-8, and ignoring case means ASCII letters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Bool, Int

from retrodict.errors import InputError

MAX_STATES = 100_000
"""States of a product before it is minimised; beyond, it is refused."""

ANYTHING = "anything"
SPACES = b" \t\n\r\v\f"


@dataclass(frozen=True, eq=False)
class ByteDFA:
    """A deterministic automaton over bytes. State 0 is the first.

    Attributes:
        table: next state of each state after a byte of the class.
        accept: states in which a string may end.
        label: how tables and errors call it.
        of: class of each byte; by default each byte is its own class, and ``table`` has 256 columns.
    """

    table: Int[np.ndarray, "state class"]
    accept: Bool[np.ndarray, " state"]
    label: str
    of: Int[np.ndarray, "256"] = field(default_factory=lambda: np.arange(256))

    def __len__(self) -> int:
        return len(self.table)

    def accepts(self, text: bytes) -> bool:
        """Whether the automaton accepts a whole string (for tests and for people)."""
        state = 0
        for byte in text:
            state = self.table[state, self.of[byte]]
        return bool(self.accept[state])

    def named(self, label: str) -> ByteDFA:
        """The same automaton under another name."""
        return ByteDFA(self.table, self.accept, label, self.of)

    def __and__(self, other: ByteDFA) -> ByteDFA:
        return _product(self, other, np.logical_and, f"{self.label}; {other.label}")

    def __or__(self, other: ByteDFA) -> ByteDFA:
        return _product(self, other, np.logical_or, f"({self.label}) or ({other.label})")

    def __invert__(self) -> ByteDFA:
        return ByteDFA(self.table, ~self.accept, f"not ({self.label})", self.of)

    def minimal(self) -> ByteDFA:
        """The automaton of the same language with the fewest states and byte classes, in an order of its own.

        Two automata accept the same strings exactly where their minimal forms are equal.
        """
        order, state = _reachable(self.table)
        table, accept = state[self.table[order]], self.accept[order]
        block = _blocks(table, accept)
        first = np.unique(block, return_index=True)[1]
        table, accept = block[table[first]], accept[first]
        start = block[0]
        columns, column = distinct(np.ascontiguousarray(table.T))
        of = column[self.of]
        by_byte = np.unique(of, return_index=True)[1]  # the first byte of each class that any byte has
        kept = of[np.sort(by_byte)]
        rank = np.zeros(len(columns), dtype=np.int64)
        rank[kept] = np.arange(len(kept))
        table = np.ascontiguousarray(columns[kept].T)
        order, state = _reachable(table, start)
        return ByteDFA(state[table[order]].astype(np.int32), accept[order], self.label, rank[of])


def distinct(rows: Int[np.ndarray, "n k"]) -> tuple[Int[np.ndarray, "m k"], Int[np.ndarray, " n"]]:
    """Distinct rows, and which of them each row is."""
    rows = np.ascontiguousarray(rows, dtype=np.int32)
    if not rows.shape[1]:
        return rows[:1], np.zeros(len(rows), dtype=np.int64)
    keys = rows.view(np.dtype((np.void, rows.itemsize * rows.shape[1]))).ravel()
    _, first, back = np.unique(keys, return_index=True, return_inverse=True)
    return rows[first], back.astype(np.int64)


def _reachable(table: np.ndarray, start: int | np.integer = 0) -> tuple[np.ndarray, np.ndarray]:
    """States that can be reached, breadth first, and the new number of each old state (-1: none)."""
    number = np.full(len(table), -1, dtype=np.int64)
    number[start] = 0
    level = np.array([start])
    order = [level]
    while len(level):
        step = table[level].ravel()
        step = step[number[step] < 0]
        level = step[np.sort(np.unique(step, return_index=True)[1])]
        number[level] = sum(map(len, order)) + np.arange(len(level))
        order.append(level)
    return np.concatenate(order), number


def _blocks(table: np.ndarray, accept: np.ndarray) -> np.ndarray:
    """Moore: split by acceptance, then by the blocks that each byte class leads to, until nothing splits."""
    block, count = np.unique(accept, return_inverse=True)[1].astype(np.int64), 0
    while block.max() + 1 > count:
        count = int(block.max()) + 1
        block = distinct(np.column_stack([block, block[table]]))[1]
    return block


def _product(a: ByteDFA, b: ByteDFA, join: Callable[..., np.ndarray], label: str) -> ByteDFA:
    """Reachable pairs of states, breadth first; the pair (i, j) is the number i * len(b) + j."""
    m, k = b.table.shape
    pair, of = np.unique(a.of.astype(np.int64) * k + b.of, return_inverse=True)
    left, right = a.table[:, pair // k].astype(np.int64) * m, b.table[:, pair % k].astype(np.int64)
    seen = level = np.zeros(1, dtype=np.int64)
    while len(level):
        level = np.setdiff1d(left[level // m] + right[level % m], seen)
        seen = np.union1d(seen, level)
        if len(seen) > MAX_STATES:
            raise InputError(
                f"the automaton of '{label}' has over {MAX_STATES:,} states; give fewer or shorter phrases, "
                "or a lower word count"
            )
    table = np.searchsorted(seen, left[seen // m] + right[seen % m])
    return ByteDFA(table, join(a.accept[seen // m], b.accept[seen % m]), label, of).minimal()


def meet(parts: Sequence[ByteDFA]) -> ByteDFA:
    """The product of many, the smallest two first."""
    label, parts = "; ".join(p.label for p in parts), list(parts)
    while len(parts) > 1:
        parts = sorted(parts, key=len)
        parts = [parts[0] & parts[1], *parts[2:]]
    return parts[0].named(label)


# -- what people ask of a text ------------------------------------------------------------------------------------


def _is_letter(byte: int) -> bool:
    return byte >= 128 or chr(byte).isalpha()  # bytes of non-ASCII characters count as letters


def _cases(byte: int, ignore_case: bool) -> list[int]:
    """The bytes that count as this one."""
    return sorted({ord(chr(byte).lower()), ord(chr(byte).upper())}) if ignore_case and byte < 128 else [byte]


def _phrases(phrases: Iterable[str], what: str) -> list[str]:
    if isinstance(phrases, str):
        raise InputError(f"{what} is a list of phrases; write [{phrases!r}] instead of {phrases!r}")
    phrases = list(dict.fromkeys(phrases))
    if not all(phrases):
        raise InputError(f"{what} holds an empty phrase, which every text contains; drop it")
    return phrases


def _say(phrase: str) -> str:
    """A phrase in a label: plain where it is one word."""
    return phrase if phrase.isalnum() else repr(phrase)


@dataclass(frozen=True)
class _Stage:
    """Shift-And for a set of phrases, one bit a byte; any of them completes the stage.

    ``at[class]`` are the bits that a byte may set. A match may begin at ``free`` bits anywhere, at ``bound`` bits only
    where no letter came before; it is complete at ``now`` bits at once, at ``wait`` bits once no letter follows.
    """

    at: list[int]
    heads: int
    bound: int
    now: int
    wait: int


def _stage(phrases: Sequence[bytes], of: np.ndarray, whole: bool) -> _Stage:
    at, heads, bound, now, wait, bit = [0] * (int(of.max()) + 1), 0, 0, 0, 0, 1
    for phrase in phrases:
        heads |= bit
        bound |= bit if whole and _is_letter(phrase[0]) else 0
        for byte in phrase:
            at[of[byte]] |= bit
            bit <<= 1
        if whole and _is_letter(phrase[-1]):
            wait |= bit >> 1
        else:
            now |= bit >> 1
    return _Stage(at, heads, bound, now, wait)


_State = tuple[int, int, bool]
"""(stages done, bits of the matches in progress, whether the last byte was a letter)."""


def _read(stages: Sequence[_Stage], state: _State, byte: int, letter: bool) -> _State:
    """One byte (its class) of a search."""
    i, bits, after = state
    if i < len(stages) and bits & stages[i].wait and not letter:
        i, bits = i + 1, 0  # the word is over; this byte may begin the next phrase
    if i == len(stages):
        return i, 0, False
    s = stages[i]
    begin = s.heads & ~s.bound if after else s.heads
    bits = (bits << 1 & ~s.heads | begin) & s.at[byte]
    return (i + 1, 0, letter) if bits & s.now else (i, bits, letter)


def search(stages: Sequence[Sequence[str]], label: str, whole: bool = True, ignore_case: bool = True) -> ByteDFA:
    """Some phrase of the first set occurs, then one of the second behind it, and so on.

    Args:
        stages: sets of phrases, which may contain spaces. Taking each stage's earliest end loses nothing.
        label: how errors call it.
        whole: a phrase that begins or ends with a letter counts only where no further letter stands beside it.
        ignore_case: ASCII letters in either case.
    """
    sets = [[p.encode() for p in s] for s in stages]
    of = np.array([256 + _is_letter(b) for b in range(256)])
    for byte in sorted({b for s in sets for p in s for b in p}):
        of[_cases(byte, ignore_case)] = min(_cases(byte, ignore_case))
    kinds, first, of = np.unique(of, return_index=True, return_inverse=True)
    letter = [_is_letter(int(b)) for b in first]
    steps = [_stage(s, of, whole) for s in sets]
    start: _State = (0, 0, False)
    number: dict[_State, int] = {start: 0}
    rows: list[list[int]] = []
    queue: list[_State] = [start]
    for state in queue:
        row = []
        for c in range(len(kinds)):
            after = _read(steps, state, c, letter[c])
            if after not in number:
                number[after] = len(queue)
                queue.append(after)
            row.append(number[after])
        rows.append(row)
    last = len(steps)
    accept = [i == last or i == last - 1 and bool(bits & steps[i].wait) for i, bits, _ in queue]
    return ByteDFA(np.array(rows, dtype=np.int32), np.array(accept), label, of).minimal()


def contains(phrase: str, whole: bool = True, ignore_case: bool = True) -> ByteDFA:
    """The phrase occurs."""
    return search([_phrases([phrase], "contain")], f"contains {_say(phrase)}", whole, ignore_case)


def contains_all(phrases: Iterable[str], whole: bool = True, ignore_case: bool = True) -> ByteDFA:
    """Every phrase occurs, in any order; occurrences may overlap."""
    phrases = _phrases(phrases, "contain")
    if not phrases:
        return anything()
    found = meet([contains(p, whole, ignore_case) for p in phrases])
    return found.named(f"contains {', '.join(map(_say, phrases))}")


def in_order(phrases: Iterable[str], whole: bool = True, ignore_case: bool = True) -> ByteDFA:
    """The phrases occur one behind the other."""
    phrases = phrases if isinstance(phrases, str) else list(phrases)  # one may be asked for twice
    if not _phrases(phrases, "in_order"):
        return anything()
    label = f"contains {' then '.join(map(_say, phrases))}"
    return search([[p] for p in phrases], label, whole, ignore_case)


def banned(phrases: Iterable[str], whole: bool = True, ignore_case: bool = True) -> ByteDFA:
    """No phrase occurs."""
    phrases = _phrases(phrases, "avoid")
    if not phrases:
        return anything()
    return (~search([phrases], "", whole, ignore_case)).named(f"avoids {', '.join(map(_say, phrases))}")


def words(
    contain: Iterable[str] = (), avoid: Iterable[str] = (), whole: bool = True, ignore_case: bool = True
) -> ByteDFA:
    """Every phrase of ``contain`` occurs and none of ``avoid`` does.

    Raises:
        InputError: an empty phrase, a phrase in both lists, or lists that no text satisfies.
    """
    contain, avoid = _phrases(contain, "contain"), _phrases(avoid, "avoid")
    if not contain and not avoid:
        return anything()
    fold = str.lower if ignore_case else str
    both = sorted({fold(p) for p in contain} & {fold(p) for p in avoid})
    if both:
        raise InputError(f"{both[0]!r} is both required and forbidden; drop it from one list")
    parts = [contains_all(contain, whole, ignore_case)] * bool(contain) + [banned(avoid, whole, ignore_case)] * bool(
        avoid
    )
    return satisfiable(meet(parts))


def satisfiable(dfa: ByteDFA) -> ByteDFA:
    """The automaton; InputError where it accepts no text at all."""
    if not dfa.minimal().accept.any():
        raise InputError(f"no text satisfies this: {dfa.label}; its parts contradict each other, so drop one")
    return dfa


def anything() -> ByteDFA:
    """Every string."""
    return ByteDFA(np.zeros((1, 1), dtype=np.int32), np.ones(1, dtype=bool), ANYTHING, np.zeros(256, dtype=np.int64))


def starts_with(text: str, ignore_case: bool = False) -> ByteDFA:
    """The string begins with ``text``."""
    data = text.encode()
    done, dead = len(data), len(data) + 1
    table = np.full((dead + 1, 256), dead, dtype=np.int32)
    table[done] = done
    for i, byte in enumerate(data):
        table[i, _cases(byte, ignore_case)] = i + 1
    return ByteDFA(table, np.arange(dead + 1) == done, f"starts with {text!r}").minimal()


def ends_with(text: str, ignore_case: bool = False) -> ByteDFA:
    """The string ends with ``text``: the automaton of Knuth, Morris and Pratt 1977.

    State i is how much of ``text`` the string ends with; ``back`` is the state after ``text[1:i]``, where a mismatch
    goes on.
    """
    data = text.encode()
    table = np.zeros((len(data) + 1, 256), dtype=np.int32)
    back = 0
    for i, byte in enumerate(data):
        same = _cases(byte, ignore_case)
        table[i] = table[back]
        after = int(table[back, byte]) if i else 0
        table[i, same] = i + 1
        back = after
    table[len(data)] = table[back]
    return ByteDFA(table, np.arange(len(data) + 1) == len(data), f"ends with {text!r}").minimal()


def word_count(low: int = 0, high: int | None = None) -> ByteDFA:
    """From ``low`` to ``high`` words (no upper limit where None), as ``len(text.split())`` counts on ASCII spaces.

    State 2 k stands between words after k of them, 2 k + 1 inside the word that makes k + 1.
    """
    if low < 0 or high is not None and high < low:
        raise InputError(f"a word count goes from low to high, not from {low} to {high}; e.g. (5, 12), or (5, None)")
    top = low if high is None else high + 1  # counting stops here
    of = np.array([b not in SPACES for b in range(256)]).astype(np.int64)
    k = np.arange(top + 1)
    table = np.empty((2 * top + 2, 2), dtype=np.int32)
    table[0::2, 0], table[0::2, 1] = 2 * k, 2 * k + 1
    table[1::2, 0], table[1::2, 1] = 2 * np.minimum(k + 1, top), 2 * k + 1
    count = np.minimum((np.arange(2 * top + 2) + 1) // 2, top)
    accept = (count >= low) & (count <= (top if high is None else high))
    said = f"at least {low}" if high is None else str(low) if low == high else f"{low} to {high}"
    return ByteDFA(table, accept, f"{said} word{'s' * (said != '1')}", of).minimal()


def max_word_length(limit: int) -> ByteDFA:
    """No run of more than ``limit`` ASCII letters. States 0..limit count the run; the last is dead."""
    if limit < 0:
        raise InputError(f"the longest run of letters cannot be {limit}; give 0 or more")
    of = np.array([b < 128 and chr(b).isalpha() for b in range(256)]).astype(np.int64)
    run = np.arange(limit + 2)
    table = np.stack([np.where(run > limit, run, 0), np.minimum(run + 1, limit + 1)], 1).astype(np.int32)
    return ByteDFA(table, run <= limit, f"no word over {limit} letters", of)


def only(characters: str) -> ByteDFA:
    """No other characters than these; a character beyond ASCII is read byte by byte."""
    if not characters:
        raise InputError("only='' allows no character at all; give the characters that may occur")
    rows: list[dict[int, int]] = [{}]
    for char in sorted(set(characters)):
        state, data = 0, char.encode()
        for byte in data[:-1]:
            state = rows[state].setdefault(byte, len(rows))
            if state == len(rows):
                rows.append({})
        rows[state][data[-1]] = 0
    table = np.full((len(rows) + 1, 256), len(rows), dtype=np.int32)
    for state, row in enumerate(rows):
        table[state, list(row)] = list(row.values())
    return ByteDFA(table, np.arange(len(rows) + 1) == 0, f"only the characters {characters!r}").minimal()
