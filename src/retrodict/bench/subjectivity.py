"""Subjectivity at few labels: prompting, supervised fine-tuning, amortized reasons, and EM, in one table.

    retrodict bench subjectivity --data FOLDER --json FILE         the files of Hu et al. 2024
    retrodict bench subjectivity --labels 8 --limit 8 --scale 0.05  our own sentences, for a look

Published with a 6-billion model at 10, 20 and 50 labels: 75.2, 81.1 and 89.9% (Hu et al. 2024, table 4); ours has 135
million weights, and the table says what it reaches.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from retrodict.bench.rows import Row, show_only, write
from retrodict.errors import InputError
from retrodict.models.load import load
from retrodict.tasks import subjectivity

SUITE = "subjectivity"
METRICS = {"accuracy": "accuracy", "se": "s.e. of accuracy", "ece": "ECE", "log_loss": "log loss (nats)",
           "risk_at_half": "risk at half coverage", "seconds_train": "seconds of training",
           "seconds_predict": "seconds of prediction"}  # fmt: skip


def run(
    data: str = "",
    labels: str = "10,20,50",
    limit: int = 200,
    methods: str = "zero-shot,few-shot,sft,amortized,em",
    scale: float = 1.0,
    chains: int = 16,
    samples: int = 16,
    per_step: int = 8,
    objective: str = "auto",
    model: str = "smollm2",
    dtype: str = "",
    device: str = "",
    folder: str = "",
    partial: str = "",
    seed: int = 0,
) -> list[Row]:
    """The table, number of labels by number of labels; each method is printed as soon as it is there.

    Args:
        data: a folder with train_10.jsonl, ..., dev.jsonl; without it our own sentences are both (a look, no result).
        labels: numbers of labelled rows, joined by commas.
        limit: rows of dev that are judged, the first ones.
        methods: rows of ``tasks.subjectivity.METHODS``, joined by commas.
        scale: of the numbers of training steps.
        chains: Z drawn for each prediction.
        samples, per_step, objective: of the E-step; "vargrad" values whole Z only, "auto" every prefix.
        model, dtype, device: see ``rd.load``; "" for its defaults.
        folder: where finished methods are kept; another call with the same numbers goes on from there.
        partial: a JSON file of the rows so far.
        seed: one seed, one result.
    """
    if not scale > 0:
        raise InputError(f"scale multiplies numbers of steps; give one above 0, not {scale}")
    plan = subjectivity.Plan(seed=seed, chains=chains, samples=samples, per_step=per_step, objective=objective)
    steps = {k: max(1, round(getattr(plan, k) * scale)) for k in ("e_steps", "m_steps", "sft_steps")}
    plan, rows = replace(plan, **steps), []
    for count in (int(x) for x in labels.split(",")):
        lm: Any = load(model, **{k: v for k, v in (("dtype", dtype), ("device", device)) if v})
        train, dev = _files(data, count)
        for method in methods.split(","):
            found = subjectivity.run(lm, train, dev, [method], plan=plan, limit=limit, folder=folder or None)
            print(subjectivity.table(found).splitlines()[-1], flush=True)
            name = f"{count} labels, {found[0]['dev']} sentences judged"
            rows += [show_only(SUITE, name, method, words, found[0][key]) for key, words in METRICS.items()]
            if partial:
                write(rows, Path(partial))
    return rows


def _files(data: str, count: int) -> tuple[Any, Any]:
    if data:
        return Path(data) / f"train_{count}.jsonl", Path(data) / "dev.jsonl"
    ours = subjectivity.examples()
    if not 0 < count < len(ours):
        raise InputError(f"{len(ours)} sentences are our own: give labels between 1 and {len(ours) - 1}, or data=")
    return ours[:count], ours[count:]
