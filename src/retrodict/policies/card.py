"""The card of a saved adapter: what it samples, what it reads, how far it was from the posterior, what it cost."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from retrodict.particles_io import write_atomically

FILE = "retrodict.json"


def write_card(
    folder: str | os.PathLike[str], policy: Any, table: Any = None, recipe: Mapping[str, Any] | None = None
) -> None:
    """``README.md`` for people and ``retrodict.json`` for ``rd.load`` beside a PEFT adapter, from ``policy.about``."""
    about = dict(policy.about)
    path = Path(folder)
    base = policy.lm.base_name
    found = about.get("evaluation", {})
    lines = ["---", "library_name: peft", f"base_model: {base}", "tags: [retrodict, lora]", "---", "",
             f"# A sampler of {about.get('target', 'a posterior')}", "",
             f"A LoRA adapter on `{base}` (`{policy.lm.base_version}`), trained by retrodict to draw the latent Z from "
             "the target in one pass at temperature 1, without truncation.", "",
             "| what | value |", "|---|---|", f"| target | `{about.get('target', '')}` |",
             f"| what q reads | `{policy.sees}` |", f"| how Z ends | {policy.space.stops.label}, at most "
             f"{policy.space.max_moves} tokens, limit `{policy.space.limit}` |"]  # fmt: skip
    if found:
        lines += [f"| lower bound E_q[log gamma/q] | {_with(found.get('elbo'), found.get('elbo_se'))} nats |",
                  f"| log Z by importance from q | {_with(found.get('log_z'))} nats |",
                  f"| ESS of q as a proposal | {found.get('ess', 0):.1%} of the draws |",
                  f"| distinct | {found.get('distinct', 0):.0f} of {found.get('n', 0)} |",
                  f"| mean length | {found.get('length', 0):.1f} tokens |"]  # fmt: skip
    settings = about.get("settings", {})
    if settings:
        lines += [f"| objective | {about.get('objective')} |",
                  f"| training | {settings.get('steps')} steps of {settings.get('samples')} samples a problem, "
                  f"{about.get('seconds', 0):.0f} s |"]  # fmt: skip
    if table is not None:
        head, *body = table.cells()
        body = body if len(body) <= 40 else body[-8:]
        lines += ["", "## Beside other methods (nats)", "", "| " + " | ".join(head) + " |", "|" + "---|" * len(head),
                  *("| " + " | ".join(c.replace("|", "\\|") for c in row) + " |" for row in body)]  # fmt: skip
    lines += ["", "```python", "import retrodict as rd", f'lm = rd.load("{base}", adapter="this folder")', "```", "",
              "It loads in plain transformers and peft as any adapter does.", ""]  # fmt: skip
    write_atomically(path / "README.md", "\n".join(lines).encode())
    told = {"sees": policy.sees, "base": base, "version": policy.lm.base_version, "about": about,
            "recipe": dict(recipe or {})}  # fmt: skip
    write_atomically(path / FILE, json.dumps(told, indent=1, default=str).encode())


def _with(value: float | None, error: float | None = None) -> str:
    if value is None:
        return "--"
    return f"{value:.2f}" + ("" if error is None else f" ± {error:.2f}")
