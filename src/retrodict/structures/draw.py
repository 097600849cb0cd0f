"""Graphs, sets and trees as a picture and as networkx. In words they are ``space.show(rollouts)``.

Graphviz text needs nothing installed; networkx and matplotlib are asked for when they are used.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from retrodict.errors import InputError, MissingExtra
from retrodict.records import Rollouts
from retrodict.spaces.dags import Dags
from retrodict.spaces.sets import Subsets
from retrodict.spaces.trees import SHIFT, Trees


@dataclass(frozen=True)
class Drawing:
    """Nodes by name, with what to write on them, and arrows between them."""

    labels: dict[str, str]
    arrows: list[tuple[str, str]]


def drawing(space: Any, rollouts: Rollouts, row: int = 0) -> Drawing:
    """One object of a space: a DAG as it is, a set as its members under one node, a tree from the root down."""
    (key,) = space.keys(rollouts.take(rollouts.n.new_tensor([row])))
    if isinstance(space, Dags):
        return Drawing({str(i): space.name(i) for i in range(space.d)},
                       [(str(e // space.d), str(e % space.d)) for e in key[:-1]])  # fmt: skip
    if isinstance(space, Subsets):
        members = {str(a): space.name(a) for a in key[:-1]}
        return Drawing({"set": "set", **members}, [("set", a) for a in members])
    if isinstance(space, Trees):
        return _tree(space, key[:-1])
    raise InputError(f"there is no picture of {type(space).__name__}; of Dags, Subsets and Trees there is")


def _tree(space: Trees, moves: tuple[int, ...]) -> Drawing:
    labels, arrows, stack = {}, [], []
    for k, move in enumerate(moves):
        if move == SHIFT:
            leaf = sum(name.startswith("leaf") for name in labels)
            name = f"leaf{leaf}"
            labels[name] = space.name(leaf)
        else:
            name = f"node{k}"
            labels[name] = ""
            right, left = stack.pop(), stack.pop()
            arrows += [(name, left), (name, right)]
        stack.append(name)
    return Drawing(labels, arrows)


def dot(picture: Drawing) -> str:
    """Graphviz text: ``dot -Tsvg`` makes a picture of it."""
    nodes = [f"  {_quoted(name)} [label={_quoted(label)}];" for name, label in picture.labels.items()]
    arrows = [f"  {_quoted(a)} -> {_quoted(b)};" for a, b in picture.arrows]
    return "\n".join(["digraph {", *nodes, *arrows, "}"]) + "\n"


def _quoted(word: str) -> str:
    escaped = word.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def to_networkx(picture: Drawing) -> Any:
    """A ``networkx.DiGraph`` with a ``label`` on each node. Raises MissingExtra without networkx."""
    try:
        import networkx
    except ImportError as error:
        raise MissingExtra("networkx", "plots") from error
    graph = networkx.DiGraph()
    graph.add_nodes_from((name, {"label": label}) for name, label in picture.labels.items())
    graph.add_edges_from(picture.arrows)
    return graph


def save_picture(picture: Drawing, path: str | os.PathLike[str]) -> None:
    """A picture by matplotlib (png, svg or pdf, by the path's ending), in layers from sources to sinks.

    Raises MissingExtra without matplotlib or networkx.
    """
    graph = to_networkx(picture)
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtra("matplotlib", "plots") from error
    import networkx

    for layer, names in enumerate(networkx.topological_generations(graph)):
        for name in names:
            graph.nodes[name]["layer"] = -layer
    place = networkx.multipartite_layout(graph, subset_key="layer", align="horizontal")
    figure = Figure(figsize=(1 + len(graph) ** 0.5 * 1.5, 1 + len(graph) ** 0.5 * 1.2))
    axes = figure.add_subplot()
    axes.set_axis_off()
    networkx.draw_networkx(graph, place, ax=axes, labels=picture.labels, node_color="white", edgecolors="black",
                           node_size=1400, font_size=9)  # fmt: skip
    figure.savefig(path)
