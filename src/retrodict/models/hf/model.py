"""Any transformers causal LM behind the LanguageModel protocol.

Llama-like modules run in our decoder (``models.decoder``) on the same weights; any other full-attention module runs
through its own forward with our cache and masks. The base is the prior for free: an adapter is a view.
"""

from __future__ import annotations

import os
import re
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from retrodict.errors import InputError, nearest
from retrodict.models.cached import CachedLM
from retrodict.models.decoder import Decoder, LowRank, refresh, settle
from retrodict.models.hf.adapters import WEIGHTS, Held, adapter_folder, drop, grow, read, save
from retrodict.models.hf.adopt import adopt, adoptable, attach
from retrodict.models.hf.gguf import digest
from retrodict.models.kv import KVCache


class HFModel(CachedLM):
    """A transformers module; ``fast`` says whether our decoder runs it."""

    def __init__(
        self,
        module: Any,
        tokenizer: Any,
        *,
        name: str,
        version: str,
        end_ids: tuple[int, ...] = (),
        special_ids: tuple[int, ...] = (),
        note: str = "",
        adapter: str | None = None,
        shared: HFModel | None = None,
    ) -> None:
        self.tokenizer: Any  # HFTokenizer, or anything with its methods
        self._held = shared._held if shared else Held(module)
        self.tokenizer, self.note, self.adapter = tokenizer, note, adapter
        self.base_name, self.base_version = name, version
        self.name = name if adapter is None else f"{name}+{adapter}"
        self.end_ids, self.special_ids = end_ids, special_ids
        parameter = next(module.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype
        self.accum = torch.float64 if self.dtype == torch.float64 else torch.float32
        config = module.config.get_text_config() if hasattr(module.config, "get_text_config") else module.config
        self.context = int(getattr(config, "max_position_embeddings", 1 << 30))
        self.vocab_size = int(module.get_output_embeddings().weight.shape[0])
        self.token_bytes = shared.token_bytes if shared else _padded(tokenizer.token_bytes(), self.vocab_size)
        if shared is not None:
            weights = shared.decoder.w if shared.decoder else None
        else:
            module.eval()
            weights = adopt(module) if adoptable(module) else None
        self.decoder = None if weights is None else Decoder(weights, adapter)
        self.fast = self.decoder is not None
        if not self.fast:
            self._plain_head = shared._plain_head if shared else self._probe()

    @property
    def module(self) -> Any:
        """The transformers module, inside PEFT once there is an adapter."""
        return self._held.module

    @property
    def version(self) -> str:
        """Fingerprint of the weights this view reads; it moves with every step of training."""
        if self.adapter is None:
            return self.base_version
        steps = self._held.updates.get(self.adapter)
        return f"{self.base_version}+{self.adapter}" + ("" if steps is None else f"@{steps}")

    @property
    def adapters(self) -> list[str]:
        """Names of the adapters that can be viewed."""
        return sorted(getattr(self.module, "peft_config", {}))

    def view(self, adapter: str | None) -> HFModel:
        """The same weights with another adapter, or (None) without: the frozen prior."""
        if adapter is not None and adapter not in self.adapters:
            have = nearest(adapter, self.adapters) if self.adapters else "; it has none"
            raise InputError(f"{self.base_name} has no adapter {adapter!r}{have}")
        return HFModel(self.module, self.tokenizer, name=self.base_name, version=self.base_version,
                       end_ids=self.end_ids, special_ids=self.special_ids, note=self.note, adapter=adapter,
                       shared=self)  # fmt: skip

    def plain(self) -> None:
        """From now on the module's own forward runs, here and in views made later: for hooks on it (FSDP)."""
        if self.decoder is not None:
            self.decoder, self.fast = None, False
            self._plain_head = self._probe()

    # -- training an adapter -------------------------------------------------------------------------------------

    def add_adapter(
        self,
        name: str,
        rank: int = 16,
        alpha: float | None = None,
        targets: str | list[str] = "all-linear",
        seed: int = 0,
    ) -> HFModel:
        """A view with a new trainable LoRA adapter, which starts as the base: B = 0. See ``hf.adapters.grow``."""
        grow(self._held, name, rank, alpha, targets, seed)
        if self.decoder is not None:
            attach(self.module, self.decoder.w, name)
        return self.view(name)

    def load_adapter(self, folder: str | os.PathLike[str]) -> HFModel:
        """A view with the adapter of a PEFT folder, which training may go on with; the base is left as it is.

        Its name is the folder's with a digest of its weights. Raises InputError for an adapter of another model, or one
        that this model's decoder cannot run (no plain LoRA of its projections).
        """
        path = adapter_folder(folder)
        name = free = f"{re.sub(r'[^0-9A-Za-z_]', '_', path.resolve().name)}_{digest(path / WEIGHTS)[:8]}"
        while free in self.adapters:  # a copy of its own: the other may have been trained on
            free = f"{name}_{len(self.adapters)}"
        read(self._held, free, path)
        if self.decoder is not None:
            if not adoptable(self.module):
                drop(self._held, free)
                raise InputError(f"the adapter in {str(folder)!r} is more than LoRA on a layer's projections; load it "
                                 f"with the model: rd.load(MODEL, adapter={str(folder)!r})")  # fmt: skip
            attach(self.module, self.decoder.w, free)
        return self.view(free)

    def parameters(self) -> dict[str, Tensor]:
        """The trainable tensors of this view's adapter, by name; empty for the base."""
        mark = f".{self.adapter}."
        return {
            n: p
            for n, p in self.module.named_parameters()
            if self.adapter is not None and p.requires_grad and mark in n and ".lora_" in n
        }

    def refresh(self) -> None:
        """After the adapter's tensors changed: decoding follows them, and the version moves."""
        assert self.adapter is not None
        self._held.updates[self.adapter] = self._held.updates.get(self.adapter, 0) + 1
        refresh(self._low_rank())

    @property
    def lora_scale(self) -> float | None:
        """lora_alpha / rank of this view's adapter; None for the base."""
        found = None if self.adapter is None else self.module.peft_config[self.adapter]
        return None if found is None else float(found.lora_alpha / found.r)

    def settle(self) -> None:
        """After a backward pass: gradients reach the adapter's own tensors."""
        settle(self._low_rank())

    def _low_rank(self) -> list[LowRank]:
        """The fused form of this view's adapter; nothing where the module itself runs."""
        layers = self.decoder.w.layers if self.decoder is not None else ()
        fused = [x for layer in layers for x in (layer.qkv, layer.out, layer.gate_up, layer.down)]
        return [x.lora[self.adapter] for x in fused if self.adapter in x.lora]

    def checkpoint_activations(self, on: bool) -> None:
        """Whether layers are run again in the backward pass, which saves memory and costs a third more time."""
        if self.decoder is not None:
            self.decoder.checkpointing = on
        elif on:
            raise InputError(f"{self.base_name}: activations of this architecture cannot be checkpointed here")

    def save_adapter(self, folder: str | os.PathLike[str]) -> None:
        """Write the view's adapter as a PEFT folder, see ``hf.adapters.save``."""
        if self.adapter is None:
            raise InputError(f"{self.base_name}: this view is the base; there is no adapter to save")
        save(self._held, self.adapter, self.base_name, folder)

    @torch.no_grad()
    def step(self, cache: KVCache, ids: Int[Tensor, " r"]) -> tuple[KVCache, Float[Tensor, "r v"]]:
        """Append one token a row."""
        if self.decoder is None or not self.decoder.graphed:
            return super().step(cache, ids)
        self._count(ids)
        return self.decoder.step(cache, ids)

    def take(self, cache: KVCache, index: Int[Tensor, " r2"]) -> KVCache:
        """Gather rows (repeats allowed)."""
        return super().take(cache, index) if self.decoder is None else self.decoder.take(cache, index)

    # -- the primitive -------------------------------------------------------------------------------------------

    def _run(
        self,
        ids: Int[Tensor, "r q"],
        pos: Int[Tensor, "r q"],
        block: int,
        cache: KVCache | None,
        visible: Bool[Tensor, "r n T"] | None,
        keep: bool = True,
    ) -> tuple[Tensor, Tensor, Tensor]:
        if self.decoder is not None:
            return self.decoder._run(ids, pos, block, cache, visible, keep)
        return self._run_module(ids, pos, block, cache, visible)

    def _head(self, x: Tensor) -> Float[Tensor, "c v"]:
        if self.decoder is not None:
            return self.decoder._head(x)
        return self.module.get_output_embeddings()(x) if self._plain_head else x

    def _active(self) -> AbstractContextManager[Any]:
        """Only this view's adapter is on."""
        if not self.adapters:
            return nullcontext()
        if self.adapter is None:
            return self.module.disable_adapter()
        self.module.set_adapter(self.adapter)
        return nullcontext()

    def _run_module(self, ids, pos, block, cache, visible) -> tuple[Tensor, Tensor, Tensor]:  # noqa: ANN001
        from transformers import DynamicCache

        r, q = ids.shape
        at = torch.arange(q, device=ids.device)
        own = (at[:, None] // block == at // block) & (at[:, None] >= at)
        mask = own.expand(r, 1, q, q)
        past = DynamicCache()
        used = 0
        if cache is not None and visible is not None:
            used = cache.used
            seen = visible.repeat_interleave(block, 1)[:, None]
            mask = torch.cat([seen, mask], -1)
            for i in range(cache.k.shape[0]):
                past.update(cache.k[i, :, :, :used], cache.v[i, :, :, :used], i)
        bias = torch.zeros(mask.shape, dtype=self.dtype, device=ids.device).masked_fill(
            ~mask, torch.finfo(self.dtype).min
        )
        body = self.module if not self._plain_head else self._body()
        with self._active():
            out = body(input_ids=ids, attention_mask=bias, position_ids=pos, past_key_values=past, use_cache=True)
        x = out.last_hidden_state if self._plain_head else out.logits
        layers = out.past_key_values.layers
        k, v = ([getattr(layer, side)[:, :, used:] for layer in layers] for side in ("keys", "values"))
        return x, torch.stack(k), torch.stack(v)

    def _body(self) -> Any:
        """The module without its head."""
        inner = self.module.get_base_model() if hasattr(self.module, "peft_config") else self.module
        return inner.base_model if inner.base_model is not inner else inner

    def _probe(self) -> bool:
        """Whether head(hidden) are the logits; where not (soft caps, scales) whole logits are kept instead.

        Raises InputError for modules whose state is not plain keys and values, or whose windows our masks ignore.
        """
        config = self.module.config
        if "sliding_attention" in (getattr(config, "layer_types", None) or []):
            raise InputError(f"{self.name}: sliding-window attention is not supported; use a full-attention model")
        ids = torch.tensor([[1, 2, 3]], device=self.device) % self.vocab_size
        pos = torch.arange(3, device=self.device)[None]
        self._plain_head = False
        try:
            logits, k, _ = self._run_module(ids, pos, 3, None, None)
            self._plain_head = True
            x, _, _ = self._run_module(ids, pos, 3, None, None)
            same = torch.allclose(
                self._head(x[0]).float(), logits[0].float(), atol=1e-3 if self.dtype != torch.float64 else 1e-9
            )
        except (AttributeError, TypeError, ValueError, RuntimeError, IndexError) as error:
            raise InputError(f"{self.name}: this architecture has no plain key-value cache ({error})") from error
        if k.dim() != 5:
            raise InputError(f"{self.name}: layers with different caches are not supported")
        return same

    def raw_forward(self, ids: Int[Tensor, "r t"]) -> Float[Tensor, "r t v"]:
        """Logits by the transformers module itself, for checks against the fast engine."""
        with self._active(), torch.no_grad():
            return self.module(input_ids=ids).logits

    def generate_plain(self, prompt: list[int], rows: int, tokens: int, seed: int = 0) -> Int[Tensor, "r t"]:
        """transformers ``generate`` by sampling at T = 1, no truncation: the yardstick of ``bench speed``."""
        ids = torch.tensor([prompt] * rows, device=self.device)
        with torch.random.fork_rng(), self._active(), torch.no_grad():
            torch.manual_seed(seed)
            return self.module.generate(ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0, top_p=1.0,
                                        temperature=1.0, repetition_penalty=1.0, min_new_tokens=tokens,
                                        max_new_tokens=tokens, pad_token_id=0)[:, len(prompt) :]  # fmt: skip


def _padded(table: list[bytes], size: int) -> list[bytes]:
    return [*table, *([b""] * (size - len(table)))][:size]
