"""The keys of a run: fields of one dataclass, spelled alike in a recipe (YAML) and as flags; flags win.

Everything here happens before a weight is loaded. :func:`load` gives a :class:`Plan`, in which every key that was given
is used: an unknown key, a key of another target or sampler, and a value of the wrong type are errors that name the
file (or flag), the key, and the nearest thing that would have been right.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from retrodict.cli import constraints, values
from retrodict.cli.targets import TARGETS, Kind, Method, import_path, kind_of, method_of, questions
from retrodict.errors import InputError, nearest
from retrodict.samplers.mh.kernels import KERNELS
from retrodict.samplers.resampling import RESAMPLERS, STEERING
from retrodict.samplers.smc import STOPPED
from retrodict.samplers.table import SAMPLERS
from retrodict.spaces.limits import LIMITS
from retrodict.targets.problems import TextProblem
from retrodict.targets.verifier import KINDS

DEFAULT_SAMPLERS = {"sample": ["smc"], "compare": ["ancestral", "best_of_n", "importance", "mh", "smc"]}
DEFAULT_N = 64


def _key(group: str, value: values.Value, text: str, default: Any = None) -> Any:
    return field(default=default, metadata={"group": group, "value": value, "help": text})


def _pick(group: str, options: Sequence[str] | Mapping[str, Any], text: str, paths: bool = False) -> Any:
    """A key that takes one of some words; with ``paths`` an import path too."""
    names = list(options)
    value = values.choice(lambda: names, "NAME", (lambda w: ":" in w) if paths else None)
    return _key(group, value, f"{text}: {', '.join(names)}{', or my.module:fn' if paths else ''}")


def _dtypes() -> list[str]:
    from retrodict.models.hf.load import DTYPES

    return ["auto", *DTYPES]


@dataclass(frozen=True)
class Config:
    """Every key. ``None``: not given, so the target's or sampler's own default holds."""

    model: str = _key("model", values.TEXT, "smollm2, a hub id, a folder or a GGUF file", "smollm2")
    adapter: str | None = _key(
        "model", values.TEXT, "folder of a PEFT adapter to view the model through; train: to start from"
    )
    dtype: str = _key("model", values.choice(_dtypes, "DTYPE"), "auto, float32, bfloat16, ...", "auto")
    device: str = _key("model", values.TEXT, "auto (a GPU where there is one), cpu, cuda", "auto")

    target: str = _pick("target", TARGETS, "what to sample", paths=True)
    before: str | None = _key("target", values.TEXT, "infill: the text before the gap")
    after: str | None = _key("target", values.TEXT, "infill: the text after the gap")
    join: str | None = _key("target", values.TEXT, "infill: what stands between the gap and 'after'")
    prompt: str | None = _key("target", values.TEXT, "what the model reads, where there is no gap")
    temperature: float | None = _key("target", values.POSITIVE, "continuation: p(text)^(1/T) of whole texts")
    tokens: int | None = _key("target", values.whole(1), "of_length: the exact number of tokens")
    problems: str | None = _key("target", values.TEXT, "posterior: a JSONL, JSON or CSV file of questions")
    context: str | None = _key("target", values.TEXT, "posterior: what p reads, a template over a row's {fields}")
    evidence: str | None = _key("target", values.TEXT, "posterior: what p must explain, a template")
    chat: str | None = _key("target", values.CHAT, "posterior: the model's chat template")
    problem_name: str | None = _key("target", values.TEXT, "posterior: the problem's name, a template")
    stop: str | int | list[int] | None = _key("target", values.STOP, "how the text ends: a token's text, eos, none")
    until: str | None = _key("target", values.TEXT, "end as soon as the text contains this; instead of 'stop'")
    max_tokens: int | None = _key("target", values.whole(1), "longest text, in tokens")
    min_tokens: int | None = _key("target", values.whole(0), "shortest text, in tokens")
    limit: str | None = _pick("target", LIMITS, "what happens at max_tokens")
    lookahead: float | None = _key("target", values.WEIGHT, "power of the look-ahead guide (0: no guide)")
    contain: list[str] | None = _key("target", values.WORDS, "words that must occur")
    avoid: list[str] | None = _key("target", values.WORDS, "words that must not occur")
    short_words: int | None = _key("target", values.whole(1), "no word longer than this many letters")
    regex: str | None = _key("target", values.TEXT, "the whole text matches this regular expression")
    one_of: list[str] | None = _key("target", values.WORDS, "the text is one of these")
    json_schema: Any = _key("target", constraints.SCHEMA, "the text is JSON under this schema (recipe: or the schema)")
    lark: str | None = _key("target", values.TEXT, "the text is in a Lark grammar's language: a file (or the grammar)")
    verifier: str | None = _key("target", values.TEXT, "a score of texts, my.module:fn, called as fn(texts, rows)")
    verifier_kind: str | None = _pick("target", KINDS, "what its numbers mean")
    verifier_beta: float | None = _key("target", values.POSITIVE, "reward: the factor is exp(reward / beta)")
    verifier_floor: float | None = _key("target", values.NEGATIVE, "bool, prob: nats in place of minus infinity")

    sampler: dict[str, dict[str, Any]] | None = _key(
        "sampler", values.samplers(lambda: SAMPLERS), f"one of {', '.join(SAMPLERS)}, or my.module:fn; compare: several"
    )
    n: int | None = _key("sampler", values.whole(1), f"particles, draws or chains of a run (default {DEFAULT_N})")
    runs: int | None = _key("sampler", values.whole(1), "independent runs, for the interval")
    ess_threshold: float | None = _key("sampler", values.SHARE, "smc, annealed, pimh: resample below this share of n")
    resampling: str | None = _pick("sampler", (*RESAMPLERS, STEERING), "smc, annealed, pimh: the scheme")
    beam: int | None = _key("sampler", values.whole(1), f"smc, {STEERING}: continuations of a particle")
    ramp: int | None = _key("sampler", values.whole(0), "smc: moves until a tempered prior has its full exponent")
    stopped: str | None = _pick("sampler", STOPPED, "smc: who has stopped, when others are resampled")
    steps: int | None = _key("sampler", values.whole(1), "mh, tempering, pimh: steps of each chain; annealed: a rung")
    rungs: int | None = _key("sampler", values.whole(1), "tempering, annealed: exponents from the policy to the target")
    kernel: str | None = _pick("sampler", KERNELS, "mh, tempering, annealed: what a step redoes")
    keep: int | None = _key("sampler", values.whole(1), "mh, tempering, pimh: states kept of each chain")
    draws: int | None = _key("sampler", values.whole(1), "best_of_n: how many bests")
    by: str | None = _key("sampler", values.TEXT, "best_of_n: the factor to rank by")
    log_bound: float | None = _key("sampler", values.FINITE, "rejection: log M >= log gamma/q")
    proposal_temperature: float | None = _key("sampler", values.POSITIVE, "tokens are drawn at it")
    max_objects: int | None = _key("sampler", values.whole(1), "exact: refuse larger spaces")

    seed: int = _key("run", values.whole(0), "one seed, one result", 0)
    batch: int | None = _key("run", values.whole(1), "posterior: problems sampled together")
    simulated: int | None = _key(
        "run", values.whole(1), "compare: this many problems written by the model itself, for two-sided bounds"
    )
    out: str = _key("run", values.TEXT, "where run folders go", "runs")
    name: str | None = _key("run", values.NAME, "the run folder's name (default: the recipe's, or the target's)")


FIELDS = {f.name: f for f in dataclasses.fields(Config)}


def default_of(key: str) -> str:
    """What holds where a key is not given, in words for the help: the library's own default, if there is one."""
    own = FIELDS[key].default
    told = {str(own)} if own is not None else set()
    if not told:
        methods = [method_of(name, fn).with_options({}) for name, fn in SAMPLERS.items()]
        told = {str(m.said[key]) for m in methods if key in m.said and key != "sampler"}
        told |= {repr(k.defaults[key]) for k in TARGETS.values() if key in k.defaults}
    return f" (default {' or '.join(sorted(told))})" if told else ""


def keys_of(group: str) -> list[str]:
    """The keys of one group."""
    return [k for k, f in FIELDS.items() if f.metadata["group"] == group]


@dataclass(frozen=True)
class Plan:
    """A run that has been checked: what to build, what to run on it, and the recipe that says so in full."""

    config: Config
    kind: Kind
    methods: Mapping[str, Method]
    data: Sequence[TextProblem]
    factors: Sequence[Any]
    arguments: Mapping[str, Any]
    resolved: Mapping[str, Any]

    @property
    def name(self) -> str:
        """The run folder's name."""
        return str(self.resolved["name"])


@dataclass(frozen=True)
class Source:
    """Where keys came from, for messages."""

    file: str | None
    flags: frozenset[str]

    def at(self, key: str) -> str:
        """``--n`` or ``recipe.yaml: key 'n'``."""
        return f"--{key.replace('_', '-')}" if key in self.flags or self.file is None else f"{self.file}: key {key!r}"


def load(command: str, recipe: str | None, flags: Mapping[str, values.Words]) -> Plan:
    """Read, merge and check everything; raises InputError with one line."""
    given = {} if recipe is None else read_recipe(recipe)
    source = Source(recipe, frozenset(flags))
    given = {k: checked(k, x, source) for k, x in {**given, **flags}.items()}
    config = Config(**{k: x for k, x in given.items()})
    if config.target is None:
        raise InputError(f"{recipe or command}: no target; say what to sample, {_flag('target', source)}"
                         f" one of {', '.join(TARGETS)}")  # fmt: skip
    kind = kind_of(config.target, source.at("target"))
    methods = _methods(command, config, given, source)
    _unused(command, given, kind, config, methods, source)
    arguments = _arguments(kind, config, source)
    resolved = {k: getattr(config, k) for k in keys_of("model")} | {"target": config.target}
    resolved |= {k: x for k, x in arguments.items()}
    resolved |= {k: getattr(config, k) for k in FACTORS if k not in kind.keys}
    resolved["sampler"] = {label: method.said for label, method in methods.items()}
    resolved |= {k: getattr(config, k) for k in keys_of("run")}
    resolved["name"] = config.name or (Path(recipe).stem if recipe else config.target.rpartition(":")[2])
    if not values.LABEL.fullmatch(resolved["name"]):
        raise InputError(f"{resolved['name']!r} cannot name a folder; give name: ... (or --name)")
    resolved = {k: x for k, x in resolved.items() if x is not None}
    writable(config.out, source.at("out"))
    return Plan(config, kind, methods, questions(arguments), _factors(config, source), arguments, resolved)


# -- reading ------------------------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """YAML without pickles, and without a key that stands twice."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            name = self.construct_object(key, deep=True)  # pyright: ignore[reportUnknownMemberType]
            if isinstance(name, str) and name in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key {name!r} stands twice", key.start_mark)
            seen.add(name if isinstance(name, str) else None)
        return super().construct_mapping(node, deep)


def read_recipe(path: str, known: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The mapping in a YAML file, with known keys only."""
    known = FIELDS if known is None else known
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise InputError(f"cannot read the recipe {path}: {why}") from None
    try:
        data = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        at = f", line {mark.line + 1}" if mark is not None else ""
        raise InputError(f"{path}{at}: not YAML: {getattr(error, 'problem', None) or 'cannot be read'}") from None
    if data is None:
        raise InputError(f"{path}: the recipe is empty; it needs at least 'target', one of {', '.join(TARGETS)}")
    if not isinstance(data, dict):
        raise InputError(f"{path}: expected 'key: value' lines, found {type(data).__name__}")
    for key in data:
        if key not in known:
            raise InputError(f"{path}: unknown key {values.spell(key)}{_near(str(key), known)}")
    return {k: x for k, x in data.items() if x is not None}


def _near(word: str, known: Mapping[str, Any]) -> str:
    hint = nearest(word.replace("-", "_"), known)
    command = "sample" if known is FIELDS else "train"
    return hint if "did you mean" in hint else f"; see retrodict {command} --help for the keys there are"


def checked(key: str, value: Any, source: Source) -> Any:
    """One key's value, checked against its field."""
    try:
        return FIELDS[key].metadata["value"](value)
    except ValueError as error:
        raise InputError(f"{source.at(key)}: {error}") from None


def _flag(key: str, source: Source) -> str:
    return f"--{key}" if source.file is None else f"{key}:"


# -- which keys are used --------------------------------------------------------------------------------------------

FACTORS = ("contain", "avoid", "short_words", *constraints.KEYS, "verifier", "verifier_kind", "verifier_beta",
           "verifier_floor")  # fmt: skip
"""Keys that multiply further factors into any target."""


def _methods(command: str, config: Config, given: Mapping[str, Any], source: Source) -> dict[str, Method]:
    """The samplers to run, each with its own options over the shared ones; flags win over both."""
    named = config.sampler or dict.fromkeys(DEFAULT_SAMPLERS[command], None)
    if "sampler" in source.flags and source.file is not None:  # pick among those of the recipe, with their options
        told = checked("sampler", read_recipe(source.file).get("sampler", list(named)), source)
        named = {k: told.get(k, x) for k, x in named.items()}
    if command == "sample" and len(named) > 1:
        raise InputError(f"{source.at('sampler')}: sample runs one sampler, and {len(named)} are named "
                         f"({', '.join(named)}); pick one with --sampler NAME, or run retrodict compare")  # fmt: skip
    shared = {k: x for k, x in given.items() if k in keys_of("sampler") and k != "sampler"}
    methods = {}
    for label, options in named.items():
        options = dict(options or {})
        name = options.pop("sampler", label)
        at = f"{source.at('sampler')}, {label}"
        fn = SAMPLERS[name] if name in SAMPLERS else import_path(name, at)
        method = method_of(name, fn)
        for key, value in options.items():
            if key not in keys_of("sampler") or key == "sampler":
                raise InputError(f"{at}: unknown option {values.spell(key)}{nearest(str(key), method.keys)}")
            if key not in method.keys:
                raise InputError(f"{at}: option {key!r} is unused by {name} (it reads {', '.join(method.keys)})")
            try:
                options[key] = FIELDS[key].metadata["value"](value)
            except ValueError as error:
                raise InputError(f"{at}: option {key!r}: {error}") from None
        flags = {k: x for k, x in shared.items() if k in source.flags}
        merged = {k: x for k, x in ({"n": DEFAULT_N} | shared | options | flags).items() if k in method.keys}
        methods[label] = method.with_options(merged)
    return methods


def _unused(command: str, given: Mapping[str, Any], kind: Kind, config: Config, methods: Mapping[str, Method],
            source: Source) -> None:  # fmt: skip
    """Refuse keys that nothing will read."""
    read = {k for m in methods.values() for k in m.keys}
    for key in given:
        group, at = FIELDS[key].metadata["group"], source.at(key)
        if group == "sampler" and key != "sampler" and key not in read:
            names = ", ".join(methods)
            raise InputError(f"{at} is unused: {names} read{'s' * (len(methods) == 1)} {', '.join(sorted(read))}; "
                             "remove it")  # fmt: skip
        if group == "target" and key not in ("target", *kind.keys, *FACTORS):
            raise InputError(f"{at} is unused: the target {config.target!r} reads {', '.join(kind.keys)}; remove it")
        if key == "batch" and "problems" not in kind.keys:
            raise InputError(f"{at} is unused: the target {config.target!r} is one problem; remove it")
        if key == "simulated" and command != "compare":
            raise InputError(f"{at} is unused by {command}; it is for compare")
        if key == "simulated" and (config.target not in ("infill", "posterior") or any(k in given for k in FACTORS)):
            raise InputError(f"{at}: only infill and posterior targets without further factors can be simulated")
        if key.startswith("verifier_") and config.verifier is None:
            raise InputError(f"{at} is unused without 'verifier'; name one (my.module:fn), or remove it")
    kinds = {"verifier_beta": ("reward",), "verifier_floor": ("bool", "prob")}
    for key, takes in kinds.items():
        if key in given and (config.verifier_kind or "prob") not in takes:
            raise InputError(f"{source.at(key)} is unused by verifier_kind {config.verifier_kind or 'prob'!r}; "
                             f"it goes with {' and '.join(takes)}")  # fmt: skip


# -- what the target is called with ---------------------------------------------------------------------------------


def _arguments(kind: Kind, config: Any, source: Source) -> dict[str, Any]:
    """Keys of the target with their values, defaults filled in; what cannot be is refused."""
    for key in kind.keys:
        if key not in FIELDS:
            raise InputError(f"{source.at('target')}: parameter {key!r} of {config.target} is no key of a recipe")
    got = {k: x for k in kind.keys if (x := getattr(config, k)) is not None}
    if config.until is not None:
        if config.stop is not None:
            raise InputError(f"{source.at('until')}: give 'stop' or 'until', not both")
        if config.min_tokens or (config.limit or "").startswith("exact"):
            raise InputError(f"{source.at('until')}: cannot go with min_tokens or an exact limit; use a stop token")
        got |= {"min_tokens": 0} if "min_tokens" in kind.keys else {}
    args = {k: x for k, x in kind.defaults.items() if not (k == "stop" and "until" in got)} | got
    for key in kind.needs:
        if key not in got:
            raise InputError(f"{source.file or '--target'}: the target {config.target!r} needs {key!r}; "
                             f"give {_flag(key, source)} ...")  # fmt: skip
    if kind.any_of and not any(k in got for k in kind.any_of):
        raise InputError(f"the target {config.target!r} needs {' or '.join(map(repr, kind.any_of))}")
    for key in ("prompt", "before", "context"):
        if got.get(key) == "":
            raise InputError(f"{source.at(key)}: empty prompt; give the model at least one word to read")
    for key in ("after", "until", "problems", "verifier"):
        if got.get(key) == "":
            raise InputError(f"{source.at(key)}: empty; give some text, or remove it")
    low, high = args.get("min_tokens", 0), args.get("max_tokens")
    if high is not None and low > high:
        raise InputError(f"{source.at('min_tokens' if 'min_tokens' in got else 'max_tokens')}: min_tokens {low} is "
                         f"over max_tokens {high}; lower one or raise the other")  # fmt: skip
    if args.get("stop") == "none" and args.get("limit") in ("own_stop", "exact"):
        raise InputError(f"{source.at('limit')}: {args['limit']!r} needs a stop; use force or exact_prefix")
    if (file := got.get("problems")) is not None and not Path(file).expanduser().is_file():
        raise InputError(f"{source.at('problems')}: no file {file!r} (paths start at the present folder)")
    return args


def _factors(config: Any, source: Source) -> list[Any]:
    """The factors to multiply in, made and checked."""
    from retrodict.targets.constraint import short_words, with_words
    from retrodict.targets.verifier import verifier

    out: list[Any] = []
    if (config.contain or config.avoid) and config.target != "including":
        out.append(with_words(config.contain or (), config.avoid or ()))
    elif config.contain or config.avoid:
        with_words(
            config.contain or (), config.avoid or ()
        )  # the target makes its own; here only the words are checked
    if config.short_words is not None:
        out.append(short_words(config.short_words))
    out += constraints.constraints(config, source.at)
    if config.verifier is not None:
        fn = import_path(config.verifier, source.at("verifier"))
        more: dict[str, Any] = {} if config.verifier_beta is None else {"beta": config.verifier_beta}
        out.append(verifier(fn, config.verifier_kind or "prob", floor=config.verifier_floor, **more))  # pyright: ignore[reportArgumentType]
    return out


def writable(folder: str, at: str) -> None:
    """Refuse an output folder that cannot be made, before anything is computed."""
    path = Path(folder).expanduser().absolute()
    there = next((p for p in (path, *path.parents) if p.exists()), path)
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise InputError(f"{at}: cannot write to {str(folder)!r}; name a folder you may write to")
