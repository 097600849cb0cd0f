"""The report page: self-contained, well-formed, every text escaped, and honest about what is not known."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import pytest
import torch

import retrodict as rd
from retrodict.report import svg
from retrodict.report.compare import compare
from retrodict.report.html import render
from retrodict.report.page import text
from retrodict.report.run import RunFolder, read
from retrodict.targets.simulate import simulate

VOID = {"meta", "link", "br", "img", "input", "hr"}
EVIL = "<script>alert('x')</script>&\"\u202e\x1b[31m\ud800"


class Checker(HTMLParser):
    """Tags must nest; what is shown is collected."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.links: list[str] = []
        self.shown: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.links += [v or "" for k, v in attrs if k in ("src", "href", "xlink:href", "action", "srcset")]
        assert not any(k.startswith("on") for k, _ in attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.add(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, (tag, self.getpos())

    def handle_data(self, data):
        if "style" not in self.open:
            self.shown.append(data)


def checked(page: str) -> str:
    """The visible text of a page that is well-formed and fetches nothing."""
    c = Checker()
    c.feed(page)
    c.close()
    assert not c.open and not c.links and not c.tags & {"script", "link", "img", "iframe", "object", "embed"}
    assert (
        not re.search(r"https?:|//", re.sub(r"<pre>.*?</pre>", "", page, flags=re.S))
        and "url(" not in page
        and "@import" not in page
    )
    for found in re.findall(r"<svg.*?</svg>", page, re.S):
        ET.fromstring(found)
        assert "nan" not in re.sub(r"<title>.*?</title>", "", found).lower() and "inf," not in found
    return " ".join(" ".join(c.shown).split())


def page_of(tmp_path, methods, target=None, config=None, exact=None, status="complete", problems=()) -> str:
    folder = RunFolder.create(tmp_path, "x", config or {"target": "infill", "name": "x"}, problems)
    for name, p in methods.items():
        folder.put(name, p)
    if target is not None:
        folder.comparison(compare(target, methods, exact=exact))
    folder.close(status, "why")
    page = (folder.path / "report.html").read_text()
    assert page == render(read(folder.path))
    return page


@pytest.fixture(scope="module")
def target():
    return rd.infill(rd.TinyLM(".abc <>&\n", seed=1), "ab", "<c.", stop=".", max_tokens=6, join="")


def test_all_methods_on_one_page(tmp_path, target):
    methods = {
        "ancestral": rd.ancestral(target, n=16, seed=0), "best_of_n": rd.best_of_n(target, n=4, seed=0, draws=4),
        "importance": rd.importance(target, n=16, seed=0), "mh": rd.mh(target, n=4, seed=0, steps=20),
        "smc": rd.smc(target, n=16, seed=0, runs=3), "rejection": rd.rejection(target, n=64, seed=0),
    }  # fmt: skip
    told = [{"name": "story", "context": "ab", "evidence": "<c."}]
    shown = checked(page_of(tmp_path, methods, target, problems=told))
    for words in ("Evidence", "ESS of smc before each resampling", "Lineages of smc", "Concentration", "Length",
                  "Diversity", "Heaviest, with their weight", "ab", "<c.", "ancestral, best_of_n, mh give no estimate",
                  "How to read this page", "config.yaml"):  # fmt: skip
        assert words in shown, words
    for name, p in methods.items():
        assert rd.diagnose(p).verdict in shown, name


def test_two_sided_bounds_are_drawn(tmp_path, target):
    simulated, exact = simulate(target, 2, 0, tokens=3)
    methods = {"smc": rd.smc(simulated, n=8, seed=0), "importance": rd.importance(simulated, n=8, seed=0)}
    page = page_of(tmp_path, methods, simulated, exact=exact)
    shown = checked(page)
    assert "⊐ the upper" in shown and "simulated 2" in shown
    assert page.count("upper bound -") == 4 and page.count('<details class="problem"') == 2


def test_every_text_is_escaped(tmp_path, target):
    import dataclasses

    p = rd.importance(target, n=4, seed=0)
    evil = dataclasses.replace(p, shown=tuple(f"{EVIL}{i}" for i in range(p.k)), names=(EVIL,))
    evil = dataclasses.replace(evil, trace=dataclasses.replace(p.trace, notes=(EVIL,)))
    config = {"target": EVIL, "name": "x", "about": EVIL, "verifier": EVIL, "contain": [EVIL]}
    folder = RunFolder.create(tmp_path, "x", config, [{"name": EVIL, "context": EVIL, "evidence": EVIL}])
    folder.put("importance", evil)
    folder.failure("importance", EVIL, EVIL)
    folder.close("failed", EVIL)
    page = (folder.path / "report.html").read_text()
    assert "<script>alert('x')</script>" in checked(page)  # shown, not run
    assert "\u202e" not in page and "\x1b" not in page


def test_no_weight_no_methods_and_one_text(tmp_path, target):
    zero = target * rd.verifier(lambda texts, rows: [False] * len(texts), kind="bool")
    shown = checked(page_of(tmp_path, {"smc": rd.smc(zero, n=4, seed=0), "mh": rd.mh(zero, n=2, seed=0, steps=20)}))
    assert "no particle has weight" in shown and "the factor 'verifier' is zero" in shown
    assert "No method had finished anything" in checked(page_of(tmp_path, {}, status="interrupted"))
    one = rd.of_length(rd.TabularLM.random(".a", seed=0), "a", tokens=1)
    checked(page_of(tmp_path, {"exact": rd.exact(one), "smc": rd.smc(one, n=2, seed=0, runs=1)}, one))


def test_many_problems_stay_readable(tmp_path):
    lm = rd.TabularLM.random(".ab<", seed=3)
    data = [rd.TextProblem("ab"[: 1 + i % 2], "<", name=f"p{i}", chat=False) for i in range(30)]
    many = rd.posterior(lm, data, stop=".", max_tokens=3)
    methods = {"importance": rd.importance(many, n=4, seed=0), "smc": rd.smc(many, n=4, seed=0)}
    page = page_of(tmp_path, methods, many)
    assert "18 more problems" in checked(page) and len(page) < 500_000 and page.count("<svg") <= 12 * 5


def test_texts_show_line_ends_and_are_cut():
    assert text("a\nb") == 'a<span class="nl">↵</span>\nb'
    assert len(text("x" * 5000)) < 1300
    assert text("\x07<") == "\ufffd&lt;"


# -- plots ----------------------------------------------------------------------------------------------------------


def test_lineages_mark_exactly_the_ancestors_of_what_is_alive():
    parents = [[0, 0, 2], [0, 1, 1]]  # final slot 0 <- 0 <- 0; slots 1, 2 <- 1 <- 0
    assert "1 of 3 first particles" in svg.ancestry(parents, [True, True, True], "#000")
    assert "1 of 3 first particles" in svg.ancestry(parents, [True, False, False], "#000")
    assert "3 of 3 first particles" in svg.ancestry([[0, 1, 2]], [True, True, True], "#000")
    assert "0 of 3 first particles" in svg.ancestry([[0, 1, 2]], [False, False, False], "#000")


def test_lineages_agree_with_the_roots_of_a_run(target):
    p = rd.smc(target, n=12, seed=4, runs=3)
    t = p.trace
    assert t.ancestors is not None and t.roots is not None
    for run in range(3):
        alive = (p.weights[0] > 0).view(3, 12)[run].tolist()
        plot = svg.ancestry(t.ancestors[:, run].tolist(), alive, "#000")
        assert f"{int(t.roots[run])} of 12 first particles" in plot


@pytest.mark.parametrize("low, high", [(0, 1), (-31.2, -28.9), (0, 1e-9), (3, 3), (-1e6, 1e6), (0, 7)])
def test_ticks_are_round_and_inside(low, high):
    found = svg.ticks(low, high)
    assert len(found) <= 6 and all(low - 1e-6 <= t <= high + 1e-6 for t in found)


def test_plots_survive_numbers_that_are_none():
    rows = [svg.Interval("a", "#000", -3.0, -math.inf, math.inf, [-3.0, -math.inf], (-3.1, 0.1), (-2.9, 0.0)),
            svg.Interval("b" * 40, "#000", -math.inf, note="every weight is zero"),
            svg.Interval("c", "#000")]  # fmt: skip
    ET.fromstring(svg.evidence(rows))
    assert svg.evidence([svg.Interval("c", "#000")]) == ""
    ET.fromstring(svg.ess([[1.0]], [[False]], 1, None, "#000"))
    ET.fromstring(svg.lengths([("a", [0.0, 0.0], "#000")]))
    ET.fromstring(svg.lengths([("a", [1.0], "#000")]))
    ET.fromstring(svg.concentration([("a", [1.0], "#000")]))


def test_the_page_of_a_run_in_another_dtype(tmp_path, target):
    p = rd.importance(target, n=4, seed=0)
    assert p.log_w.dtype == torch.float64
    checked(page_of(tmp_path, {"importance": p}))
