"""Collapsed Gibbs sampling of a topic model: the reference that needs no policy (Griffiths and Steyvers 2004).

theta and phi are integrated out, phi[k] ~ Dirichlet(beta, ..., beta). With all counts taken without word i of d,

    p(z_di = k | z_rest, w)  proportional to  (n_dk + alpha) (n_kw + beta) / (n_k + V beta)                    (eq. 5)

One word after the other; independent chains side by side. Asymptotically exact; the error is that of finite chains.
phi is estimated from each kept state by its posterior mean given z, (n_kv + beta) / (n_k + V beta).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from retrodict.errors import InputError
from retrodict.latent.lda import Documents, padded
from retrodict.rng import generator


@dataclass(frozen=True)
class Chains:
    """What chains saw after their burn-in.

    Attributes:
        log_phi: topics of each kept state of each chain (topics have no common order).
        z: the topic of each word (documents end to end) in each kept state.
    """

    log_phi: Float[Tensor, "s k v"]
    z: Int[Tensor, "s n"]


def collapsed_gibbs(
    documents: Documents, topics: int, words: int, *, alpha: float = 0.5, beta: float = 0.1, sweeps: int = 200,
    burn_in: int = 100, thin: int = 10, chains: int = 4, seed: int = 0,
) -> Chains:  # fmt: skip
    """Chains over the topics of all words of a corpus.

    Args:
        documents: words as numbers 0..words - 1.
        topics, words: how many there are.
        alpha, beta: of the two Dirichlets.
        sweeps: over all words, ``burn_in`` of them dropped, every ``thin``-th of the rest kept.
        chains: from independent random starts.
        seed: one seed, one result.
    """
    if not 0 <= burn_in < sweeps or thin < 1 or chains < 1:
        raise InputError(f"chains need 0 <= burn_in < sweeps, and thin of 1 or more: {burn_in}, {sweeps}, {thin}")
    padded(documents, words)
    doc = np.repeat(np.arange(len(documents)), [len(d) for d in documents])
    word = np.concatenate([np.asarray(d) for d in documents])
    gen, n, row = generator(seed), len(doc), np.arange(chains)
    z = torch.randint(topics, (n, chains), generator=gen).numpy()
    of_doc, of_topic = np.zeros((len(documents), chains, topics)), np.zeros((words, chains, topics))
    for i in range(n):
        of_doc[doc[i], row, z[i]] += 1
        of_topic[word[i], row, z[i]] += 1
    size, kept = of_topic.sum(0), []
    for sweep in range(sweeps):
        u = torch.rand(n, chains, generator=gen, dtype=torch.float64).numpy()
        for i in range(n):
            d, w = of_doc[doc[i]], of_topic[word[i]]
            for counts in (d, w, size):
                counts[row, z[i]] -= 1
            cdf = ((d + alpha) * (w + beta) / (size + words * beta)).cumsum(1)
            z[i] = (u[i, :, None] * cdf[:, -1:] >= cdf).sum(1)
            for counts in (d, w, size):
                counts[row, z[i]] += 1
        if sweep >= burn_in and (sweep - burn_in) % thin == 0:
            phi = (of_topic + beta) / (size + words * beta)
            kept.append((torch.from_numpy(np.log(phi)).permute(1, 2, 0), torch.from_numpy(z.T.copy())))
    return Chains(torch.cat([a for a, _ in kept]), torch.cat([b for _, b in kept]))
