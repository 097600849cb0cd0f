"""A hidden Markov model of a language model's text: small enough to look ahead exactly.

    p(x_1..T) = sum over z_0..T of  pi(z_0) prod_t A(z_t-1, z_t) B(z_t, x_t)

z_0 emits nothing, so that a text may begin with any belief (what a prompt leaves behind). Tokens that end a text are
columns of B like any other; nothing follows them. The belief f_t(z) = p(z_t = z | x_1..t) is filtered token by token:

    f_t  proportional to  (f_t-1 A) * B[:, x_t],        p(x_t | x_<t) = sum_z (f_t-1 A)(z) B(z, x_t)

(Rabiner 1989.) ``guides.hmm_fit`` distils one from a language model, ``guides.hmm_guide`` looks ahead with it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from retrodict.errors import InputError
from retrodict.numerics import invert_cdf
from retrodict.protocols import LanguageModel

FILES = ("hmm.safetensors", "hmm.json")
FORMAT = 1


@dataclass(frozen=True)
class HMM:
    """Probabilities (not logs) of an HMM over a vocabulary.

    Attributes:
        initial: of z_0, the state before the first token.
        transition: A, rows sum to one.
        emission: B, rows sum to one over the vocabulary.
        ends: ids after which a text is over.
        card: what it was fitted on and how well it does (model, tokenizer, nats a token, ...).
    """

    initial: Float[Tensor, " h"]
    transition: Float[Tensor, "h h"]
    emission: Float[Tensor, "h v"]
    ends: tuple[int, ...] = ()
    card: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("initial", "transition", "emission"):
            x = getattr(self, name)
            off = float((x.double().sum(-1) - 1).abs().max())
            if off > 1e-4 or float(x.min()) < 0:
                raise InputError(f"{name} is no probability table: entries must be >= 0 and rows sum to one")

    @property
    def states(self) -> int:
        """Number of hidden states h."""
        return len(self.initial)

    @property
    def vocab_size(self) -> int:
        """Number of token ids v."""
        return self.emission.shape[1]

    def to(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> HMM:
        """The same model in another precision, or elsewhere."""
        initial, step, emit = (x.to(device, dtype) for x in (self.initial, self.transition, self.emission))
        return HMM(initial, step, emit, self.ends, self.card)

    def start(self, b: int) -> Float[Tensor, "b h"]:
        """The belief before any token, b times."""
        return self.initial.expand(b, -1)

    def step(self, f: Float[Tensor, "b h"], ids: Int[Tensor, " b"]) -> tuple[Tensor, Float[Tensor, " b"]]:
        """Belief after one more token a row, and its log-probability.

        A token that the HMM gives no chance leaves the belief at its prediction (log-probability -inf).
        """
        ahead = f @ self.transition
        joint = ahead * self.emission[:, ids].T
        p = joint.sum(1, keepdim=True)
        return torch.where(p > 0, joint / p.clamp_min(torch.finfo(p.dtype).tiny), ahead), p.squeeze(1).log()

    def read(self, texts: Sequence[Sequence[int]]) -> Float[Tensor, "b h"]:
        """Belief after each whole text (a prompt)."""
        f = self.start(len(texts)).clone()
        for t in range(max(map(len, texts), default=0)):
            rows = torch.tensor([i for i, x in enumerate(texts) if len(x) > t], device=f.device)
            f[rows] = self.step(f[rows], torch.tensor([texts[i][t] for i in rows.tolist()], device=f.device))[0]
        return f

    def log_prob(self, moves: Int[Tensor, "b t"], n: Int[Tensor, " b"]) -> Float[Tensor, "b t"]:
        """log p(x_i | x_<i) of the first n tokens of each row (0 past them)."""
        f, out = self.start(len(moves)), []
        for t in range(moves.shape[1]):
            f, log_p = self.step(f, moves[:, t])
            out.append(torch.where(t < n, log_p, 0.0))
        return torch.stack(out, 1) if out else self.emission.new_zeros(len(moves), 0)

    def sample(self, b: int, tokens: int, gen: torch.Generator) -> tuple[Int[Tensor, "b t"], Int[Tensor, " b"]]:
        """b texts of at most so many tokens, each up to and with its end: tokens, and how many of them count."""
        z = self._draw(self.start(b), gen)
        n, ended = torch.zeros(b, dtype=torch.long), torch.zeros(b, dtype=torch.bool)
        ends, out = torch.tensor(self.ends, dtype=torch.long), []
        for _ in range(tokens):
            z = self._draw(self.transition[z], gen)
            out.append(self._draw(self.emission[z], gen))
            n = n + ~ended
            ended = ended | torch.isin(out[-1], ends)
        return torch.stack(out, 1), n

    @staticmethod
    def _draw(p: Float[Tensor, "b k"], gen: torch.Generator) -> Int[Tensor, " b"]:
        u = torch.rand(len(p), 1, generator=gen, dtype=torch.float64, device=gen.device)
        return invert_cdf(p, u).squeeze(1)

    # -- on disk --------------------------------------------------------------------------------------------------

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Two files in a folder (made if need be): the tables as safetensors, the rest as JSON."""
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        tables = {k: getattr(self, k).float().contiguous() for k in ("initial", "transition", "emission")}
        save_file(tables, path / FILES[0])
        said = {"format": FORMAT, "ends": list(self.ends), "card": dict(self.card)}
        (path / FILES[1]).write_text(json.dumps(said, indent=1) + "\n", encoding="utf-8")
        return path

    def check(self, lm: LanguageModel) -> None:
        """Raise InputError where this is not a guide over the tokens of ``lm``."""
        mine, its = self.card.get("tokenizer"), tokens_of(lm)
        if self.vocab_size != lm.vocab_size or (mine is not None and mine != its):
            whose = self.card.get("model", "another model")
            raise InputError(
                f"this HMM speaks the tokens of {whose} ({self.vocab_size} ids), not those of {lm.name} "
                f"({lm.vocab_size} ids); fit one with rd.fit_hmm(lm)"
            )


def load_hmm(folder: str | os.PathLike[str]) -> HMM:
    """An HMM from its folder, in float32. Raises InputError where there is none, or one of another format."""
    path = Path(folder)
    missing = [f for f in FILES if not (path / f).is_file()]
    if missing:
        raise InputError(f"no {missing[0]} in {str(folder)!r}; give a folder written by hmm.save")
    said = json.loads((path / FILES[1]).read_text(encoding="utf-8"))
    if said.get("format") != FORMAT:
        raise InputError(
            f"{str(folder)!r} is of format {said.get('format')}, this version reads {FORMAT}; fit it again"
        )
    with safe_open(path / FILES[0], "pt") as file:
        initial, step, emit = (file.get_tensor(k) for k in ("initial", "transition", "emission"))
    return HMM(initial, step, emit, tuple(said["ends"]), said["card"])


def tokens_of(lm: LanguageModel) -> str:
    """Fingerprint of what each token id means."""
    if not lm.token_bytes:
        return f"{lm.vocab_size} ids"
    seen = hashlib.sha256()
    for b in lm.token_bytes:
        seen.update(len(b).to_bytes(4, "little") + b)
    return seen.hexdigest()[:16]
