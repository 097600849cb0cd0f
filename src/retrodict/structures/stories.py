"""Stories that leave a map to be inferred: labelled graphs of a few families, told in hand-written sentences.

In the manner of CogEval (Momennejad et al. 2023, arXiv 2309.15129), whose templates are fixed texts; here any graph of
any family is told by any ``Words``, and a share of its links is left unsaid or said ambiguously, so that the map
is a latent with a posterior. Conditions:

    plain         the map and what lies where, then the question
    revaluation   an amount is changed after the map was told (the reward moves, the map does not)
    detour        a link is blocked after the map was told (the map changes, the reward does not)

The graph is edited, not the prompt, and under the two changed conditions the best first step of the story as it stands
differs from that before the change. Words are in ``stories_words``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from retrodict.errors import InputError, nearest
from retrodict.rng import generator
from retrodict.structures.planner import COST, distances, first_step_values, solve
from retrodict.structures.stories_words import RENDERERS, Words, capital, listed

FAMILIES = ("line", "ring", "tree", "clustered", "grid", "random")
CONDITIONS = ("plain", "revaluation", "detour")
AMOUNTS = (3, 14)
"""Least and largest amount in a chest, in dollars; a step costs ``planner.COST``."""
TRIES = 2000
"""Graphs and places tried until a story's answers are unique and, where something changes, change with it."""


@dataclass(frozen=True)
class Question:
    """One question and which of its options are right (planned on the true map).

    Attributes:
        kind: ``first`` (which place first), ``way`` (which path), ``worth`` (which of two).
        text: the question.
        options: the answers to choose from, in words.
        paths: the same as places: the first step, the path from the start, or the place that pays.
        right: which options are optimal.
    """

    kind: str
    text: str
    options: tuple[str, ...]
    paths: tuple[tuple[int, ...], ...]
    right: tuple[bool, ...]


@dataclass(frozen=True)
class Said:
    """What one sentence states: its kind (as in ``maps``), the pairs it may mean, or a place and its amount."""

    kind: str
    pairs: tuple[tuple[int, int], ...] = ()
    place: int = 0
    amount: float = 0.0


@dataclass(frozen=True)
class Story:
    """A story, what is true in it, and its questions.

    Attributes:
        text: opening and sentences.
        said: what each sentence states.
        names: of the places.
        before: the links as first told, ``after`` those that are open at the end.
        reward: what each place pays at the end.
        start: where one is.
        questions: with the true answers.
        family, condition: how it was made.
    """

    text: str
    said: tuple[Said, ...]
    names: tuple[str, ...]
    before: Bool[Tensor, "d d"]
    after: Bool[Tensor, "d d"]
    reward: Float[Tensor, " d"]
    start: int
    questions: tuple[Question, ...]
    family: str
    condition: str


# -- graphs -----------------------------------------------------------------------------------------------------------


def graph(family: str, d: int, gen: torch.Generator) -> Bool[Tensor, "d d"]:
    """A connected undirected graph of a family, its places in a random order."""
    if family not in FAMILIES:
        raise InputError(f"unknown family {family!r}{nearest(family, FAMILIES)}")
    if d < 4:
        raise InputError(f"a story needs at least 4 places, not {d}")
    a = torch.zeros(d, d, dtype=torch.bool)
    for i, j in _edges(family, d, gen):
        a[i, j] = a[j, i] = True
    order = torch.randperm(d, generator=gen)
    return a[order][:, order]


def _edges(family: str, d: int, gen: torch.Generator) -> list[tuple[int, int]]:
    line = [(i, i + 1) for i in range(d - 1)]
    tree = [(int(torch.randint(i, (1,), generator=gen)), i) for i in range(1, d)]
    if family == "line":
        return line
    if family == "ring":
        return [*line, (d - 1, 0)]
    if family == "tree":
        return tree
    if family == "clustered":  # two cliques and one link between them
        half = d // 2
        inside = [(i, j) for i in range(d) for j in range(i + 1, d) if (i < half) == (j < half)]
        return [*inside, (half - 1, half)]
    if family == "grid":  # two columns
        return [(i, i + 2) for i in range(d - 2)] + [(i, i + 1) for i in range(0, d - 1, 2)]
    pairs = [(i, j) for i in range(d) for j in range(i + 1, d) if (i, j) not in tree]
    more = torch.randperm(len(pairs), generator=gen)[: max(1, d // 3)].tolist()
    return [*tree, *(pairs[k] for k in more)]


# -- stories ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scene:
    """What is true: the map before and after, amounts before and after, the start, and the change."""

    before: Bool[Tensor, "d d"]
    after: Bool[Tensor, "d d"]
    old: Float[Tensor, " d"]
    reward: Float[Tensor, " d"]
    start: int
    change: tuple[int, int] | None


def scene(family: str, condition: str, d: int, gen: torch.Generator) -> Scene:
    """A map, two chests and a start whose questions have one answer each; a change that changes the first step."""
    if condition not in CONDITIONS:
        raise InputError(f"unknown condition {condition!r}{nearest(condition, CONDITIONS)}")
    for _ in range(TRIES):
        before = graph(family, d, gen)
        start, one, two = torch.randperm(d, generator=gen)[:3].tolist()
        x, y, z = (torch.randperm(AMOUNTS[1] - AMOUNTS[0] + 1, generator=gen)[:3] + AMOUNTS[0]).tolist()
        old = torch.zeros(d, dtype=torch.float64)
        old[one], old[two] = x, y
        reward, after, change = old.clone(), before.clone(), None
        if condition == "revaluation":
            reward[one], change = z, (one, z)
        elif condition == "detour":
            links = before.triu().nonzero()
            i, j = links[int(torch.randint(len(links), (1,), generator=gen))].tolist()
            after[i, j] = after[j, i] = False
            change = (i, j)
        made = Scene(before, after, old, reward, start, change)
        if _asks_well(made) and (condition == "plain" or _first(before, old, start) != _first(after, reward, start)):
            return made
    raise InputError(f"no {family} of {d} places has a question under {condition!r}; take more places")


def _first(open_: Tensor, reward: Tensor, start: int) -> list[int]:
    q = first_step_values(open_[None], reward[None], start)[0]
    return (q == q.max()).nonzero().flatten().tolist()


def _asks_well(s: Scene) -> bool:
    """One best first step; one best chest of the two; some place two or more steps away by one shortest way."""
    worth = _worth(s)
    return len(_first(s.after, s.reward, s.start)) == 1 and worth[0] != worth[1] and bool(_goals(s))


def _chests(s: Scene) -> tuple[int, int]:
    one, two = (s.old > 0).nonzero().flatten().tolist()
    return one, two


def _worth(s: Scene) -> list[float]:
    steps = distances(s.after[None])[0, s.start]
    return [max(float(s.reward[c] - COST * steps[c]), 0.0) for c in _chests(s)]


def _goals(s: Scene) -> list[int]:
    """Places at two or three steps, reached by exactly one shortest way."""
    a = s.after.double()
    counts = [torch.matrix_power(a, k)[s.start] for k in range(4)]
    steps = distances(s.after[None])[0, s.start]
    return [g for g in range(len(a)) if steps[g] in (2, 3) and counts[int(steps[g])][g] == 1]


def story(
    family: str = "tree",
    condition: str = "plain",
    *,
    places: int = 6,
    unsaid: float = 0.0,
    vague: float = 0.2,
    renderer: str = "rooms",
    seed: int = 0,
) -> Story:
    """A story and its questions.

    Args:
        family: one of ``FAMILIES``.
        condition: one of ``CONDITIONS``.
        places: how many (4 to 10).
        unsaid: share of links that no sentence mentions.
        vague: share of links said ambiguously (one of two places, or a place and no other).
        renderer: one of ``RENDERERS``.
        seed: one seed, one story.
    """
    if renderer not in RENDERERS:
        raise InputError(f"unknown renderer {renderer!r}{nearest(renderer, RENDERERS)}")
    if not (0 <= unsaid <= 1 and 0 <= vague <= 1 and unsaid + vague <= 1):
        raise InputError(f"unsaid and vague are shares of the links, together at most 1, not {unsaid:g} and {vague:g}")
    words = RENDERERS[renderer]
    if places > len(words.names):
        raise InputError(f"{renderer} has {len(words.names)} names, not {places}; ask for fewer places")
    gen = generator(seed)
    made = scene(family, condition, places, gen)
    names = tuple(words.names[i] for i in torch.randperm(len(words.names), generator=gen)[:places].tolist())
    told = _told(made, words, names, unsaid, vague, gen)
    text, said = " ".join(capital(line) for line, _ in told), tuple(what for _, what in told)
    return Story(text, said, names, made.before, made.after, made.reward, made.start,
                 (_best(made, words, names), _way(made, words, names, gen), _which(made, words, names)),
                 family, condition)  # fmt: skip


def _pick(options: tuple[str, ...], gen: torch.Generator) -> str:
    return options[int(torch.randint(len(options), (1,), generator=gen))]


def _told(
    s: Scene, words: Words, names: tuple[str, ...], unsaid: float, vague: float, gen: torch.Generator
) -> list[tuple[str, Said]]:
    """The opening, the links in a random order, the amounts, and what changed."""
    links = s.before.triu().nonzero()
    links = links[torch.randperm(len(links), generator=gen)].tolist()
    silent, unclear = round(unsaid * len(links)), round(vague * len(links))
    told = []
    for k, pair in enumerate(links[silent:]):
        i, j = pair if torch.rand((), generator=gen) < 0.5 else pair[::-1]
        if k < unclear:
            told.append(_unclear(s, words, names, i, j, k % 2 == 0, gen))
        else:
            told.append((_pick(words.link, gen).format(a=names[i], b=names[j]), Said("link", (_sorted(i, j),))))
    told = [told[k] for k in torch.randperm(len(told), generator=gen).tolist()]
    told += [(_pick(words.reward, gen).format(a=names[c], x=int(s.old[c])), Said("reward", (), c, float(s.old[c])))
             for c in _chests(s)]  # fmt: skip
    if s.change is not None and not torch.equal(s.before, s.after):
        i, j = s.change
        told.append((_pick(words.blocked, gen).format(a=names[i], b=names[j]), Said("blocked", (_sorted(i, j),))))
    elif s.change is not None:
        c, x = s.change
        told.append((_pick(words.moved, gen).format(a=names[c], x=x), Said("reward", (), c, float(x))))
    return [(words.opening.format(all=listed(names)), Said("nothing")), *told]


def _sorted(i: int, j: int) -> tuple[int, int]:
    return min(i, j), max(i, j)


def _unclear(
    s: Scene, words: Words, names: tuple[str, ...], i: int, j: int, either: bool, gen: torch.Generator
) -> tuple[str, Said]:
    """A link said of one place and either of two others, or of one place and any other."""
    far = [c for c in range(len(names)) if c not in (i, j) and not s.before[i, c]]
    if not either or not far:
        pairs = tuple(_sorted(i, c) for c in range(len(names)) if c != i)
        return _pick(words.vague, gen).format(a=names[i]), Said("link", pairs)
    ends = [j, far[int(torch.randint(len(far), (1,), generator=gen))]]
    ends = ends[::-1] if torch.rand((), generator=gen) < 0.5 else ends
    line = _pick(words.either, gen).format(a=names[i], b=names[ends[0]], c=names[ends[1]])
    return line, Said("link", tuple(_sorted(i, c) for c in ends))


# -- questions --------------------------------------------------------------------------------------------------------


def _best(s: Scene, words: Words, names: tuple[str, ...]) -> Question:
    """Which place first: every place but the start may be answered."""
    steps = tuple((i,) for i in range(len(names)) if i != s.start)
    best = _first(s.after, s.reward, s.start)
    return Question("first", words.best.format(a=names[s.start]), tuple(names[i] for (i,) in steps), steps,
                    tuple(i in best for (i,) in steps))  # fmt: skip


def _way(s: Scene, words: Words, names: tuple[str, ...], gen: torch.Generator) -> Question:
    """Which path: the one shortest way, and other sequences of as many places to the same goal, not all open."""
    goals = _goals(s)
    goal = goals[int(torch.randint(len(goals), (1,), generator=gen))]
    _, plan = solve(s.after, torch.nn.functional.one_hot(torch.tensor(goal), len(names)).double() * 99, s.start)
    inner = [i for i in range(len(names)) if i not in (s.start, goal)]
    ways = {plan}
    while len(ways) < min(4, math.perm(len(inner), len(plan) - 1)):
        some = [inner[k] for k in torch.randperm(len(inner), generator=gen)[: len(plan) - 1].tolist()]
        ways.add((*some, goal))
    order = sorted(ways)
    order = [order[k] for k in torch.randperm(len(order), generator=gen).tolist()]
    told = tuple(", then ".join(names[i] for i in way) for way in order)
    return Question("way", words.way.format(a=names[s.start], b=names[goal]), told, tuple(order),
                    tuple(way == plan for way in order))  # fmt: skip


def _which(s: Scene, words: Words, names: tuple[str, ...]) -> Question:
    """Which of the two chests."""
    pair, worth = _chests(s), _worth(s)
    told = tuple(names[c] for c in pair)
    text = words.worth.format(a=names[s.start], b=told[0], c=told[1])
    return Question("worth", text, told, tuple((c,) for c in pair), tuple(w == max(worth) for w in worth))
