"""Adapters: ours load in plain transformers and peft, those of others load here, and the fused form that trains is the
plain one: the same log-probabilities, the same gradients, and sampling that follows the parameters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from tokenizers import Tokenizer, decoders, models, pre_tokenizers  # noqa: E402

import retrodict as rd  # noqa: E402
from retrodict.errors import InputError  # noqa: E402
from retrodict.numerics import at_end  # noqa: E402
from retrodict.objectives.vargrad import vargrad  # noqa: E402
from retrodict.rng import generator  # noqa: E402
from retrodict.training.amortize import grow  # noqa: E402
from retrodict.training.step import push  # noqa: E402

pytestmark = pytest.mark.hf
QV = ["q_proj", "v_proj"]


def tokenizer() -> Any:
    """One token a byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tok = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tok.pre_tokenizer, tok.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tok, eos_token="</s>")


def llama(width: int = 16, layers: int = 2) -> Any:
    config = transformers.LlamaConfig(
        vocab_size=264, hidden_size=width, intermediate_size=32, num_hidden_layers=layers, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformers.LlamaForCausalLM(config)


def in_double(module: Any) -> Any:
    """The module in float64 throughout: transformers takes the norms of a float64 model in float32."""

    def forward(norm: Any, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.rms_norm(x, x.shape[-1:], norm.weight, norm.variance_epsilon)

    for m in module.double().modules():
        if type(m).__name__ == "LlamaRMSNorm":
            m.forward = forward.__get__(m)
    return module


def target_of(module: Any) -> rd.Target:
    lm = rd.load((module, tokenizer()))
    return rd.infill(lm, before="a cat", after=" sat", stop=".", max_tokens=5)


def moved(policy: Any, seed: int = 1) -> None:
    """Every parameter pushed off its start, B off zero."""
    with torch.no_grad():
        for i, p in enumerate(policy.parameters().values()):
            p.add_(0.2 * torch.randn(p.shape, generator=generator(seed, "cpu", i), dtype=torch.float64).to(p.dtype))
    policy.refresh()


def draws(policy: Any, n: int = 12, seed: int = 0) -> rd.Rollouts:
    return policy.sample(torch.zeros(n, dtype=torch.long), generator(seed))


def log_q(policy: Any, rows: rd.Rollouts) -> torch.Tensor:
    scores = policy.score(rows)
    inside = torch.arange(rows.moves.shape[1]) < rows.n[:, None]
    return torch.where(inside, scores.log_q, 0.0).sum(1) + at_end(scores.log_stop, rows.n, rows.stop)


def plain_log_p(module: Any, prompt: list[int], rows: rd.Rollouts) -> list[torch.Tensor]:
    """log p of each token drawn, by the transformers module itself, with gradient."""
    out = []
    for moves, n in zip(rows.moves.tolist(), rows.n.tolist(), strict=True):
        ids = torch.tensor([[*prompt, *moves[:n]]])
        logits = module(input_ids=ids).logits[0, len(prompt) - 1 : -1].double()
        out.append(logits.log_softmax(-1).gather(1, ids[0, len(prompt) :, None]).squeeze(1))
    return out


@pytest.mark.parametrize("targets", ["all-linear", QV], ids=["all-linear", "q and v"])
def test_a_saved_policy_loads_in_plain_transformers_and_peft(tmp_path: Path, targets: str | list[str]) -> None:
    base = tmp_path / "base"
    llama().save_pretrained(base)
    tokenizer().save_pretrained(base)
    lm = rd.load(str(base), dtype="float32", device="cpu")
    target = rd.infill(lm, before="a cat", after=" sat", stop=".", max_tokens=5)
    policy = grow(target, rank=3, alpha=7.0, targets=targets)
    before = log_q(target.prior, rows := draws(policy))
    moved(policy)
    assert (log_q(policy, rows) - before).abs().max() > 0.1
    policy.save(tmp_path / "adapter")

    plain = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    plain = peft.PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()
    raw = policy.score(rows, raw=True).log_q
    with torch.no_grad():
        for i, lp in enumerate(plain_log_p(plain, list(policy.prompt(policy.problems[0])), rows)):
            assert torch.allclose(raw[i, : len(lp)].double(), lp, atol=1e-4)

    again = rd.load_policy(target, tmp_path / "adapter")
    assert torch.allclose(log_q(again, rows), log_q(policy, rows), atol=1e-5)
    assert torch.allclose(log_q(target.prior, rows), before, atol=1e-6)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "base" and str(tmp_path) not in json.dumps(config)


@pytest.mark.parametrize("targets", ["all-linear", QV], ids=["all-linear", "q and v"])
def test_gradients_of_the_fused_adapter_are_those_of_plain_peft(targets: str | list[str]) -> None:
    target = target_of(in_double(llama()))
    policy = grow(target, rank=3, alpha=7.0, targets=targets)
    moved(policy)
    rows = draws(policy)
    scores = policy.score(rows, raw=True, grad=True)
    weight = torch.randn(scores.log_q.shape, generator=generator(2), dtype=torch.float64)
    inside = torch.arange(rows.moves.shape[1]) < rows.n[:, None]
    (torch.where(inside, scores.log_q, 0.0) * weight).sum().backward()
    policy.settle()
    fused = {k: p.grad.clone() for k, p in policy.parameters().items() if p.grad is not None}
    for p in policy.parameters().values():
        p.grad = None
    lm: Any = policy.lm
    lm.module.set_adapter(lm.adapter)
    found = plain_log_p(lm.module, list(policy.prompt(policy.problems[0])), rows)
    sum((lp * weight[i, : len(lp)]).sum() for i, lp in enumerate(found)).backward()  # pyright: ignore[reportAttributeAccessIssue]
    assert set(fused) == set(policy.parameters()) and len(fused) == (28 if targets == "all-linear" else 8)
    for k, p in policy.parameters().items():
        assert p.grad is not None and p.grad.abs().max() > 0
        assert (fused[k] - p.grad).abs().max() < 1e-9, k


def test_gradients_do_not_depend_on_the_micro_batch() -> None:
    target = target_of(llama().double())
    policy = grow(target, rank=3)
    moved(policy)
    rows = target.terms(draws(policy))
    found = []
    for micro in (None, 5):
        for p in policy.parameters().values():
            p.grad = None
        push(policy, vargrad, rows, target.log_gamma(rows), micro=micro)
        found.append([p.grad.clone() for p in policy.parameters().values() if p.grad is not None])
    assert all(torch.allclose(a, b, atol=1e-9) for a, b in zip(*found, strict=True))


def test_sampling_follows_the_parameters_after_refresh() -> None:
    target = target_of(llama().double())
    policy = grow(target, rank=3)
    rows = draws(policy)
    assert torch.allclose(rows.log_q.sum(1), draws(target.prior).log_q.sum(1))  # B = 0: the prior
    version, (name, p) = policy.version, next((k, p) for k, p in policy.parameters().items() if "lora_B" in k)
    with torch.no_grad():
        p.add_(1.0)
    stale = draws(policy)
    assert torch.equal(stale.moves, rows.moves), f"decoding read {name} before refresh"
    policy.refresh()
    new = draws(policy)
    assert policy.version != version and not torch.allclose(new.log_q[:, :1], rows.log_q[:, :1])
    inside = torch.arange(new.moves.shape[1]) < new.n[:, None]
    scored = torch.where(inside, policy.score(new).log_q, 0.0)
    assert torch.allclose(new.log_q, scored, atol=1e-9)  # decoded step by step, and teacher-forced


# -- adapters that others wrote -------------------------------------------------------------------------------------


def foreign(folder: Path, module: Any, **how: Any) -> Path:
    """An adapter as peft (and TRL, which saves through it) writes one."""
    config = peft.LoraConfig(r=2, init_lora_weights=False, task_type="CAUSAL_LM", **how)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        peft.get_peft_model(module, config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("how", [{"target_modules": QV}, {"target_modules": "all-linear", "use_rslora": True},
                                 {"target_modules": ["down_proj"], "rank_pattern": {"layers.1": 3}}])  # fmt: skip
def test_an_adapter_of_another_trainer_is_a_policy(tmp_path: Path, how: dict[str, Any]) -> None:
    folder = foreign(tmp_path / "theirs", llama(), **how)
    target = target_of(llama())
    state = torch.random.get_rng_state()
    policy = rd.load_policy(target, folder)
    assert torch.equal(state, torch.random.get_rng_state())
    rows = draws(policy)
    assert policy.sees == "x" and (log_q(policy, rows) - log_q(target.prior, rows)).abs().max() > 1e-3
    plain = peft.PeftModel.from_pretrained(llama().eval(), folder).eval()
    raw = policy.score(rows, raw=True).log_q
    with torch.no_grad():
        for i, lp in enumerate(plain_log_p(plain, list(policy.prompt(policy.problems[0])), rows)):
            assert torch.allclose(raw[i, : len(lp)].double(), lp, atol=1e-4)
    before = log_q(policy, rows)
    assert rd.amortize(target, policy, steps=2, samples=4, evaluate=4) is policy  # training goes on from there
    assert not torch.equal(log_q(policy, rows), before)
    table = rd.compare(target, {"prior": target.prior, "theirs": rd.load_policy(target, folder)}, n=8)
    assert "theirs" in str(table) and "theirs reads X" in " ".join(table.notes)


def test_an_adapter_loaded_with_the_model_is_a_policy_by_its_name(tmp_path: Path) -> None:
    folder = foreign(tmp_path / "theirs", llama(), target_modules=QV)
    lm = rd.load((llama(), tokenizer()), adapter=folder)
    target = rd.infill(lm, before="a cat", after=" sat", stop=".", max_tokens=5)
    named, read = rd.load_policy(target, "default", sees="xy"), rd.load_policy(target, folder, sees="xy")
    rows = draws(named)
    assert torch.allclose(log_q(named, rows), log_q(read, rows), atol=1e-6)
    assert named.sees == "xy" and not torch.allclose(log_q(named, rows), log_q(target.prior, rows), atol=1e-3)


def refused(target: rd.Target, folder: Path) -> str:
    with pytest.raises(InputError) as error:
        rd.load_policy(target, folder)
    text = str(error.value)
    assert "\n" not in text
    return text


def test_an_adapter_of_another_model_is_refused_and_leaves_no_trace(tmp_path: Path) -> None:
    target = target_of(llama())
    rows = draws(target.prior)
    prior: Any = target.prior
    before, lm = log_q(prior, rows), prior.lm
    wide = foreign(tmp_path / "wide", llama(width=32), target_modules=QV)
    assert "of another model: model.layers.0.self_attn.q_proj has in_features 16 here, 32 there" in refused(
        target, wide
    )
    deep = foreign(tmp_path / "deep", llama(layers=3), target_modules=QV)
    assert "of another model: this one has no model.layers.2.self_attn" in refused(target, deep)
    short = foreign(tmp_path / "short", llama(layers=1), target_modules=QV)
    assert "missing adapter keys" in refused(target, short)
    assert lm.adapters == [] and not hasattr(lm.module, "peft_config")
    assert torch.equal(log_q(target.prior, rows), before)
    dora = foreign(tmp_path / "dora", llama(), target_modules=QV, use_dora=True)
    assert "more than LoRA" in refused(target, dora)
    head = foreign(tmp_path / "head", llama(), target_modules=["lm_head"])
    assert "more than LoRA" in refused(target, head)
    assert torch.equal(log_q(target.prior, rows), before)
    damaged = foreign(tmp_path / "damaged", llama(), target_modules=QV)
    (damaged / "adapter_model.safetensors").write_bytes(b"no")
    assert "cannot be used" in refused(target, damaged)
    assert "no adapter in" in refused(target, tmp_path)


def test_more_than_lora_runs_where_the_module_is_loaded_with_it(tmp_path: Path) -> None:
    """The decoder would leave out what stands on the head: the module itself runs then."""
    folder = foreign(tmp_path / "head", llama(), target_modules=["lm_head", "q_proj"])
    lm: Any = rd.load((llama(), tokenizer()), adapter=folder)
    assert not lm.fast
    plain = peft.PeftModel.from_pretrained(llama().eval(), folder).eval()
    ids = [[1, 2, 3]]
    _, logits = lm.view("default").encode(ids)
    with torch.no_grad():
        assert torch.allclose(logits[0], plain(input_ids=torch.tensor(ids)).logits[0, -1], atol=1e-4)
