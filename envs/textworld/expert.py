"""What to do next in a game of TextWorld, from wherever the agent has strayed.

- ``Expert``: plans over the true facts of a game, and remembers the plans that it has made.

For one quest after another, greedy best-first search (Bonet and Geffner 2001) guided by the relaxed plan of FF
(Hoffmann and Nebel 2001): the plan that would do if nothing were ever taken away. Its first actions are tried before
all others.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator

from .native import NativeGame, State
from .story import Move

MOST_STATES = 600
"""That the search for one quest looks at."""
_REMEMBERED = 1 << 13
_Key = tuple[int, int, int]


class Expert:
    """Plans for the states of one game."""

    def __init__(self, game: NativeGame) -> None:
        """Take the actions that change something."""
        self._game = game
        self._moves = [move for move in game.story.moves if move.adds | move.removes]
        self._plans: dict[_Key, str | None] = {}

    def action(self, state: State) -> str | None:
        """Return the next command of a plan that wins from ``state``, None where none was found."""
        key = _key(state)
        if key not in self._plans:
            if len(self._plans) > _REMEMBERED:
                self._plans.clear()
            self._plans[key] = None
            plan = self.plan(state)
            for point, command in plan or ():
                self._plans[_key(point)] = command
        return self._plans[key]

    def plan(self, state: State) -> list[tuple[State, str]] | None:
        """Return each state on the way to a win with the command that leaves it, None where no way was found."""
        steps: list[tuple[State, str]] = []
        quests = self._game.story.quests
        while not state.won:
            open_quests = [
                number
                for number, quest in enumerate(quests)
                if quest.winnable and not quest.optional and not state.done >> number & 1
            ]
            found = self._search(state, open_quests[0]) if open_quests else None
            if not found:
                return None
            steps += found
            last, command = found[-1]
            state = self._game.apply(last, self._game.admissible(last)[command])
        return steps

    def _search(self, start: State, quest: int) -> list[tuple[State, str]] | None:
        goals = self._game.story.quests[quest].win
        first = self._relaxed(start, goals)
        if first is None:
            return None
        came: dict[_Key, tuple[State, str] | None] = {_key(start): None}
        queue: list[tuple[int, int, int, State, set[str]]] = [(0, first[0], 0, start, first[1])]
        count = 0
        while queue and count < MOST_STATES:
            _, _, _, state, helpful = heapq.heappop(queue)
            for command, after in self._successors(state, helpful):
                key = _key(after)
                if key in came or after.lost:
                    continue
                came[key] = state, command
                if after.won or after.done >> quest & 1:
                    return _way(came, after)
                estimate = self._relaxed(after, goals)
                count += 1
                if estimate is not None:
                    # What the relaxed plan starts with goes before everything else.
                    heapq.heappush(queue, (0 if command in helpful else 1, estimate[0], count, after, estimate[1]))
        return None

    def _successors(self, state: State, helpful: set[str]) -> Iterator[tuple[str, State]]:
        moves = self._game.admissible(state)
        for command in sorted(moves, key=lambda name: (name not in helpful, name)):
            move = moves[command]
            if move.adds | move.removes:
                yield command, self._game.apply(state, move)

    def _relaxed(self, state: State, goals: tuple[int, ...]) -> tuple[int, set[str]] | None:
        """Return the length of a relaxed plan to the nearest goal and the commands it starts with."""
        facts, layers = state.facts, 0
        waiting, causes = self._moves, {}
        layer_of: dict[int, int] = {}
        while True:
            reached = next((goal for goal in goals if facts & goal == goal), None)
            if reached is not None:
                break
            layers += 1
            new, later = 0, []
            for move in waiting:
                needs = move.needs | move.recipe
                if facts & needs != needs:
                    later.append(move)
                    continue
                fresh = move.adds & ~facts & ~new
                new |= fresh
                while fresh:
                    bit = fresh & -fresh
                    causes[bit], layer_of[bit] = move, layers
                    fresh ^= bit
            if not new:
                return None
            facts |= new
            waiting = later
        length, helpful = _extract(reached & ~state.facts, causes, layer_of)
        if self._game.full(state):
            helpful |= {name for name, move in self._game.admissible(state).items() if move.verb == "drop"}
        return length, helpful


def _extract(goal: int, causes: dict[int, Move], layer_of: dict[int, int]) -> tuple[int, set[str]]:
    plan: dict[int, Move] = {}
    helpful: set[str] = set()
    waiting = [goal]
    seen = 0
    while waiting:
        wanted = waiting.pop() & ~seen
        seen |= wanted
        while wanted:
            bit = wanted & -wanted
            wanted ^= bit
            move = causes.get(bit)
            if move is None or id(move) in plan:
                continue
            plan[id(move)] = move
            if layer_of[bit] == 1:
                helpful.add(move.command)
            waiting.append(move.needs | move.recipe)
    return len(plan), helpful


def _way(came: dict[_Key, tuple[State, str] | None], state: State) -> list[tuple[State, str]]:
    steps = []
    step = came[_key(state)]
    while step is not None:
        steps.append(step)
        step = came[_key(step[0])]
    return steps[::-1]


def _key(state: State) -> _Key:
    return state.facts, state.free, state.done
