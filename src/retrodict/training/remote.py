"""Training on samples that servers draw: scores and gradients are computed here, the adapter is pushed every few steps.

An objective of the GFlowNet family takes samples from any distribution (Hu et al. 2024, arXiv:2310.04363, section 3.3),
so a server may lag behind. How far, in steps, is recorded with the samples; rows of an older adapter are not q's own,
and no on-policy metric is made from them. ``log_q`` and ``log_stop`` are always the local policy's.
"""

from __future__ import annotations

import os
import shutil
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from retrodict.errors import InputError
from retrodict.models.server import ServerLM
from retrodict.policies.agreement import NOTHING, Agreement, agreement
from retrodict.policies.amortized import Amortized
from retrodict.policies.lm import LMPolicy
from retrodict.policies.server import ServerPolicy
from retrodict.protocols import LanguageModel, Problems
from retrodict.records import Rollouts, Scores
from retrodict.rng import generator
from retrodict.spaces.strings import Strings

PROBE = 16
"""Strings drawn after each push to compare the server's log q with the policy's here."""


class Remote:
    """A Trainable whose samples come from servers; ``local`` is the policy that is trained.

    Args:
        local: scored here, with gradient. It is the result of training: ``remote.local``.
        server: serves the model that ``local`` was made from.
        every: steps between pushes of the adapter.
        folder: where pushed adapters lie, each in a folder of its own until the next push; on a disk that the servers
            see under the same path.
        ahead: ask for the next step's samples before this step's update, so that servers draw while the gradient is
            computed. They are one step older, and a resumed run is no longer the uninterrupted one to the bit: its
            first step asks anew.

    A run without ``ahead`` that is resumed from a checkpoint at a multiple of ``every`` steps is the uninterrupted one
    where the servers draw the same for the same seed; vLLM does up to rounding.
    """

    def __init__(
        self, local: Amortized, server: ServerLM, *, folder: str | os.PathLike[str], every: int = 4, ahead: bool = False
    ) -> None:
        if every < 1:
            raise InputError(f"every is a number of steps between pushes, 1 or more, not {every}")
        if not hasattr(local.lm, "save_adapter"):
            raise InputError("only an adapter can be pushed to a server; train a policy made by training.amortize.grow")
        self.local, self.every, self.ahead = local, every, ahead
        self.folder = Path(folder)
        told = [replace(p, q_prompt=tuple(local.prompt(p))) for p in local.problems]
        self._read = LMPolicy(local.lm, local.space, told, "q_prompt")  # what it is compared with
        self.sampler = ServerPolicy(server, local.space, told, reads="q_prompt")
        self.agreed: Agreement = NOTHING
        """Server against local log-probabilities, as found after the last push."""
        self.steps = self.pushes = 0
        self._pushed_at: int | None = None
        self._pushed: Path | None = None
        self._asked: deque[tuple[Tensor, int, Future[Rollouts]]] = deque()
        self._worker = ThreadPoolExecutor(1, "retrodict-remote")  # one: results come in the order asked

    # -- the policy that is trained ------------------------------------------------------------------------------

    @property
    def lm(self) -> LanguageModel:
        """The local model."""
        return self.local.lm

    @property
    def space(self) -> Strings:
        """The local policy's."""
        return self.local.space

    @property
    def problems(self) -> Problems:
        """The local policy's."""
        return self.local.problems

    @property
    def sees(self) -> str:
        """What both read."""
        return self.local.sees

    @property
    def version(self) -> str:
        """The local policy's."""
        return self.local.version

    @property
    def about(self) -> dict[str, Any]:
        """What training left behind, on the local policy."""
        return self.local.about

    @about.setter
    def about(self, told: dict[str, Any]) -> None:
        self.local.about = told

    def parameters(self) -> dict[str, Tensor]:
        """The adapter's tensors."""
        return self.local.parameters()

    def settle(self) -> None:
        """Gradients reach the parameters."""
        self.local.settle()

    def refresh(self) -> None:
        """A step was taken: the local policy follows at once, the servers with the next push."""
        self.local.refresh()
        self.steps += 1

    def score(self, rollouts: Rollouts, raw: bool = False, grad: bool = False) -> Scores:
        """By the local policy: the server's log-probabilities never enter an objective's log q."""
        return self.local.score(rollouts, raw, grad)

    def on(self, problems: Problems) -> Amortized:
        """The trained policy on other problems; it draws here."""
        return self.local.on(problems)

    # -- samples from servers ------------------------------------------------------------------------------------

    def sample(
        self, problem: Int[Tensor, " b"], gen: torch.Generator, behaviour: Mapping[str, Any] | None = None
    ) -> Rollouts:
        """Rows a server drew, pushing the adapter first where it is time.

        ``behaviour["adapter"]`` names what drew them, ``behaviour["staleness"]`` the steps taken since it was pushed.
        Rows that were asked for ahead are taken where they are of these problems, in the order asked.
        """
        rows, at, job = self._asked.popleft() if self._asked and not behaviour else (None, 0, None)
        if job is None or rows is None or not torch.equal(rows, problem):
            at, job = self._request(problem, gen, behaviour)
        drawn = job.result()
        return replace(drawn, behaviour={**drawn.behaviour, "staleness": self.steps - at})

    def ask(self, problem: Int[Tensor, " b"], gen: torch.Generator) -> None:
        """Begin to draw rows that a later :meth:`sample` at T = 1 will take. ``gen`` is for these rows alone."""
        self._asked.append((problem, *self._request(problem, gen, None)))

    def _request(
        self, problem: Tensor, gen: torch.Generator, behaviour: Mapping[str, Any] | None
    ) -> tuple[int, Future[Rollouts]]:
        """The step whose adapter draws them, and the rows to come."""
        if self._pushed_at is None or self.steps - self._pushed_at >= self.every:
            self._push()
        assert self._pushed_at is not None
        return self._pushed_at, self._worker.submit(self.sampler.sample, problem, gen, behaviour)

    def _push(self) -> None:
        """The adapter as it is now, on all servers, compared; the folder before it goes once no server has it."""
        folder, old = self.folder / f"push-{self.pushes}", self._pushed
        self.local.lm.save_adapter(folder)  # pyright: ignore[reportAttributeAccessIssue]
        self._worker.submit(self.sampler.push, folder).result()  # after what was asked for before
        self._pushed, self._pushed_at = folder, self.steps
        self.pushes += 1
        if old is not None:
            shutil.rmtree(old, ignore_errors=True)
        probe = torch.arange(PROBE, device=self.lm.device) % len(self.problems)
        drawn = self._worker.submit(self.sampler.sample, probe, generator(0, "cpu", 6, self.pushes)).result()
        self.agreed = agreement(self._read, drawn)

    def close(self) -> None:
        """Take the last adapter from the servers and its folder away."""
        self._worker.shutdown(cancel_futures=True)
        if self.sampler.adapter is not None:
            self.sampler.server.unload_adapter(self.sampler.adapter)
        if self._pushed is not None:
            shutil.rmtree(self._pushed, ignore_errors=True)
