"""A verifier that a recipe names, to begin your own from: ``fn(texts, rows)`` gives one number a text.

``texts`` are the drawn texts, ``rows`` the data rows of their problems (an answer to check against, say).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

BRIGHT = frozenset(
    "beautiful best bright calm clear fine good great lovely nice perfect pleasant sunny warm wonderful".split()
)
GLOOMY = frozenset("awful bad bleak cold cloudy dark dull foggy gloomy grey poor rainy sad stormy terrible wet".split())


def cheerful(texts: list[str], rows: Sequence[Mapping[str, Any]]) -> list[float]:
    """Bright words less gloomy ones: a reward, without bounds."""
    words = [re.findall(r"[a-z]+", text.lower()) for text in texts]
    return [float(sum(w in BRIGHT for w in found) - sum(w in GLOOMY for w in found)) for found in words]
