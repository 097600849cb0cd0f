"""A served model as sampler and scorer, against a small server in this process that speaks vLLM's JSON."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_vllm import FakeServer, serving

from retrodict.errors import InputError
from retrodict.models.endpoints import Endpoints, ServerDown
from retrodict.models.server import ServerLM
from retrodict.models.tabular import TabularLM
from retrodict.policies.agreement import agreement
from retrodict.policies.lm import LMPolicy
from retrodict.policies.server import ServerPolicy
from retrodict.protocols import LanguageModel, Policy
from retrodict.records import Problem
from retrodict.rng import generator
from retrodict.spaces.stops import EndsWith, Stops
from retrodict.spaces.strings import Strings
from retrodict.targets.algebra import Target
from retrodict.targets.likelihood import Likelihood
from retrodict.targets.prior import Prior

BASE = TabularLM.random(".! abc", order=2, seed=1)
TUNED = TabularLM.random(".! abc", order=2, seed=2)
ONE, TWO = Problem((3, 4), (5, 3)), Problem((5,), (4,), q_prompt=(3, 3, 5))
DOT = Stops((0,), in_text=True)
BOTH = Stops((0, 1), in_text=True)
ENDS = Stops((0, 1))
SPACES = {
    "one stop": Strings(6, DOT, 4),
    "two stops, a ban": Strings(6, BOTH, 4, banned=(2,)),
    "ends count as one": Strings(6, ENDS, 4, banned=(5,)),
    "min length": Strings(6, DOT, 4, min_moves=2, banned=(1,)),
    "own stop": Strings(6, BOTH, 3, "own_stop"),
    "no stop": Strings(6, Stops(), 3, banned=(0, 1)),
}


def served(fake: FakeServer, *more: FakeServer, **how: Any) -> ServerLM:
    settings = {"patience": 5.0, **how}
    ends = Endpoints([f.url for f in (fake, *more)], **settings)
    return ServerLM(ends, "base", BASE.tokenizer, vocab_size=6, end_ids=(0,))


def folder(path: Path, which: str) -> Path:
    path.mkdir()
    (path / "adapter_config.json").write_text("{}")
    (path / "adapter_model.safetensors").write_text(which)
    (path / "which.txt").write_text(which)
    return path


def rows(n: int) -> torch.Tensor:
    return torch.arange(n) % 2


# -- sampling -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["raw", "processed"])
@pytest.mark.parametrize("name", SPACES)
def test_samples_carry_the_numbers_of_a_local_policy(name: str, mode: str) -> None:
    """log q, every stop at every prefix, log b: as the local policy records and scores the same strings."""
    space = SPACES[name]
    with serving(FakeServer({"base": BASE}, mode=mode)) as (fake,):
        policy = ServerPolicy(served(fake), space, [ONE, TWO], reads="q_prompt")
        got = policy.sample(rows(60), generator(0))
    assert isinstance(policy, Policy) and isinstance(policy.lm, LanguageModel)
    assert got.behaviour["log_q"] == got.behaviour["log_b"] == "exact" and got.behaviour["logprobs"] == mode
    local = LMPolicy(BASE, space, [ONE, TWO], reads="q_prompt")
    want = local.score(got)
    inside = torch.arange(got.moves.shape[1]) < got.n[:, None]
    assert torch.allclose(got.log_q.double(), want.log_q * inside, atol=1e-5)
    assert torch.allclose(got.log_stop.double(), want.log_stop, atol=1e-5)
    end = want.log_stop[torch.arange(60), got.n, got.stop]
    assert torch.allclose(got.log_b.double().sum(1), (want.log_q * inside).sum(1) + end, atol=1e-5)
    assert torch.isfinite(got.log_b).all() and len(set(got.n.tolist())) > (name != "no stop")
    menus = [space.menu(space.replay(got, torch.full_like(got.n, i))).can_stop for i in range(got.moves.shape[1] + 1)]
    at = torch.arange(got.moves.shape[1] + 1)
    assert torch.equal(got.can_stop, torch.stack(menus, 1) & (at <= got.n[:, None]))
    if space.stops.acts:
        assert agreement(local, got).mean < 1e-5


@pytest.mark.parametrize("name", ["two stops, a ban", "min length"])
def test_samples_are_drawn_from_the_policy(name: str) -> None:
    space, draws = SPACES[name], 2000
    with serving(FakeServer({"base": BASE})) as (fake,):
        got = ServerPolicy(served(fake), space, [ONE]).sample(torch.zeros(draws, dtype=torch.long), generator(3))
    count = Counter(space.keys(got))
    log_q = dict(zip(space.keys(got), got.log_b.double().sum(1).tolist(), strict=True))
    for key, k in count.most_common(12):
        p = math.exp(log_q[key])
        assert abs(k / draws - p) < 5 * math.sqrt(p * (1 - p) / draws), key


def test_a_tempered_draw_never_enters_log_q() -> None:
    """Raw log-probabilities give log q and not log b; processed ones log b and not log q; NaN is said."""
    space, local = SPACES["two stops, a ban"], LMPolicy(BASE, SPACES["two stops, a ban"], [ONE, TWO])
    drawn = {}
    for mode in ("raw", "processed"):
        with serving(FakeServer({"base": BASE}, mode=mode)) as (fake,):
            policy = ServerPolicy(served(fake), space, [ONE, TWO])
            drawn[mode] = policy.sample(rows(40), generator(1), {"temperature": 2.0, "epsilon": 0.0})
            with pytest.raises(InputError, match="not with 'epsilon'"):
                policy.sample(rows(2), generator(1), {"epsilon": 0.1})
            with pytest.raises(InputError, match="temperature 9"):
                policy.sample(rows(2), generator(1), {"temperature": 9.0})
    raw, processed = drawn["raw"], drawn["processed"]
    assert (raw.behaviour["log_q"], raw.behaviour["log_b"]) == ("exact", "unknown")
    assert (processed.behaviour["log_q"], processed.behaviour["log_b"]) == ("unknown", "exact")
    assert torch.equal(raw.moves, processed.moves) and torch.equal(raw.stop, processed.stop)
    want, inside = local.score(raw), torch.arange(raw.moves.shape[1]) < raw.n[:, None]
    assert torch.allclose(raw.log_q.double(), want.log_q * inside, atol=1e-5)
    assert torch.allclose(raw.log_stop.double(), want.log_stop, atol=1e-5)
    assert raw.log_b[:, 0].isnan().all() and processed.log_q[inside].isnan().all()
    p = local.log_probs(local.start(raw.problem), space.start(raw.problem), space.menu(space.start(raw.problem)))
    hot = (torch.cat(p, 1) / 2.0).log_softmax(-1)
    first = torch.where(raw.n > 0, raw.moves[:, 0], 6 + raw.stop)
    assert torch.allclose(processed.log_b[:, 0].double(), hot.gather(1, first[:, None])[:, 0], atol=1e-5)
    with pytest.raises(InputError, match="carry no log q"):
        agreement(local, processed)


def test_one_seed_one_result_and_several_servers_share_the_work() -> None:
    with serving(FakeServer({"base": BASE}), FakeServer({"base": BASE})) as (a, b):
        one = ServerPolicy(served(a), SPACES["one stop"], [ONE, TWO])
        two = ServerPolicy(served(a, b), SPACES["one stop"], [ONE, TWO])
        first, second = one.sample(rows(300), generator(7)), two.sample(rows(300), generator(7))
        assert torch.equal(first.moves, second.moves)
        assert not torch.equal(first.moves[::2], one.sample(rows(300), generator(8)).moves[::2])
        asked = [x for path, x in b.seen if path == "/v1/completions" and "logit_bias" in x]
    assert asked and len({x["seed"] for x in asked}) == len(asked) and all(x["n"] <= 64 for x in asked)


# -- scoring ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SPACES)
def test_whole_objects_are_scored_as_the_local_prior_scores_them(name: str) -> None:
    space, local = SPACES[name], LMPolicy(BASE, SPACES[name], [ONE, TWO])
    drawn = local.sample(rows(30), generator(0))
    with serving(FakeServer({"base": BASE})) as (fake,):
        server = served(fake)
        got = ServerPolicy(server, space, [ONE, TWO]).score(drawn, raw=True)
        near = Likelihood(server, space, [ONE, TWO], prefixes=False)(drawn)
        moves = server.score(local.prompts(drawn.problem), drawn.moves, drawn.n)[0]
    want, taken = local.score(drawn, raw=True), (torch.arange(30), drawn.n, drawn.stop)
    inside = torch.arange(drawn.moves.shape[1]) < drawn.n[:, None]
    assert torch.allclose(got.log_q.double(), want.log_q * inside, atol=1e-5)
    assert torch.allclose(moves.double(), want.log_q * inside, atol=1e-5)
    assert torch.allclose(got.log_stop[taken].double(), want.log_stop[taken], atol=1e-5)
    assert got.log_stop.isnan().any() or not space.stops.acts
    assert torch.allclose(near.double(), Likelihood(BASE, space, [ONE, TWO])(drawn), atol=1e-5)


def test_a_target_of_served_factors_has_the_local_target_s_values() -> None:
    """Prior and likelihood of whole objects, on other problems too; of every prefix never a wrong number."""
    space, two = SPACES["two stops, a ban"], [ONE, TWO]
    drawn = LMPolicy(BASE, space, two).sample(rows(20), generator(0))
    here = Target(space, two, {"prior": Prior(LMPolicy(BASE, space, two)), "likelihood": Likelihood(BASE, space, two)})
    with serving(FakeServer({"base": BASE})) as (fake,):
        server = served(fake)
        prior = Prior(ServerPolicy(server, space, two), prefixes=False)
        there = Target(space, two, {"prior": prior, "likelihood": Likelihood(server, space, two, prefixes=False)})
        assert torch.allclose(there.log_gamma(drawn), here.log_gamma(drawn), atol=1e-5)
        swapped, rest = [TWO, ONE], drawn.take(torch.arange(20))
        assert torch.allclose(there.on(swapped).log_gamma(rest), here.on(swapped).log_gamma(rest), atol=1e-5)
        assert not there.on(swapped).factors["prior"].prefixes
        every = prior(drawn, every_prefix=True)
        assert torch.isfinite(every[torch.arange(20), drawn.n, drawn.stop]).all() and every[:, 0].isnan().any()


def test_what_a_server_cannot_give_is_refused() -> None:
    drawn = LMPolicy(BASE, SPACES["one stop"], [ONE, TWO]).sample(rows(4), generator(0))
    with serving(FakeServer({"base": BASE})) as (fake,):
        server = served(fake)
        with pytest.raises(InputError, match="local policy"):
            ServerPolicy(server, SPACES["one stop"], [ONE, TWO]).score(drawn)
        with pytest.raises(InputError, match="every stop"):
            server.score([(3,)] * 4, drawn.moves, drawn.n, (0,))
        with pytest.raises(InputError, match="VarGrad"):
            Likelihood(server, SPACES["one stop"], [ONE, TWO])(drawn, every_prefix=True)
        with pytest.raises(InputError, match="rd.load"):
            LMPolicy(server, SPACES["one stop"], [ONE]).start(torch.zeros(1, dtype=torch.long))
        with pytest.raises(InputError, match="max-model-len"):
            server.log_probs_of([(3,) * 70], [(4,)])
        for space, word in {
            Strings(6, Stops(predicate=EndsWith("a")), 4): "condition",
            Strings(6, DOT, 4, "exact"): "'exact'",
            Strings(7, DOT, 4): "7 tokens",
            Strings(6, Stops((1,)), 4, min_moves=1): "end of sequence",
        }.items():
            with pytest.raises(InputError, match=word):
                ServerPolicy(server, space, [ONE])
        with pytest.raises(InputError, match="does not serve 'bass' but 'base'"):
            ServerLM(fake.url, "bass", BASE.tokenizer, vocab_size=6)
    for url in ("localhost:8000", "ftp://x", "http://x:port", ""):
        with pytest.raises(InputError, match="127.0.0.1"):
            Endpoints(url)


# -- faults -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("fault", "word"), [("no bias", "logit_bias"), ("no min", "min_tokens"),
                                             ("no stop", "stop_token_ids"), ("bos", "adds tokens")])  # fmt: skip
def test_a_server_that_does_otherwise_than_asked_is_found_out(fault: str, word: str) -> None:
    space = Strings(6, DOT, 4, min_moves=2, banned=(1, 2))
    with serving(FakeServer({"base": BASE})) as (fake,):
        fake.faults = {fault}
        with pytest.raises(InputError, match=word):
            ServerPolicy(served(fake), space, [ONE, TWO]).sample(rows(40), generator(0))
        with pytest.raises(InputError, match="max-model-len"):
            ServerPolicy(served(fake), Strings(6, DOT, 64), [ONE]).sample(rows(1), generator(0))


def test_logits_for_log_probabilities_are_refused() -> None:
    with serving(FakeServer({"base": BASE}, mode="logits")) as (fake,), pytest.raises(InputError, match="raw_logprobs"):
        ServerPolicy(served(fake), SPACES["one stop"], [ONE]).sample(rows(1) * 0, generator(0))


def test_a_lost_request_is_asked_again_and_nothing_changes() -> None:
    with serving(FakeServer({"base": BASE})) as (fake,):
        policy = ServerPolicy(served(fake), SPACES["one stop"], [ONE, TWO])
        want = policy.sample(rows(40), generator(5))
        fake.fail_next = 4  # engine dead, half an answer, ...
        got = policy.sample(rows(40), generator(5))
        assert torch.equal(got.moves, want.moves) and torch.equal(got.log_q, want.log_q)
        assert policy.server.endpoints.retries >= 4
        fake.fail_next = 10**6
        with pytest.raises(ServerDown, match="start the server"):
            policy.server.endpoints.patience = 0.3
            policy.sample(rows(2), generator(5))
        fake.fail_next = 0


def test_a_killed_server_comes_back_with_its_adapter(tmp_path: Path) -> None:
    with serving(FakeServer({"base": BASE, "tuned": TUNED})) as (fake,):
        policy = ServerPolicy(served(fake), SPACES["one stop"], [ONE, TWO])
        name = policy.push(folder(tmp_path / "step1", "tuned"))
        want = policy.sample(rows(40), generator(5))
        fake.kill()
        fake.start()
        assert not fake.loaded
        got = policy.sample(rows(40), generator(5))
        assert torch.equal(got.moves, want.moves) and got.behaviour["adapter"] == name
        fake.kill()
        fake.start()
        (tmp_path / "step1" / "adapter_model.safetensors").write_text("newer")
        with pytest.raises(InputError, match="folder of its own"):
            policy.sample(rows(2), generator(5))


def test_one_dead_server_of_two_is_gone_round() -> None:
    with serving(FakeServer({"base": BASE}), FakeServer({"base": BASE})) as (a, b):
        policy = ServerPolicy(served(a, b), SPACES["one stop"], [ONE, TWO])
        want = policy.sample(rows(300), generator(5))
        b.kill()
        assert torch.equal(policy.sample(rows(300), generator(5)).moves, want.moves)
        b.start()


# -- adapters and agreement ---------------------------------------------------------------------------------------


def test_an_adapter_is_pushed_and_the_old_one_goes(tmp_path: Path) -> None:
    space = SPACES["one stop"]
    with serving(FakeServer({"base": BASE, "tuned": TUNED})) as (fake,):
        policy = ServerPolicy(served(fake), space, [ONE, TWO])
        before = policy.sample(rows(40), generator(0))
        first = policy.push(folder(tmp_path / "a", "base"))
        second = policy.push(folder(tmp_path / "b", "tuned"))
        assert policy.push(tmp_path / "b") == second and list(fake.loaded) == [second] and first != second
        after = policy.sample(rows(40), generator(0))
        assert before.behaviour["adapter"] is None and after.behaviour["adapter"] == second
        assert second in policy.version and policy.on([ONE]).adapter == second
        for bad, word in [(tmp_path, "PEFT folder"), (folder(tmp_path / "c", "too large"), "max-lora-rank")]:
            with pytest.raises(InputError, match=word):
                policy.push(bad)
        assert policy.adapter == second
    assert agreement(LMPolicy(BASE, space, [ONE, TWO]), before).worst < 1e-5
    assert agreement(LMPolicy(TUNED, space, [ONE, TWO]), after).worst < 1e-5


class Viewed(TabularLM):
    """A table with an adapter: another table."""

    adapters = ("tuned",)
    adapter: str | None = None

    def view(self, adapter: str | None) -> Viewed:
        other = Viewed((TUNED if adapter else BASE).table, 2, ".! abc")
        other.adapter = adapter
        return other


class Spoken:
    """A tokenizer with a beginning of sequence and a chat template."""

    raw = type("Raw", (), {"bos_token_id": 5})
    has_chat = True
    encode, decode = BASE.tokenizer.encode, BASE.tokenizer.decode

    def chat(self, text: str) -> list[int]:
        return [2, *self.encode(text), 2]


@pytest.mark.parametrize(
    ("cause", "word"),
    [("adapter", "without the adapter"), ("no adapter", "with adapter 'tuned'"), ("last", "last step's adapter"),
     ("shift", "shifted"), ("bos", "beginning-of-sequence"), ("chat", "chat template"), ("reads", "reads 'q_prompt'"),
     ("tempered", "temperature 2"), ("unmasked", "not renormalised"), ("other", "another model")],
)  # fmt: skip
def test_a_mismatch_is_named(cause: str, word: str) -> None:
    space = Strings(6, DOT, 4, banned=(1,))
    problems = [Problem((3,), q_prompt=(4, 4)), Problem((5,), q_prompt=(2, 2))]
    lm = Viewed(BASE.table, 2, ".! abc")
    lm.tokenizer = Spoken()  # pyright: ignore[reportAttributeAccessIssue]
    fake = FakeServer({"base": TUNED if cause in ("no adapter", "last", "other") else BASE})
    asked = list(problems)
    if cause in ("bos", "chat"):
        asked = [Problem((5, *p.context) if cause == "bos" else (2, *p.context, 2)) for p in problems]
    with serving(fake):
        fake.faults = {"shift"} if cause == "shift" else set()
        got = ServerPolicy(served(fake), space, asked, reads="q_prompt" if cause == "reads" else "context")
        drawn = got.sample(rows(60), generator(0))
    local = LMPolicy(lm.view("tuned") if cause == "adapter" else lm, space, problems)
    if cause in ("last", "other"):
        lm.adapters = ()  # pyright: ignore[reportAttributeAccessIssue]
    if cause == "tempered":
        hot = LMPolicy(BASE, space, problems).sample(rows(60), generator(0), {"temperature": 2.0})
        drawn = _with(drawn, hot)
    if cause == "unmasked":
        scores = local.score(drawn, raw=True)
        drawn = _with(drawn, drawn, scores.log_q, scores.log_stop)
    others = {"last step's adapter": LMPolicy(TUNED, space, problems)} if cause == "last" else None
    with pytest.raises(InputError, match=word):
        agreement(local, drawn, others=others)


def test_a_young_adapter_that_never_arrived_is_seen_within_the_tolerance() -> None:
    """The adapter moves log q by 0.03 nats, rounding by as much: means pass, the paired comparison does not."""
    space, problems = Strings(6, DOT, 4), [ONE, TWO]
    noise = 0.03 * torch.randn(BASE.table.shape, generator=generator(1), dtype=torch.float64)
    change = 0.03 * torch.randn(BASE.table.shape, generator=generator(2), dtype=torch.float64)
    served_base = TabularLM(BASE.table + noise, 2, ".! abc")
    with serving(FakeServer({"base": served_base})) as (fake,):
        drawn = ServerPolicy(served(fake), space, problems).sample(rows(200), generator(0))
    base, young = (LMPolicy(TabularLM(t, 2, ".! abc"), space, problems) for t in (BASE.table, BASE.table + change))
    assert agreement(young, drawn).mean < 0.05
    assert agreement(base, drawn, others={"the adapter": young, "the same": base}).mean < 0.05
    with pytest.raises(InputError, match="samples from the base; .* standard errors"):
        agreement(young, drawn, others={"the base": base})


def _with(drawn: Any, record: Any, log_q: Any = None, log_stop: Any = None) -> Any:
    """A record whose log q is what a server that confuses the two would say: log b by default."""
    import dataclasses

    if log_q is None:
        log_q, log_stop = record.log_b[:, :-1] * (record.kind == 1), record.log_stop.clone()
        at = (torch.arange(len(record)), record.n, record.stop)
        log_stop[at] = torch.where(record.n < 4, record.log_b[at[0], at[1]], log_stop[at])
    return dataclasses.replace(record, log_q=log_q, log_stop=log_stop, behaviour=drawn.behaviour)
