"""What ``make docs`` runs: every link between the pages leads somewhere, and every tutorial runs to its end."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FENCE = re.compile(r"^(```|~~~).*?^\1", re.MULTILINE | re.DOTALL)
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


def broken(page: Path) -> list[str]:
    """Links of one page to a file or a heading that is not there."""
    faults = []
    for link in LINK.findall(CODE.sub("", FENCE.sub("", page.read_text(encoding="utf-8")))):
        if re.match(r"[a-z][a-z0-9+.-]*:", link):
            continue
        path, _, anchor = link.partition("#")
        goal = (page.parent / path).resolve() if path else page
        if not goal.exists():
            faults.append(f"{page.relative_to(ROOT)}: no file {link}")
        elif anchor and goal.suffix == ".md" and anchor not in anchors(goal.read_text(encoding="utf-8")):
            faults.append(f"{page.relative_to(ROOT)}: no heading {link}")
    return faults


def run(script: Path) -> str | None:
    """Run one tutorial in a folder of its own; the end of its output where it fails."""
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        done = subprocess.run(
            [sys.executable, str(script)], cwd=scratch, env=os.environ, capture_output=True, text=True, check=False
        )
    print(f"  {script.relative_to(ROOT)}  {time.perf_counter() - began:.0f} s", flush=True)
    if done.returncode == 0:
        return None
    return f"{script.relative_to(ROOT)} failed:\n{(done.stdout + done.stderr)[-3000:]}"


def main() -> int:
    """Check the pages and run the tutorials; 1 where something is wrong."""
    pages = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
    faults = [fault for page in pages for fault in broken(page)]
    print(f"{len(pages)} pages read", flush=True)
    scripts = sorted(ROOT.glob("docs/tutorials/*.py"))
    faults += [fault for script in scripts if (fault := run(script))]
    print("\n".join(faults) if faults else f"every link leads somewhere, {len(scripts)} tutorials ran")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
