"""The strongest peer on "no word over five letters": AWRS and SMC of genlm-control, in an environment of its own.

    PYTHON genlm_short_words.py MODEL_FOLDER N MAX_TOKENS SEED PROMPT

Prints one line of JSON: seconds of the sampling call (loading and import apart), log evidence, ESS as it reports it,
distinct strings, and how many tokens its final strings hold. One thread, float32, its default settings.
"""

import asyncio
import json
import random
import sys
import time

import numpy as np
import torch


def main() -> None:
    folder, n, tokens, seed, prompt = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), sys.argv[5]
    from genlm.control import AWRS, BoolFSA, PromptedLLM

    torch.set_num_threads(1)
    random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)
    llm = PromptedLLM.from_name(folder, backend="hf", hf_opts={"torch_dtype": torch.float32})
    llm.set_prompt_from_str(prompt)
    short = BoolFSA.from_regex(r"(([A-Za-z]{1,5})?[^A-Za-z])*([A-Za-z]{1,5})?").coerce(llm, f=b"".join)
    sampler = AWRS(llm, short)
    began = time.perf_counter()
    out = asyncio.run(sampler.smc(n_particles=n, ess_threshold=0.5, max_tokens=tokens))
    seconds = time.perf_counter() - began
    texts = ["".join(str(t) for t in context) for context in out.contexts]
    print(json.dumps({"seconds": seconds, "log_z": float(out.log_ml), "ess": float(out.ess),
                      "distinct": len(set(texts)), "tokens": sum(len(c) for c in out.contexts)}))  # fmt: skip


if __name__ == "__main__":
    main()
