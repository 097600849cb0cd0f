"""A policy that is one row of logits for each prefix of each problem: it can be any distribution, so an objective that
trains it to another one is wrong."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from retrodict.numerics import NEG_INF
from retrodict.policies.base import FiniteStepper, over_menu
from retrodict.protocols import Carry, Problems, State
from retrodict.records import Menu, Rollouts, Scores
from retrodict.rng import generator
from retrodict.spaces.enumerate import enumerate_objects


class TablePolicy(FiniteStepper):
    """q(move or stop | prefix) = softmax of a row of a table, over the menu. Trainable, float64."""

    def __init__(self, space: Any, problems: Problems, moves: int, seed: int = 0, scale: float = 0.0) -> None:
        self.space, self.problems, self.moves = space, problems, moves
        self.nodes: dict[tuple[int, ...], int] = {}
        for m in range(len(problems)):
            r = enumerate_objects(space, m)
            for z, n in zip(r.moves.tolist(), r.n.tolist(), strict=True):
                for i in range(n + 1):
                    self.nodes.setdefault((m, *z[:i]), len(self.nodes))
        size = (len(self.nodes), moves + space.n_stops)
        self.logits = scale * torch.randn(size, generator=generator(seed), dtype=torch.float64)
        self.logits.requires_grad_()
        self.updates = 0

    @property
    def version(self) -> str:
        """Moves with every update."""
        return f"table@{self.updates}"

    def parameters(self) -> Mapping[str, Tensor]:
        """The table."""
        return {"logits": self.logits}

    def settle(self) -> None:
        """Gradients are where they belong."""

    def refresh(self) -> None:
        """Nothing is copied; the version moves."""
        self.updates += 1

    def on(self, problems: Problems) -> TablePolicy:
        """The same table; the problems must be those it was made for."""
        if list(problems) != list(self.problems):
            raise ValueError("a table knows its own problems only")
        return self

    def start(self, problem: Int[Tensor, " b"]) -> Carry:
        """Each row's node."""
        return [(m,) for m in problem.tolist()]

    def start_at(self, rollouts: Rollouts, upto: Int[Tensor, " b"]) -> Carry:
        """Each row's node after ``upto`` moves."""
        rows = zip(rollouts.problem.tolist(), rollouts.moves.tolist(), upto.tolist(), strict=True)
        return [(m, *z[:k]) for m, z, k in rows]

    def step(self, c: Carry, s: State, move: Tensor) -> Carry:
        """The next node."""
        return [(*key, k) for key, k in zip(c, move.tolist(), strict=True)]

    def take(self, c: Carry, index: Tensor) -> Carry:
        """Rows ``index``."""
        return [c[i] for i in index.tolist()]

    def log_probs(
        self, c: Carry, s: State, menu: Menu, raw: bool = False
    ) -> tuple[Float[Tensor, "b v"], Float[Tensor, "b s"]]:
        """See ``protocols.Stepper``; a table has no other law than the menu's."""
        rows = self.logits[torch.tensor([self.nodes[key] for key in c], dtype=torch.long)]
        log_p = rows.log_softmax(-1)
        return over_menu(log_p[:, : self.moves], log_p[:, self.moves :], menu)

    def score(self, rollouts: Rollouts, raw: bool = False, grad: bool = False) -> Scores:
        """By stepping, with gradient where asked for."""
        with torch.set_grad_enabled(grad):
            return FiniteStepper.score.__wrapped__(self, rollouts, raw)  # pyright: ignore[reportFunctionMemberAccess]


def log_gammas(target: Any, problem: int) -> tuple[Rollouts, Float[Tensor, " n"]]:
    """Every path of a problem and its share of the posterior, in nats (P_B included)."""
    r = enumerate_objects(target.space, problem)
    with torch.no_grad():
        value = target.log_gamma(r).double() + r.log_pb.double().sum(1)
    return r, torch.where(value == NEG_INF, NEG_INF, value - value.logsumexp(0))
