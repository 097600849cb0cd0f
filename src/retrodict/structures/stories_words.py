"""How maps are put in words: by the story, by the reader of ``maps``, and in questions.

A story's sentences come from hand-written paraphrases that the reader never sees; its own wordings (``say_*``) are
others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Words:
    """How a map is put in words. ``{a}`` and ``{b}`` are names, ``{c}`` a third, ``{x}`` an amount.

    Attributes:
        names: of the places, as they stand inside a sentence.
        opening: says who is there, and nothing about links.
        link, either, vague, blocked, reward, moved: the story's paraphrases of each kind of fact.
        say_link, say_blocked, say_reward, say_nothing: the reader's own wording of it. Both orders of a pair
            are in it, or a small model takes the last name for the likelier one.
        best, way, worth: the questions.
    """

    names: tuple[str, ...]
    opening: str
    link: tuple[str, ...]
    either: tuple[str, ...]
    vague: tuple[str, ...]
    blocked: tuple[str, ...]
    reward: tuple[str, ...]
    moved: tuple[str, ...]
    say_link: str
    say_blocked: str
    say_reward: str
    say_nothing: str
    best: str
    way: str
    worth: str


ROOMS = Words(
    names=("the kitchen", "the hall", "the cellar", "the attic", "the library", "the garage", "the pantry",
           "the chapel", "the studio", "the porch"),
    opening="This is the house: {all}.",
    link=("You can walk straight from {a} into {b}.", "From {a} a small door leads to {b}.",
          "{a} opens onto {b}.", "Whoever leaves {a} by the side door stands in {b}."),
    either=("One door of {a} leads to {b} or to {c}.", "{a} opens onto {b}, or perhaps onto {c}."),
    vague=("There is one more door in {a}, and nobody says where it leads.",),
    blocked=("The next day the passage between {a} and {b} is blocked by rubble.",
             "Since this morning nobody can get from {a} to {b}: that way is bricked up."),
    reward=("In {a} stands a chest with {x} dollars in it.", "Someone left {x} dollars in a chest in {a}."),
    moved=("The next day the chest in {a} holds {x} dollars instead.",
           "Overnight the sum in {a} has been changed to {x} dollars."),
    say_link="There is a door between {a} and {b}. It joins {b} and {a}.",
    say_blocked="The door between {a} and {b} is locked now. It no longer joins {b} and {a}.",
    say_reward="There is a chest in {a}. It has {x} dollars in it.",
    say_nothing="There is a house with {all}.",
    best="You are in {a}. Every door you pass costs 1 dollar, and you may open one chest. "
         "To end with the most money, which room do you enter first?",
    way="You are in {a} and want to go to {b} through as few doors as you can. Which rooms do you enter, in order?",
    worth="You are in {a}. Every door you pass costs 1 dollar, and you may open one chest: "
          "the one in {b} or the one in {c}. Which is worth more to you?",
)  # fmt: skip

TIES = Words(
    names=("Anna", "Boris", "Clara", "David", "Elena", "Farid", "Greta", "Hugo", "Irene", "Jonas"),
    opening="These are the people of the village: {all}.",
    link=("{a} has known {b} for years.", "{a} and {b} have lunch together.", "{a} often calls {b}.",
          "{a} plays cards with {b}."),
    either=("{a} plays cards with {b}, or was it {c}?", "{a} has lunch with {b} or with {c}."),
    vague=("{a} has one more friend, but nobody knows who that is.",),
    blocked=("Last week {a} and {b} quarrelled and no longer speak.",
             "Since Sunday {a} will not talk to {b} any more."),
    reward=("{a} pays {x} dollars for the news.", "For the news you would get {x} dollars from {a}."),
    moved=("Since yesterday {a} pays {x} dollars instead.", "Now the sum that {a} pays is {x} dollars."),
    say_link="{a} and {b} are friends. {b} and {a} are friends.",
    say_blocked="{a} and {b} are not friends any more. {b} and {a} are not friends any more.",
    say_reward="{a} gives {x} dollars for the news.",
    say_nothing="There is a village with {all}.",
    best="{a} hears the news. It can only go from friend to friend, each friend on the way takes 1 dollar, and only "
         "one person pays for it. To get the most for it, whom does {a} tell first?",
    way="The news starts with {a} and must reach {b} through as few friends as it can. Who hears it, in order?",
    worth="{a} hears the news. It can only go from friend to friend, each friend on the way takes 1 dollar, and only "
          "one person pays for it: {b} or {c}. Who is worth more?",
)  # fmt: skip

RENDERERS = {"rooms": ROOMS, "ties": TIES}


def listed(names: Sequence[str]) -> str:
    """Names in a row, as a sentence lists them."""
    *head, last = names
    return f"{', '.join(head)} and {last}" if head else last


def capital(text: str) -> str:
    """The text with a capital first letter."""
    return text[:1].upper() + text[1:]
