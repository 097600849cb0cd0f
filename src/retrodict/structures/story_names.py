"""Which places a text talks of, for stories that nobody marked up.

Rooms (from a list of common words, or "room 3"), else people (capitalised words that also stand inside a sentence).
Nothing is guessed by a model; what is not found can be named by the caller.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from retrodict.errors import InputError, nearest
from retrodict.structures.maps import bare, names_in, sentences_of
from retrodict.structures.stories_words import ROOMS, TIES, Words

PLACES = (
    "attic balcony ballroom barn basement bathroom bedroom bridge camp castle cave cellar chapel church clearing "
    "cottage courtyard den dungeon entrance farm field foyer forest garage garden gate greenhouse hall hallway harbour "
    "hut island kitchen lab laboratory library lighthouse lobby market meadow mill museum nursery office pantry "
    "parlour pier porch river school shed square stable station study studio temple terrace tower tunnel vault village "
    "well workshop"
).split()
DAYS = frozenset("Monday Tuesday Wednesday Thursday Friday Saturday Sunday January February March April May June July "
                 "August September October November December I".split())  # fmt: skip


def places_in(text: str) -> tuple[tuple[str, ...], Words]:
    """The names a text holds, in the order of their first mention, and how to word facts about them.

    Raises InputError where there are fewer than two.
    """
    rooms = re.findall(rf"\b(room \d+|{'|'.join(PLACES)})\b", text, re.IGNORECASE)
    found = tuple(dict.fromkeys(r.lower() if " " in r else f"the {r.lower()}" for r in rooms))
    if len(found) >= 2:
        return found, ROOMS
    inside = {w for s in sentences_of(text) for w in re.findall(r"(?<=[\w,;] )[A-Z][a-z]+\b", s)} - DAYS
    people = tuple(w for w in dict.fromkeys(re.findall(r"\b[A-Z][a-z]+\b", text)) if w in inside)
    if len(people) >= 2:
        return people, TIES
    raise InputError("no places found in the story (rooms, or people's names); name them: --places 'the hut, the pond'")


def given_places(text: str, places: Sequence[str]) -> tuple[tuple[str, ...], Words]:
    """The caller's names as the text writes them, with "the" where it does; InputError for one it never holds."""
    out = []
    for name in places:
        if not any(names_in(s, [name])[0] for s in sentences_of(text)):
            raise InputError(f"the story never mentions {name!r}; leave it out, or write it as the story does")
        article = re.search(rf"\bthe {re.escape(bare(name))}\b", text, re.IGNORECASE)
        out.append(f"the {bare(name)}" if article else name)
    people = all(n[:1].isupper() for n in out)
    return tuple(dict.fromkeys(out)), TIES if people else ROOMS


def place_of(word: str, names: Sequence[str], flag: str) -> int:
    """Which place a flag means."""
    for i, name in enumerate(names):
        if word.lower() in (name.lower(), bare(name).lower()):
            return i
    raise InputError(f"{flag} {word!r} is no place of the story{nearest(word, names)}")


def start_of(text: str, names: Sequence[str]) -> int:
    """Where the story says that you are; else the place it names first."""
    for sentence in sentences_of(text):
        if re.search(r"\byou (?:are|start|stand|begin|wake)\b", sentence, re.IGNORECASE):
            held = names_in(sentence, names)
            if sum(held) == 1:
                return held.index(True)
    return 0
