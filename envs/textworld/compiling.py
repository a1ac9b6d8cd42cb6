"""A game of TextWorld's generator as a ``Story``.

- ``compile_story``: the story of a game; imports ``textworld``.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

from .grounding import Fact, Ground, Pattern, Schema, ground
from .story import COOKED, CUT, Move, Quest, Story, Thing, UnsupportedGameError
from .text import clean, inform_text, parse

VERBS = frozenset(
    (
        *("look", "inventory", "examine", "go", "take", "drop", "put", "insert", "open", "close", "lock", "unlock"),
        *("eat", "drink", "cook", "chop", "slice", "dice", "make"),
    )
)
_HIDDEN = ("I", "P", "RECIPE", "ingredient", "slot")
_OBJECTIVE_PART = 200
"""Characters of the objective that TextWorld writes into one text of the compiled game."""


def compile_story(game: Any) -> Story:
    """Return ``game`` (a ``textworld.Game``) as a story.

    Raises:
        UnsupportedGameError: it has rules or texts that only its compiled form can play.
    """
    types = {variable.name: variable.type for fact in game.world.facts for variable in fact.arguments}
    types |= {"P": "P", "I": "I"}
    slots = sum(kind == "slot" for kind in types.values())
    free = sum(fact.name == "free" and fact.arguments[0].type == "slot" for fact in game.world.facts)
    schemas = [_schema(rule, game.kb) for rule in game.kb.rules.values()]
    start = {(fact.name, *fact.names) for fact in game.world.facts}
    actions, reachable = ground(schemas, start, types)
    changing = sorted({fact for action in actions for fact in set(action.before) ^ set(action.after)} & reachable)
    always = frozenset(start.difference(changing))
    bit = {fact: 1 << index for index, fact in enumerate(changing)}
    things = _things(game, types)
    index = {thing.id: place for place, thing in enumerate(things)}
    recipe = _recipe(game, always, index)
    story = Story(
        objective=_objective(game.objective),
        max_score=_max_score(game),
        walkthrough=tuple(game.metadata.get("walkthrough") or ()),
        things=things,
        facts=tuple(changing),
        start=_mask(start.intersection(changing), bit),
        always=always,
        moves=tuple(_move(action, bit, index, game, recipe) for action in actions),
        quests=tuple(_quest(quest, bit, always, reachable) for quest in game.quests),
        capacity=slots,
        free=free,
        order=_order(game, index, types),
        ingredients=recipe,
        digest=digest(game),
    )
    return story


def digest(game: Any) -> str:
    """Return a hash of all that matters to playing ``game``, which does not depend on the order of sets."""
    data = game.serialize()
    data["grammar"] = None  # lists names in the order of a set
    for quest in data["quests"]:
        quest["fail_events"] = sorted(json.dumps(event, sort_keys=True) for event in quest["fail_events"])
    return hashlib.blake2b(json.dumps(data, sort_keys=True).encode(), digest_size=16).hexdigest()


def _schema(rule: Any, kb: Any) -> Schema:
    verb = rule.name.split("/")[0]
    if verb not in VERBS:
        raise UnsupportedGameError(f"a rule called {rule.name!r}")
    numbers: dict[str, int] = {}

    def pattern(predicate: Any) -> Pattern | None:
        if any(place.type == "slot" for place in predicate.parameters):
            return None
        variables = tuple(numbers.setdefault(place.name, len(numbers)) for place in predicate.parameters)
        types = tuple(
            frozenset(kind.name for kind in kb.logic.types.get(place.type).subtypes) for place in predicate.parameters
        )
        return Pattern(predicate.name, variables, types)

    before = [pattern(predicate) for predicate in rule.preconditions]
    after = [pattern(predicate) for predicate in rule.postconditions]
    needed, left = _slots(rule.preconditions), _slots(rule.postconditions)
    template = kb.inform7_commands[rule.name]
    for name, number in numbers.items():
        template = template.replace("{" + name + "}", "{" + str(number) + "}")
    constants = [(number, name) for name, number in numbers.items() if name in ("P", "I", "RECIPE")]
    return Schema(
        rule.name,
        template,
        len(numbers),
        tuple(constants),
        tuple(item for item in before if item is not None),
        tuple(item for item in after if item is not None),
        len(needed["free"]),
        len(needed["used"]),
        len(left["free"]) - len(needed["free"]),
    )


def _slots(predicates: Iterable[Any]) -> dict[str, set[str]]:
    """Return the places in the player's hands that must be free and those that must be taken."""
    found: dict[str, set[str]] = {"free": set(), "used": set()}
    for predicate in predicates:
        if predicate.parameters and predicate.parameters[0].type == "slot":
            found[predicate.name].add(predicate.parameters[0].name)
    return found


def _things(game: Any, types: dict[str, str]) -> tuple[Thing, ...]:
    things = []
    for info in game.infos.values():
        if info.type in _HIDDEN:
            continue
        kind = "object"
        for parent, name in (("r", "room"), ("d", "door"), ("c", "container"), ("s", "supporter")):
            if info.type == parent or game.kb.types.is_descendant_of(info.type, parent):
                kind = name
        things.append(
            Thing(
                id=info.id,
                kind=kind,
                name=inform_text(info.name),
                indefinite=info.indefinite or "",
                definite="" if kind == "door" else (info.definite or "the"),
                description=parse(info.desc or "", kind == "room"),
            )
        )
    return tuple(things)


def _order(game: Any, index: dict[str, int], types: dict[str, str]) -> tuple[int, ...]:
    return tuple(
        index[entity.id]
        for kind in game.kb.types
        for entity in game.world.get_entities_per_type(kind)
        if kind not in ("P", "I") and entity.id in index
    )


def _move(
    action: Ground, bit: dict[Fact, int], index: dict[str, int], game: Any, recipe: Sequence[tuple[int, str, str]]
) -> Move:
    schema = action.schema
    places = [int(number) for number in re.findall(r"\{(\d+)\}", schema.template)]
    ids = [action.binding[place] for place in places]
    needs, after = set(action.before), set(action.after)
    lacks = required = 0
    verb = schema.name.split("/")[0]
    if verb == "make":
        things = {place: name for name, place in index.items()}
        for place, cooked, cut in recipe:
            food = things[place]
            required |= bit.get(("in", food, "I"), 0)
            for kinds, wanted in ((COOKED, cooked), (CUT, cut)):
                for kind in kinds:
                    if kind == wanted:
                        required |= bit.get((kind, food), 0)
                    else:
                        lacks |= bit.get((kind, food), 0)
    return Move(
        command=schema.template.format(
            *(game.infos[name].name if name in game.infos else "" for name in action.binding)
        ),
        verb=verb,
        things=tuple(index[name] for name in ids),
        needs=_mask(needs, bit),
        adds=_mask(after - needs, bit),
        removes=_mask(needs - after, bit),
        lacks=lacks,
        recipe=required,
        free=schema.free,
        used=schema.used,
        frees=schema.frees,
    )


def _mask(facts: Iterable[Fact], bit: dict[Fact, int]) -> int:
    mask = 0
    for fact in facts:
        mask |= bit.get(fact, 0)
    return mask


def _quest(quest: Any, bit: dict[Fact, int], always: frozenset[Fact], reachable: set[Fact]) -> Quest:
    def masks(events: Iterable[Any]) -> tuple[int, ...]:
        found = []
        for event in events:
            facts = {(fact.name, *fact.names) for fact in event.condition.preconditions}
            if facts <= reachable:
                found.append(_mask(facts - always, bit))
        return tuple(sorted(found))

    return Quest(
        masks(quest.win_events),
        masks(quest.fail_events),
        quest.reward,
        quest.optional,
        quest.repeatable,
        len(quest.win_events) > 0,
    )


def _recipe(game: Any, always: frozenset[Fact], index: dict[str, int]) -> tuple[tuple[int, str, str], ...]:
    """Return thing, cooking and cutting of each ingredient, in the order in which the game asks for them."""
    found = []
    foods = {fact[2]: fact[1] for fact in always if fact[0] == "base"}
    for ingredient in (entity.id for entity in game.world.objects if entity.id in foods):
        cooked = next((kind for kind in COOKED if (kind, ingredient) in always), "")
        cut = next((kind for kind in CUT if (kind, ingredient) in always), "")
        found.append((index[foods[ingredient]], cooked, cut))
    return tuple(found)


def _max_score(game: Any) -> int:
    return 0 if game.max_score == float("inf") else int(game.max_score)


def _objective(text: str) -> str:
    """Return the objective as the compiled game prints it."""
    parts = text.split("\n")
    pieces = []
    for number, part in enumerate(parts):
        chunks = [part[at : at + _OBJECTIVE_PART] for at in range(0, len(part), _OBJECTIVE_PART)]
        pieces.append("".join(inform_text(chunk) for chunk in chunks) + ("\n" if number < len(parts) - 1 else ""))
    return clean("".join(pieces))
