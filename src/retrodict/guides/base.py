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
    by_test = False
    """Whether psi is asked for one text at a time, so that proposals test tokens (AWRS) instead of masking them."""

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

    def remarks(self, rollouts: Rollouts) -> tuple[str, ...]:
        """What a reader of a sampler's answer should know about the guide; samplers put it in their notes."""
        return ()


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

    def remarks(self, rollouts: Rollouts) -> tuple[str, ...]:
        """All of them."""
        return tuple(note for g in self.guides if isinstance(g, BaseGuide) for note in g.remarks(rollouts))


def product(*guides: Guide) -> Guide:
    """The product of guides. Those of one kind that can ``meet`` become one guide of that kind.

    A product of masks only asks each of them whether *it* can still be satisfied; one mask of the conjunction asks
    whether all can together.
    """
    parts: list[Guide] = []
    for g in (x for guide in guides for x in (guide.guides if isinstance(guide, ProductGuide) else [guide])):
        same = next((i for i, p in enumerate(parts) if type(p) is type(g) and hasattr(p, "meet")), None)
        if same is None:
            parts.append(g)
        else:
            parts[same] = parts[same].meet(g)  # pyright: ignore[reportAttributeAccessIssue]
    return parts[0] if len(parts) == 1 else ProductGuide(*parts)


def parts(guide: Guide, c: Any = None) -> list[tuple[Guide, Any]]:
    """The factors of a guide with their carries; a guide that is no product is its only factor."""
    if not isinstance(guide, ProductGuide):
        return [(guide, c)]
    carries = [None] * len(guide.guides) if c is None else c
    return [pair for g, x in zip(guide.guides, carries, strict=True) for pair in parts(g, x)]


def hard_part(guide: Guide | None) -> Guide | None:
    """The product of a guide's hard factors; None where it has none."""
    if guide is None or guide.hard:
        return guide
    hard = [g for g, _ in parts(guide) if g.hard]
    return None if not hard else hard[0] if len(hard) == 1 else ProductGuide(*hard)


def seen(guide: Guide, policy: Any, c: Any, carry: Any) -> Any:
    """A guide's carry after it has seen the pass of a policy whose model it shares.

    A guide that reads a model's own pass (a head on the prior's hidden states) has ``reads(policy) -> bool``, whether
    that policy is its model, and ``see(c, carry) -> Carry``, called with the policy's carry after every start, step
    and take. Samplers that step a guide beside a policy call this; other guides never notice.
    """
    if isinstance(guide, ProductGuide):
        return [seen(g, policy, x, carry) for g, x in zip(guide.guides, c, strict=True)]
    reads = hasattr(guide, "reads") and guide.reads(policy)  # pyright: ignore[reportAttributeAccessIssue]
    return guide.see(c, carry) if reads else c  # pyright: ignore[reportAttributeAccessIssue]


def _sum(parts: list[Tensor | None]) -> Tensor | None:
    known = [p for p in parts if p is not None]
    return None if not known else torch.stack(torch.broadcast_tensors(*known)).sum(0)
