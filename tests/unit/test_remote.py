"""Training with samples from servers: a tiny Llama here, the same one behind a small server that speaks vLLM's JSON."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_vllm import FakeServer, Reply, serving
from tiny_llama import tiny_llama

pytest.importorskip("peft")

from retrodict.errors import InputError
from retrodict.models.endpoints import Endpoints
from retrodict.models.server import ServerLM
from retrodict.policies.server import ServerPolicy
from retrodict.protocols import Trainable
from retrodict.rng import generator
from retrodict.spaces.strings import Strings
from retrodict.targets.algebra import Target
from retrodict.targets.likelihood import Likelihood
from retrodict.targets.prior import Prior
from retrodict.targets.ready import infill
from retrodict.training.amortize import amortize, grow
from retrodict.training.collect import Mixture, collect
from retrodict.training.loop import advance, begin, evaluate
from retrodict.training.remote import Remote
from retrodict.training.settings import settings

PLAN: dict[str, Any] = {"steps": 6, "samples": 6, "evaluate": 4, "lr": 0.02, "warmup": 0}
WHOLE: dict[str, Any] = {**PLAN, "objective": "vargrad"}


class Table:
    """What the fake asks of a model: the next logits after a string."""

    order = 64

    def __init__(self, lm: Any) -> None:
        self.vocab_size, self.lm = lm.vocab_size, lm

    def encode(self, prompts: list[tuple[int, ...]]) -> Any:
        return self.lm.encode(prompts)


class LlamaServer(FakeServer):
    """Loads PEFT folders onto the tiny Llama; a lock, since one module answers all."""

    def __init__(self) -> None:
        self.lm: Any = tiny_llama()
        super().__init__({"base": Table(self.lm)})  # pyright: ignore[reportArgumentType]
        self.lock = threading.Lock()
        self.folders: list[str] = []

    def answer(self, path: str, body: dict[str, Any]) -> Reply:
        with self.lock:
            return super().answer(path, body)

    def _load(self, name: str, folder: Path) -> Reply:
        if name in self.loaded:
            return 400, {"error": {"message": f"The lora adapter '{name}' has already been loaded.", "code": 400}}
        self.folders.append(folder.name)
        self.models[name] = Table(self.lm.load_adapter(folder))  # pyright: ignore[reportArgumentType]
        self.loaded[name] = name
        return 200, "Success"


@pytest.fixture
def fake() -> Iterator[LlamaServer]:
    with serving(LlamaServer()) as (one,):
        yield one  # pyright: ignore[reportReturnType]


def story() -> Target:
    return infill(tiny_llama(), "ab", "cd", stop=".", max_tokens=4)


def remote(fake: FakeServer, target: Target, folder: Path, sees: str = "x", **how: Any) -> Remote:
    policy = grow(target, rank=2, sees=sees)
    server = ServerLM(Endpoints(fake.url, patience=10.0), "base", policy.lm.tokenizer)
    return Remote(policy, server, folder=folder / "adapters", **how)


def trained(policy: Remote) -> dict[str, torch.Tensor]:
    return {k: v.detach().clone() for k, v in policy.parameters().items()}


def test_samples_follow_the_pushes_and_say_how_old_their_adapter_is(fake: LlamaServer, tmp_path: Path) -> None:
    """Pooled, whose rewards of every prefix are local: log_stop comes from the policy here, never from the server."""
    told: list[Any] = []
    policy = remote(fake, story(), tmp_path, every=3)
    assert isinstance(policy, Trainable)
    amortize(
        story_of(policy), policy, plan=settings(**{**PLAN, "steps": 8, "objective": "pooled"}), on_metrics=told.append
    )
    assert [x["staleness_policy"] for x in told] == [0, 1, 2, 0, 1, 2, 0, 1]
    assert ["elbo" in x for x in told] == [x["staleness_policy"] == 0 for x in told]
    assert fake.folders == ["push-0", "push-1", "push-2"] and len(fake.loaded) == 1
    assert [x.name for x in (tmp_path / "adapters").iterdir()] == ["push-2"]  # the others went with their adapters
    assert policy.agreed.tokens > 16 and policy.agreed.mean < 1e-4
    assert all(torch.isfinite(torch.tensor(x["loss"])) for x in told if "loss" in x)
    drawn = policy.sampler.sample(torch.zeros(20, dtype=torch.long), generator(1))
    moved = (policy.score(drawn).log_q - drawn.log_q).abs().max()
    assert moved > 1e-3  # the servers' adapter is two steps old
    policy.close()
    assert not fake.loaded and not list((tmp_path / "adapters").iterdir())


def story_of(policy: Remote) -> Target:
    """The target on the very model that the policy is a view of."""
    return infill(policy.lm.view(None), "ab", "cd", stop=".", max_tokens=4)


def test_rows_of_an_older_adapter_are_not_q_s_own(fake: LlamaServer, tmp_path: Path) -> None:
    """Planted: with stale rows taken as q's own, ``own`` is not empty and the evidence bound is of another policy."""
    policy = remote(fake, story(), tmp_path, every=5)
    target = story_of(policy)
    own = []
    for step in range(2):
        batch = collect(target, policy, [0], 6, generator(step), Mixture(tempered=0.5), None, True)
        own.append(len(batch.own))
        assert len(batch.new) == 6 and batch.rollouts.behaviour["staleness"] == step
        policy.refresh()
    assert own == [3, 0]


def test_the_evaluation_draws_from_the_trained_policy(fake: LlamaServer, tmp_path: Path) -> None:
    policy = remote(fake, story(), tmp_path)
    asked = len(fake.seen)
    found = evaluate(story_of(policy), policy, 8, 0)
    assert len(fake.seen) == asked and found == evaluate(story_of(policy), policy.local, 8, 0)


def test_the_server_reads_what_the_policy_reads(fake: LlamaServer, tmp_path: Path) -> None:
    """q sees X and Y through a template, on two problems: the prompts sent are the policy's, and the two agree."""
    made = story()
    both = made.on([made.problems[0], *infill(tiny_llama(), "abc", "d", stop=".", max_tokens=4).problems])
    policy = remote(fake, both, tmp_path, sees="xy")
    rows = torch.tensor([0, 1, 1])
    policy.sample(rows, generator(0))
    sent = [tuple(x["prompt"]) for path, x in fake.seen if path == "/v1/completions" and "logit_bias" in x]
    assert set(sent) == {tuple(policy.local.prompt(p)) for p in both.problems} and policy.agreed.mean < 1e-4


def test_another_adapter_on_the_server_is_an_error_that_names_it(fake: LlamaServer, tmp_path: Path) -> None:
    policy = remote(fake, story(), tmp_path, every=1)
    policy.sample(torch.zeros(4, dtype=torch.long), generator(0))
    with torch.no_grad():
        for p in policy.parameters().values():
            p.copy_(0.5 * torch.randn(p.shape, generator=generator(1)))
    policy.refresh()
    fake.faults = {"deaf"}  # says that the adapter was loaded, and goes on with the base
    with pytest.raises(InputError, match="the server samples without the adapter"):
        policy.sample(torch.zeros(4, dtype=torch.long), generator(0))


def test_a_server_killed_in_mid_run_costs_retries_and_nothing_else(fake: LlamaServer, tmp_path: Path) -> None:
    calm = remote(fake, story(), tmp_path / "calm", every=2)
    amortize(story_of(calm), calm, **WHOLE)
    struck = remote(fake, story(), tmp_path / "struck", every=2)
    steps: list[int] = []

    def strike(metrics: dict[str, Any]) -> None:
        steps.append(metrics["step"])
        if metrics["step"] == 2:  # the adapter is one step old, the next step pushes
            fake.kill()
            threading.Timer(0.4, fake.start).start()
        if metrics["step"] == 4:  # the next step draws with an adapter that the server has forgotten
            fake.kill()
            fake.start()

    amortize(story_of(struck), struck, on_metrics=strike, **WHOLE)
    assert steps == list(range(6)) and struck.sampler.server.endpoints.retries > 0
    here = trained(struck)
    assert all(torch.equal(v, here[k]) for k, v in trained(calm).items())


def test_prior_and_likelihood_from_the_server(fake: LlamaServer, tmp_path: Path) -> None:
    """Scores of whole objects by the server, the gradient here: as with both factors here."""
    made: list[dict[str, torch.Tensor]] = []
    for served in (False, True):
        policy = remote(fake, story(), tmp_path / str(served), every=2)
        target, lm = story_of(policy), policy.sampler.server.view(None)
        if served:
            prior = ServerPolicy(lm, policy.space, target.problems)
            near = Likelihood(lm, policy.space, target.problems, prefixes=False)
            target = Target(policy.space, target.problems, {"prior": Prior(prior, prefixes=False), "likelihood": near})
        told: list[Any] = []
        amortize(target, policy, on_metrics=told.append, **(PLAN if served else WHOLE))
        assert told[0]["objective"] == "vargrad" and "elbo" in told[0]
        made.append(trained(policy))
    for k, v in made[0].items():
        assert torch.allclose(v, made[1][k], atol=1e-3), k


def test_samples_asked_for_ahead_are_one_step_older(fake: LlamaServer, tmp_path: Path) -> None:
    """The order of results does not hang on time: two runs are the same, to the bit, tempered rows and replay too."""
    made, ages = [], []
    for i in range(2):
        policy = remote(fake, story(), tmp_path / str(i), every=2, ahead=True)
        run = begin(story_of(policy), policy, settings(tempered=0.3, replay=0.3, **WHOLE))
        told = [advance(run) for _ in range(6)]
        ages.append([x["staleness_policy"] for x in told])
        assert ["elbo" in x for x in told] == [True] + [False] * 5 and not policy._asked
        made.append(trained(policy))
    assert ages[0] == ages[1] == [0, 1, 2, 1, 2, 1]
    assert all(torch.equal(v, made[1][k]) for k, v in made[0].items())


def test_a_resumed_run_is_the_uninterrupted_one(fake: LlamaServer, tmp_path: Path) -> None:
    """From a checkpoint at a multiple of ``every``: the resumed run pushes what the other one pushed there."""

    def stop(metrics: dict[str, Any]) -> None:
        if metrics["step"] == 3:
            raise KeyboardInterrupt

    whole = remote(fake, story(), tmp_path / "a", every=2)
    amortize(story_of(whole), whole, **WHOLE)
    first = remote(fake, story(), tmp_path / "b", every=2)
    with pytest.raises(KeyboardInterrupt):
        amortize(story_of(first), first, folder=tmp_path / "run", save_every=2, on_metrics=stop, **WHOLE)
    again = remote(fake, story(), tmp_path / "c", every=2)
    amortize(story_of(again), again, folder=tmp_path / "run", save_every=2, resume=True, **WHOLE)
    here = trained(again)
    assert all(torch.equal(v, here[k]) for k, v in trained(whole).items())


def test_bad_input(fake: LlamaServer, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="1 or more, not 0"):
        remote(fake, story(), tmp_path, every=0)
    target = story()
    policy = grow(target, rank=2)
    server = ServerLM(fake.url, "base", policy.lm.tokenizer)
    space = Strings(264, policy.space.stops, 4, "exact")
    with pytest.raises(InputError, match="'exact'"):
        Remote(type(policy)(policy.lm, space, target.problems), server, folder=tmp_path)
