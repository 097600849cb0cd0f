"""Fixed data whose exact posterior over graphs is known, for tests and benchmarks of structures."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from retrodict.structures.data import Table

ROWS = 20
WAVES: dict[int, tuple[float, float, float, float]] = {
    2: (-49.233748, 0.426689, 0.853377, 1.008322),
    3: (-78.826100, 0.222228, 2.053771, 2.435854),
    4: (-108.473731, 0.091722, 3.365264, 4.173759),
    5: (-134.667622, 0.043972, 5.702422, 6.345194),
}
"""d to log sum_G p(D | G), probability of the best DAG, E[edges], entropy (nats), under BGe and the uniform prior.

Computed by a separate program that lists the graphs (numpy, per-node form of the score).
"""


def waves(d: int) -> Table:
    """X[:, j] = sin((j+1) i) + 0.8 X[:, j-1] + cos(i^2 (j+2)) / 2 for i = 1..20; no random numbers."""
    i = torch.arange(1, ROWS + 1, dtype=torch.float64)
    columns: list[Float[Tensor, " n"]] = []
    for j in range(d):
        before = 0.8 * columns[-1] if columns else torch.zeros_like(i)
        columns.append(torch.sin((j + 1) * i) + before + 0.5 * torch.cos(i**2 * (j + 2)))
    return Table(torch.stack(columns, 1), tuple("abcdefghijklmn"[:d]))
