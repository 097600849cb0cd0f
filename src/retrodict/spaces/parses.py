"""Labelled binary parse trees of given sentences under the rules of a grammar, built by shift and reduce.

Move A < S shifts: the next word goes on the stack under the label A. Move S + P reduces: the two topmost subtrees B, C
become one P, where the grammar has P -> B C. A tree over n words is 2n - 1 moves (its nodes in post-order; Aho and
Ullman 1972) and has no other sequence, so log P_B = 0. Only the whole tree, labelled with the root, is an object.

There are no dead ends: a move is legal only where the stack it leaves can still become a whole tree. What a stack can
still take is kept beside it (``spaces.charts``: the outside half of a chart, true or false), so the menu is exact: it
has every move of some tree and no other. Hence a positive density wherever q may go, which squared errors need.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from retrodict.errors import InputError
from retrodict.records import CHOOSE, MUST_STOP, Menu, Problem, Rollouts, whole_rollouts
from retrodict.spaces.charts import NEVER, Futures, closure, inside, wanted_first

BINARY, LEXICAL = 0, 1
"""Kinds of a node of a tree, see :meth:`Parses.nodes`."""


@dataclass(frozen=True)
class ParseState:
    """b parses under construction.

    Attributes:
        problem: index of each row's sentence.
        labels: of the subtrees on the stack, bottom first (-1 above the top).
        stacks: at ``[:, m]`` the number of the stack of the lowest m subtrees, in ``charts.Futures``.
        depth: subtrees on the stack.
        shifted: words taken so far.
    """

    problem: Int[Tensor, " b"]
    labels: Int[Tensor, "b l"]
    stacks: Int[Tensor, "b l1"]
    depth: Int[Tensor, " b"]
    shifted: Int[Tensor, " b"]


@dataclass(frozen=True)
class Parses:
    """All trees of some sentences. Equal where rules and sentences are.

    Attributes:
        binary: (P, B, C) of each rule P -> B C, by number.
        lexical: (A, w) of each rule A -> word w.
        sentences: word numbers, one sentence a problem.
        labels, words: names, for people.
        root: the label of whole trees.
        longest: words of the longest sentence there may be (by default the longest there is); sets ``n_features``.

    Raises:
        InputError: a sentence that has no tree; the message says what its widest part is.
    """

    binary: tuple[tuple[int, int, int], ...]
    lexical: tuple[tuple[int, int], ...]
    sentences: tuple[tuple[int, ...], ...]
    labels: tuple[str, ...]
    words: tuple[str, ...]
    root: int = 0
    longest: int = 0
    n_stops: int = 1

    def __post_init__(self) -> None:
        there = max((len(x) for x in self.sentences), default=0)
        if not self.sentences or min(len(x) for x in self.sentences) < 1:
            raise InputError("parses need at least one sentence, of a word or more each")
        if self.longest and there > self.longest:
            raise InputError(f"a sentence has {there} words, and this space was made for {self.longest} at most; "
                             "build it with longest= as many")  # fmt: skip
        object.__setattr__(self, "longest", self.longest or there)
        self._check()

    def on(self, problems: Sequence[Problem]) -> Parses:
        """The same rules over other sentences, those of the problems' contexts. The last answer is kept: the parts of
        a target and its policy move together, and charts are made once."""
        sentences, last = tuple(p.context for p in problems), self.__dict__.get("_moved")
        if last is None or last.sentences != sentences:
            last = replace(self, sentences=sentences)
            object.__setattr__(self, "_moved", last)
        return last

    @property
    def max_moves(self) -> int:
        """n shifts and n - 1 reduces."""
        return 2 * self.longest - 1

    @property
    def n_moves(self) -> int:
        """A shift and a reduce a label."""
        return 2 * len(self.labels)

    @property
    def n_features(self) -> int:
        """One-hots of the labels on the stack and of the words to come."""
        return self.longest * (len(self.labels) + len(self.words))

    # -- tables -------------------------------------------------------------------------------------------------------

    @cached_property
    def lengths(self) -> Int[Tensor, " m"]:
        """Words of each sentence."""
        return torch.tensor([len(x) for x in self.sentences])

    @cached_property
    def word(self) -> Int[Tensor, "m l1"]:
        """The sentences as numbers, and one column past the last; the number of words where a sentence has ended."""
        out = torch.full((len(self.sentences), self.longest + 1), len(self.words))
        for i, x in enumerate(self.sentences):
            out[i, : len(x)] = torch.tensor(x)
        return out

    @cached_property
    def rule(self) -> Float[Tensor, "s s s"]:
        """1 where A -> B C is a rule."""
        s = len(self.labels)
        out = torch.zeros(s, s, s, dtype=torch.float64)
        if self.binary:
            out[tuple(torch.tensor(self.binary).T)] = 1.0
        return out

    @cached_property
    def tag(self) -> Float[Tensor, "s w1"]:
        """1 where A -> w is a rule; the last column is past the end of a sentence."""
        out = torch.zeros(len(self.labels), len(self.words) + 1, dtype=torch.float64)
        out[tuple(torch.tensor(self.lexical).T)] = 1.0
        return out

    @cached_property
    def count(self) -> Float[Tensor, "m l1 l1 s"]:
        """log of how many trees each label has over each span; below NEVER / 2 where none."""
        leaf = self.tag[:, self.word[:, :-1]].permute(1, 2, 0).log()
        return inside(self.rule.log(), leaf)

    @cached_property
    def trees(self) -> Float[Tensor, " m"]:
        """How many trees each sentence has."""
        return self.count[torch.arange(len(self.lengths)), 0, self.lengths, self.root].exp().round()

    @cached_property
    def futures(self) -> Futures:
        """What stacks can still become."""
        there = (self.count > NEVER / 2).double()
        closed = torch.cat([closure(self.rule, part) > 0 for part in there.split(256)])
        return Futures(self.rule.float(), closed, wanted_first(closed, self.root, len(self.labels), self.lengths))

    def _check(self) -> None:
        lost = (self.trees < 0.5).nonzero().squeeze(1).tolist()
        if lost:
            more = f" (and {len(lost) - 1} sentences more)" if len(lost) > 1 else ""
            raise InputError(f"{self._why(lost[0])}{more}")

    def _why(self, problem: int) -> str:
        """What is wrong with a sentence that has no tree."""
        n, ids = len(self.sentences[problem]), self.sentences[problem]
        text = [self.words[w] for w in ids]
        covers = self.count[problem] > NEVER / 2
        head = f"the grammar has no tree for {' '.join(text)!r}"
        for i in range(n):
            if not bool(covers[i, i + 1].any()):
                return f"{head}: no rule gives the word {text[i]!r} (word {i + 1})"
        spans = [(j - i, -i) for i in range(n) for j in range(i + 1, n + 1) if bool(covers[i, j].any())]
        width, start = max(spans)
        start = -start
        names = " or ".join(self.labels[a] for a in covers[start, start + width].nonzero().flatten().tolist())
        if width == n:
            return f"{head}: as a whole it is {names}, not {self.labels[self.root]}"
        part = f"words {start + 1} to {start + width}, {' '.join(text[start : start + width])!r}"
        part = part if width > 1 else f"single words, the first {text[start]!r}"
        return f"{head}: no symbol covers all of it; the widest span that one covers is {part} ({names})"

    # -- the process --------------------------------------------------------------------------------------------------

    def start(self, problem: Int[Tensor, " b"]) -> ParseState:
        """b empty stacks."""
        zero = torch.zeros_like(problem)
        labels = torch.full((len(problem), self.longest), -1)
        stacks = torch.zeros(len(problem), self.longest + 1, dtype=torch.long)
        stacks[:, 0] = problem
        return ParseState(problem, labels, stacks, zero, zero.clone())

    def menu(self, s: ParseState) -> Menu:
        """Every move that some tree of the sentence makes here; the stop when all is one tree."""
        whole = (s.shifted == self.lengths[s.problem]) & (s.depth == 1)
        return Menu(self._legal(s), whole, torch.where(whole, MUST_STOP, CHOOSE))

    def _legal(self, s: ParseState) -> Bool[Tensor, "b v"]:
        row, futures, below = torch.arange(len(s.depth)), self.futures, (s.depth - 2).clamp_min(0)
        tag = self.tag[:, self.word[s.problem, s.shifted]].T > 0
        shift = tag & futures.at(s.stacks[row, s.depth], (s.shifted + 1).clamp_max(self.longest))
        left, right = s.labels[row, below], s.labels[row, (s.depth - 1).clamp_min(0)]
        rule = (self.rule[:, left, right].T > 0) & (s.depth >= 2)[:, None]
        return torch.cat([shift, rule & futures.at(s.stacks[row, below], s.shifted)], 1)

    def step(self, s: ParseState, move: Int[Tensor, " b"]) -> ParseState:
        """Shift or reduce, a row."""
        shift, row, label = move < len(self.labels), torch.arange(len(move)), move % len(self.labels)
        at = torch.where(shift, s.depth, s.depth - 2)  # where the new subtree lies
        labels = s.labels.scatter(1, at[:, None], label[:, None])
        labels = labels.masked_fill(torch.arange(self.longest) > at[:, None], -1)
        stacks = s.stacks.scatter(1, at[:, None] + 1, self.futures.after(s.stacks[row, at], label)[:, None])
        return ParseState(s.problem, labels, stacks, at + 1, s.shifted + shift.long())

    def take(self, s: ParseState, index: Tensor) -> ParseState:
        """Rows ``index``."""
        return ParseState(s.problem[index], s.labels[index], s.stacks[index], s.depth[index], s.shifted[index])

    def replay(self, rollouts: Rollouts, upto: Int[Tensor, " b"]) -> ParseState:
        """The stacks after the first ``upto`` moves."""
        s = self.start(rollouts.problem)
        for i in range(int(upto.max()) if len(upto) else 0):
            on = (i < upto).nonzero().squeeze(1)
            new = self.step(self.take(s, on), rollouts.moves[on, i])
            for name in ("labels", "stacks", "depth", "shifted"):
                getattr(s, name)[on] = getattr(new, name)
        return s

    def log_pb(self, s: ParseState) -> Float[Tensor, " b"]:
        """One path a tree: 0."""
        return torch.zeros(len(s.depth), dtype=torch.float64)

    def features(self, s: ParseState) -> Float[Tensor, "b f"]:
        """One-hots of the labels on the stack from the top down, then of the words to come from the next on.

        Of a context-free posterior this says all: what subtrees hold inside, and what lies behind, changes no odds.
        """
        down = s.depth[:, None] - 1 - torch.arange(self.longest)
        labels = torch.where(down >= 0, s.labels.gather(1, down.clamp_min(0)), -1)
        ahead = (s.shifted[:, None] + torch.arange(self.longest)).clamp_max(self.longest)
        words = self.word[s.problem[:, None], ahead]
        stack = F.one_hot(labels + 1, len(self.labels) + 1)[:, :, 1:]
        rest = F.one_hot(words, len(self.words) + 1)[:, :, :-1]
        return torch.cat([stack.flatten(1), rest.flatten(1)], 1).float()

    # -- objects ------------------------------------------------------------------------------------------------------

    def nodes(self, rollouts: Rollouts) -> Int[Tensor, "b t 4"]:
        """The rule of every node in post-order: (BINARY, P, B, C) or (LEXICAL, A, word, 0); -1 past the end.

        What a score of trees is a sum over. It reads labels only, no chart.
        """
        b, t = rollouts.moves.shape
        out = torch.full((b, t, 4), -1)
        labels, depth = torch.zeros(b, self.longest + 1, dtype=torch.long), torch.zeros_like(rollouts.n)
        shifted, size, row = torch.zeros_like(rollouts.n), len(self.labels), torch.arange(b)
        for i in range(t):
            move = rollouts.moves[:, i]
            shift, label = move < size, move % size
            left, right = labels[row, (depth - 2).clamp_min(0)], labels[row, (depth - 1).clamp_min(0)]
            word = self.word[rollouts.problem, shifted]
            node = torch.stack([torch.where(shift, LEXICAL, BINARY), label, torch.where(shift, word, left),
                                torch.where(shift, 0, right)], 1)  # fmt: skip
            on = i < rollouts.n
            out[:, i] = torch.where(on[:, None], node, -1)
            depth = depth + torch.where(on, torch.where(shift, 1, -1), 0)
            shifted = shifted + (shift & on).long()
            labels[row, (depth - 1).clamp_min(0)] = torch.where(on, label, labels[row, (depth - 1).clamp_min(0)])
        return out

    def record(self, problem: Int[Tensor, " b"], moves: Int[Tensor, "b t"]) -> Rollouts:
        """Rollouts of whole trees given by their moves (what is past 2n - 1 does not count), with log q and b 0."""
        return whole_rollouts(problem, moves, 2 * self.lengths[problem] - 1)

    def keys(self, rollouts: Rollouts) -> list[tuple[int, ...]]:
        """The moves, which only this tree has, then the stop."""
        return [(*z[:n], -1) for z, n in zip(rollouts.moves.tolist(), rollouts.n.tolist(), strict=True)]

    def show(self, rollouts: Rollouts) -> list[str]:
        """Each tree in brackets, (S (NP Kim) (VP sleeps))."""
        rows = zip(rollouts.problem.tolist(), self.keys(rollouts), strict=True)
        return [self._brackets(self.sentences[p], k[:-1]) for p, k in rows]

    def _brackets(self, sentence: tuple[int, ...], moves: tuple[int, ...]) -> str:
        stack: list[str] = []
        words = iter(sentence)
        for move in moves:
            label = self.labels[move % len(self.labels)]
            if move < len(self.labels):
                stack.append(f"({label} {self.words[next(words)]})")
            else:
                right = stack.pop()
                stack[-1] = f"({label} {stack[-1]} {right})"
        return " ".join(stack)
