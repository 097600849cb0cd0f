"""The samplers, by name. A new one is a file and a row here; the law and exactness tests pick the row up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from retrodict.particles import Particles
from retrodict.samplers.annealed import annealed
from retrodict.samplers.exact import exact
from retrodict.samplers.importance import ancestral, best_of_n, importance, rejection
from retrodict.samplers.mh.run import mh
from retrodict.samplers.pimh import pimh
from retrodict.samplers.smc import smc
from retrodict.samplers.tempering import tempering

SAMPLERS: dict[str, Callable[..., Particles]] = {
    "exact": exact,
    "ancestral": ancestral,
    "importance": importance,
    "rejection": rejection,
    "best_of_n": best_of_n,
    "mh": mh,
    "tempering": tempering,
    "annealed": annealed,
    "smc": smc,
    "pimh": pimh,
}


def sampler(name: str) -> Callable[..., Any]:
    """A sampler by name. Raises InputError for an unknown one."""
    from retrodict.errors import InputError, nearest

    if name not in SAMPLERS:
        raise InputError(f"unknown sampler {name!r}{nearest(name, SAMPLERS)}")
    return SAMPLERS[name]
