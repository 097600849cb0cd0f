"""Data parallel training: rows are drawn and pushed where their process is, the objective sees them all.

Objectives compare samples of one problem, so they need the scores of the whole batch. Scores are a few numbers a row:
they are gathered, every process computes the same loss and dL/dScores, pushes its own rows, and gradients are summed.
The result is that of one process, in any split. Start it with ``accelerate launch`` or ``torchrun``.
"""

from __future__ import annotations

import atexit
import json
import logging
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load as from_bytes
from safetensors.torch import save as to_bytes
from torch import Tensor

from retrodict.errors import InputError
from retrodict.records import Rollouts, Scores, cat_rollouts
from retrodict.training.collect import Batch

log = logging.getLogger("retrodict")

FIELDS = ("problem", "moves", "kind", "n", "stop", "can_stop", "log_q", "log_stop", "log_b", "log_pb")


@dataclass(frozen=True)
class World:
    """The processes of a run; one by default, for which every method is the identity.

    ``together``: every process runs every row, because each holds a part of the weights (:func:`shard`).
    """

    rank: int = 0
    size: int = 1
    together: bool = False

    @property
    def parts(self) -> int:
        """In how many parts the rows of a step are run."""
        return 1 if self.together else self.size

    @property
    def first(self) -> bool:
        """Whether this process writes files."""
        return self.rank == 0

    @property
    def draws(self) -> bool:
        """Whether this process takes part in what one process could do alone (an evaluation)."""
        return self.first or self.together

    def mine(self, shards: int) -> range:
        """Which shards of a batch this process draws."""
        if shards % self.parts:
            raise InputError(f"{shards} shards cannot be shared by {self.size} processes; set shards to a multiple")
        each, at = shards // self.parts, self.rank % self.parts
        return range(at * each, (at + 1) * each)

    def rows(self, b: int, device: torch.device) -> Tensor:
        """The rows this process pushes through the model."""
        return torch.arange(b, device=device).tensor_split(self.parts)[self.rank % self.parts]

    def gather(self, mine: Sequence[Batch]) -> Batch:
        """All shards of all processes as one batch, in the order of shards."""
        if self.parts == 1:
            return joined(mine)
        device = mine[0].rollouts.n.device
        return joined([unpack(data, mine[0], device) for data in self._bytes(pack(joined(mine)))])

    def scores(self, part: Scores) -> list[Scores]:
        """The scores each process computed, in order of rank."""
        if self.parts == 1:
            return [part]
        device = part.log_q.device
        names = [x for x in ("log_q", "log_stop", "log_psi", "log_ahead") if getattr(part, x) is not None]
        tensors = {x: getattr(part, x).detach().cpu() for x in names}
        found = [from_bytes(x) for x in self._bytes(to_bytes({k: v.contiguous() for k, v in tensors.items()}))]
        return [Scores(**{name: y.to(device) for name, y in x.items()}) for x in found]

    def sum_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Add up the gradients of all processes, in place."""
        for p in parameters if self.parts > 1 else ():
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            dist.all_reduce(p.grad)

    def told(self, text: str) -> str:
        """What the first process says, to every one."""
        return text if self.size == 1 else self._bytes(text.encode() or b" ")[0].decode()

    def wait(self) -> None:
        """Until all processes are here: what the first wrote is there for the others."""
        if self.size > 1:
            dist.barrier()

    def _bytes(self, data: bytes) -> list[bytes]:
        """What each process gave, by way of padded byte tensors: nothing is pickled."""
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        size = torch.tensor([len(data)], device=device)
        sizes = [torch.zeros_like(size) for _ in range(self.size)]
        dist.all_gather(sizes, size)
        widest = max(int(s) for s in sizes)
        padded = torch.zeros(widest, dtype=torch.uint8, device=device)
        padded[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8).to(device)
        out = [torch.zeros_like(padded) for _ in sizes]
        dist.all_gather(out, padded)
        return [bytes(x[: int(s)].cpu().numpy().tobytes()) for x, s in zip(out, sizes, strict=True)]


ALONE = World()


def world_of(policy: Any) -> World:
    """The processes of a run: together where the policy's weights are spread over them."""
    here, module = world(), getattr(getattr(policy, "lm", None), "module", None)
    if here.size == 1 or module is None:
        return here
    from torch.distributed.tensor import DTensor

    return replace(here, together=any(isinstance(p, DTensor) for p in module.parameters()))


def shard(lm: Any) -> Any:
    """Spread the weights of a model's layers over the processes, in place: FSDP2's ``fully_shard`` on each layer.

    To be called by every process before the model is given an adapter; adapters, embeddings and head stay whole
    everywhere. A layer's weights are gathered whenever it runs, so all processes must run the same passes in the same
    order: ``amortize`` then has each of them draw and push every row. It saves memory and no time. The model runs
    through the transformers module, since our decoder knows no hooks. Loaded with ``device="cpu"`` it moves to the GPUs
    layer by layer.

    Raises InputError where there is one process, or no list of layers.
    """
    if world().size == 1:
        raise InputError("there is one process, and nothing to share weights with; start several with torchrun")
    module = getattr(lm, "module", None)
    layers = getattr(getattr(module, "base_model", None), "layers", None)
    if layers is None or lm.adapters:
        raise InputError(f"{lm.name} cannot be sharded: a transformers decoder without adapters is needed; call shard "
                         "right after rd.load(name)")  # fmt: skip
    from torch.distributed.fsdp import fully_shard

    lm.plain()
    for layer in layers:
        fully_shard(layer, reshard_after_forward=True)
    if torch.cuda.is_available() and lm.device.type == "cpu":
        lm.device = torch.device("cuda", torch.cuda.current_device())
        lm.module.to(lm.device)
    return lm


SIZES = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
RANKS = ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "MV2_COMM_WORLD_RANK")
"""Where torchrun (and accelerate, which runs it), Open MPI, Intel MPI and MVAPICH say how many and which."""


def world() -> World:
    """The processes that a launcher started (torchrun, accelerate launch, mpirun), joined; or this one alone."""
    size = _told(SIZES) if "MASTER_ADDR" in os.environ else 1  # where to meet: else they are runs of their own
    if size == 1:
        if "MASTER_ADDR" in os.environ and "ACCELERATE_MIXED_PRECISION" in os.environ and "RANK" not in os.environ:
            log.warning("accelerate launch --cpu starts one process unless it is given --mpirun_hostfile; for several "
                        "on this machine use torchrun, or --multi_gpu, which needs no GPU here")  # fmt: skip
        return ALONE
    if not dist.is_initialized():
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, rank=_told(RANKS), world_size=size)
        atexit.register(_leave)
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    return World(dist.get_rank(), dist.get_world_size())


def _told(names: Sequence[str]) -> int:
    """The first of these variables that is set, or 1."""
    return next((int(os.environ[x]) for x in names if x in os.environ), 1)


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def joined(batches: Sequence[Batch]) -> Batch:
    """Batches one after the other."""
    if len(batches) == 1:
        return batches[0]
    starts = [sum(len(b.rollouts) for b in batches[:i]) for i in range(len(batches))]
    own, new = (torch.cat([getattr(b, k) + at for b, at in zip(batches, starts, strict=True)]) for k in ("own", "new"))
    rows = cat_rollouts([b.rollouts for b in batches])
    return replace(batches[0], rollouts=rows, own=own, new=new, scored=sum(b.scored for b in batches),
                   seconds=sum(b.seconds for b in batches))  # fmt: skip


def pack(batch: Batch) -> bytes:
    """A batch as safetensors."""
    r = batch.rollouts
    tensors = {f: getattr(r, f) for f in FIELDS} | {f"term.{k}": v for k, v in r.terms.items()}
    tensors |= {"own": batch.own, "new": batch.new}
    told: dict[str, Any] = {"scored": batch.scored, "temperature": batch.temperature, "versions": dict(r.versions)}
    alone = {k: v.cpu().contiguous().clone() for k, v in tensors.items()}  # safetensors takes no shared memory
    return to_bytes(alone, {"told": json.dumps(told)})


def unpack(data: bytes, like: Batch, device: torch.device) -> Batch:
    """The batch that :func:`pack` wrote."""
    length = int.from_bytes(data[:8], "little")
    told = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["told"])
    tensors = {k: v.to(device) for k, v in from_bytes(data).items()}
    terms = {k.removeprefix("term."): v for k, v in tensors.items() if k.startswith("term.")}
    rows = Rollouts(**{f: tensors[f] for f in FIELDS}, terms=terms, versions=told["versions"],
                    behaviour=like.rollouts.behaviour)  # fmt: skip
    return Batch(rows, tensors["own"], tensors["new"], told["scored"], told["temperature"])
