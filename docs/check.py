"""What ``make docs`` runs. Every page must hold:

- each link leads to a file and heading that exist, and each page of ``docs`` is reached from ``docs/index.md``;
- each block fenced as ``python run`` runs (the blocks of a page in order, in one namespace);
- each line of code in a table after ``<!-- code: FILE -->`` is a line of that file (spaces aside);
- each figure is the one in ``benchmarks/results`` (see ``figures.py``);
- what a tutorial (``docs/tutorials/*.md``) prints stands below the block that prints it.

``python docs/check.py --write PAGE...`` runs pages, writes what their blocks print into the fence ``text output`` that
follows each, and keeps the pictures that they save in ``docs/figures``.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
import sys
import tempfile
import time
import traceback
from pathlib import Path

import figures

ROOT = Path(__file__).resolve().parents[1]
INDEX = ROOT / "docs" / "index.md"
FENCE = re.compile(r"^(```|~~~).*?^\1", re.MULTILINE | re.DOTALL)
EXAMPLE = re.compile(r"^```python run\n(.*?)^```\n(\n```text output\n.*?^```\n)?", re.MULTILINE | re.DOTALL)
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


def run_examples(page: Path, write: bool = False) -> list[str]:
    """Run the ``python run`` blocks of a page, quietly and in an empty folder; ``write`` keeps what they made."""
    text = page.read_text(encoding="utf-8")
    examples = list(EXAMPLE.finditer(text))
    if not examples:
        return []
    began, space, printed = time.perf_counter(), {"__name__": "__main__"}, []
    here = os.getcwd()
    with tempfile.TemporaryDirectory() as scratch:
        os.chdir(scratch)
        try:
            for found in examples:
                above = "\n" * (text[: found.start()].count("\n") + 1)  # so that errors name the page's lines
                with contextlib.redirect_stdout(io.StringIO()) as out:
                    exec(compile(above + found[1], str(page), "exec"), space)
                printed.append(out.getvalue())
        except Exception as error:
            lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(page)]
            at = lines[-1] if lines else getattr(error, "lineno", "?")
            return [f"{page.relative_to(ROOT)}, line {at}: {type(error).__name__}: {error}"]
        finally:
            os.chdir(here)
        if write:
            for picture in sorted(Path(scratch).glob("*.svg")):
                shutil.copy(picture, ROOT / "docs" / "figures" / picture.name)
            page.write_text(_with_output(text, examples, printed), encoding="utf-8")
    print(f"  {page.relative_to(ROOT)}  {len(examples)} examples  {time.perf_counter() - began:.1f} s", flush=True)
    return []


def _with_output(text: str, examples: list[re.Match[str]], printed: list[str]) -> str:
    """The page with what each block printed below it, where there is a fence for it."""
    for found, out in reversed(list(zip(examples, printed, strict=True))):
        if found[2]:
            fence = f"\n```text output\n{out.rstrip()}\n```\n"
            text = text[: found.start(2)] + fence + text[found.end(2) :]
    return text


def unwritten(page: Path) -> list[str]:
    """Fences for output that stand empty."""
    if "```text output\n```" not in page.read_text(encoding="utf-8"):
        return []
    return [f"{page.relative_to(ROOT)}: output is missing; run: python docs/check.py --write {page.relative_to(ROOT)}"]


def matplotlib_for_pages() -> None:
    """Pictures without a window, and the same file from the same numbers."""
    os.environ["MPLBACKEND"] = "svg"
    os.environ["SOURCE_DATE_EPOCH"] = "0"
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "retrodict", "figure.figsize": (7, 3.5)})


def main() -> int:
    """Check the pages and run their examples; 1 where something is wrong."""
    matplotlib_for_pages()
    if sys.argv[1:2] == ["--write"]:
        faults = [fault for name in sys.argv[2:] for fault in run_examples(Path(name).resolve(), write=True)]
        print("\n".join(faults) or "written")
        return 1 if faults else 0
    pages = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
    faults = unreached(pages)
    for page in pages:
        faults += broken(page) + misquoted(page) + unwritten(page)
        if figures.filled(page) != page.read_text(encoding="utf-8"):
            faults.append(f"{page.relative_to(ROOT)}: figures are not those of benchmarks/results; "
                          "run: python docs/figures.py")  # fmt: skip
    print(f"{len(pages)} pages read", flush=True)
    for page in pages:
        faults += run_examples(page)
    print("\n".join(faults) if faults else "links, quotes, figures and examples hold")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
