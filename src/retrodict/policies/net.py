"""A small network over the menus of any space that codes its partial objects as numbers.

    q(move | s, x), q(stop | s, x)  =  softmax over the menu of  MLP([features(s), x])

x is what a problem's row says (``row["features"]``): one policy then serves every problem, seen or new. Scoring runs
the network once on all prefixes of a batch. Small nets are fastest on one thread (``training.threads``).
"""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from retrodict.errors import InputError
from retrodict.numerics import NEG_INF
from retrodict.policies.base import over_menu
from retrodict.policies.layers import MLP, row_features
from retrodict.policies.stateless import StatelessPolicy
from retrodict.protocols import Problems, Space, State
from retrodict.records import FREE, Menu, Rollouts, Scores


@runtime_checkable
class Coded(Space, Protocol):
    """A space that lists ``n_moves`` moves and codes partial objects as ``n_features`` numbers."""

    @property
    def n_moves(self) -> int: ...
    @property
    def n_features(self) -> int: ...
    def features(self, s: State) -> Float[Tensor, "b f"]: ...


@runtime_checkable
class Net(Protocol):
    """From the code of states and of their problems, joined, to logits of all moves and stops. Float32."""

    parameters: dict[str, Tensor]

    def __call__(self, x: Float[Tensor, "b i"]) -> Float[Tensor, "b o"]: ...


class NetPolicy(StatelessPolicy):
    """A network over the menus of a coded space. Trainable by every objective of ``objectives.table``.

    Args:
        space: where the objects live.
        problems: with ``row["features"]`` where q is to read the data.
        net: from [features of a state, features of its problem] to ``n_moves + n_stops`` logits; an MLP of ``hidden``
            and ``layers`` by default, whose weights come from ``seed``.
    """

    def __init__(
        self, space: Coded, problems: Problems, net: Net | None = None, *,
        hidden: int = 64, layers: int = 2, seed: int = 0,
    ) -> None:  # fmt: skip
        self.space, self.problems = space, problems
        self.x = row_features(problems)
        width = space.n_features + (0 if self.x is None else self.x.shape[1])
        self.net = net or MLP(width, space.n_moves + space.n_stops, hidden, layers, seed)
        super().__init__()

    def on(self, problems: Problems) -> NetPolicy:
        """The same network on other problems. Raises InputError where these say more or less than the old ones."""
        space: Any = self.space
        new = NetPolicy(space.on(problems) if hasattr(space, "on") else space, problems, self.net)
        old, told = (0 if x is None else x.shape[1] for x in (self.x, new.x))
        if old != told:
            raise InputError(f"this policy reads {old} features of a problem, and these have {told}")
        new.updates = self.updates
        return new

    def log_probs(
        self, c: Int[Tensor, " b"], s: State, menu: Menu, raw: bool = False
    ) -> tuple[Float[Tensor, "b v"], Float[Tensor, "b s"]]:
        """See ``protocols.Stepper``; what the menu forbids has no mass to lose, so ``raw`` is the same."""
        code = self.space.features(s)
        logits = self.net(code if self.x is None else torch.cat([code, self.x[c]], 1))
        return over_menu(logits[:, : self.space.n_moves], logits[:, self.space.n_moves :], menu)

    # -- all at once --------------------------------------------------------------------------------------------------

    def score(self, rollouts: Rollouts, raw: bool = False, grad: bool = False) -> Scores:
        """log q of all moves and stops: one pass over all prefixes of the rows, differentiable where asked."""
        b, t = rollouts.moves.shape
        rows, upto, codes, menus = [], [], [], []
        s, at = self.space.start(rollouts.problem), torch.arange(b)
        for i in range(t + 1):
            codes.append(self.space.features(s))
            menus.append(self.space.menu(s))
            rows.append(at)
            upto.append(torch.full_like(at, i))
            on = (rollouts.n[at] > i).nonzero().squeeze(1)
            if not len(on):
                break
            at = at[on]
            s = self.space.step(self.space.take(s, on), rollouts.moves[at, i])
        row, i, code, menu = torch.cat(rows), torch.cat(upto), torch.cat(codes), _join(menus)
        with torch.set_grad_enabled(grad):
            logits = self.net(code if self.x is None else torch.cat([code, self.x[rollouts.problem[row]]], 1))
            moves, stops = over_menu(logits[:, : self.space.n_moves], logits[:, self.space.n_moves :], menu)
            taken = i < rollouts.n[row]
            r, k = row[taken], i[taken]
            here = moves[taken].gather(1, rollouts.moves[r, k][:, None]).squeeze(1)
            log_q = logits.new_zeros(b, t).index_put((r, k), torch.where(rollouts.kind[r, k] == FREE, here, 0.0))
            log_stop = logits.new_full((b, t + 1, stops.shape[1]), NEG_INF).index_put((row, i), stops)
        return Scores(log_q, log_stop)


def _join(menus: list[Menu]) -> Menu:
    """Menus of several batches of states as one."""
    legal = None if menus[0].legal is None else torch.cat([m.legal for m in menus if m.legal is not None])
    forced = None
    if any(m.forced is not None for m in menus):
        forced = torch.cat([torch.zeros_like(m.must) if m.forced is None else m.forced for m in menus])
    return Menu(legal, torch.cat([m.can_stop for m in menus]), torch.cat([m.must for m in menus]), forced)
