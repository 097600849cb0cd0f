"""Targets: an unnormalised log-density over complete objects, as a product of named, tempered factors.

    log gamma(z) = sum_f beta_f * log f(z)

Factors multiply with ``*``; ``** beta`` tempers. Values of factors are kept untempered, so that betas can change
without scoring again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from retrodict.errors import InputError
from retrodict.guides.base import parts, product
from retrodict.numerics import NEG_INF, at_end
from retrodict.policies.base import FiniteStepper
from retrodict.policies.vectors import VectorPolicy
from retrodict.protocols import Guide, Problems, Space, Term
from retrodict.records import Problem, Rollouts


@runtime_checkable
class Bindable(Protocol):
    """A factor not yet tied to a space: ``bind`` gives the term and, for constraints, the guide that proposes."""

    def bind(self, target: Target) -> tuple[Term, Guide | None]: ...


@dataclass(frozen=True)
class Tempered:
    """A factor raised to a power, before it is multiplied in."""

    factor: Bindable
    beta: float

    def __mul__(self, target: Target) -> Target:
        return target * self


class Factor:
    """Base of bindable factors: gives them ``** beta``."""

    def __pow__(self, beta: float) -> Tempered:
        return Tempered(self, beta)  # pyright: ignore[reportArgumentType]


@dataclass(frozen=True)
class Target:
    """A product of factors over one space and its problems.

    Attributes:
        space: where the objects live.
        problems: the questions; everything is "per problem", never over a mixed batch.
        factors: named terms.
        betas: exponents, by name.
        prior: the factor that is a process over the space, if any: samplers propose from it.
        guide: psi on partial objects that samplers may use; never part of the meaning.
        note: said by ``compare`` and reports (a floor, what Y follows, ...).
    """

    space: Space
    problems: Problems
    factors: Mapping[str, Term]
    betas: Mapping[str, float] = field(default_factory=dict)
    prior: FiniteStepper | VectorPolicy | None = None
    guide: Guide | None = None
    note: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", {name: self.betas.get(name, 1.0) for name in self.factors})

    @property
    def version(self) -> str:
        """Fingerprint of the factors."""
        return "+".join(f"{n}={t.version}^{self.betas[n]:g}" for n, t in self.factors.items())

    @property
    def formula(self) -> str:
        """What is sampled, as a person writes it."""
        return " * ".join(n if self.betas[n] == 1 else f"{n}^{self.betas[n]:.3g}" for n in self.factors)

    def __mul__(self, other: Target | Bindable | Tempered) -> Target:
        if isinstance(other, Target):
            if other.space is not self.space or list(other.problems) != list(self.problems):
                raise InputError("only targets over the same space and problems multiply; build both from one space")
            return self._with(other.factors, other.betas, other.guide, other.prior)
        factor, beta = (other.factor, other.beta) if isinstance(other, Tempered) else (other, 1.0)
        if not isinstance(factor, Bindable):
            raise InputError(
                f"cannot multiply a target by {type(other).__name__}; use a target, rd.verifier or a constraint"
            )
        term, guide = factor.bind(self)
        return self._with({term.name: term}, {term.name: beta}, guide, None)

    def _with(
        self,
        factors: Mapping[str, Term],
        betas: Mapping[str, float],
        guide: Guide | None,
        prior: FiniteStepper | VectorPolicy | None,
    ) -> Target:
        twice = set(factors) & set(self.factors)
        if twice:
            raise InputError(f"two factors are called {sorted(twice)[0]!r}; give one another name")
        guides = [g for g in (self.guide, guide) if g is not None]
        both = product(*guides) if guides else None
        return replace(self, factors={**self.factors, **factors}, betas={**self.betas, **betas}, guide=both,
                       prior=self.prior or prior)  # fmt: skip

    def __pow__(self, beta: float) -> Target:
        return replace(self, betas={n: b * beta for n, b in self.betas.items()})

    def with_betas(self, **betas: float) -> Target:
        """The same factors at other exponents."""
        unknown = set(betas) - set(self.factors)
        if unknown:
            raise InputError(f"no factor {sorted(unknown)[0]!r}; this target has {', '.join(self.factors)}")
        return replace(self, betas={**self.betas, **betas})

    def with_guide(self, guide: Guide | None) -> Target:
        """The same target, proposed for with another guide. Raises InputError for one that reads other tokens."""
        lm = getattr(self.prior, "lm", None)
        for part, _ in parts(guide) if guide is not None else ():
            told = getattr(part, "token_bytes", None)
            if lm is not None and told is not None and tuple(told) != tuple(lm.token_bytes):
                raise InputError(f"the guide reads other tokens than those of {lm.name}; build it from that model")
        return replace(self, guide=guide)

    def on(self, problems: Sequence[Problem]) -> Target:
        """The same factors on other problems (terms, and spaces, made from a problem's ids are rebuilt)."""

        def move(x: Any) -> Any:
            return x.on(problems) if hasattr(x, "on") else x

        return replace(self, space=move(self.space), problems=problems, prior=move(self.prior), guide=move(self.guide),
                       factors={n: move(t) for n, t in self.factors.items()})  # fmt: skip

    def terms(self, rollouts: Rollouts, every_prefix: bool = False) -> Rollouts:
        """The rollouts with the untempered value of every factor they do not carry yet (at its present version)."""
        new: dict[str, Tensor] = {}
        for name, term in self.factors.items():
            have = rollouts.terms.get(name)
            fresh = rollouts.versions.get(name, term.version) == term.version
            if have is not None and fresh and (have.dim() > 1 or not every_prefix):
                continue
            new[name] = term(rollouts, every_prefix)
        return rollouts.with_terms(new, {n: t.version for n, t in self.factors.items()})

    def log_gamma(self, rollouts: Rollouts, every_prefix: bool = False) -> Float[Tensor, "..."]:
        """log gamma of complete objects ``[b]``, or of ending after every prefix ``[b, t+1, s]``."""
        rollouts = self.terms(rollouts, every_prefix)
        total: Tensor | None = None
        for name in self.factors:
            value = rollouts.terms[name]
            if not every_prefix and value.dim() > 1:
                value = at_end(value, rollouts.n, rollouts.stop)
            part = temper(value.double(), self.betas[name])
            total = part if total is None else total + part
        assert total is not None
        return total


def temper(value: Tensor, beta: float) -> Tensor:
    """beta * value, with exact zeros of the factor kept at -inf (0 * -inf counts as no constraint: 0)."""
    if beta == 1.0:
        return value
    return torch.where(value == NEG_INF, NEG_INF if beta != 0 else 0.0, beta * value)
