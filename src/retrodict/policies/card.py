"""The card of a saved adapter: what it samples, what it reads, how far it was from the posterior, what it cost."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from retrodict.errors import InputError
from retrodict.particles_io import write_atomically

FILE = "retrodict.json"
ROWS = 40
"""Longest table that a card shows whole; of a longer one the means at its end."""


def write_card(
    folder: str | os.PathLike[str], policy: Any, table: Any = None, recipe: Mapping[str, Any] | None = None
) -> None:
    """``README.md`` for people and ``retrodict.json`` for ``rd.load_policy`` beside a PEFT adapter."""
    about, path, base = dict(policy.about), Path(folder), policy.lm.base_name
    target = about.get("target") or "a posterior"
    lines = ["---", "library_name: peft", f"base_model: {base}", "tags: [retrodict, lora]", "---", "",
             f"# A sampler of {target}", "",
             f"A LoRA adapter on `{base}` (weights `{policy.lm.base_version}`). It draws the latent text Z from its "
             "target in one pass: sample at temperature 1 without top-k or top-p, for a truncated q is another "
             "distribution.", "",
             "| what | value |", "|---|---|",
             *(f"| {k} | {v} |" for k, v in [*_policy(policy, target), *_found(about), *_cost(about)])]  # fmt: skip
    if table is not None:
        lines += ["", "## Beside other methods (nats)", "", *_table(table)]
    if recipe:
        told = yaml.safe_dump({k: x for k, x in recipe.items() if k != "out"}, sort_keys=False, allow_unicode=True)
        lines += ["", "## Recipe", "", "```yaml", *told.splitlines(), "```"]
    lines += ["", "## Use", "", "```python", "import retrodict as rd", "", f'lm = rd.load("{base}")',
              "target = ...                                   # over the same kind of problems",
              'policy = rd.load_policy(target, "this folder")  # weights and what q reads', "```", "",
              "In plain transformers and peft it loads as any adapter does: "
              '`PeftModel.from_pretrained(model, "this folder")`.', ""]  # fmt: skip
    write_atomically(path / "README.md", "\n".join(lines).encode())
    told = {"sees": policy.sees, "base": base, "version": policy.lm.base_version, "about": about,
            "recipe": dict(recipe or {})}  # fmt: skip
    write_atomically(path / FILE, json.dumps(told, indent=1, default=str).encode())


def read_card(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """What ``retrodict.json`` of a folder says; empty where another trainer wrote the folder."""
    path = Path(folder).expanduser() / FILE
    if not path.is_file():
        return {}
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is damaged ({error}); remove it, and say sees= where q reads more than X") from None
    return told if isinstance(told, dict) else {}


def _policy(policy: Any, target: str) -> list[tuple[str, str]]:
    space, sees = policy.space, policy.sees
    reads = {"x": "X, what comes before", "xy": "X and Y, what comes before and after"}.get(sees, "a template")
    end = f"{space.stops.label}, at most {space.max_moves} tokens, limit `{space.limit}`"
    text = sees.replace("\n", "\\n").replace("|", "\\|")
    return [("target", f"`{target}`"), ("what q reads", f"{reads} (`{text}`)"), ("how Z ends", end)]


def _found(about: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The last evaluation: fresh draws of q at temperature one."""
    found = about.get("evaluation") or {}
    rows = []
    if found.get("elbo") is not None:
        rows = [("lower bound E_q[log gamma / q]", f"{_with(found['elbo'], found.get('elbo_se'))} nats"),
                ("log Z by importance from q", f"{_with(found.get('log_z'))} nats"),
                ("variance of log gamma / q under q", f"{_with(found.get('var_a'))} (0 at the posterior)"),
                ("ESS of q as a proposal", f"{found.get('ess', 0):.1%} of the draws"),
                ("distinct", f"{found.get('distinct', 0):.0f} of {found.get('n', 0)} draws a problem"),
                ("mean length", f"{found.get('length', 0):.1f} tokens")]  # fmt: skip
    if found.get("zeros"):
        rows.append(("draws that the target forbids", f"{found['zeros']:.1%}"))
    return rows


def _cost(about: Mapping[str, Any]) -> list[tuple[str, str]]:
    settings = about.get("settings") or {}
    if not settings:
        return []
    said = f"{settings.get('steps')} steps of {settings.get('samples')} samples a problem, lr {settings.get('lr'):g}, "
    return [("objective", f"{about.get('objective')}"),
            ("training", f"{said}{about.get('seconds', 0):.0f} s, seed {settings.get('seed')}")]  # fmt: skip


def _table(table: Any) -> list[str]:
    head, *body = table.cells()
    if len(body) > ROWS:
        body = [row for row in body if row[0].startswith("mean of")] or body[-ROWS:]
    rows = ["| " + " | ".join(c.replace("|", "\\|") for c in row) + " |" for row in (head, *body)]
    return [rows[0], "|" + "---|" * len(head), *rows[1:], *(f"\n{note}." for note in table.notes)]


def _with(value: float | None, error: float | None = None) -> str:
    if value is None:
        return "--"
    return f"{value:.2f}" + ("" if error is None else f" ± {error:.2f}")
