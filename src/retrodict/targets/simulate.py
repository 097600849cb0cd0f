"""Free exact posterior samples: draw X, Z, Y from the model in the target's own space.

Z is then an exact draw from p(Z | X, Y) for the simulated Y (Grosse et al. 2016), which gives upper bounds
of the evidence on a real model. Only for simulated Y: nobody has an exact sample for a hand-written one.
"""

from __future__ import annotations

import dataclasses

import torch

from retrodict.errors import InputError
from retrodict.policies.base import rollout
from retrodict.policies.lm import LMPolicy
from retrodict.records import Problem, Rollouts, cat_rollouts
from retrodict.rng import generator
from retrodict.spaces.stops import Stops
from retrodict.spaces.strings import Strings
from retrodict.targets.algebra import Target

TRIES = 64


def simulate(
    target: Target, n: int, seed: int, *, tokens: int = 16, until: str | None = None
) -> tuple[Target, Rollouts]:
    """n problems whose evidence the model wrote itself, and an exact posterior sample of each.

    Pairs (Z, Y) are drawn from p restricted to the space: Z from the legal policy, kept with probability p/q <= 1,
    then Y up to the token ``until``, at most ``tokens`` tokens. A pair whose Y does not end there, or holds a special
    token, is drawn again as a whole: a condition on Y alone leaves Z | Y exact.

    Args:
        target: prior times likelihood over strings; its contexts are reused in turn.
        n: number of simulated problems.
        seed: one seed, one result.
        tokens: longest evidence.
        until: one-token string that ends the evidence; ``None`` takes ``tokens`` tokens as they come.

    Raises:
        InputError: a target that has other factors than prior and likelihood, or tempers them (its posterior is not
            the model's own joint), or a model that hardly ever stays in the space.
    """
    prior = target.prior
    if set(target.factors) != {"prior", "likelihood"} or not isinstance(prior, LMPolicy):
        raise InputError("only prior * likelihood of one language model can be simulated; drop the other factors")
    if any(b != 1 for b in target.betas.values()):
        raise InputError("a tempered target is not the model's own joint; simulate at beta = 1")
    lm, gen = prior.lm, generator(seed, prior.lm.device)
    stop = lm.tokenizer.encode(until) if until else []
    if len(stop) > 1:
        raise InputError(f"until={until!r} takes {len(stop)} tokens of {lm.name}; give a string that is one token")
    problems: list[Problem] = []
    kept: list[Rollouts] = []
    for _ in range(TRIES):
        need = n - len(problems)
        if need == 0:
            break
        turn = torch.arange(len(problems), len(problems) + 2 * need, device=lm.device) % len(target.problems)
        z = _exact_prior(prior, turn, gen)
        if not len(z):
            continue
        y = _continue(prior, z, tokens, gen)
        special = {*lm.special_ids, *lm.end_ids}
        for i, ids in enumerate(y.moves.tolist()):
            whole = not stop or stop[0] in ids
            cut = ids.index(stop[0]) + 1 if stop and whole else len(ids)
            if len(problems) < n and whole and not special & set(ids[:cut]):
                row = target.problems[int(z.problem[i])]
                name = f"simulated {len(problems) + 1}"
                problems.append(dataclasses.replace(row, evidence=tuple(ids[:cut]), name=name))
                kept.append(dataclasses.replace(z.take(torch.tensor([i], device=lm.device)), terms={}, versions={}))
    if len(problems) < n:
        raise InputError(f"only {len(problems)} of {n} problems could be simulated in {TRIES} rounds; raise max_tokens")
    rows = cat_rollouts(kept)
    rows = dataclasses.replace(rows, problem=torch.arange(n, device=rows.n.device))
    return target.on(problems), rows


def _exact_prior(prior: LMPolicy, problem: torch.Tensor, gen: torch.Generator) -> Rollouts:
    """Exact draws of p restricted to the space, by rejection from the legal policy (p/q is at most one)."""
    rows = rollout(prior, problem, gen, record_raw="prior")
    at = torch.arange(len(rows), device=rows.n.device)
    log_p = rows.terms["prior"][at, rows.n, rows.stop]
    inside = torch.arange(rows.log_b.shape[1], device=rows.n.device) <= rows.n[:, None]
    log_q = torch.where(inside, rows.log_b, 0.0).sum(1)
    coin = torch.rand(len(rows), generator=gen, device=rows.n.device).log()
    return rows.take((coin < log_p - log_q).nonzero().squeeze(1))


def _continue(prior: LMPolicy, z: Rollouts, tokens: int, gen: torch.Generator) -> Rollouts:
    """What the model writes after each latent, from its whole vocabulary."""
    space, lm = prior.space, prior.lm
    stops = z.stop.tolist()
    heads = [[*p, *ids[:k]] for p, ids, k in zip(prior.prompts(z.problem), z.moves.tolist(), z.n.tolist(), strict=True)]
    contexts = [Problem((*h, *space.stops.text_ids(s))) for h, s in zip(heads, stops, strict=True)]
    after = LMPolicy(lm, Strings(lm.vocab_size, Stops(), tokens, "exact_prefix"), contexts)
    return rollout(after, torch.arange(len(contexts), device=lm.device), gen)
