"""TextWorld's games in Python: the facts of a game's rules, and the words that its compiled form would print.

- ``NativeGame``: a story, ready to play; it offers what ``Playable`` asks for.
- ``State``: a point of an episode; never changed, and a few hundred bytes when pickled.

The order of names in lists is that of Inform's object tree, where what was moved last comes first. Quests are checked
as the compiled game does after each turn, so a failed quest ends the game only where the game says so.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from .commands import understand
from .story import COOKED, CUT, Move, Node, Story, Thing
from .text import listing

WIN = "*** The End ***"
LOSE = "*** You lost! ***"
_UNITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
_SITUATIONS = 128
"""Whose commands a game remembers."""
_MOVING = frozenset(("take", "drop", "put", "insert", "eat", "drink"))


@dataclass(frozen=True, slots=True)
class State:
    """A point of an episode."""

    facts: int
    """A bit for each fact that can change."""
    order: tuple[int, ...]
    """Movable things, the one moved last first; lists follow it."""
    free: int
    """Free places in the player's hands, as the rules count them."""
    score: int
    done: int
    """A bit for each completed quest."""
    turns: int
    won: bool = False
    lost: bool = False


class NativeGame:
    """A story, ready to play."""

    def __init__(self, story: Story) -> None:
        """Index the story's actions by where the player is."""
        self.story = story
        self.root = State(story.start, story.order, story.free, 0, 0, 1)
        self._here = [(story.bit.get(("at", "P", thing.id), 0), place) for place, thing in enumerate(story.things)]
        self._here = [(mask, place) for mask, place in self._here if mask]
        self._fixed_room = next((i for i, t in enumerate(story.things) if ("at", "P", t.id) in story.always), -1)
        rooms = 0
        for mask, _ in self._here:
            rooms |= mask
        self._rooms = rooms
        self._moves: dict[int, list[Move]] = {mask: [] for mask in (0, *(mask for mask, _ in self._here))}
        for move in story.moves:
            self._moves[move.needs & rooms].append(move)
        for moves in self._moves.values():  # the most demanding rule first, as TextWorld's own tracking has it
            moves.sort(key=lambda move: -move.needs.bit_count())
        self._carried = 0
        self._places: dict[int, list[tuple[int, int]]] = {}
        """For each holder: the mask that a thing is there, and the thing."""
        for fact, mask in story.bit.items():
            self._place(fact, mask)
        for fact in sorted(story.always):
            self._place(fact, -1)
        self._open = [story.mask("open", thing.id) for thing in story.things]
        self._locked = [story.mask("locked", thing.id) for thing in story.things]
        self.admissible = lru_cache(_SITUATIONS)(self._admissible)

    @property
    def intro(self) -> str:
        """The objective and the first room."""
        return "\n\n".join(part for part in (self.story.objective, self._look(self.root)) if part)

    def moves(self, state: State) -> list[Move]:
        """Return the actions whose preconditions hold."""
        if state.won or state.lost:
            return []
        facts, free, used = state.facts, state.free, self.story.capacity - state.free
        return [
            move
            for moves in (self._moves[facts & self._rooms], self._moves[0] if self._rooms else ())
            for move in moves
            if facts & move.needs == move.needs and move.free <= free and move.used <= used
        ]

    def _admissible(self, state: State) -> dict[str, Move]:
        """Return the commands that do something, sorted, each with its action."""
        found: dict[str, Move] = {}
        for move in self.moves(state):
            found.setdefault(move.command, move)
        return dict(sorted(found.items()))

    def apply(self, state: State, move: Move) -> State:
        """Return the state after an action whose preconditions hold."""
        facts, order, free = state.facts, state.order, state.free
        if facts & move.recipe == move.recipe and not facts & move.lacks and not self._overloads(state, move):
            free += move.frees
            facts = facts & ~move.removes | move.adds
            if move.verb in _MOVING:
                thing = move.things[0]
                order = (thing, *(other for other in order if other != thing))
        score, done, lost = state.score, state.done, state.lost
        for number, quest in enumerate(self.story.quests):
            if done >> number & 1:
                continue
            if any(facts & mask == mask for mask in quest.fail):
                lost = True
            elif any(facts & mask == mask for mask in quest.win):
                score += quest.reward
                done |= 0 if quest.repeatable else 1 << number
        required = [number for number, quest in enumerate(self.story.quests) if quest.winnable and not quest.optional]
        won = bool(required) and all(done >> number & 1 for number in required)
        return State(facts, order, free, score, done, state.turns + 1, won, lost and not won)

    def understand(self, state: State, text: str) -> str | None:
        """Return the listed command that ``text`` stands for, None where there is none."""
        return understand(text, self.admissible(state))

    def step(self, state: State, command: str) -> tuple[State, str] | None:
        """Return the state after ``command`` and the text that tells of it, or None where it does nothing."""
        move = self.admissible(state).get(command)
        if move is None:
            return None
        after = self.apply(state, move)
        parts = [self._tell(state, after, move)]
        if after.score != state.score:
            parts.append(_score_text(after.score - state.score))
        if after.won or after.lost:
            parts.append(WIN if after.won else LOSE)
            count = after.turns - after.lost  # the clock stops before a loss and after a win
            turns = f"{count} turn{'s' if count != 1 else ''}"
            if self.story.max_score:
                parts.append(f"You scored {after.score} out of a possible {self.story.max_score}, in {turns}.")
            else:
                points = f"{after.score} point{'s' if after.score != 1 else ''}"
                parts.append(f"You scored a total of {points}, in {turns}.")
        return after, "\n\n".join(parts)

    def full(self, state: State) -> bool:
        """Whether the player can take nothing more, in a game that limits what can be carried."""
        capacity = self.story.capacity
        return capacity > 0 and (not state.free or (state.facts & self._carried).bit_count() >= capacity)

    def _overloads(self, state: State, move: Move) -> bool:
        """Whether the player carries too much to take more, whatever the rules count."""
        return move.free > 0 and (state.facts & self._carried).bit_count() >= self.story.capacity

    def _place(self, fact: tuple[str, ...], mask: int) -> None:
        story = self.story
        if fact[0] not in ("in", "on", "at") or fact[1] not in story.index:
            return
        thing = story.index[fact[1]]
        if fact[2] == "I":
            self._carried |= mask
            self._places.setdefault(-1, []).append((mask, thing))
        elif fact[2] in story.index:
            self._places.setdefault(story.index[fact[2]], []).append((mask, thing))

    def _held(self, state: State, holder: int) -> list[int]:
        """Return what a holder (-1: the player) has, in the order in which lists name it."""
        there = {thing for mask, thing in self._places.get(holder, ()) if state.facts & mask}
        return [thing for thing in state.order if thing in there]

    def _room(self, state: State) -> int:
        for mask, place in self._here:
            if state.facts & mask:
                return place
        return self._fixed_room

    def _look(self, state: State) -> str:
        story, room = self.story, self._room(state)
        thing = story.things[room]
        text = f"-= {thing.name.title()} =-\n{self._print(state, room, thing.description).strip()}"
        floor = [item for item in self._held(state, room) if story.things[item].kind == "object"]
        if floor:
            text += f"\n\nThere is {listing([self._a(state, item) for item in floor])} on the floor."
        return text

    def _tell(self, state: State, after: State, move: Move) -> str:
        """Return what the game says to an action."""
        verb, things = move.verb, [self.story.things[place] for place in move.things]
        if verb in ("look", "go"):
            return self._look(after)
        if verb == "inventory":
            held = [self._a(state, item) for item in self._held(state, -1)]
            return f"You are carrying: {listing(held)}." if held else "You are carrying nothing."
        if verb == "examine":
            return self._examine(state, move.things[0])
        if verb == "make":
            return self._refusal(state) or "Adding the meal to your inventory."
        first = self._the(things[0])
        second = self._the(things[1]) if len(things) > 1 else ""
        if verb == "open":
            inside = [self._a(state, item) for item in self._held(state, move.things[0])]
            return f"You open {first}, revealing {listing(inside)}." if inside else f"You open {first}."
        if verb == "cook":
            return self._cooking(after, move)
        if verb == "take":
            if self._overloads(state, move):
                return "You're carrying too many things already."
            return f"You take {first} from {second}." if second else f"You pick up {first} from the ground."
        if verb == "drop":
            return f"You drop {first} on the ground."
        if verb == "put":
            return f"You put {first} on {second}."
        if verb == "insert":
            return f"You put {first} into {second}."
        if verb in ("eat", "drink"):
            return f"You {verb} {first}. Not bad."
        return f"You {verb} {first}."  # close, lock, unlock, chop, slice, dice

    def _examine(self, state: State, place: int) -> str:
        thing = self.story.things[place]
        text = self._print(state, place, thing.description).strip()
        held = [self._a(state, item) for item in self._held(state, place)]
        if held and (thing.kind == "supporter" or (thing.kind == "container" and state.facts & self._open[place])):
            where = "On" if thing.kind == "supporter" else "In"
            verb = "is" if len(held) == 1 else "are"
            contents = f"{where} {self._the(thing)} {verb} {listing(held)}."
            return f"{text}\n\n{contents}" if text else contents
        return text or f"You see nothing special about {self._the(thing)}."

    def _refusal(self, state: State) -> str:
        """Return why the recipe cannot be prepared yet, "" when it can."""
        for place, cooked, cut in self.story.ingredients:
            food = self.story.things[place].id
            if not state.facts & self.story.mask("in", food, "I"):
                return "You still miss something."
            if self._kind(state, food, COOKED) != cooked:
                return "Something still needs to be cooked."
            if self._kind(state, food, CUT) != cut:
                return "Something still needs to be cut."
        return ""

    def _kind(self, state: State, food: str, kinds: Iterable[str]) -> str:
        return next((kind for kind in kinds if state.facts & self.story.mask(kind, food)), "")

    def _cooking(self, after: State, move: Move) -> str:
        food = self.story.things[move.things[0]]
        if after.facts & self.story.mask("burned", food.id):
            return f"You burned {self._the(food)}!"
        return f"You {self._kind(after, food.id, COOKED)} {self._the(food)}."

    def _name(self, state: State, thing: Thing) -> str:
        """Return the name as lists and descriptions have it: a food's with how it is cut and cooked."""
        facts, mask = state.facts, self.story.mask
        cut = self._kind(state, thing.id, CUT)
        if facts & mask("needs_cooking", thing.id):
            cooked = "raw"
        elif facts & mask("burned", thing.id):
            cooked = "burned"
        else:
            cooked = self._kind(state, thing.id, COOKED)
        return " ".join(word for word in (cut, cooked, thing.name) if word)

    def _a(self, state: State, place: int) -> str:
        thing = self.story.things[place]
        name = self._name(state, thing)
        return f"{thing.indefinite or ('an' if name[:1].lower() in 'aeiou' else 'a')} {name}"

    def _the(self, thing: Thing) -> str:
        return f"{thing.definite} {thing.name}" if thing.definite else thing.name

    def _print(self, state: State, place: int, nodes: Sequence[Node]) -> str:
        """Return a template's text as it reads now."""
        parts: list[str] = []
        for node in nodes:
            kind = node[0]
            if kind == "text":
                parts.append(str(node[1]))
            elif kind == "name":
                parts.append(self._name(state, self.story.things[place]))
            elif kind == "list":
                parts.append(self._list(state, node))
            else:
                for tests, inner in node[1]:  # type: ignore[attr-defined]
                    if all(self._test(state, place, name, subject) for name, subject in tests):
                        parts.append(self._print(state, place, inner))
                        break
        return "".join(parts)

    def _list(self, state: State, node: Node) -> str:
        _, verb, article, holder = node
        held = self._held(state, self.story.index[str(holder)])
        things = self.story.things
        if article == "a":
            names = [self._a(state, item) for item in held]
        elif article == "the":
            names = [f"the {self._name(state, things[item])}" for item in held]
        else:
            names = [self._name(state, things[item]) for item in held]
        text = listing(names) if names else "nothing"
        return f"{'are' if len(names) > 1 else 'is'} {text}" if verb else text

    def _test(self, state: State, place: int, kind: str, subject: str) -> bool:
        if subject:
            place = self.story.index[subject]
        if kind == "open":
            return bool(state.facts & self._open[place])
        if kind == "closed":  # in Inform, what is locked is closed too
            return not state.facts & self._open[place]
        if kind == "locked":
            return bool(state.facts & self._locked[place])
        return bool(self._held(state, place)) == (kind == "holds")


def _score_text(gain: int) -> str:
    number = _words(abs(gain))
    start = f"Your score has just gone up by {number}" if gain > 0 else f"Your score changed by minus {number}"
    return f"{start} {'point' if abs(gain) == 1 else 'points'}."


def _words(number: int) -> str:
    return _UNITS[number] if number < len(_UNITS) else str(number)
