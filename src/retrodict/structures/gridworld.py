"""A small causal world whose rules are latent: posterior over rule sets from texts, rolled out exactly.

A robot on six coloured squares with true variables (square, key, door, battery) and eight rules, each of which holds or
not: 256 worlds, each a deterministic transition s' = T_r(s, a). Observed are transitions: the state before and the
action are given, the outcome only as a sentence x, which may leave variables unsaid. With p_LM(x | s') a language
model's probability of x as another wording of the outcome s',

    p(r | x_1..n) ~ p(r) prod_t p_LM(x_t | T_r(s_t, a_t))                   exact, by enumeration

Rules that agree on every outcome seen keep their prior odds. A rollout of h actions is predicted by its most probable
state at each step,  argmax_s sum_r p(r | x) 1[T_r(...T_r(s_0, a_1)..., a_h) = s],  so doubt about rules is carried
along, while a model asked directly must commit to a state at each step and build on it. Bias: none beyond the reading.
After Gkountouras et al. 2024 (arXiv 2410.19923), who learn the causal variables from images; here they are given.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from retrodict.errors import InputError
from retrodict.rng import generator
from retrodict.structures.ask import Asker
from retrodict.structures.maps import LEAD
from retrodict.structures.stories_words import capital

SQUARES = ("red", "blue", "green", "white", "black", "yellow")
"""Two rows of three, from the north-west; the door is between blue and green."""
ACTIONS = ("go north", "go south", "go east", "go west", "take the key", "open the door")
RULES = (
    "the door opens only with the key",
    "there is a wall between the white and the black square",
    "each move uses one unit of battery",
    "with an empty battery the robot cannot move",
    "arriving on the white square fills the battery",
    "the door falls shut after each move",
    "on the black square the robot slides on to the next",
    "the key breaks when it opens the door",
)
KEY, WALL, DRAIN, DEAD, CHARGE, SPRING, ICE, BREAKS = range(8)
BLUE, GREEN, WHITE, BLACK, YELLOW = 1, 2, 3, 4, 5
FULL = 3
ON_FLOOR, HELD, BROKEN = 0, 1, 2

State = tuple[int, int, int, int]
"""Square, key (on the floor of the yellow square, held, broken), door (1 open), battery (0 to 3)."""


def all_rules() -> Bool[Tensor, "n r"]:
    """Every rule set."""
    return (torch.arange(2 ** len(RULES))[:, None] >> torch.arange(len(RULES)) & 1).bool()


# -- the world --------------------------------------------------------------------------------------------------------


def _goes(at: Tensor, action: Tensor, door: Tensor, rules: Tensor) -> tuple[Tensor, Tensor]:
    """(square reached, whether the step is possible) of a move in direction ``action``."""
    row, column = at // 3, at % 3
    row = row - (action == 0).long() + (action == 1).long()
    column = column + (action == 2).long() - (action == 3).long()
    to = row * 3 + column
    pair = at.minimum(to) * 10 + at.maximum(to)
    free = (row >= 0) & (row <= 1) & (column >= 0) & (column <= 2) & (action < 4)
    free &= ~((pair == BLUE * 10 + GREEN) & (door == 0)) & ~((pair == WHITE * 10 + BLACK) & rules[:, WALL])
    return torch.where(free, to, at), free


def step(state: Int[Tensor, "b 4"], action: Int[Tensor, " b"], rules: Bool[Tensor, "b r"]) -> Int[Tensor, "b 4"]:
    """T: the state after an action, under each row's rules."""
    at, key, door, battery = state.unbind(1)
    to, moved = _goes(at, action, door, rules)
    moved &= ~(rules[:, DEAD] & (battery == 0))
    on = torch.where(moved & rules[:, ICE] & (to == BLACK), _goes(to, action, door, rules)[0], to)
    square = torch.where(moved, on, at)
    battery = torch.where(moved & rules[:, DRAIN], (battery - 1).clamp_min(0), battery)
    battery = torch.where(moved & rules[:, CHARGE] & (square == WHITE), FULL, battery)
    opens = (action == 5) & ((at == BLUE) | (at == GREEN)) & (door == 0) & ((key == HELD) | ~rules[:, KEY])
    door = torch.where(opens, 1, torch.where(moved & rules[:, SPRING], 0, door))
    takes = (action == 4) & (at == YELLOW) & (key == ON_FLOOR)
    key = torch.where(takes, HELD, torch.where(opens & (key == HELD) & rules[:, BREAKS], BROKEN, key))
    return torch.stack([square, key, door, battery], 1)


def outcomes(before: State, action: int, rules: Bool[Tensor, "n r"]) -> tuple[list[State], Int[Tensor, " n"]]:
    """The distinct states that some rule set leads to, and which of them each does."""
    n = len(rules)
    after = step(torch.tensor(before).expand(n, 4), torch.full((n,), action), rules)
    distinct, index = after.unique(dim=0, return_inverse=True)
    return [(a, b, c, d) for a, b, c, d in distinct.tolist()], index


def roll(start: State, actions: Sequence[int], rules: Bool[Tensor, "n r"]) -> Int[Tensor, "n h 4"]:
    """The states after each action, under every rule set."""
    s, out = torch.tensor(start).expand(len(rules), 4), []
    for a in actions:
        s = step(s, torch.full((len(rules),), a), rules)
        out.append(s)
    return torch.stack(out, 1)


# -- texts ------------------------------------------------------------------------------------------------------------

LAYOUT = ("A robot drives on six squares. North row, from west to east: red, blue, green. South row: white, black, "
          "yellow. There is a door between blue and green.")  # fmt: skip
HAS = ("the key lies on the yellow square", "the robot has the key", "the key is broken")
DOOR = ("the door is shut", "the door is open")
SAYS = {  # the observer's wordings, which are not the reader's
    "square": ("it is now standing on {}", "one finds it on the {} square", "it comes to rest on {}"),
    "key": (("nobody has picked up the key yet", "the key is still lying on yellow"),
            ("it carries the key", "the key is in its gripper"),
            ("the key has snapped", "of the key only pieces remain")),
    "door": (("the door is closed", "one cannot pass the door"), ("the door stands open", "the doorway is free")),
    "battery": ("its battery shows {}", "{} units of charge remain"),
}  # fmt: skip


def describe(s: State) -> str:
    """A state in the reader's words."""
    square, key, door, battery = s
    return f"The robot is on the {SQUARES[square]} square, its battery is at {battery}, {DOOR[door]}, and {HAS[key]}."


@dataclass(frozen=True)
class Transition:
    """What was observed once: the state before, the action, the outcome in words, and what it truly was."""

    before: State
    action: int
    text: str
    after: State


def worded(s: State, unsaid: float, gen: torch.Generator) -> str:
    """An outcome as an observer tells it: the square always, each other variable unless it is left unsaid."""

    def pick(options: Sequence[str]) -> str:
        return options[int(torch.randint(len(options), (1,), generator=gen))]

    square, key, door, battery = s
    said = [pick(SAYS["square"]).format(SQUARES[square])]
    for line in (pick(SAYS["battery"]).format(battery), pick(SAYS["door"][door]), pick(SAYS["key"][key])):
        if torch.rand((), generator=gen) >= unsaid:
            said.append(line)
    return capital(", ".join(said[:-1]) + f", and {said[-1]}." if len(said) > 1 else f"{said[0]}.")


def random_state(gen: torch.Generator) -> State:
    """Any state."""
    sizes = (len(SQUARES), 3, 2, FULL + 1)
    square, key, door, battery = (int(torch.randint(k, (1,), generator=gen)) for k in sizes)
    return square, key, door, battery


def observe(rules: Bool[Tensor, " r"], n: int, *, unsaid: float = 0.3, seed: int = 0) -> list[Transition]:
    """n transitions under ``rules``, told by an observer; only ones that some other rule set would see differently."""
    if n < 1:
        raise InputError(f"observe at least one transition, not {n}")
    gen, every, out = generator(seed), all_rules(), []
    while len(out) < n:
        before, action = random_state(gen), int(torch.randint(len(ACTIONS), (1,), generator=gen))
        if len(outcomes(before, action, every)[0]) < 2:
            continue
        (after,), _ = outcomes(before, action, rules[None])
        out.append(Transition(before, action, worded(after, unsaid, gen), after))
    return out


def journey(rules: Bool[Tensor, " r"], h: int, *, seed: int = 0) -> tuple[State, list[int], list[State]]:
    """A start, h actions whose outcomes hang on a rule wherever there is such an action, and the true states."""
    gen, every = generator(seed), all_rules()
    start = random_state(gen)
    s, actions, states = start, [], []
    for _ in range(h):
        telling = [a for a in range(len(ACTIONS)) if len(outcomes(s, a, every)[0]) > 1] or list(range(len(ACTIONS)))
        actions.append(telling[int(torch.randint(len(telling), (1,), generator=gen))])
        (s,), _ = outcomes(s, actions[-1], rules[None])
        states.append(s)
    return start, actions, states


# -- the posterior ----------------------------------------------------------------------------------------------------


def log_likelihood(asker: Asker, seen: Sequence[Transition], rules: Bool[Tensor, "n r"]) -> Float[Tensor, "t n"]:
    """log p_LM(x_t | T_r(s_t, a_t)) of each text under each rule set; each distinct outcome is asked once."""
    found = [outcomes(x.before, x.action, rules) for x in seen]
    pairs = [(describe(s) + LEAD, f" {x.text}") for x, (states, _) in zip(seen, found, strict=True) for s in states]
    log_p, at, rows = asker.log_p(pairs), 0, []
    for states, index in found:
        rows.append(log_p[at : at + len(states)][index])
        at += len(states)
    return torch.stack(rows)


def rule_posterior(
    log_lik: Float[Tensor, "t n"], rules: Bool[Tensor, "n r"], prior: Float[Tensor, " r"] | None = None
) -> Float[Tensor, " n"]:
    """p(r | x), with each rule's own prior probability (a half by default)."""
    p = torch.full((rules.shape[1],), 0.5, dtype=torch.float64) if prior is None else prior.double()
    log_prior = torch.where(rules, p.log(), torch.log1p(-p)).sum(1)
    return (log_prior + log_lik.sum(0)).softmax(0)


def predict(weight: Float[Tensor, " n"], states: Int[Tensor, "n h 4"]) -> list[State]:
    """The most probable state at each step of a rollout under a posterior over rule sets."""
    out: list[State] = []
    for column in states.unbind(1):
        distinct, index = column.unique(dim=0, return_inverse=True)
        mass = torch.zeros(len(distinct), dtype=weight.dtype).index_add(0, index, weight)
        square, key, door, battery = distinct[mass.argmax()].tolist()
        out.append((square, key, door, battery))
    return out


def predict_directly(asker: Asker, seen: Sequence[Transition], start: State, actions: Sequence[int]) -> list[State]:
    """The model's own rollout: it reads the same observations and picks, step by step, the likeliest next state.

    It chooses among the states that some rule set leads to; where there is only one, nothing is asked.
    """
    told = [f"{describe(x.before)} It tries to {ACTIONS[x.action]}. After that: {x.text}" for x in seen]
    head, s, out = "\n".join([LAYOUT, *told]), start, []
    for a in actions:
        states, _ = outcomes(s, a, all_rules())
        if len(states) > 1:
            prompt = f"{head}\n{describe(s)} It tries to {ACTIONS[a]}. After that:"
            s = states[int(asker.options([prompt], [f" {describe(x)}" for x in states])[0].argmax())]
        else:
            s = states[0]
        out.append(s)
    return out
