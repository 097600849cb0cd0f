"""Exact inference by enumeration: gamma(x) for every object of a small space. The oracle of every other sampler."""

from __future__ import annotations

import math
import time

import torch

from retrodict.numerics import NEG_INF
from retrodict.particles import Particles
from retrodict.policies.base import FiniteStepper
from retrodict.records import Rollouts, Trace, cat_rollouts
from retrodict.samplers.common import BATCH, finish, meter
from retrodict.spaces.enumerate import MAX_OBJECTS, enumerate_objects
from retrodict.targets.algebra import Target


def enumerated(target: Target, problem: int, max_objects: int = MAX_OBJECTS) -> tuple[Rollouts, torch.Tensor]:
    """Every object of a problem once, with its log gamma ``[objects]`` (float64).

    A prior over paths gives an object the sum over those that lead to it; the record keeps the first.
    """
    rows = enumerate_objects(target.space, problem, max_objects)
    keys = target.space.keys(rows)
    first = list({k: i for i, k in reversed(list(enumerate(keys)))}.values())[::-1]
    if target.prior is None or len(first) == len(rows):
        rows = _valued(target, rows.take(torch.tensor(first)))
        return rows, target.log_gamma(rows)
    rows, number = _valued(target, rows), {keys[i]: n for n, i in enumerate(first)}
    of, value = torch.tensor([number[k] for k in keys]), target.log_gamma(rows)
    top = value.max().clamp_min(torch.finfo(value.dtype).min)
    mass = torch.zeros(len(first), dtype=value.dtype).index_add(0, of, (value - top).exp())
    return rows.take(torch.tensor(first)), mass.log() + top


def _valued(target: Target, rows: Rollouts) -> Rollouts:
    """Rows with their terms, some at a time."""
    return cat_rollouts([target.terms(rows.take(at)) for at in torch.arange(len(rows)).split(8 * BATCH)])


def exact(
    target: Target,
    policy: FiniteStepper | None = None,
    *,
    n: int = 0,
    seed: int = 0,
    max_objects: int = MAX_OBJECTS,
) -> Particles:
    """Enumerate each problem's space: weights are the exact posterior, log_z the exact evidence.

    ``policy``, ``n`` and ``seed`` are accepted (every sampler has them) and change nothing.

    Raises:
        InputError: the space has more than ``max_objects`` objects; the message says how large it is.
    """
    began, tokens = time.perf_counter(), meter(target)
    found = [enumerated(target, p, max_objects) for p in range(len(target.problems))]
    k = max(len(r) for r, _ in found)
    parts, log_w = [], []
    for rows, log_gamma in found:
        pad = k - len(rows)
        index = torch.cat([torch.arange(len(rows)), torch.zeros(pad, dtype=torch.long)])
        parts.append(rows.take(index))
        log_w.append(torch.cat([log_gamma + math.log(k), torch.full((pad,), NEG_INF, dtype=torch.float64)]))
    stacked = torch.stack(log_w)
    log_z = stacked.logsumexp(1, keepdim=True) - math.log(k)
    trace = Trace("exact", {"max_objects": max_objects}, counts={"objects": float(sum(len(r) for r, _ in found))})
    return finish(target, cat_rollouts(parts), stacked, log_z, trace, began, tokens)
