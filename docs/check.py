"""What ``make docs`` runs. Every page must hold:

- each link leads to a file and heading that exist, and each page of ``docs`` is reached from ``docs/index.md``;
- each block fenced as ``python run`` runs (the blocks of a page in order, in one namespace);
- each line of code in a table after ``<!-- code: FILE -->`` is a line of that file (spaces aside);
- each figure is the one in ``benchmarks/results`` (see ``figures.py``);
- each tutorial, ``docs/tutorials/*.py``, runs to its end.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

import figures

ROOT = Path(__file__).resolve().parents[1]
INDEX = ROOT / "docs" / "index.md"
FENCE = re.compile(r"^(```|~~~).*?^\1", re.MULTILINE | re.DOTALL)
EXAMPLE = re.compile(r"^```python run\n(.*?)^```", re.MULTILINE | re.DOTALL)
QUOTES = re.compile(r"<!-- code: (\S+) -->\s*\n((?:\|.*\n)+)")
CODE = re.compile(r"`[^`\n]*`")
LINK = re.compile(r"\[[^\]]*\]\(\s*<?([^)\s>]+)>?[^)]*\)")
HEADING = re.compile(r"^#{1,6}\s+(.*?)\s*#*$", re.MULTILINE)


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as code hosts make them."""
    found: set[str] = set()
    for title in HEADING.findall(FENCE.sub("", text)):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title).replace("`", "").replace("*", "").lower()
        base = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        slug, again = base, 0
        while slug in found:
            again += 1
            slug = f"{base}-{again}"
        found.add(slug)
    return found


def links(page: Path) -> list[tuple[str, Path, str]]:
    """Each link of a page to a place in the repository: as written, the file, the heading."""
    found = []
    for link in LINK.findall(CODE.sub("", FENCE.sub("", page.read_text(encoding="utf-8")))):
        if not re.match(r"[a-z][a-z0-9+.-]*:", link):
            path, _, anchor = link.partition("#")
            found.append((link, (page.parent / path).resolve() if path else page, anchor))
    return found


def broken(page: Path) -> list[str]:
    """Links of one page to a file or a heading that is not there."""
    faults = []
    for link, goal, anchor in links(page):
        if not goal.exists():
            faults.append(f"{page.relative_to(ROOT)}: no file {link}")
        elif anchor and goal.suffix == ".md" and anchor not in anchors(goal.read_text(encoding="utf-8")):
            faults.append(f"{page.relative_to(ROOT)}: no heading {link}")
    return faults


def unreached(pages: list[Path]) -> list[str]:
    """Pages of ``docs`` to which no chain of links leads from the index."""
    seen, todo = set(), [INDEX]
    while todo:
        page = todo.pop()
        if page not in seen and page.suffix == ".md" and page.exists():
            seen.add(page)
            todo += [goal for _, goal, _ in links(page)]
    docs = [p for p in pages if INDEX.parent in p.parents]
    return [f"{p.relative_to(ROOT)}: no link leads here from docs/index.md" for p in docs if p not in seen]


def misquoted(page: Path) -> list[str]:
    """Code in the last cell of a table's rows that is no line of the file the table names."""
    faults = []
    for name, table in QUOTES.findall(page.read_text(encoding="utf-8")):
        if not (ROOT / name).is_file():
            faults.append(f"{page.relative_to(ROOT)}: no file {name} to quote")
            continue
        source = re.sub(r"\s", "", (ROOT / name).read_text(encoding="utf-8"))
        for row in table.splitlines()[2:]:
            last = re.split(r"(?<!\\)\|", row.rstrip().rstrip("|"))[-1].replace(r"\|", "|")
            for code in CODE.findall(last):
                if re.sub(r"\s", "", code.strip("`")) not in source:
                    faults.append(f"{page.relative_to(ROOT)}: {name} no longer says {code}")
    return faults


def run_examples(page: Path) -> list[str]:
    """Run the ``python run`` blocks of a page, quietly and in an empty folder."""
    text = page.read_text(encoding="utf-8")
    examples = list(EXAMPLE.finditer(text))
    if not examples:
        return []
    began, space = time.perf_counter(), {"__name__": "__main__"}
    here = os.getcwd()
    with tempfile.TemporaryDirectory() as scratch:
        os.chdir(scratch)
        try:
            for found in examples:
                above = "\n" * (text[: found.start()].count("\n") + 1)  # so that errors name the page's lines
                with contextlib.redirect_stdout(io.StringIO()):
                    exec(compile(above + found[1], str(page), "exec"), space)
        except Exception as error:
            lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(page)]
            at = lines[-1] if lines else getattr(error, "lineno", "?")
            return [f"{page.relative_to(ROOT)}, line {at}: {type(error).__name__}: {error}"]
        finally:
            os.chdir(here)
    print(f"  {page.relative_to(ROOT)}  {len(examples)} examples  {time.perf_counter() - began:.1f} s", flush=True)
    return []


def run_tutorial(script: Path) -> list[str]:
    """Run one tutorial in a folder of its own; the end of its output where it fails."""
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        done = subprocess.run(
            [sys.executable, str(script)], cwd=scratch, env=os.environ, capture_output=True, text=True, check=False
        )
    print(f"  {script.relative_to(ROOT)}  {time.perf_counter() - began:.0f} s", flush=True)
    if done.returncode == 0:
        return []
    return [f"{script.relative_to(ROOT)} failed:\n{(done.stdout + done.stderr)[-3000:]}"]


def main() -> int:
    """Check the pages, run the examples and the tutorials; 1 where something is wrong."""
    pages = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
    faults = unreached(pages)
    for page in pages:
        faults += broken(page) + misquoted(page)
        if figures.filled(page) != page.read_text(encoding="utf-8"):
            faults.append(f"{page.relative_to(ROOT)}: figures are not those of benchmarks/results; "
                          "run: python docs/figures.py")  # fmt: skip
    print(f"{len(pages)} pages read", flush=True)
    for page in pages:
        faults += run_examples(page)
    scripts = sorted(ROOT.glob("docs/tutorials/*.py"))
    for script in scripts:
        faults += run_tutorial(script)
    print("\n".join(faults) if faults else f"links, quotes, figures and examples hold; {len(scripts)} tutorials ran")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
