"""The cache of converted GGUF files: damage, races, leftovers."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from retrodict.errors import InputError

transformers = pytest.importorskip("transformers")

from retrodict.models.hf import gguf  # noqa: E402

pytestmark = pytest.mark.hf

# -- the GGUF cache -----------------------------------------------------------------------------------------------


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """A file that looks like a GGUF, and a conversion that writes small files; counts its calls."""
    monkeypatch.setenv("RETRODICT_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "toy.gguf"
    path.write_bytes(b"GGUF" + bytes(100))
    calls = []

    def write(source, into):
        calls.append(source)
        (into / "config.json").write_text("{}")
        (into / "model.safetensors").write_bytes(bytes(range(256)) * 40)

    monkeypatch.setattr(gguf, "_write", write)
    return path, calls


def _flip(folder: Path) -> None:
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[5000] ^= 1
    (folder / "model.safetensors").write_bytes(bytes(data))


DAMAGE = {
    "model.safetensors has changed": _flip,
    "model.safetensors has the wrong size": lambda d: os.truncate(d / "model.safetensors", 10),
    "config.json is missing": lambda d: (d / "config.json").unlink(),
    "its manifest cannot be read": lambda d: (d / gguf.MANIFEST).write_text('{"files": '),
    "its manifest is empty": lambda d: (d / gguf.MANIFEST).write_text('{"files": {}}'),
}


@pytest.mark.parametrize("fault", DAMAGE)
def test_a_corrupt_cache_is_repaired_once_and_said(fake, fault, caplog):
    path, calls = fake
    folder = gguf.convert(path)
    good = (folder / "model.safetensors").read_bytes()
    assert gguf.convert(path) == folder and len(calls) == 1 and not caplog.records
    DAMAGE[fault](folder)
    assert gguf.convert(path) == folder and len(calls) == 2
    assert len(caplog.records) == 1 and f"corrupt cache {folder} ({fault})" in caplog.text
    assert gguf.check(folder) is None and (folder / "model.safetensors").read_bytes() == good
    assert gguf.convert(path) == folder and len(calls) == 2
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]


def test_a_failed_conversion_leaves_nothing(fake, monkeypatch):
    path, _ = fake

    def fail(source, into):
        (into / "half").write_text("x")
        raise InputError("cannot read toy.gguf: broken")

    monkeypatch.setattr(gguf, "_write", fail)
    with pytest.raises(InputError, match="broken"):
        gguf.convert(path)
    assert not list((gguf.cache_folder() / "gguf").iterdir())


def test_two_processes_may_convert_at_once(fake, monkeypatch):
    path, calls = fake
    slow = gguf._write

    def write(source, into):
        slow(source, into)
        if len(calls) == 1:
            gguf.convert(path)  # another process, faster

    monkeypatch.setattr(gguf, "_write", write)
    folder = gguf.convert(path)
    assert len(calls) == 2 and gguf.check(folder) is None
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]


def test_another_file_is_another_entry(fake):
    path, calls = fake
    first = gguf.convert(path)
    path.write_bytes(b"GGUF" + bytes(99) + b"x")
    assert gguf.convert(path) != first and len(calls) == 2


def test_leftovers_of_a_killed_conversion_are_swept(fake):
    path, _ = fake
    folder = gguf.convert(path)
    old, new = (folder.parent / f"tmp-{folder.name}-{x}" for x in ("old", "new"))
    old.mkdir(), new.mkdir()
    os.utime(old, (time.time() - 7200,) * 2)
    DAMAGE["config.json is missing"](folder)
    gguf.convert(path)
    assert not old.exists() and new.exists()


def test_cache_folder_order_and_an_unwritable_one(fake, monkeypatch, tmp_path):
    path, _ = fake
    assert gguf.cache_folder() == tmp_path / "cache"
    monkeypatch.setenv("RETRODICT_CACHE", str(path))  # a file stands where the folder should be
    with pytest.raises(InputError, match="set RETRODICT_CACHE") as error:
        gguf.convert(path)
    assert "\n" not in str(error.value)
    monkeypatch.delenv("RETRODICT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert gguf.cache_folder() == Path("/x/retrodict")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert gguf.cache_folder() == Path.home() / ".cache" / "retrodict"


def test_files_beyond_a_gibibyte_are_sampled(tmp_path, monkeypatch):
    path = tmp_path / "big"
    path.write_bytes(os.urandom(1 << 16))
    whole = gguf.digest(path)
    monkeypatch.setattr(gguf, "WHOLE", 1000), monkeypatch.setattr(gguf, "CHUNK", 64)
    sampled = gguf.digest(path)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1  # the last chunk ends at the last byte
    path.write_bytes(bytes(data))
    assert len({whole, sampled, gguf.digest(path)}) == 3
