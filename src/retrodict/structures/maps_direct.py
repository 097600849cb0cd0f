"""The model asked directly, for comparison with its posterior over maps and an exact planner.

    greedy   argmax over options of log p_LM(option | story, question), options as whole strings
    chain    the same after a reasoning chain sampled from the model; probabilities averaged over chains,
             E_chain[p(option | story, question, chain)], which is the model's own prediction with the chain summed out

Options are renormalised among themselves. Bias: the average over chains is unbiased for that expectation.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from retrodict.samplers.importance import ancestral
from retrodict.structures.ask import Asker
from retrodict.structures.stories import Question
from retrodict.targets.problems import TextProblem, tokenise
from retrodict.targets.ready import from_prior, strings

CHAIN_TOKENS = 24


def prompt_of(story: str, question: Question) -> str:
    """Story and question, up to where an answer stands."""
    return f"{story}\nQuestion: {question.text}\n"


def greedy(asker: Asker, story: str, question: Question) -> Float[Tensor, " k"]:
    """Probability of each option, answered at once."""
    told = [f" {o}" for o in question.options]
    return asker.options([prompt_of(story, question) + "Answer:"], told)[0].softmax(0)


def chained(
    asker: Asker, asked: Sequence[tuple[str, Question]], *, chains: int = 1, tokens: int = CHAIN_TOKENS, seed: int = 0
) -> list[Float[Tensor, " k"]]:
    """Probability of each option of each (story, question), averaged over sampled chains; all sampled in one batch."""
    lm = asker.lm
    heads = [prompt_of(story, q) + "Let us think step by step." for story, q in asked]
    data = tokenise(lm, [TextProblem(h, name=str(i), chat=False) for i, h in enumerate(heads)])
    drawn = ancestral(from_prior(lm, data, strings(lm, None, tokens, "exact_prefix")), n=chains, seed=seed)
    out = []
    for i, (_, q) in enumerate(asked):
        said = [t.replace("\n", " ") for t in drawn.shown[i * chains : (i + 1) * chains]]
        prompts = [f"{heads[i]}{t}\nSo the answer is:" for t in said]
        out.append(asker.options(prompts, [f" {o}" for o in q.options]).softmax(1).mean(0))
    return out


def chosen(p: Float[Tensor, " k"], question: Question) -> bool:
    """Whether the largest entry is a right option."""
    return question.right[int(torch.as_tensor(p).argmax())]
