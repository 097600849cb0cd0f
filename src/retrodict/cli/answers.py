"""Run folders of the commands whose answer is a structure, not texts: config, environment, answer.json, report.html.

The page is made from ``answer.json`` alone, so ``retrodict report FOLDER`` can build it again.
"""

from __future__ import annotations

import importlib
import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from retrodict.errors import InputError
from retrodict.particles_io import write_atomically
from retrodict.report.run import RunFolder, environment, plain

PAGES = {"graph": "retrodict.cli.graph_page", "worlds": "retrodict.cli.worlds_page", "plan": "retrodict.cli.plan_page"}
"""Command to the module whose ``render(answer)`` makes its page."""


def keep(command: str, out: str, config: Mapping[str, Any], answer: Mapping[str, Any], lm: Any = None) -> Path:
    """Write a new run folder with the answer and its page; gives its path."""
    folder = RunFolder.create(out, command, {"command": command, **config}, environment=environment(lm)).path
    told = {"command": command, "made": time.strftime("%Y-%m-%d", time.gmtime()), "config": config, **answer}
    write_atomically(folder / "answer.json", (json.dumps(plain(told), indent=1, ensure_ascii=False) + "\n").encode())
    write_atomically(folder / "status.json", b'{"status": "complete"}\n')
    rebuild(folder)
    return folder


def rebuild(folder: str | os.PathLike[str]) -> Path | None:
    """(Re)build report.html from a folder's answer; None where it holds none."""
    path = Path(folder).expanduser() / "answer.json"
    if not path.is_file():
        return None
    try:
        answer = json.loads(path.read_text(encoding="utf-8"))
        render = importlib.import_module(PAGES[answer["command"]]).render
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is damaged ({error}); run the command again") from None
    return write_atomically(path.with_name("report.html"), render(answer).encode("utf-8", "replace"))


def read_yaml(path: str, parse: Callable[[str], Any] = yaml.safe_load) -> Any:
    """A YAML file, as ``parse`` reads it; what is wrong with it in one line."""
    try:
        return parse(Path(path).expanduser().read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path!r}: {getattr(error, 'strerror', None) or 'not UTF-8 text'}") from None
    except yaml.YAMLError as error:
        at = getattr(error, "problem_mark", None)
        where = f", line {at.line + 1}" if at is not None else ""
        raise InputError(f"{path}{where}: not YAML: {getattr(error, 'problem', None) or error}") from None
    except ValueError as error:  # a date that is none
        raise InputError(f"{path}: {error}; write dates in quotes") from None
