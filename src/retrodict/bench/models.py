"""``retrodict bench models``: classical latent-variable models, each against its exact or trusted reference.

Every part is a file of its own (``bench/models_*.py``) whose ``rows(seed)`` measures and says its bars; this one runs
them in turn. A part that fails is reported at the end, and the rows of the others are kept.
"""

from __future__ import annotations

import importlib
import time
from pathlib import Path

from retrodict.bench.rows import Row, write
from retrodict.errors import InputError, RetrodictError, nearest
from retrodict.training.threads import one_thread

SUITE = "models"
PARTS: dict[str, str] = {
    "pcfg": "retrodict.bench.models_pcfg",
    "mixture": "retrodict.bench.models_mixture",
    "hmm": "retrodict.bench.models_hmm",
    "vae": "retrodict.bench.models_vae",
    "lda": "retrodict.bench.models_lda",
    "posterior": "retrodict.bench.models_posterior",
    "bnn": "retrodict.bench.models_bnn",
    "programs": "retrodict.bench.models_programs",
    "forms": "retrodict.bench.models_forms",
    "diffusion": "retrodict.bench.models_diffusion",
}
"""Name to module, in the order of a run."""


def run(parts: str = ",".join(PARTS), seed: int = 0, partial: str = "") -> list[Row]:
    """Rows of the parts.

    Args:
        parts: names of PARTS, joined by commas; all by default.
        seed: one seed, one result (seconds apart).
        partial: a JSON file of the rows so far.
    """
    names = parts.split(",")
    for name in names:
        if name not in PARTS:
            raise InputError(f"unknown part {name!r}{nearest(name, PARTS)}")
    rows: list[Row] = []
    failed: list[str] = []
    with one_thread():
        for name in names:
            began = time.perf_counter()
            try:
                for new in importlib.import_module(PARTS[name]).rows(seed):
                    rows += new
                    for r in new:
                        print(f"{r.name}, {r.method}: {r.metric} {r.value:.4g} {r.bar or ''} {r.note}", flush=True)
                    if partial:
                        write(rows, Path(partial))
            except RetrodictError as error:
                failed.append(f"{name}: {error}")
            print(f"-- {name}: {time.perf_counter() - began:.0f} s", flush=True)
    if failed:
        raise InputError(f"{len(rows)} rows were made, but a part failed: {'; '.join(failed)}")
    return rows
