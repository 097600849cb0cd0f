"""Small vectors of categorical variables, all of them at once: exact laws, and the mean-field baseline.

For data x_1..x_m with latents in ``Assignments(sizes)`` that have k = prod sizes values, log gamma is a table [m, k].

    exact        p(z | x_m)  =  softmax of row m
    a policy     q(z | x_m)  =  prod_i q(z_i | z_<i, x_m),  scored on every z: its law without Monte Carlo
    mean field   q_m(z) = prod_i q_mi(z_i),  q_mi(z_i) proportional to exp E_{q_m, -i} [log gamma(z, x_m)]

Mean field is coordinate ascent on E_q[log gamma - log q] (Jordan et al. 1999): no sweep lowers this bound. It ends at
a local optimum, below log p(x) wherever the posterior's variables depend on each other.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from retrodict.errors import InputError
from retrodict.numerics import at_end
from retrodict.objectives.residual import path_log_q
from retrodict.particles import Particles
from retrodict.protocols import Policy
from retrodict.records import Rollouts, Trace
from retrodict.samplers.common import BATCH, finish
from retrodict.spaces.enumerate import enumerate_objects
from retrodict.spaces.vectors import Assignments
from retrodict.targets.algebra import Target


def every_assignment(target: Target) -> Rollouts:
    """Every z of every problem, problem-major: row p*k + i is the i-th z (the last variable moves fastest)."""
    if not isinstance(target.space, Assignments):
        raise InputError(f"this lists Assignments, not {type(target.space).__name__}; use rd.exact")
    m, one = len(target.problems), enumerate_objects(target.space, 0)
    rows = one.take(torch.arange(len(one)).repeat(m))
    return replace(rows, problem=torch.arange(m).repeat_interleave(len(one)))


def log_gamma_table(target: Target) -> Float[Tensor, "m k"]:
    """log gamma of every z of every problem."""
    return target.log_gamma(every_assignment(target)).double().view(len(target.problems), -1)


@torch.no_grad()
def log_law(target: Target, policy: Policy) -> Float[Tensor, "m k"]:
    """log q(z | x_m) of every z, exactly; the order is that of :func:`log_gamma_table`."""
    rows, found = every_assignment(target), []
    for part in torch.arange(len(rows)).split(32 * BATCH):
        some = rows.take(part)
        scores = policy.score(some)
        whole = path_log_q(scores, some)[:, :, None] + scores.log_stop
        found.append(at_end(whole, some.n, some.stop).double())
    return torch.cat(found).view(len(target.problems), -1)


def distances(target: Target, policy: Policy) -> Float[Tensor, " m"]:
    """Total variation between a policy and the exact posterior of each problem."""
    p, q = log_gamma_table(target).softmax(1), log_law(target, policy).exp()
    return (p - q).abs().sum(1) / 2


def mean_field(
    target: Target, policy: Any = None, *, n: int = 0, seed: int = 0, sweeps: int = 30, on_step: Any = None
) -> Particles:
    """The factorised approximation of each posterior, as a weighted list of all z; weights sum to one.

    A sampler's signature, so that it may be an E-step: what is sampled is not the posterior. ``log_z`` is None: the
    bound that it reaches is :func:`mean_field_bound`. Factors begin uniform; ``policy``, ``n`` and ``seed`` change
    nothing.
    """
    began, m = time.perf_counter(), len(target.problems)
    log_q = factorised(target, sweeps)
    rows = target.terms(every_assignment(target))
    trace = Trace("mean field", {"sweeps": sweeps})
    return finish(target, rows, log_q.view(m, -1), None, trace, began)


def factorised(target: Target, sweeps: int = 30) -> Float[Tensor, "m k"]:
    """log of the product of factors after so many sweeps of coordinate ascent, for every z of every problem."""
    sizes = target.space.sizes  # pyright: ignore[reportAttributeAccessIssue]
    table = log_gamma_table(target).view(-1, *sizes)
    if not bool(table.isfinite().all()):
        raise InputError("mean field needs a positive joint density: log gamma is -inf for some z")
    axes = range(1, len(sizes) + 1)
    q = [torch.full((len(table), s), 1.0 / s, dtype=torch.float64) for s in sizes]
    for _ in range(sweeps):
        for i in axes:
            expected = table
            for j in axes:
                if j != i:
                    expected = (expected * _along(q[j - 1], j, len(sizes))).sum(j, keepdim=True)
            q[i - 1] = expected.flatten(1).softmax(1)
    log_q = torch.zeros_like(table)
    for j in axes:
        log_q = log_q + _along(q[j - 1].clamp_min(1e-300).log(), j, len(sizes))
    return log_q.flatten(1)


def mean_field_bound(target: Target, sweeps: int = 30) -> Float[Tensor, " m"]:
    """E_q[log gamma - log q] <= log p(x_m)."""
    log_q, log_gamma = factorised(target, sweeps), log_gamma_table(target)
    return (log_q.exp() * (log_gamma - log_q)).sum(1)


def _along(x: Float[Tensor, "m s"], axis: int, axes: int) -> Tensor:
    """``x`` laid along one of so many axes behind the first."""
    shape = [1] * (axes + 1)
    shape[0], shape[axis] = x.shape
    return x.view(shape)
