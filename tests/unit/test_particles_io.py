"""Particles on disk and in tables: nothing lost, nothing executed, nothing believed that was damaged."""

from __future__ import annotations

import json
import math
import os
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from retrodict import particles_io
from retrodict.errors import InputError, MissingExtra
from retrodict.particles import Particles
from retrodict.records import Rollouts, Trace

NASTY = ("a\nb", "<script>alert(1)</script>", "\x1b[2Jgone", "naïve \ud800 日本", "", "[bold]not markup[/bold]")


def sample(**change) -> Particles:
    """Two problems, three particles each, with everything a sampler may fill in."""
    b, t, s = 6, 4, 2
    gen = torch.Generator().manual_seed(0)
    n = torch.tensor([0, 1, 2, 3, 4, 2])
    rows = Rollouts(
        problem=torch.arange(b) // 3,
        moves=torch.randint(0, 9, (b, t), generator=gen),
        kind=torch.ones(b, t, dtype=torch.int8),
        n=n,
        stop=torch.tensor([0, 1, 0, 1, 0, 1]),
        can_stop=torch.ones(b, t + 1, dtype=torch.bool),
        log_q=torch.randn(b, t, generator=gen),
        log_stop=torch.full((b, t + 1, s), -math.inf),
        log_b=torch.randn(b, t + 1, generator=gen).to(torch.bfloat16),
        log_pb=torch.zeros(1, 1).expand(b, t),
        terms={"prior": torch.randn(b, t + 1, s, generator=gen), "fit": torch.arange(b, dtype=torch.float64)},
        versions={"prior": "v1"},
        behaviour={"temperature": 0.5, "top": (1, 2), "mask": torch.tensor([1, 0])},
    )
    trace = Trace(
        "smc",
        settings={"seed": 3, "runs": 3, "reward": len, "bound": math.inf},
        ess=torch.tensor([[2.0, 1.5, 3.0, 3.0, 2.5, 1.2]]),
        resampled=torch.ones(1, 6, dtype=torch.bool),
        counts={"tokens": 12.0},
        notes=("stopped early",),
    )
    fields = {
        "objects": rows,
        "log_w": torch.tensor([[0.0, -1.0, -math.inf], [-2.0, -2.0, -2.5]], requires_grad=True),
        "log_z": torch.tensor([[-1.0, -1.2, -0.9], [-2.0, -2.2, -2.1]], dtype=torch.float64),
        "shown": NASTY,
        "keys": ((1, 2), (), (3,), (4, 5, 6), (4, 5, 6), (-(2**63),)),
        "trace": trace,
        "names": ("first", "second"),
    }
    return Particles(**{**fields, **change})


def same(a: Particles, b: Particles) -> bool:
    x, y = a.objects, b.objects
    tensors = [(getattr(x, f), getattr(y, f)) for f in particles_io._ROWS] + [(x.terms[k], y.terms[k]) for k in x.terms]
    tensors += [(a.log_w, b.log_w), (a.trace.ess, b.trace.ess), (a.trace.resampled, b.trace.resampled)]
    tensors += [] if a.log_z is None else [(a.log_z, b.log_z)]
    equal = all(p.dtype == q.dtype and torch.equal(p.detach(), q) for p, q in tensors)
    return equal and (a.shown, a.keys, a.names, x.terms.keys()) == (b.shown, b.keys, b.names, y.terms.keys())


def test_a_file_gives_everything_back(tmp_path: Path):
    p, path = sample(), tmp_path / "deep" / "er" / "p.safetensors"
    p.save(path)
    q = Particles.load(path)
    assert same(p, q) and [f.name for f in path.parent.iterdir()] == ["p.safetensors"]
    assert q.trace.roots is None and q.trace.notes == p.trace.notes and q.trace.counts == p.trace.counts
    assert q.trace.settings == {"seed": 3, "runs": 3, "reward": "<built-in function len>", "bound": math.inf}
    assert q.objects.behaviour == {"temperature": 0.5, "top": [1, 2], "mask": [1, 0]}
    q.save(path)
    assert same(p, Particles.load(str(path)))
    big = sample(keys=((2**80, 1), (), (3,), (4,), (5,), (6,)), log_z=None)
    big.save(path)
    assert same(big, Particles.load(path)) and Particles.load(path).log_z is None


def test_no_particles_and_no_moves_survive(tmp_path: Path):
    p = sample()
    none = torch.tensor([], dtype=torch.long)
    empty = sample(objects=p.objects.take(none), log_w=torch.zeros(2, 0), log_z=None, shown=(), keys=())
    empty.save(tmp_path / "e")
    assert Particles.load(tmp_path / "e").k == 0


def test_every_damaged_or_foreign_file_is_one_line(tmp_path: Path):
    path = tmp_path / "p.safetensors"
    sample().save(path)
    data = path.read_bytes()
    header = int.from_bytes(data[:8], "little") + 8
    bad = {
        "empty": b"",
        "text": b"not a safetensors file at all",
        "pickle": b"\x80\x04\x95" + bytes(40),
        "half": data[: len(data) // 2],
        "short by one": data[:-1],
        "long by one": data + b"\0",
        "a bit in a tensor": data[:-5] + bytes([data[-5] ^ 1]) + data[-4:],
        "a bit in a setting": data[:header].replace(b"stopped early", b"stopped Early") + data[header:],
    }
    for why, content in bad.items():
        path.write_bytes(content)
        with pytest.raises(InputError) as e:
            Particles.load(path)
        assert str(path) in str(e.value) and "\n" not in str(e.value) and "save" in str(e.value), why
    path.write_bytes(data)
    assert same(sample(), Particles.load(path)), "the control: the whole file still loads"


def test_random_damage_never_escapes_as_another_error(tmp_path: Path):
    path, g = tmp_path / "p", np.random.default_rng(0)
    sample().save(path)
    data = path.read_bytes()
    for _ in range(300):
        broken = bytearray(data)
        for at in g.integers(0, len(data), g.integers(1, 4)):
            broken[at] ^= 1 << int(g.integers(8))
        path.write_bytes(bytes(broken))
        if bytes(broken) != data:
            try:
                loaded = Particles.load(path)
            except InputError:
                continue
            assert same(sample(), loaded), "damage was believed"


def test_other_safetensors_files_versions_and_missing_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    save_file({"x": torch.zeros(2)}, tmp_path / "weights.safetensors")
    with pytest.raises(InputError, match="holds no particles"):
        Particles.load(tmp_path / "weights.safetensors")
    for missing in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(InputError, match="cannot read"):
            Particles.load(missing)
    monkeypatch.setattr(particles_io, "VERSION", 2)
    sample().save(tmp_path / "new")
    monkeypatch.undo()
    with pytest.raises(InputError, match="version 2.*upgrade"):
        Particles.load(tmp_path / "new")


def test_a_consistent_digest_does_not_excuse_wrong_shapes(tmp_path: Path):
    changes = {"shown": NASTY[:5], "log_w": torch.zeros(2, 2), "log_z": torch.zeros(3, 1), "keys": ()}
    for name, value in changes.items():
        p = sample()
        object.__setattr__(p, name, value)  # as a wrong writer would have left it
        p.save(tmp_path / "p")
        with pytest.raises(InputError, match="consistent"):
            Particles.load(tmp_path / "p")


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "p"
    sample().save(path)
    old = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match="No space left"):
        sample(names=("x", "y")).save(path)
    assert path.read_bytes() == old and [f.name for f in tmp_path.iterdir()] == ["p"]
    monkeypatch.undo()
    with open(path, "rb") as reader:
        sample(names=("x", "y")).save(path)
        assert reader.read() == old, "a reader of the old file must not see the new one being written"


def test_the_file_is_plain_safetensors_and_json(tmp_path: Path):
    sample().save(tmp_path / "p")
    data = (tmp_path / "p").read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    meta = header["__metadata__"]
    assert meta["format"] == "retrodict.particles" and json.loads(meta["meta"])["trace"]["method"] == "smc"
    assert "log_w" in header and "terms.fit" in header and b"\x80\x04" not in data[:2]


def test_pandas():
    pytest.importorskip("pandas")
    frame = sample().to_pandas()
    assert list(frame.columns[:7]) == ["problem", "name", "text", "n", "stop", "weight", "log_w"]
    assert frame["name"].tolist() == ["first"] * 3 + ["second"] * 3 and frame["text"].tolist() == list(NASTY)
    assert frame.groupby("problem")["weight"].sum().tolist() == pytest.approx([1, 1])
    assert frame["weight"][2] == 0 and frame["term_fit"].tolist() == [0, 1, 2, 3, 4, 5]
    prior = sample().objects.terms["prior"]
    assert frame["term_prior"][3] == pytest.approx(float(prior[3, 3, 1]))


def test_missing_extras_say_what_to_install(monkeypatch: pytest.MonkeyPatch):
    for name in ("pandas", "arviz", "arviz_base"):
        monkeypatch.setitem(sys.modules, name, None)
    for call, package in ((sample().to_pandas, "pandas"), (sample().to_arviz, "arviz")):
        with pytest.raises(MissingExtra, match=f"{package} is not installed.*diagnostics"):
            call()


def test_arviz_groups(monkeypatch: pytest.MonkeyPatch):
    """What ArviZ is handed, by a stand-in with its signature (the real one below where it is installed)."""
    got = {}

    def from_dict(data, *, coords, dims):
        got.update(data=data, coords=coords, dims=dims)
        return "tree"

    from_dict.__module__ = "arviz_base.io_dict"
    module = types.ModuleType("arviz_base")
    module.from_dict = from_dict  # pyright: ignore
    monkeypatch.setitem(sys.modules, "arviz_base", module)
    p = sample()
    assert p.to_arviz(4000, seed=1) == "tree"
    post = got["data"]["posterior"]
    assert {k: v.shape for k, v in post.items()} == dict.fromkeys(("length", "object", "prior", "fit"), (1, 4000, 2))
    assert not (post["fit"][0, :, 0] == 2).any(), "a particle of weight zero is never drawn"
    w = p.weights[0, 0].item()
    assert abs((post["fit"][0, :, 0] == 0).mean() - w) < 4.5 * math.sqrt(w * (1 - w) / 4000)
    assert abs((post["object"][0, :, 1] == 0).mean() - p.weights[1, :2].sum().item()) < 0.04
    assert got["coords"] == {"problem": ["first", "second"]} and got["dims"]["log_w"] == ["problem"]
    first = post["fit"].copy()
    p.to_arviz(4000, seed=1)
    assert (got["data"]["posterior"]["fit"] == first).all()
    p.to_arviz(4000, seed=2)
    assert (got["data"]["posterior"]["fit"] != first).any()
    chains = sample(log_z=None, log_w=torch.zeros(2, 3), trace=Trace("mh", {"chains": 3}))
    chains.to_arviz()
    assert got["data"]["posterior"]["fit"][:, 0].tolist() == [[0, 3], [1, 4], [2, 5]]
    dead = sample(log_w=torch.full((2, 3), -math.inf))
    with pytest.raises(InputError, match="no particle of problem first"):
        dead.to_arviz()


def test_arviz_itself():
    pytest.importorskip("arviz_base")
    tree = sample().to_arviz(50, seed=0)
    assert tree["posterior"]["fit"].shape == (1, 50, 2) and list(tree["posterior"].coords["problem"].values)


def test_repr_is_one_line_and_never_fails():
    p = sample()
    line = repr(p)
    assert line.startswith("Particles(smc: 2 problems x 3 particles, log Z -2.10 to -1.0") and "\n" not in line
    one = sample(objects=p.objects.take(torch.arange(3)), log_w=p.log_w[:1], log_z=p.log_z[:1], shown=NASTY[:3],
                 keys=p.keys[:3], names=("only",), trace=Trace("smc"))  # fmt: skip
    assert "±" in repr(one) and "2 distinct" in repr(one)
    without = repr(sample(log_z=None))
    assert "log Z" not in without and "ESS" not in without, "the equal weights of a chain have the ESS of its length"
    dead = sample(log_w=torch.full((2, 3), -math.inf), log_z=torch.full((2, 3), -math.inf), names=())
    assert "nan" not in repr(dead) and "no particle has weight" in dead._repr_html_()


def test_tables_cannot_be_steered_by_model_text():
    from rich.console import Console

    heavy = torch.full((1, 6), -30.0)
    for i, text in enumerate(NASTY):
        log_w = heavy.clone()
        log_w[0, i] = 0
        p = sample(log_w=log_w, log_z=None, names=("<b>&",), trace=Trace("<i>"), keys=tuple((j,) for j in range(6)))
        page = p._repr_html_()
        assert "<script" not in page and "<b>" not in page and "<i>" not in page and "&lt;b&gt;&amp;" in page
        console = Console(width=200, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
        console.print(p)
        out = console.export_text()
        assert "\x1b" not in out, text
    assert "[bold]not markup[/bold]" in out
    assert particles_io.printable("a\nb\x1b[2J") == "a\\nb\\x1b[2J"
    assert len(particles_io.printable("x" * 99)) == particles_io.SHOWN
