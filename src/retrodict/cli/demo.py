"""``retrodict demo``: posterior inference on a small real language model, with a bound on its error.

One hand-written story with a sentence missing, and a few stories that the model wrote itself: their missing sentences
are exact posterior samples, so their evidence is bounded from both sides. Five methods, one target; then the posterior
of the hand-written story is amortized: an adapter learns to draw it in one pass.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from retrodict.cli.run import _console, _progress, _spinner, _texts, _unbroken
from retrodict.diagnostics.verdict import diagnose
from retrodict.models import load as door
from retrodict.particles import Particles
from retrodict.particles_io import printable
from retrodict.report.compare import Comparison, compare
from retrodict.report.run import RunFolder, environment
from retrodict.samplers.common import OnStep
from retrodict.samplers.importance import ancestral, best_of_n, importance
from retrodict.samplers.mh.run import mh
from retrodict.samplers.smc import smc
from retrodict.targets.algebra import Target
from retrodict.targets.problems import TextProblem, tokenise
from retrodict.targets.ready import infill
from retrodict.targets.simulate import simulate
from retrodict.training.amortize import amortize

BEFORE, AFTER = "The cat was hungry.", "Now the cat is sleepy, not hungry."
BEGINNINGS = (
    "The sun was shining and the boy went to the park.",
    "Anna could not find her keys this morning.",
    "It was the first day of school.",
)
TOKENS = 8
JUDGED = 192
"""Fresh draws behind each lower bound of prior and amortized policy."""
LEARN: dict[str, Any] = {"objective": "vargrad", "samples": 32, "lr": 1.5e-3, "rank": 16, "evaluate": 64}

Sampler = Callable[[Target, int, int, OnStep], Particles]
METHODS: dict[str, Sampler] = {
    "prior": lambda t, n, seed, on: ancestral(t, n=n, seed=seed, on_step=on),
    "best of 16": lambda t, n, seed, on: best_of_n(t, n=16, draws=max(1, n // 16), seed=seed, on_step=on),
    "importance": lambda t, n, seed, on: importance(t, n=n // 4, runs=4, seed=seed, on_step=on),
    "MH": lambda t, n, seed, on: mh(t, n=max(2, n // 4), steps=8, keep=4, seed=seed, on_step=on),
    "SMC": lambda t, n, seed, on: smc(t, n=n // 4, runs=4, seed=seed, on_step=on),
}


def run(
    seed: int = 0, out: str = "runs", n: int = 48, stories: int = 2, steps: int = 36, model: str = "smollm2"
) -> int:
    """Infill a sentence by several methods, amortize its posterior, and say how far from it the answers may be.

    Args:
        seed: one seed, one result.
        out: where the run folder is made.
        n: draws a method and story.
        stories: stories that the model writes itself (for the two-sided bounds).
        steps: gradient steps of the amortized policy; 0 leaves it out.
        model: what to load, see ``retrodict models``.
    """
    began = time.perf_counter()
    console = _console()
    with _spinner(f"loading {model}"):
        lm = door.load(model)
    story = infill(lm, BEFORE, AFTER, stop=".", max_tokens=TOKENS)
    with _spinner(f"the model writes {stories} stories of its own"):
        begun = [TextProblem(text, " ", name="own", chat=False) for text in BEGINNINGS]
        own, exact = simulate(story.on(tokenise(lm, begun)), stories, seed, until=".")
    target = story.on([*story.problems, *own.problems])
    exact = replace(exact, problem=exact.problem + 1)
    console.print(f"p(Z | X, Y) for a missing sentence Z, on {lm.name} ({torch.get_num_threads()} threads)\n")
    console.print(f"   X  {BEFORE}\n   Z  ... ?\n   Y  {AFTER}\n", style="bold", markup=False)
    for p, z in zip(own.problems, own.space.show(exact), strict=True):
        x, y = (printable(lm.tokenizer.decode(ids), 70) for ids in (p.context, p.evidence))
        console.print(f"   {p.name}:  {x} [{printable(z, 70)} ] {y}", markup=False)
    about = ("A missing sentence, drawn in proportion to its posterior by several methods on one target"
             + (", the last a policy that was trained to do it in one pass." if steps > 0 else "."))  # fmt: skip
    recipe = {"command": "demo", "seed": seed, "n": n, "stories": stories, "steps": steps, "model": model,
              "sampler": [*METHODS, *(["amortized"] * (steps > 0))], "about": about}  # fmt: skip
    folder = RunFolder.create(out, "demo", recipe, _texts(target, lm), environment(lm))
    drawn: dict[str, Particles] = {}
    try:
        for name, sampler in METHODS.items():
            with _progress(name) as on_step:
                drawn[name] = sampler(target, n, seed, on_step)
            with _unbroken():
                folder.put(name, drawn[name])
        with _spinner("bounding the evidence from both sides"):
            table = compare(target, drawn, exact=exact, seed=seed)
        folder.comparison(table)
        if steps > 0:
            table, learned = _amortized(story, table, folder, steps, seed)
            with _unbroken():
                folder.put("amortized", learned)
                folder.comparison(table)
            drawn["amortized"] = learned
    except KeyboardInterrupt:
        with _unbroken():
            folder.close("interrupted")
        said = ", ".join(drawn) or "nothing"
        raise KeyboardInterrupt(f"interrupted; what had finished ({said}) is saved in {folder.path}") from None
    with _unbroken():
        folder.close("complete")
    console.print()
    console.print(table)
    _say(console, table, drawn)
    console.print(
        f"\n{time.perf_counter() - began:.0f} s in all; the page is {folder.path / 'report.html'}", markup=False
    )
    return 0


def _amortized(
    story: Target, table: Comparison, folder: RunFolder, steps: int, seed: int
) -> tuple[Comparison, Particles]:
    """Train a policy on the hand-written story; the table with its row, and the prior's bound from as many draws."""
    with _progress("amortizing") as on_step:
        policy = amortize(
            story, steps=steps, seed=seed, folder=folder.path / "training" / "amortized", save_every=steps,
            on_metrics=lambda m: on_step(int(m["step"]) + 1, steps), **LEARN,
        )  # fmt: skip
    with _spinner("judging what was learned"):
        told: Any = {"prior": story.prior, "amortized": policy}
        both = compare(story, told, n=JUDGED, seed=seed + 1)
    before, after = both.rows
    first = table.rows[0]["problem"]
    rows = [dict(r) for r in table.rows]
    bounds = ("lower", "lower_se", "log_z", "log_z_se", "min_ess")
    prior = next(r for r in rows if r["method"] == "prior" and r["problem"] == first)
    prior.update({k: before[k] for k in bounds})
    last = max(i for i, r in enumerate(rows) if r["problem"] == first)
    rows.insert(last + 1, after | {"seconds": policy.about["seconds"] + after["seconds"]})
    policy.save(folder.path / "adapter", both)
    said = f"amortized: {JUDGED} draws, as for the prior's bound; its seconds with training"
    notes = dict.fromkeys((*table.notes, *both.notes, said))
    return replace(table, rows=rows, notes=tuple(notes)), both.particles["amortized"]


def _say(console, table: Comparison, drawn: dict[str, Particles]) -> None:  # noqa: ANN001
    """What came out, in words."""
    console.print(f"\nheaviest sentences between '{BEFORE}' and '{AFTER}'", style="bold", markup=False)
    for name, particles in drawn.items():
        best = "  |  ".join(f"{printable(text, 60).strip()} ({w:.0%})" for text, w in particles.best(0, 3))
        console.print(f"   {name:<11} {best}", markup=False)
    rows = {r["method"]: r for r in table.rows if r["problem"] == table.rows[0]["problem"]}
    gain = {m: rows[m]["explains"] - rows["prior"]["explains"] for m in rows if m != "prior"}
    text = ", ".join(f"{m} {g:+.1f}" for m, g in gain.items())
    console.print(f"\nwhat comes after is explained better than by the prior's draws by (nats, on average): {text}")
    for name in ("importance", "MH", "SMC"):
        found = diagnose(drawn[name])
        console.print(f"   {name:<11} {found.lines[-1]}", markup=False)
    if "amortized" in rows:
        a, b = rows["prior"], rows["amortized"]
        error = math.hypot(a["lower_se"], b["lower_se"])
        console.print(f"\nprior -> amortized: the lower bound moved from {a['lower']:.2f} to {b['lower']:.2f} nats "
                      f"({b['lower'] - a['lower']:+.2f} ± {error:.2f}); log Z by SMC is {rows['SMC']['log_z']:.2f}",
                      markup=False)  # fmt: skip
