"""Sequences of fixed length whose tokens are revealed in any order, from all masked (absorbing-state diffusion).

A move says a position and the token revealed there, as one number: position * vocab + token. All orders are open, so
length! paths lead to each sequence; as an object has them, all are alike: log P_B = -log (revealed tokens).
A process over these paths, such as a masked language model, carries its own measure of them and takes no P_B.

Tokens revealed several a step, independent given what was there before the step (parallel decoding), are the same moves
seen by a model that reads only whole steps: ``MaskedState.seen`` is the sequence as it was when the step began.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from retrodict.errors import InputError
from retrodict.protocols import Problems
from retrodict.records import CHOOSE, MUST_STOP, Menu, Rollouts, whole_rollouts

MOST_LISTED = 2_000_000
"""Sequences up to which all are listed."""
HIDDEN = "_"
"""How people see a mask."""


@dataclass(frozen=True)
class MaskedState:
    """b sequences, partly revealed. The mask is the number ``vocab``.

    Attributes:
        problem: index of each row's problem.
        tokens: the sequences.
        seen: as they were at the end of the last whole step: what a model may read.
    """

    problem: Int[Tensor, " b"]
    tokens: Int[Tensor, "b l"]
    seen: Int[Tensor, "b l"]


@dataclass(frozen=True)
class Masked:
    """Sequences of ``length`` tokens out of ``vocab``.

    Attributes:
        length: tokens of a sequence.
        vocab: different tokens.
        per_step: tokens revealed between two looks at the sequence.
        given: for each problem the tokens that are observed, -1 where there is none; a move there has no choice.
        names: of the tokens, for people; their numbers by default.
        join: what people see between tokens.
    """

    length: int
    vocab: int
    per_step: int = 1
    given: tuple[tuple[int, ...], ...] = ()
    names: tuple[str, ...] = ()
    join: str = " "
    n_stops: int = 1

    def __post_init__(self) -> None:
        if self.length < 1 or self.vocab < 1:
            raise InputError(
                f"masked sequences need length and vocab of at least 1, not {self.length} and {self.vocab}"
            )
        if not 1 <= self.per_step <= self.length:
            raise InputError(f"per_step is from 1 to the length {self.length}, not {self.per_step}")
        if self.names and len(set(self.names)) != self.vocab:
            raise InputError(f"names must be {self.vocab} different words, one a token, not {len(set(self.names))}")
        for row in self.given:
            if len(row) != self.length or not all(-1 <= x < self.vocab for x in row):
                raise InputError(f"given must name {self.length} tokens below {self.vocab}, or -1 for none, not {row}")

    @property
    def mask(self) -> int:
        """The number of the mask."""
        return self.vocab

    @property
    def max_moves(self) -> int:
        """One for each token."""
        return self.length

    @property
    def n_moves(self) -> int:
        """Pairs of a position and a token."""
        return self.length * self.vocab

    @property
    def n_features(self) -> int:
        """One-hots of the tokens, the mask among them."""
        return self.length * (self.vocab + 1)

    def features(self, s: MaskedState) -> Float[Tensor, "b f"]:
        """What may be read, token by token."""
        return F.one_hot(s.seen, self.vocab + 1).flatten(1).float()

    @cached_property
    def observed(self) -> Int[Tensor, "m l"]:
        """``given`` as a tensor; the mask where nothing is observed."""
        rows = torch.tensor(self.given, dtype=torch.long).view(-1, self.length)
        return torch.where(rows < 0, self.mask, rows)

    def observed_of(self, problem: Int[Tensor, " b"]) -> Int[Tensor, "b l"]:
        """The observed tokens of each row's problem, the mask elsewhere. Raises InputError for a problem without."""
        if not self.given:
            return torch.full((len(problem), self.length), self.mask)
        if len(problem) and int(problem.max()) >= len(self.given):
            raise InputError(
                f"given has {len(self.given)} rows, one a problem, and problem {int(problem.max())} has none"
            )
        return self.observed[problem]

    def on(self, problems: Problems) -> Masked:
        """The same space for other problems. Raises InputError where ``given`` is of other problems."""
        if self.given and len(problems) != len(self.given):
            raise InputError(
                f"given has {len(self.given)} rows; make a space with one for each of {len(problems)} problems"
            )
        return self

    def start(self, problem: Int[Tensor, " b"]) -> MaskedState:
        """b sequences of masks."""
        hidden = torch.full((len(problem), self.length), self.mask)
        return MaskedState(problem, hidden, hidden)

    def menu(self, s: MaskedState) -> Menu:
        """Any token at any masked position (the observed one where there is one); the stop once all is revealed."""
        hidden, given = s.tokens == self.mask, self.observed_of(s.problem)[:, :, None]
        fits = (given == self.mask) | (given == torch.arange(self.vocab))
        whole = ~hidden.any(1)
        return Menu((hidden[:, :, None] & fits).flatten(1), whole, torch.where(whole, MUST_STOP, CHOOSE))

    def step(self, s: MaskedState, move: Int[Tensor, " b"]) -> MaskedState:
        """Reveal one token a row."""
        tokens = s.tokens.scatter(1, (move // self.vocab)[:, None], (move % self.vocab)[:, None])
        n = self.revealed(tokens)
        whole = (n % self.per_step == 0) | (n == self.length)
        return MaskedState(s.problem, tokens, torch.where(whole[:, None], tokens, s.seen))

    def revealed(self, tokens: Int[Tensor, "b l"]) -> Int[Tensor, " b"]:
        """How many tokens are."""
        return (tokens != self.mask).sum(1)

    def take(self, s: MaskedState, index: Tensor) -> MaskedState:
        """Rows ``index``."""
        return MaskedState(s.problem[index], s.tokens[index], s.seen[index])

    def replay(self, rollouts: Rollouts, upto: Int[Tensor, " b"]) -> MaskedState:
        """The sequences after the first ``upto`` moves."""
        return self.after(rollouts.problem, rollouts.moves, upto)

    def after(self, problem: Int[Tensor, " b"], moves: Int[Tensor, "b t"], upto: Int[Tensor, " b"]) -> MaskedState:
        """The same, from moves."""
        whole = torch.where(upto == self.length, upto, upto - upto % self.per_step)
        return MaskedState(problem, self._put(moves, upto), self._put(moves, whole))

    def _put(self, moves: Int[Tensor, "b t"], upto: Int[Tensor, " b"]) -> Int[Tensor, "b l"]:
        tokens = torch.full((len(moves), self.length), self.mask)
        row, at = (torch.arange(moves.shape[1]) < upto[:, None]).nonzero().unbind(1)
        move = moves[row, at]
        tokens[row, move // self.vocab] = move % self.vocab
        return tokens

    def log_pb(self, s: MaskedState) -> Float[Tensor, " b"]:
        """Any revealed token may have been the last: -log n."""
        return -self.revealed(s.tokens).clamp_min(1).double().log()

    def tokens(self, rollouts: Rollouts) -> Int[Tensor, "b l"]:
        """The finished sequences."""
        return self.replay(rollouts, rollouts.n).tokens

    def keys(self, rollouts: Rollouts) -> list[tuple[int, ...]]:
        """The tokens."""
        return [(*row, -1) for row in self.tokens(rollouts).tolist()]

    def show(self, rollouts: Rollouts) -> list[str]:
        """As a person reads them."""
        return [self.text(row) for row in self.tokens(rollouts).tolist()]

    def text(self, tokens: list[int]) -> str:
        """One sequence as a person reads it."""
        names = (*(self.names or map(str, range(self.vocab))), HIDDEN)
        return self.join.join(names[x] for x in tokens)

    def encode(self, texts: list[list[str]]) -> Int[Tensor, "b l"]:
        """Sequences of names as numbers. Raises InputError for a name or a length that this space does not have."""
        known = {name: i for i, name in enumerate((*(self.names or map(str, range(self.vocab))), HIDDEN))}
        for words in texts:
            if len(words) != self.length:
                raise InputError(f"{self.join.join(words)!r} has {len(words)} tokens and not {self.length}")
            for i, word in enumerate(words):
                if word not in known:
                    raise InputError(f"token {i + 1} of {self.join.join(words)!r}, {word!r}, is none of this space's")
        return torch.tensor([[known[word] for word in words] for words in texts]).view(-1, self.length)

    def enumerate(self) -> Int[Tensor, "n l"]:
        """Every sequence once, as a number whose first digit is the first token. Raises InputError for too many."""
        if self.vocab**self.length > MOST_LISTED:
            raise InputError(f"{self.vocab}^{self.length} sequences are too many to list (at most {MOST_LISTED:,}): "
                             "use a sampler")  # fmt: skip
        number = torch.arange(self.vocab**self.length)
        return number[:, None] // self.vocab ** torch.arange(self.length - 1, -1, -1) % self.vocab

    def number(self, tokens: Int[Tensor, "b l"]) -> Int[Tensor, " b"]:
        """Where each sequence stands in :meth:`enumerate`."""
        return (tokens * self.vocab ** torch.arange(self.length - 1, -1, -1)).sum(1)

    def left_to_right(self, tokens: Int[Tensor, "b l"], problem: int = 0) -> Rollouts:
        """Finished sequences as rows whose path goes from the left to the right, with log q = 0."""
        b, t = tokens.shape
        moves, log_pb = torch.arange(t) * self.vocab + tokens, -torch.arange(1, t + 1).log().repeat(b, 1)
        return whole_rollouts(torch.full((b,), problem), moves, log_q=torch.zeros(b, t), log_pb=log_pb)
