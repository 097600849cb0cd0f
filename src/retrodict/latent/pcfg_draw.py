"""A parse tree on matplotlib axes: words in a row at the bottom, each node over the middle of its children."""

from __future__ import annotations

from typing import Any

from retrodict.errors import InputError
from retrodict.records import Rollouts
from retrodict.spaces.parses import Parses


def plot_tree(axes: Any, space: Parses, rollouts: Rollouts, row: int = 0, colour: str = "tab:blue") -> None:
    """Draw one tree.

    Args:
        axes: matplotlib's; its frame is taken away.
        space: the space of the tree.
        rollouts: trees; ``row`` says which.
        colour: of lines and labels.
    """
    if not 0 <= row < len(rollouts):
        raise InputError(f"there is no tree {row}; the rollouts have {len(rollouts)}")
    sentence, size = space.sentences[int(rollouts.problem[row])], len(space.labels)
    stack: list[tuple[float, float]] = []  # where the roots of finished subtrees stand
    said = 0

    def node(x: float, y: float, label: str, below: list[tuple[float, float]]) -> None:
        for a, b in below:
            axes.plot([x, a], [y, b], color=colour, linewidth=1, zorder=1)
        box = {"facecolor": "white", "edgecolor": "none", "pad": 1.5}
        axes.text(x, y, label, ha="center", va="center", color=colour, fontsize=9, bbox=box, zorder=2)
        stack.append((x, y))

    for move in rollouts.moves[row, : int(rollouts.n[row])].tolist():
        label = space.labels[move % size]
        if move < size:
            axes.text(said, -1, space.words[sentence[said]], ha="center", va="center", fontsize=9)
            axes.plot([said, said], [-0.75, 0], color="0.8", linewidth=1, zorder=0)
            node(said, 0.0, label, [])
            said += 1
        else:
            right, left = stack.pop(), stack.pop()
            node((left[0] + right[0]) / 2, max(left[1], right[1]) + 1, label, [left, right])
    axes.set_axis_off()
    axes.set_xlim(-0.6, said - 0.4)
    axes.set_ylim(-1.5, stack[-1][1] + 0.7)
