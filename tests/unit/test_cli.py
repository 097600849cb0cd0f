"""The command line: every bad input gets one line, and nothing that was finished is lost."""

from __future__ import annotations

import importlib.util
import inspect
import json
import sys
import textwrap
import types
from pathlib import Path

import pytest
import yaml

import retrodict as rd
import retrodict.models.load as door
from retrodict.cli import config, targets, train
from retrodict.cli.main import COMMANDS, main
from retrodict.errors import InputError
from retrodict.samplers.table import SAMPLERS

ALPHABET = ".abcdefgh <>&\n"
ROOT = Path(__file__).resolve().parents[2]
INFILL = ["--target", "infill", "--before", "abc", "--after", "<de.", "--join", "", "--max-tokens", "5"]
QUICK = ["--n", "8", "--runs", "2"]
real_load = door.load


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """The present folder is empty, and any model but those of the real door is a tiny random transformer."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(door, "load", lambda name, **how: rd.TinyLM(ALPHABET, seed=1) if name == "tiny" else
                        real_load(name, **how))  # fmt: skip
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    return tmp_path


def refused(capsys, *words: str, code: int = 2) -> str:
    """The one line on stderr of a command that must fail."""
    assert main(words) == code
    said = capsys.readouterr()
    assert said.err.startswith("retrodict: ") and said.err.count("\n") == 1 and "Traceback" not in said.err
    return said.err.removeprefix("retrodict: ").strip()


def recipe(folder: Path, text: str, name: str = "r.yaml") -> str:
    (folder / name).write_text(textwrap.dedent(text))
    return name


def lines(path: Path) -> list[dict]:
    return [json.loads(x) for x in path.read_text().splitlines()]


# -- flags and keys -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words, said", [
    (["sampel"], "unknown command 'sampel'; did you mean 'sample'?"),
    (["sample"], "no target"),
    (["sample", "--max-tokns", "3"], "unknown flag --max-tokns; did you mean --max-tokens?"),
    (["sample", "--n", "abc"], '--n: expected a whole number, found "abc"'),
    (["sample", "--n", "0"], "--n: must be at least 1, not 0"),
    (["sample", "--n"], "--n"),
    (["sample", "--target", "infil"], "did you mean 'infill'?"),
    (["sample", "--target", "infill", "--before", "a"], "needs 'after'"),
    (["sample", *INFILL, "a", "b"], "unexpected word 'b'"),
    (["sample", *INFILL, "--sampler", "smcc"], "unknown sampler \"smcc\"; did you mean 'smc'?"),
    (["sample", *INFILL, "--sampler", "smc", "mh"], "retrodict compare"),
    (["sample", *INFILL, "--resampling", "sistematic"], "did you mean 'systematic'?"),
    (["sample", *INFILL, "--steps", "3"], "--steps is unused: smc reads"),
    (["sample", *INFILL, "--tokens", "3"], "--tokens is unused: the target 'infill' reads"),
    (["sample", *INFILL, "--batch", "3"], "--batch is unused"),
    (["sample", *INFILL, "--simulated", "3"], "--simulated is unused by sample"),
    (["sample", *INFILL, "--verifier-kind", "bool"], "unused without 'verifier'"),
    (["sample", *INFILL, "--sampler", "exact", "--n", "3"], "--n is unused: exact reads"),
    (["sample", *INFILL, "--stop", ".", "--until", "a"], "'stop' or 'until', not both"),
    (["sample", *INFILL, "--min-tokens", "9"], "min_tokens 9 is over max_tokens 5"),
    (["sample", *INFILL, "--contain", "rain", "--avoid", "rain"], "rain"),
    (["sample", *INFILL, "--name", "a/b"], "cannot name a folder"),
    (["sample", *INFILL, "--dtype", "float3"], "did you mean 'float32'?"),
    (["sample", "--target", "continuation", "--prompt", ""], "empty prompt"),
    (["sample", "--target", "infill", "--before", "", "--after", "b"], "empty prompt"),
    (["sample", "--target", "scored", "--prompt", "a"], "needs 'verifier'"),
    (["sample", "--target", "scored", "--prompt", "a", "--verifier", "math"], "write my.module:fn"),
    (["sample", "--target", "scored", "--prompt", "a", "--verifier", "nope.mod:fn"], "no module 'nope'"),
    (["sample", "--target", "scored", "--prompt", "a", "--verifier", "math:sqr"], "did you mean 'sqrt'?"),
    (["sample", "--target", "scored", "--prompt", "a", "--verifier", "math:pi"], "not a function"),
    (["sample", "--target", "scored", "--prompt", "a", "--verifier", "math:exp", "--verifier-beta", "2"],
     "unused by verifier_kind 'prob'"),
    (["sample", "--target", "posterior", "--problems", "no.jsonl", "--context", "x"], "no file 'no.jsonl'"),
    (["sample", "--target", "including", "--prompt", "a"], "needs 'contain' or 'avoid'"),
    (["sample", "none.yaml"], "cannot read the recipe none.yaml: No such file"),
    (["bench", "exat"], "unknown suite 'exat'"),
    (["bench", "speed", "--json"], "--json needs a file"),
    (["bench", "speed", "--sed", "1"], "unknown flag --sed"),
    (["report"], "which run folder"),
    (["report", "runs/none-001"], "no run folder"),
    (["models", "--dtype", "f33"], "dtype 'f33' is unknown"),
])  # fmt: skip
def test_bad_flags_get_one_line(words, said, tiny, capsys):
    assert said in refused(capsys, *words)
    assert not (tiny / "runs").exists()


@pytest.mark.parametrize("text, said", [
    ("", "the recipe is empty"),
    ("# only a comment\n", "the recipe is empty"),
    ("- a\n- b\n", "expected 'key: value' lines"),
    ("target: infill\n  before: [", "line 2: not YAML"),
    ("target: infill\ntarget: infill\n", "stands twice"),
    ("target: infill\nbefor: a\n", "r.yaml: unknown key \"befor\"; did you mean 'before'?"),
    ("target: infill\nbefore: a\nafter: b\ntokens: 3\n", "r.yaml: key 'tokens' is unused"),
    ("target: infill\nbefore: a\nafter: b\nkernel: suffix\n", "r.yaml: key 'kernel' is unused: smc reads"),
    ("target: infill\nbefore: 3\nafter: b\n", "key 'before': expected text, found 3; write it in quotes"),
    ("target: infill\nbefore: a\nafter: yes\n", "key 'after': expected text, found true"),
    ("target: infill\nbefore: a\nafter: b\nmax_tokens: lots\n", "key 'max_tokens': expected a whole number"),
    ("target: infill\nbefore: a\nafter: b\nlookahead: fast\n", "key 'lookahead': expected a number"),
    ("target: continuation\nprompt: a\ncontain: rain\n", "expected a list of words, found \"rain\"; write [rain]"),
    ("target: infill\nbefore: a\nafter: b\nsampler: {smc: {nn: 3}}\n", "unknown option \"nn\"; did you mean 'n'?"),
    ("target: infill\nbefore: a\nafter: b\nsampler: {smc: {steps: 3}}\n", "option 'steps' is unused by smc"),
    ("target: infill\nbefore: a\nafter: b\nsampler: {smc: {n: x}}\n", "option 'n': expected a whole number"),
    ("target: infill\nbefore: a\nafter: b\nlimit: own_stop\nmin_tokens: 40\n", "over max_tokens"),
    ("target: infill\nbefore: a\nafter: b\nstop: none\nlimit: own_stop\n", "needs a stop"),
])  # fmt: skip
def test_bad_recipes_name_file_and_key(text, said, tiny, capsys):
    name = recipe(tiny, text)
    found = refused(capsys, "sample", name)
    assert said in found and name in found
    assert not (tiny / "runs").exists()


def test_every_parameter_of_the_library_is_a_key():
    """A sampler or target that learns an option cannot be left out of the recipes."""
    told = set(config.FIELDS)
    for name, fn in SAMPLERS.items():
        own = {targets.SAMPLER_NAMES.get(p, p) for p in inspect.signature(fn).parameters} - targets.NOT_KEYS
        assert own - targets.IGNORED.get(name, set()) <= told, name
    for kind in targets.TARGETS.values():
        assert set(kind.keys) <= told
        assert set(kind.needs) <= set(kind.keys)


def test_flags_win_and_options_of_one_sampler_stay_its_own(tiny):
    name = recipe(
        tiny,
        """
        target: continuation
        prompt: ab
        n: 4
        sampler: {smc: {n: 16, runs: 2}, wide: {sampler: importance, n: 32}, mh: {steps: 17}}
    """,
    )
    plan = config.load("compare", name, {})
    assert {m: x.said["n"] for m, x in plan.methods.items()} == {"smc": 16, "wide": 32, "mh": 4}
    assert plan.methods["wide"].name == "importance" and plan.methods["mh"].said["steps"] == 17
    from retrodict.cli.values import Words

    plan = config.load("sample", name, {"sampler": Words(["smc"]), "n": Words(["9"])})
    assert plan.methods["smc"].said["n"] == 9 and plan.methods["smc"].said["runs"] == 2


def test_help_of_every_command(capsys):
    assert main(["--help"]) == 0
    said = capsys.readouterr().out
    assert all(c in said for c in COMMANDS)
    for command in ("sample", "compare", "report", "models", "bench"):
        assert main([command, "--help"]) == 0, command
    assert "--ess-threshold" in capsys.readouterr().out


# -- what only the model can tell -----------------------------------------------------------------------------------


def test_bad_input_that_only_the_model_knows(tiny, capsys, monkeypatch):
    go = ["sample", "--model", "tiny", *INFILL, *QUICK]
    assert "cannot produce the stop 'ab'" in refused(capsys, *go, "--stop", "ab")
    long = ["--target", "continuation", "--prompt", "a" * 300, *QUICK]
    assert "over the context" in refused(capsys, "sample", "--model", "tiny", *long)
    assert "character 'z'" in refused(capsys, *go, "--before", "z")
    assert "objects" in refused(
        capsys, "sample", "--model", "tiny", *INFILL, "--sampler", "exact", "--max-objects", "9"
    )
    assert "no model './nope'" in refused(capsys, "sample", "--model", "./nope", *INFILL)
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "transformers" else find(name, *a)
    )
    assert "pip install 'retrodict[hf]'" in refused(capsys, "sample", "--model", "smollm2", *INFILL)
    assert not (tiny / "runs").exists() or not list((tiny / "runs").iterdir())


def test_zero_weights_name_the_factor_and_are_saved(tiny, capsys):
    (tiny / "zeros.py").write_text("def none(texts, rows):\n    return [False for _ in texts]\n")
    go = ["sample", "--model", "tiny", *INFILL, *QUICK, "--sampler", "importance"]
    said = refused(capsys, *go, "--verifier", "zeros:none", "--verifier-kind", "bool", code=1)
    assert "the factor 'verifier' is zero on every sample" in said and "runs/infill-001" in said
    assert (tiny / "runs/infill-001/report.html").exists()


@pytest.mark.parametrize("body, said", [
    ("raise KeyError('no such thing')", "raised KeyError"),
    ("return [float('nan') if len(t) > 2 else 0.5 for t in texts]", "returned NaN"),
    ("return [0.5]", "returned 1 values"),
    ("return [2.0 for t in texts]", "gave the probability 2.0"),
])  # fmt: skip
def test_a_failing_verifier_keeps_its_text(body, said, tiny, capsys):
    (tiny / f"bad{abs(hash(body))}.py").write_text(f"def score(texts, rows):\n    {body}\n")
    go = ["sample", "--model", "tiny", *INFILL, "--n", "32", "--runs", "1", "--name", "bad"]
    found = refused(capsys, *go, "--verifier", f"bad{abs(hash(body))}:score", code=1)
    assert said in found and "runs/bad-001" in found
    kept = lines(tiny / "runs/bad-001/failures.jsonl")
    assert len(kept) == 1 and kept[0]["method"] == "smc" and said in kept[0]["message"]
    assert len(kept[0]["text"]) > 2 or "NaN" not in said
    assert json.loads((tiny / "runs/bad-001/status.json").read_text())["status"] == "failed"
    assert "the verifier failed on" in (tiny / "runs/bad-001/report.html").read_text()


def test_debug_shows_where_a_bug_came_from(tiny, capsys, monkeypatch):
    monkeypatch.setattr(door, "load", lambda *a, **k: 1 / 0)
    assert "unexpected ZeroDivisionError" in refused(capsys, "sample", *INFILL, code=1)
    assert main(["sample", *INFILL, "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


# -- what works -----------------------------------------------------------------------------------------------------


def test_sample_leaves_a_folder_that_runs_again(tiny, capsys):
    name = recipe(
        tiny,
        """
        model: tiny
        target: infill
        before: abc
        after: <de.
        join: ""
        max_tokens: 5
        sampler: {smc: {n: 8, runs: 3}}
        seed: 3
    """,
    )
    assert main(["sample", name]) == 0
    said = capsys.readouterr()
    assert said.err == "" and "runs/r-001/report.html" in said.out and "log Z" in said.out
    first = tiny / "runs/r-001"
    rows = lines(first / "samples.jsonl")
    assert len(rows) == 24 and abs(sum(r["weight"] for r in rows) - 1) < 1e-6
    assert set(rows[0]["terms"]) == {"prior", "likelihood"}
    assert lines(first / "metrics.jsonl")[0]["runs"] == 3
    assert main(["sample", str(first / "config.yaml")]) == 0  # the resolved recipe is a recipe, and one seed one result
    again = tiny / "runs/r-002"
    assert (again / "samples.jsonl").read_text() == (first / "samples.jsonl").read_text()
    assert yaml.safe_load((again / "config.yaml").read_text()) == yaml.safe_load((first / "config.yaml").read_text())
    before = (first / "report.html").read_text()
    (first / "report.html").unlink()
    assert main(["report", str(first)]) == 0
    assert (first / "report.html").read_text() == before


@pytest.mark.parametrize("words", [
    ["--target", "continuation", "--prompt", "ab", "--temperature", "0.5"],
    ["--target", "continuation", "--prompt", "ab", "--until", "c"],
    ["--target", "of_length", "--prompt", "ab", "--tokens", "3", "--stop", "none"],
    ["--target", "including", "--prompt", "ab", "--contain", "a"],
    ["--target", "scored", "--prompt", "ab", "--verifier", "retrodict.cli.examples:cheerful", "--verifier-kind",
     "reward", "--verifier-beta", "0.5"],
    ["--target", "retrodict.targets.ready:continuation", "--prompt", "ab", "--short-words", "4"],
])  # fmt: skip
def test_every_kind_of_target(words, tiny, capsys):
    more = [] if "of_length" in words else ["--max-tokens", "5"]
    assert main(["sample", "--model", "tiny", *words, *more, *QUICK, "--sampler", "importance"]) == 0
    assert len(list((tiny / "runs").iterdir())) == 1


def test_problems_of_a_file_come_in_groups(tiny, capsys):
    (tiny / "q.jsonl").write_text("".join(json.dumps({"q": "abc"[: i + 1], "a": "de"}) + "\n" for i in range(3)))
    go = ["--target", "posterior", "--problems", "q.jsonl", "--context", "{q}", "--evidence", "<{a}.", "--stop", ".",
          "--max-tokens", "4", "--problem-name", "the {q}"]  # fmt: skip
    assert "no field 'b'" in refused(capsys, "sample", "--model", "tiny", *go, "--context", "{b}")
    assert main(["sample", "--model", "tiny", *go, *QUICK, "--batch", "2"]) == 0
    p = rd.Particles.load(tiny / "runs/posterior-001/particles/smc.safetensors")
    assert p.m == 3 and p.names == ("the a", "the ab", "the abc") and p.log_z is not None and p.log_z.shape == (3, 2)
    assert [r["context"] for r in lines(tiny / "runs/posterior-001/problems.jsonl")] == ["a", "ab", "abc"]


def test_compare_writes_one_table_and_two_sided_bounds(tiny, capsys):
    go = ["compare", "--model", "tiny", *INFILL, *QUICK, "--sampler", "ancestral", "importance", "smc"]
    assert main([*go, "--simulated", "2", "--name", "both"]) == 0
    told = json.loads((tiny / "runs/both-001/comparison.json").read_text())
    assert {r["method"] for r in told["rows"]} == {"ancestral", "importance", "smc"}
    assert all(isinstance(r["upper"], float) for r in told["rows"] if r["method"] == "smc")
    assert "upper bound" in (tiny / "runs/both-001/report.html").read_text()
    assert main(["compare", "--model", "tiny", *INFILL, *QUICK, "--max-tokens", "2", "--sampler", "exact", "smc"]) == 0


def test_demo_and_bench_are_called_with_their_own_flags(tiny, capsys, monkeypatch):
    seen = {}
    fake = types.ModuleType("retrodict.cli.demo")

    def demo(stories: int = 3, seed: int = 0) -> None:
        seen.update(stories=stories, seed=seed)

    monkeypatch.setattr(fake, "run", demo, raising=False)
    monkeypatch.setitem(sys.modules, "retrodict.cli.demo", fake)
    assert main(["demo", "--stories", "5"]) == 0 and seen == {"stories": 5, "seed": 0}
    assert "unknown flag --storys; did you mean --stories?" in refused(capsys, "demo", "--storys", "2")
    import retrodict.bench.rows as rows
    import retrodict.bench.speed as speed

    def run(seeds: int = 10) -> list:
        return [seeds]

    monkeypatch.setattr(speed, "run", run)
    monkeypatch.setattr(rows, "report", lambda found, path: seen.update(found=found, path=path) or 1)
    assert main(["bench", "speed", "--seeds", "2", "--json", "f.json"]) == 1
    assert seen["found"] == [2] and str(seen["path"]) == "f.json"


def test_models_says_what_would_be_loaded(tiny, capsys):
    assert main(["models", "--dtype", "float32"]) == 0
    said = capsys.readouterr().out
    assert "smollm2" in said and "float32: as asked" in said and ("cpu" in said or "cuda" in said)


@pytest.mark.hf
def test_a_recipe_on_the_real_model(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    go = ["--n", "4", "--runs", "2", "--max-tokens", "6", "--dtype", "float32"]
    assert main(["sample", str(ROOT / "recipes/infill.yaml"), *go]) == 0
    told = json.loads((tmp_path / "runs/infill-001/environment.json").read_text())
    assert told["model"]["name"] == "smollm2" and told["model"]["dtype"] == "float32"
    assert "The cat was hungry." in (tmp_path / "runs/infill-001/report.html").read_text()
    assert main(["models", "--load", "smollm2", "--dtype", "float32"]) == 0
    assert "49152 tokens" in capsys.readouterr().out


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda p: p.stem)
def test_the_recipes_are_sound(path, tiny):
    if "retrodict train" in path.read_text():
        assert train.plan(str(path), {}).settings.steps > 0
    else:
        assert config.load("sample", str(path), {}).methods


def test_an_unwritable_folder_is_refused_first(tiny, capsys):
    (tiny / "file").write_text("")
    assert "cannot write to 'file/runs'" in refused(capsys, "sample", *INFILL, "--out", "file/runs")


def test_import_path_says_what_a_module_raised(tiny):
    (tiny / "broken_module.py").write_text("def f(:\n")
    with pytest.raises(InputError, match=r"SyntaxError.*line 1"):
        targets.import_path("broken_module:f", "--verifier")
