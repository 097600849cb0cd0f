"""Objectives that fit a twist psi (Zhao, Brekelmans, Makhzani and Grosse 2024, arXiv:2404.17546, sections 4 and C).

A string is n moves and a stop, t = 1..n+1 symbols; psi_t is psi after t of them (``scores.log_psi``), and the optimum
is psi*_t = sum over endings of p phi, with p phi = gamma. With b the density that the rows were drawn from,

    W_k = gamma / b,   V_t,k = p psi_t / b of the first t symbols (W_k once a row has stopped),   U_t,k = p / b likewise

held fixed; ~ marks weights normalised over the K rows of a problem. Positives stand for sigma, negatives for pi_t or p.

    ctl    sum_k (~V_t,k - ~W_k) log psi_t,            whose gradient is E_pi_t - E_sigma of grad log psi_t
    softq  (log psi_t - log sum_v p(v | x_1..t) psi(x_1..t v))^2,   and (log psi_n+1 - log phi)^2 at the stop
    sixo   - sum_k ~W_k log s(l_t) - 1/K sum_k U_t,k log (1 - s(l_t)),    l_t = log psi_t - log Z-hat
    fudge  - 1/K sum_k (W_k log psi_t + (U_t,k - W_k) log (1 - psi_t)),     phi <= 1
    dpg    - sum_k ~W_k log q(x): the objective ``sir`` on the proposal that the twist induces

Stopped rows take part in pi_t with their own mass, so that psi_t is at its right height beside them. U is not
normalised: p may lose mass (at a length limit), which is phi = 0 to FUDGE. With b = p both are the textbook's. Bias:
normalised weights are biased O(1/K). All but soft-Q take true zeros of gamma; soft-Q leaves them to hard guides.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from retrodict.errors import InputError
from retrodict.numerics import NEG_INF, at_end
from retrodict.objectives.groups import groups, total
from retrodict.records import FREE, Rollouts, Scores

CEILING = 0.99
"""Largest psi that FUDGE's log (1 - psi) sees."""
FLOOR = -1e4
"""Lowest log Z-hat."""

Parts = tuple[Tensor, dict[str, float]]


def symbols(scores: Scores, rollouts: Rollouts) -> tuple[Float[Tensor, "b t1"], Bool[Tensor, "b t1"], Tensor]:
    """(log psi of each symbol, which there are, log p of the first i+1 symbols without gradient)."""
    if scores.log_psi is None or scores.log_ahead is None:
        raise InputError("this objective fits a twist: give amortize policy=TwistedPolicy(...), or use rd.fit_twist")
    r = rollouts
    here = torch.arange(r.log_b.shape[1], device=r.n.device) <= r.n[:, None]
    row = torch.arange(len(r), device=r.n.device)
    with torch.no_grad():  # q = p psi / ahead, symbol by symbol
        log_q = torch.where(r.kind == FREE, scores.log_q, 0.0)
        log_q = torch.cat([log_q, log_q.new_zeros(len(r), 1)], 1)
        log_q = log_q.index_put((row, r.n), scores.log_stop[row, r.n, r.stop]).double()
        log_p = torch.where(here, log_q + scores.log_ahead - scores.log_psi, 0.0).cumsum(1)
    return scores.log_psi, here, log_p


def values(rollouts: Rollouts, log_gamma: Tensor) -> tuple[Tensor, Tensor]:
    """(log gamma of each row, log b of the first i+1 symbols)."""
    log_gamma = log_gamma if log_gamma.dim() == 1 else at_end(log_gamma, rollouts.n, rollouts.stop)
    here = torch.arange(rollouts.log_b.shape[1], device=rollouts.n.device) <= rollouts.n[:, None]
    return log_gamma.double(), torch.where(here, rollouts.log_b.double(), 0.0).cumsum(1)


def shares(log_w: Float[Tensor, "b t1"], of: Tensor, m: int) -> Float[Tensor, "b t1"]:
    """exp(log_w), normalised over the rows of each problem in each column; 0 where all are zero."""
    index = of[:, None].expand_as(log_w)
    top = log_w.new_full((m, log_w.shape[1]), NEG_INF).scatter_reduce(0, index, log_w, "amax")
    top = torch.where(top > NEG_INF, top, 0.0)
    w = (log_w - top[of]).exp()
    mass = torch.zeros_like(top).index_add(0, of, w)
    return w / mass.clamp_min(torch.finfo(w.dtype).tiny)[of]


def _told(loss: Tensor, w: Tensor, of: Tensor, m: int) -> Parts:
    square = total(w.square(), of, m)
    alive = square > 0
    ess = float((1 / square[alive]).mean()) if bool(alive.any()) else 0.0
    return loss, {"loss": float(loss.detach()), "dead": float((~alive).sum()), "ess": ess}


def ctl(scores: Scores, rollouts: Rollouts, log_gamma: Tensor) -> Parts:
    """Contrastive twist learning: mean over problems of the mean over t. A problem of zero weights is left out."""
    psi, here, log_p = symbols(scores, rollouts)
    log_gamma, log_b = values(rollouts, log_gamma)
    of, count = groups(rollouts.problem)
    m = len(count)
    log_w = log_gamma - log_b[:, -1]
    w = shares(log_w[:, None], of, m)
    at_t = torch.where(here, log_p + psi.detach() - log_b, log_w[:, None])
    v = shares(at_t, of, m) * (total(w[:, 0], of, m) > 0)[of, None]
    each = torch.where(here, (v - w) * psi, 0.0).sum(0) / m
    return _told(each.mean(), w[:, 0], of, m)


def softq(scores: Scores, rollouts: Rollouts, log_gamma: Tensor) -> Parts:
    """Soft Q-learning: each psi to one look ahead, the stop's to phi. A mean over the symbols of a row, then rows."""
    psi, here, log_p = symbols(scores, rollouts)
    log_gamma, _ = values(rollouts, log_gamma)
    row, n = torch.arange(len(rollouts), device=rollouts.n.device), rollouts.n
    assert scores.log_ahead is not None
    goal = torch.cat([scores.log_ahead[:, 1:], psi.new_zeros(len(row), 1)], 1).detach().double()
    log_phi = log_gamma - log_p[row, n]
    goal = goal.index_put((row, n), log_phi)
    known = here & (goal > NEG_INF)
    square = torch.where(known, psi - torch.where(known, goal, 0.0), 0.0).square()
    loss = (square.sum(1) / known.sum(1).clamp_min(1)).mean()
    return loss, {"loss": float(loss.detach()), "zeros": float((log_phi == NEG_INF).double().mean())}


def sixo(scores: Scores, rollouts: Rollouts, log_gamma: Tensor) -> Parts:
    """SIXO's density ratio (Lawson et al. 2022, arXiv:2206.05952): sigma against p, prefix by prefix."""
    psi, here, log_p = symbols(scores, rollouts)
    log_gamma, log_b = values(rollouts, log_gamma)
    of, count = groups(rollouts.problem)
    log_w = log_gamma - log_b[:, -1]
    w = shares(log_w[:, None], of, len(count))
    top = log_w.new_full((len(count),), NEG_INF).scatter_reduce(0, of, log_w, "amax").clamp_min(FLOOR)
    log_z = top + (total((log_w - top[of]).exp(), of, len(count)) / count).log().clamp_min(FLOOR)
    u = (log_p - log_b).exp() / count[of, None]
    logit = psi - log_z[of, None].to(psi)
    each = torch.where(here, -w * logsigmoid(logit) - u * logsigmoid(-logit), 0.0).sum(0) / len(count)
    return _told(each.mean(), w[:, 0], of, len(count))


def fudge(scores: Scores, rollouts: Rollouts, log_gamma: Tensor) -> Parts:
    """FUDGE (Yang and Klein 2021, arXiv:2104.05218): psi_t as the chance that phi holds in the end."""
    psi, here, log_p = symbols(scores, rollouts)
    log_gamma, log_b = values(rollouts, log_gamma)
    of, count = groups(rollouts.problem)
    log_phi = log_gamma - log_p.gather(1, rollouts.n[:, None]).squeeze(1)
    if bool((log_phi > 1e-3).any()):
        raise InputError("fudge reads phi as a chance, and a factor here is over one: use ctl or softq")
    yes = (log_gamma - log_b[:, -1]).exp()[:, None]
    chance = psi.exp()
    held = chance + (chance.clamp_max(CEILING) - chance).detach()  # clamped, and still pushed down
    each = yes * psi.abs() - ((log_p - log_b).exp() - yes) * torch.log1p(-held)  # -log psi, and back from over 1
    loss = (torch.where(here, each, 0.0) / count[of, None]).sum() / (len(count) * here.shape[1])
    return loss, {"loss": float(loss.detach()), "phi": float(log_phi.exp().mean())}
