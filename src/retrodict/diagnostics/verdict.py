"""How far a set of particles can be trusted, problem by problem, in numbers and in one word.

A final ESS of N says nothing after a resampling: N copies of one string have it. So the verdict looks at the ESS
*before* each resampling, the surviving roots, the spread of log Z-hat over independent runs and the distinct objects.
It can only lower trust: a mode that no run has found leaves no mark on any number here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from retrodict.diagnostics.bounds import log_z_interval, t_quantile
from retrodict.diagnostics.chains import chain_ess, split_rhat
from retrodict.diagnostics.divergence import normalised, total_variation, tv_bound
from retrodict.diagnostics.weights import (
    ess,
    max_share,
    pareto_k,
    pareto_threshold,
    stage_variance,
    weight_se,
    zero_share,
)
from retrodict.errors import InputError
from retrodict.numerics import jackknife_log_mean
from retrodict.particles import Particles
from retrodict.particles_io import terms_of
from retrodict.records import FREE

if TYPE_CHECKING:
    import rich.text

RELIABLE, CARE, INTERVAL, COLLAPSED, EMPTY = (
    "reliable", "usable with care", "interval unreliable", "collapsed", "no particle has weight",
)  # fmt: skip
VERDICTS = (RELIABLE, CARE, INTERVAL, COLLAPSED, EMPTY)
"""From best to worst."""

RUN_SD = 1.5
"""Nats of spread of log Z-hat over runs above which their mean is ruled by the largest few."""
SHARE = 0.5
"""Share of the pooled evidence that one run or one particle may carry (0.75 for a run where there are 2 or 3)."""
LOW_ESS, CARE_ESS = 2.0, 10.0
CARE_NATS = 1.0
"""Half-width of the 95% interval of log Z above which it is worth a remark."""
CARE_RHAT = 1.05
FEW_RUNS = 4
EXACT = frozenset({"exact", "enumerate"})
"""Methods whose log Z is a sum over every object."""
INDEPENDENT = frozenset({"importance", "rejection"})
"""Methods whose weights are independent draws: one run has an interval too."""
_MAYBE = ("log_z", "se", "low", "high", "runs", "run_sd", "run_share", "roots", "worst_step", "acceptance", "chains",
          "moved", "rhat", "draws", "tv", "tv_limit", "log_z_error")  # fmt: skip
SHOW = 12
"""Problems printed one by one; of more, the worst."""


@dataclass(frozen=True)
class Finding:
    """One thing that was seen: the verdict it leads to, why, and what to try."""

    verdict: str
    reason: str
    advice: str = ""


@dataclass(frozen=True, repr=False)
class Diagnosis:
    """What :func:`diagnose` found. Printing it prints ``lines``.

    Attributes:
        verdict: the worst over the problems, one of VERDICTS; ``reason`` and ``advice`` belong to it.
        verdicts: one a problem.
        flags: every verdict that some finding led to.
        numbers: one mapping a problem (nats; None where the method does not give the number).
        findings: everything seen, one tuple a problem, worst first.
        lines: the report; the last line is the verdict.
    """

    verdict: str
    reason: str
    advice: str
    verdicts: tuple[str, ...]
    flags: frozenset[str]
    numbers: tuple[Mapping[str, Any], ...]
    findings: tuple[tuple[Finding, ...], ...]
    lines: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return "\n".join(self.lines)

    __repr__ = __str__

    def __rich__(self) -> rich.text.Text:
        from rich.text import Text

        colour = {RELIABLE: "green", CARE: "yellow"}.get(self.verdict, "red")
        return Text("\n".join(self.lines[:-1]) + "\n").append(self.lines[-1], style=f"bold {colour}")


def diagnose(
    particles: Particles,
    exact: Particles | Mapping[Any, float] | Sequence[Mapping[Any, float]] | None = None,
    max_moves: int | None = None,
) -> Diagnosis:
    """Numbers and a verdict for each problem, and the worst verdict for all.

    ``exact`` is the truth where it is known: particles of an exact sampler (then log Z is compared too), or one table
    a problem from keys to probabilities. ``max_moves`` is the length limit (default: what the trace says).
    """
    if particles.m == 0:
        raise InputError("there are no problems in these particles, so there is nothing to diagnose")
    limit = max_moves or particles.trace.settings.get("max_moves")
    tables, log_z = _truth(particles, exact)
    numbers, findings = [], []
    for q in range(particles.m):
        x = _numbers(particles, q, limit)
        if tables is not None:
            x |= _against(particles, q, tables[q], None if log_z is None else log_z[q], x)
        found = sorted(_findings(x, particles), key=lambda f: -VERDICTS.index(f.verdict))
        numbers.append(x)
        findings.append(tuple(found))
    verdicts = tuple(f[0].verdict for f in findings)
    worst = max(range(len(verdicts)), key=lambda q: VERDICTS.index(verdicts[q]))
    top = findings[worst][0]
    flags = frozenset(f.verdict for per in findings for f in per)
    lines = _lines(particles, numbers, findings, verdicts)
    return Diagnosis(top.verdict, top.reason, top.advice, verdicts, flags, tuple(numbers), tuple(findings), lines)


def _numbers(p: Particles, q: int, limit: int | None) -> dict[str, Any]:
    """Every number of one problem. Populations in the trace are problem x run; counts are over all problems."""
    log_w, t = p.log_w[q].double().cpu(), p.trace
    counts = p.counts(q)
    x: dict[str, Any] = dict.fromkeys(_MAYBE)
    x |= {"name": (p.names[q] if p.names else "") or str(q), "method": t.method, "k": p.k}
    x |= {"zeros": zero_share(log_w), "ess": float(p.ess[q]), "min_ess": float(p.min_ess[q])}
    x |= {"distinct": len(counts), "top": max(counts.values(), default=0.0), "share": max_share(log_w)}
    x |= {"pareto_k": pareto_k(log_w), "at_limit": _at_limit(p, q, limit)}
    if t.resampled is not None and t.resampled.numel():
        x["resampled"] = bool(t.resampled.reshape(len(t.resampled), p.m, -1)[:, q].any())
    else:
        x["resampled"] = t.ancestors is not None
    if t.ess is not None and t.ess.numel():
        steps = t.ess.reshape(len(t.ess), p.m, -1)[:, q].amin(1)
        x["worst_step"] = (int(steps.argmin()) + 1, len(steps))
    if t.roots is not None and t.roots.numel():
        roots = t.roots.view(p.m, -1)[q].sort().values
        x["roots"] = int(roots[(len(roots) - 1) // 2])
    if p.log_z is not None:
        x |= _evidence(p.log_z[q].double().cpu(), log_w, x, _within(p, q))
    else:
        x |= _mixing(p, q)
    return x


def _within(p: Particles, q: int) -> float:
    """Variance of log Z-hat that the weights of a problem's runs show by themselves, averaged over runs; SMC only."""
    t = p.trace
    if p.log_z is None or t.ess is None or t.resampled is None or not t.ess.numel():
        return 0.0
    count = p.log_z.shape[1]
    if t.ess.shape[1] != p.m * count or t.resampled.shape != t.ess.shape or p.k % count or p.k < 2 * count:
        return 0.0
    runs = slice(q * count, (q + 1) * count)
    log_w = p.log_w[q].view(count, -1).double().cpu()
    return float(stage_variance(t.ess[:, runs].cpu(), t.resampled[:, runs].cpu(), ess(log_w), log_w.shape[1]).mean())


def _evidence(log_z: Tensor, log_w: Tensor, x: Mapping[str, Any], within: float) -> dict[str, Any]:
    runs = len(log_z)
    value, se = (float(v) for v in jackknife_log_mean(log_z))
    if x["method"] in EXACT:
        se = 0.0
    elif runs == 1 and x["method"] in INDEPENDENT:
        se = weight_se(log_w)
    se = se if math.isfinite(se) else math.inf
    half = t_quantile(len(log_w) - 1, 0.95) * se if runs == 1 and 0 < se < math.inf else se
    low, high = (value - half, value + half) if runs == 1 or se == 0 else log_z_interval(log_z, within=within)
    sd = float(log_z.std()) if runs > 1 and bool(log_z.isfinite().all()) else None
    sd = math.inf if runs > 1 and sd is None and math.isfinite(value) else sd
    share = float(torch.softmax(log_z, 0).max()) if runs > 1 and math.isfinite(value) else None
    return {"log_z": value, "se": se, "low": low, "high": high, "runs": runs, "run_sd": sd,
            "run_share": share}  # fmt: skip


def _mixing(p: Particles, q: int) -> dict[str, Any]:
    counts, chains = p.trace.counts, p.chains
    if not counts.get("proposals") or "accepted" not in counts:
        return {}
    out = {"acceptance": counts["accepted"] / counts["proposals"], "chains": chains}
    if "chains_moved" in counts:
        out["moved"] = counts["chains_moved"] / (p.m * chains)
    if p.k % chains:
        return out
    rows = slice(q * p.k, (q + 1) * p.k)
    heaviest = next(iter(p.counts(q)), None)
    told = [p.objects.n[rows].double(), torch.tensor([float(k == heaviest) for k in p.keys[rows]])]
    terms = terms_of(p.objects.take(torch.arange(rows.start, rows.stop, device=p.objects.n.device)))
    told += [v.double() for v in terms.values() if bool(v.isfinite().all())]
    told = [v.cpu().view(chains, -1) for v in told]
    rhats = [r for r in map(split_rhat, told) if not math.isnan(r)]
    if any(map(math.isfinite, rhats)):  # one chain resting on the heaviest object is no sign that all stand still
        rhats = [r for r in rhats if math.isfinite(r)]
    draws = [d for d in map(chain_ess, told) if not math.isnan(d)]
    return out | {"rhat": max(rhats, default=None), "draws": min(draws, default=None)}


def _at_limit(p: Particles, q: int, limit: int | None) -> float | None:
    """Weight of the objects that ran into the length limit; None where objects all have one length by construction.

    At the limit the stop is forced (log q(stop) = 0). A forced stop alone may also be a stop string, so the length
    counts too: the limit's, or the longest there is.
    """
    r, rows = p.objects, torch.arange(q * p.k, (q + 1) * p.k)
    n, kind, can_stop = r.n[rows].cpu(), r.kind[rows].cpu(), r.can_stop[rows].cpu()
    before = torch.arange(can_stop.shape[1]) < n[:, None]
    if not bool((can_stop & before).any()):
        return None
    free = (kind == FREE).sum(1)
    last = r.log_stop[rows].cpu()[torch.arange(len(n)), n]
    at = (last[:, 0] == 0) & (free >= (limit or int(free.max())))
    return float((p.weights[q].cpu() * at).sum())


def _truth(
    p: Particles, exact: Particles | Mapping[Any, float] | Sequence[Mapping[Any, float]] | None
) -> tuple[list[dict[Any, float]] | None, list[float] | None]:
    if exact is None:
        return None, None
    if isinstance(exact, Particles):
        evidence = exact.evidence
        return [exact.counts(q) for q in range(exact.m)], None if evidence is None else evidence[0].tolist()
    tables = [exact] if isinstance(exact, Mapping) else list(exact)
    if len(tables) != p.m:
        raise InputError(f"{len(tables)} exact tables for {p.m} problems; give one a problem")
    return [normalised(t) for t in tables], None


def _against(
    p: Particles, q: int, table: Mapping[Any, float], log_z: float | None, x: Mapping[str, Any]
) -> dict[str, Any]:
    counts, size = p.counts(q), x["draws"] or min(x["ess"], x["min_ess"] * (x["runs"] or 1))
    error = None if log_z is None or x["log_z"] is None else x["log_z"] - log_z
    tv = total_variation(counts, table) if counts else 1.0
    limit = 1e-6 if x["method"] in EXACT else tv_bound(table, size)
    return {"tv": tv, "tv_limit": limit, "tv_draws": size, "log_z_error": error}


def _findings(x: Mapping[str, Any], p: Particles) -> Iterator[Finding]:
    """Everything that speaks against the sample of one problem, and one line for it where nothing does."""
    if x["zeros"] == 1:
        mine = [n.partition(": ")[2] for n in p.trace.notes if n.startswith(f"problem {x['name']}: ")]
        cause = "; ".join(mine or p.trace.notes) or "the sampler did not say which factor"
        yield Finding(EMPTY, f"all {x['k']} weights are zero ({cause})",
                      "more draws, a floor in the target, or a guide that steers around the zeros")  # fmt: skip
        return
    found = list(_evidence_findings(x, p) if x["log_z"] is not None else _chain_findings(x))
    if x["tv"] is not None and x["tv"] > x["tv_limit"]:
        found.append(Finding(CARE, f"total variation {x['tv']:.3f} from the exact posterior is above the "
                             f"{x['tv_limit']:.3f} that chance allows {x['tv_draws']:.0f} draws",
                             "checking for a bias: another target, or a proposal that misses a part"))  # fmt: skip
    error = x["log_z_error"]
    if error is not None and abs(error) > max(4.5 * x["se"], 1e-6):
        found.append(Finding(INTERVAL, f"log Z is off by {error:+.2f} nats, far outside its error of {x['se']:.2f}",
                             "checking for a bias: another target, or a tail that was missed"))  # fmt: skip
    yield from found or [Finding(RELIABLE, _praise(x))]


def _praise(x: Mapping[str, Any]) -> str:
    if x["method"] in EXACT:
        return "every object was enumerated"
    if x["log_z"] is None:
        return f"chains agree (R-hat {x['rhat']:.3f}) on {x['draws']:.0f} effective draws"
    width = (x["high"] - x["low"]) / 2
    return f"log Z is known to ± {width:.2f} nats (95%) and the ESS never fell below {x['min_ess']:.1f}"


def _evidence_findings(x: Mapping[str, Any], p: Particles) -> Iterator[Finding]:
    if x["method"] in EXACT:
        return
    k, runs, independent = x["k"], x["runs"], not x["resampled"]
    more = "more particles, or a guide or an amortized proposal" if independent else "more particles, or a guide"
    if p.trace.settings.get("resampling") == "multinomial":
        more += ", or systematic resampling"
    step = "" if x["worst_step"] is None else f" (step {x['worst_step'][0]} of {x['worst_step'][1]})"
    copies = x["resampled"] and x["roots"] in (0, 1) and x["distinct"] == 1 and x["zeros"] < 1 - 1.5 / k
    if copies:
        yield Finding(COLLAPSED, "every particle is a copy of one object from one root; the final ESS of "
                      f"{x['ess']:.1f} means nothing", more)  # fmt: skip
    if x["roots"] is not None and x["roots"] <= 1 < k:
        yield Finding(INTERVAL, "at most one root is left: all particles of a run descend from one", more)
    if x["min_ess"] < LOW_ESS:
        yield Finding(INTERVAL, f"the ESS fell to {x['min_ess']:.1f}{step}", more)
    if x["run_sd"] is not None and x["run_sd"] > RUN_SD:
        sd = f"by {x['run_sd']:.1f} nats (sd)" if math.isfinite(x["run_sd"]) else "from -inf upwards"
        yield Finding(INTERVAL, f"log Z-hat varies {sd} over {runs} runs, so the largest rules the mean", more)
    if x["run_share"] is not None and x["run_share"] > (SHARE if runs >= FEW_RUNS else 0.75):
        yield Finding(INTERVAL, f"one run of {runs} carries {x['run_share']:.0%} of the evidence", "more runs; " + more)
    if x["share"] > SHARE:
        yield Finding(INTERVAL, f"one particle carries {x['share']:.0%} of the weight", more)
    if not math.isfinite(x["se"]):
        yield Finding(INTERVAL, "one run gives no interval for log Z" if runs == 1 else "the runs give no interval",
                      "8 or more independent runs")  # fmt: skip
    elif 1 < runs < FEW_RUNS:
        yield Finding(CARE, f"{runs} runs give a rough interval", "8 or more independent runs")
    elif (x["high"] - x["low"]) / 2 > CARE_NATS:
        yield Finding(CARE, f"log Z is known only to ± {(x['high'] - x['low']) / 2:.1f} nats (95%)", "more runs")
    if LOW_ESS <= x["min_ess"] < CARE_ESS <= k:
        yield Finding(CARE, f"the ESS fell to {x['min_ess']:.1f}{step}", more)
    if independent and x["pareto_k"] > pareto_threshold(k) and x["ess"] < 0.99 * k:
        verdict = INTERVAL if x["pareto_k"] > 1 else CARE
        yield Finding(verdict, f"the weights have a heavy tail (Pareto k {x['pareto_k']:.2f}, trusted up to "
                      f"{pareto_threshold(k):.2f})", "SMC, or a guided, tempered or amortized proposal")  # fmt: skip


def _chain_findings(x: Mapping[str, Any]) -> Iterator[Finding]:
    longer = "a longer chain, or moves that change less at a time"
    if x["acceptance"] is None:
        yield Finding(CARE, f"{x['method']} gives neither evidence nor acceptance: nothing here says how far the "
                      "sample is from the posterior", "importance, smc or mh on the same target")  # fmt: skip
        return
    if x["acceptance"] == 0:
        yield Finding(COLLAPSED, "no proposal was accepted", longer)
    if x["distinct"] == 1 and x["k"] > 1:
        yield Finding(CARE if x["chains"] and x["chains"] > 1 else COLLAPSED, "every draw is the same object: a "
                      "stuck chain and a concentrated posterior look alike", "chains from several starts")  # fmt: skip
    if x["rhat"] is None:
        yield Finding(CARE, "too few states of each chain are kept to see whether the chains agree", "keep=8 or more")
    elif math.isinf(x["rhat"]):
        yield Finding(COLLAPSED, "the chains stand still at different objects", longer)
    elif x["rhat"] > CARE_RHAT:
        yield Finding(CARE, f"the chains have not mixed over what was kept (R-hat {x['rhat']:.2f})", longer)
    if x["acceptance"] > 0 and x["moved"] is not None and x["moved"] < 0.9:
        yield Finding(CARE, f"{1 - x['moved']:.0%} of the chains never left their start", longer)
    if 0 < x["acceptance"] < 0.01:
        yield Finding(CARE, f"only {x['acceptance']:.2%} of the proposals were accepted", longer)
    if x["draws"] is not None and x["draws"] < 10 * CARE_ESS and x["draws"] < x["k"] / 2:
        yield Finding(CARE, f"{x['k']} draws are worth {x['draws']:.0f} independent ones", "a longer chain")


def _lines(
    p: Particles, numbers: list[dict[str, Any]], findings: list[tuple[Finding, ...]], verdicts: tuple[str, ...]
) -> list[str]:
    order = sorted(range(p.m), key=lambda q: -VERDICTS.index(verdicts[q]))
    shown = sorted(order[:SHOW])
    lines = []
    for q in shown:
        lines += [f"{numbers[q]['name']}: {_line(numbers[q])}"]
        lines += [f"  - {f.reason}" for f in findings[q] if p.m == 1 and f.verdict != RELIABLE]
        lines += [f"  {verdicts[q]}: {findings[q][0].reason}"] if p.m > 1 else []
        if (numbers[q]["at_limit"] or 0) > 0.5:
            lines.append(f"  hint: {numbers[q]['at_limit']:.0%} of the weight ends at the length limit; is it meant?")
    if p.m > SHOW:
        tally = ", ".join(f"{verdicts.count(v)} {v}" for v in reversed(VERDICTS) if v in verdicts)
        lines.append(f"{p.m} problems ({tally}); the {SHOW} worst are shown")
    said = "\n".join(lines)
    lines += [f"note: {note}" for note in p.trace.notes if (note.partition(": ")[2] or note) not in said]
    top = findings[order[0]][0]
    where = f" [{numbers[order[0]]['name']}]" if p.m > 1 else ""
    lines.append(f"{top.verdict}{where}: {top.reason}" + (f". Try {top.advice}." if top.advice else "."))
    return lines


def _line(x: Mapping[str, Any]) -> str:
    parts = []
    if x["log_z"] is not None:
        interval = f" [{x['low']:.2f}, {x['high']:.2f}]" if math.isfinite(x["se"]) else " [no interval]"
        runs = f" over {x['runs']} runs" if x["runs"] > 1 else ""
        spread = f" (sd {x['run_sd']:.2f})" if x["run_sd"] is not None else ""
        parts.append(f"log Z {x['log_z']:.2f}{interval}{runs}{spread}")
        if x["method"] not in EXACT:
            parts.append(f"ESS min {x['min_ess']:.1f}, final {x['ess']:.1f} of {x['k']}")
    else:
        parts.append(f"{x['k']} draws")
        if x["acceptance"] is not None:
            parts.append(f"acceptance {x['acceptance']:.1%}")
        if x["rhat"] is not None:
            parts.append(f"R-hat {x['rhat']:.3f} ({x['chains']} chain{'s' * (x['chains'] > 1)})")
        parts += [f"worth {x['draws']:.0f}"] if x["draws"] is not None else []
    parts += [f"{x['roots']} roots a run"] if x["roots"] is not None else []
    parts.append(f"{x['distinct']} distinct (heaviest {x['top']:.0%})")
    if x["log_z"] is not None and x["method"] not in EXACT:
        parts.append(f"largest weight {x['share']:.0%}")
        parts += [f"Pareto k {x['pareto_k']:.2f}"] if not (x["resampled"] or math.isnan(x["pareto_k"])) else []
        parts += [f"{x['zeros']:.0%} of weight zero"] if x["zeros"] > 0 else []
    parts += [f"{x['at_limit']:.0%} at the length limit"] if x["at_limit"] else []
    if x["tv"] is not None:
        parts.append(f"total variation {x['tv']:.3f} (chance allows {x['tv_limit']:.3f})")
    parts += [f"log Z off by {x['log_z_error']:+.2f}"] if x["log_z_error"] is not None else []
    return ", ".join(parts)
