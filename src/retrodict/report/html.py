"""report.html: one self-contained page from a run folder, without the model that made it."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from retrodict.diagnostics.diversity import distinct_n, edit_distance, effective_distinct, length_histogram
from retrodict.diagnostics.verdict import CARE, RELIABLE, Diagnosis, diagnose
from retrodict.particles import Particles
from retrodict.particles_io import names_of, terms_of, write_atomically
from retrodict.report import svg
from retrodict.report.learning import learning
from retrodict.report.page import details, figure, page, table, text, texts
from retrodict.report.run import Run, read
from retrodict.report.svg import esc
from retrodict.rng import generator

BEST, FEWER, SECTIONS, OPEN, ROWS = 5, 3, 12, 2, 40
LEADS = {
    "infill": "What stands in the gap: texts drawn in proportion to p(text | before) · p(after | before, text).",
    "continuation": "Continuations of a prompt, whole texts drawn in proportion to their probability.",
    "of_length": "Texts of one exact length, drawn in proportion to their probability among those.",
    "including": "Texts under a condition on their words, drawn in proportion to their probability among those.",
    "scored": "Texts drawn in proportion to the model's probability times a verifier's score.",
    "posterior": "Latent texts drawn in proportion to p(text | context) · p(evidence | context, text).",
}
GUIDE = (
    ("log evidence (log Z)", "The logarithm of the total weight of all texts that the target allows: how probable what "
     "was observed is under the model. Methods that estimate it without bias must agree on it. The bar is a 95% "
     "interval from independent runs; ⊏ marks a lower bound (the mean over runs of log Ẑ), ⊐ an upper bound, which "
     "needs an exact posterior sample."),
    ("ESS", "Effective sample size: how many equally weighted draws the weighted ones are worth. It is taken before "
     "each resampling, since afterwards it says N however few distinct texts are left."),
    ("lineages", "In SMC, poor beginnings die and good ones are copied. If all final texts descend from one beginning, "
     "one run says little about the others, and its interval less."),
    ("distinct and effective texts", "How many different texts have weight, and how many equally likely ones their "
     "weights amount to."),
    ("verdict", "Can only lower trust: a kind of text that no run has found leaves no mark on any number here."),
)  # fmt: skip


def write(folder: str | os.PathLike[str]) -> Path:
    """(Re)build a run folder's report.html; an unreadable file in it raises InputError and leaves the old page."""
    run = read(folder)
    return write_atomically(run.path / "report.html", render(run).encode("utf-8", "replace"))


def render(run: Run) -> str:
    """The page."""
    found = {m: diagnose(p) for m, p in run.methods.items()}
    names = next((names_of(p) for p in run.methods.values()), [])
    title = str(run.config.get("name") or run.config.get("target") or run.path.name)
    parts = [_head(run, title), _status(run), _verdicts(found, run), _overview(run, found), learning(run.training)]
    told = {str(x.get("name")): x for x in run.problems}
    for q, name in enumerate(names[:SECTIONS]):
        methods = {m: p for m, p in run.methods.items() if q < p.m}
        body = _problem(methods, found, q, told.get(name, {}), run)
        many = len(names) > 1
        parts.append(details(name, body, q < OPEN, "problem") if many else f"<h2>{esc(name)}</h2>{body}")
    if len(names) > SECTIONS:
        parts.append(
            f'<p class="soft">{len(names) - SECTIONS} more problems are in samples.jsonl and metrics.jsonl.</p>'
        )
    parts += [_failures(run), _record(run)]
    return page(f"{title} – retrodict", "\n".join(x for x in parts if x))


# -- the top --------------------------------------------------------------------------------------------------------


def _head(run: Run, title: str) -> str:
    c, model = run.config, run.environment.get("model") or {}
    said = str(model.get("name") or c.get("model") or "")
    if model.get("dtype"):
        said += f" ({model['dtype']} on {model.get('device', 'cpu')})"
    extra = []
    for key, words in (("contain", "must contain {}"), ("avoid", "must not contain {}")):
        if c.get(key):
            extra.append(words.format(", ".join(map(str, c[key]))))
    if c.get("short_words"):
        extra.append(f"no word over {c['short_words']} letters")
    if c.get("verifier"):
        extra.append(f"weighed by the verifier {c['verifier']}")
    if c.get("temperature", 1.0) != 1.0:
        extra.append(f"at temperature {c['temperature']:g} of the whole text")
    lead = str(c.get("about") or LEADS.get(str(c.get("target")), "Texts drawn in proportion to their posterior."))
    more = f" {'; '.join(extra)[:1].upper()}{'; '.join(extra)[1:]}." if extra else ""
    began = str(run.status.get("began", ""))[:10]
    kicker = " · ".join(x for x in ("retrodict", said, began) if x)
    return f'<p class="kicker">{esc(kicker)}</p><h1>{esc(title)}</h1><p class="lead">{esc(lead + more)}</p>'


def _status(run: Run) -> str:
    status, message = str(run.status.get("status", "")), str(run.status.get("message", ""))
    if status in ("complete", ""):
        return ""
    what = {
        "interrupted": "Interrupted. What had finished by then is shown.",
        "running": "Not finished, or stopped from outside. What had finished by then is shown.",
        "failed": "Stopped by an error. What had finished by then is shown.",
    }.get(status, status)
    return f'<p><span class="badge bad">{esc(status)}</span>{esc(what)} {esc(message)}</p>'


def _badge(verdict: str) -> str:
    kind = {RELIABLE: "good", CARE: "care"}.get(verdict, "bad")
    return f'<span class="badge {kind}">{esc(verdict)}</span>'


def _verdicts(found: Mapping[str, Diagnosis], run: Run) -> str:
    if not found:
        return "" if run.training else '<p class="soft">No method had finished anything.</p>'
    items = []
    for method, d in found.items():
        where = f" [{d.numbers[d.verdicts.index(d.verdict)]['name']}]" if len(d.verdicts) > 1 else ""
        advice = f' <span class="soft">Try {esc(d.advice)}.</span>' if d.advice else ""
        why = d.reason.removeprefix(f"{d.numbers[0]['method']} ")
        why = esc(why[:1].upper() + why[1:] + where)
        items.append(f"<li><b>{esc(method)}</b> {_badge(d.verdict)}{why}.{advice}</li>")
    return f'<ul class="verdicts">{"".join(items)}</ul>'


def _overview(run: Run, found: Mapping[str, Diagnosis]) -> str:
    cells = run.comparison.get("cells")
    if cells:
        note = "".join(f'<p class="soft">{esc(n)}.</p>' for n in run.comparison.get("notes") or ())
        formula = str(run.comparison.get("formula") or "").replace("*", "×")
        name = f"<h3>Side by side{f', γ = {esc(formula)}' if formula else ''} (in nats)</h3>"
        if len(cells) > ROWS:
            cells = [cells[0], *(r for r in cells[1:] if str(r[0]).startswith("mean of"))]
        return name + _table(cells[0], cells[1:], ("problem", "method", "best")) + note
    rows = []
    for method, d in found.items():
        counts = run.methods[method].trace.counts
        for x, verdict in list(zip(d.numbers, d.verdicts, strict=True))[:ROWS]:
            z = "--" if x["log_z"] is None else _span(x["log_z"], x["low"], x["high"])
            size = "--" if x["log_z"] is None else f"{x['min_ess']:.1f}"
            rows.append([x["name"], method, z, size, f"{x['distinct']}", f"{counts.get('seconds', 0):.1f}", verdict])
    head = ["problem", "method", "log Z [95%]", "min ESS", "distinct", "seconds", "verdict"]
    return "<h3>In numbers (nats)</h3>" + _table(head, rows, ("problem", "method", "verdict")) if rows else ""


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], words: Sequence[str]) -> str:
    """A table without the columns that say nothing: a problem's name where there is one, numbers nobody gives."""
    keep = [i for i, name in enumerate(head) if {r[i] for r in rows} - {"--", ""}
            and not (name == "problem" and len({r[i] for r in rows}) == 1)]  # fmt: skip
    short = [j for j, i in enumerate(keep) if head[i] in words]
    wide = [j for j, i in enumerate(keep) if head[i] == "best"]
    return table([head[i] for i in keep], [[str(r[i]) for i in keep] for r in rows], short, wide)


def _span(value: float, low: float, high: float) -> str:
    if not math.isfinite(low) or not math.isfinite(high):
        return f"{value:.2f}"
    return f"{value:.2f}" if low == high else f"{value:.2f} [{low:.2f}, {high:.2f}]"


# -- one problem ----------------------------------------------------------------------------------------------------


def _problem(
    methods: Mapping[str, Particles], found: Mapping[str, Diagnosis], q: int, told: Mapping[str, Any], run: Run
) -> str:
    out = []
    if told.get("context") or told.get("evidence"):
        out.append(f'<div class="story">{text(str(told.get("context", "")))}<span class="gap">…</span>'
                   f"{text(str(told.get('evidence', '')))}</div>")  # fmt: skip
    fills = {m: svg.colour(i) for i, m in enumerate(methods)}
    out += [_texts(m, p, q, BEST if len(methods) < 3 else FEWER) for m, p in methods.items()]
    out.append(f'<div class="figures">{_figures(methods, found, q, fills, run)}</div>')
    out.append(_diversity(methods, q))
    lines = "\n\n".join(f"{m}\n{_said(d, q)}" for m, d in found.items() if m in methods)
    out.append(details("The diagnosis in full", f"<pre>{esc_lines(lines)}</pre>"))
    return "".join(out)


def esc_lines(s: str) -> str:
    """Escaped text that keeps its line ends."""
    return "\n".join(map(esc, s.split("\n")))


def _said(d: Diagnosis, q: int) -> str:
    if len(d.verdicts) == 1:
        return "\n".join(d.lines)
    return "\n".join([*(f"- {f.reason}" for f in d.findings[q]), d.verdicts[q]])


def _texts(method: str, p: Particles, q: int, few: int) -> str:
    """The heaviest texts and some of the others, drawn by weight, with the log-value of each factor."""
    start = q * p.k
    share = p.counts(q)
    if not share:
        return f'<h3>{esc(method)}</h3><p class="soft">No text has weight.</p>'
    terms = {k: v.tolist() for k, v in sorted(terms_of(p.objects).items(), key=lambda x: (x[0] != "prior", x[0]))}
    first = {k: i for i, k in reversed(list(enumerate(p.keys[start : start + p.k])))}

    def row(key: tuple[int, ...]) -> tuple[str, str, str]:
        at = start + first[key]
        small = " · ".join(f"log {k} {v[at]:.1f}".replace("-", "−") for k, v in terms.items())
        return f"{share[key]:.1%}", p.shown[at], small

    rest = list(share)[few:]
    weights = torch.tensor([share[k] for k in rest], dtype=torch.float64)
    drawn = weights.multinomial(min(few, len(rest)), generator=generator(0)).tolist() if rest else []
    size = f"{len(share)} distinct text{'s' * (len(share) != 1)} in {p.k} draws"
    others = "Others, drawn by weight" if drawn else ""
    return (f'<h3>{esc(method)} <span class="soft">{size}</span></h3><div class="halves">'
            f'<div class="half"><h4>Heaviest, with their weight</h4>{texts([row(k) for k in list(share)[:few]])}</div>'
            f'<div class="half"><h4>{others}</h4>{texts([row(rest[i]) for i in drawn])}</div></div>')  # fmt: skip


def _figures(
    methods: Mapping[str, Particles], found: Mapping[str, Diagnosis], q: int, fills: Mapping[str, str], run: Run
) -> str:
    rows = [_interval(m, p, found[m], q, fills[m], run) for m, p in methods.items()]
    without = [r.name for r in rows if r.value is None]
    rows = [r for r in rows if r.value is not None]
    told = "Dot and bar: estimate with 95% interval. Ticks: single runs; ⊏ marks the lower bound"
    told += ", ⊐ the upper." if any(r.upper for r in rows) else "."
    told += f" {', '.join(without)} give{'s' * (len(without) == 1)} no estimate." if without else ""
    out = [figure("Evidence", svg.evidence(rows), esc(told))]
    for m, p in methods.items():
        out += _steps(m, p, q, fills[m], len(methods) > 1)
    shares = [(m, list(p.counts(q).values()), fills[m]) for m, p in methods.items()]
    shares = [x for x in shares if x[1]]
    if shares:
        names = svg.legend([(m, fill) for m, _, fill in shares]) if len(shares) > 1 else ""
        told = "Weight on the heaviest 1, 2, 3, … distinct texts. High on the left: few texts carry it all."
        out.append(figure("Concentration", svg.concentration(shares) + names, told))
        strips = [(m, length_histogram(p.objects.n[q * p.k : (q + 1) * p.k], p.weights[q]).tolist(), fills[m])
                  for m, p in methods.items() if bool((p.weights[q] > 0).any())]  # fmt: skip
        out.append(figure("Length", svg.lengths(strips), "Share of the weight at each length."))
    return "".join(out)


def _interval(m: str, p: Particles, d: Diagnosis, q: int, fill: str, run: Run) -> svg.Interval:
    x = d.numbers[q]
    if p.log_z is None or x["log_z"] is None:
        return svg.Interval(m, fill)
    if not math.isfinite(x["log_z"]):
        return svg.Interval(m, fill, -math.inf, note="every weight is zero")
    runs = p.log_z[q].tolist()
    lower = None
    if len(runs) > 1 and all(map(math.isfinite, runs)):
        lower = (float(p.log_z[q].mean()), float(p.log_z[q].std()) / math.sqrt(len(runs)))
    upper = None
    for row in run.comparison.get("rows") or ():
        if row.get("method") == m and row.get("problem") == x["name"] and row.get("upper") is not None:
            upper = (float(row["upper"]), float(row.get("upper_se") or 0.0))
    return svg.Interval(m, fill, x["log_z"], x["low"], x["high"], runs if len(runs) > 1 else (), lower, upper)


def _steps(m: str, p: Particles, q: int, fill: str, named: bool) -> list[str]:
    """ESS and lineages of a method that works step by step."""
    t, suffix = p.trace, f" of {m}" if named else ""
    out = []
    if t.ess is not None and t.ess.numel():
        per = t.ess.shape[1] // p.m
        mine = slice(q * per, (q + 1) * per)
        n = int(t.ancestors.shape[2] if t.ancestors is not None else t.settings.get("n") or p.k)
        did = t.resampled[:, mine].T.tolist() if t.resampled is not None else [[False] * len(t.ess)] * per
        share = t.settings.get("ess_threshold")
        mark = n * float(share) if isinstance(share, (int, float)) and share > 0 else None
        told = "One line a run. " * (per > 1) + "Circles: then resampled" + "; dashed: the threshold" * bool(mark) + "."
        out.append(
            figure(f"ESS{suffix} before each resampling", svg.ess(t.ess[:, mine].T.tolist(), did, n, mark, fill), told)
        )
        if t.ancestors is not None and t.ancestors.numel():
            k = t.ancestors.shape[2]
            alive = (p.weights[q] > 0).view(-1, k)[0].tolist() if p.k % k == 0 else [True] * k
            roots = (
                ""
                if t.roots is None
                else f" In {per} runs, {_few(t.roots[mine].tolist())} of {k} first particles have any."
            )
            told = f"Dark: beginnings that have final texts as descendants; faint: those that died.{roots}"
            out.append(figure(f"Lineages{suffix}{', first run' if per > 1 else ''}",
                              svg.ancestry(t.ancestors[:, q * per].tolist(), alive, fill), told))  # fmt: skip
    return out


def _few(x: Sequence[int]) -> str:
    return f"{min(x)}" if min(x) == max(x) else f"{min(x)} to {max(x)}"


def _diversity(methods: Mapping[str, Particles], q: int) -> str:
    rows = []
    for m, p in methods.items():
        at = slice(q * p.k, (q + 1) * p.k)
        ids = [k[:-1] for k in p.keys[at]]
        w = p.weights[q]
        if not bool((w > 0).any()):
            continue
        n = float((w * p.objects.n[at].double()).sum())
        kept = [s for s, x in zip(ids, w.tolist(), strict=True) if x > 0]
        effective, far = effective_distinct(p.counts(q)), float(edit_distance(ids, w))
        rows.append([m, f"{p.distinct(q)} of {p.k}", f"{effective:.1f}", f"{distinct_n(kept, 2):.2f}", f"{far:.2f}",
                     f"{n:.1f}"])  # fmt: skip
    head = ["method", "distinct", "effective", "distinct pairs", "edit distance", "mean tokens"]
    told = ('<p class="soft">Distinct pairs: different neighbouring tokens over all. Edit distance: of two texts drawn '
            "by weight, as a share of the longer; 0 where they are the same.</p>")  # fmt: skip
    return f"<h3>Diversity</h3>{table(head, rows)}{told}" if rows else ""


# -- the end --------------------------------------------------------------------------------------------------------


def _failures(run: Run) -> str:
    if not run.failures:
        return ""
    rows = [(str(x.get("method", "")), str(x.get("text", "")), str(x.get("message", ""))) for x in run.failures[:20]]
    return "<h2>Texts the verifier failed on</h2>" + texts(rows)


def _record(run: Run) -> str:
    guide = "".join(f"<dt>{esc(k)}</dt><dd>{esc(v)}</dd>" for k, v in GUIDE)
    config = yaml.safe_dump(dict(run.config), sort_keys=False, allow_unicode=True, width=100)
    env = json.dumps(dict(run.environment), indent=1, ensure_ascii=False)
    return ("<h2>How it was made</h2>"
            + details("How to read this page", f"<dl>{guide}</dl>")
            + details("The recipe in full (config.yaml)", f"<pre>{esc_lines(config)}</pre>")
            + details("Where it ran (environment.json)", f"<pre>{esc_lines(env)}</pre>")
            + f"<footer>Made from the run folder {esc(run.path.resolve().name)}; "
            "<code>retrodict report</code> builds it again.</footer>")  # fmt: skip
