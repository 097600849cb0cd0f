"""Layers of small networks whose weights lie in a dictionary by name, as ``protocols.Trainable`` gives them out."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from retrodict.errors import InputError
from retrodict.protocols import Problems
from retrodict.rng import generator


def linear(w: dict[str, Tensor], name: str, a: int, b: int, gen: torch.Generator, gain: float = 1.0) -> None:
    """Put a layer from a to b numbers into ``w``: weights of variance gain^2 / a, biases 0."""
    w[f"{name}.weight"] = torch.randn(b, a, generator=gen).mul_(gain / a**0.5).requires_grad_()
    w[f"{name}.bias"] = torch.zeros(b, requires_grad=True)


def layer_norm(x: Float[Tensor, "... w"]) -> Float[Tensor, "... w"]:
    """Mean 0, variance 1 along the last axis."""
    return F.layer_norm(x, x.shape[-1:])


class MLP:
    """``layers`` hidden layers of ``hidden`` rectified units; the last layer starts ``gain`` small (0: outputs 0)."""

    def __init__(
        self, inputs: int, outputs: int, hidden: int = 64, layers: int = 2, seed: int = 0, gain: float = 0.1
    ) -> None:
        gen, sizes = generator(seed), [inputs, *[hidden] * layers]
        self.layers = layers
        self.parameters: dict[str, Tensor] = {}
        for k, (a, b) in enumerate(zip(sizes[:-1], sizes[1:], strict=True)):
            linear(self.parameters, str(k), a, b, gen, gain=2**0.5)
        linear(self.parameters, "out", sizes[-1], outputs, gen, gain=gain)

    def __call__(self, x: Float[Tensor, "b i"]) -> Float[Tensor, "b o"]:
        """The outputs, float32."""
        w = self.parameters
        for k in range(self.layers):
            x = F.relu(F.linear(x, w[f"{k}.weight"], w[f"{k}.bias"]))
        return F.linear(x, w["out.weight"], w["out.bias"])


def row_features(problems: Problems) -> Float[Tensor, "m c"] | None:
    """What the rows of problems say (``row["features"]``, c numbers each), float32; None where none says anything.

    Raises InputError where only some say something, or as many numbers as others.
    """
    given = [p.row.get("features") for p in problems]
    if all(x is None for x in given):
        return None
    rows = [None if x is None else torch.as_tensor(x, dtype=torch.float32).flatten() for x in given]
    sizes = {0 if x is None else len(x) for x in rows}
    if len(sizes) > 1:
        raise InputError(f"every problem needs as many features as the others, not {sorted(sizes)}")
    return torch.stack([x for x in rows if x is not None])
