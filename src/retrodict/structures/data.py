"""Data about d variables: a table of rows, from a CSV file or drawn from a known network.

Every refusal names the row, the column and what to do. Rows are counted from 1, the header apart, as a person counts.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from retrodict.errors import InputError, nearest

FEW_LEVELS = 5
"""A file whose columns all have at most so many values is read as categories, unless told otherwise."""
MISSING = {"", "na", "nan", "n/a", "null", "none", "?"}


@dataclass(frozen=True)
class Table:
    """N rows of d variables: float64 values, or int64 level numbers where ``levels`` names the categories.

    ``intervened[n, j]`` says that row n's value of j was set by the experimenter: it then tells nothing about how j
    depends on its parents, and scores drop the row for that child.
    """

    values: Float[Tensor, "n d"] | Int[Tensor, "n d"]
    names: tuple[str, ...]
    levels: tuple[tuple[str, ...], ...] | None = None
    intervened: Bool[Tensor, "n d"] | None = None

    def __post_init__(self) -> None:
        if self.values.dim() != 2 or self.values.shape[1] != len(self.names):
            raise InputError(f"a table with {len(self.names)} names needs as many columns, not {self.values.shape}")
        if self.levels is None and not bool(torch.isfinite(self.values).all()):
            raise InputError("the table has NaN or infinite values; remove those rows")

    def __len__(self) -> int:
        return len(self.values)

    @property
    def d(self) -> int:
        """Number of variables."""
        return len(self.names)

    @property
    def discrete(self) -> bool:
        """Whether the values are level numbers."""
        return self.levels is not None

    def rows(self, index: Tensor) -> Table:
        """Rows ``index``, repeats allowed."""
        given = None if self.intervened is None else self.intervened[index]
        return replace(self, values=self.values[index], intervened=given)

    def standardised(self) -> Table:
        """Every continuous column to mean 0 and standard deviation 1 (BGe's prior expects that scale)."""
        if self.discrete:
            raise InputError("categories have no mean; only continuous columns are standardised")
        spread = self.values.std(0)
        return replace(self, values=(self.values - self.values.mean(0)) / spread)


def check_rows(table: Table, few_rows: bool = False) -> None:
    """Refuse what no structure can be learned from: constant columns, and (unless told) fewer rows than variables."""
    same = (table.values == table.values[:1]).all(0)
    if len(table) and bool(same.any()):
        name = table.names[int(same.nonzero()[0, 0])]
        raise InputError(f"column {name!r} is constant: it depends on nothing and explains nothing; remove it")
    if len(table) < table.d and not few_rows:
        raise InputError(f"{len(table)} rows for {table.d} variables: give more rows or fewer columns, or accept an "
                         "answer that is mostly prior with few_rows (--few-rows)")  # fmt: skip


def read_csv(
    path: str | os.PathLike[str], kind: str = "auto", intervened: str | None = None, few_rows: bool = False
) -> Table:
    """A table from a CSV file with a header (comma, semicolon or tab).

    Args:
        path: the file.
        kind: continuous, discrete, or auto: discrete where no cell is a number or all columns have at most
            ``FEW_LEVELS`` values.
        intervened: a column that names, in each row, the variable that was set by the experimenter (or is empty).
        few_rows: accept fewer rows than variables.
    """
    if kind not in ("auto", "continuous", "discrete"):
        raise InputError(f"unknown kind {kind!r}{nearest(kind, ('auto', 'continuous', 'discrete'))}")
    path = Path(path)
    names, rows = _cells(path)
    marked = None
    if intervened is not None:
        if intervened not in names:
            raise InputError(f"{path.name}: no column {intervened!r}{nearest(intervened, names)}")
        at = names.index(intervened)
        names, marked = [n for n in names if n != intervened], [row[at] for row in rows]
        rows = [row[:at] + row[at + 1 :] for row in rows]
    _refuse_missing(path, names, rows)
    columns = [list(c) for c in zip(*rows, strict=True)]
    discrete = kind == "discrete" or (kind == "auto" and _categories(columns))
    values, levels = _levels(columns) if discrete else (_numbers(path, names, columns), None)
    mask = None if marked is None else _marks(path, names, marked)
    table = Table(values, tuple(names), levels, mask)
    check_rows(table, few_rows)
    return table


def _cells(path: Path) -> tuple[list[str], list[list[str]]]:
    """Header and rows of text."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "not UTF-8 text"
        raise InputError(f"cannot read {path}: {why}") from None
    first = text.partition("\n")[0]
    mark = max(",;\t", key=first.count)
    lines = [
        [c.strip() for c in row] for row in csv.reader(io.StringIO(text), delimiter=mark) if any(map(str.strip, row))
    ]
    if len(lines) < 2 or len(lines[0]) < 2:
        raise InputError(f"{path.name}: needs a header of at least two names and one row; found {len(lines)} lines of "
                         f"{len(lines[0]) if lines else 0} cells (separators are comma, semicolon, tab)")  # fmt: skip
    names, rows = lines[0], lines[1:]
    empty = [i + 1 for i, n in enumerate(names) if not n]
    twice = sorted({n for n in names if names.count(n) > 1})
    if empty or twice:
        raise InputError(f"{path.name}: " + (f"column {empty[0]} has no name" if empty else f"two columns are called "
                         f"{twice[0]!r}") + "; every column needs a name of its own")  # fmt: skip
    for i, row in enumerate(rows, 1):
        if len(row) != len(names):
            raise InputError(f"{path.name}: row {i} has {len(row)} cells, the header {len(names)}")
    return names, rows


def _refuse_missing(path: Path, names: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    holes = [(i, j) for i, row in enumerate(rows, 1) for j, cell in enumerate(row) if cell.lower() in MISSING]
    if holes:
        i, j = holes[0]
        more = f" ({len(holes)} cells are missing in all)" if len(holes) > 1 else ""
        raise InputError(f"{path.name}: row {i}, column {names[j]!r} is missing{more}; fill it in or remove the row")


def _number(cell: str) -> float | None:
    try:
        return float(cell)
    except ValueError:
        return None


def _categories(columns: Sequence[Sequence[str]]) -> bool:
    few = all(len(set(c)) <= FEW_LEVELS for c in columns)
    return few or not any(_number(cell) is not None for c in columns for cell in c[:100])


def _numbers(path: Path, names: Sequence[str], columns: Sequence[Sequence[str]]) -> Float[Tensor, "n d"]:
    told = []
    for name, column in zip(names, columns, strict=True):
        numbers = [_number(c) for c in column]
        if None in numbers:
            i = numbers.index(None)
            raise InputError(f"{path.name}: column {name!r} is not numeric (row {i + 1}: {column[i]!r}); remove it, or "
                             "read every column as categories with kind discrete")  # fmt: skip
        told.append(numbers)
    return torch.tensor(told, dtype=torch.float64).T.contiguous()


def _levels(columns: Sequence[Sequence[str]]) -> tuple[Int[Tensor, "n d"], tuple[tuple[str, ...], ...]]:
    levels = tuple(tuple(sorted(set(c), key=lambda x: (_number(x) is None, _number(x) or 0.0, x))) for c in columns)
    codes = [[seen.index(cell) for cell in column] for column, seen in zip(columns, levels, strict=True)]
    return torch.tensor(codes, dtype=torch.int64).T.contiguous(), levels


def _marks(path: Path, names: Sequence[str], marked: Sequence[str]) -> Bool[Tensor, "n d"]:
    mask = torch.zeros(len(marked), len(names), dtype=torch.bool)
    for i, word in enumerate(marked):
        if word.lower() in MISSING:
            continue
        if word not in names:
            raise InputError(f"{path.name}: row {i + 1} says that {word!r} was set, which is no column"
                             f"{nearest(word, names)}")  # fmt: skip
        mask[i, list(names).index(word)] = True
    return mask


def read_edges(path: str | os.PathLike[str], names: Sequence[str]) -> Bool[Tensor, "d d"]:
    """A graph from a CSV file with two columns, cause and effect; a first line that names no variables is a header."""
    path = Path(path)
    head, rows = _cells(path)
    rows = [head, *rows] if len(head) == 2 and all(word in names for word in head) else rows
    graph = torch.zeros(len(names), len(names), dtype=torch.bool)
    for i, row in enumerate(rows, 1):
        for word in row[:2]:
            if word not in names:
                raise InputError(f"{path.name}: row {i} names {word!r}, which is no column of the data"
                                 f"{nearest(word, names)}")  # fmt: skip
        graph[list(names).index(row[0]), list(names).index(row[1])] = True
    return graph
