"""Particles on disk, in pandas and ArviZ, and as people see them. Nothing here computes a weight.

The file is one safetensors file: every tensor by name, ragged keys and texts as flat tensors with lengths, the rest as
one JSON text in the header, with a digest of all of it. No pickle: reading a file runs no code. What JSON cannot hold
(a function among the settings) is kept as its ``repr``; tuples come back as lists.
"""

from __future__ import annotations

import dataclasses
import hashlib
import html
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from retrodict.errors import InputError, MissingExtra
from retrodict.numerics import at_end
from retrodict.particles import Particles
from retrodict.records import Rollouts, Trace

if TYPE_CHECKING:
    import pandas
    import rich.table

VERSION = 1
_ROWS = tuple(f.name for f in dataclasses.fields(Rollouts) if f.name not in ("terms", "versions", "behaviour"))
_TEXT = ("method", "settings", "counts", "notes")
_TRACE = tuple(f.name for f in dataclasses.fields(Trace) if f.name not in _TEXT)
SHOWN = 60
"""Characters of a text in a table."""


# On disk


def save(particles: Particles, path: str | os.PathLike[str]) -> Path:
    """Write the particles to one safetensors file, whole or not at all; the folder is made where it is missing."""
    p, r, t = particles, particles.objects, particles.trace
    tensors = {f"objects.{f}": getattr(r, f) for f in _ROWS} | {f"terms.{k}": v for k, v in r.terms.items()}
    tensors |= {f"trace.{f}": getattr(t, f) for f in _TRACE if getattr(t, f) is not None}
    tensors |= {"log_w": p.log_w} | ({} if p.log_z is None else {"log_z": p.log_z})
    tensors |= ragged("shown", [s.encode("utf-8", "surrogatepass") for s in p.shown], torch.uint8)
    meta: dict[str, Any] = {"names": list(p.names), "behaviour": _plain(r.behaviour), "versions": _plain(r.versions)}
    meta["trace"] = {f: _plain(getattr(t, f)) for f in _TEXT}
    pack_keys(p.keys, tensors, meta)
    return write_tensors(path, "particles", tensors, meta)


def load(path: str | os.PathLike[str]) -> Particles:
    """Read what :func:`save` wrote, on the CPU. Anything else raises one line that names the file."""
    tensors, meta = read_tensors(path, "particles", "Particles.save")
    try:
        return _rebuild(tensors, meta)
    except (KeyError, IndexError, TypeError, ValueError, RuntimeError) as e:
        raise InputError(f"{path} does not hold consistent particles ({e}); save it again") from None


def write_tensors(
    path: str | os.PathLike[str], kind: str, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]
) -> Path:
    """Write tensors and what JSON holds beside them to one safetensors file with a digest, whole or not at all."""
    from safetensors.torch import save as to_bytes

    tensors = {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}
    text = json.dumps(meta)
    header = {"format": f"retrodict.{kind}", "version": str(VERSION), "meta": text, "digest": _digest(tensors, text)}
    return write_atomically(path, to_bytes(tensors, header))


def read_tensors(path: str | os.PathLike[str], kind: str, writer: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors (on the CPU) and the rest of a file of this ``kind``, which ``writer`` wrote.

    Raises:
        InputError: no such file, another kind of file, a newer version, or damage; one line that names the file.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load as from_bytes

    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as e:
        raise InputError(f"cannot read {path} ({e.strerror or e}); give the path that {writer} wrote") from None
    try:
        tensors = from_bytes(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__") or {}
        text = header.get("meta", "{}")
        meta = json.loads(text)
    except (SafetensorError, ValueError, KeyError) as e:
        reason = " ".join(str(e).split())
        raise InputError(f"{path} is not a {kind} file, or is cut short ({reason}); save it again") from None
    if header.get("format") != f"retrodict.{kind}":
        raise InputError(f"{path} is a safetensors file but holds no {kind}; give a file that {writer} wrote")
    if header.get("version") != str(VERSION):
        raise InputError(f"{path} has format version {header.get('version')}, this is {VERSION}; upgrade retrodict")
    if header.get("digest") != _digest(tensors, text):
        raise InputError(f"{path} is damaged (its digest does not match); save it again")
    return tensors, meta


def write_atomically(path: str | os.PathLike[str], data: bytes) -> Path:
    """Write a file so that a reader, or a kill at any moment, sees the old one or the new one and never a part."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(part, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, path)
    except OSError as e:
        raise InputError(f"cannot write {path} ({e.strerror or e}); give a path to a file in a writable folder") from e
    finally:
        part.unlink(missing_ok=True)
    return path


def _rebuild(tensors: dict[str, Tensor], meta: dict[str, Any]) -> Particles:
    def under(prefix: str) -> dict[str, Tensor]:
        return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

    rows, log_w, log_z = under("objects."), tensors["log_w"], tensors.get("log_z")
    objects = Rollouts(**rows, terms=under("terms."), versions=meta["versions"], behaviour=meta["behaviour"])
    shown = [bytes(s).decode("utf-8", "surrogatepass") for s in unragged(tensors, "shown")]
    keys = unpack_keys(tensors, meta)
    t = meta["trace"]
    b, long = log_w.numel(), objects.moves.shape[1]
    shapes = [(k, v.shape[0] == b) for k, v in (rows | under("terms.")).items()]
    shapes += [(k, rows[k].shape[1] == long) for k in ("kind", "log_q", "log_pb")]
    shapes += [(k, rows[k].shape[1] == long + 1) for k in ("can_stop", "log_stop", "log_b")]
    shapes += [("shown", len(shown) == b), ("keys", len(keys) == b), ("log_w", log_w.dim() == 2)]
    shapes += [("n", b == 0 or (0 <= int(rows["n"].min()) and int(rows["n"].max()) <= long))]
    shapes += [("log_z", log_z is None or (log_z.dim() == 2 and len(log_z) == len(log_w)))]
    wrong = [k for k, good in shapes if not good]
    if wrong:
        raise ValueError(f"{', '.join(wrong)} does not fit the other tensors")
    trace = Trace(t["method"], t["settings"], counts=t["counts"], notes=tuple(t["notes"]), **under("trace."))
    return Particles(objects, log_w, log_z, tuple(shown), tuple(keys), trace, tuple(meta["names"]))


def ragged(name: str, rows: Sequence[Sequence[int]], dtype: torch.dtype) -> dict[str, Tensor]:
    """Rows of different lengths as one flat tensor and their lengths."""
    flat = [i for row in rows for i in row]
    return {
        f"ragged.{name}": torch.tensor(flat, dtype=dtype),
        f"ragged.{name}.size": torch.tensor([len(row) for row in rows], dtype=torch.int64),
    }


def unragged(tensors: Mapping[str, Tensor], name: str) -> list[list[int]]:
    """The rows that :func:`ragged` stored."""
    return [x.tolist() for x in tensors[f"ragged.{name}"].split(tensors[f"ragged.{name}.size"].tolist())]


def pack_keys(keys: Sequence[tuple[int, ...]], tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
    """Add the keys to a file's tensors, or to its JSON where one has more than 64 bits."""
    if all(-(2**63) <= i < 2**63 for key in keys for i in key):
        tensors |= ragged("keys", keys, torch.int64)
    else:
        meta["keys"] = [[int(i) for i in key] for key in keys]


def unpack_keys(tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> list[tuple[int, ...]]:
    """The keys that :func:`pack_keys` added."""
    return [tuple(key) for key in (meta["keys"] if "keys" in meta else unragged(tensors, "keys"))]


def _digest(tensors: Mapping[str, Tensor], text: str) -> str:
    h = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        x = tensors[name]
        h.update(f"\0{name} {x.dtype} {tuple(x.shape)}\0".encode())
        h.update(x.contiguous().flatten().view(torch.uint8).numpy().tobytes() if x.numel() else b"")
    return h.hexdigest()


def _plain(x: Any) -> Any:
    """x as JSON holds it; what it cannot hold as its repr."""
    if x is None or isinstance(x, (bool, int, float, str)):
        return x
    if isinstance(x, Mapping):
        return {str(k): _plain(v) for k, v in x.items()}
    if isinstance(x, (list, tuple)):
        return [_plain(v) for v in x]
    if isinstance(x, Tensor) or type(x).__module__ == "numpy":
        return x.tolist()
    return repr(x)


# Into other libraries


def terms_of(objects: Rollouts) -> dict[str, Tensor]:
    """Each term's value at the object itself, ``[b]`` in nats: prefix terms are read at (n, stop).

    Helper entries that are values of neither (two axes) are left out.
    """
    whole = {k: v for k, v in objects.terms.items() if v.dim() == 1}
    return whole | {k: at_end(v, objects.n, objects.stop) for k, v in objects.terms.items() if v.dim() == 3}


def names_of(particles: Particles) -> list[str]:
    """The problems' names, numbers where they have none."""
    return [n or str(i) for i, n in enumerate(particles.names or [""] * particles.m)]


def to_pandas(particles: Particles) -> pandas.DataFrame:
    """One row an object: problem, name, text, n, stop, weight (sums to one a problem), log_w, and term_NAME (nats)."""
    try:
        import pandas as pd
    except ImportError:
        raise MissingExtra("pandas", "diagnostics") from None
    p = particles
    names = names_of(p)
    columns: dict[str, Any] = {
        "problem": [i for i in range(p.m) for _ in range(p.k)],
        "name": [names[i] for i in range(p.m) for _ in range(p.k)],
        "text": pd.Series(p.shown, dtype=object),  # not pyarrow's strings: byte-level models write lone surrogates
        "n": p.objects.n.tolist(),
        "stop": p.objects.stop.tolist(),
        "weight": p.weights.flatten().tolist(),
        "log_w": p.log_w.flatten().tolist(),
    }
    return pd.DataFrame(columns | {f"term_{k}": v.tolist() for k, v in terms_of(p.objects).items()})


def to_arviz(particles: Particles, n: int | None = None, seed: int = 0) -> Any:
    """The sample as ArviZ reads it (a DataTree; InferenceData before ArviZ 1.0), with equal weights.

    ArviZ knows no weights, so n draws a problem (default k) are drawn from the weighted sample with replacement, as one
    chain; the draws of an MCMC have equal weights already and keep their chains. The variables are numbers, with a
    dimension ``problem``: ``length``, ``object`` (0 for the heaviest distinct object, 1 for the next, ...), and each
    term; the log-weights go to ``sample_stats``. ArviZ's ESS of resampled draws says nothing: use the particles' own.
    """
    try:
        try:
            from arviz_base import from_dict  # pyright: ignore[reportMissingImports]
        except ImportError:
            from arviz import from_dict  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise MissingExtra("arviz", "diagnostics") from None
    p, chains = particles, particles.chains
    if p.log_z is None and chains > 1 and p.k % chains == 0 and n is None:
        pick = torch.arange(p.k).repeat(p.m, 1)
    else:
        from retrodict.rng import generator

        chains, w = 1, p.weights.double().cpu()
        dead = [name for name, total in zip(names_of(p), w.sum(1).tolist(), strict=True) if not total]
        if dead:
            raise InputError(f"no particle of problem {dead[0]} has weight, so there is nothing to resample")
        pick = torch.multinomial(w, n or p.k, replacement=True, generator=generator(seed))
    rank = [{key: i for i, key in enumerate(p.counts(q))} for q in range(p.m)]
    number = [rank[i // p.k].get(key, len(rank[i // p.k])) for i, key in enumerate(p.keys)]
    posterior = {"length": p.objects.n, "object": torch.tensor(number), **terms_of(p.objects)}

    def draws(x: Tensor) -> Any:
        taken = x.detach().cpu().view(p.m, p.k).gather(1, pick)
        return taken.T.reshape(chains, -1, p.m).numpy()

    groups = {"posterior": {k: draws(v) for k, v in posterior.items()}, "sample_stats": {"log_w": draws(p.log_w)}}
    variables = {name: ["problem"] for group in groups.values() for name in group}
    extra: dict[str, Any] = {"coords": {"problem": names_of(p)}, "dims": variables}
    modern = from_dict.__module__.split(".")[0] == "arviz_base"
    return from_dict(groups, **extra) if modern else from_dict(**groups, **extra)


# For people


def printable(text: str, limit: int = SHOWN) -> str:
    """One line of at most ``limit`` characters, control characters written out: model text cannot steer a terminal."""
    line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text[: limit + 1])
    return line if len(line) <= limit else line[: limit - 3] + "..."


def _range(x: Sequence[float], digits: int = 1) -> str:
    x = [v for v in x if not math.isnan(v)] or [math.nan]
    low, high = (f"{v:.{digits}f}" for v in (min(x), max(x)))
    return low if low == high else f"{low} to {high}"


def summary_rows(particles: Particles) -> tuple[list[str], list[list[str]]]:
    """Column heads and one row a problem: what the tables print."""
    p, rows = particles, []
    evidence = None if p.evidence is None else [x.tolist() for x in p.evidence]
    smallest, last = p.min_ess.tolist(), p.ess.tolist()
    for q, name in enumerate(names_of(p)):
        z = "--"
        if evidence is not None:
            z = f"{evidence[0][q]:.2f}" + (f" ± {evidence[1][q]:.2f}" if math.isfinite(evidence[1][q]) else "")
        best = p.best(q, 1)
        text, share = (printable(best[0][0]), f"{best[0][1]:.0%}") if best else ("(no particle has weight)", "0%")
        size = (
            ["--", "--"] if p.log_z is None else [f"{smallest[q]:.1f}", f"{last[q]:.1f}"]
        )  # equal weights say nothing
        rows.append([name, z, *size, str(p.distinct(q)), share, text])
    return ["problem", "log Z", "min ESS", "ESS", "distinct", "share", "heaviest"], rows


def describe(particles: Particles) -> str:
    """One line: method, sizes, log-evidence, ESS, distinct objects."""
    p = particles
    size = f"{p.k} particles" if p.m == 1 else f"{p.m} problems x {p.k} particles"
    parts = [f"{p.trace.method}: {size}"]
    if p.evidence is not None and p.m:
        value, se = (x.tolist() for x in p.evidence)
        error = f" ± {se[0]:.2f}" if p.m == 1 and math.isfinite(se[0]) else ""
        parts.append(f"log Z {_range(value, 2)}{error}")
        parts.append(f"min ESS {_range(p.min_ess.tolist())}")
    if p.m:
        parts.append(f"{_range([float(p.distinct(q)) for q in range(p.m)], 0)} distinct")
    return f"Particles({', '.join(parts)})"


def rich_table(particles: Particles) -> rich.table.Table:
    """A table for the terminal, one row a problem."""
    from rich.table import Table
    from rich.text import Text

    head, rows = summary_rows(particles)
    table = Table(title=Text(f"{particles.trace.method}, {particles.k} particles a problem"), title_justify="left")
    for column in head:
        table.add_column(column, justify="left" if column in ("problem", "heaviest") else "right")
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def html_table(particles: Particles) -> str:
    """The same table as HTML, every text escaped."""
    head, rows = summary_rows(particles)
    cells = ["".join(f"<td>{html.escape(c)}</td>" for c in row) for row in rows]
    top = "".join(f"<th>{html.escape(c)}</th>" for c in head)
    body = "".join(f"<tr>{row}</tr>" for row in cells)
    caption = html.escape(describe(particles))
    return f"<table><caption>{caption}</caption><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"
