"""ALFWorld's domain and grammar over plain Python state: the same game as ``engine``, without a planner.

- ``NativeGame``: one game ready to play; episodes are walks over its immutable ``State`` objects.
- ``State``: what actions can change.
- ``unsupported``: why a game cannot be played here, if it cannot.
- ``native``: the native form of a ``Game``, shared by every environment of the process.

All published games share one domain and one grammar. What happens here is what TextWorld makes of the two, down to the
order of every list: ``benchmarks/alfworld_native.py`` plays every game on both engines, the tests play a sample.
"""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from typing import Any, Final

from .domain import display_names
from .expert import Fact, Goal, Problem, goal_of, parse_problem
from .games import Game, RecentGames, goal_template

MAX_GAMES = 256

_DOMAIN: Final = "76c1115ec2b6818273db0cb4ebddd991"
_GRAMMAR: Final = "e94fd68eca8788c3d29e58380fd464f8"
"""Digests of the texts that this module implements; the grammar's is without its task sentence."""
_TRAITS: Final = frozenset(("opened", "checked", "isclean", "ishot", "iscool", "ison", "istoggled", "issliced"))
_FLUENTS: Final = _TRAITS | {"atlocation", "holds", "holdsany", "inreceptacle", "objectatlocation"}
_BEGUN: Final = frozenset(("holds", "holdsany", "isclean", "ishot", "issliced", "ison", "istoggled"))
"""No published game starts with these; the planner leaves out actions that cannot change them any more."""
_STATIONS: Final = (
    ("clean", "cleanable", frozenset(("sinktype", "sinkbasintype"))),
    ("heat", "heatable", frozenset(("microwavetype",))),
    ("cool", "coolable", frozenset(("fridgetype",))),
)
_KNIVES: Final = frozenset(("knifetype", "butterknifetype"))
_CLOSES: Final = re.compile(r"\s*([()])\s*")

Pairs = frozenset[tuple[str, str]]
Effect = Callable[["NativeGame", "State", str, str], tuple["State", str]]
Menu = dict[str, tuple[Effect, str, str]]
"""Command to the action that it stands for and the action's two arguments ("" where it has fewer)."""


class State:
    """A point of one game; never changed once made."""

    __slots__ = ("_commands", "_menu", "at", "gone", "held", "inside", "lying", "traits", "won")

    def __init__(
        self, at: str, held: str | None, inside: Mapping[str, tuple[str, ...]], lying: Pairs, gone: Pairs, traits: Pairs
    ) -> None:
        """Hold what is so.

        Args:
            at: the agent's location.
            held: the object in the agent's hand.
            inside: receptacle to the objects in it, sorted.
            lying: objects and the locations that they count as being at.
            gone: objects and the receptacles that they were taken from and not put back into; "look" reads it.
            traits: predicates of one argument that hold, such as ``("opened", "drawer_1")``.
        """
        self.at = at
        self.held = held
        self.inside = inside
        self.lying = lying
        self.gone = gone
        self.traits = traits
        self.won = False
        self._menu: Menu | None = None
        self._commands: tuple[str, ...] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle what is so, not what was worked out from it."""
        return _state, self._parts()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, State) and self._parts() == other._parts()

    __hash__ = None  # type: ignore[assignment]

    def _parts(self) -> tuple[Any, ...]:
        return self.at, self.held, self.inside, self.lying, self.gone, self.traits, self.won

    def but(
        self,
        *,
        at: str | None = None,
        held: str | None = "",
        inside: Mapping[str, tuple[str, ...]] | None = None,
        lying: Pairs | None = None,
        gone: Pairs | None = None,
        traits: Pairs | None = None,
    ) -> State:
        """Return this state with some things changed; ``held=""`` keeps what is held."""
        return State(
            self.at if at is None else at,
            self.held if held == "" else held,
            self.inside if inside is None else inside,
            self.lying if lying is None else lying,
            self.gone if gone is None else gone,
            self.traits if traits is None else traits,
        )


def _state(*parts: Any) -> State:
    *things, won = parts
    state = State(*things)
    state.won = won
    return state


class NativeGame:
    """One game: what never changes, and the rules."""

    def __init__(self, game: Game) -> None:
        """Read the problem of ``game``, which must be one that ``unsupported`` has nothing against."""
        problem = parse_problem(game.problem)
        self.game = game
        self._goal: Goal = problem.goal
        unary: defaultdict[str, set[str]] = defaultdict(set)
        pairs: defaultdict[str, list[tuple[str, str]]] = defaultdict(list)
        for predicate, *row in sorted(problem.facts):
            if len(row) == 1:
                unary[predicate].add(row[0])
            else:
                pairs[predicate].append((row[0], row[1]))
        self._static = frozenset(fact for fact in problem.facts if fact[0] not in _FLUENTS)
        self._agent, start = pairs["atlocation"][0]
        self._unary = unary
        self._type = dict(pairs["objecttype"])
        self._place_type = dict(pairs["receptacletype"])
        self._location = dict(pairs["receptacleatlocation"])
        self._can_contain = set(pairs["cancontain"])
        self._holders: defaultdict[str, list[str]] = defaultdict(list)
        """Location to the receptacles there, sorted."""
        for name, location in pairs["receptacleatlocation"]:
            self._holders[location].append(name)
        self._contents: defaultdict[str, list[str]] = defaultdict(list)
        """Object to the objects in it."""
        for inner, outer in pairs["inreceptacleobject"]:
            self._contents[outer].append(inner)
        self._lamps = [name for name, kind in self._type.items() if kind == self._goal.lamp]
        self._targets = [name for name, kind in self._place_type.items() if kind == self._goal.receptacle]
        self.names: Mapping[str, str] = display_names({name for _, *row in problem.facts for name in row})
        """Display name of every object that occurs in a fact, by its PDDL name."""
        self._journeys: Menu = {
            f"go to {self.names[name]}": (_go, name, location) for name, location in self._location.items()
        }
        self._stations = {
            name: [(verb, able) for verb, able, kinds in _STATIONS if kind in kinds]
            for name, kind in self._place_type.items()
        }
        inside: defaultdict[str, list[str]] = defaultdict(list)
        for name, place in pairs["inreceptacle"]:
            inside[place].append(name)
        self.root = State(
            at=start,
            held=None,
            inside={place: tuple(names) for place, names in inside.items()},
            lying=frozenset(pairs["objectatlocation"]),
            gone=frozenset(),
            traits=frozenset((trait, name) for trait in _TRAITS for name in unary[trait]),
        )
        self.root.won = self._wins(self.root)
        surroundings = self._surroundings(self.root, self._location)
        self.intro = f"-= Welcome to TextWorld, ALFRED! =-\n\n{surroundings}\n\nYour task is to: {game.task}"

    def admissible(self, state: State) -> tuple[str, ...]:
        """Return the commands that do something in ``state``, sorted."""
        if state._commands is None:
            state._commands = tuple(sorted(self._menu(state)))
        return state._commands

    def step(self, state: State, command: str) -> tuple[State, str] | None:
        """Return the state after ``command`` and the text that tells of it, or None where it is not admissible."""
        action = self._menu(state).get(command)
        if action is None:
            return None
        effect, first, second = action
        after, text = effect(self, state, first, second)
        after.won = self._wins(after)
        return after, text

    def facts(self, state: State) -> frozenset[Fact]:
        """Return the atoms that hold in ``state``, as predicate and arguments in PDDL names."""
        held = (("holds", self._agent, state.held), ("holdsany", self._agent)) if state.held else ()
        return self._static.union(
            (("atlocation", self._agent, state.at), *held),
            [("inreceptacle", name, place) for place, names in state.inside.items() for name in names],
            [("objectatlocation", name, location) for name, location in state.lying],
            state.traits,
        )

    def _menu(self, state: State) -> Menu:
        if state._menu is None:
            state._menu = self._list(state)
        return state._menu

    def _list(self, state: State) -> Menu:
        names, unary, held = self.names, self._unary, state.held
        menu = dict(self._journeys)
        menu["look"] = _look, state.at, ""
        menu["inventory"] = _inventory, self._agent, ""
        menu["help"] = _help, self._agent, ""
        if held is not None:  # a stray comma in the domain ("?l - location, ?r") makes other objects unexaminable
            menu[f"examine {names[held]}"] = _examine_object, held, ""
        for place in self._holders.get(state.at, ()):
            where = names[place]
            del menu[f"go to {where}"]
            menu[f"examine {where}"] = _examine_place, place, ""
            accessible = True
            if place in unary["openable"]:
                accessible = ("opened", place) in state.traits
                menu[f"{'close' if accessible else 'open'} {where}"] = _close if accessible else _open, place, ""
            for name in state.inside.get(place, ()):
                if accessible and held is None and name in unary["pickupable"]:
                    menu[f"take {names[name]} from {where}"] = _take, name, place
                if name in unary["toggleable"]:
                    menu[f"use {names[name]}"] = _use, name, ""
            if held is not None:
                if accessible and (self._place_type.get(place), self._type.get(held)) in self._can_contain:
                    menu[f"move {names[held]} to {where}"] = _put, held, place
                for verb, able in self._stations.get(place, ()):
                    if held in unary[able]:
                        menu[f"{verb} {names[held]} with {where}"] = _READY[verb], held, place
        if held is not None and self._type.get(held) in _KNIVES:
            for name, location in state.lying:
                if location == state.at and name in unary["sliceable"]:
                    menu[f"slice {names[name]} with {names[held]}"] = _slice, name, held
        return menu

    def _wins(self, state: State) -> bool:
        goal, inside, kinds = self._goal, state.inside, self._type
        if goal.receptacle is None:
            if state.held is None or kinds.get(state.held) != goal.object:
                return False
            near = {name for place in self._holders.get(state.at, ()) for name in inside.get(place, ())}
            return any(
                lamp in near and lamp in self._unary["toggleable"] and ("istoggled", lamp) in state.traits
                for lamp in self._lamps
            )
        for place in self._targets:
            placed = [name for name in inside.get(place, ()) if kinds.get(name) == goal.object]
            if goal.state is not None:
                able = self._unary[_ABLE[goal.state]]
                placed = [name for name in placed if name in able and (goal.state, name) in state.traits]
            if len(placed) >= goal.count:
                return True
        return False

    def _surroundings(self, state: State, furniture: Iterable[str] = ()) -> str:
        """Tell what is near; away from all receptacles list ``furniture``, which the grammar does at the start only."""
        places = self._holders.get(state.at)
        if not places:
            seen = _series(f"a {self.names[place]}" for place in furniture)
            return f"You are in the middle of a room. Looking quickly around you, you see {seen}."
        floor = _series(
            f"a {self.names[name]}"
            for name in sorted(name for name, location in state.lying if location == state.at)
            for place in places
            if (name, place) in state.gone
        )
        return f"You are facing the {_series(self.names[place] for place in places)}. Next to it, you see {floor}."

    def _in_or_on(self, state: State, place: str) -> str:
        seen, where = state.inside.get(place, ()), self.names[place]
        things = _series(f"a {self.names[name]}" for name in seen)
        if place not in self._unary["openable"]:
            return f"On the {where}, you see {things}."
        if ("opened", place) not in state.traits:
            return f"The {where} is closed."
        return f"The {where} is open. In it, you see {things}."

    def _description(self, state: State, name: str) -> str:
        shown, traits = self.names[name], state.traits
        if name in self._unary["isreceptacleobject"]:
            things = _series(f"a {self.names[inner]}" for inner in self._contents.get(name, ()))
            return f"This is a normal {shown}. In it, you see {things}."
        clean, sliced = ("isclean", name) in traits, ("issliced", name) in traits
        warmth = "hot" if ("ishot", name) in traits else "cool" if ("iscool", name) in traits else ""
        if warmth or clean:
            if warmth == "cool" and not clean and not sliced:
                warmth = "cold"
            both = f"{warmth} and clean" if warmth and clean else warmth or "clean"
            return f"This is a {both}{' sliced' if sliced else ''} {shown}."
        if name in self._unary["toggleable"] and ("istoggled", name) in traits:
            return f"This {shown} is on."
        if sliced and name in self._unary["sliceable"]:
            return f"This is a sliced {shown}."
        return f"There's nothing special about {shown}."


def _go(game: NativeGame, state: State, place: str, location: str) -> tuple[State, str]:
    after = state.but(at=location)
    return after, f"You arrive at {game.names[place]}. {game._in_or_on(after, place)}"


def _open(game: NativeGame, state: State, place: str, _: str) -> tuple[State, str]:
    after = state.but(traits=state.traits | {("opened", place), ("checked", place)})
    return after, f"You open the {game.names[place]}. {game._in_or_on(after, place)}"


def _close(game: NativeGame, state: State, place: str, _: str) -> tuple[State, str]:
    return state.but(traits=state.traits - {("opened", place)}), f"You close the {game.names[place]}."


def _take(game: NativeGame, state: State, name: str, place: str) -> tuple[State, str]:
    inside = {**state.inside, place: tuple(other for other in state.inside[place] if other != name)}
    after = state.but(
        held=name, inside=inside, lying=state.lying - {(name, state.at)}, gone=state.gone | {(name, place)}
    )
    return after, f"You pick up the {game.names[name]} from the {game.names[place]}."


def _put(game: NativeGame, state: State, name: str, place: str) -> tuple[State, str]:
    inside = {**state.inside, place: tuple(sorted({*state.inside.get(place, ()), name}))}
    after = state.but(
        held=None, inside=inside, lying=state.lying | {(name, state.at)}, gone=state.gone - {(name, place)}
    )
    return after, f"You move the {game.names[name]} to the {game.names[place]}."


def _clean(game: NativeGame, state: State, name: str, place: str) -> tuple[State, str]:
    after = state.but(traits=state.traits | {("isclean", name)})
    return after, f"You clean the {game.names[name]} using the {game.names[place]}."


def _heat(game: NativeGame, state: State, name: str, place: str) -> tuple[State, str]:
    after = state.but(traits=(state.traits - {("iscool", name)}) | {("ishot", name)})
    return after, f"You heat the {game.names[name]} using the {game.names[place]}."


def _cool(game: NativeGame, state: State, name: str, place: str) -> tuple[State, str]:
    after = state.but(traits=(state.traits - {("ishot", name)}) | {("iscool", name)})
    return after, f"You cool the {game.names[name]} using the {game.names[place]}."


def _use(game: NativeGame, state: State, name: str, _: str) -> tuple[State, str]:
    """Switch ``name`` on. The text is the same the second time: it reads ``istoggled``, which nothing takes back.

    TextWorld applies both conditional effects of the domain in turn, so that ``ison`` never holds.
    """
    after = state.but(traits=state.traits | {("istoggled", name)})
    return after, f"You turn on the {game.names[name]}."


def _slice(game: NativeGame, state: State, name: str, knife: str) -> tuple[State, str]:
    after = state.but(traits=state.traits | {("issliced", name)})
    return after, f"You sliced the {game.names[name]} with the {game.names[knife]}."


def _examine_place(game: NativeGame, state: State, place: str, _: str) -> tuple[State, str]:
    return _checked(state, place), game._in_or_on(state, place)


def _examine_object(game: NativeGame, state: State, name: str, _: str) -> tuple[State, str]:
    return _checked(state, name), game._description(state, name)


def _look(game: NativeGame, state: State, location: str, _: str) -> tuple[State, str]:
    return _checked(state, location), game._surroundings(state)


def _inventory(game: NativeGame, state: State, agent: str, _: str) -> tuple[State, str]:
    carried = "not carrying anything" if state.held is None else f"carrying: a {game.names[state.held]}"
    return _checked(state, agent), f"You are {carried}."


def _help(_: NativeGame, state: State, agent: str, __: str) -> tuple[State, str]:
    return _checked(state, agent), HELP


def _checked(state: State, what: str) -> State:
    return state.but(traits=state.traits | {("checked", what)})


_READY: Final[dict[str, Effect]] = {"clean": _clean, "heat": _heat, "cool": _cool}
_ABLE: Final = {"isclean": "cleanable", "ishot": "heatable", "iscool": "coolable"}
HELP: Final = """\
Available commands:
  look:                             look around your current location
  inventory:                        check your current inventory
  go to (receptacle):               move to a receptacle
  open (receptacle):                open a receptacle
  close (receptacle):               close a receptacle
  take (object) from (receptacle):  take an object from a receptacle
  move (object) to (receptacle):  place an object in or on a receptacle
  examine (something):              examine a receptacle or an object
  use (object):                     use an object
  heat (object) with (receptacle):  heat an object using a receptacle
  clean (object) with (receptacle): clean an object using a receptacle
  cool (object) with (receptacle):  cool an object using a receptacle
  slice (object) with (object):     slice an object using a sharp object
"""


def native(game: Game) -> NativeGame:
    """Return the native form of ``game``; the ``MAX_GAMES`` used last are kept."""
    return _GAMES.get(game)


_GAMES: Final = RecentGames(NativeGame, MAX_GAMES)


def unsupported(game: Game) -> str | None:
    """Return why ``game`` needs TextWorld's engine, as the end of "its ...", or None where it does not."""
    if _digest(game.domain) != _DOMAIN:
        return "domain is not the published one"
    if _digest(goal_template(game.grammar, game.task)) != _GRAMMAR:
        return "grammar is not the published one"
    start = game.problem.index("(:goal")
    goal = _tight(game.problem[start:])
    if goal != _goal_text(goal_of(game)):
        return "goal is of no published form"
    problem = parse_problem(game.problem)
    return _irregular(problem)


def _irregular(problem: Problem) -> str | None:
    """Return what of the initial facts the rules here would get wrong."""
    places = [fact[1] for fact in problem.facts if fact[0] == "receptacleatlocation"]
    kinds = [fact[1] for fact in problem.facts if fact[0] in ("objecttype", "receptacletype")]
    if len(set(places)) < len(places) or len(set(kinds)) < len(kinds):
        return "objects have more than one place or type"
    if sum(fact[0] == "atlocation" for fact in problem.facts) != 1:
        return "agent is not in one place"
    if any(fact[0] in _BEGUN for fact in problem.facts):
        return "initial facts are of a game already begun"
    return None


@lru_cache(maxsize=8)
def _digest(text: str) -> str:
    return hashlib.blake2b(" ".join(text.split()).encode(), digest_size=16).hexdigest()


def _goal_text(goal: Goal) -> str:
    """Return the PDDL of ``goal`` as the published games write it, tightened."""
    placed = f"(objecttype ?o1 {goal.object})(receptacletype ?r {goal.receptacle})(inreceptacle ?o1 ?r)"
    if goal.lamp is not None:
        wanted = (
            f"(exists(?ot - object ?r - receptacle ?a - agent ?l - location)(and(objecttype ?ot {goal.lamp})"
            "(toggleable ?ot)(istoggled ?ot)(receptacleatlocation ?r ?l)(atlocation ?a ?l)(inreceptacle ?ot ?r)))"
            f"(exists(?o - object ?a - agent)(and(objecttype ?o {goal.object})(holds ?a ?o)))"
        )
    elif goal.count == 2:
        again = f"(exists(?o2 - object)(and(not(= ?o1 ?o2)){placed.replace('?o1', '?o2')}))"
        wanted = f"(exists(?r - receptacle)(exists(?o1 - object)(and{placed}{again})))"
    else:
        kinds = f"(objecttype ?o {goal.object})(receptacletype ?r {goal.receptacle})"
        inside = f"(inreceptacle ?o ?r){kinds}"
        if goal.state is not None:
            inside = f"({_ABLE[goal.state]} ?o){kinds}({goal.state} ?o)(inreceptacle ?o ?r)"
        wanted = f"(exists(?r - receptacle)(exists(?o - object)(and{inside})))"
    return f"(:goal(and{wanted})))"


def _tight(text: str) -> str:
    return _CLOSES.sub(r"\1", " ".join(text.lower().split()))


def _series(things: Iterable[str]) -> str:
    *first, last = list(things) or ["nothing"]
    return f"{', '.join(first)}, and {last}" if first else last
