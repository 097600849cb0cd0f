"""Checkpoints: everything that the next step depends on, written whole or not at all.

    checkpoint.json              step, settings, fingerprints of model and target, which files belong to it
    state-N.safetensors          the policy's parameters, Adam's moments, the learned log Z
    replay-N.safetensors         the buffers
    metrics.jsonl                one line a step
    failures/step-N.safetensors  batches whose loss was not finite

``checkpoint.json`` is replaced last, so a kill or a full disk at any moment leaves the one before.
"""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as from_bytes
from safetensors.torch import save as to_bytes
from torch import Tensor

from retrodict.errors import InputError
from retrodict.particles_io import write_atomically
from retrodict.records import Rollouts
from retrodict.training.distributed import FIELDS
from retrodict.training.loop import Run
from retrodict.training.replay import Replay

HEAD = "checkpoint.json"


@dataclass
class Keeper:
    """Writes a run's folder every ``every`` steps."""

    folder: Path
    every: int = 20

    def start(self, resume: bool, run: Run) -> None:
        """A fresh run in a folder of its own, or the run that the folder holds.

        Raises InputError where the folder holds a run that is not to be gone on with, or another run than this.
        """
        if resume:
            return self.resume(run)
        held = [name for name in (HEAD, "metrics.jsonl") if (self.folder / name).exists()]
        if held:
            raise InputError(f"{self.folder} holds a run already ({held[0]}); say resume=True to go on with it, or "
                             "give a new folder")  # fmt: skip

    def step(self, run: Run, metrics: dict[str, Any]) -> None:
        """One line of metrics, and a checkpoint where it is time."""
        path = self.folder / "metrics.jsonl"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with open(path, "a", encoding="utf-8") as f:
                f.write(json.dumps(metrics) + "\n")
        except OSError as e:
            raise InputError(f"cannot write {path} ({e.strerror or e}); give a writable folder with room") from e
        run.whole = True
        if run.step % self.every == 0 or run.step == run.settings.steps:
            self.save(run)

    def save(self, run: Run) -> None:
        """The run as it stands after ``run.step`` steps."""
        parts = [f"state-{run.step}.safetensors"] + ([f"replay-{run.step}.safetensors"] if len(run.replay) else [])
        tensors = {k: v.detach().cpu().contiguous() for k, v in state(run).items()}
        write_atomically(self.folder / parts[0], to_bytes(tensors))
        if len(run.replay):
            run.replay.save(self.folder / parts[1])
        told = {"step": run.step, "failures": run.failures, "seconds": run.seconds, "micro": run.micro, "files": parts}
        write_atomically(self.folder / HEAD, json.dumps(told | identity(run), indent=1).encode())
        for old in [x for kind in ("state-*", "replay-*", ".*.part") for x in self.folder.glob(kind)]:
            if old.name not in parts:
                with contextlib.suppress(OSError):
                    old.unlink()

    def resume(self, run: Run) -> None:
        """Bring a fresh run to the newest checkpoint; a folder without one leaves it at step 0.

        Raises InputError for a checkpoint of another model, target or other settings, or a damaged one.
        """
        head = self.folder / HEAD
        if not head.is_file():
            return self._cut(run, 0)
        try:
            told = json.loads(head.read_text(encoding="utf-8"))
            tensors = from_bytes((self.folder / told["files"][0]).read_bytes())
            mine = identity(run)
            for key in mine:
                if told[key] != mine[key]:
                    raise InputError(_differs(str(head), key, told[key], mine[key]))
            _fits(str(head), run, tensors)
            restore(run, tensors)
            if len(told["files"]) > 1:
                mine = run.replay
                run.replay = Replay.load(self.folder / told["files"][1], model=mine.model, target=mine.target,
                                         distance=mine.distance)  # fmt: skip
            run.step, run.failures, run.seconds = int(told["step"]), int(told["failures"]), float(told["seconds"])
            run.micro = told["micro"] if run.settings.micro is None else run.micro
        except InputError:
            raise
        except Exception as error:  # safetensors, json and OSError each have their own
            why = (str(error).splitlines() or [""])[0]
            raise InputError(f"{head} or what it names is damaged ({type(error).__name__}: {why}); give a new folder, "
                             "or empty this one to begin anew") from error  # fmt: skip
        self._cut(run, run.step)

    def _cut(self, run: Run, step: int) -> None:
        """Drop lines of steps that will be taken again."""
        path = self.folder / "metrics.jsonl"
        if not path.is_file() or not run.world.first:
            return
        kept = []
        for line in path.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError):  # a line that a kill cut short
                if json.loads(line)["step"] < step:
                    kept.append(line)
        write_atomically(path, "".join(f"{x}\n" for x in kept).encode())

    def failure(self, step: int, rollouts: Rollouts, why: str) -> None:
        """Keep a batch whose step was skipped."""
        tensors = {f: getattr(rollouts, f) for f in FIELDS} | {f"term.{k}": v for k, v in rollouts.terms.items()}
        data = to_bytes({k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}, {"why": why})
        write_atomically(self.folder / "failures" / f"step-{step}.safetensors", data)

    def finish(self, run: Run, about: dict[str, Any]) -> None:
        """What the run was and found."""
        write_atomically(self.folder / "about.json", json.dumps(about, indent=1, default=str).encode())


def identity(run: Run) -> dict[str, Any]:
    """What a checkpoint must share with the run that goes on from it."""
    model = getattr(getattr(run.policy, "lm", None), "base_version", "") or ""
    settings = {k: v for k, v in run.settings.plain().items() if k not in ("evaluate", "evaluate_every", "micro")}
    scale = getattr(getattr(run.policy, "lm", None), "lora_scale", None)
    policy = {"sees": getattr(run.policy, "sees", None), "kind": type(run.policy).__name__, "lora_alpha / rank": scale}
    told = {"model": model, "target": run.target.version, "problems": _digest(run), "policy": policy}
    return json.loads(json.dumps(told | {"settings": settings}))


def _digest(run: Run) -> str:
    import hashlib

    text = json.dumps([[p.context, p.evidence, p.q_prompt] for p in run.target.problems])
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _differs(path: str, key: str, theirs: Any, mine: Any) -> str:
    if isinstance(theirs, dict):
        bad = next(k for k in sorted({*theirs, *mine}) if theirs.get(k) != mine.get(k))
        both = f"{bad} = {theirs.get(bad)!r}, not {mine.get(bad)!r}"
        return f"{path}: the run was made with {both}; give the same, or a new folder"
    return f"{path}: the run was made with another {key}: {theirs!r}, not {mine!r}; give a new folder"


def _trained(run: Run) -> dict[str, Tensor]:
    return {**run.policy.parameters(), **({} if run.log_z is None else {"log_z": run.log_z})}


def _fits(path: str, run: Run, tensors: dict[str, Tensor]) -> None:
    theirs = {k.removeprefix("parameter."): tuple(v.shape) for k, v in tensors.items() if k.startswith("parameter.")}
    mine = {k: tuple(v.shape) for k, v in _trained(run).items()}
    if theirs != mine:
        k = next(k for k in [*mine, *theirs] if theirs.get(k) != mine.get(k))
        raise InputError(f"{path}: the run trained {k} of shape {theirs.get(k, 'none')}, and this policy's is "
                         f"{mine.get(k, 'none')}; give the same rank and targets, or a new folder")  # fmt: skip


def state(run: Run) -> dict[str, Tensor]:
    """Every tensor that the next step depends on."""
    named = _trained(run)
    out = {f"parameter.{k}": v for k, v in named.items()}
    for k, p in named.items():
        out |= {f"adam.{k}.{x}": v for x, v in run.adam.state.get(p, {}).items()}
    return out


def restore(run: Run, tensors: dict[str, Tensor]) -> None:
    """The tensors of :func:`state`, put back."""
    named = _trained(run)
    with torch.no_grad():
        for k, p in named.items():
            p.copy_(tensors[f"parameter.{k}"])
            mark = f"adam.{k}."
            moments = {x.removeprefix(mark): v for x, v in tensors.items() if x.startswith(mark)}
            if moments:
                run.adam.state[p] = {x: v if x == "step" else v.to(p.device) for x, v in moments.items()}
    run.policy.refresh()
