"""The frame of a report page: its style, tables and texts. Self-contained: nothing is fetched, nothing runs."""

from __future__ import annotations

from collections.abc import Sequence

from retrodict.report.svg import esc

STYLE = """
:root { color-scheme: light; --ink: #1f2328; --soft: #57606a; --line: #e1e4e8; --paper: #fff; --wash: #f6f7f9;
  --sans: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  --serif: Charter, "Bitstream Charter", "Iowan Old Style", Georgia, Cambria, serif; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.55 var(--sans); overflow-wrap: anywhere; }
main { max-width: 1240px; margin: 0 auto; padding: 2.2rem 1.2rem 4rem; }
h1 { font: 600 1.9rem/1.2 var(--serif); margin: 0 0 .5rem; }
h2 { font: 600 1.35rem/1.3 var(--serif); margin: 2.6rem 0 .7rem; padding-top: 1.1rem;
  border-top: 1px solid var(--line); }
h3 { font-size: .95rem; margin: 1.6rem 0 .5rem; }
p { margin: .5rem 0; max-width: 46rem; }
.kicker { color: var(--soft); font-size: .85rem; margin: 0 0 .3rem; }
.lead { font: 1.08rem/1.6 var(--serif); }
.soft, figcaption { color: var(--soft); font-size: .88rem; }
.story { font: 1.12rem/1.7 var(--serif); background: var(--wash); border-radius: 6px; padding: .9rem 1.1rem;
  white-space: pre-wrap; max-width: 46rem; }
.gap { background: #fde9a9; border-radius: 3px; padding: .1em .5em; }
.verdicts { list-style: none; padding: 0; margin: 1rem 0; max-width: 46rem; }
.verdicts li { margin: .45rem 0; }
.badge { display: inline-block; border-radius: 4px; padding: .05rem .5rem; font-size: .85rem; font-weight: 600;
  margin-right: .35rem; white-space: nowrap; }
.good { background: #dcf3e3; color: #10562c; } .care { background: #fdeebb; color: #6b4a00; }
.bad { background: #fde0dc; color: #8c1d10; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; width: 100%; margin: .4rem 0 1rem; }
th { text-align: left; font-weight: 600; color: var(--soft); font-size: .8rem; white-space: nowrap; }
th, td { padding: .38rem .8rem .38rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td.w { white-space: nowrap; } td.wrap { min-width: 12rem; }
td.t { font: 1rem/1.5 var(--serif); white-space: pre-wrap; overflow-wrap: anywhere; min-width: 11rem; width: 100%; }
td.t small { display: block; color: var(--soft); font: .78rem/1.4 var(--sans); }
table.texts { table-layout: auto; } table.texts td.n { width: 4.2rem; }
.nl { color: #9aa3ad; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 400px), 1fr)); gap: 1.4rem 2rem;
  margin: 1.2rem 0; }
figure { margin: 0; max-width: 480px; }
figure svg { width: 100%; height: auto; display: block; font: 12px var(--sans); }
figure h4, .half h4 { margin: 0 0 .3rem; font-size: .92rem; }
figcaption { margin-top: .3rem; }
.legend { font-size: .85rem; margin: .3rem 0; } .legend span { margin-right: 1rem; white-space: nowrap; }
.legend i { display: inline-block; width: .75em; height: .75em; border-radius: 2px; margin-right: .35em; }
.halves { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 400px), 1fr)); gap: 0 2rem; }
details { margin: .8rem 0; } summary { cursor: pointer; font-weight: 600; font-size: .95rem; }
details.problem { margin: 2rem 0; padding-top: 1rem; border-top: 1px solid var(--line); }
details.problem > summary { font: 600 1.25rem/1.3 var(--serif); margin-bottom: .8rem; }
pre { background: var(--wash); border-radius: 6px; padding: .8rem 1rem; overflow-x: auto; font-size: .82rem;
  line-height: 1.5; white-space: pre-wrap; }
dt { font-weight: 600; margin-top: .6rem; } dd { margin: .1rem 0 0; max-width: 46rem; }
footer { margin-top: 3rem; color: var(--soft); font-size: .82rem; }
@media (max-width: 560px) { body { font-size: 15px; } main { padding: 1.3rem .9rem 3rem; } h1 { font-size: 1.55rem; } }
@media print { details { display: block; } main { max-width: none; } }
"""


def page(title: str, body: str) -> str:
    """A whole document. Its policy lets a browser fetch nothing."""
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        f"<title>{esc(title)}</title><style>{STYLE}</style></head>\n<body><main>\n{body}\n</main></body></html>\n"
    )


def text(s: str, limit: int = 1200) -> str:
    """A drawn text: escaped, line ends marked, cut where it is very long."""
    cut = s if len(s) <= limit else s[:limit] + " …"
    return '<span class="nl">↵</span>\n'.join(esc(line) for line in cut.replace("\r\n", "\n").split("\n"))


def table(
    head: Sequence[str], rows: Sequence[Sequence[str]], words: Sequence[int] = (0,), wide: Sequence[int] = ()
) -> str:
    """A table of numbers; columns in ``words`` are words, those in ``wide`` whole texts. Cells are escaped."""

    def cells(row: Sequence[str], tag: str) -> str:
        kinds = ["wrap" if i in wide else "w" if i in words else "n" for i in range(len(row))]
        return "".join(f'<{tag} class="{k}">{esc(c)}</{tag}>' for k, c in zip(kinds, row, strict=True))

    body = "".join(f"<tr>{cells(r, 'td')}</tr>" for r in rows)
    return f'<div class="wide"><table><thead><tr>{cells(head, "th")}</tr></thead><tbody>{body}</tbody></table></div>'


def texts(rows: Sequence[tuple[str, str, str]]) -> str:
    """A table of drawn texts: a number, the text (less the space most begin with), and a small line below it."""
    body = "".join(
        f'<tr><td class="n">{esc(share)}</td><td class="t">{text(s.removeprefix(" ")) or "<i>(nothing)</i>"}'
        f"{f'<small>{esc(small)}</small>' if small else ''}</td></tr>"
        for share, s, small in rows
    )
    return f'<table class="texts">{body}</table>' if rows else ""


def figure(name: str, svg: str, caption: str) -> str:
    """A plot with its name above and what it shows below; nothing where there is no plot."""
    return f"<figure><h4>{esc(name)}</h4>{svg}<figcaption>{caption}</figcaption></figure>" if svg else ""


def details(summary: str, body: str, opened: bool = False, kind: str = "more") -> str:
    """A part that folds."""
    return f'<details class="{kind}"{" open" if opened else ""}><summary>{esc(summary)}</summary>{body}</details>'
