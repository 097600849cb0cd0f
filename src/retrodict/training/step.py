"""One gradient step in two phases: the objective on detached scores of the whole batch, then dL/dScores pushed through
the model in micro-batches.

A loss that compares rows (VarGrad, pooled) is a function of the whole batch; accumulating it over split groups would
be another loss. Its derivative by each row's scores is not: sum over rows of dL/dScores dScores/dtheta, in any split.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from retrodict.protocols import Trainable
from retrodict.records import Rollouts, Scores, trim
from retrodict.training.distributed import ALONE, World

Loss = Callable[[Scores, Rollouts, Tensor], tuple[Tensor, dict[str, float]]]


@dataclass(frozen=True)
class Pushed:
    """What a backward pass found: the loss, the objective's metrics, the scores (detached) and the micro-batch used."""

    loss: float
    metrics: Mapping[str, float]
    scores: Scores
    micro: int


def push(
    policy: Trainable,
    loss_of: Loss,
    rollouts: Rollouts,
    log_gamma: Tensor,
    log_norm: Tensor | None = None,
    micro: int | None = None,
    world: World = ALONE,
) -> Pushed:
    """Add the gradient of a loss to the parameters' ``grad`` (and to that of ``log_norm``'s source).

    ``micro`` rows at a time run through the model with gradient (all by default); where memory runs out on a GPU the
    number is halved and the pass begun again. Raises FloatingPointError where the loss or a derivative is not finite.
    """
    micro = len(rollouts) if micro is None else max(1, min(micro, len(rollouts)))
    before = [None if p.grad is None else p.grad.clone() for p in policy.parameters().values()]
    while True:
        try:
            return _push(policy, loss_of, rollouts, log_gamma, log_norm, micro, world)
        except torch.cuda.OutOfMemoryError:
            if micro == 1 or world.size > 1:  # the others cannot know of it, and wait
                raise
        micro = -(-micro // 2)
        policy.settle()  # clears what half a backward pass left behind
        torch.cuda.empty_cache()
        for p, g in zip(policy.parameters().values(), before, strict=True):
            p.grad = g


def _push(policy, loss_of, rollouts, log_gamma, log_norm, micro, world) -> Pushed:  # noqa: ANN001
    mine = world.rows(len(rollouts), rollouts.n.device)
    here = rollouts if world.size == 1 else rollouts.take(mine)
    rows = split(here.n, micro)
    live: list[Scores] = []
    if len(rows) == 1:  # one pass: its graph is kept while the objective looks at its values
        live = [policy.score(here, grad=True)]
        part = live[0]
    else:
        part = join(here, rows, [policy.score(trim(here.take(r))) for r in rows])
    whole = world.scores(part)
    log_q = torch.cat([x.log_q for x in whole]).detach().requires_grad_()
    log_stop = torch.cat([x.log_stop for x in whole]).detach().requires_grad_()
    log_psi, ahead = (_cat([getattr(x, name) for x in whole]) for name in ("log_psi", "log_ahead"))
    if log_psi is not None:
        log_psi.requires_grad_()
    for name, x in (("log q", log_q), ("log q of a stop", log_stop), ("log gamma", log_gamma)):
        if bool((x.isnan() | (x == math.inf)).any()):
            raise FloatingPointError(f"{name} is NaN or infinite")
    norm = None if log_norm is None else log_norm.detach().requires_grad_()
    given = Scores(log_q, log_stop, log_norm=norm, log_psi=log_psi, log_ahead=ahead)
    loss, metrics = loss_of(given, rollouts, log_gamma)
    if not math.isfinite(float(loss.detach())):
        raise FloatingPointError(f"the loss is {float(loss.detach())}")
    loss.backward()
    wanted = {"log_q": log_q, "log_stop": log_stop} | ({} if log_psi is None else {"log_psi": log_psi})
    grads = [torch.zeros_like(x) if x.grad is None else x.grad for x in wanted.values()]
    if not all(bool(g.isfinite().all()) for g in grads):  # of all rows: every process must say the same
        raise FloatingPointError("the derivative of the loss by log q is not finite")
    grads = [g[mine] for g in grads]
    for i, r in enumerate(rows):
        part = live[i] if live else policy.score(trim(here.take(r)), grad=True)
        t = part.log_q.shape[1]
        slopes = [grads[0][r, :t], *(g[r, : t + 1] for g in grads[1:])]
        pairs = zip((getattr(part, name) for name in wanted), slopes, strict=True)
        moving = [(x, g) for x, g in pairs if x.requires_grad]  # the stop of a vector is forced: log q(stop) = 0
        torch.autograd.backward([x for x, _ in moving], [g for _, g in moving])
        policy.settle()
    world.sum_gradients(policy.parameters().values())
    if log_norm is not None and norm is not None and norm.grad is not None:  # last: a pass that failed left no trace
        log_norm.backward(norm.grad)
    return Pushed(float(loss.detach()), metrics, Scores(log_q.detach(), log_stop.detach()), micro)


def split(n: Tensor, micro: int) -> list[Tensor]:
    """Row indices of each micro-batch: rows of like length together, so that little is padded."""
    if micro >= len(n):
        return [torch.arange(len(n), device=n.device)]
    return list(n.argsort(stable=True).split(micro))


def join(rollouts: Rollouts, rows: Sequence[Tensor], parts: Sequence[Scores]) -> Scores:
    """Scores of micro-batches as one, in the order of the rollouts."""
    b, t = rollouts.moves.shape[:2]
    first = parts[0]
    more: dict[str, Tensor] = {}
    for name in ("log_psi", "log_ahead"):
        if getattr(first, name) is not None:
            more[name] = first.log_q.new_zeros(b, t + 1)
    log_q = first.log_q.new_zeros(b, t)
    log_stop = first.log_stop.new_full((b, t + 1, first.log_stop.shape[2]), -math.inf)
    for r, part in zip(rows, parts, strict=True):
        log_q[r, : part.log_q.shape[1]] = part.log_q.detach()
        log_stop[r, : part.log_stop.shape[1]] = part.log_stop.detach()
        for name, x in more.items():
            x[r, : part.log_stop.shape[1]] = getattr(part, name).detach()
    return Scores(log_q, log_stop, **more)


def _cat(parts: Sequence[Tensor | None]) -> Tensor | None:
    known = [x.detach() for x in parts if x is not None]
    return torch.cat(known) if known else None


def clip(parameters: Mapping[str, Tensor], most: float) -> float:
    """Scale the gradient down to norm ``most``; gives the norm it had."""
    found = [p for p in parameters.values() if p.grad is not None]
    return float(torch.nn.utils.clip_grad_norm_(found, most)) if found else 0.0
