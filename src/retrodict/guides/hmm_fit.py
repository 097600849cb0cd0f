"""Distilling an HMM from a language model: Baum-Welch, then expected counts under the model's own distributions.

1. Start (latent variable distillation, Liu et al. 2023, with the model's next-token distributions in the place of its
   hidden states): k-means of the distributions *after* each token gives hard states; counts give A and B.
2. Baum-Welch on what was written (likelihood never falls but for the pseudocounts).
3. The model says at each step what else it might have written, p(v | x_<t), for nothing. Each such token has a filtered
   posterior over states, so that counts are expectations instead of one draw (Rao-Blackwell):

       a_t = f_t-1 A,    R_t(z) = sum_v p(v | x_<t) B(z, v) / p_HMM(v | x_<t)
       A(z, z') gains f_t-1(z) A(z, z') R_t(z'),       B(z, v) gains a_t(z) B(z, v) p(v | x_<t) / p_HMM(v | x_<t)

   This is EM for the one-step mixtures a_t B with the beliefs f held, hence no ascent of the whole: the held-out
   cross-entropy -E_t sum_v p(v | x_<t) log p_HMM(v | x_<t) turns after a few steps, while what a guide is for, the
   forecast of constraints and stops some tokens ahead, goes on improving.

Only tokens met in any of these have columns of their own; all others share ``UNSEEN`` of the mass.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import embedding_bag

from retrodict.errors import InputError
from retrodict.guides.hmm import HMM, load_hmm, tokens_of
from retrodict.guides.hmm_text import OPENINGS, Written, write
from retrodict.protocols import LanguageModel
from retrodict.rng import generator

OnStep = Callable[[int, int], None]
"""Called as (texts written, of)."""

UNSEEN = 1e-3
HELD_OUT = 10
"""One text in this many is held out (by its prompt where there are enough)."""
PSEUDO_A, PSEUDO_B = 5.0, 50.0
"""Pseudocounts a state, spread as the average row of A, and as the unigram distribution for B."""
BATCH = 256


@dataclass(frozen=True)
class Tables:
    """An HMM over the tokens in use."""

    pi: Float[Tensor, " h"]
    a: Float[Tensor, "h h"]
    b: Float[Tensor, "h u"]


def fit_hmm(
    lm: LanguageModel,
    prompts: Sequence[str] | Sequence[Sequence[int]] = OPENINGS,
    *,
    states: int = 128,
    texts: int = 2688,
    length: int = 40,
    seed: int = 0,
    em: int = 5,
    soft: int = 9,
    on_step: OnStep | None = None,
) -> HMM:
    """An HMM of what ``lm`` writes after prompts like these, with its quality on its ``card``.

    Args:
        lm: the language model.
        prompts: beginnings of texts, as text or ids; by default some of no particular kind.
        states: hidden states h; a guide's cost a step grows with h * v.
        texts, length: how many texts are written, and of how many tokens at most.
        seed: one seed, one result.
        em: Baum-Welch steps.
        soft: steps on the model's own distributions.
        on_step: progress callback of the writing.
    """
    if states < 2:
        raise InputError(f"an HMM needs two states or more, not {states}")
    ids = [lm.tokenizer.encode(p) if isinstance(p, str) else list(p) for p in prompts]
    began = time.perf_counter()
    data = write(lm, ids, texts, length, seed, on_step)
    wrote = time.perf_counter()
    card = {
        "model": lm.name, "version": lm.version, "tokenizer": tokens_of(lm), "states": states,
        "tokens": len(data.row), "seed": seed, "writing_seconds": round(wrote - began, 1),
    }  # fmt: skip
    hmm, quality = distil(data, lm.vocab_size, lm.end_ids, len(ids), states, seed, em, soft)
    card |= {k: round(v, 4) for k, v in quality.items()}
    card["fitting_seconds"] = round(time.perf_counter() - wrote, 1)
    return HMM(hmm.initial, hmm.transition, hmm.emission, hmm.ends, card)


def cached_hmm(lm: LanguageModel, states: int = 128, seed: int = 0, on_step: OnStep | None = None) -> HMM:
    """``fit_hmm(lm)``, kept beside converted models: fitted once for each set of weights, then read."""
    from retrodict.models.hf.gguf import cache_folder

    name = re.sub(r"[^0-9A-Za-z._-]", "_", f"{lm.version}-{tokens_of(lm)}-{states}-{seed}")
    folder = cache_folder() / "hmm" / name
    if not folder.is_dir():
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            fresh = Path(tempfile.mkdtemp(prefix="tmp-", dir=folder.parent))
        except OSError as error:
            raise InputError(f"cannot write to {folder.parent}: {error.strerror}; set RETRODICT_CACHE") from error
        fit_hmm(lm, states=states, seed=seed, on_step=on_step).save(fresh)
        with contextlib.suppress(OSError):  # another process was first
            fresh.rename(folder)
        shutil.rmtree(fresh, ignore_errors=True)
    return load_hmm(folder)


@torch.no_grad()
def distil(
    data: Written, vocab_size: int, ends: Sequence[int], prompts: int, states: int, seed: int, em: int, soft: int
) -> tuple[HMM, dict[str, float]]:
    """Fit on nine tenths of the texts: the HMM, and its quality on the rest."""
    which = torch.arange(len(data.n)) % (prompts if prompts >= HELD_OUT else max(len(data.n), 1))
    out = which % HELD_OUT == HELD_OUT - 1
    if not out.any():
        raise InputError(f"{len(data.n)} texts are too few to hold any out; write {HELD_OUT} or more")
    used, back = torch.cat([data.ids.flatten(), data.tokens.flatten()]).unique(return_inverse=True)
    ids, tokens = back[: data.ids.numel()].view_as(data.ids), back[data.ids.numel() :].view_as(data.tokens)
    data = replace(data, tokens=tokens, ids=ids)
    train, test = data.take((~out).nonzero().squeeze(1)), data.take(out.nonzero().squeeze(1))
    unigram = torch.zeros(len(used)).index_add(0, train.ids.flatten(), train.probs.flatten()) + 1e-3
    unigram = unigram / unigram.sum()
    over = torch.isin(used, torch.tensor(list(ends), dtype=torch.long))
    m = start(train, over, states, unigram, generator(seed))
    for _ in range(em):
        m = baum_welch(m, train, unigram)[0]
    for _ in range(soft):
        m = soft_step(m, train, unigram)
    emission = torch.full((states, vocab_size), UNSEEN / vocab_size)
    emission[:, used] += (1 - UNSEEN) * m.b
    hmm = HMM(m.pi, m.a, emission / emission.sum(1, keepdim=True), tuple(ends))
    flat = -float((test.probs * unigram[test.ids].log()).sum() / len(test.row))
    return hmm, {"nats": cross_entropy(m, test), "unigram_nats": flat, "model_nats": float(test.entropy.mean())}


def _rows(x: Float[Tensor, "h k"], pseudo: float, prior: Float[Tensor, " k"]) -> Float[Tensor, "h k"]:
    """Counts to probabilities."""
    x = x + pseudo * prior
    return x / x.sum(1, keepdim=True)


def _mean(x: Float[Tensor, "h k"]) -> Float[Tensor, " k"]:
    total = x.sum(0) + 1e-3
    return total / total.sum()


# -- the three steps ------------------------------------------------------------------------------------------------


def start(data: Written, ends: Tensor, states: int, unigram: Float[Tensor, " u"], gen: torch.Generator) -> Tables:
    """Hard states from k-means of the distributions after each token, one state for ends; and their counts."""
    label = torch.full(data.tokens.shape, -1)
    after = data.at > 0  # the first token of a text without an opening comes after none
    row, at = data.row[after], data.at[after] - 1
    label[row, at] = k_means(data.sketch[after], states - 1, gen)
    last = torch.arange(data.tokens.shape[1]) == data.n[:, None] - 1
    label[last & ends[data.tokens]] = states - 1
    a, b = torch.zeros(states, states), torch.zeros(states, len(unigram))
    known, pair = label >= 0, (label[:, :-1] >= 0) & (label[:, 1:] >= 0)
    b.index_put_((label[known], data.tokens[known]), torch.ones(()), accumulate=True)
    a.index_put_((label[:, :-1][pair], label[:, 1:][pair]), torch.ones(()), accumulate=True)
    return Tables(torch.full((states,), 1 / states), _rows(a, PSEUDO_A, _mean(a)), _rows(b, PSEUDO_B, unigram))


def k_means(x: Float[Tensor, "c d"], k: int, gen: torch.Generator, steps: int = 15) -> Int[Tensor, " c"]:
    """Lloyd's algorithm from k random points; the cluster of each point."""
    centre = x[torch.randperm(len(x), generator=gen)[:k]].clone()
    of = torch.zeros(len(x), dtype=torch.long)
    for _ in range(steps):
        of = torch.cat([(y @ centre.T * 2 - centre.square().sum(1)).argmax(1) for y in x.split(8192)])
        size = torch.bincount(of, minlength=len(centre))[:, None]
        total = torch.zeros_like(centre).index_add(0, of, x)
        centre = torch.where(size > 0, total / size.clamp_min(1), centre)
    return of


def beliefs(m: Tables, tokens: Int[Tensor, "b t"]) -> tuple[Float[Tensor, "b t1 h"], Float[Tensor, "b t"]]:
    """f_0..f_t, and log p(x_t | x_<t); a token of no chance leaves the belief at its prediction."""
    emit, f = m.b.T[tokens], m.pi.expand(len(tokens), -1)
    out, log_p = [f], []
    for t in range(tokens.shape[1]):
        ahead = f @ m.a
        joint = ahead * emit[:, t]
        p = joint.sum(1, keepdim=True)
        f = torch.where(p > 0, joint / p.clamp_min(1e-38), ahead)
        out.append(f)
        log_p.append(p.squeeze(1).clamp_min(1e-38).log())
    return torch.stack(out, 1), torch.stack(log_p, 1)


def expected_counts(
    m: Tables, tokens: Int[Tensor, "b t"], n: Int[Tensor, " b"]
) -> tuple[Float[Tensor, " h"], Float[Tensor, "h h"], Float[Tensor, "h u"], Float[Tensor, " b"]]:
    """Posterior expectations over some texts: how often each state begins, follows another, and emits each token; and
    log p of each text (forward-backward of Rabiner 1989, with scaled backward variables)."""
    f, log_p = beliefs(m, tokens)
    on = torch.arange(tokens.shape[1]) < n[:, None]
    back, state, pairs = torch.ones_like(f[:, 0]), torch.zeros_like(f[:, 1:]), torch.zeros_like(m.a)
    for t in range(tokens.shape[1] - 1, -1, -1):
        state[:, t] = f[:, t + 1] * back
        w = m.b.T[tokens[:, t]] * back * (-log_p[:, t, None]).exp() * on[:, t, None]
        pairs += f[:, t].T @ w
        back = torch.where(on[:, t, None], w @ m.a.T, back)
    counts = torch.zeros_like(m.b.T).index_add_(0, tokens[on], state[on])
    return (f[:, 0] * back).sum(0), pairs * m.a, counts.T, torch.where(on, log_p, 0.0).sum(1)


def baum_welch(
    m: Tables, data: Written, unigram: Float[Tensor, " u"], pseudo: tuple[float, float] = (PSEUDO_A, PSEUDO_B)
) -> tuple[Tables, float]:
    """One EM step, and the nats a token before it."""
    parts = [expected_counts(m, data.tokens[i], data.n[i]) for i in torch.arange(len(data.n)).split(BATCH)]
    first, pairs, counts = (torch.stack(x).sum(0) for x in list(zip(*parts, strict=True))[:3])
    a, b = _rows(pairs, pseudo[0], _mean(pairs)), _rows(counts, pseudo[1], unigram)
    return Tables(first / first.sum(), a, b), -float(sum(x[3].sum() for x in parts)) / float(data.n.sum())


def soft_step(m: Tables, data: Written, unigram: Float[Tensor, " u"]) -> Tables:
    """One step on expected counts, see the module's third formula."""
    f, ahead = _before(m, data)
    weight = data.probs / _chances(m, data, ahead)
    columns, k = m.b.T.contiguous(), weight.shape[1]
    ratio = embedding_bag(data.ids, columns, per_sample_weights=weight, mode="sum")
    order = data.ids.flatten().argsort(stable=True)
    first = torch.bincount(data.ids.flatten(), minlength=len(columns)).cumsum(0).roll(1)
    first[0] = 0
    counts = embedding_bag(order // k, ahead, first, per_sample_weights=weight.flatten()[order], mode="sum")
    pairs = m.a * (f.T @ ratio)
    return Tables(m.pi, _rows(pairs, PSEUDO_A, _mean(pairs)), _rows(counts.T * m.b, PSEUDO_B, unigram))


def cross_entropy(m: Tables, data: Written) -> float:
    """-E_t sum_v p(v | x_<t) log p_HMM(v | x_<t) in nats."""
    chance = _chances(m, data, _before(m, data)[1])
    return -float((data.probs * chance.log()).sum() / len(data.row))


def _before(m: Tables, data: Written) -> tuple[Float[Tensor, "c h"], Float[Tensor, "c h"]]:
    """Belief before each recorded distribution, and its prediction."""
    parts = [beliefs(m, part)[0] for part in data.tokens.split(BATCH)]
    f = torch.cat(parts)[data.row, data.at]
    return f, f @ m.a


def _chances(m: Tables, data: Written, ahead: Float[Tensor, "c h"]) -> Float[Tensor, "c k"]:
    """p_HMM of the tokens of each recorded distribution."""
    columns = m.b.T.contiguous()
    parts = zip(data.ids.split(1024), ahead.split(1024), strict=True)
    return torch.cat([torch.einsum("nkh,nh->nk", columns[i], x) for i, x in parts]).clamp_min(1e-30)
