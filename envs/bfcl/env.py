"""The multi-turn tasks of the Berkeley Function Calling Leaderboard as a Gymnasium environment.

- ``BFCLEnv``: a user asks for something turn by turn; an action is a message, with function calls or without.
- ``Point``: where an episode is, as its snapshots keep it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ...errors import UsageError, nearest
from ...extras import require
from ..world import Info, Turn, World
from .calls import FORMS, Call, Message, read, write
from .documents import PLACES, function_names, instructions, schemas, signatures, tool_schemas
from .simulators import Simulators, contained
from .source import CATEGORIES, VERSION, source
from .tasks import SPLITS, Gold, Task, gold, load, names

MOST_STEPS = 20
"""Messages with calls in one turn of the user; the benchmark fails an episode at the next one."""
MOST_CALLS = 256
"""In one message; further ones are not made."""
REWARDS = ("final", "dense")
MALFORMED = ("end", "error")
DONE = "Done."
"""What the expert says when a turn is done, and when one cannot be done."""
CANNOT = "I cannot do that: a function or a detail that it needs is missing."
_OVER = "The user has no further request."
_TOO_MANY = f"More than {MOST_STEPS} messages with calls in one turn."


@dataclass(frozen=True, slots=True)
class Point:
    """Where an episode is."""

    turn: int = 0
    """Of the user, from 0; the number of turns when all are over."""
    steps: int = 0
    """Messages with calls in this turn, read or not."""
    called: bool = False
    """Whether a call has been made in this turn."""
    passed: tuple[bool | None, ...] = ()
    """Whether each earlier turn passed its check; None where it has none."""
    failure: str | None = None
    """Why the first turn that failed did."""
    seen: tuple[tuple[str, int], ...] = ()
    """How often the gold calls' results have been seen, in all turns."""
    on_path: bool = True
    """Whether the calls so far are the gold ones and no others."""
    done: int = 0
    """Gold calls of this turn made so far, on the path."""


class BFCLEnv(World):
    """Function calling over several turns with a user: the 800 multi-turn tasks of BFCL v4 (Patil et al. 2025).

    The first observation is the user's first request. An action is a message. One with function calls is answered by
    their results, one line for each; one without ends the turn, and the user's next request follows. After the last
    turn the benchmark's checks decide: after every turn the simulators (file system, trading, travel, tickets,
    vehicle, messages, posts, mathematics) must be in the state that the gold calls lead to, and the results of the
    turn's gold calls must be among those seen so far. ``won`` is the benchmark's ``valid``, ``score`` the share of
    the turns that passed, among those that have gold calls. A 21st message with calls in one turn fails the episode.

    Calls are read in any of three forms: JSON objects in ``<tool_call>`` tags, JSON alone, and the benchmark's own
    Python-like lists. In ``miss_func`` tasks some functions are only offered in a later turn, in ``miss_param`` ones
    the user leaves out a detail first: then the right action is a message that says so. As in the benchmark, a call
    in such a turn is played, and fails the task only if the checks of later turns do (see ``irrelevance``).

    >>> env = gym.make("agentropy/BFCL-v0", documents="none").unwrapped
    >>> observation, info = env.reset(options={"task": "base/045"})
    >>> print(observation)
    Explore 'ResearchDocs' to find second files or subdirectories that contain the keyword 'draft'.
    >>> for action in env.expert():
    ...     print(f"> {action}\\n{env.step(action)[0]}")
    > <tool_call>
    {"name": "find", "arguments": {"path": "ResearchDocs", "name": "draft"}}
    </tool_call>
    {"matches": ["ResearchDocs/draft_notes.txt", "ResearchDocs/summary_draft.docx"]}
    > Done.
    Make a copy of summary_draft.docx, name it ultimate_draft.docx and put it in ResearchDocs directory
    > <tool_call>
    {"name": "cd", "arguments": {"folder": "ResearchDocs"}}
    </tool_call>
    {"current_working_directory": "ResearchDocs"}
    > <tool_call>
    {"name": "cp", "arguments": {"source": "summary_draft.docx", "destination": "ultimate_draft.docx"}}
    </tool_call>
    {"result": "'summary_draft.docx' copied to 'ultimate_draft.docx'"}
    > Done.
    The user has no further request.

    ``info`` is that of every ``World``; ``goal`` is the user's present request. ``category``, ``benchmark_id``,
    ``user_turn`` (from 0), ``user_turns`` and ``failure`` (why the first failed turn did) come with it.
    """

    splits = SPLITS
    has_expert = True
    free_text = True

    def __init__(
        self,
        split: str = "train",
        *,
        categories: Sequence[str] | None = None,
        documents: str = "instructions",
        form: str = "hermes",
        reward: str = "final",
        irrelevance: bool = False,
        malformed: str = "end",
        stop_on_failure: bool = False,
        max_turns: int = 200,
        max_observation: int = 1 << 15,
        expert_info: bool = False,
        render_mode: str | None = None,
    ) -> None:
        """Open the tasks; the first call on a machine without ``bfcl-eval`` fetches its files.

        Args:
            split: ``"train"`` (600 tasks) or ``"test"`` (200); ``reset`` draws from it. No scenario is in both.
            categories: keep only tasks of these: ``"base"``, ``"long_context"``, ``"miss_func"``, ``"miss_param"``;
                None keeps all four.
            documents: where the functions are described: ``"instructions"`` has their schemas (13,000 to 30,000
                characters) in ``instructions``, ``"observation"`` in the first observation, ``"names"`` has only
                their names and those of their parameters in the first observation, and ``"none"`` leaves it to
                ``tools()``. Functions that come later are described, in the same way, in that turn's observation.
            form: how the instructions ask for calls and the expert writes them: ``"hermes"``, ``"json"`` or
                ``"python"``.
            reward: ``"final"`` pays 1 at the end if the episode is won; ``"dense"`` pays each turn that passes its
                share at its end, so that the rewards of an episode sum to ``score``.
            irrelevance: also check the turns without gold calls: one in which a function is called fails. The
                benchmark has this check, but its version 4 does not apply it.
            malformed: what a message leads to whose calls cannot be read: ``"end"`` ends the turn, as in the
                benchmark; ``"error"`` is answered by what was wrong, and the turn goes on.
            stop_on_failure: end the episode at the first turn that fails, since it cannot be won any more.
            max_turns: messages before truncation, at least 1; the default is more than any task's rules allow.
            max_observation: longest observation in characters; a longer one is cut and says so. The longest result
                of a gold call has 31,706.
            expert_info: put the expert's next action in ``info``.
            render_mode: ``"ansi"``, ``"human"`` (prints) or None.

        Raises:
            UsageError: an argument is none of these.
            MissingDependencyError: the ``bfcl`` extra is not installed, or the files could not be fetched.
        """
        super().__init__(
            split,
            max_turns=max_turns,
            max_observation=max_observation,
            expert_info=expert_info,
            render_mode=render_mode,
        )
        categories = (categories,) if isinstance(categories, str) else categories
        for category in categories or ():
            _choice("BFCL category", category, CATEGORIES)
        _choice("place for the documents", documents, PLACES)
        _choice("form of calls", form, FORMS)
        _choice("BFCL reward", reward, REWARDS)
        _choice("way with malformed calls", malformed, MALFORMED)
        require("BFCL", "bfcl", ["mpmath"])
        self.reward = reward
        self.irrelevance = irrelevance
        self.malformed = malformed
        self.stop_on_failure = stop_on_failure
        self._categories = tuple(name for name in CATEGORIES if name in (categories or CATEGORIES))
        self._documents = documents
        self._form = form
        self._root = source()
        self.instructions = instructions(form)
        self._task: Task
        self._gold: Gold
        self._simulators: Simulators
        self._point = Point()

    def tools(self) -> list[dict[str, Any]]:
        """Return the schemas of the functions that are offered now, as chat templates take them."""
        self._started()
        return tool_schemas(self._root, self._task.simulators, self._offered(self._point.turn))

    def corpus(self, tasks: int = 150) -> tuple[str, ...]:
        """Return requests, gold calls and the beginnings of their results, from ``tasks`` training tasks."""
        texts = [instructions(self._form), DONE, CANNOT, _OVER]
        every = self.tasks(self.splits[0])
        for name in every[:: max(1, len(every) // tasks)][:tasks]:
            task, played = load(self._root, name), gold(self._root, name)
            texts += [signatures(self._root, task.simulators, function_names(self._root, task.simulators))]
            for message, calls, results in zip(task.messages, task.gold, played.results, strict=True):
                texts += [message, *(write([call], self._form) for call in calls), *(text[:1024] for text in results)]
        return tuple(dict.fromkeys(texts))

    def _list(self, split: str) -> Iterable[str]:
        return names(split, self._categories)

    def _begin(self, split: str, task: str) -> str:
        self._enter(task)
        self._point = Point()
        self._simulators = Simulators.load(self._root, self._task.simulators, self._gold.states[0])
        return self._request()

    def _act(self, action: str) -> Turn:
        message = read(action)
        if message.calls:
            return self._play(message)
        if message.problem is not None and self.malformed == "error":
            return self._count(f"Error: {message.problem}", invalid=True)
        return self._end_turn(invalid=message.problem is not None)

    def _report(self) -> Info:
        task, point = self._task, self._point
        checked = self._checked()
        return {
            "goal": task.messages[min(point.turn, len(task.messages) - 1)],
            "won": point.turn == len(task.messages) and point.failure is None,
            "score": sum(map(bool, point.passed)) / checked if checked else float(point.failure is None),
            "benchmark_id": task.benchmark_id,
            "category": task.category,
            "user_turn": point.turn,
            "user_turns": len(task.messages),
            "failure": point.failure,
        }

    def _identity(self, split: str, task: str) -> str:
        return VERSION

    def _save(self) -> tuple[Point, bytes]:
        return self._point, self._simulators.save()

    def _load(self, split: str, task: str, state: tuple[Point, bytes]) -> None:
        self._enter(task)
        self._point, saved = state
        self._simulators = Simulators.load(self._root, self._task.simulators, saved)

    def _expert_action(self) -> str | None:
        turn = self._point.turn
        if not self._task.gold[turn]:
            return CANNOT
        done = self._point.done if self._point.on_path else self._rejoined()
        if done is None:
            return None
        left = self._task.gold[turn][done:]
        if not left:
            return DONE
        # A few turns have more calls than may be made one by one.
        at_once = -(-len(left) // max(1, MOST_STEPS - self._point.steps))
        return write(left[:at_once], self._form)

    def _enter(self, task: str) -> None:
        self._task, self._gold = load(self._root, task), gold(self._root, task)
        if self._documents == "instructions":
            listed = schemas(self._root, self._task.simulators, self._offered(0))
            self.instructions = instructions(self._form, listed)

    def _offered(self, turn: int) -> frozenset[str]:
        """Return the functions that are offered in a turn of the user."""
        withheld = {name for later, names in self._task.withheld.items() if later > turn for name in names}
        return frozenset(function_names(self._root, self._task.simulators)) - withheld

    def _request(self) -> str:
        """Return what the user says now, after the functions that are new where they are described here."""
        turn, task = self._point.turn, self._task
        new = self._offered(turn) if turn == 0 else task.withheld.get(turn, ())
        if not new or self._documents == "none" or (turn == 0 and self._documents == "instructions"):
            return task.messages[turn]
        if self._documents == "names":
            listed = "Functions: " + signatures(self._root, task.simulators, new)
        else:
            listed = f"<tools>\n{schemas(self._root, task.simulators, new)}\n</tools>"
        return f"{listed}\n\n{task.messages[turn]}"

    def _play(self, message: Message) -> Turn:
        """Make the calls of a message."""
        turn, point = self._task.gold[self._point.turn], self._point
        seen, results = dict(point.seen), []
        on_path, done = point.on_path, point.done
        for call in message.calls[:MOST_CALLS]:
            result = self._simulators.play(call)
            results.append(result)
            if result in self._gold.wanted:
                seen[result] = seen.get(result, 0) + 1
            on_path = on_path and done < len(turn) and _same(call, turn[done])
            done += on_path
        failed = message.problem is not None or any(text.startswith("Error during execution: ") for text in results)
        if len(message.calls) > MOST_CALLS:
            results.append(f"Error: only the first {MOST_CALLS} of {len(message.calls)} calls were made")
        if message.problem is not None:
            results.append(f"Error: {message.problem}")
        self._point = replace(point, called=True, seen=tuple(seen.items()), on_path=on_path, done=done)
        return self._count("\n".join(results), invalid=failed)

    def _count(self, observation: str, invalid: bool) -> Turn:
        """Go on with the turn, unless it has gone on for too long."""
        self._point = replace(self._point, steps=self._point.steps + 1)
        if self._point.steps <= MOST_STEPS:
            return Turn(observation, invalid=invalid)
        why = f"turn {self._point.turn}: more than {MOST_STEPS} messages with calls"
        self._point = replace(self._point, failure=self._point.failure or why)
        return Turn(f"{observation}\n{_TOO_MANY}", over=True, invalid=invalid)

    def _end_turn(self, invalid: bool) -> Turn:
        """Check the turn and let the user say the next thing."""
        point = self._point
        checked = bool(self._task.gold[point.turn]) or self.irrelevance
        failure = self._check() if checked else None
        passed = failure is None if checked else None
        whole = len(self._task.gold[point.turn])
        self._point = Point(
            turn=point.turn + 1,
            passed=(*point.passed, passed),
            failure=point.failure or (failure and f"turn {point.turn}: {failure}"),
            seen=point.seen,
            on_path=point.on_path and point.done == whole,
        )
        over = self._point.turn == len(self._task.messages)
        over = over or (self.stop_on_failure and self._point.failure is not None)
        if self.reward == "dense":
            reward = 1.0 / self._checked() if passed else 0.0
        else:
            reward = float(over and self._point.failure is None)
        return Turn(_OVER if over else self._request(), reward, over=over, invalid=invalid)

    def _check(self) -> str | None:
        """Return why the present turn fails; None when it passes."""
        turn, called = self._point.turn, self._point.called
        if not self._task.gold[turn]:
            return "a function was called where none fits" if called else None
        if not called:
            return "no function was called"
        theirs = Simulators.load(self._root, self._task.simulators, self._gold.states[turn + 1])
        if differs := self._simulators.matches(theirs):
            return f"the state of {differs} is another one"
        if not contained(self._gold.results[turn], dict(self._point.seen)):
            return "a result that is needed was not seen"
        return None

    def _checked(self) -> int:
        """Return how many turns are checked."""
        return len(self._task.gold) if self.irrelevance else sum(map(bool, self._task.gold))

    def _rejoined(self) -> int | None:
        """Return how many gold calls of this turn need not be made any more; None where the agent has left the path.

        Looking around leaves the state as it is, so that the gold calls still lead to where they should.
        """
        turn, mine = self._point.turn, self._simulators.fingerprint()
        played = Simulators.load(self._root, self._task.simulators, self._gold.states[turn])
        calls, results, seen = self._task.gold[turn], self._gold.results[turn], dict(self._point.seen)
        furthest = None
        for done in range(len(calls) + 1):
            if contained(results[:done], seen) and played.fingerprint() == mine:
                furthest = done
            if done < len(calls):
                played.play(calls[done])
        return furthest


def _choice(what: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise UsageError(f"unknown {what} {value!r}{nearest(str(value), choices)}")


def _same(call: Call, other: Call) -> bool:
    """Whether two calls are one and the same, also in the types of their arguments."""
    if call.name != other.name or call.positional:
        return False
    return sorted(map(repr, call.arguments.items())) == sorted(map(repr, other.arguments.items()))
