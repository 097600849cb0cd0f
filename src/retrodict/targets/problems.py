"""The door for a user's own data: rows or a file, templates for what p reads and what it must explain."""

from __future__ import annotations

import csv
import json
import string
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from retrodict.errors import InputError, nearest
from retrodict.protocols import LanguageModel
from retrodict.records import Problem

Chat = Literal["auto", False]


@dataclass(frozen=True)
class TextProblem:
    """One question as text, before a model's tokenizer has seen it."""

    context: str
    evidence: str = ""
    row: Mapping[str, Any] = field(default_factory=dict)
    name: str = ""
    chat: Chat = "auto"


def problems(
    source: str | Path | Iterable[Mapping[str, Any]],
    *,
    context: str,
    evidence: str = "",
    chat: Chat = "auto",
    name: str = "",
) -> list[TextProblem]:
    """Questions from a JSONL, JSON or CSV file, or from rows.

    Args:
        source: a file's path, or mappings.
        context: template of what p reads (X), e.g. ``"Q: {question}\\nA:"``.
        evidence: template of what p must explain (Y), e.g. ``" The answer is {answer}."``. It is joined as it stands:
            write the leading space.
        chat: ``"auto"`` wraps the context in the model's chat template where it has one; ``False`` never does.
        name: template of the problem's name; default its number.

    Raises:
        InputError: no such file, an empty file, a line that is not a row, or a row without a field of a template
            (file, line and field are named).
    """
    where = str(source) if isinstance(source, str | Path) else "row"
    rows = _read(Path(source)) if isinstance(source, str | Path) else [(i + 1, r) for i, r in enumerate(source)]
    if not rows:
        raise InputError(f"{where}: no rows; give at least one problem")
    fields = {f for t in (context, evidence, name) for _, f, _, _ in string.Formatter().parse(t) if f}
    out = []
    for line, row in rows:
        missing = sorted(f for f in fields if f.split(".")[0].split("[")[0] not in row)
        if missing:
            at = f"{where}, line {line}" if isinstance(source, str | Path) else f"row {line}"
            raise InputError(f"{at}: no field {missing[0]!r}{nearest(missing[0], row)}")
        out.append(TextProblem(context.format_map(dict(row)), evidence.format_map(dict(row)), dict(row),
                               name.format_map(dict(row)) if name else str(len(out)), chat))  # fmt: skip
    return out


def _read(path: Path) -> list[tuple[int, dict[str, Any]]]:
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    text = path.read_text(encoding="utf-8")
    if not text.strip():
        raise InputError(f"{path}: the file is empty; give one JSON object a line, a JSON list, or CSV with a header")
    if path.suffix == ".csv":
        return [(i + 2, dict(r)) for i, r in enumerate(csv.DictReader(text.splitlines()))]
    if path.suffix == ".json":
        try:
            rows = json.loads(text)
        except json.JSONDecodeError as error:
            raise InputError(f"{path}, line {error.lineno}: not JSON ({error.msg})") from None
        if not isinstance(rows, list) or not all(isinstance(r, dict) for r in rows):
            raise InputError(f"{path}: expected a JSON list of objects")
        return list(enumerate(rows, 1))
    out = []
    for i, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"{path}, line {i}: not JSON ({error.msg}); one JSON object a line is expected") from None
        if not isinstance(row, dict):
            raise InputError(f"{path}, line {i}: expected a JSON object, found {type(row).__name__}")
        out.append((i, row))
    return out


def tokenise(lm: LanguageModel, data: Sequence[TextProblem | Problem]) -> list[Problem]:
    """Ids of text problems under a model; problems that are ids already pass through.

    Raises InputError for an empty context where the model has no beginning-of-sequence to read instead.
    """
    out = []
    for i, p in enumerate(data):
        if isinstance(p, Problem):
            out.append(p)
            continue
        chat = getattr(lm.tokenizer, "chat", None) if p.chat == "auto" else None
        has = chat is not None and getattr(lm.tokenizer, "has_chat", False)
        ids = chat(p.context) if has and chat is not None else lm.tokenizer.encode(p.context)
        if not ids:
            raise InputError(f"problem {p.name or i}: empty prompt; give the model at least one word to read")
        out.append(Problem(tuple(ids), tuple(lm.tokenizer.encode(p.evidence)) if p.evidence else (),
                           None, dict(p.row), p.name or str(i)))  # fmt: skip
    return out
