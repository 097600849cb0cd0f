"""Sequences of phrases from a finite list: programs of a few statements, or one logical form.

A phrase is a sequence of tokens. The list is kept as a prefix tree, so that a menu is one look-up. No phrase begins
with another, hence every object has one path and log P_B = 0. An object may stop after each phrase; a move is legal
only where the phrase that it begins or goes on with can still end within ``longest`` tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from retrodict.errors import InputError
from retrodict.records import CHOOSE, MUST_STOP, Menu, Rollouts
from retrodict.spaces.enumerate import enumerate_objects

NEVER = 10_000
"""Tokens that an illegal move would need."""


@dataclass(frozen=True)
class PrefixTree:
    """The prefix tree of a list of phrases; node 0 is the root.

    Attributes:
        child: the node that each token leads to, -1 where no phrase goes on so.
        ends: the phrase that is whole at a node, -1 where none is.
        need: tokens from a node to the nearest end of a phrase by way of each token; NEVER where there is none.
        path: the tokens that lead to a node, padded with -1.
    """

    child: Int[Tensor, "nodes v"]
    ends: Int[Tensor, " nodes"]
    need: Int[Tensor, "nodes v"]
    path: Int[Tensor, "nodes depth"]


def prefix_tree(phrases: Sequence[Sequence[int]], v: int) -> PrefixTree:
    """The tree of phrases over v tokens. Raises InputError for an empty phrase, or one that begins with another."""
    child, ends = [[-1] * v], [-1]
    paths: list[tuple[int, ...]] = [()]
    for i, phrase in enumerate(phrases):
        node = 0
        for token in phrase:
            if child[node][token] < 0:
                child[node][token] = len(child)
                child.append([-1] * v)
                ends.append(-1)
                paths.append((*paths[node], token))
            node = child[node][token]
            if ends[node] >= 0:
                break
        if node == 0 or ends[node] >= 0 or max(child[node]) >= 0:
            raise InputError(f"phrase {i}, {tuple(phrase)}, is empty, or begins with or begins another; change it")
        ends[node] = i
    near = [NEVER] * len(child)
    for node in range(len(child) - 1, -1, -1):  # children come after their parents
        near[node] = 0 if ends[node] >= 0 else 1 + min(near[c] for c in child[node] if c >= 0)
    need = [[NEVER if c < 0 else 1 + near[c] for c in row] for row in child]
    depth = max(map(len, paths))
    path = [(*p, *[-1] * (depth - len(p))) for p in paths]
    return PrefixTree(*(torch.tensor(x) for x in (child, ends, need, path)))


@dataclass(frozen=True)
class PhraseState:
    """b sequences under construction.

    Attributes:
        problem: index of each row's problem.
        node: where in the prefix tree the phrase at hand is; 0 between phrases.
        done: the phrases that are whole, padded with -1.
        count: how many these are.
        n: tokens so far.
    """

    problem: Int[Tensor, " b"]
    node: Int[Tensor, " b"]
    done: Int[Tensor, "b most"]
    count: Int[Tensor, " b"]
    n: Int[Tensor, " b"]


@dataclass(frozen=True)
class Phrases:
    """Sequences of 1 to ``most`` phrases of at most ``longest`` tokens in all. A move is a token.

    Attributes:
        words: the tokens, as people write them.
        phrases: the list, each a sequence of tokens.
        most: phrases in an object.
        longest: tokens in an object; as many as ``most`` of the longest phrase by default.
    """

    words: tuple[str, ...]
    phrases: tuple[tuple[int, ...], ...]
    most: int = 1
    longest: int = 0
    n_stops: int = 1

    def __post_init__(self) -> None:
        sizes = [len(p) for p in self.phrases]
        if not sizes or self.most < 1:
            raise InputError("give at least one phrase, and objects of at least one")
        object.__setattr__(self, "longest", self.longest or self.most * max(sizes))
        if min(sizes) > self.longest:
            raise InputError(f"the shortest phrase has {min(sizes)} tokens, over the {self.longest} of an object; "
                             "raise longest")  # fmt: skip

    @cached_property
    def tree(self) -> PrefixTree:
        """The phrases as a prefix tree."""
        return prefix_tree(self.phrases, len(self.words))

    @property
    def max_moves(self) -> int:
        """Most tokens."""
        return self.longest

    @property
    def n_moves(self) -> int:
        """Tokens there are."""
        return len(self.words)

    @property
    def n_features(self) -> int:
        """One-hots of the tokens of the phrase at hand, of how many are whole, and the share of tokens used."""
        return self.tree.path.shape[1] * self.n_moves + self.most + 1

    def features(self, s: PhraseState) -> Float[Tensor, "b f"]:
        """See ``n_features``."""
        path = self.tree.path[s.node]
        tokens = torch.zeros(*path.shape, self.n_moves + 1).scatter_(2, path[:, :, None] % (self.n_moves + 1), 1.0)
        count = torch.zeros(len(path), self.most + 1).scatter_(1, s.count[:, None], 1.0)
        return torch.cat([tokens[:, :, :-1].flatten(1), count[:, 1:], (s.n / self.longest)[:, None]], 1)

    def start(self, problem: Int[Tensor, " b"]) -> PhraseState:
        """b empty sequences."""
        node, count, n = torch.zeros(3, len(problem), dtype=torch.long)
        return PhraseState(problem, node, torch.full((len(problem), self.most), -1), count, n)

    def menu(self, s: PhraseState) -> Menu:
        """The tokens that lead on; the stop between phrases."""
        fits = self.tree.need[s.node] <= (self.longest - s.n)[:, None]
        legal = fits & ((s.node > 0) | (s.count < self.most))[:, None]
        return Menu(legal, (s.node == 0) & (s.count > 0), torch.where(legal.any(1), CHOOSE, MUST_STOP))

    def step(self, s: PhraseState, move: Int[Tensor, " b"]) -> PhraseState:
        """Add one token a row."""
        node = self.tree.child[s.node, move]
        phrase = self.tree.ends[node]
        whole = phrase >= 0
        at = s.count.clamp_max(self.most - 1)[:, None]
        done = torch.where(whole[:, None], s.done.scatter(1, at, phrase[:, None]), s.done)
        return PhraseState(s.problem, torch.where(whole, 0, node), done, s.count + whole, s.n + 1)

    def take(self, s: PhraseState, index: Tensor) -> PhraseState:
        """Rows ``index``."""
        return PhraseState(s.problem[index], s.node[index], s.done[index], s.count[index], s.n[index])

    def replay(self, rollouts: Rollouts, upto: Int[Tensor, " b"]) -> PhraseState:
        """The sequences after the first ``upto`` tokens."""
        s = self.start(rollouts.problem)
        for i in range(int(upto.max()) if len(upto) else 0):
            on = (upto > i).nonzero().squeeze(1)
            new = self.step(self.take(s, on), rollouts.moves[on, i])
            for name in ("node", "done", "count", "n"):
                getattr(s, name)[on] = getattr(new, name)
        return s

    def log_pb(self, s: PhraseState) -> Float[Tensor, " b"]:
        """One path an object: 0."""
        return torch.zeros(len(s.n), dtype=torch.float64)

    def phrases_of(self, rollouts: Rollouts) -> Int[Tensor, "b most"]:
        """The phrases of finished objects, padded with -1."""
        return self.replay(rollouts, rollouts.n).done

    def keys(self, rollouts: Rollouts) -> list[tuple[int, ...]]:
        """The tokens, then the stop."""
        return [(*z[:n], -1) for z, n in zip(rollouts.moves.tolist(), rollouts.n.tolist(), strict=True)]

    def show(self, rollouts: Rollouts) -> list[str]:
        """The words, with a semicolon between phrases."""
        each = self.phrases_of(rollouts).tolist()
        return ["; ".join(self.text(i) for i in row if i >= 0) for row in each]

    def text(self, phrase: int) -> str:
        """A phrase as people write it."""
        return " ".join(self.words[token] for token in self.phrases[phrase])

    def enumerate(self) -> Rollouts:
        """Every object once. Raises InputError where there are over two million."""
        return enumerate_objects(self, 0)
