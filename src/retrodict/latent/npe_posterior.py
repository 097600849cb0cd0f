"""q(theta | x) as users hold it: draw, value, weigh, check. ``latent.npe`` trains it.

Real vectors and discrete structures have one class: a policy over a space, tied to data by ``at(x)``. Where the joint
density p(theta, x) is known, draws are weighted by p / q, whose mean is p(x); where it is not, calibration over
simulations is what can be known (``diagnose``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from retrodict.diagnostics.bounds import Bound, log_evidence
from retrodict.errors import InputError
from retrodict.latent.npe_check import LEVELS, Calibration, Statistic, calibrate
from retrodict.latent.npe_objects import objects_of, rollouts_of, shape_of
from retrodict.latent.npe_simulate import Simulations
from retrodict.numerics import log_mean_exp
from retrodict.objectives.mle import object_log_q
from retrodict.particles import Particles
from retrodict.protocols import Problems
from retrodict.records import Problem, Rollouts
from retrodict.rng import generator
from retrodict.samplers.importance import importance
from retrodict.targets.algebra import Target
from retrodict.training.threads import one_thread

Joint = Callable[[Tensor, Tensor], Tensor]
"""(latents ``[b, ...]``, x ``[b, ...]``) to log p(theta, x) ``[b]``, nats."""


@dataclass(frozen=True)
class Scale:
    """How x is standardised for q: mean and sd of the simulations it was fitted to (sd 1 where nothing varies)."""

    shape: tuple[int, ...]
    mean: Float[Tensor, " c"]
    sd: Float[Tensor, " c"]

    @classmethod
    def of(cls, x: Float[Tensor, "n ..."]) -> Scale:
        """From simulations."""
        flat = x.flatten(1).double()
        sd = flat.std(0) if len(flat) > 1 else torch.ones_like(flat[0])
        return cls(tuple(x.shape[1:]), flat.mean(0), torch.where(sd > 1e-12, sd, 1.0))

    def problems(self, x: Float[Tensor, "m ..."]) -> Problems:
        """One problem for each x: q reads ``features`` (in x's own shape), a joint density reads ``x``."""
        code = ((x.flatten(1).double() - self.mean) / self.sd).float().view(x.shape)
        rows = [{"features": f, "x": v} for f, v in zip(code, x, strict=True)]
        return [Problem((), row=row, name=f"x{i}") for i, row in enumerate(rows)]


@dataclass(frozen=True)
class JointTerm:
    """log p(theta, x) as a factor, x being what the problem's row says."""

    space: Any
    problems: Problems
    joint: Joint
    name: str = "joint"
    noise: str = "none"
    prefixes: bool = False
    version: str = "1"

    def on(self, problems: Problems) -> JointTerm:
        """The same density at other data."""
        return replace(self, problems=problems)

    def __call__(self, rollouts: Rollouts, every_prefix: bool = False) -> Float[Tensor, " b"]:
        """Of whole objects."""
        x = torch.stack([p.row["x"] for p in self.problems])[rollouts.problem]
        value = self.joint(objects_of(self.space, rollouts), x)
        if value.shape != (len(rollouts),):
            raise InputError(f"a joint density gives one number a row, [{len(rollouts)}], not {list(value.shape)}")
        return value.double()


@dataclass(frozen=True)
class AmortizedPosterior:
    """q(theta | x) for every x: real vectors and discrete structures alike.

    Attributes:
        space: where theta lives.
        policy: what was trained; :meth:`at` ties it to data.
        scale: of x.
        about: settings, epochs, losses.
    """

    space: Any
    policy: Any
    scale: Scale
    about: Mapping[str, Any] = field(default_factory=dict)

    def at(self, x: Any) -> Any:
        """The policy at given data: one problem for each x."""
        return self.policy.on(self.scale.problems(self._batch(x)[0]))

    def _batch(self, x: Any) -> tuple[Tensor, bool]:
        """x as a batch, and whether it was one already. Raises InputError naming both shapes."""
        x, want = torch.as_tensor(x), self.scale.shape
        x = x if x.is_floating_point() else x.float()
        if tuple(x.shape) != want and tuple(x.shape[1:]) != want:
            raise InputError(f"x has shape {list(x.shape)}, and q was trained on x of shape {list(want)} (or [b, ...] "
                             "for b of them)")  # fmt: skip
        if not bool(x.isfinite().all()):
            raise InputError("x holds NaN or infinite numbers; q has seen none")
        many = tuple(x.shape) != want
        return (x if many else x[None]), many

    def sample(self, n: int, x: Any, seed: int = 0) -> Shaped[Tensor, "..."]:
        """n draws for one x, ``[n, ...]``, or for each of b, ``[b, n, ...]``. Never outside the prior's support."""
        if n < 1:
            raise InputError(f"n must be at least 1, not {n}")
        batch, many = self._batch(x)
        problem = torch.arange(len(batch)).repeat_interleave(n)
        with one_thread():
            rows = self.at(batch).sample(problem, generator(seed))
        drawn = objects_of(self.space, rows).view(len(batch), n, *shape_of(self.space))
        return drawn if many else drawn[0]

    def log_prob(self, theta: Any, x: Any, paths: int = 32, seed: int = 0) -> Float[Tensor, "..."]:
        """log q(theta | x), nats: theta ``[n, ...]`` for one x, ``[b, n, ...]`` for b of them.

        Exact for vectors and for spaces of one path an object. Where an object has many, q(object) is the mean of
        q(path) / P_B over ``paths`` drawn from P_B: unbiased, and its logarithm low by half that mean's variance.
        """
        batch, many = self._batch(x)
        theta = torch.as_tensor(theta) if many else torch.as_tensor(theta)[None]
        if tuple(theta.shape[2:]) != shape_of(self.space) or theta.dim() < 2 or len(theta) != len(batch):
            raise InputError(f"theta has shape {list(theta.shape[not many:])}; give [{'b, ' * many}n, "
                             f"{', '.join(map(str, shape_of(self.space)))}]")  # fmt: skip
        problem, gen = torch.arange(len(batch)).repeat_interleave(theta.shape[1]), generator(seed)
        flat, policy, found = theta.flatten(0, 1), self.at(batch), []
        with one_thread(), torch.no_grad():
            for _ in range(paths):
                rows = rollouts_of(self.space, flat, problem, gen)
                found.append(object_log_q(policy.score(rows), rows).double() - rows.log_pb.double().sum(1))
                if not bool(rows.log_pb.any()):
                    break
        value = log_mean_exp(torch.stack(found, 1)).view(theta.shape[:2])
        return value if many else value[0]

    def target(self, joint: Joint, x: Any) -> Target:
        """gamma = p(theta, x) at given data: what every sampler takes, with ``at(x)`` as its proposal."""
        problems = self.scale.problems(self._batch(x)[0])
        return Target(self.space, problems, {"joint": JointTerm(self.space, problems, joint)})

    def refine(self, joint: Joint, x: Any, *, n: int, seed: int = 0, runs: int = 4) -> Particles:
        """Draws weighted by p(theta, x) / q(theta | x), where that is known: q's bias goes, and ESS tells the cost."""
        with one_thread():
            return importance(self.target(joint, x), self.at(x), n=n, seed=seed, runs=runs)

    def log_z(self, joint: Joint, x: Any, *, n: int, seed: int = 0, runs: int = 4) -> list[Bound]:
        """log p(x) of each x, by importance sampling from q, with its standard error over ``runs``."""
        particles = self.refine(joint, x, n=n, seed=seed, runs=runs)
        assert particles.log_z is not None
        return [log_evidence(row) for row in particles.log_z]

    def diagnose(
        self,
        simulations: Simulations,
        *,
        draws: int = 99,
        statistics: Mapping[str, Statistic] | None = None,
        levels: Sequence[float] = LEVELS,
        seed: int = 0,
    ) -> Calibration:
        """Calibration over fresh simulations, see :func:`retrodict.latent.npe_check.calibrate`."""
        return calibrate(self, simulations, draws=draws, statistics=statistics, levels=levels, seed=seed)
