"""What guides share: the neutral guide, products, and the value of a recorded object under a hard guide."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from retrodict.protocols import Guide, Problems, State
from retrodict.records import Rollouts


class BaseGuide:
    """psi = 1: the defaults that guides override."""

    hard = False

    def start(self, problem: Int[Tensor, " b"]) -> Any:
        """Carry of b empty objects."""
        return problem

    def start_at(self, rollouts: Rollouts, upto: Int[Tensor, " b"]) -> Any:
        """Carry after the first ``upto`` moves of recorded rows."""
        raise NotImplementedError  # abstract

    def step(self, c: Any, s: State, move: Tensor) -> Any:
        """Carry after a move."""
        return c

    def take(self, c: Any, index: Tensor) -> Any:
        """Rows ``index``."""
        return c[index]

    def log_psi(self, c: Any, s: State) -> Float[Tensor, " b"]:
        """log psi of each partial object."""
        return torch.zeros(len(s.n), device=s.n.device)

    def end_terms(self, c: Any) -> dict[str, Float[Tensor, "b s"]]:
        """Terms of stopping now that the guide computed anyway, by name, per stop."""
        return {}

    def log_next(self, c: Any, s: State) -> Float[Tensor, "b v"] | None:
        """log psi of each next state, where it can be listed."""
        return None

    def log_end(self, c: Any, s: State) -> Float[Tensor, "b s"] | None:
        """log-value of stopping now, where known."""
        return None


class ProductGuide(BaseGuide):
    """The product of guides."""

    def __init__(self, *guides: Guide) -> None:
        self.guides = guides
        self.hard = all(g.hard for g in guides)

    def on(self, problems: Problems) -> ProductGuide:
        """Each guide on other problems."""
        return ProductGuide(*(g.on(problems) if hasattr(g, "on") else g for g in self.guides))  # pyright: ignore[reportAttributeAccessIssue]

    def start(self, problem: Int[Tensor, " b"]) -> list[Any]:
        """Start each."""
        return [g.start(problem) for g in self.guides]

    def start_at(self, rollouts: Rollouts, upto: Int[Tensor, " b"]) -> list[Any]:
        """Replay each."""
        return [g.start_at(rollouts, upto) for g in self.guides]

    def step(self, c: list[Any], s: State, move: Tensor) -> list[Any]:
        """Step each."""
        return [g.step(x, s, move) for g, x in zip(self.guides, c, strict=True)]

    def take(self, c: list[Any], index: Tensor) -> list[Any]:
        """Rows of each."""
        return [g.take(x, index) for g, x in zip(self.guides, c, strict=True)]

    def end_terms(self, c: list[Any]) -> dict[str, Float[Tensor, "b s"]]:
        """All of them."""
        return {k: v for g, x in zip(self.guides, c, strict=True) for k, v in g.end_terms(x).items()}

    def log_psi(self, c: list[Any], s: State) -> Float[Tensor, " b"]:
        """Sum."""
        return torch.stack([g.log_psi(x, s) for g, x in zip(self.guides, c, strict=True)]).sum(0)

    def log_next(self, c: list[Any], s: State) -> Float[Tensor, "b v"] | None:
        """Sum over the guides that list; None where none does."""
        return _sum([g.log_next(x, s) for g, x in zip(self.guides, c, strict=True)])

    def log_end(self, c: list[Any], s: State) -> Float[Tensor, "b s"] | None:
        """Sum over the guides that know."""
        return _sum([g.log_end(x, s) for g, x in zip(self.guides, c, strict=True)])


def _sum(parts: list[Tensor | None]) -> Tensor | None:
    known = [p for p in parts if p is not None]
    return None if not known else torch.stack(torch.broadcast_tensors(*known)).sum(0)
