"""Tempered continuation: p(Z | X)^(1/T) over whole sentences Z after a prompt X (Hu et al. 2024, section 4.1).

A temperature of the *sequence* is not one of each token: at T < 1 it favours openings that likely sentences follow.
Every prefix has its reward from one forward pass (the log-probability of the prefix and of a stop there).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from retrodict.diagnostics.diversity import edit_distance, ngram_diversity
from retrodict.errors import InputError
from retrodict.protocols import LanguageModel
from retrodict.records import Problem, Rollouts, cat_rollouts
from retrodict.spaces.strings import Strings
from retrodict.targets.algebra import Target
from retrodict.targets.ready import Stop, from_prior, strings
from retrodict.training.replay import written

PROMPTS = (
    "The library on the corner has been closed since May.", "She packed two coats and a torch.",
    "The council met twice about the bridge.", "Nobody had watered the tomatoes for a week.",
    "The ferry leaves at seven in the morning.", "He had promised to repair the radio.",
    "The museum bought a painting that nobody wanted.", "Rain fell on the valley for nine days.",
    "The teacher drew a circle on the board.", "Our neighbours keep bees on their roof.",
    "The report was forty pages long.", "The old engine would not start.",
    "They found a map inside the piano.", "The bakery sells out before noon.",
    "A fox crossed the garden at dusk.", "The team lost its first three matches.",
    "The lighthouse was sold to a painter.", "My uncle collects clocks.",
    "The village has one road and no shop.", "Scientists measured the lake again this summer.",
    "The train stopped between two stations.", "The choir practised in the cellar.",
    "Her letter arrived a month late.", "The price of bread went up again.",
)  # fmt: skip
"""Prompts of one sentence, written for this task. The last eight are held out."""
HELD_OUT = 8


def read_prompts(path: str | Path) -> list[str]:
    """Prompts from a text file, one a line; empty lines are left out.

    Raises:
        InputError: no such file, or no prompt in it.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read prompts from {path} ({type(error).__name__}); give a text file, one prompt a "
                         "line") from error  # fmt: skip
    found = [line.strip() for line in lines if line.strip()]
    if not found:
        raise InputError(f"{path} holds no prompt; write one a line")
    return found


def problems(lm: LanguageModel, prompts: Sequence[str]) -> list[Problem]:
    """Ids of the prompts under a model."""
    return [Problem(tuple(lm.tokenizer.encode(text)), name=text) for text in prompts]


def target(
    lm: LanguageModel, prompts: Sequence[str] = PROMPTS[:-HELD_OUT], *, temperature: float = 0.8, stop: Stop = ".",
    max_tokens: int = 20, min_tokens: int = 3,
) -> Target:  # fmt: skip
    """p(Z | X)^(1/T) for each prompt. p pays for the stop at the limit too, so that no sentence is cut for free.

    Raises:
        InputError: a temperature that is not above 0.
    """
    if not temperature > 0:
        raise InputError(f"temperature must be positive, not {temperature}")
    return from_prior(lm, problems(lm, prompts), strings(lm, stop, max_tokens, "own_stop", min_tokens)) ** (
        1 / temperature
    )


def recipe(lm: LanguageModel, *, temperature: float = 0.8, max_tokens: int = 20, min_tokens: int = 3) -> Target:
    """:func:`target` on PROMPTS, as a recipe names it."""
    return target(lm, temperature=temperature, max_tokens=max_tokens, min_tokens=min_tokens)


# -- baselines --------------------------------------------------------------------------------------------------------


def token_temperature(goal: Target, draws: int, gen: torch.Generator, tau: float) -> Rollouts:
    """``draws`` sentences a prompt from the prior with every token at temperature tau."""
    assert goal.prior is not None
    which = torch.arange(len(goal.problems), device=gen.device).repeat_interleave(draws)
    return goal.prior.sample(which, gen, {"temperature": tau})


@torch.no_grad()
def beam_search(lm: Any, goal: Target, beams: int) -> Rollouts:
    """The ``beams`` sentences that beam search finds for each prompt, by the transformers module.

    Raises:
        InputError: a model that is no transformers module, or already carries an adapter.
    """
    if not hasattr(lm, "module") or hasattr(lm.module, "peft_config"):
        raise InputError("beam search runs the plain transformers module: give a model of rd.load without adapters")
    where, parts = goal.space, []
    assert isinstance(where, Strings) and goal.prior is not None
    stops = list(where.stops.ids)
    moves = where.legal_ids(lm.device)
    ends = torch.zeros_like(moves).index_fill(0, torch.tensor(stops, device=lm.device), True)
    for i, problem in enumerate(goal.problems):
        x = len(problem.context)

        def menu(ids: Tensor, log_p: Tensor, x: int = x) -> Tensor:
            n = ids.shape[1] - x
            allowed = ends if n >= where.max_free else moves if n < where.min_moves else moves | ends
            return log_p.masked_fill(~allowed, -torch.inf)

        ids = torch.tensor([problem.context], device=lm.device)
        found = lm.module.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), num_beams=beams, num_return_sequences=beams,
            do_sample=False, length_penalty=0.0, max_new_tokens=where.max_free + 1, eos_token_id=stops,
            pad_token_id=stops[0], logits_processor=[menu],
        )  # fmt: skip
        parts.append(written(goal.prior, i, [_until(row, stops) for row in found[:, x:].tolist()]))
    return cat_rollouts(parts)


def _until(ids: Sequence[int], stops: Sequence[int]) -> list[int]:
    return list(ids[: next((i for i, x in enumerate(ids) if x in stops), len(ids))])


# -- evaluation -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Found:
    """A set of draws a prompt, averaged over prompts.

    Attributes:
        best: largest log p(z | X) among a prompt's draws, in nats; ``mean`` their mean.
        distance: mean edit distance of two draws over the longer length; ``bigrams`` one minus their mean similarity.
        distinct: distinct sentences a prompt.
        length: mean number of tokens.
    """

    best: float
    mean: float
    distance: float
    bigrams: float
    distinct: float
    length: float


def judge(goal: Target, rows: Rollouts) -> Found:
    """Likelihood (at T = 1, whatever the target's temperature) and diversity of draws."""
    log_p: Tensor = goal.with_betas(prior=1.0).log_gamma(rows).cpu()
    keys, of = goal.space.keys(rows), rows.problem.cpu()
    each: list[list[float]] = []
    for p in of.unique().tolist():
        at = (of == p).nonzero().squeeze(1)
        ids = [keys[i] for i in at.tolist()]
        each.append([float(log_p[at].max()), float(log_p[at].mean()), float(edit_distance(ids)),
                     float(ngram_diversity(ids)), float(len(set(ids)))])  # fmt: skip
    best, mean, distance, bigrams, distinct = torch.tensor(each, dtype=torch.float64).mean(0).tolist()
    return Found(best, mean, distance, bigrams, distinct, float(rows.n.double().mean()))
