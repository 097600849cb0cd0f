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
from retrodict.diagnostics.votes import votes
from retrodict.errors import InputError, MissingExtra, RetrodictError
from retrodict.guides.hmm_fit import fit_hmm
from retrodict.models.load import load
from retrodict.models.tabular import TabularLM
from retrodict.models.tiny import TinyLM
from retrodict.particles import Particles
from retrodict.policies.guided import GuidedPolicy
from retrodict.policies.lm import LMPolicy
from retrodict.records import Problem, Rollouts
from retrodict.report.compare import compare
from retrodict.samplers.annealed import annealed
from retrodict.samplers.exact import exact
from retrodict.samplers.importance import ancestral, best_of_n, importance, rejection
from retrodict.samplers.mh.run import mh
from retrodict.samplers.pimh import pimh
from retrodict.samplers.power import power
from retrodict.samplers.smc import conditional_smc, smc
from retrodict.samplers.table import SAMPLERS
from retrodict.samplers.tempering import tempering
from retrodict.spaces.stops import Matches, Stops
from retrodict.spaces.strings import Strings
from retrodict.spaces.tools import Tool
from retrodict.targets.algebra import Target
from retrodict.targets.constraint import json_schema, lark, one_of, regex, short_words, with_words
from retrodict.targets.hmm import with_hmm
from retrodict.targets.lexical import lexical
from retrodict.targets.predicate import predicate
from retrodict.targets.problems import TextProblem, problems
from retrodict.targets.ready import continuation, including, infill, of_length, posterior, scored, until
from retrodict.targets.simulate import simulate
from retrodict.targets.steps import stepwise
from retrodict.targets.verifier import verifier
from retrodict.training.amortize import amortize, load_policy
from retrodict.training.em import em
from retrodict.training.predictive import predict
from retrodict.training.twist import fit_twist, with_twist

__version__ = "0.1.0"

__all__ = [
    "SAMPLERS", "GuidedPolicy", "InputError", "LMPolicy", "Matches", "MissingExtra", "Particles", "Problem",
    "RetrodictError", "Rollouts", "Stops", "Strings", "TabularLM", "Target", "TextProblem", "TinyLM", "Tool",
    "amortize", "ancestral", "annealed", "best_of_n", "compare", "conditional_smc", "continuation", "diagnose", "em",
    "exact", "fit_hmm", "fit_twist", "importance", "including", "infill", "json_schema", "lark", "lexical", "load",
    "load_policy", "mh", "of_length", "one_of", "pimh", "posterior", "power", "predicate", "predict", "problems",
    "regex", "rejection", "scored", "short_words", "simulate", "smc", "stepwise", "tempering", "until", "verifier",
    "votes", "with_hmm", "with_twist", "with_words",
]  # fmt: skip
