"""The run folder: everything a run leaves, readable with no service and no model.

    config.yaml            the resolved recipe; the command line takes it again
    environment.json       versions, processor, threads, commit
    status.json            running, complete, interrupted or failed; what was said last
    problems.jsonl         what p read and had to explain, as text
    particles/NAME.safetensors   the weighted sample of each method
    samples.jsonl          one line an object: method, problem, text, weight, log terms
    metrics.jsonl          one line a method and problem
    comparison.json        the table of ``compare``, where it was run
    failures.jsonl         texts on which a verifier failed
    training/NAME/         a trained policy: metrics.jsonl (one line a step), checkpoint, about.json
    adapter/               the policy as a PEFT folder with its card
    report.html            one self-contained page, made from all of these

Files are written whole or not at all, and after every finished piece of work, so a kill loses at most the piece at
hand. An existing folder is never written to by another run: the next free number is taken.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml

from retrodict.diagnostics.verdict import diagnose
from retrodict.errors import InputError
from retrodict.particles import Particles
from retrodict.particles_io import names_of, terms_of, write_atomically
from retrodict.report.compare import Comparison

PACKAGES = ("retrodict", "torch", "transformers", "peft", "numpy", "safetensors")
SETTLE = 2.0
"""Seconds between two rewrites of samples.jsonl while a method is at work."""


def plain(x: Any) -> Any:
    """x as JSON holds it, on every machine: home folders become ``~``, infinities and NaN words."""
    if isinstance(x, float) and not math.isfinite(x):
        return str(x)
    if x is None or isinstance(x, (bool, int, float)):
        return x
    if isinstance(x, str):
        home = os.path.expanduser("~")
        return x.replace(home + os.sep, "~" + os.sep) if len(home) > 1 else x
    if isinstance(x, Mapping):
        return {str(k): plain(v) for k, v in x.items()}
    if isinstance(x, (list, tuple, set, frozenset)):
        return [plain(v) for v in x]
    return plain(x.tolist()) if hasattr(x, "tolist") else str(x)


def environment(lm: Any = None) -> dict[str, Any]:
    """What a result depends on and where it was made; no names of machines or people."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    out: dict[str, Any] = {
        "python": platform.python_version(),
        "packages": versions,
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "commit": _commit(),
    }
    if lm is not None:
        device = torch.device(getattr(lm, "device", "cpu"))
        out["model"] = {"name": lm.name, "version": lm.version, "device": device.type,
                        "dtype": str(getattr(lm, "dtype", "")).removeprefix("torch.") or None,
                        "note": getattr(lm, "note", "") or None}  # fmt: skip
        if device.type == "cuda":
            out["gpu"] = torch.cuda.get_device_name(device)
    return {k: v for k, v in out.items() if v is not None}


def _processor() -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or None
    return next((x.split(":", 1)[1].strip() for x in lines if x.startswith("model name")), None)


def _commit() -> str | None:
    """Commit of the source tree the package is imported from, if it is in one."""
    here = Path(__file__).resolve().parent
    if not any((p / ".git").exists() for p in here.parents[:4]):
        return None

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, timeout=5, check=True)
        return done.stdout.strip()

    try:
        return git("rev-parse", "HEAD") + (
            " with changes" if git("status", "--porcelain", "--", here.as_posix()) else ""
        )
    except (OSError, subprocess.SubprocessError):
        return None


def _bytes(x: Any, indent: int | None = None) -> bytes:
    """JSON that people can read; escaped where a text holds what UTF-8 cannot (half a character)."""
    try:
        return (json.dumps(plain(x), ensure_ascii=False, indent=indent) + "\n").encode()
    except UnicodeEncodeError:
        return (json.dumps(plain(x), indent=indent) + "\n").encode()


def _lines(rows: Sequence[Mapping[str, Any]]) -> bytes:
    return b"".join(map(_bytes, rows))


def sample_rows(method: str, p: Particles) -> list[dict[str, Any]]:
    """One mapping an object: what samples.jsonl holds."""
    names, terms = names_of(p), {k: v.tolist() for k, v in terms_of(p.objects).items()}
    weight, log_w = p.weights.flatten().tolist(), p.log_w.flatten().tolist()
    return [
        {"method": method, "problem": names[i // p.k], "text": p.shown[i], "weight": weight[i], "log_w": log_w[i],
         "tokens": int(p.objects.n[i]), "terms": {k: v[i] for k, v in terms.items()}}
        for i in range(p.m * p.k)
    ]  # fmt: skip


def metric_rows(method: str, p: Particles) -> list[dict[str, Any]]:
    """One mapping a problem: the numbers of ``diagnose``, its verdict, and what the method cost (for all problems)."""
    found = diagnose(p)
    cost = {k: v for k, v in p.trace.counts.items() if k in ("seconds", "tokens", "forwards")}
    return [
        {"method": method, "problem": x["name"], **{k: v for k, v in x.items() if k not in ("name", "method")},
         "verdict": verdict, "reason": why[0].reason, **cost}
        for x, verdict, why in zip(found.numbers, found.verdicts, found.findings, strict=True)
    ]  # fmt: skip


@dataclass
class RunFolder:
    """A run folder being written."""

    path: Path
    methods: dict[str, Particles] = field(default_factory=dict)
    written: float = 0.0

    @staticmethod
    def create(
        root: str | os.PathLike[str],
        name: str,
        config: Mapping[str, Any],
        problems: Sequence[Mapping[str, Any]] = (),
        environment: Mapping[str, Any] | None = None,
    ) -> RunFolder:
        """A new folder ``root/name-001`` (or the next free number), there with its first files or not at all."""
        root = Path(root).expanduser()
        try:
            root.mkdir(parents=True, exist_ok=True)
            fresh = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=root))
            fresh.chmod(0o755)
            (fresh / "particles").mkdir()
            text = yaml.safe_dump(plain(dict(config)), sort_keys=False, allow_unicode=True, width=100)
            (fresh / "config.yaml").write_text(text, encoding="utf-8")
            (fresh / "environment.json").write_bytes(_bytes(environment or {}, 1))
            (fresh / "problems.jsonl").write_bytes(_lines(problems))
            (fresh / "status.json").write_bytes(_bytes({"status": "running", "began": _now()}))
            for number in range(1, 1_000_000):
                path = root / f"{name}-{number:03d}"
                if path.exists():
                    continue
                try:
                    os.rename(fresh, path)
                except OSError:
                    if path.exists():  # another run was faster
                        continue
                    raise
                return RunFolder(path)
        except OSError as error:
            raise InputError(f"cannot make a run folder in {root}: {error.strerror or error}; name another") from None
        raise InputError(f"{root} is full of runs called {name}; give another name")

    def put(self, method: str, particles: Particles, final: bool = True) -> None:
        """Keep a method's answer (so far); ``final`` adds its line to metrics.jsonl."""
        particles.save(self.path / "particles" / f"{method}.safetensors")
        self.methods[method] = particles
        if final or time.monotonic() - self.written > SETTLE:
            rows = [r for m, p in self.methods.items() for r in sample_rows(m, p)]
            write_atomically(self.path / "samples.jsonl", _lines(rows))
            self.written = time.monotonic()
        if final:
            self._append("metrics.jsonl", metric_rows(method, particles))

    def failure(self, method: str, text: str, message: str) -> None:
        """Keep a text that a verifier could not cope with."""
        self._append("failures.jsonl", [{"method": method, "message": message, "text": text}])

    def comparison(self, table: Comparison) -> None:
        """Keep the table of a comparison."""
        told = {"formula": table.formula, "notes": table.notes, "rows": table.rows, "cells": table.cells()}
        write_atomically(self.path / "comparison.json", _bytes(told, 1))

    def discard(self) -> None:
        """Remove the folder: nothing came of it."""
        shutil.rmtree(self.path, ignore_errors=True)

    def close(self, status: str, message: str = "") -> None:
        """Say how it ended, and make the page."""
        from retrodict.report.html import write

        began = _json(self.path / "status.json").get("began", "")
        told = {"status": status, "message": message, "began": began, "ended": _now()}
        write_atomically(self.path / "status.json", _bytes(told))
        write(self.path)

    def _append(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        path = self.path / name
        before = path.read_bytes() if path.exists() else b""
        write_atomically(path, before + _lines(rows))


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


# -- reading one back -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """A run folder as read back."""

    path: Path
    config: Mapping[str, Any]
    environment: Mapping[str, Any]
    status: Mapping[str, Any]
    problems: Sequence[Mapping[str, Any]]
    methods: Mapping[str, Particles]
    comparison: Mapping[str, Any]
    failures: Sequence[Mapping[str, Any]]
    training: Mapping[str, tuple[Sequence[Mapping[str, Any]], Mapping[str, Any]]] = field(default_factory=dict)
    """Of each trained policy, its metrics step by step and what it came to."""


def read(path: str | os.PathLike[str]) -> Run:
    """Read a run folder; a missing, foreign or damaged one raises InputError with the file's name."""
    path = Path(path).expanduser()
    if not path.is_dir():
        raise InputError(f"no run folder {str(path)!r}; give one that a command wrote, such as runs/infill-001")
    if not (path / "config.yaml").is_file():
        inside = sorted(p.name for p in path.iterdir() if (p / "config.yaml").is_file())
        hint = f"; it holds run folders, such as {inside[-1]}" if inside else ""
        raise InputError(f"{path} is no run folder: it has no config.yaml{hint}")
    try:
        config = yaml.safe_load((path / "config.yaml").read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        why = next(iter(str(error).splitlines()), type(error).__name__)
        raise InputError(f"{path / 'config.yaml'} cannot be read: {why}") from None
    if not isinstance(config, dict):
        raise InputError(f"{path / 'config.yaml'} holds no keys")
    files = {p.stem: p for p in sorted((path / "particles").glob("*.safetensors"))}
    order = [m for m in config.get("sampler") or ("prior", "amortized") if m in files]
    methods = {m: Particles.load(files[m]) for m in dict.fromkeys([*order, *files])}
    return Run(
        path, config, _json(path / "environment.json"), _json(path / "status.json"), _jsonl(path / "problems.jsonl"),
        methods, _json(path / "comparison.json"), _jsonl(path / "failures.jsonl"),
        {p.name: (_jsonl(p / "metrics.jsonl"), _json(p / "about.json")) for p in sorted((path / "training").glob("*"))},
    )  # fmt: skip


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is damaged ({error}); remove it to go on without it") from None
    return data if isinstance(data, dict) else {}


def _jsonl(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    out = []
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").split("\n"), 1):
        try:
            row = json.loads(line) if line.strip() else None
        except ValueError as error:
            raise InputError(f"{path}, line {number}: damaged ({error}); remove it to go on without it") from None
        if isinstance(row, dict):
            out.append(row)
    return out
