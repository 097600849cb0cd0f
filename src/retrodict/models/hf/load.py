"""Load a transformers model by name: hub id, folder, GGUF file, a (model, tokenizer) pair, or "smollm2".

Nothing here uses the network except for a hub id that is not on this machine. Weights come from safetensors (or
GGUF) only, and no code of a model's repository is run.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from retrodict.errors import InputError, MissingExtra, nearest
from retrodict.models.hf.gguf import convert, digest, quiet, smollm2_gguf
from retrodict.models.hf.shapes import PREFIX, random_model
from retrodict.models.hf.tokens import HFTokenizer, first_line
from retrodict.protocols import LanguageModel

log = logging.getLogger("retrodict")

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
LOCAL = ("smollm2",)
SAMPLED = 64
"""Numbers of each weight that enter a model's fingerprint."""

Name = str | Path | tuple[Any, Any]
Adapter = str | Path | Sequence[str | Path] | Mapping[str, str | Path] | None


@dataclass(frozen=True)
class Loaded:
    """A model as loaded, before it becomes a :class:`~retrodict.protocols.LanguageModel`.

    Attributes:
        module: the transformers (or PEFT) module, in evaluation mode.
        tokenizer: its tokenizer, sized to the model's vocabulary.
        name: how tables call it.
        version: fingerprint of configuration, sampled weights, adapters and dtype.
        dtype_note: the dtype, and why it.
        adapters: names of the adapters, the active one first.
    """

    module: Any
    tokenizer: HFTokenizer
    name: str
    version: str
    dtype_note: str
    adapters: tuple[str, ...] = ()

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Every id that ends an answer, the main one first."""
        return self.tokenizer.end_ids(getattr(self.module, "generation_config", None))

    @property
    def special_ids(self) -> tuple[int, ...]:
        """Ids that are no text."""
        return self.tokenizer.special_ids


def load(
    name: Name, *, adapter: Adapter = None, dtype: str | torch.dtype = "auto", device: Any = "auto"
) -> LanguageModel:
    """A language model ready for inference.

    Args:
        name: a hub id, a model folder, a ``.gguf`` file, a ``(model, tokenizer)`` pair, or ``"smollm2"`` (135M
            parameters, from the package index).
        adapter: a PEFT adapter folder, several, or a mapping from names to folders. The model that comes back is the
            base, which serves as the prior; ``lm.view(name)`` is the adapter ("default" where one folder is given).
        dtype: ``"auto"`` (bfloat16 where the processor is fast in it, else float32), a name or a torch dtype.
        device: ``"auto"`` (a CUDA GPU if there is one, else the CPU) or a torch device.
    """
    got = materialise(name, adapter, dtype, device)
    from retrodict.models.hf.model import HFModel

    log.info("%s: %s", got.name, got.dtype_note)
    return HFModel(
        got.module,
        got.tokenizer,
        name=got.name,
        version=got.version,
        end_ids=got.end_ids,
        special_ids=got.special_ids,
    )


def materialise(name: Name, adapter: Adapter = None, dtype: str | torch.dtype = "auto", device: Any = "auto") -> Loaded:
    """Everything :func:`load` does short of the wrapper: arguments checked, weights and adapters in place."""
    _need("transformers")
    folders = _adapters(adapter)
    if isinstance(name, (str, os.PathLike)):
        place = pick_device(device)
        kind, note = pick_dtype(dtype, place)
        module, tok, label = _load(name, kind, place)
        module.to(place)
        module.requires_grad_(False)
    else:
        module, tok = _pair(name)
        label = str(getattr(module.config, "_name_or_path", "") or type(module).__name__)
        place = module.device if device == "auto" else pick_device(device)
        as_given = module.dtype, f"{_spell(module.dtype)}: as given"
        kind, note = as_given if dtype == "auto" else pick_dtype(dtype, place)
        if (kind, place) != (module.dtype, module.device):
            module.to(device=place, dtype=kind)
            note += " (the given model was converted in place)"
    module.eval()
    version = fingerprint(module, folders)
    if folders:
        module = _with_adapters(module, folders)
    tokenizer = tok if isinstance(tok, HFTokenizer) else HFTokenizer(tok, _vocab_size(module))
    return Loaded(module, tokenizer, label, version, note, tuple(folders))


# -- dtype and device ---------------------------------------------------------------------------------------------


def pick_device(device: Any) -> torch.device:
    """The torch device asked for; "auto" is a CUDA GPU if there is one, else the CPU."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        place = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise InputError(f"device {device!r} is unknown; choose 'auto', 'cpu', 'cuda' or 'cuda:1'") from error
    if place.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device {str(device)!r} asked for, but torch sees no CUDA GPU here; use device='cpu'")
    return torch.device("cuda", torch.cuda.current_device()) if place == torch.device("cuda") else place


def pick_dtype(dtype: str | torch.dtype, device: torch.device) -> tuple[torch.dtype, str]:
    """The dtype to load in, and a note that says which and why."""
    if isinstance(dtype, str):
        dtype = dtype.removeprefix("torch.")
        if dtype == "auto":
            return _auto_dtype(device)
        if dtype not in DTYPES:
            raise InputError(f"dtype {dtype!r} is unknown{nearest(dtype, [*DTYPES, 'auto'])}")
        dtype = DTYPES[dtype]
    if dtype not in DTYPES.values():
        raise InputError(f"dtype {dtype!r} cannot hold a model's weights; choose one of {', '.join(DTYPES)}, auto")
    slow = dtype == torch.float16 and device.type == "cpu"
    return dtype, f"{_spell(dtype)}: as asked" + (" (slow on a CPU; try bfloat16 or float32)" if slow else "")


def _auto_dtype(device: torch.device) -> tuple[torch.dtype, str]:
    """bfloat16 where the processor multiplies it natively, else float32."""
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return (
                torch.bfloat16,
                f"bfloat16: native on {torch.cuda.get_device_name(device)}; pass dtype='float32' for exactness",
            )
        return torch.float32, f"float32: {torch.cuda.get_device_name(device)} has no native bfloat16"
    if device.type == "cpu":
        if has := sorted(cpu_flags() & {"amx_bf16", "avx512_bf16"}):
            return (
                torch.bfloat16,
                f"bfloat16: native on this processor ({', '.join(has)}); pass dtype='float32' for exactness",
            )
        return torch.float32, "float32: this processor has neither AMX nor AVX512-BF16"
    return torch.float32, f"float32: the safe choice on {device.type}"


def cpu_flags() -> frozenset[str]:
    """Instruction sets of this processor that torch can use, in the spelling of Linux's /proc/cpuinfo."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return frozenset(next((x.split(":", 1)[1] for x in lines if x.startswith("flags")), "").split())
    except OSError:
        told = getattr(torch.cpu, "get_capabilities", dict)()
        return frozenset(k for k, v in told.items() if v is True)


def _spell(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# -- where the model comes from -----------------------------------------------------------------------------------


def _load(name: str | os.PathLike[str], dtype: torch.dtype, device: torch.device) -> tuple[Any, Any, str]:
    """Module, tokenizer and label of a name that is no pair."""
    text = os.fspath(name)
    if text.startswith(PREFIX):
        return *random_model(text, dtype, device), text
    path = Path(text).expanduser()
    if text in LOCAL:
        return *_pretrained(convert(smollm2_gguf()), dtype, text), text
    if path.is_dir():
        files = sorted(path.glob("*.gguf"))
        if (path / "config.json").is_file():
            return *_pretrained(path, dtype, text), path.resolve().name
        if (path / "adapter_config.json").is_file():
            raise InputError(f"{text!r} is an adapter, not a model; write load(MODEL, adapter={text!r})")
        if len(files) == 1:
            return *_pretrained(convert(files[0]), dtype, text), files[0].stem
        many = f"holds {len(files)} GGUF files; name one of them" if files else "has no config.json; not a model folder"
        raise InputError(f"{text!r} {many}")
    if path.is_file() or path.suffix == ".gguf":
        return *_pretrained(convert(path), dtype, text), path.stem
    if text.startswith((".", "/", "~")) or text.count("/") > 1 or not text.strip():
        raise InputError(f"no model {text!r}: no such folder or file; local names: {', '.join(LOCAL)}")
    return *_from_hub(text, dtype), text


def _from_hub(name: str, dtype: torch.dtype) -> tuple[Any, Any]:
    """A hub id: from this machine's hub cache if it is there, else downloaded."""
    if _in_hub_cache(name):
        try:
            return _pretrained(name, dtype, name)
        except InputError as error:  # an incomplete download, or a model that cannot be loaded
            first = error
    else:
        first = None
    from huggingface_hub import HfApi

    try:  # one short question first: loading would retry an unreachable hub for half a minute
        HfApi().model_info(name, timeout=10)
    except Exception as error:  # httpx, huggingface_hub and OSError each have their own
        if first is not None:
            raise first from error
        close = nearest(name, LOCAL)
        hint = close if "did you mean" in close else ""
        gated = "; it is gated: accept its terms on the hub and log in" if "Gated" in type(error).__name__ else ""
        raise InputError(
            f"no model {name!r}: not a folder, not a GGUF file, and the hub could not be reached or has no such id"
            f"{gated}; local names: {', '.join(LOCAL)}{hint}"
        ) from error
    return _pretrained(name, dtype, name, online=True)


def _in_hub_cache(name: str) -> bool:
    """Whether the hub cache of this machine holds the configuration of ``name``."""
    from huggingface_hub import try_to_load_from_cache

    try:
        return isinstance(try_to_load_from_cache(name, "config.json"), str)
    except ValueError as error:  # HFValidationError: cannot be a hub id
        raise InputError(
            f"no model {name!r}: not a folder, not a GGUF file, and no hub id; local names: {', '.join(LOCAL)}"
        ) from error


def _pretrained(where: str | Path, dtype: torch.dtype, name: str, online: bool = False) -> tuple[Any, Any]:
    """Module and tokenizer through transformers; safetensors only, no remote code."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    auto: Any = AutoModelForCausalLM
    how: dict[str, Any] = {"local_files_only": not online, "trust_remote_code": False}
    part = "its tokenizer"
    try:
        with quiet():
            tok = AutoTokenizer.from_pretrained(where, **how)
            part = "its weights"
            module, found = auto.from_pretrained(
                where, dtype=dtype, use_safetensors=True, output_loading_info=True, **how
            )
    except ImportError as error:
        raise InputError(f"cannot load {name!r}: {part} need another package: {first_line(error)}") from error
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        hint = "; weights must be safetensors" if "safetensors" in str(error) else ""
        raise InputError(f"cannot load {name!r}: {part}: {first_line(error)}{hint}") from error
    if lost := sorted(map(str, [*found["missing_keys"], *found["mismatched_keys"]])):  # left random by transformers
        raise InputError(f"cannot load {name!r}: {len(lost)} weights are not in its files, {lost[0]} among them")
    return module, tok


def _pair(name: Any) -> tuple[Any, Any]:
    """A (model, tokenizer) pair, checked."""
    if not (isinstance(name, (tuple, list)) and len(name) == 2):
        raise InputError(f"a model is a name, a path or a (model, tokenizer) pair; got {type(name).__name__}")
    module, tok = name
    if not (isinstance(module, torch.nn.Module) and hasattr(module, "config") and hasattr(tok, "decode")):
        got = f"({type(module).__name__}, {type(tok).__name__})"
        raise InputError(f"the pair is (model, tokenizer), both from transformers; got {got}")
    return module, tok


def _vocab_size(module: Any) -> int:
    """Rows of the model's table of logits."""
    head = getattr(module, "get_output_embeddings", lambda: None)()
    return int(head.weight.shape[0] if head is not None else module.config.get_text_config().vocab_size)


# -- adapters and version -----------------------------------------------------------------------------------------


def _adapters(adapter: Adapter) -> dict[str, Path]:
    """Adapter folders by name, each checked."""
    if adapter is None:
        return {}
    if isinstance(adapter, (str, os.PathLike)):
        named = {"default": Path(adapter)}
    elif isinstance(adapter, Mapping):
        named = {str(k): Path(v) for k, v in adapter.items()}
    else:
        named = {Path(p).resolve().name.replace(".", "_"): Path(p) for p in adapter}
        if len(named) != len(adapter):
            raise InputError("two adapter folders have one name; give a mapping {name: folder}")
    from retrodict.models.hf.adapters import adapter_folder

    return {k: adapter_folder(p) for k, p in named.items()}


def _with_adapters(module: Any, folders: Mapping[str, Path]) -> Any:
    """The module under PEFT with the adapters of ``folders``, the first one active."""
    _need("peft")
    from retrodict.models.hf.adapters import put

    for name, path in folders.items():
        module = put(module, name, path)
    module.set_adapter(next(iter(folders)))
    module.requires_grad_(False)
    return module.eval()


def fingerprint(module: Any, adapters: Mapping[str, Path] | None = None) -> str:
    """A short name of what was loaded, so that caches and replays can refuse another model.

    blake2b of the configuration, of name, shape and 64 numbers of each weight, and of the adapters' files; the dtype
    follows it, since log-probabilities of one model differ between dtypes.
    """
    config = dict(module.config.to_dict())
    for key in ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache"):
        config.pop(key, None)
    h = hashlib.blake2b(json.dumps(config, sort_keys=True, default=str).encode(), digest_size=6)
    sampled = []
    for name, weight in module.named_parameters():
        h.update(f"{name}{tuple(weight.shape)}".encode())
        flat = weight.detach().reshape(-1)
        at = torch.linspace(0, max(flat.numel() - 1, 0), min(SAMPLED, flat.numel()), dtype=torch.float64)
        sampled.append(flat[at.long().to(flat.device)].double().cpu())
    if sampled:
        h.update(torch.cat(sampled).numpy().tobytes())
    for name, folder in (adapters or {}).items():
        h.update(f"{name}{(folder / 'adapter_config.json').read_text()}".encode())
        h.update(digest(folder / "adapter_model.safetensors").encode())
    return f"{h.hexdigest()}-{_spell(module.dtype)}"


def _need(package: str) -> None:
    """Refuse to go on without a package of the extra."""
    if importlib.util.find_spec(package) is None:
        raise MissingExtra(package, "hf")
