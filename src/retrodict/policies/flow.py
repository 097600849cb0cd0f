"""Normalizing flows over real vectors: draw in one pass, and know the density (Papamakarios et al. 2021, JMLR 22).

    theta = T(u),   u = loc + L v,   v = f^-1(e; x),   e ~ N(0, I)
    log q(theta | x) = log N(f(v; x); 0, I) + log |det df/dv| - log |det L| - log |det dT/du|

f is one affine autoregressive layer (where the mass lies and how wide, given x) and then couplings of neural splines
(its shape; Durkan et al. 2019, arXiv:1906.04032), both from zuko. T carries R onto the support of each coordinate
exactly: a logistic curve onto an interval, an exponential onto a half-line. No draw leaves the support and none is
rejected, so there is no leaked mass to correct and no loop to wait for. Bias: that of the fit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from retrodict.errors import InputError, MissingExtra
from retrodict.numerics import NEG_INF
from retrodict.policies.layers import row_features
from retrodict.policies.vectors import VectorPolicy
from retrodict.protocols import Problems
from retrodict.spaces.vectors import Vectors

EDGE = 1e-7
"""Points nearer than this share of an interval's width to one of its ends count as lying at that distance."""


@dataclass(frozen=True)
class Support:
    """Where theta lies, coordinate by coordinate, and the bijection from v in R^d onto it.

    Attributes:
        low, high: ends of each coordinate, infinite where it has none.
        loc, scale: of u, so that v is near N(0, I): a lower triangular L with a positive diagonal.
    """

    low: Float[Tensor, " d"]
    high: Float[Tensor, " d"]
    loc: Float[Tensor, " d"]
    scale: Float[Tensor, "d d"]

    @classmethod
    def of(cls, dim: int, low: Any = -math.inf, high: Any = math.inf) -> Support:
        """From numbers or one number a coordinate, before anything was standardised.

        Raises InputError for another number of ends, or an interval without width.
        """
        ends = [torch.as_tensor(x, dtype=torch.float64) for x in (low, high)]
        if any(x.dim() > 1 or (x.dim() == 1 and len(x) != dim) for x in ends):
            raise InputError(f"bounds need one number, or {dim}, not {[tuple(x.shape) for x in ends]}")
        a, b = (x.expand(dim).clone() for x in ends)
        if not bool((a < b).all()):
            i = int((~(a < b)).nonzero()[0])
            raise InputError(f"the support of coordinate {i} must have its low end first, not [{a[i]:g}, {b[i]:g}]")
        return cls(a, b, torch.zeros_like(a), torch.eye(dim, dtype=torch.float64))

    @property
    def _ends(self) -> tuple[Tensor, Tensor]:
        return self.low > NEG_INF, self.high < math.inf

    def holds(self, theta: Float[Tensor, "b d"]) -> Tensor:
        """Which rows lie in it."""
        return ((theta >= self.low) & (theta <= self.high)).all(1)

    def straight(self, theta: Float[Tensor, "b d"]) -> tuple[Float[Tensor, "b d"], Float[Tensor, "b d"]]:
        """u of theta, and log |du/dtheta| of each coordinate."""
        theta = theta.double()
        below, above = self._ends
        width = torch.where(below & above, self.high - self.low, 1.0)
        least = torch.where(below & above, EDGE, 1e-30)
        a = torch.where(below, (theta - self.low) / width, 1.0).maximum(least)
        b = torch.where(above, (self.high - theta) / width, 1.0).maximum(least)
        u = torch.where(below | above, torch.where(below, a.log(), 0.0) - torch.where(above, b.log(), 0.0), theta)
        slope = torch.where(below & above, -a.log() - b.log() - width.log(), -a.log() - b.log())
        return u, torch.where(below | above, slope, 0.0)

    def code(self, theta: Float[Tensor, "b d"]) -> tuple[Float[Tensor, "b d"], Float[Tensor, " b"]]:
        """v of theta, and log |det dv/dtheta|."""
        u, slope = self.straight(theta)
        v = torch.linalg.solve_triangular(self.scale, (u - self.loc).T, upper=False).T
        return v, slope.sum(1) - self.scale.diagonal().log().sum()

    def place(self, v: Float[Tensor, "b d"]) -> Float[Tensor, "b d"]:
        """theta of v."""
        u = self.loc + v.double() @ self.scale.T
        below, above = self._ends
        low, high = torch.where(below, self.low, 0.0), torch.where(above, self.high, 0.0)
        inside = low + (high - low) * u.sigmoid()
        half = torch.where(below, low + u.clamp_max(700).exp(), high - (-u).clamp_max(700).exp())
        return torch.where(below & above, inside, torch.where(below | above, half, u))

    def moved(self, loc: Float[Tensor, " d"], cov: Float[Tensor, "d d"]) -> Support:
        """The same support, with v = 0 at u = ``loc`` and v ~ N(0, I) where u has this covariance."""
        sd = cov.double().diagonal().sqrt()
        sd = torch.where(sd > 1e-12, sd, 1.0)  # what does not vary keeps its unit
        correlation = cov.double() / sd[:, None] / sd
        near = correlation.tril(-1) + correlation.triu(1)
        whole = torch.eye(len(sd), dtype=torch.float64) + (1 - 1e-6) * near
        return Support(self.low, self.high, loc.double(), sd[:, None] * torch.linalg.cholesky(whole))

    def standardised(self, theta: Float[Tensor, "b d"]) -> Support:
        """The same support, with loc and scale from these rows."""
        u, _ = self.straight(theta)
        return self.moved(u.mean(0), torch.cov(u.T).view(len(self.loc), -1))


def flow_net(dim: int, context: int, hidden: int, layers: int, splines: int, bins: int, seed: int) -> Any:
    """One affine autoregressive layer, then ``splines`` spline couplings; a module of zuko. Leaves no random state."""
    try:
        from zuko.distributions import DiagNormal
        from zuko.flows import MaskedAutoregressiveTransform
        from zuko.lazy import Flow, UnconditionalDistribution
        from zuko.transforms import MonotonicRQSTransform
    except ImportError as error:
        raise MissingExtra("zuko", "flows") from error
    up: Any = torch.arange(dim)
    sizes: dict[str, Any] = {"hidden_features": [hidden] * layers, "activation": torch.nn.SiLU}
    spline = {"univariate": MonotonicRQSTransform, "shapes": [(bins,), (bins,), (bins - 1,)]}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts = [MaskedAutoregressiveTransform(dim, context, order=up, **sizes)]
        for i in range(splines):
            order = up if i % 2 else up.flip(0)
            parts.append(MaskedAutoregressiveTransform(dim, context, passes=2, order=order, **spline, **sizes))
        base = UnconditionalDistribution(DiagNormal, torch.zeros(dim), torch.ones(dim), buffer=True)
        return Flow(parts, base)


class FlowPolicy(VectorPolicy):
    """A conditional flow over ``Vectors(dim)``: one move, whose density is known. Trainable by every objective.

    A behaviour's temperature is the variance of e.

    Args:
        space: real vectors, of one step.
        problems: with ``row["features"]`` where q is to read the data; x is these numbers, in one row.
        support: where the vectors lie; all of R^d by default.
        net: a flow of zuko in v; :func:`flow_net` of the sizes below by default, whose weights come from ``seed``.
        hidden, layers: of each network inside.
        splines, bins: spline layers, and pieces of each spline.
    """

    def __init__(
        self, space: Vectors, problems: Problems, support: Support | None = None, net: Any = None, *,
        hidden: int = 64, layers: int = 2, splines: int = 2, bins: int = 8, seed: int = 0,
    ) -> None:  # fmt: skip
        if space.steps != 1:
            raise InputError(f"a flow draws points, and this space has paths of {space.steps} steps: use Vectors(dim)")
        self.space, self.problems = space, problems
        self.x = row_features(problems)
        self.support = support or Support.of(space.dim)
        context = 0 if self.x is None else self.x.shape[1]
        self.net = net or flow_net(space.dim, context, hidden, layers, splines, bins, seed)
        self.about: dict[str, Any] = {}

    def parameters(self) -> Mapping[str, Tensor]:
        """Of the networks inside the flow."""
        return dict(self.net.named_parameters())

    def on(self, problems: Problems) -> FlowPolicy:
        """The same flow on other problems. Raises InputError where these say more or less than the old ones."""
        new = FlowPolicy(self.space, problems, self.support, self.net)
        old, told = (0 if x is None else x.shape[1] for x in (self.x, new.x))
        if old != told:
            raise InputError(f"this flow reads {old} features of a problem, and these have {told}")
        new.updates = self.updates
        return new

    def _given(self, problem: Int[Tensor, " b"]) -> Any:
        """zuko's distribution of v, a row each."""
        return self.net(None if self.x is None else self.x[problem])

    def propose(
        self, problem: Int[Tensor, " b"], at: Float[Tensor, "b d"], i: int, gen: torch.Generator, temperature: float
    ) -> Float[Tensor, "b d"]:
        """One vector a row."""
        noise = torch.randn(len(problem), self.space.dim, generator=gen) * temperature**0.5
        return self.support.place(self._given(problem).transform.inv(noise))

    def log_move(
        self,
        problem: Int[Tensor, " b"],
        at: Float[Tensor, "b d"],
        i: Int[Tensor, " b"],
        move: Float[Tensor, "b d"],
        temperature: float = 1.0,
    ) -> Float[Tensor, " b"]:
        """log q(theta | x) of each row, nats; -inf outside the support."""
        v, slope = self.support.code(move)
        noise, stretch = self._given(problem).transform.call_and_ladj(v.float())
        normal = -(noise.square() / temperature + math.log(2 * math.pi * temperature)).sum(1) / 2
        return torch.where(self.support.holds(move), (normal + stretch).double() + slope, NEG_INF)
