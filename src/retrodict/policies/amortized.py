"""A fine-tuned view of a language model, with what it reads made from X, or from X and Y, by a template.

The template travels with the policy, so that it can be asked about problems it was not trained on.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from retrodict.errors import InputError
from retrodict.policies.card import write_card
from retrodict.policies.lm import LMPolicy
from retrodict.protocols import LanguageModel, Problems
from retrodict.records import Problem
from retrodict.spaces.strings import Strings

SEES: dict[str, str] = {"x": "{context}", "xy": "Later:{evidence}\n{context}"}
"""What q may read, by name. Z continues the context in the last, so that q starts near the prior."""


class Amortized(LMPolicy):
    """q(Z | X) or q(Z | X, Y).

    ``sees`` is "x", "xy", or a template of text around ``{context}`` and ``{evidence}`` that ends with ``{context}`` or
    with text; the fields are put in as ids, the text between them is tokenised once. A problem's own ``q_prompt`` wins.
    ``about`` is what training left behind: settings, cost, and its last evaluation.
    """

    def __init__(self, lm: LanguageModel, space: Strings, problems: Problems, sees: str = "x") -> None:
        super().__init__(lm, space, problems, "q_prompt")
        self.sees, self.about = sees, {}
        template = SEES.get(sees, sees)
        if "{context}" not in template:
            raise InputError(f"sees={sees!r}: say 'x', 'xy', or a template with {{context}} and {{evidence}} in it")
        parts = re.split(r"(\{context\}|\{evidence\})", template)
        self._parts = [p if p in ("{context}", "{evidence}") else tuple(lm.tokenizer.encode(p)) for p in parts if p]
        self.about: dict[str, Any]

    @property
    def reads_evidence(self) -> bool:
        """Whether q is told what comes after, so that each Y has a posterior of its own to learn."""
        return self.sees == "xy" or "{evidence}" in self.sees

    @property
    def version(self) -> str:
        """Fingerprint of the weights and of what they read."""
        return f"{self.lm.version}/sees {self.sees}"

    def prompt(self, problem: Problem) -> Sequence[int]:
        """What q reads for a problem."""
        if problem.q_prompt is not None:
            return problem.q_prompt
        fields: Mapping[Any, Sequence[int]] = {"{context}": problem.context, "{evidence}": problem.evidence}
        return [i for part in self._parts for i in (fields[part] if isinstance(part, str) else part)]

    def prompts(self, problem: Tensor) -> list[Sequence[int]]:
        """What the model reads for each row."""
        made = {i: self.prompt(self.problems[i]) for i in set(problem.tolist())}
        return [made[i] for i in problem.tolist()]

    def save(self, folder: str | os.PathLike[str], table: Any = None, recipe: Mapping[str, Any] | None = None) -> None:
        """A PEFT folder with a card: target, what q sees, bounds, diversity, cost, and a table of ``compare``."""
        self.lm.save_adapter(folder)  # pyright: ignore[reportAttributeAccessIssue]
        write_card(folder, self, table, recipe)

    def on(self, problems: Problems) -> Amortized:
        """The same policy on other problems."""
        new = Amortized(self.lm, self.space, problems, self.sees)
        new.about = self.about
        return new
