"""Compare methods on one target: bounds, ESS, diversity, cost, and what the samples say. The only room that draws
samples for a diagnostic."""

from __future__ import annotations

import dataclasses
import html
import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from retrodict.errors import InputError
from retrodict.numerics import at_end
from retrodict.particles import Particles
from retrodict.policies.base import FiniteStepper
from retrodict.records import Rollouts
from retrodict.samplers.common import proposal
from retrodict.samplers.importance import importance
from retrodict.samplers.smc import conditional_smc
from retrodict.targets.algebra import Target

COLUMNS: dict[str, str] = {
    "problem": "problem", "method": "method", "lower": "lower bound", "log_z": "log Z", "upper": "upper bound",
    "gap": "gap", "min_ess": "min ESS", "distinct": "distinct", "explains": "log p(Y|X,Z)", "seconds": "seconds",
    "best": "best",
}  # fmt: skip
SIDES = ("lower", "upper", "gap", "kl_q", "kl_post")


@dataclass(frozen=True, repr=False)
class Comparison:
    """A table, one row a problem and method; numbers in nats, ``*_se`` their standard errors over runs or draws.

    ``lower`` is the mean of log Z-hat over runs (or the ELBO of a policy), ``log_z`` the log of the mean, ``upper``
    needs an exact posterior sample and is ``--`` where there is none; ``gap`` is upper minus lower. For a policy q with
    both bounds ``kl_q`` = log Z - lower estimates KL(q, posterior) and ``kl_post`` = upper - log Z the other one, with
    the log Z of the method whose lower bound is the highest; the notes give their means.
    """

    rows: list[dict[str, Any]]
    formula: str
    notes: tuple[str, ...] = ()
    particles: Mapping[str, Particles] = field(default_factory=dict)

    def to_pandas(self) -> Any:
        """The rows as a DataFrame."""
        import pandas as pd

        return pd.DataFrame(self.rows)

    def mean(self) -> list[dict[str, Any]]:
        """One row a method: averages over problems, with standard errors over problems.

        Where only some problems have exact samples, these are averaged: the others have no second side.
        """
        out = []
        sided = {r["problem"] for r in self.rows if r["upper"] is not None}
        for method in dict.fromkeys(r["method"] for r in self.rows):
            mine = [r for r in self.rows if r["method"] == method and (not sided or r["problem"] in sided)]
            if not mine:  # a policy of one problem among those of others
                continue
            row: dict[str, Any] = {"problem": f"mean of {len(mine)}", "method": method}
            for key in (*SIDES, "log_z", "explains", "min_ess", "distinct", "seconds"):
                values = [r[key] for r in mine if r.get(key) is not None]
                whole = len(values) == len(mine)
                row[key] = statistics.fmean(values) if whole else None
                row[f"{key}_se"] = (
                    statistics.stdev(values) / math.sqrt(len(values)) if whole and len(values) > 1 else None
                )
            row["best"] = ""
            out.append(row)
        return out

    def cells(self) -> list[list[str]]:
        """The table as text, header first; with several problems their mean comes last."""
        many = len({r["problem"] for r in self.rows}) > 1
        rows = self.rows + (self.mean() if many else [])
        keys = [k for k in COLUMNS if any(r.get(k) not in (None, "") for r in rows) or k in ("upper", "log_z")]
        body = [[_cell(r, k) for k in keys] for r in rows]
        return [[COLUMNS[k] for k in keys], *body]

    def to_latex(self) -> str:
        """A LaTeX tabular."""
        head, *body = [[_tex(c) for c in row] for row in self.cells()]
        lines = [" & ".join(head) + r" \\", r"\midrule", *(" & ".join(r) + r" \\" for r in body)]
        return "\n".join(
            [rf"\begin{{tabular}}{{{'l' * len(head)}}}", r"\toprule", *lines, r"\bottomrule", r"\end{tabular}"]
        )

    def __rich__(self) -> Any:
        from rich.table import Table
        from rich.text import Text

        head, *body = self.cells()
        table = Table(title=f"gamma = {self.formula}   (nats)", caption="\n".join(self.notes) or None)
        for i, name in enumerate(head):
            wide = name in ("best", "problem", "method")
            table.add_column(
                name, justify="left" if wide else "right", no_wrap=not wide, overflow="fold", min_width=4 * (i > 1)
            )
        for before, row in zip([None, *body], body, strict=False):
            if before is not None and before[0] != row[0]:
                table.add_section()
            table.add_row(*(Text(c) for c in row))
        return table

    def __str__(self) -> str:
        from io import StringIO

        from rich.console import Console

        out = StringIO()
        Console(file=out, width=140).print(self.__rich__())
        return out.getvalue()

    __repr__ = __str__

    def _repr_html_(self) -> str:
        head, *body = [[html.escape(c) for c in row] for row in self.cells()]
        rows = "".join("<tr>" + "".join(f"<td>{c}</td>" for c in r) + "</tr>" for r in body)
        return f"<table><tr>{''.join(f'<th>{c}</th>' for c in head)}</tr>{rows}</table>"


def _error(values: list[float]) -> float | None:
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def _cell(row: Mapping[str, Any], key: str) -> str:
    value = row.get(key)
    if key in ("problem", "method", "best"):
        return str(value or "").strip().replace("\n", " ")
    if value is None:
        return "--"
    error = row.get(f"{key}_se")
    if key in ("min_ess", "seconds"):
        return f"{value:.1f}"
    if key == "distinct":
        return f"{value:.0f}"
    if not math.isfinite(value):
        return "-inf" if value < 0 else "inf"
    return f"{value:.2f}" + (f" ± {error:.2f}" if error is not None and math.isfinite(error) else "")


def _tex(text: str) -> str:
    for a in "\\&%$#_{}":
        text = text.replace(a, r"\textbackslash{}" if a == "\\" else "\\" + a)
    return text.replace("±", r"$\pm$").replace("^", r"\^{}").replace("~", r"\~{}")


def compare(
    target: Target,
    methods: Mapping[str, Particles | FiniteStepper | None],
    *,
    n: int = 256,
    seed: int = 0,
    exact: Rollouts | None = None,
) -> Comparison:
    """Put methods side by side on one target.

    Args:
        target: what they all aim at.
        methods: particles of any sampler, or a policy (``target.prior``, an amortized one), from which n fresh draws
            at temperature one are taken.
        n: draws from each policy.
        seed: of those draws and of conditional SMC.
        exact: one exact posterior sample (``retrodict.simulate``) of some or all problems, named by their index; gives
            their upper bounds. A single sample's bound is noisy: average over many simulated problems.

    Raises:
        InputError: an entry that is neither particles nor a policy, or particles of another number of problems.
    """
    rows, drawn, policies = [], {}, {}
    for name, method in methods.items():
        policy = None
        if isinstance(method, FiniteStepper):
            policy = policies[name] = method
            method = importance(target, policy, n=max(1, n // 4), runs=4, seed=seed)
        if not isinstance(method, Particles):
            raise InputError(f"{name!r} is {type(method).__name__}; compare takes particles or policies")
        if method.m != len(target.problems):
            raise InputError(f"{name!r} holds {method.m} problems, the target {len(target.problems)}")
        drawn[name] = method
        upper = {} if exact is None else _upper(target, method, policy, exact, seed)
        rows += [_row(target, name, method, p, policy is not None, upper) for p in range(method.m)]
    order = {p: i for i, p in enumerate(dict.fromkeys(r["problem"] for r in rows))}
    rows.sort(key=lambda r: order[r["problem"]])
    _split(rows, policies)
    table = Comparison(rows, target.formula, particles=drawn)
    notes = [target.note] if target.note else []
    notes += dict.fromkeys(note for p in drawn.values() for note in p.trace.notes)
    notes += [note for name, q in policies.items() if (note := _about(name, q, table, q is target.prior))]
    return dataclasses.replace(table, notes=tuple(notes))


def _split(rows: list[dict[str, Any]], policies: Mapping[str, FiniteStepper]) -> None:
    """Both KLs of each policy whose bounds are there: lower <= log Z <= upper, and KL(q, post) = log Z - ELBO."""
    for row in rows:
        if row["method"] not in policies or row.get("gap") is None:
            continue
        told = [r for r in rows if r["problem"] == row["problem"] and r["log_z"] is not None and r["lower"] is not None]
        log_z = max(told, key=lambda r: r["lower"])["log_z"]
        row["kl_q"], row["kl_post"] = log_z - row["lower"], row["upper"] - log_z


def _about(name: str, policy: FiniteStepper, table: Comparison, prior: bool) -> str:
    """What a policy reads, and its two divergences from the posterior, in words."""
    sees = "" if prior else str(getattr(policy, "sees", ""))
    reads = {"x": "X", "xy": "X and Y"}.get(sees, f"{sees!r}" if sees else "")
    told = [f"{name} reads {reads}"] if reads else []
    row = next((r for r in table.mean() if r["method"] == name), None)
    if row is not None and row["kl_q"] is not None:
        told.append(f"{'' if told else f'{name}: '}KL(q, posterior) {_cell(row, 'kl_q')} and KL(posterior, q) "
                    f"{_cell(row, 'kl_post')} nats")  # fmt: skip
        told[-1] += "" if row["problem"] == "mean of 1" else f", {row['problem']}"
    return ", ".join(told)


def _row(target: Target, name: str, particles: Particles, p: int, policy: bool, upper: Any) -> dict[str, Any]:
    k, w = particles.k, particles.weights[p]
    index = torch.arange(p * k, (p + 1) * k)
    objects = particles.objects.take(index)
    row: dict[str, Any] = {"problem": particles.names[p], "method": name, "lower": None, "log_z": None, "upper": None}
    evidence = particles.evidence
    if evidence is not None and particles.log_z is not None:
        row["log_z"], row["log_z_se"] = float(evidence[0][p]), float(evidence[1][p])
        lower = particles.log_w[p] if policy else particles.log_z[p]  # ELBO of a policy, E[log Z-hat] of a sampler
        row["lower"] = float(lower.mean())
        row["lower_se"] = float(lower.std() / math.sqrt(len(lower))) if len(lower) > 1 else None
        row["min_ess"] = float(particles.min_ess[p])
    if p in upper:
        row["upper"], row["upper_se"] = upper[p]
        row["gap"] = row["upper"] - row["lower"] if row["lower"] is not None else None
    if policy:
        w = torch.full_like(w, 1.0 / k)  # what the policy itself draws, unweighted
    if "likelihood" in objects.terms:
        value = objects.terms["likelihood"]
        value = (at_end(value, objects.n, objects.stop) if value.dim() > 1 else value).double()
        total = w.sum()
        row["explains"] = float((w * torch.where(w > 0, value, 0.0)).sum() / total) if total > 0 else None
    counts = particles.trace.counts
    row["distinct"] = particles.distinct(p) if not policy else len(set(particles.keys[p * k : (p + 1) * k]))
    row["seconds"] = counts.get("seconds", 0.0) / particles.m
    row["tokens"] = counts.get("tokens", 0.0) / particles.m
    row["best"] = particles.shown[p * k + best_index(target, objects, w)]
    row["typical"] = particles.shown[p * k + int(w.argsort()[-(1 + int((w > 0).sum()) // 2)])] if (w > 0).any() else ""
    return row


def best_index(target: Target, objects: Rollouts, w: torch.Tensor) -> int:
    """The object of the largest gamma among those of positive weight."""
    total = torch.zeros(len(objects), dtype=torch.float64)
    for name, beta in target.betas.items():
        value = objects.terms[name]
        value = at_end(value, objects.n, objects.stop) if value.dim() > 1 else value
        total = total + (beta * value.double() if beta else 0.0)
    return int(torch.where(w > 0, total.nan_to_num(nan=-math.inf), -math.inf).argmax())


def _upper(
    target: Target, particles: Particles, policy: FiniteStepper | None, exact: Rollouts, seed: int
) -> dict[int, tuple[float, float | None]]:
    """Upper bound and its error over runs, for each problem that has an exact sample: EUBO for a policy, IWAE with
    one exact sample for importance sampling, conditional SMC for SMC.

    One exact sample a problem leaves an error that runs cannot show, so none is given for a single weight.
    """
    method, settings = particles.trace.method, particles.trace.settings
    at = exact.problem.tolist()
    if particles.log_z is None or method not in ("importance", "smc"):
        return {}
    if method == "importance":
        log_w = _log_weights(target, proposal(target, policy), exact)
        if policy is not None:
            return {p: (float(w), None) for p, w in zip(at, log_w, strict=True)}
        runs = particles.log_z.shape[1]
        mixed = particles.log_w.view(particles.m, runs, -1)[at].clone()
        mixed[:, :, 0] = log_w[:, None]
        log_z = mixed.logsumexp(-1) - math.log(mixed.shape[-1])
        return {p: (float(z.mean()), None) for p, z in zip(at, log_z, strict=True)}
    runs = int(settings["runs"])
    some = target.on([target.problems[p] for p in at])
    held = dataclasses.replace(exact, problem=torch.arange(len(at), device=exact.n.device))
    found = conditional_smc(some, exact=held, n=int(settings["n"]), runs=runs, seed=seed + 1)
    assert found.log_z is not None
    return {p: (float(z.mean()), None) for p, z in zip(at, found.log_z, strict=True)}


def _log_weights(target: Target, policy: FiniteStepper, rows: Rollouts) -> torch.Tensor:
    """log gamma / q of given objects, q teacher-forced."""
    scores = policy.score(rows)
    t = torch.arange(rows.moves.shape[1], device=rows.n.device)
    log_q = torch.where(t < rows.n[:, None], scores.log_q.double(), 0.0).sum(1)
    log_q = log_q + at_end(scores.log_stop, rows.n, rows.stop).double()
    return (target.log_gamma(rows) - log_q).cpu()
