"""A language of strokes on a 16 x 16 picture: what programs may say, and what they draw.

    program  ->  item | item item ...                                  painted over one another
    item     ->  body | REFLECT axis body                              axis: left-right or up-down
    body     ->  shape | REPEAT count direction shape                  moved by ``step`` pixels, count times in all
    shape    ->  LINE x y x y | RECTANGLE x y x y | CIRCLE x y radius

Coordinates lie on a coarse grid, and every item lies in the picture, so a language is finite: its items are listed and
drawn once, and a program's picture is the union of theirs. A line is named by its smaller end first, a rectangle by its
upper left corner; what draws the same in other words is left in (two items in either order; a loop unrolled), since
that is what a description's length must decide. After Ellis et al. 2018 (arXiv:1707.09627), smaller.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from retrodict.errors import InputError
from retrodict.records import Rollouts
from retrodict.spaces.phrases import Phrases, PhraseState

SIZE = 16
"""Pixels on a side."""
SHAPES = ("line", "rectangle", "circle")
AXES = {"left-right": 0, "up-down": 1}
DIRECTIONS = {"right": (1, 0), "down": (0, 1), "down-right": (1, 1), "up-right": (1, -1)}


@dataclass(frozen=True)
class Language:
    """What strokes there are.

    Attributes:
        grid: coordinates that a shape may have, on either axis (x to the right, y down).
        radii: of circles.
        counts: of loops, the first included.
        step: pixels that a loop moves by.
        most, longest: items and tokens of a program.
    """

    grid: tuple[int, ...] = (3, 6, 9)
    radii: tuple[int, ...] = (2, 3)
    counts: tuple[int, ...] = (2, 3)
    step: int = 3
    most: int = 2
    longest: int = 12

    def __post_init__(self) -> None:
        if len(set(self.grid)) < 2 or not all(0 <= x < SIZE for x in self.grid):
            raise InputError(f"the grid needs two coordinates or more in 0..{SIZE - 1}, not {self.grid}")

    @property
    def words(self) -> tuple[str, ...]:
        """All tokens."""
        numbers = sorted({*self.grid, *self.radii, *self.counts})
        return (*SHAPES, "repeat", "reflect", *AXES, *DIRECTIONS, *map(str, numbers))


Item = tuple[str, ...]


def shapes(language: Language) -> Iterator[Item]:
    """All shapes, in words."""
    points = list(itertools.product(sorted(language.grid), repeat=2))
    for (a, b), (c, d) in itertools.combinations(points, 2):
        yield "line", *map(str, (a, b, c, d))
        if a < c and b < d:
            yield "rectangle", *map(str, (a, b, c, d))
    for (a, b), r in itertools.product(points, language.radii):
        if min(a, b) >= r and max(a, b) + r < SIZE:
            yield "circle", *map(str, (a, b, r))


def shape_pixels(shape: Item) -> Bool[Tensor, "16 16"]:
    """What a shape draws, ``[y, x]``: lines by steps of at most a pixel, circles within half a pixel of the radius."""
    image = torch.zeros(SIZE, SIZE, dtype=torch.bool)
    numbers = [int(w) for w in shape[1:]]
    if shape[0] == "circle":
        x, y, r = numbers
        at = torch.arange(SIZE)
        return (((at - x).square() + (at - y)[:, None].square()).sqrt() - r).abs() < 0.5
    a, b, c, d = numbers
    if shape[0] == "rectangle":
        image[b, a : c + 1] = image[d, a : c + 1] = True
        image[b : d + 1, a] = image[b : d + 1, c] = True
        return image
    n = max(abs(c - a), abs(d - b))
    for i in range(n + 1):
        image[b + _nearest((d - b) * i, n), a + _nearest((c - a) * i, n)] = True
    return image


def _nearest(a: int, n: int) -> int:
    """a / n to the nearest integer, halves up."""
    return (2 * a + n) // (2 * n)


def shifted(image: Bool[Tensor, "16 16"], dx: int, dy: int) -> Bool[Tensor, "16 16"]:
    """The picture moved by (dx, dy); what leaves it is lost."""
    out = torch.zeros_like(image)
    y, x = image.nonzero().unbind(1)
    y, x = y + dy, x + dx
    inside = (x >= 0) & (x < SIZE) & (y >= 0) & (y < SIZE)
    out[y[inside], x[inside]] = True
    return out


def draw(item: Item, step: int, more: int = 0) -> tuple[Bool[Tensor, "16 16"], bool]:
    """What an item draws, and whether all of it lies in the picture; ``more`` runs its loop so many times more."""
    if item[0] == "reflect":
        image, whole = draw(item[2:], step, more)
        return image | image.flip(1 - AXES[item[1]]), whole
    if item[0] == "repeat":
        (dx, dy), shape = DIRECTIONS[item[2]], shape_pixels(item[3:])
        copies = [shifted(shape, i * step * dx, i * step * dy) for i in range(int(item[1]) + more)]
        whole = all(bool(c.sum() == shape.sum()) for c in copies)
        return torch.stack(copies).any(0), whole
    return shape_pixels(item), True


def items(language: Language) -> tuple[list[Item], Bool[Tensor, "items 256"]]:
    """All items, in words, and their pictures."""
    plain = list(shapes(language))
    counts = [str(c) for c in language.counts]
    loops = [("repeat", c, d, *s) for c, d, s in itertools.product(counts, DIRECTIONS, plain)]
    bodies = [b for b in [*plain, *loops] if len(b) <= language.longest and draw(b, language.step)[1]]
    whole = [*bodies, *(("reflect", a, *b) for a, b in itertools.product(AXES, bodies))]
    whole = [b for b in whole if len(b) <= language.longest]
    return whole, torch.stack([draw(b, language.step)[0].flatten() for b in whole])


class Strokes(Phrases):
    """The programs of a language, as a space: tokens are moves, every program is one sequence of them."""

    language: Language
    images: Bool[Tensor, "items 256"]

    def __init__(self, language: Language | None = None) -> None:
        language = language or Language()
        told, images = items(language)
        words = language.words
        number = {w: i for i, w in enumerate(words)}
        spelt = [tuple(number[w] for w in item) for item in told]
        order = sorted(range(len(spelt)), key=spelt.__getitem__)  # items that begin alike are neighbours
        phrases, images = tuple(spelt[i] for i in order), images[order]
        super().__init__(words, phrases, language.most, language.longest)
        object.__setattr__(self, "language", language)
        object.__setattr__(self, "images", torch.cat([images, torch.zeros(1, SIZE**2, dtype=torch.bool)]))

    def canvas(self, s: PhraseState) -> Bool[Tensor, "b 256"]:
        """What the whole items of each row draw."""
        return self.images[s.done].any(1)  # no item, -1, is the last row: nothing

    def render(self, rollouts: Rollouts) -> Bool[Tensor, "b 256"]:
        """The pictures of finished programs, row by row of pixels."""
        return self.images[self.phrases_of(rollouts)].any(1)

    def canvases(self, rollouts: Rollouts) -> Bool[Tensor, "b t1 256"]:
        """What the whole items draw after every prefix."""
        b, t = rollouts.moves.shape
        out = torch.zeros(b, t + 1, SIZE**2, dtype=torch.bool)
        for i in range(1, t + 1):
            out[:, i] = self.canvas(self.replay(rollouts, rollouts.n.clamp_max(i)))
        return out

    @property
    def n_features(self) -> int:
        """Those of phrases, and the canvas."""
        return super().n_features + SIZE**2

    def features(self, s: PhraseState) -> Float[Tensor, "b f"]:
        """The tokens of the item at hand, and what is on the canvas: all that the rest of a program depends on."""
        return torch.cat([super().features(s), self.canvas(s).float()], 1)

    def item(self, number: int) -> Item:
        """An item in words."""
        return tuple(self.words[token] for token in self.phrases[number])

    def extended(self, program: Int[Tensor, " most"], more: int) -> Bool[Tensor, "256"]:
        """What a program draws when each of its loops runs ``more`` times more."""
        drawn = [draw(self.item(i), self.language.step, more)[0].flatten() for i in program.tolist() if i >= 0]
        return torch.stack(drawn).any(0)
