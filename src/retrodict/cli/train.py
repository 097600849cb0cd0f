"""``retrodict train``: fine-tune a policy on a recipe's target, then say how far it is from the posterior.

The keys are those of ``sample`` (model, target, run), and the settings of training. Everything is checked before a
weight is loaded; ``--resume RUN`` goes on with a run folder and takes no other key.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import tyro
import yaml

from retrodict.cli import config, values
from retrodict.cli.config import FIELDS, Source
from retrodict.cli.run import _console, _print_comparison, _progress, _spinner, _texts, _unbroken
from retrodict.cli.targets import TARGETS, build, kind_of, questions
from retrodict.errors import InputError, nearest
from retrodict.models import load as door
from retrodict.objectives.table import NEED_PREFIXES, OBJECTIVES, WITH_LOG_Z
from retrodict.policies.amortized import SEES
from retrodict.records import Rollouts
from retrodict.report.compare import compare
from retrodict.report.run import RunFolder, environment
from retrodict.targets.algebra import Target
from retrodict.targets.simulate import simulate
from retrodict.training.amortize import amortize, grow, load_policy
from retrodict.training.distance import DISTANCES
from retrodict.training.distributed import World, world
from retrodict.training.settings import Settings, settings

RATES = values.Value("START END STEPS", lambda x: _triple(x), values._number, many=True)
RANGE = values.Value("LOW HIGH", lambda x: tuple(_numbers(x, 2)), values._number, many=True)
NAMES = values.Value("NAME ...", values._words, many=True)
SWITCH = values.Value("true|false", lambda x: _switch(x))


def _numbers(x: Any, n: int) -> list[float]:
    if not isinstance(x, (list, tuple)) or len(x) != n:
        raise ValueError(f"expected {n} numbers, found {values.spell(x)}")
    return [values.FINITE(v) for v in x]


def _triple(x: Any) -> tuple[float, float, int]:
    start, end, steps = _numbers(x, 3)
    return start, end, int(steps)


def _switch(x: Any) -> bool:
    if x in (True, "true", "yes"):
        return True
    if x in (False, "false", "no"):
        return False
    raise ValueError(f"expected true or false, found {values.spell(x)}")


@dataclasses.dataclass(frozen=True)
class Key:
    """One key of training: what it may hold, its default, and what it means."""

    value: values.Value
    default: Any
    help: str


PRIORITIES = ["uniform", "reward", "recency"]
_S = {f.name: f.default for f in dataclasses.fields(Settings)}
TRAIN: dict[str, Key] = {
    "sees": Key(values.TEXT, "x", "what q reads: x, xy, or a template of {context} and {evidence}"),
    "rank": Key(values.whole(1), 16, "rank of the LoRA adapter"),
    "lora_alpha": Key(values.POSITIVE, None, "its scale is lora_alpha / rank (default 2 rank)"),
    "lora_targets": Key(values.WORDS, None, "modules that get it (default: every linear layer)"),
    "objective": Key(values.choice(lambda: ["auto", *OBJECTIVES], "NAME"), "auto", f"auto, {', '.join(OBJECTIVES)}"),
    "lam": Key(values.SHARE, None, "subtb: lambda"),
    "entropy": Key(values.WEIGHT, None, "reinforce, rloo, grpo, ppo: weight of the entropy in the reward (their beta)"),
    "steps": Key(values.whole(1), _S["steps"], "gradient steps"),
    "samples": Key(values.whole(1), _S["samples"], "rows of each problem in a step"),
    "per_step": Key(values.whole(1), None, "problems in a step (default: all, at most 8)"),
    "lr": Key(values.POSITIVE, _S["lr"], "Adam's step size"),
    "lr_end": Key(values.SHARE, _S["lr_end"], "share of lr that a cosine falls to"),
    "lr_log_z": Key(values.POSITIVE, _S["lr_log_z"], "step size of a learned log Z (tb)"),
    "warmup": Key(values.whole(0), _S["warmup"], "steps until lr is reached"),
    "clip": Key(values.POSITIVE, _S["clip"], "largest norm of the gradient"),
    "tempered": Key(values.SHARE, 0.0, "share of samples drawn at a temperature"),
    "temperatures": Key(RANGE, (0.5, 2.0), "the range of that temperature"),
    "epsilon": Key(values.SHARE, 0.0, "tempered samples: chance of a uniform token"),
    "replay": Key(values.SHARE, 0.0, "share of samples taken from the buffer"),
    "capacity": Key(values.whole(1), _S["capacity"], "replay: rows kept of each problem"),
    "priority": Key(values.choice(lambda: PRIORITIES, "NAME"), "uniform", "replay: what is preferred"),
    "replay_alpha": Key(values.WEIGHT, _S["replay_alpha"], "replay by reward: power of gamma"),
    "distance": Key(values.choice(lambda: list(DISTANCES), "NAME"), None, "replay: what makes two rows alike"),
    "tolerance": Key(values.SHARE, 0.0, "replay: how alike is one row"),
    "reward_temperature": Key(RATES, None, "gamma^(1/T), T falling linearly: start, end, steps"),
    "micro": Key(values.whole(1), None, "rows that run with gradient at once (default: as many as fit)"),
    "checkpointing": Key(SWITCH, False, "run layers again in the backward pass: less memory, more time"),
    "shards": Key(values.whole(1), 1, "streams of samples; a multiple of the number of processes"),
    "evaluate": Key(values.whole(2), _S["evaluate"], "fresh draws of each problem behind the final numbers"),
    "evaluate_every": Key(values.whole(0), 0, "steps between evaluations on the way"),
    "save_every": Key(values.whole(1), 20, "steps between checkpoints"),
    "held_out": Key(values.whole(1), None, "with simulated: further problems that training never sees, for the table"),
    "baselines": Key(NAMES, None, "objectives trained beside it at the same settings, for the table"),
}  # fmt: skip
SHARED = {k: f for k, f in FIELDS.items() if f.metadata["group"] in ("model", "target", "run") and k != "batch"}
OPTIONS = {"subtb": {"lam": "lam"}} | dict.fromkeys(("reinforce", "rloo", "grpo", "ppo"), {"entropy": "beta"})
NEEDS = (("temperatures", "tempered"), ("epsilon", "tempered"), ("capacity", "replay"), ("priority", "replay"),
         ("tolerance", "replay"), ("distance", "tolerance"), ("replay_alpha", "replay"),
         ("held_out", "simulated"))  # fmt: skip
"""Keys that nothing reads unless the other is given."""
ADAPTER = {"rank", "lora_alpha", "lora_targets"}
"""Keys of a new adapter."""
SIMULATED = ("infill", "posterior", "stories")
"""Targets that have a Y, which the model can write itself."""
WITHOUT_Y = ("continuation", "of_length", "including", "scored", "sentences")


def flags() -> Any:
    """The class that tyro reads: the recipe's path, ``--resume``, and one flag a key."""

    def one(name: str, value: values.Value, text: str) -> tuple[str, Any, Any]:
        return name, Annotated[Any, *values.flag(value, text)], dataclasses.field(default=None)

    told = [one(k, f.metadata["value"], f.metadata["help"]) for k, f in SHARED.items()]
    told += [
        one(k, x.value, x.help + ("" if x.default is None else f" (default {x.default})")) for k, x in TRAIN.items()
    ]
    told.append(one("resume", values.TEXT, "a run folder to go on with"))
    name, kind, default = one("recipe", values.Value("RECIPE", str), "a YAML file with the same keys; flags win")
    return dataclasses.make_dataclass("Flags", [(name, tyro.conf.Positional[kind], default), *told])


@dataclasses.dataclass(frozen=True)
class TrainPlan:
    """A training run that has been checked."""

    keys: Any
    kind: Any
    arguments: Mapping[str, Any]
    data: Sequence[Any]
    factors: Sequence[Any]
    settings: Settings
    resolved: Mapping[str, Any]
    folder: Path | None = None


def plan(recipe: str | None, given: Mapping[str, Any], resumed: Path | None = None) -> TrainPlan:
    """Read, merge and check everything; raises InputError with one line."""
    known = {**{k: f.metadata["value"] for k, f in SHARED.items()}, **{k: x.value for k, x in TRAIN.items()}}
    told = {} if recipe is None else config.read_recipe(recipe, known)
    source = Source(recipe, frozenset(given))
    found: dict[str, Any] = {}
    for k, x in {**told, **given}.items():
        try:
            found[k] = known[k](x)
        except ValueError as error:
            raise InputError(f"{source.at(k)}: {error}") from None
    keys: Any = SimpleNamespace(
        **{k: f.default for k, f in SHARED.items()} | {k: x.default for k, x in TRAIN.items()} | found
    )
    if keys.target is None:
        raise InputError(f"{recipe or 'train'}: no target; say what to sample, target: one of {', '.join(TARGETS)}")
    kind = kind_of(keys.target, source.at("target"))
    _unused(found, kind, keys, source)
    arguments = config._arguments(kind, keys, source)
    s = _settings(keys, source)
    _sees(keys, kind, source)
    idle = {k for k, needs in NEEDS if not getattr(keys, needs)} | (ADAPTER if keys.adapter else set())
    idle |= set() if keys.objective in ("auto", *WITH_LOG_Z) else {"lr_log_z"}
    told = {k: getattr(keys, k) for k in (*SHARED, *TRAIN) if k in found or k in TRAIN}
    resolved = {k: x for k, x in told.items() if x is not None and (k in found or k not in idle)}
    resolved |= {k: getattr(keys, k) for k in ("model", "dtype", "device", "seed", "out")} | dict(arguments)
    resolved["name"] = keys.name or (Path(recipe).stem if recipe else keys.target.rpartition(":")[2])
    config.writable(keys.out, source.at("out"))
    if keys.adapter and not (Path(keys.adapter).expanduser() / "adapter_config.json").is_file():
        raise InputError(f"{source.at('adapter')}: no adapter in {keys.adapter!r}: a PEFT folder with "
                         "adapter_config.json is needed")  # fmt: skip
    return TrainPlan(keys, kind, arguments, questions(arguments), config._factors(keys, source), s,
                     {"command": "train"} | resolved, resumed)  # fmt: skip


def _unused(found: Mapping[str, Any], kind: Any, keys: Any, source: Source) -> None:
    """Refuse keys that nothing will read, and those that contradict each other."""
    trained = [keys.objective, *(keys.baselines or ())]
    for key in found:
        at = source.at(key)
        if key in SHARED and SHARED[key].metadata["group"] == "target":
            if key not in ("target", *kind.keys, *config.FACTORS):
                raise InputError(f"{at} is unused: the target {keys.target!r} reads {', '.join(kind.keys)}; remove it")
        if key.startswith("verifier_") and keys.verifier is None:
            raise InputError(f"{at} is unused without 'verifier'; name one (my.module:fn), or remove it")
        if key in ("lam", "entropy") and not any(key in OPTIONS.get(x, {}) for x in trained):
            raise InputError(f"{at} is unused by {' and '.join(trained)}; remove it")
        if key == "lr_log_z" and not {"auto", *WITH_LOG_Z} & set(trained):
            raise InputError(f"{at} is unused by {' and '.join(trained)}, which learn no log Z; remove it")
        if key in ADAPTER and keys.adapter:
            raise InputError(f"{at} is unused with 'adapter', which has its own; remove one")
    for key, needs in NEEDS:
        if key in found and not getattr(keys, needs):
            raise InputError(f"{source.at(key)} is unused without {needs!r}; give it, or remove {key!r}")
    for name in keys.baselines or ():
        if name not in OBJECTIVES:
            raise InputError(f"{source.at('baselines')}: unknown objective {name!r}{nearest(name, OBJECTIVES)}")
        if name == keys.objective:
            raise InputError(f"{source.at('baselines')}: {name!r} is the objective itself; remove it there")
    if keys.simulated is not None and (keys.target not in SIMULATED or any(k in found for k in config.FACTORS)):
        raise InputError(f"{source.at('simulated')}: only {', '.join(SIMULATED)} without further factors can be "
                         "simulated")  # fmt: skip
    alone = ("auto", "tb", "mle", *NEED_PREFIXES)
    if keys.samples < 2 and (bad := [x for x in trained if x not in alone]):
        raise InputError(
            f"{source.at('samples')}: {bad[0]} compares samples of one problem; give at least 2, or use tb"
        )


def _sees(keys: Any, kind: Any, source: Source) -> None:
    """Refuse a template that holds no X, and a Y to read where there is none."""
    if keys.sees not in SEES and "{context}" not in keys.sees:
        raise InputError(f"{source.at('sees')}: {keys.sees!r} is neither {' nor '.join(SEES)}, nor a template with "
                         "{context} in it")  # fmt: skip
    reads = "{evidence}" in str(SEES.get(keys.sees, keys.sees))
    if reads and (keys.target in WITHOUT_Y or "evidence" in kind.keys and not (keys.evidence or keys.simulated)):
        raise InputError(f"{source.at('sees')}: there is no evidence for q to read; give evidence, or sees: x")


def _settings(keys: Any, source: Source, objective: str | None = None) -> Settings:
    name = objective or keys.objective
    options = {to: getattr(keys, k) for k, to in OPTIONS.get(name, {}).items() if getattr(keys, k) is not None}
    names = {f.name for f in dataclasses.fields(Settings)} - {"mixture", "options", "objective", "seed"}
    told = {k: getattr(keys, k) for k in (*names, "tempered", "temperatures", "epsilon", "replay")}
    try:
        return settings(objective=name, options=options, seed=keys.seed, **told)
    except InputError as error:
        raise InputError(f"{source.file or 'train'}: {error}") from None


# -- running ----------------------------------------------------------------------------------------------------------


def run(words: Sequence[str], parse: Any) -> int:
    """The command; gives the exit code."""
    kind = flags()
    kind.__doc__ = "Fine-tune a policy to draw from a posterior; writes a run folder with the adapter."
    found = parse(kind, "train", words, [*SHARED, *TRAIN, "resume"])
    given = {k: x for k, x in vars(found).items() if x is not None}
    recipe = given.pop("recipe", None)
    resume = given.pop("resume", None)
    if resume is None:
        return execute(plan(None if recipe is None else recipe.words[0], given))
    folder = Path(resume.words[0]).expanduser()
    if recipe is not None or given:
        raise InputError("train: --resume takes its recipe from the run folder; give no other key")
    if not (folder / "config.yaml").is_file():
        raise InputError(f"train: no run folder {str(folder)!r}; give one that retrodict train wrote")
    told = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8")) or {}
    if told.pop("command", "") != "train":
        raise InputError(f"train: {folder} was not written by retrodict train")
    status = folder / "status.json"
    if status.is_file() and json.loads(status.read_text(encoding="utf-8")).get("status") == "complete":
        raise InputError(f"train: {folder} is complete; train longer in a new folder, with more steps")
    return execute(plan(None, told, folder))


def execute(p: TrainPlan) -> int:
    """Train, compare with prior and baselines, save the adapter and the page.

    Of several processes (torchrun) the first has the run folder and says how it goes; the others train along.
    """
    here = world()
    if here.first:
        return _execute(p, here)
    with open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        return _execute(p, here)


def _execute(p: TrainPlan, here: World) -> int:
    keys = p.keys
    with _spinner(f"loading {keys.model}"):
        lm: Any = door.load(keys.model, dtype=keys.dtype, device=keys.device)
    target = build(p.kind, lm, p.arguments, p.data, p.factors)
    held, exact = _simulated(p, lm, target)
    target = held.pop("train", target)
    judged = held.get("judged", target)
    folder = _folder(p, here, judged, lm)
    policies: dict[str, Any] = {}
    try:
        for name in dict.fromkeys([keys.objective, *(keys.baselines or ())]):
            policies[name] = _train(p, target, folder, name)
        if not here.first:
            return 0
        with _spinner("comparing"):
            label = {n: "amortized" if n == keys.objective else n for n in policies}
            told: dict[str, Any] = {"prior": judged.prior}
            told |= {label[n]: x.on(judged.problems) for n, x in policies.items()}
            table = compare(judged, told, n=keys.evaluate, seed=keys.seed + 1, exact=exact)
        for name, particles in table.particles.items():
            folder.put(name, particles)
        folder.comparison(table)
        policies[keys.objective].save(folder.path / "adapter", table, p.resolved)
    except KeyboardInterrupt:
        _close(folder, here, "interrupted")
        raise KeyboardInterrupt(f"interrupted; go on with: retrodict train --resume {folder.path}") from None
    except Exception as error:
        _close(folder, here, "failed", str(error))
        raise
    _close(folder, here, "complete")
    _print_comparison(table)
    print(f"adapter {folder.path / 'adapter'}\nreport  {folder.path / 'report.html'}")
    return 0


def _folder(p: TrainPlan, here: World, judged: Target, lm: Any) -> RunFolder:
    """The run folder, which the first process makes for all."""
    if p.folder:
        return RunFolder(p.folder)
    made = ""
    if here.first:
        keys = p.keys
        made = str(RunFolder.create(keys.out, p.resolved["name"], p.resolved, _texts(judged, lm), environment(lm)).path)
    return RunFolder(Path(here.told(made)))


def _close(folder: RunFolder, here: World, status: str, message: str = "") -> None:
    """Say in the folder how it ended."""
    if here.first:
        with _unbroken():
            folder.close(status, message)


def _simulated(p: TrainPlan, lm: Any, target: Target) -> tuple[dict[str, Target], Rollouts | None]:
    """Problems that the model writes itself: those to train on, and those to judge by, with their exact middles."""
    keys = p.keys
    if keys.simulated is None:
        return {}, None
    with _spinner(f"simulating {keys.simulated} problems"):
        first, middles = simulate(target, keys.simulated, keys.seed, until=".")
        if keys.held_out is None:
            return {"train": first, "judged": first}, middles
        other = p.kind.held_out(lm, **p.arguments) if getattr(p.kind, "held_out", None) else target
        judged, exact = simulate(other, keys.held_out, keys.seed + 1, until=".")
        return {"train": first, "judged": judged}, exact


def _train(p: TrainPlan, target: Target, folder: RunFolder, name: str) -> Any:
    keys = p.keys
    source = Source(None, frozenset())
    s = p.settings if name == keys.objective else _settings(keys, source, name)
    where = folder.path / "training" / name
    if keys.adapter:
        policy = load_policy(target, keys.adapter, keys.sees)
    else:
        targets, label = keys.lora_targets or "all-linear", re.sub(r"\W", "_", name)
        policy = grow(target, sees=keys.sees, rank=keys.rank, alpha=keys.lora_alpha, targets=targets, seed=keys.seed,
                      name=label)  # fmt: skip
    console = _console()
    with _progress(name) as on_step:

        def told(m: Mapping[str, Any]) -> None:
            on_step(int(m["step"]) + 1, s.steps)
            every = max(1, s.steps // 10)
            if (m["step"] + 1) % every == 0:
                console.print(line(m), markup=False)

        return amortize(target, policy, plan=s, folder=where, resume=p.folder is not None,
                        save_every=keys.save_every, on_metrics=told)  # fmt: skip


def line(m: Mapping[str, Any]) -> str:
    """One step in words."""
    if "skipped" in m:
        return f"step {m['step'] + 1}: skipped: {m['skipped']}"
    seen = [f"step {m['step'] + 1:>4}", f"{m['objective']} loss {m['loss']:.3g}"]
    if "elbo" in m:
        seen += [f"lower bound {m['elbo']:.2f}", f"Var(a) {m['var_a']:.2f}", f"ESS {m['ess']:.0%}",
                 f"distinct {m['distinct']:.0f}", f"length {m['length']:.1f}"]  # fmt: skip
    return "  ".join([*seen, f"{m['seconds']:.0f} s"])
