"""The engine on Hugging Face modules: our decoder, LoRA views and the plain fallback against transformers itself."""

from __future__ import annotations

import pytest
import torch

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

import retrodict as rd  # noqa: E402
from retrodict.models.hf.model import HFModel  # noqa: E402
from retrodict.models.tabular import CharTokenizer, naive_suffixes  # noqa: E402
from retrodict.rng import generator  # noqa: E402
from retrodict.testing import check_model  # noqa: E402

pytestmark = pytest.mark.hf
ALPHABET = "".join(chr(i) for i in range(48, 48 + 40))


class Chars(CharTokenizer):
    """A character tokenizer in the shape HFModel expects."""

    special_ids: tuple[int, ...] = ()
    has_chat = False

    def token_bytes(self) -> list[bytes]:
        return [c.encode() for c in self.alphabet]


def wrapped(module: torch.nn.Module) -> HFModel:
    module.eval()
    return HFModel(module, Chars(ALPHABET), name="tiny", version="0", end_ids=(0,))  # pyright: ignore[reportArgumentType]


def llama(kind: str = "Llama", **more: object) -> torch.nn.Module:
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, **more,
    )  # fmt: skip
    return getattr(transformers, f"{kind}ForCausalLM")(config).double()


def gpt2() -> torch.nn.Module:
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=40, n_positions=64, n_embd=32, n_layer=2, n_head=4)
    return transformers.GPT2LMHeadModel(config).double()


@pytest.mark.parametrize(
    "module, fast",
    [(llama, True), (lambda: llama("Qwen2"), True), (lambda: llama("Qwen3", head_dim=8), True), (gpt2, False)],
    ids=["llama", "qwen2", "qwen3", "gpt2"],
)
def test_engine_equals_the_module(module, fast: bool) -> None:  # noqa: ANN001
    lm = wrapped(module())
    assert lm.fast is fast
    ids = torch.randint(0, 40, (3, 9), generator=generator(0))
    _, logits = lm.encode(ids.tolist())
    assert (logits.log_softmax(-1) - lm.raw_forward(ids)[:, -1].log_softmax(-1)).abs().max() < 1e-6
    check_model(lm)


@pytest.mark.parametrize("module", [llama, gpt2], ids=["our decoder", "plain"])
def test_adapter_is_a_view_and_the_base_is_the_prior(module) -> None:  # noqa: ANN001
    base = module().eval()
    ids = torch.randint(0, 40, (2, 7), generator=generator(1))
    with torch.no_grad():
        before = base(input_ids=ids).logits[:, -1].log_softmax(-1)
    targets = ["c_attn"] if "GPT2" in type(base).__name__ else ["q_proj", "v_proj", "down_proj"]
    model = peft.get_peft_model(
        base, peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets, init_lora_weights=False)
    )
    lm = wrapped(model.double())
    with torch.no_grad():
        after = model(input_ids=ids).logits[:, -1].log_softmax(-1)
    assert (after - before).abs().max() > 1e-3
    prior, policy = lm.view(None), lm.view("default")
    assert (prior.encode(ids.tolist())[1].log_softmax(-1) - before).abs().max() < 1e-6
    assert (policy.encode(ids.tolist())[1].log_softmax(-1) - after).abs().max() < 1e-6
    with pytest.raises(rd.InputError, match="no adapter 'defualt'; did you mean 'default'"):
        lm.view("defualt")


@pytest.fixture(scope="module")
def smollm2() -> HFModel:
    return rd.load("smollm2", dtype="float32", device="cpu")  # pyright: ignore[reportReturnType]


def test_every_prefix_reward_equals_one_at_a_time_on_a_real_model(smollm2: HFModel) -> None:
    story = rd.infill(smollm2, "The cat was hungry.", "Now the cat is sleepy.", stop=".", max_tokens=6)
    rows = rd.ancestral(story, n=6, seed=0).objects
    packed = story.factors["likelihood"](rows, every_prefix=True)
    p = story.problems[0]
    stop = story.space.stops.text_ids(0)
    slow = naive_suffixes(smollm2, [p.context] * 6, rows.moves, rows.n, [[(*stop, *p.evidence)] * 6], skip=1)
    live = torch.arange(rows.moves.shape[1] + 1) <= rows.n[:, None]
    assert (packed - slow)[live].abs().max() < 1e-4


def test_decoding_and_scoring_agree_on_a_real_model(smollm2: HFModel) -> None:
    target = rd.continuation(smollm2, "The weather in Scotland today is", stop=".", max_tokens=8)
    particles = rd.smc(target, n=8, runs=2, seed=0)
    drawn = particles.objects.terms["prior"]
    import dataclasses

    again = target.terms(dataclasses.replace(particles.objects, terms={}, versions={})).terms["prior"]
    assert (drawn - again).abs().max() < 1e-3


def test_the_latent_uses_what_comes_after(smollm2: HFModel) -> None:
    story = rd.infill(smollm2, "The cat was hungry.", "Now the cat is sleepy, not hungry.", stop=".", max_tokens=8)
    table = rd.compare(story, {"prior": story.prior, "importance": rd.importance(story, n=32, runs=4, seed=0)}, n=64)
    prior, weighed = (r["explains"] for r in table.rows)
    assert weighed - prior >= 2.0
