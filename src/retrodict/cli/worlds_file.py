"""What ``retrodict worlds`` reads: beliefs and rules in YAML, checked with the line at which something is wrong.

    name: the gods                     # the page's title
    relations:
      father:
        says: "{a} is the father of {b}"
        rules: [acyclic, inverse_functional]
        among: [Zeus, Kronos, Ouranos] # every ordered pair
        p: 0.1                         # of pairs without a line of their own
    beliefs:
      - {relation: father, a: Kronos, b: Zeus, p: 0.9, truth: true}
      - {says: Zeus is mortal, p: 0.2}
    constraints:
      - negation: [Zeus is mortal, Zeus is immortal]
    contexts:                          # with --lm: texts judged by what they do to the posterior
      - {name: almanac, says: "The sky is blue.", harmless: true}

A belief without p is asked of the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import yaml

from retrodict.cli import values
from retrodict.cli.answers import read_yaml
from retrodict.errors import InputError, nearest
from retrodict.structures.worlds import OF_RELATION, OF_STATEMENTS, Belief, Constraint, among, check

KEYS = {
    "": ("name", "relations", "beliefs", "constraints", "contexts"),
    "relation": ("says", "rules", "among", "p"),
    "belief": ("says", "relation", "a", "b", "p", "truth"),
    "context": ("name", "says", "harmless"),
}


@dataclass(frozen=True)
class Context:
    """A text in front of the questions; ``harmless`` ones set the bar for the others."""

    name: str
    says: str
    harmless: bool


@dataclass(frozen=True)
class WorldsFile:
    """Beliefs, those of them to be asked of the model (by index), rules, texts."""

    name: str
    beliefs: tuple[Belief, ...]
    asked: tuple[int, ...]
    constraints: tuple[Constraint, ...]
    contexts: tuple[Context, ...]


@dataclass(frozen=True)
class At:
    """A part of the file: its value, and where it stands."""

    file: str
    node: yaml.Node
    path: str

    def fail(self, message: str) -> NoReturn:
        """Refuse it in one line."""
        where = f", {self.path}" if self.path else ""
        raise InputError(f"{self.file}, line {self.node.start_mark.line + 1}{where}: {message}")

    def keys(self, known: Sequence[str]) -> dict[str, At]:
        """A mapping's parts, its keys among ``known`` (any where there are none)."""
        if not isinstance(self.node, yaml.MappingNode):
            self.fail(f"expected 'key: value' lines{' with keys among ' + ', '.join(known) if known else ''}")
        out: dict[str, At] = {}
        for key, value in self.node.value:
            name, here = str(key.value), At(self.file, key, self.path)
            if known and name not in known:
                here.fail(f"unknown key {name!r}{nearest(name, known)}")
            if name in out:
                here.fail(f"the key {name!r} stands twice")
            out[name] = At(self.file, value, f"{self.path}.{name}" if self.path else name)
        return {k: v for k, v in out.items() if v.node.tag != "tag:yaml.org,2002:null"}

    def items(self) -> list[At]:
        """A list's parts."""
        if not isinstance(self.node, yaml.SequenceNode):
            self.fail("expected a list")
        return [At(self.file, n, f"{self.path}[{i}]") for i, n in enumerate(self.node.value)]

    @property
    def value(self) -> Any:
        """What a scalar stands for."""
        if not isinstance(self.node, yaml.ScalarNode):
            self.fail("expected one value")
        try:
            return yaml.SafeLoader("").construct_object(self.node)
        except (yaml.YAMLError, ValueError):  # an unknown tag, or a date that is none
            self.fail(f"cannot read {self.node.value!r}; write it in quotes")

    def text(self) -> str:
        """A text; numbers and dates are taken as written, true and false are not."""
        if isinstance(x := self.value, bool) or not str(self.node.value).strip():
            self.fail(f"expected text; write {str(self.node.value)!r} in quotes" if isinstance(x, bool) else "no text")
        return str(self.node.value)

    def share(self) -> float:
        """A probability."""
        x = self.value
        try:
            return values.SHARE.of(x)
        except ValueError as error:
            self.fail(str(error))

    def yes(self) -> bool:
        """true or false."""
        if not isinstance(x := self.value, bool):
            self.fail(f"expected true or false, found {values.spell(x)}")
        return x


def read(path: str) -> WorldsFile:
    """Read and check a file. Raises InputError in one line, with the file's line where there is one."""
    top = At(path, _root(path), "").keys(KEYS[""])
    relations: dict[str, dict[str, At]] = {}
    if "relations" in top:
        relations = {name: _relation(at) for name, at in top["relations"].keys(()).items()}
    listed = _listed(relations, _items(top, "beliefs"))
    beliefs = tuple(b for b, _ in listed)
    try:
        check(beliefs)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    rules = [rule for name, told in relations.items() if "rules" in told for rule in _rules(name, told["rules"])]
    rules += [_constraint(at, beliefs) for at in _items(top, "constraints")]
    contexts = tuple(_context(at) for at in _items(top, "contexts"))
    name = top["name"].text() if "name" in top else Path(path).stem
    return WorldsFile(name, beliefs, tuple(i for i, (_, open_) in enumerate(listed) if open_), tuple(rules), contexts)


def _root(path: str) -> yaml.Node:
    root = read_yaml(path, lambda text: yaml.compose(text, Loader=yaml.SafeLoader))
    if root is None:
        raise InputError(f"{path}: the file is empty; it needs beliefs")
    return root


def _items(top: dict[str, At], key: str) -> list[At]:
    return top[key].items() if key in top else []


def _listed(relations: dict[str, dict[str, At]], given: Sequence[At]) -> list[tuple[Belief, bool]]:
    """Every belief, and whether it has no p: pairs of a relation first, each overridden by a line of its own."""
    listed: dict[tuple[str, str, str] | str, tuple[Belief, bool]] = {}
    for name, told in relations.items():
        for belief in _among(name, told):
            listed[belief.relation, belief.a, belief.b] = (belief, "p" not in told)
    seen: set[tuple[str, str, str] | str] = set()
    for at in given:
        belief, unknown = _belief(at, relations)
        key = (belief.relation, belief.a, belief.b) if belief.relation else belief.says
        if key in seen:
            at.fail(f"{belief.says!r} stands twice; drop one")
        seen.add(key)
        listed[key] = (belief, unknown)
    return list(listed.values())


def _relation(at: At) -> dict[str, At]:
    told = at.keys(KEYS["relation"])
    if "says" not in told:
        at.fail("a relation needs says: a template such as '{a} is the father of {b}'")
    says = told["says"].text()
    if "{a}" not in says or "{b}" not in says:
        told["says"].fail("needs both {a} and {b}, as in '{a} is the father of {b}'")
    try:
        says.format(a="", b="")
    except (ValueError, LookupError, AttributeError):
        told["says"].fail("only {a} and {b} may stand in braces")
    return told


def _among(name: str, told: dict[str, At]) -> list[Belief]:
    if "among" not in told:
        return []
    entities = [at.text() for at in told["among"].items()]
    if len(entities) < 2 or len(set(entities)) < len(entities):
        told["among"].fail("needs two or more names, each once")
    p = told["p"].share() if "p" in told else 0.5
    return [replace(b, p=p) for b in among(name, told["says"].text(), entities)]


def _belief(at: At, relations: dict[str, dict[str, At]]) -> tuple[Belief, bool]:
    told = at.keys(KEYS["belief"])
    p = told["p"].share() if "p" in told else 0.5
    truth = told["truth"].yes() if "truth" in told else None
    if "relation" not in told:
        if "says" not in told or "a" in told or "b" in told:
            at.fail("needs says, or relation with a and b")
        return Belief(told["says"].text(), p, truth=truth), "p" not in told
    name = told["relation"].text()
    if name not in relations:
        told["relation"].fail(f"no relation {name!r} under relations{nearest(name, relations)}")
    if "a" not in told or "b" not in told or "says" in told:
        at.fail("a belief about a relation needs a and b, and no says")
    a, b = told["a"].text(), told["b"].text()
    says = relations[name]["says"].text().format(a=a, b=b)
    return Belief(says, p, name, a, b, truth), "p" not in told


def _rules(name: str, at: At) -> list[Constraint]:
    out = []
    for part in at.items():
        if (kind := part.text()) not in OF_RELATION:
            part.fail(f"unknown rule {kind!r}{nearest(kind, OF_RELATION)}")
        out.append(Constraint(kind, (name,)))
    return out


def _constraint(at: At, beliefs: Sequence[Belief]) -> Constraint:
    told = at.keys(tuple(OF_STATEMENTS))
    if len(told) != 1:
        at.fail(f"one constraint a line, such as '- negation: [a, b]'; kinds are {', '.join(OF_STATEMENTS)}")
    (kind, part), known = next(iter(told.items())), [b.says for b in beliefs]
    said = [p.text() for p in part.items()]
    if len(said) != 2:
        part.fail(f"{kind} is about two statements, not {len(said)}")
    for p, says in zip(part.items(), said, strict=True):
        if says not in known:
            p.fail(f"no belief says {says!r}{nearest(says, known)}")
    return Constraint(kind, tuple(said))


def _context(at: At) -> Context:
    told = at.keys(KEYS["context"])
    if "name" not in told or "says" not in told:
        at.fail("a context needs a name and what it says")
    return Context(told["name"].text(), told["says"].text(), "harmless" in told and told["harmless"].yes())
