"""Diagnostics: records or tensors in, numbers out. They never draw a sample and know no model.

| question                                             | file            |
|------------------------------------------------------|-----------------|
| can I trust these particles, in one word             | verdict.py      |
| where is log Z; how far is q from the posterior      | bounds.py       |
| are the weights degenerate or heavy-tailed           | weights.py      |
| do the chains agree; how many draws are they worth   | chains.py       |
| how far from an exact table, and is it chance        | divergence.py   |
| how different are the objects                        | diversity.py    |
| is the posterior right on average; are probabilities | calibration.py  |
"""

from retrodict.diagnostics.bounds import (
    Bound,
    Span,
    TwoSided,
    certain_lower,
    certain_upper,
    elbo,
    eubo,
    iwae_lower,
    iwae_upper,
    log_evidence,
    log_z_interval,
    relative_variance,
    smc_lower,
    smc_upper,
    t_quantile,
    two_sided,
)
from retrodict.diagnostics.calibration import (
    Coverage,
    brier,
    calibration_error,
    coverage,
    ecdf_band,
    risk_coverage,
    sbc_pit,
    sbc_ranks,
    uniformity,
)
from retrodict.diagnostics.chains import chain_ess, split_rhat
from retrodict.diagnostics.divergence import kl, kl_both, total_variation, tv_bound, z_score
from retrodict.diagnostics.diversity import (
    PairMean,
    distinct_n,
    edit_distance,
    effective_distinct,
    length_histogram,
    ngram_diversity,
)
from retrodict.diagnostics.verdict import Diagnosis, Finding, diagnose
from retrodict.diagnostics.weights import ess, max_share, pareto_k, pareto_threshold, weight_se, zero_share

__all__ = [
    "Bound",
    "Coverage",
    "Diagnosis",
    "Finding",
    "PairMean",
    "Span",
    "TwoSided",
    "brier",
    "calibration_error",
    "certain_lower",
    "certain_upper",
    "chain_ess",
    "coverage",
    "diagnose",
    "distinct_n",
    "ecdf_band",
    "edit_distance",
    "effective_distinct",
    "elbo",
    "ess",
    "eubo",
    "iwae_lower",
    "iwae_upper",
    "kl",
    "kl_both",
    "length_histogram",
    "log_evidence",
    "max_share",
    "ngram_diversity",
    "pareto_k",
    "pareto_threshold",
    "relative_variance",
    "risk_coverage",
    "sbc_pit",
    "sbc_ranks",
    "smc_lower",
    "smc_upper",
    "split_rhat",
    "log_z_interval",
    "t_quantile",
    "total_variation",
    "tv_bound",
    "two_sided",
    "uniformity",
    "weight_se",
    "z_score",
    "zero_share",
]
