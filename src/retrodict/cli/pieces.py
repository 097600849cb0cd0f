"""A sampler in pieces that can be interrupted between: runs or draws of one problem, groups of problems.

Each piece is a call of its own with a seed of its own, and pieces are joined as if they had been one call: runs are
independent, and pooling them is concatenation. What is finished when an interrupt comes is therefore an answer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from retrodict.cli.targets import Method
from retrodict.particles import Particles
from retrodict.records import Trace, cat_rollouts
from retrodict.samplers.common import OnStep
from retrodict.targets.algebra import Target

AT_MOST = 8
"""Pieces of one sampler on one group of problems."""
BATCH = 32
"""Draws or chains that a piece has at least, where these are what is split."""
SPLIT: dict[str, tuple[str, int]] = {
    "importance": ("runs", 1), "rejection": ("runs", 1), "smc": ("runs", 1), "best_of_n": ("draws", 1),
    "ancestral": ("n", BATCH), "mh": ("n", BATCH), "tempering": ("n", BATCH),
}  # fmt: skip
"""Which count of a sampler is split, and how much of it a piece has at least."""
PRIME = 1_000_003
"""Piece i draws with seed + i * PRIME; the first piece has the seed itself."""


@dataclass(frozen=True)
class Piece:
    """One call: the target it is on, its arguments, and which group of problems it belongs to."""

    target: Target
    group: int
    arguments: Mapping[str, Any]
    seed: int


def pieces(method: Method, target: Target, seed: int, batch: int) -> list[Piece]:
    """The calls that make up one sampler's answer."""
    groups = [target]
    if len(target.problems) > batch:
        groups = [target.on(target.problems[i : i + batch]) for i in range(0, len(target.problems), batch)]
    key, least = SPLIT.get(method.name, ("runs", 1))
    total = method.arguments.get(key)
    shares: list[dict[str, Any]] = [{}]
    if isinstance(total, int):
        parts = max(1, min(AT_MOST, total // least))
        shares = [{key: total // parts + (i < total % parts)} for i in range(parts)]
    calls = [(g, part, {**method.arguments, **share}) for g, part in enumerate(groups) for share in shares]
    return [Piece(part, g, told, seed + i * PRIME) for i, (g, part, told) in enumerate(calls)]


def run(method: Method, calls: Sequence[Piece], on_step: OnStep) -> Iterator[Particles]:
    """After each call, everything of this sampler that is whole so far, joined.

    Whole are groups of problems all of whose calls are done; and, while the first group is at work, its calls.
    """
    takes = _takes_progress(method.fn)
    done: list[Particles] = []
    part: list[Particles] = []
    for i, call in enumerate(calls):

        def step(now: int, of: int, i: int = i) -> None:
            on_step(1000 * i + round(1000 * now / max(of, 1)), 1000 * len(calls))

        more = {"on_step": step} if takes else {}
        part.append(method.fn(call.target, **call.arguments, seed=call.seed, **more))
        step(1, 1)
        if i + 1 == len(calls) or calls[i + 1].group != call.group:
            done.append(join_runs(part))
            part = []
        if done or part:
            yield _named(method, calls, join_problems(done) if done else join_runs(part))


def _takes_progress(fn: Callable[..., Any]) -> bool:
    import inspect

    return "on_step" in inspect.signature(fn).parameters


def _named(method: Method, calls: Sequence[Piece], p: Particles) -> Particles:
    return replace(p, trace=replace(p.trace, settings={**p.trace.settings, "seed": calls[0].seed}))


def join_runs(parts: Sequence[Particles]) -> Particles:
    """Independent answers about the same problems as one: particles and runs side by side."""
    if len(parts) == 1:
        return parts[0]
    first, m = parts[0], parts[0].m
    order, start = [], 0
    for p in parts:
        order.append(torch.arange(m * p.k).view(m, p.k) + start)
        start += m * p.k
    index = torch.cat(order, 1).flatten()
    rows = index.tolist()
    shown, keys = [s for p in parts for s in p.shown], [k for p in parts for k in p.keys]
    log_z = None if first.log_z is None else torch.cat([p.log_z for p in parts if p.log_z is not None], 1)
    return Particles(
        cat_rollouts([p.objects for p in parts]).take(index), torch.cat([p.log_w for p in parts], 1), log_z,
        tuple(shown[i] for i in rows), tuple(keys[i] for i in rows),
        _alive(_join_traces([p.trace for p in parts], [m] * len(parts), runs=True), parts), first.names,
    )  # fmt: skip


def _alive(trace: Trace, parts: Sequence[Particles]) -> Trace:
    """Without the notes of problems that one run found nothing for, but another did."""
    found = torch.stack([p.log_w.isfinite().any(1) for p in parts]).any(0).tolist()
    heads = tuple(
        f"problem {name}: every weight is zero" for name, yes in zip(parts[0].names, found, strict=True) if yes
    )
    return replace(trace, notes=tuple(n for n in trace.notes if not n.startswith(heads))) if heads else trace


def join_problems(parts: Sequence[Particles]) -> Particles:
    """Answers about different problems as one."""
    if len(parts) == 1:
        return parts[0]
    first, start, objects = parts[0], 0, []
    for p in parts:
        objects.append(replace(p.objects, problem=p.objects.problem + start))
        start += p.m
    log_z = None if first.log_z is None else torch.cat([p.log_z for p in parts if p.log_z is not None])
    trace = _join_traces([p.trace for p in parts], [p.m for p in parts], runs=False)
    return Particles(
        cat_rollouts(objects), torch.cat([p.log_w for p in parts]), log_z, tuple(s for p in parts for s in p.shown),
        tuple(k for p in parts for k in p.keys), trace, tuple(n for p in parts for n in p.names),
    )  # fmt: skip


def _join_traces(traces: Sequence[Trace], m: Sequence[int], runs: bool) -> Trace:
    """Populations side by side: problem-major, so that runs of one problem stay together."""
    steps = max((len(t.ess) for t in traces if t.ess is not None), default=0)

    def join(name: str, steps: int | None) -> Tensor | None:
        parts = []
        for t, problems in zip(traces, m, strict=True):
            x = getattr(t, name)
            if x is None:
                return None
            x = x if steps is None else _longer(name, x, steps)
            lead = () if steps is None else (steps,)
            parts.append(x.reshape(*lead, problems, -1, *x.shape[len(lead) + 1 :]) if runs else x)
        axis = (0 if steps is None else 1) + runs
        joined = torch.cat(parts, axis)
        return joined.flatten(axis - 1, axis) if runs else joined

    settings, counts = dict(traces[0].settings), {}
    for t in traces:
        for k, x in t.counts.items():
            counts[k] = max(counts.get(k, 0.0), x) if k == "steps" else counts.get(k, 0.0) + x
    if runs:
        for key in ("n", "runs", "draws", "chains"):
            told = [t.settings.get(key) for t in traces]
            split = key == "chains" or _is_split(traces[0].method, key)
            if all(isinstance(x, int) for x in told) and split:
                settings[key] = sum(x for x in told if isinstance(x, int))
    return Trace(
        traces[0].method, settings, join("ess", steps), join("resampled", steps), join("roots", None),
        join("ancestors", steps), join("alive", steps), counts,
        tuple(dict.fromkeys(n for t in traces for n in t.notes)),
    )  # fmt: skip


def _is_split(method: str, key: str) -> bool:
    return SPLIT.get(method, ("runs", 1))[0] == key


def _longer(name: str, x: Tensor, steps: int) -> Tensor:
    """A record of each step, to a later last step at which nothing more happened."""
    if len(x) >= steps:
        return x
    last = x[-1:]
    if name == "ancestors":
        last = torch.arange(x.shape[-1]).expand_as(last)
    elif name in ("resampled", "alive"):
        last = torch.zeros_like(last)
    return torch.cat([x, last.expand(steps - len(x), *x.shape[1:])])
