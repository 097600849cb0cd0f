"""Plain numbers as problems: one for each datum, which policies read as ``row["features"]``."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from retrodict.errors import InputError
from retrodict.protocols import Problems
from retrodict.records import Problem


def data_problems(x: Float[Tensor, "m c"]) -> list[Problem]:
    """One problem for each row."""
    return [Problem((), row={"features": tuple(row)}, name=str(i)) for i, row in enumerate(x.tolist())]


def data_of(problems: Problems, size: int, unit: str, dtype: torch.dtype = torch.float64) -> Float[Tensor, "m c"]:
    """The rows of problems. Raises InputError for one of another size; ``unit`` says what is counted."""
    rows = [p.row.get("features", ()) for p in problems]
    for i, row in enumerate(rows):
        if len(row) != size:
            raise InputError(f"problem {i} has {len(row)} {unit} in row['features'], and the model's have {size}")
    return torch.tensor(rows, dtype=dtype).view(len(rows), size)
