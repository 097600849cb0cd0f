"""Numerics shared by every room: natural logs, float32 or better, no NaN from (-inf) - (-inf)."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

NEG_INF = float("-inf")


def log_mean_exp(x: Tensor, dim: int = -1) -> Tensor:
    """log of the mean of exp(x) along ``dim``; -inf where every entry is -inf."""
    return torch.logsumexp(x, dim) - math.log(x.shape[dim])


def normalise(log_w: Float[Tensor, "... k"]) -> Float[Tensor, "... k"]:
    """Weights that sum to one along the last axis; all zero where every weight is zero."""
    top = log_w.amax(-1, keepdim=True)
    w = torch.exp(log_w - torch.where(top.isfinite(), top, torch.zeros_like(top)))
    return w / w.sum(-1, keepdim=True).clamp_min(torch.finfo(w.dtype).tiny)


def ess(log_w: Float[Tensor, "... k"]) -> Float[Tensor, "..."]:
    """Effective sample size (sum w)^2 / sum w^2 along the last axis; 0 where every weight is zero."""
    w = normalise(log_w.double())
    return torch.where(w.sum(-1) > 0, 1.0 / w.square().sum(-1).clamp_min(1e-300), torch.zeros(())).to(log_w.dtype)


def safe_sub(a: Tensor, b: Tensor) -> Tensor:
    """a - b, with -inf (never NaN) where a is -inf."""
    return torch.where(a == NEG_INF, a, a - b)


def log_prob_of(logits: Float[Tensor, "b v"], legal: Tensor | None = None) -> Float[Tensor, "b v"]:
    """Log-softmax in float32 over the last axis, renormalised over ``legal`` where given."""
    if legal is not None:
        logits = logits.masked_fill(~legal, NEG_INF)
    return logits.log_softmax(-1, dtype=torch.float64 if logits.dtype == torch.float64 else torch.float32)


def invert_cdf(weights: Float[Tensor, "p k"], u: Float[Tensor, "p n"]) -> Int[Tensor, "p n"]:
    """Inverse of each row's distribution function at u in [0, 1), in float64; never an index of weight zero."""
    cdf = weights.cumsum(-1, dtype=torch.float64)
    total = cdf[:, -1:]
    index = torch.searchsorted(cdf, (u * total).clamp_max(total * (1 - 1e-15)), right=True)
    last = weights.shape[1] - 1 - (weights.flip(-1) > 0).to(torch.int8).argmax(-1, keepdim=True)
    return torch.minimum(index, last)


def sample_categorical(log_p: Float[Tensor, "b v"], gen: torch.Generator) -> Int[Tensor, " b"]:
    """One draw a row from exp(log_p), which need not be normalised.

    On a GPU by the exponential race (Gumbel-max), elementwise; on a CPU, where a random number per entry costs more
    than the transformer's last layer, by inverting the distribution function.
    """
    if log_p.is_cuda:
        race = torch.empty_like(log_p).exponential_(generator=gen)
        return race.clamp_min_(torch.finfo(race.dtype).tiny).log_().neg_().add_(log_p).argmax(-1)
    top = log_p.amax(-1, keepdim=True)
    u = torch.rand(len(log_p), 1, generator=gen, dtype=torch.float64, device=log_p.device)
    return invert_cdf((log_p - torch.where(top.isfinite(), top, 0.0)).exp(), u).squeeze(1)


def total_variation(log_p: Float[Tensor, " n"], log_q: Float[Tensor, " n"]) -> float:
    """1/2 sum |p - q| of two laws over the same objects, each normalised first."""
    return float((log_p.double().softmax(0) - log_q.double().softmax(0)).abs().sum() / 2)


def jackknife_log_mean(log_z: Float[Tensor, "... r"], dim: int = -1) -> tuple[Tensor, Tensor]:
    """log of the mean of exp(log_z) over r independent runs, and its jackknife standard error (nats).

    With one run (or one of positive evidence) the error is infinite: nothing is known about it.
    """
    r = log_z.shape[dim]
    value = log_mean_exp(log_z, dim)
    if r < 2:
        return value, torch.full_like(value, math.inf)
    keep = ~torch.eye(r, dtype=torch.bool, device=log_z.device)
    x = log_z.movedim(dim, -1)
    left_out = torch.stack([log_mean_exp(x[..., keep[i]], -1) for i in range(r)], -1)
    spread = (left_out - left_out.mean(-1, keepdim=True)).square().sum(-1)
    return value, torch.nan_to_num(((r - 1) / r * spread).sqrt(), nan=math.inf)


def prefix_values(log_move: Float[Tensor, "b t"], log_stop: Float[Tensor, "b t1 s"]) -> Float[Tensor, "b t1 s"]:
    """Value of ending after each prefix: the moves so far plus the stop."""
    path = torch.cat([log_move.new_zeros(len(log_move), 1), log_move.cumsum(1)], 1)
    return path[:, :, None] + log_stop


def at_end(values: Tensor, n: Tensor, stop: Tensor) -> Float[Tensor, " b"]:
    """The entry of ``[b, t+1, s]`` values that belongs to each row's own end."""
    return values[torch.arange(len(n), device=values.device), n, stop]
