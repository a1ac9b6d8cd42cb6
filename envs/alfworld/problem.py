"""PDDL problems and task sentences in the form of the published games.

- ``Spec``: what a game asks for and where it takes place.
- ``problem_pddl``: the problem of a furnished room.
- ``sentences``: the published wordings of a goal.
- ``STATE``: the state that a task type asks of its object.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Final

from .layouts import Room, rules
from .placement import Placed

STATE: Final[dict[str, tuple[str, str, str]]] = {
    "pick_clean_then_place_in_recep": ("cleanable", "isClean", "SinkBasin"),
    "pick_cool_then_place_in_recep": ("coolable", "isCool", "Fridge"),
    "pick_heat_then_place_in_recep": ("heatable", "isHot", "Microwave"),
}
"""Task type to the property its object must have, the state it must reach and the receptacle type that brings it."""

SENTENCES: Final[dict[str, tuple[str, str]]] = {
    "look_at_obj_in_light": ("look at {obj} under the {recep}.", "examine the {obj} with the {recep}."),
    "pick_and_place_simple": ("put some {obj} on {recep}.", "put a {obj} in {recep}."),
    "pick_clean_then_place_in_recep": (
        "clean some {obj} and put it in {recep}.",
        "put a clean {obj} in {recep}.",
    ),
    "pick_cool_then_place_in_recep": (
        "cool some {obj} and put it in {recep}.",
        "put a cool {obj} in {recep}.",
    ),
    "pick_heat_then_place_in_recep": (
        "heat some {obj} and put it in {recep}.",
        "put a hot {obj} in {recep}.",
    ),
    "pick_two_obj_and_place": ("put two {obj} in {recep}.", "find two {obj} and put them in {recep}."),
}

_LOOK: Final = """(exists (?ot - object ?r - receptacle ?a - agent ?l - location)
                    (and
                        (objectType ?ot {recep}Type)
                        (toggleable ?ot)
                        (isToggled ?ot)
                        (receptacleAtLocation ?r ?l)
                        (atLocation ?a ?l)
                        (inReceptacle ?ot ?r)
                    )
                )
                (exists (?o - object ?a - agent)
                    (and
                        (objectType ?o {obj}Type)
                        (holds ?a ?o)
                    )
                )"""
_PLACE: Final = """(exists (?r - receptacle)
                    (exists (?o - object)
                        (and
                            (inReceptacle ?o ?r)
                            (objectType ?o {obj}Type)
                            (receptacleType ?r {recep}Type)
                        )
                    )
                )"""
_READY: Final = """(exists (?r - receptacle)
                    (exists (?o - object)
                        (and
                            ({can} ?o)
                            (objectType ?o {obj}Type)
                            (receptacleType ?r {recep}Type)
                            ({done} ?o)
                            (inReceptacle ?o ?r)
                        )
                    )
                )"""
_TWO: Final = """(exists (?r - receptacle)
                    (exists (?o1 - object)
                        (and
                            (objectType ?o1 {obj}Type)
                            (receptacleType ?r {recep}Type)
                            (inReceptacle ?o1 ?r)
                            (exists (?o2 - object)
                                (and
                                    (not (= ?o1 ?o2))
                                    (objectType ?o2 {obj}Type)
                                    (receptacleType ?r {recep}Type)
                                    (inReceptacle ?o2 ?r)
                                )
                            )
                        )
                    )
                )"""


@dataclass(frozen=True, slots=True)
class Spec:
    """A task: its type, the object and receptacle types of its goal, and the room."""

    task_type: str
    object: str
    receptacle: str
    """Where the object must go; the lamp for ``look_at_obj_in_light``."""
    room: Room

    @property
    def title(self) -> str:
        """The first part of the task id, as in the published set."""
        return f"{self.task_type}-{self.object}-None-{self.receptacle}-{self.room.number}"


def sentences(spec: Spec) -> tuple[str, ...]:
    """Return the published wordings of the goal, e.g. ``"put a hot potato in fridge."``."""
    forms = SENTENCES[spec.task_type]
    return tuple(form.format(obj=spec.object.lower(), recep=spec.receptacle.lower()) for form in forms)


def problem_pddl(spec: Spec, objects: Iterable[Placed], start: str, name: str) -> str:
    """Return the problem.

    Only types that occur in the room are declared; others would change no text. Unlike in the published games, what
    ALFWorld's table has no place for (teddy bears, paper towel rolls) can be put back to where it lay, so that no game
    has a dead end.
    """
    objects = tuple(objects)
    origins = {(placed.receptacle.type, placed.type) for placed in objects}
    room = spec.room
    kinds = sorted({placed.type for placed in objects})
    rooms = room.receptacle_types
    locations = sorted({receptacle.location for receptacle in room.receptacles} | {start})
    declared = [
        "agent1 - agent",
        *(f"{kind}Type - otype" for kind in kinds),
        *(f"{kind}Type - rtype" for kind in rooms),
        *(f"{placed.name} - object" for placed in objects),
        *(f"{receptacle.name} - receptacle" for receptacle in room.receptacles),
        *(f"{location} - location" for location in locations),
    ]
    facts = [
        *(f"receptacleType {receptacle.name} {receptacle.type}Type" for receptacle in room.receptacles),
        *(f"objectType {placed.name} {placed.type}Type" for placed in objects),
        *(f"canContain {place}Type {kind}Type" for place in rooms for kind in kinds if _fits(place, kind, origins)),
        *(f"pickupable {placed.name}" for placed in objects if "toggleable" not in _properties(placed.type)),
        *(f"openable {receptacle.name}" for receptacle in room.receptacles if receptacle.openable),
        f"atLocation agent1 {start}",
        *(f"{name} {placed.name}" for placed in objects for name in _properties(placed.type)),
        *(f"isCool {placed.name}" for placed in objects if _starts_cool(spec, placed)),
        *(f"inReceptacle {placed.name} {placed.receptacle.name}" for placed in objects),
        *(f"receptacleAtLocation {receptacle.name} {receptacle.location}" for receptacle in room.receptacles),
        *(f"objectAtLocation {placed.name} {placed.receptacle.location}" for placed in objects),
    ]
    declarations = "\n        ".join(declared)
    init = "\n        ".join(f"({fact})" for fact in facts)
    return f"""
(define (problem {name})
    (:domain alfred)
    (:objects
        {declarations}
    )
    (:init
        {init}
    )
    (:goal
            (and
                {_goal(spec)}
            )
    )
)
"""


def _goal(spec: Spec) -> str:
    if spec.task_type in STATE:
        can, done, _ = STATE[spec.task_type]
        return _READY.format(obj=spec.object, recep=spec.receptacle, can=can, done=done)
    form = {"look_at_obj_in_light": _LOOK, "pick_two_obj_and_place": _TWO}.get(spec.task_type, _PLACE)
    return form.format(obj=spec.object, recep=spec.receptacle)


def _fits(place: str, kind: str, origins: Collection[tuple[str, str]]) -> bool:
    return kind in rules().holds.get(place, ()) or (place, kind) in origins


def _properties(kind: str) -> tuple[str, ...]:
    return tuple(name for name, kinds in rules().properties.items() if kind in kinds)


def _starts_cool(spec: Spec, placed: Placed) -> bool:
    """In the published games a target that lies in the fridge is cold, unless cooling it is the task."""
    return (
        placed.type == spec.object
        and placed.receptacle.type == "Fridge"
        and spec.task_type != "pick_cool_then_place_in_recep"
        and placed.type in rules().properties["coolable"]
    )
