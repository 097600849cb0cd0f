"""Scores of data: log p(D | G) for Gaussian and discrete networks, as modular functions of the graph.

Each is a difference of two evidences of column subsets, on the rows in which j was not set by an experimenter:

    log p(x_j | x_Pa) = log m(D_{Pa + j}) - log m(D_Pa)

so a complete DAG's score is log m of all columns whatever its order, and the score is equal inside a Markov class
(without interventions).

    bge   Gaussian, normal-Wishart prior: Geiger and Heckerman 1994 with the correction of Kuipers, Moffa and
          Heckerman 2014 (arXiv 1402.6863): l = |S|, T = t I, t = alpha_mu (alpha_w - d - 1)/(alpha_mu + 1),
          R = T + S_N + N alpha_mu/(N + alpha_mu) (xbar - nu)(xbar - nu)^T,
          log m = l/2 log(alpha_mu/(N + alpha_mu)) - N l/2 log pi + log G_l((N + a)/2) - log G_l(a/2)
                  + a/2 logdet T_S - (N + a)/2 logdet R_S,   a = alpha_w - d + l,  G_l the multivariate gamma
    bdeu  discrete, Dirichlet(ess/q) with q states of S: Heckerman, Geiger and Chickering 1995,
          log m = sum over observed states of lgamma(ess/q + n) - lgamma(ess/q)   (+ a constant that cancels)
    bic   maximum likelihood less (log N)/2 a parameter (Schwarz 1978); log m is of the subset's own maximum
          likelihood, with l(l + 3)/2 parameters (Gaussian) or q - 1 (discrete)

Bias: bge and bdeu are exact evidences under their priors; bic is their large-N approximation, up to O(1) nats a node.
BGe is not invariant to scale: standardise first, or let t say the scale.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from retrodict.errors import InputError
from retrodict.structures.data import Table
from retrodict.structures.modular import Modular, modular

CHUNK = 2_000_000
"""Numbers held at once while subsets are scored."""
MOST_STATES = 2**62
SINGULAR = "some columns are linear combinations of others: remove one; or standardise and use bge"
DEPENDENT = 1e-10
"""Smallest eigenvalue of the columns' correlations for which a maximum likelihood is taken to exist."""

Evidence = Callable[[Int[Tensor, " s"]], Float[Tensor, " s"]]
"""Subsets of columns (bit masks) to log m of these columns, on fixed rows."""


def bge(table: Table, alpha_mu: float = 1.0, alpha_w: float | None = None, nu: float = 0.0) -> Modular:
    """Bayesian Gaussian equivalent score. ``alpha_w`` defaults to d + 2; both defaults make T = I/2."""
    _needs(table, "bge", discrete=False)
    d = table.d
    a_w = d + 2.0 if alpha_w is None else alpha_w
    if alpha_mu <= 0 or a_w <= d + 1:
        raise InputError(f"bge needs alpha_mu > 0 and alpha_w > d + 1 = {d + 1}, not {alpha_mu:g} and {a_w:g}")
    t = alpha_mu * (a_w - d - 1) / (alpha_mu + 1)

    def evidence(x: Float[Tensor, "n d"]) -> Evidence:
        n, centre = len(x), x.mean(0) if len(x) else torch.full((d,), nu, dtype=torch.float64)
        spread = (x - centre).T @ (x - centre)
        r = t * torch.eye(d, dtype=torch.float64) + spread
        r = r + n * alpha_mu / (n + alpha_mu) * torch.outer(centre - nu, centre - nu)

        def log_m(masks: Int[Tensor, " s"]) -> Float[Tensor, " s"]:
            size = _bits(masks, d).sum(1).double()
            a = a_w - d + size
            gammas = torch.stack([_log_gamma_ratio(k, n, a_w - d + k) for k in range(d + 1)])[size.long()]
            scale = size / 2 * math.log(alpha_mu / (n + alpha_mu)) - n * size / 2 * math.log(math.pi)
            return scale + gammas + a / 2 * size * math.log(t) - (n + a) / 2 * _logdets(r, masks)

        return log_m

    return _score(table, evidence, f"bge(alpha_mu={alpha_mu:g}, alpha_w={a_w:g})")


def bdeu(table: Table, ess: float = 1.0) -> Modular:
    """Bayesian Dirichlet equivalent uniform score; ``ess`` is the equivalent sample size of the prior."""
    _needs(table, "bdeu", discrete=True)
    if ess <= 0:
        raise InputError(f"bdeu needs a positive equivalent sample size, not {ess:g}")
    sizes = _sizes(table)

    def evidence(x: Int[Tensor, "n d"]) -> Evidence:
        def log_m(masks: Int[Tensor, " s"]) -> Float[Tensor, " s"]:
            row, count = _counts(x, masks, sizes)
            prior = ess / _states(masks, sizes)[row]
            value = torch.lgamma(prior + count) - torch.lgamma(prior)
            return torch.zeros(len(masks), dtype=torch.float64).index_add_(0, row, value)

        return log_m

    return _score(table, evidence, f"bdeu(ess={ess:g})")


def bic(table: Table) -> Modular:
    """Schwarz's criterion, Gaussian or discrete as the table is."""
    return _bic_discrete(table) if table.discrete else _bic_gaussian(table)


def _bic_gaussian(table: Table) -> Modular:
    d = table.d
    rows = len(table) if table.intervened is None else int((~table.intervened).sum(0).min())
    if rows <= d:
        raise InputError(f"bic of {d} Gaussian variables needs more than {d} rows for every child, not {rows}; use bge")

    if float(torch.linalg.eigvalsh(torch.corrcoef(table.values.T).view(d, d))[0]) < DEPENDENT:
        raise InputError(SINGULAR)

    def evidence(x: Float[Tensor, "n d"]) -> Evidence:
        n, cov = len(x), (x - x.mean(0)).T @ (x - x.mean(0)) / len(x)

        def log_m(masks: Int[Tensor, " s"]) -> Float[Tensor, " s"]:
            size = _bits(masks, d).sum(1).double()
            fit = -n / 2 * (size * (math.log(2 * math.pi) + 1) + _logdets(cov, masks))
            return fit - math.log(n) / 2 * size * (size + 3) / 2

        return log_m

    return _score(table, evidence, "bic(gaussian)")


def _bic_discrete(table: Table) -> Modular:
    sizes = _sizes(table)

    def evidence(x: Int[Tensor, "n d"]) -> Evidence:
        n = len(x)

        def log_m(masks: Int[Tensor, " s"]) -> Float[Tensor, " s"]:
            row, count = _counts(x, masks, sizes)
            fit = torch.zeros(len(masks), dtype=torch.float64).index_add_(0, row, count * (count / max(n, 1)).log())
            return fit - math.log(max(n, 1)) / 2 * (_states(masks, sizes) - 1)

        return log_m

    return _score(table, evidence, "bic(discrete)")


def _score(table: Table, evidence: Callable[[Tensor], Evidence], version: str) -> Modular:
    """log m(Pa + j) - log m(Pa), each subset once; with interventions each child has rows of its own."""
    d = table.d
    if table.intervened is None:
        shared = evidence(table.values)
        by_child: list[Evidence] = [shared] * d
    else:
        by_child = [evidence(table.values[~table.intervened[:, j]]) for j in range(d)]

    def local(child: Int[Tensor, " n"], parents: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
        out = torch.empty(len(child), dtype=torch.float64)
        groups = [torch.arange(len(child))] if table.intervened is None else [
            (child == j).nonzero()[:, 0] for j in child.unique().tolist()]  # fmt: skip
        for rows in groups:
            pa = parents[rows]
            subsets, at = torch.unique(torch.cat([pa | 2 ** child[rows], pa]), return_inverse=True)
            value = by_child[int(child[rows[0]])](subsets)[at] if len(rows) else out[:0]
            out[rows] = value[: len(rows)] - value[len(rows) :]
        return out

    return modular(d, local, f"{version} of {len(table)} rows")


def _needs(table: Table, name: str, discrete: bool) -> None:
    if table.discrete != discrete:
        has, other = ("categories", "bdeu or bic") if table.discrete else ("continuous values", "bge or bic")
        raise InputError(f"{name} cannot score {has}; use {other}")


def _bits(masks: Int[Tensor, " s"], d: int) -> Bool[Tensor, "s d"]:
    """Masks as rows of booleans."""
    return (masks[:, None] >> torch.arange(d)) & 1 == 1


def _logdets(r: Float[Tensor, "d d"], masks: Int[Tensor, " s"]) -> Float[Tensor, " s"]:
    """log det of the principal submatrices ``r[S, S]``: outside S the identity stands in."""
    d, out = len(r), []
    for part in masks.split(max(1, CHUNK // (d * d))):
        inside = _bits(part, d)
        both = inside[:, :, None] & inside[:, None, :]
        matrix = torch.where(both, r, torch.eye(d, dtype=torch.float64))
        factor, failed = torch.linalg.cholesky_ex(matrix)
        if bool(failed.any()):
            raise InputError(SINGULAR)
        out.append(2 * factor.diagonal(dim1=1, dim2=2).log().sum(1))
    return torch.cat(out)


def _log_gamma_ratio(size: int, n: int, a: float) -> Float[Tensor, ""]:
    """log G_l((n + a)/2) - log G_l(a/2); the powers of pi cancel."""
    i = torch.arange(size, dtype=torch.float64)
    return (torch.lgamma((n + a - i) / 2) - torch.lgamma((a - i) / 2)).sum()


def _sizes(table: Table) -> Int[Tensor, " d"]:
    assert table.levels is not None
    return torch.tensor([len(x) for x in table.levels])


def _states(masks: Int[Tensor, " s"], sizes: Int[Tensor, " d"]) -> Float[Tensor, " s"]:
    """Number of joint states of each subset."""
    return torch.where(_bits(masks, len(sizes)), sizes.double(), 1.0).prod(1)


def _counts(
    x: Int[Tensor, "n d"], masks: Int[Tensor, " s"], sizes: Int[Tensor, " d"]
) -> tuple[Int[Tensor, " c"], Float[Tensor, " c"]]:
    """How often each observed joint state of each subset occurs: (index of the subset, count), one entry a state."""
    if bool((_states(masks, sizes) > MOST_STATES).any()):
        raise InputError("a parent set has more joint states than 2^62; limit the number of parents")
    rows, counts, first = [], [], 0
    for part in masks.split(max(1, CHUNK // max(len(x), 1))):
        size = torch.where(_bits(part, len(sizes)), sizes, 1)
        stride = size.cumprod(1) // size
        code = torch.zeros(len(part), len(x), dtype=torch.int64)
        for j in range(len(sizes)):
            code += torch.where(size[:, j] > 1, stride[:, j], 0)[:, None] * x[:, j]
        code = code.sort(1).values
        fresh = torch.ones_like(code, dtype=torch.bool)
        fresh[:, 1:] = code[:, 1:] != code[:, :-1]
        row, at = fresh.nonzero().unbind(1)
        start = row * len(x) + at
        counts.append(torch.diff(start, append=start.new_tensor([code.numel()])).double())
        rows.append(row + first)
        first += len(part)
    return torch.cat(rows), torch.cat(counts)
