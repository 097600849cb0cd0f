"""retrodict: Bayesian inference with language models.

Given a language model and what is observed, draw the latent - a missing sentence, a chain of thought - in proportion
to its posterior p(Z | X, Y), and say how far from it the draws may be.
"""

import os

# OpenMP threads that wait spin for a while, then sleep. By default they spin so long that one busy neighbour on two
# cores slows a decoding step more than tenfold; short spins avoid that and cost up to half a step's time on small
# batches of an idle machine. This is read when torch is first imported; a value of the user's own is left alone.
os.environ.setdefault("GOMP_SPINCOUNT", "2000")

from retrodict.diagnostics.verdict import diagnose
from retrodict.errors import InputError, MissingExtra, RetrodictError, ZeroWeights
from retrodict.guides.lookahead import LookaheadGuide
from retrodict.models.load import load
from retrodict.models.tabular import TabularLM
from retrodict.models.tiny import TinyLM
from retrodict.objectives.table import OBJECTIVES
from retrodict.particles import Particles
from retrodict.policies.amortized import Amortized
from retrodict.policies.guided import GuidedPolicy
from retrodict.policies.lm import LMPolicy
from retrodict.records import Menu, Problem, Rollouts, Scores, Trace
from retrodict.report.compare import Comparison, compare
from retrodict.samplers.exact import exact
from retrodict.samplers.importance import ancestral, best_of_n, importance, rejection
from retrodict.samplers.mh.run import mh
from retrodict.samplers.smc import conditional_smc, smc
from retrodict.samplers.table import SAMPLERS
from retrodict.spaces.stops import Matches, Stops
from retrodict.spaces.strings import Strings
from retrodict.spaces.tools import Tool
from retrodict.targets.algebra import Target
from retrodict.targets.constraint import short_words, with_words
from retrodict.targets.problems import TextProblem, problems
from retrodict.targets.ready import continuation, including, infill, of_length, posterior, scored, until
from retrodict.targets.simulate import simulate
from retrodict.targets.verifier import VerifierError, verifier
from retrodict.training.amortize import amortize, load_policy
from retrodict.training.em import em
from retrodict.training.loop import TrainingError
from retrodict.training.predictive import predict

__version__ = "0.1.0"

__all__ = [
    "OBJECTIVES", "SAMPLERS", "Amortized", "Comparison", "GuidedPolicy", "InputError", "LMPolicy", "LookaheadGuide",
    "Matches", "Menu", "MissingExtra", "Particles", "Problem", "RetrodictError", "Rollouts", "Scores", "Stops",
    "Strings", "TabularLM", "Target", "TextProblem", "TinyLM", "Tool", "Trace", "TrainingError", "VerifierError",
    "ZeroWeights", "amortize", "ancestral", "best_of_n", "compare", "conditional_smc", "continuation", "diagnose",
    "em", "exact", "importance", "including", "infill", "load", "load_policy", "mh", "of_length", "posterior",
    "predict", "problems", "rejection", "scored", "short_words", "simulate", "smc", "until", "verifier",
    "with_words",
]  # fmt: skip
