"""Regular expressions and lists of choices as automata over bytes.

    pattern -> syntax tree -> Thompson's automaton over UTF-8 bytes -> subset construction -> ByteDFA

Being a table, the automaton knows how far every prefix is from a legal end, so that a guide from it never runs into a
length limit (``guides.dfa``). A whole string has to match. The syntax is the common core of Python's and Rust's:
literals, ``.`` (not a newline), classes, groups, ``|``, ``* + ? {m,n}``, the escapes of ``ESCAPES`` and ``CLASSES``
(ASCII, as under ``re.ASCII``). Look-around and back-references are not regular or not here, and are refused.

Source: Thompson 1968, "Regular expression search algorithm"; Rabin and Scott 1959 (subsets).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from retrodict.errors import InputError
from retrodict.guides.automata import ByteDFA

MAX_STATES = 20_000
MAX_REPEAT = 1000
TOP = 0x10FFFF

Ranges = tuple[tuple[int, int], ...]
"""Code points, as inclusive ranges."""

ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "f": "\f", "v": "\v", "0": "\0"}
_DIGIT: Ranges = ((48, 57),)
_WORD: Ranges = ((48, 57), (65, 90), (95, 95), (97, 122))
_SPACE: Ranges = ((9, 13), (32, 32))


def negate(ranges: Ranges) -> Ranges:
    """Every code point that is in none of the ranges."""
    out, low = [], 0
    for a, b in sorted(ranges):
        if a > low:
            out.append((low, a - 1))
        low = max(low, b + 1)
    return (*out, (low, TOP)) if low <= TOP else tuple(out)


CLASSES: dict[str, Ranges] = {
    "d": _DIGIT, "w": _WORD, "s": _SPACE, "D": negate(_DIGIT), "W": negate(_WORD), "S": negate(_SPACE),
}  # fmt: skip


# -- the syntax tree ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Chars:
    """One character out of ranges."""

    ranges: Ranges


@dataclass(frozen=True)
class Seq:
    """One part after the other."""

    parts: tuple[Node, ...]


@dataclass(frozen=True)
class Either:
    """One of several parts."""

    parts: tuple[Node, ...]


@dataclass(frozen=True)
class Repeat:
    """A part ``low`` to ``high`` times (``None``: without end)."""

    part: Node
    low: int
    high: int | None


Node = Chars | Seq | Either | Repeat


class _Parser:
    """Recursive descent over a pattern."""

    def __init__(self, pattern: str) -> None:
        self.text, self.at = pattern, 0

    def fail(self, what: str, at: int | None = None) -> InputError:
        column = (self.at if at is None else at) + 1
        return InputError(f"regex {self.text!r}, column {column}: {what}")

    def peek(self) -> str:
        return self.text[self.at : self.at + 1]

    def eat(self, word: str) -> bool:
        if self.text.startswith(word, self.at):
            self.at += len(word)
            return True
        return False

    def whole(self) -> Node:
        self.eat("^")
        node = self.either()
        if self.at < len(self.text):
            raise self.fail("a ')' that closes nothing; write \\) for the character")
        return node

    def either(self) -> Node:
        parts = [self.seq()]
        while self.eat("|"):
            parts.append(self.seq())
        return parts[0] if len(parts) == 1 else Either(tuple(parts))

    def seq(self) -> Node:
        parts: list[Node] = []
        while self.peek() not in ("", "|", ")"):
            if self.peek() == "$" and self.at + 1 == len(self.text):  # whole strings match anyway
                self.at += 1
                break
            parts.append(self.quantified())
        return parts[0] if len(parts) == 1 else Seq(tuple(parts))

    def quantified(self) -> Node:
        node = self.atom()
        while (sign := self.peek()) and sign in "*+?{":
            at = self.at
            low, high = self.counts() if sign == "{" else {"*": (0, None), "+": (1, None), "?": (0, 1)}[sign]
            self.at += sign != "{"
            if max(low, high or 0) > MAX_REPEAT:
                raise self.fail(f"more than {MAX_REPEAT} repeats; use fewer", at)
            node = Repeat(node, low, high)
            self.eat("?")  # laziness picks among matches and changes nothing here
        return node

    def counts(self) -> tuple[int, int | None]:
        at, end = self.at, self.text.find("}", self.at)
        low, comma, high = self.text[at + 1 : end].partition(",")
        if end < 0 or not low.isdigit() or (high and not high.isdigit()):
            raise self.fail("a count is {m}, {m,} or {m,n}; write \\{ for the character", at)
        self.at = end + 1
        top = int(high) if high else None if comma else int(low)
        if top is not None and top < int(low):
            raise self.fail(f"the count {{{low},{top}}} is empty; put the smaller number first", at)
        return int(low), top

    def atom(self) -> Node:
        at, c = self.at, self.peek()
        self.at += 1
        if c == "(":
            return self.group(at)
        if c == "[":
            return Chars(self.bracket(at))
        if c == ".":
            return Chars(negate(((10, 10),)))
        if c == "\\":
            return Chars(self.escape())
        if c in "*+?{":
            raise self.fail(f"{c!r} repeats nothing; write \\{c} for the character", at)
        if c in "^$":
            raise self.fail(f"{c!r} inside a pattern is not supported (whole texts match); write \\{c} for the "
                            "character", at)  # fmt: skip
        return Chars(((ord(c), ord(c)),))

    def group(self, at: int) -> Node:
        if self.eat("?") and not self.eat(":"):
            named = next((s for s in ("P<", "<") if self.text.startswith(s, self.at)), None)
            if named is None or self.text[self.at + len(named)] in "=!" or ">" not in self.text[self.at :]:
                raise self.fail("look-around and flags are not supported; rd.lark knows more of them", at)
            self.at = self.text.index(">", self.at) + 1
        node = self.either()
        if not self.eat(")"):
            raise self.fail("unclosed group; add ')'", at)
        return node

    def escape(self) -> Ranges:
        c = self.peek()
        self.at += 1
        if c in CLASSES:
            return CLASSES[c]
        if c in ("x", "u"):
            digits = self.text[self.at : self.at + (2 if c == "x" else 4)]
            try:
                code = int(digits, 16)
            except ValueError:
                raise self.fail(f"\\{c} takes {2 if c == 'x' else 4} hexadecimal digits", self.at - 2) from None
            self.at += len(digits)
            return ((code, code),)
        c = ESCAPES.get(c, c)
        if not c or c.isalnum():
            raise self.fail(f"unknown escape \\{c}", self.at - 2)
        return ((ord(c), ord(c)),)

    def bracket(self, at: int) -> Ranges:
        off, out, first = self.eat("^"), [], True
        while first or self.peek() != "]":
            if self.peek() == "":
                raise self.fail("unclosed class; add ']'", at)
            first, here = False, self.at
            low = self.member()
            if self.peek() == "-" and self.text[self.at + 1 : self.at + 2] not in ("]", ""):
                self.at += 1
                high = self.member()
                if any(len(r) != 1 or r[0][0] != r[0][1] for r in (low, high)) or low > high:
                    raise self.fail("a range goes from a smaller to a larger character", here)
                low = ((low[0][0], high[0][1]),)
            out.extend(low)
        self.at += 1
        return negate(tuple(out)) if off else tuple(out)

    def member(self) -> Ranges:
        c = self.peek()
        self.at += 1
        return self.escape() if c == "\\" else ((ord(c), ord(c)),)


# -- bytes --------------------------------------------------------------------------------------------------------


def utf8(low: int, high: int) -> list[tuple[tuple[int, int], ...]]:
    """The UTF-8 forms of the code points low..high as sequences of byte ranges (surrogates have none)."""
    if low > high:
        return []
    for edge in (0x7F, 0x7FF, 0xFFFF):
        if low <= edge < high:
            return utf8(low, edge) + utf8(edge + 1, high)
    if low <= 0xDFFF and high >= 0xD800:
        return utf8(low, 0xD7FF) + utf8(0xE000, high)
    first, last = chr(low).encode(), chr(high).encode()
    for i in range(1, len(first)):  # split until all bytes after the first that differs are free
        rest = (1 << 6 * i) - 1
        if low >> 6 * i != high >> 6 * i:
            if low & rest:
                return utf8(low, low | rest) + utf8((low | rest) + 1, high)
            if high & rest != rest:
                return utf8(low, (high & ~rest) - 1) + utf8(high & ~rest, high)
    return [tuple(zip(first, last, strict=True))]


@dataclass
class _NFA:
    """Thompson's automaton: byte ranges from state to state, and moves that read nothing."""

    reads: list[list[tuple[int, int, int]]] = field(default_factory=list)
    free: list[list[int]] = field(default_factory=list)

    def new(self) -> int:
        if len(self.reads) > 20 * MAX_STATES:
            raise InputError(f"the regex needs more than {20 * MAX_STATES:,} states; use smaller repeats")
        self.reads.append([])
        self.free.append([])
        return len(self.reads) - 1

    def add(self, node: Node, start: int) -> int:
        """Adds a node after ``start``; gives the state it ends in."""
        if isinstance(node, Seq):
            for part in node.parts:
                start = self.add(part, start)
            return start
        if isinstance(node, Repeat):
            return self._repeat(node, start)
        end = self.new()
        if isinstance(node, Either):
            for part in node.parts:
                begin = self.new()
                self.free[start].append(begin)
                self.free[self.add(part, begin)].append(end)
            return end
        tails: dict[tuple[tuple[int, int], ...], int] = {(): end}  # forms share what they end in
        for low, high in node.ranges:
            for form in utf8(low, high):
                for i in reversed(range(1, len(form))):
                    if form[i:] not in tails:
                        tails[form[i:]] = self.new()
                        self.reads[tails[form[i:]]].append((*form[i], tails[form[i + 1 :]]))
                self.reads[start].append((*form[0], tails[form[1:]]))
        return end

    def _repeat(self, node: Repeat, start: int) -> int:
        for _ in range(node.low):
            start = self.add(node.part, start)
        if node.high is None:
            loop = self.new()
            self.free[start].append(loop)
            self.free[self.add(node.part, loop)].append(loop)
            return loop
        end = self.new()
        for _ in range(node.high - node.low):
            self.free[start].append(end)
            begin = self.new()
            self.free[start].append(begin)
            start = self.add(node.part, begin)
        self.free[start].append(end)
        return end

    def closures(self) -> list[int]:
        """The states reached from each without reading, as bits."""
        out = []
        for s in range(len(self.free)):
            seen, todo = 1 << s, [s]
            while todo:
                for to in self.free[todo.pop()]:
                    if not seen >> to & 1:
                        seen |= 1 << to
                        todo.append(to)
            out.append(seen)
        return out

    def classes(self) -> tuple[np.ndarray, list[int]]:
        """The class of each byte, where no state tells bytes of a class apart; and one byte of each class."""
        cuts = {0, *(x for reads in self.reads for a, b, _ in reads for x in (a, b + 1))} - {256}
        first = sorted(cuts)
        return np.searchsorted(first, np.arange(256), side="right") - 1, first


def regex(pattern: str) -> ByteDFA:
    """The automaton of the strings that match a pattern from end to end; InputError with the column otherwise."""
    nfa = _NFA()
    start = nfa.new()
    try:
        end = nfa.add(_Parser(pattern).whole(), start)
    except RecursionError:
        raise InputError("the regex nests its groups too deeply; write it with fewer") from None
    (of, first), closed = nfa.classes(), nfa.closures()
    to = [[_union(closed[t] for a, b, t in reads if a <= byte <= b) for byte in first] for reads in nfa.reads]
    number, order, rows = {closed[start]: 0}, [closed[start]], []
    while len(rows) < len(order):
        parts = [to[s] for s in _members(order[len(rows)])]
        row = []
        for k in range(len(first)):
            states = _union(part[k] for part in parts)
            row.append(number.setdefault(states, len(order)))
            if row[-1] == len(order):
                order.append(states)
        rows.append(row)
        if len(order) > MAX_STATES:
            raise InputError(f"the regex {pattern!r} needs more than {MAX_STATES:,} states; use smaller repeats")
    accept = np.array([bool(s >> end & 1) for s in order])
    return ByteDFA(np.array(rows, dtype=np.int32), accept, f"matches {pattern}", of)


def _union(sets: Iterable[int]) -> int:
    out = 0
    for s in sets:
        out |= s
    return out


def _members(states: int) -> list[int]:
    """The bits that are set."""
    out = []
    while states:
        low = states & -states
        out.append(low.bit_length() - 1)
        states ^= low
    return out


def one_of(choices: Sequence[str]) -> ByteDFA:
    """The automaton of a list of strings: their trie, and a dead state."""
    if isinstance(choices, str) or not choices or not all(isinstance(c, str) for c in choices):
        raise InputError("one_of takes a list of texts; write ['yes', 'no']")
    trie: list[dict[int, int]] = [{}]
    ends = set()
    for choice in choices:
        node = 0
        for byte in choice.encode():
            node = trie[node].setdefault(byte, len(trie))
            if node == len(trie):
                trie.append({})
        ends.add(node)
    table = np.full((len(trie) + 1, 256), len(trie), dtype=np.int32)
    for i, to in enumerate(trie):
        table[i, list(to)] = list(to.values())
    said = ", ".join(map(repr, choices[:4])) + (", ..." if len(choices) > 4 else "")
    return ByteDFA(table, np.array([i in ends for i in range(len(trie) + 1)]), f"one of {said}")
