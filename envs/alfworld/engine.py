"""ALFWorld games run by TextWorld's planner and grammar, with everything that repeats computed once.

- ``GroundedGame``: one game ready to play; episodes are walks over its ``Node`` objects and share all that is known.
- ``Node``: a state: what holds, what can be done, and the transitions taken so far.
- ``ground``: the grounded game of a ``Game``, shared by every environment of the process.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Mapping

import numpy as np

from .domain import display_names
from .facts import Binding, Fact, Facts
from .games import GOAL_PLACEHOLDER, Game, RecentGames, goal_template
from .grammar import Entity, Scene, Symbols, compile_grammar
from .planner import Planner, PlannerPool
from .translation import translate

MAX_PLANNERS = 32
MAX_GAMES = 64
_LOCK = threading.RLock()
"""Held while a planner is used: another game may take it between two calls."""
_PLANNERS = PlannerPool(MAX_PLANNERS)

Effects = tuple[tuple[Fact, bool], ...]


class Menu:
    """What can be done in a state."""

    __slots__ = ("commands", "operators")

    def __init__(self, operators: dict[str, int]) -> None:
        """Take the operator that each command stands for."""
        self.operators = operators
        self.commands = tuple(sorted(operators))


class Node:
    """A state of one game. Two episodes that reach the same state share the node."""

    __slots__ = ("_edges", "_generation", "_menu", "_state", "changes", "facts", "origin", "won")

    def __init__(self, facts: Facts, changes: frozenset[tuple[Fact, bool]], origin: tuple[Node, int] | None) -> None:
        """Hold the facts, how they differ from the initial ones, and the parent and operator that led here first."""
        self.facts = facts
        self.changes = changes
        self.origin = origin
        self.won = False
        self._state = -1
        self._generation = -1
        self._menu: Menu | None = None
        self._edges: dict[int, tuple[Node, str]] = {}


class GroundedGame:
    """One game, its planner while it has one, and the graph of states that was visited."""

    def __init__(self, game: Game) -> None:
        """Translate (or read the cached translation of) ``game`` and load it."""
        self.game = game
        self._translation = translate(game)
        self._grammar = compile_grammar(goal_template(game.grammar, game.task), self._translation.types)
        initial = self._translation.facts
        self.names: Mapping[str, str] = display_names({name for _, row in initial for name in row})
        """Display name of every object that occurs in a fact, by its PDDL name."""
        self._entities = {
            name: Entity(name, self._translation.objects[name], shown) for name, shown in self.names.items()
        }
        self._initial = frozenset(initial)
        self._static = frozenset((name, *row) for (name, _), row in initial if name not in self._translation.fluents)
        self._varying = frozenset(
            name
            for name, template in self._grammar.templates.items()
            if self._grammar.reads(template) & self._translation.fluents
        )
        self._commands: dict[str, str] = {}
        self._menus: dict[bytes, Menu] = {}
        self._effects: dict[int, Effects] = {}
        self._nodes: dict[tuple[int, frozenset[tuple[Fact, bool]]], Node] = {}
        self._generation = 0
        self._owner = object()
        weakref.finalize(self, _PLANNERS.release, self._owner).atexit = False
        self.root = Node(Facts.of(initial), frozenset(), None)
        with _LOCK:
            self.root.won = self._planner().goal(self.root._state)
        self.intro = self._text(self._grammar.intro, self.root, {})

    def admissible(self, node: Node) -> tuple[str, ...]:
        """Return the commands that do something in ``node``, sorted."""
        return self._menu(node).commands

    def step(self, node: Node, command: str) -> tuple[Node, str] | None:
        """Return the state after ``command`` and the text that tells of it, or None where it is not admissible."""
        operator = self._menu(node).operators.get(command)
        if operator is None:
            return None
        edge = node._edges.get(operator)
        if edge is None:
            edge = node._edges[operator] = self._apply(node, operator)
        return edge

    def facts(self, node: Node) -> frozenset[tuple[str, ...]]:
        """Return the atoms that hold in ``node``, as predicate and arguments in PDDL names."""
        fluents = self._translation.fluents
        return self._static | {
            (name, *row) for (name, _), table in node.facts.tables.items() if name in fluents for row in table.rows
        }

    def _menu(self, node: Node) -> Menu:
        if node._menu is None:
            with _LOCK:
                planner = self._planner()
                key = planner.operators(self._state(node, planner))
            menu = self._menus.get(key)
            if menu is None:
                menu = Menu(self._list(key, node))
                if not self._varying:
                    self._menus[key] = menu
            node._menu = menu
        return node._menu

    def _list(self, key: bytes, node: Node) -> dict[str, int]:
        """Return the first operator of each command, in the library's order, as TextWorld does."""
        operators: dict[str, int] = {}
        for operator in np.frombuffer(key, np.int32).tolist():
            ground = self._translation.operators[operator]
            command = self._commands.get(ground)
            if command is None:
                action, binding = self._binding(ground)
                command = self._text(self._grammar.templates[action], node, binding)
                if action not in self._varying:
                    self._commands[ground] = command
            operators.setdefault(command, operator)
        return operators

    def _apply(self, node: Node, operator: int) -> tuple[Node, str]:
        with _LOCK:
            planner = self._planner()
            state = self._state(node, planner)
            after = planner.apply(state, operator)
            effects = self._effects.get(operator)
            if effects is None:
                effects = self._effects[operator] = tuple(self._effect(text) for text in planner.effects())
            changes = self._changes(node, effects)
            child = self._nodes.get((after, changes))
            if child is None:
                child = self._nodes[after, changes] = Node(node.facts.changed(effects), changes, (node, operator))
                child._state, child._generation = after, self._generation
                child.won = planner.goal(after)
        action, binding = self._binding(self._translation.operators[operator])
        return child, self._text(self._grammar.feedback[action], child, binding)

    def _changes(self, node: Node, effects: Effects) -> frozenset[tuple[Fact, bool]]:
        """Return how the facts differ from the initial ones; with the planner's state this identifies a node."""
        changes = set(node.changes)
        for fact, holds in effects:
            changes.discard((fact, not holds))
            if not holds or fact not in self._initial:
                changes.add((fact, holds))
        return frozenset(changes)

    def _planner(self) -> Planner:
        """Return this game's planner, loading the task into one if another game took it."""
        planner, fresh = _PLANNERS.acquire(self._owner)
        if fresh:
            self._generation += 1
            self.root._state, self.root._generation = (
                planner.load(self._translation.sas, self._translation.most_effects),
                self._generation,
            )
            self._nodes = {(self.root._state, self.root.changes): self.root}
        return planner

    def _state(self, node: Node, planner: Planner) -> int:
        """Return the planner's id of ``node``, found again by its path if the task was loaded anew."""
        path = []
        while node._generation != self._generation:
            assert node.origin is not None
            path.append(node)
            node = node.origin[0]
        for later in reversed(path):
            assert later.origin is not None
            later._state = planner.apply(node._state, later.origin[1])
            later._generation = self._generation
            self._nodes.setdefault((later._state, later.changes), later)
            node = later
        return node._state

    def _effect(self, text: str) -> tuple[Fact, bool]:
        """Parse an effect such as ``"NegatedAtom holds(agent1, mug_1)"``."""
        kind, atom = text.split(" ", 1)
        name, arguments = atom[:-1].split("(", 1)
        row = tuple(argument for argument in arguments.split(", ") if argument)
        return ((name, tuple(self._translation.objects[argument] for argument in row)), row), kind == "Atom"

    def _binding(self, ground: str) -> tuple[str, Binding]:
        action, *arguments = ground.split()
        return action, dict(zip(self._translation.parameters[action], arguments, strict=False))

    def _text(self, symbols: Symbols, node: Node, binding: Binding) -> str:
        text = self._grammar.derive(symbols, Scene(node.facts, self._entities), binding)
        return text.replace(GOAL_PLACEHOLDER, self.game.task)


def ground(game: Game) -> GroundedGame:
    """Return the grounded form of ``game``; the ``MAX_GAMES`` used last are kept."""
    return _GAMES.get(game)


_GAMES = RecentGames(GroundedGame, MAX_GAMES)
