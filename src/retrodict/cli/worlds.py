"""``retrodict worlds beliefs.yaml``: what can be true, given what is believed and what must hold together.

The file gives statements with probabilities, or leaves them to a language model (``--lm``), and the rules that every
world keeps; see ``cli.worlds_file``. Printed and kept in a run folder: probabilities before and after, the
inconsistency mass, the most probable worlds, calibration where truths are given, and for texts under ``contexts`` what
they do to the posterior. Everything is checked before a model is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import tyro

from retrodict.cli.answers import keep
from retrodict.cli.worlds_file import Context, WorldsFile, read
from retrodict.errors import InputError
from retrodict.structures.ask import Asker
from retrodict.structures.worlds import Belief
from retrodict.structures.worlds_ask import believed
from retrodict.structures.worlds_report import Effect, calibration, costs, effect, flags, shifts
from retrodict.structures.worlds_solve import MOST, PARTICLES, Worlds, posterior

SHOWN = 20
"""Statements printed."""
TOP = 3


def run(
    beliefs: tyro.conf.Positional[str] = "",
    lm: str = "",
    dtype: str = "auto",
    slope: float = 1.0,
    bias: float = 0.0,
    cache: str = "",
    most: int = MOST,
    particles: int = PARTICLES,
    runs: int = 4,
    seed: int = 0,
    out: str = "runs",
) -> int:
    """The posterior over worlds that keep the rules, from beliefs given in a file or asked of a language model.

    Args:
        beliefs: a YAML file of statements and rules.
        lm: a language model that is asked for the probabilities that the file does not give, such as smollm2.
        dtype: its precision.
        slope: what its log-odds are multiplied by (1 / temperature).
        bias: what is then added to them.
        cache: a file of its answers, which spares it on another call.
        most: partial worlds up to which statements that hang together are listed; beyond, worlds are sampled.
        particles: partial worlds that each run of the sampler keeps.
        runs: of the sampler.
        seed: of the sampler.
        out: where the run folder is made.
    """
    config = {k: v for k, v in locals().items() if v not in ("", None)}
    if not beliefs:
        raise InputError("worlds: which beliefs? give a YAML file; docs/structures/worlds.md has an example")
    told = read(beliefs)
    if told.asked and not lm:
        says = told.beliefs[told.asked[0]].says
        raise InputError(f"{beliefs}: {len(told.asked)} beliefs have no p, such as {says!r}; give p, or --lm smollm2")
    if told.contexts and not told.asked:
        raise InputError(
            f"{beliefs}: contexts change what a model answers, and every belief has its p; drop one of both"
        )
    solve: dict[str, int] = {"most": most, "particles": particles, "runs": runs, "seed": seed}
    asker = None
    if lm:
        from retrodict.models.load import load

        asker = Asker(load(lm, dtype=dtype), cache or None)
    plain = [Context("", "", False), *told.contexts]
    found = {c.name: posterior(_asked(told, asker, c.says, slope, bias), told.constraints, **solve) for c in plain}
    answer = answer_of(told, found, asker, solve)
    show(answer)
    folder = keep("worlds", out, {"name": told.name, **config}, answer, asker.lm if asker else None)
    print(f"\nthe page is {folder / 'report.html'}")
    return 0


def _asked(told: WorldsFile, asker: Asker | None, context: str, slope: float, bias: float) -> list[Belief]:
    """The beliefs with the model's probabilities where the file gives none."""
    out = list(told.beliefs)
    if asker is not None and told.asked:
        found = believed(asker, [out[i] for i in told.asked], context, slope, bias)
        for i, belief in zip(told.asked, found, strict=True):
            out[i] = belief
    return out


# -- the answer --------------------------------------------------------------------------------------------------------


def answer_of(
    told: WorldsFile, found: Mapping[str, Worlds], asker: Asker | None, solve: Mapping[str, int]
) -> dict[str, Any]:
    """Everything the table and the page show, as plain values."""
    w = found[""]
    effects = {c.name: effect(w, found[c.name]) for c in told.contexts}
    harmless = [c.name for c in told.contexts if c.harmless]
    flagged = flags(effects, harmless) if harmless else {}
    return {
        "name": told.name,
        "exact": w.exact,
        "log_z": w.log_z,
        "log_z_error": w.log_z_error,
        "inconsistency": w.inconsistency,
        "components": len(w.components),
        "statements": [vars(s) for s in shifts(w)],
        "worlds": [{"p": p, "true": [b.says for b, yes in zip(w.beliefs, world, strict=True) if yes]}
                   for p, world in w.top(TOP)],  # fmt: skip
        "costs": [{"rule": c.name, "inconsistency": x} for c, x in costs(w, **solve)],
        "calibration": calibration(w),
        "contexts": [_context(c, effects[c.name], flagged.get(c.name)) for c in told.contexts],
        "lm": None if asker is None else _said(asker, len(told.asked)),
    }  # fmt: skip


def _context(c: Context, e: Effect, flagged: bool | None) -> dict[str, Any]:
    return {"name": c.name, "says": c.says, "harmless": c.harmless, "flagged": flagged, "kl": e.kl,
            "beliefs": e.beliefs, "inconsistency": e.inconsistency, "strain": e.strain,
            "moved": [{"says": s, "log_odds": x} for s, x in e.moved]}  # fmt: skip


def _said(asker: Asker, asked: int) -> dict[str, Any]:
    c = asker.counts
    return {"name": asker.lm.name, "asked": asked, "questions": c.questions, "outside": c.mean_outside,
            "mostly_outside": c.mostly_outside}  # fmt: skip


# -- what is printed ------------------------------------------------------------------------------------------------


def show(answer: Mapping[str, Any]) -> None:
    """The tables."""
    from rich.table import Table
    from rich.text import Text

    from retrodict.cli.run import _console

    rows, console = answer["statements"], _console()
    table = Table("statement", "before", "after", "log-odds", "true", title=str(answer["name"]))
    for s in rows[:SHOWN]:
        truth = "" if s["truth"] is None else "yes" if s["truth"] else "no"
        table.add_row(Text(s["says"]), f"{s['before']:.3f}", f"{s['after']:.3f}", f"{s['log_odds']:+.2f}", truth)
    console.print(table)
    if len(rows) > SHOWN:
        print(f"({len(rows) - SHOWN} more statements moved less; they are in the run folder)")
    how = "exact" if answer["exact"] else f"sampled, log Z {answer['log_z']:.3f} +- {answer['log_z_error']:.3f}"
    print(f"inconsistency mass {answer['inconsistency']:.6f} ({how}): what independent beliefs give to worlds that "
          "break a rule")  # fmt: skip
    for c in answer["costs"][:SHOWN]:
        print(f"  {c['inconsistency']:.4f}  {c['rule']} alone")
    for world in answer["worlds"]:
        print(f"world {world['p']:.4f}  {'; '.join(world['true']) or 'nothing is true'}")
    m = answer["calibration"]
    if m:
        print(f"against {m['known']:.0f} known truths: Brier {m['brier_before']:.4f} -> {m['brier_after']:.4f}, ECE "
              f"{m['ece_before']:.4f} -> {m['ece_after']:.4f}, accuracy {m['accuracy_before']:.3f} -> "
              f"{m['accuracy_after']:.3f}")  # fmt: skip
    if answer["lm"]:
        said = answer["lm"]
        print(
            f"{said['name']} was asked about {said['asked']} statements: {said['outside']:.1%} of its answers' mass "
            f"is neither yes nor no, in {said['mostly_outside']} of {said['questions']} questions most of it"
        )
    for c in answer["contexts"]:
        mark = "" if c["flagged"] is None else ", FLAGGED" if c["flagged"] else ", not flagged"
        first = c["moved"][0]
        print(f"context {c['name']}: KL {c['kl']:.3f} nats (of beliefs alone {c['beliefs']:.3f})"
              f"{', harmless' if c['harmless'] else mark}, inconsistency "
              f"{c['inconsistency']:+.4f}; moved most: {first['says']!r} {first['log_odds']:+.2f}")  # fmt: skip
