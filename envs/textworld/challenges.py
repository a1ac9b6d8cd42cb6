"""What games can be asked of TextWorld's generator, and how hard.

- ``Recipe``: a kind of games: a challenge with its options; equal recipes and seeds make equal games.
- ``recipe``: a recipe from what a user asks for, checked.
- ``CHALLENGES``: the options of each challenge with their defaults and what is allowed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass

from ...errors import UsageError, nearest

Value = int | bool | str


@dataclass(frozen=True, slots=True)
class Option:
    """One option of a challenge."""

    default: Value | None
    """None: it must be given."""
    allowed: range | tuple[Value, ...]
    """Integers or choices; (False, True) for a switch."""
    meaning: str

    def check(self, challenge: str, name: str, value: object) -> Value:
        """Return ``value`` if it is allowed; raise ``UsageError`` otherwise."""
        if isinstance(self.allowed, range):
            if isinstance(value, int) and not isinstance(value, bool) and value in self.allowed:
                return value
            expected = f"an integer from {self.allowed[0]} to {self.allowed[-1]}"
        else:
            for choice in self.allowed:
                if value == choice and isinstance(value, bool) == isinstance(choice, bool):
                    return choice
            expected = f"one of {', '.join(repr(choice) for choice in self.allowed)}"
        raise UsageError(f"{name} of TextWorld's {challenge} games ({self.meaning}) is {expected}, got {value!r}")


_SWITCH = (False, True)
CHALLENGES: dict[str, dict[str, Option]] = {
    "custom": {
        "rooms": Option(4, range(1, 51), "rooms in the game"),
        "objects": Option(8, range(1, 101), "things beside rooms and doors; the quest may need more"),
        "quest_length": Option(6, range(1, 31), "commands that win"),
        "quest_breadth": Option(1, range(1, 6), "subquests that can be done in any order"),
        "quests": Option(1, range(1, 6), "quests beside each other"),
        "adjectives": Option(False, _SWITCH, "names with adjectives"),
        "brief_objective": Option(False, _SWITCH, "the objective tells only the last command"),
        "blended_objective": Option(False, _SWITCH, "the objective joins commands into one"),
    },
    "coin_collector": {
        "level": Option(5, range(1, 301), "1-100: no dead ends, 101-200: one per room, 201-300: two per room"),
    },
    "treasure_hunter": {
        "level": Option(5, range(1, 31), "1-10: easy, 11-20: closed doors and containers, 21-30: locked ones"),
    },
    "cooking": {
        "recipe": Option(1, range(1, 6), "ingredients in the recipe"),
        "take": Option(1, range(6), "ingredients to find; at most those in the recipe"),
        "go": Option(1, (1, 6, 9, 12), "rooms in the game"),
        "open": Option(False, _SWITCH, "doors and containers are closed"),
        "cook": Option(False, _SWITCH, "ingredients need cooking"),
        "cut": Option(False, _SWITCH, "ingredients need cutting"),
        "drop": Option(False, _SWITCH, "the player can only carry what the recipe needs"),
        "foods": Option("split", ("split", "all"), "foods and preparations of the split alone, or all"),
    },
    "simple": {
        "rewards": Option("dense", ("dense", "balanced", "sparse"), "how many steps are rewarded"),
        "goal": Option("detailed", ("detailed", "brief", "none"), "what the objective tells"),
    },
}
COIN_ROOMS = 100
"""Most rooms of a coin collector game that TextWorld makes."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """A challenge with its options."""

    challenge: str
    options: tuple[tuple[str, Value], ...]
    """Sorted by name."""
    split: str = ""
    """The foods of a cooking game; "" for all, and for other challenges."""

    def __getitem__(self, name: str) -> Value:
        """Return an option's value."""
        return dict(self.options)[name]

    @property
    def key(self) -> str:
        """Return a hash that names the recipe in the cache."""
        text = json.dumps([self.challenge, self.options, self.split])
        return f"{self.challenge}-{hashlib.blake2b(text.encode(), digest_size=6).hexdigest()}"


def recipe(challenge: str, options: Mapping[str, object]) -> Recipe:
    """Return the recipe that a user asks for.

    Raises:
        UsageError: an unknown challenge or option, or a value that it does not take.
    """
    if challenge not in CHALLENGES:
        raise UsageError(f"unknown TextWorld challenge {challenge!r}{nearest(challenge, CHALLENGES)}")
    known = CHALLENGES[challenge]
    for name in options:
        if name not in known:
            raise UsageError(f"TextWorld's {challenge} games have no option {name!r}{nearest(name, known)}")
    values: dict[str, Value] = {}
    for name, option in known.items():
        values[name] = option.check(challenge, name, options.get(name, option.default))
    if challenge == "coin_collector":
        level = int(values["level"])
        rooms = ((level - 1) // 100 + 1) * ((level - 1) % 100 + 1)
        if rooms > COIN_ROOMS:
            raise UsageError(
                f"level {level} of TextWorld's coin_collector games has {rooms} rooms, and the generator makes at most "
                f"{COIN_ROOMS}: choose level 1 to 100, 101 to 150 or 201 to 233"
            )
    if challenge == "cooking":
        if "take" not in options:
            values["take"] = values["recipe"]
        if int(values["take"]) > int(values["recipe"]):
            raise UsageError(
                f"take of TextWorld's cooking games must be at most recipe ({values['recipe']}), got {values['take']}"
            )
    return Recipe(challenge, tuple(sorted(values.items())))
