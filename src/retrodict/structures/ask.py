"""Questions put to a language model, answered by the probability of whole strings, each asked once.

    log p(text | prompt) = sum_i log p(token_i | prompt, tokens before i)

Prompt and text are tokenised apart and joined as ids, so an option is written with the space it begins with
(" yes"). Bias: none; this is the model's own probability, in its own precision. It is *not* renormalised over the
options: what is left over is the mass of answers outside them, which is counted, since a model that mostly wants to
say something else has not been asked well.

Answers are kept by (model name, model version, prompt, text), in memory and, where a path is given, one JSON line each,
appended after every batch: a kill loses the batch at hand, and a line it cut short is dropped when the file is read.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from retrodict.errors import InputError
from retrodict.models.cached import pad_ids
from retrodict.protocols import LanguageModel
from retrodict.targets.choice import answer_ids

BATCH = 64
"""(prompt, text) pairs scored in one pass."""
NULL_PROMPT = "Text:"
"""What stands for no context where the gain of a text over a context-free one is asked."""
MOSTLY = 0.5
"""An answer is counted as outside its options where they have less than this share of the mass."""


@dataclass
class Counts:
    """What an :class:`Asker` has done: texts scored by the model and read from the cache; option questions.

    ``outside`` is the summed mass outside the options of all questions, ``mostly_outside`` how many questions had more
    than half of it there.
    """

    scored: int = 0
    cached: int = 0
    questions: int = 0
    outside: float = 0.0
    mostly_outside: int = 0

    @property
    def mean_outside(self) -> float:
        """Mean mass outside the options, 0 where nothing was asked."""
        return self.outside / max(self.questions, 1)


class Asker:
    """Scores texts after prompts under one model, in batches, each distinct pair once."""

    def __init__(self, lm: LanguageModel, cache_path: str | os.PathLike[str] | None = None, batch: int = BATCH) -> None:
        self.lm, self.batch, self.counts = lm, batch, Counts()
        self.path = None if cache_path is None else Path(cache_path).expanduser()
        self.known: dict[tuple[str, str], float] = {}
        if self.path is not None and self.path.exists():
            self._read(self.path)

    def log_p(self, pairs: Sequence[tuple[str, str]]) -> Float[Tensor, " n"]:
        """log p(text | prompt) of each (prompt, text), in nats, float64.

        Raises:
            InputError: a text without tokens, or a prompt that is empty or longer than the model's context.
        """
        new = list(dict.fromkeys(p for p in pairs if p not in self.known))
        self.counts.scored += len(new)
        self.counts.cached += len(pairs) - len(new)
        heads = {prompt: self.lm.tokenizer.encode(prompt) for prompt, _ in new}
        new.sort(key=lambda pair: (len(heads[pair[0]]), pair[0]))  # equal prompts meet in one batch, and are run once
        for i in range(0, len(new), self.batch):
            part = new[i : i + self.batch]
            found = self._score([heads[prompt] for prompt, _ in part], [text for _, text in part])
            self.known |= dict(zip(part, found, strict=True))
            self._append(part, found)
        return torch.tensor([self.known[p] for p in pairs], dtype=torch.float64)

    def gain(self, pairs: Sequence[tuple[str, str]], null_prompt: str) -> Float[Tensor, " n"]:
        """log p(text | prompt) - log p(text | null_prompt): what the prompt adds to each text, its length set aside."""
        return self.log_p(pairs) - self.log_p([(null_prompt, text) for _, text in pairs])

    def options(self, prompts: Sequence[str], options: Sequence[str]) -> Float[Tensor, "n k"]:
        """log p(option | prompt) of every option, a whole string, after every prompt; not renormalised."""
        answer_ids(self.lm, options)  # two or more, none empty, no two the same
        found = self.log_p([(p, o) for p in prompts for o in options]).view(len(prompts), len(options))
        outside = self.outside(found, options)
        self.counts.questions += len(prompts)
        self.counts.outside += float(outside.sum())
        self.counts.mostly_outside += int((outside > MOSTLY).sum())
        return found

    def outside(self, log_p: Float[Tensor, "n k"], options: Sequence[str]) -> Float[Tensor, " n"]:
        """Mass of the answers that begin with none of the options (an option that begins with another is in it)."""
        ids = answer_ids(self.lm, options)
        first = [i for i, a in enumerate(ids) if not any(a[: len(b)] == b for j, b in enumerate(ids) if j != i)]
        return (1 - log_p[:, first].exp().sum(1)).clamp(0.0, 1.0)

    def _score(self, heads: Sequence[Sequence[int]], texts: Sequence[str]) -> list[float]:
        tails = [self.lm.tokenizer.encode(text) for text in texts]
        for text, tail in zip(texts, tails, strict=True):
            if not tail:
                raise InputError(f"the text {text!r} has no tokens; give an option or description that says something")
        longest = max(len(h) + len(t) for h, t in zip(heads, tails, strict=True))
        if longest > self.lm.context:
            raise InputError(f"a question of {longest} tokens is over the context of {self.lm.name} "
                             f"({self.lm.context} tokens); shorten it")  # fmt: skip
        moves, n = pad_ids(tails, torch.device("cpu"))
        with torch.no_grad():
            log_p, _, _ = self.lm.score(heads, moves, n)
        inside = torch.arange(moves.shape[1]) < n[:, None]
        return torch.where(inside, log_p.detach().double().cpu(), 0.0).sum(1).tolist()

    # -- the file -------------------------------------------------------------------------------------------------

    def _append(self, pairs: Sequence[tuple[str, str]], found: Sequence[float]) -> None:
        if self.path is None:
            return
        rows = [{"model": self.lm.name, "version": self.lm.version, "prompt": p, "text": t, "log_p": x}
                for (p, t), x in zip(pairs, found, strict=True)]  # fmt: skip
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab") as file:
                file.write("".join(json.dumps(row) + "\n" for row in rows).encode())
        except OSError as error:
            raise InputError(f"cannot write the cache {self.path}: {error.strerror or error}; name another") from None

    def _read(self, path: Path) -> None:
        """Keep this model's answers; cut off a last line that a kill left half written."""
        try:
            data = path.read_bytes()
            whole = data[: data.rfind(b"\n") + 1]
            if len(whole) < len(data):
                os.truncate(path, len(whole))
            text = whole.decode()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"cannot read the cache {path}: {error}; name another file") from None
        for number, line in enumerate(text.splitlines(), 1):
            try:
                row = json.loads(line)
                key, value = (str(row["prompt"]), str(row["text"])), float(row["log_p"])
                mine = (row["model"], row["version"]) == (self.lm.name, self.lm.version)
            except (ValueError, KeyError, TypeError):
                raise InputError(f"{path}, line {number}: not an answer of this cache; name another file") from None
            if mine:
                self.known[key] = value
