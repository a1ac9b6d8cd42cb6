"""What every text world of this package has in common.

- ``World``: a Gymnasium environment of texts with task ids, snapshots and an expert; a world fills in six methods.
- ``Turn``: what one action led to.
- ``Snapshot``: a point of an episode; picklable, restorable in any process.
- ``Replay``: the state of a world that can only be brought back by playing its actions again.
"""

from __future__ import annotations

import copy
import hashlib
from abc import abstractmethod
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import gymnasium
import numpy as np
from gymnasium.error import ResetNeeded

from ..errors import EnvironmentFailedError, UsageError, nearest
from .text import TextSpace, cut, storable

Info = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Turn:
    """What one action led to."""

    observation: str
    reward: float = 0.0
    over: bool = False
    """The world has ended the episode (Gymnasium's ``terminated``)."""
    invalid: bool = False
    """The action was none that the world knows here."""


@dataclass(frozen=True, slots=True)
class Replay:
    """The actions that lead to a point, and a hash of every observation on the way."""

    actions: tuple[str, ...]
    digest: str


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A point of an episode."""

    world: str
    """Name of the class whose episode this is."""
    split: str
    task: str
    identity: str
    """``World._identity``, so that a snapshot is never restored in another task of the same name."""
    turn: int
    observation: str
    invalid: bool
    over: bool
    state: Any
    """What the world needs to go on from here."""


class World(gymnasium.Env[str, str]):
    """A text world: observations and actions are texts, tasks have names, and an episode can be forked.

    What an episode shows depends on its task and its actions alone: ``reset(seed=...)`` seeds the generator that draws
    tasks, and nothing else is drawn. ``info`` always has ``task``, ``split``, ``goal``, ``won``, ``score`` (0 to 1),
    ``turn`` and ``invalid`` (the last action was none that the world knows), with ``admissible`` where the world lists
    commands, and ``expert`` (the expert's next action, None when it has none) where it was made with ``expert_info``.

    A world defines ``splits``, ``_list``, ``_begin``, ``_act`` and ``_report``; ``_expert_action`` where it has an
    expert; ``_save`` and ``_load`` where there is a cheaper way back to a point than to play its actions again;
    ``_identity`` where a task of one name may differ between sources; ``_admissible`` where it lists commands.
    """

    metadata = {"render_modes": ["ansi", "human"], "render_fps": 4}  # noqa: RUF012
    splits: Sequence[str]
    """Names of the splits, the training one first."""
    has_expert: ClassVar[bool] = False
    free_text: ClassVar[bool] = False
    """An action is a whole message, such as thoughts with a tool call in them, not one line; ``info`` says so."""
    instructions: str = ""
    """What an agent should be told of the world before it starts, such as the form of actions; ``info`` has it."""

    _arguments: tuple[tuple[Any, ...], dict[str, Any]]

    def __new__(cls, *args: Any, **kwargs: Any) -> World:
        """Remember the arguments, for pickling."""
        world = super().__new__(cls)
        world._arguments = (args, kwargs)
        return world

    def __init__(
        self,
        split: str,
        *,
        max_turns: int,
        max_observation: int = 1 << 14,
        max_action: int = 1 << 12,
        expert_info: bool = False,
        render_mode: str | None = None,
    ) -> None:
        """Check and keep what all worlds are told; ``splits`` must be there already.

        Args:
            split: the one that ``reset`` draws from.
            max_turns: turns before truncation, at least 1.
            max_observation: longest observation in characters; a longer one is cut and says so.
            max_action: longest action that the space has. A longer one is played all the same.
            expert_info: put the expert's next action in ``info``.
            render_mode: ``"ansi"``, ``"human"`` (prints) or None.

        Raises:
            UsageError: an argument is none of these.
        """
        if split not in self.splits:
            raise UsageError(f"unknown {self._name} split {split!r}{nearest(split, self.splits)}")
        if not isinstance(max_turns, int) or max_turns < 1:
            raise UsageError(f"max_turns must be a whole number of at least 1, got {max_turns!r}")
        if expert_info and not self.has_expert:
            raise UsageError(f"{self._name} has no expert: drop expert_info")
        modes = self.metadata["render_modes"]
        if render_mode is not None and render_mode not in modes:
            raise UsageError(f"unknown render mode {render_mode!r}{nearest(render_mode, modes)}")
        self.split = split
        self.max_turns = max_turns
        self.render_mode = render_mode
        self.observation_space = TextSpace(max_length=max_observation)
        self.action_space = TextSpace(max_length=max_action)
        self._expert_info = expert_info
        self._sorted: dict[str, tuple[str, ...]] = {}
        self._at: tuple[str, str] | None = None
        """Split and task of the episode under way."""
        self._turn = 0
        self._invalid = self._ended = False
        self._observation = ""
        self._actions: list[str] = []
        self._digest = b""
        """Of every observation of this episode, in order."""

    @abstractmethod
    def _list(self, split: str) -> Iterable[str]:
        """Return the task ids of ``split``, in any order."""

    @abstractmethod
    def _begin(self, split: str, task: str) -> str:
        """Start an episode of a task that exists; return the first observation."""

    @abstractmethod
    def _act(self, action: str) -> Turn:
        """Play one action, whatever text it is."""

    @abstractmethod
    def _report(self) -> Info:
        """Return ``goal``, ``won`` and ``score`` as they are now, and whatever else ``info`` should say."""

    def _expert_action(self) -> str | None:
        """Return the expert's next action from the current point, None where it has none. Must not change anything."""
        raise NotImplementedError

    def _admissible(self) -> Sequence[str] | None:
        """Return the commands that do something at the current point, sorted; None where the world lists none."""
        return None

    def _identity(self, split: str, task: str) -> str:
        """Return a hash of the task's content."""
        return ""

    def _save(self) -> Any:
        """Return what ``_load`` needs to come back to this point; nothing that later turns change."""
        return Replay(tuple(self._actions), self._digest.hex())

    def _load(self, split: str, task: str, state: Any) -> None:
        """Come back to the point that ``_save`` described, in this or another environment of the class."""
        self._observe(self._begin(split, task))
        for action in state.actions:
            self._actions.append(action)
            self._observe(self._act(action).observation)
        if self._digest.hex() != state.digest:
            raise EnvironmentFailedError(f"{self._name}: task {task!r} did not play again as it had been played")

    def tasks(self, split: str | None = None) -> tuple[str, ...]:
        """Return the task ids of ``split`` (by default the environment's) in sorted order.

        Raises:
            UsageError: there is no such split.
        """
        split = self.split if split is None else split
        if split not in self._sorted:
            if split not in self.splits:
                raise UsageError(f"unknown {self._name} split {split!r}{nearest(split, self.splits)}")
            self._sorted[split] = tuple(sorted(self._list(split)))
        return self._sorted[split]

    def demonstrations(self, split: str | None = None) -> tuple[str, ...]:
        """Return those of ``tasks(split)`` that the expert can start at once: all, but where it must first search."""
        return self.tasks(split)

    def tasks_hash(self, split: str | None = None) -> str:
        """Return a hash of ``tasks(split)``, to be reported with results: equal hashes are equal panels."""
        return hashlib.blake2b("\n".join(self.tasks(split)).encode(), digest_size=8).hexdigest()

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, Info]:
        """Start an episode.

        Args:
            seed: seeds the generator that draws tasks; None goes on with it.
            options: ``{"task": id}`` chooses the task, from the environment's split or else from another one.

        Raises:
            UsageError: an unknown option or task.
        """
        super().reset(seed=seed)
        options = options or {}
        for name in options:
            if name != "task":
                raise UsageError(f"unknown reset option {name!r}{nearest(name, ['task'])}")
        task = options.get("task")
        if task is None:
            split, tasks = self.split, self.tasks()
            task = tasks[int(self.np_random.integers(len(tasks)))]
        else:
            split, task = self._split_of(task), str(task)
        self._at = None  # what fails below leaves no episode
        self._clear()
        self._observe(self._begin(split, task))
        self._at = split, task
        if self.render_mode == "human":
            self.render()
        return self._observation, self._info()

    def step(self, action: str) -> tuple[str, float, bool, bool, Info]:
        """Play one action.

        Raises:
            ResetNeeded: no episode is under way.
            UsageError: the action is no text.
        """
        self._started()
        if self._over:
            raise ResetNeeded("the episode is over; call reset()")
        if not isinstance(action, str):
            raise UsageError(f"an action is a text, not {type(action).__name__}")
        action = storable(str(action))
        at, self._at = self._at, None  # what fails below leaves no episode
        turn = self._act(action)
        self._at = at
        self._actions.append(action)
        self._observe(turn.observation)
        self._turn += 1
        self._invalid, self._ended = turn.invalid, turn.over
        if self.render_mode == "human":
            print(f"> {action}")
            self.render()
        truncated = not turn.over and self._turn >= self.max_turns
        return self._observation, float(turn.reward), turn.over, truncated, self._info()

    def snapshot(self) -> Snapshot:
        """Return the current point of the episode. What happens later does not change it."""
        split, task = self._started()
        return Snapshot(
            world=type(self).__name__,
            split=split,
            task=task,
            identity=self._identity(split, task),
            turn=self._turn,
            observation=self._observation,
            invalid=self._invalid,
            over=self._ended,
            state=self._save(),
        )

    def restore(self, snapshot: Snapshot) -> tuple[str, Info]:
        """Continue from ``snapshot``, taken by any environment of the class; return what it had returned.

        Raises:
            UsageError: the snapshot is of another world, or of another task of the same name.
            EnvironmentFailedError: the world did not come back to the same point.
        """
        world = getattr(snapshot, "world", type(snapshot).__name__)
        if world != type(self).__name__:
            raise UsageError(f"the snapshot is of a {world}, not of a {type(self).__name__}")
        split, task = snapshot.split, snapshot.task
        if self._identity(split, task) != snapshot.identity:
            raise UsageError(f"the snapshot is of another task called {task!r}; open the source that it came from")
        self._at = None
        self._clear()
        self._load(split, task, snapshot.state)
        self._at = split, task
        self._turn = snapshot.turn
        self._observation = cut(snapshot.observation, self.observation_space.max_length)  # type: ignore[attr-defined]
        self._invalid, self._ended = snapshot.invalid, snapshot.over
        return self._observation, self._info()

    def expert(self) -> Iterator[str]:
        """Yield the expert's next action from whatever point the environment is at, until the episode is over.

        Raises:
            UsageError: the world has no expert.
        """
        self._started()
        if not self.has_expert:
            raise UsageError(f"{self._name} has no expert")
        while not self._over and (action := self._expert_action()) is not None:
            yield action

    def admissible(self) -> tuple[str, ...]:
        """Return the commands that do something at the current point, sorted.

        Raises:
            UsageError: the world lists none: its actions are free text.
        """
        self._started()
        commands = self._admissible()
        if commands is None:
            raise UsageError(f"{self._name} lists no admissible commands: its actions are free text")
        return tuple(commands)

    def render(self) -> str | None:  # type: ignore[override]
        """Return the last observation (``"ansi"``) or print it (``"human"``)."""
        if self.render_mode == "human":
            print(self._observation, flush=True)
            return None
        return self._observation if self.render_mode == "ansi" else None

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle and copy as the arguments, the generator and the point of the episode."""
        point = None if self._at is None else self.snapshot()
        generator = copy.deepcopy(self._np_random)  # pickling does it anyway; copy.copy would share it
        return _rebuild, (type(self), *self._arguments, self.spec, generator, self._np_random_seed, point)

    @property
    def _name(self) -> str:
        return type(self).__name__.removesuffix("Env")

    @property
    def _over(self) -> bool:
        """Whether the episode has ended, by the world or by the turn limit."""
        return self._ended or self._turn >= self.max_turns

    def _started(self) -> tuple[str, str]:
        """Return split and task of the episode under way, or raise ``ResetNeeded``."""
        if self._at is None:
            raise ResetNeeded("call reset() before anything else")
        return self._at

    def _clear(self) -> None:
        self._turn, self._invalid, self._ended = 0, False, False
        self._actions, self._digest = [], b""

    def _observe(self, text: str) -> None:
        """Make ``text`` the current observation: cut to what the space holds, and free of what no file can store."""
        text = storable(text)
        self._digest = hashlib.blake2b(self._digest + text.encode(), digest_size=16).digest()
        self._observation = cut(text, self.observation_space.max_length)  # type: ignore[attr-defined]

    def _split_of(self, task: Any) -> str:
        """Return the split that holds ``task``, looking into the environment's own first."""
        own = [self.split, *(split for split in self.splits if split != self.split)]
        for split in own if isinstance(task, str) else ():
            tasks = self.tasks(split)
            at = bisect_left(tasks, task)
            if at < len(tasks) and tasks[at] == task:
                return split
        tasks = self.tasks()
        hint = nearest(str(task), tasks)
        if "did you mean" not in hint:  # thousands of ids are never listed
            hint = f"; tasks() lists the {len(tasks)} valid ids"
        raise UsageError(f"unknown {self._name} task {task!r} in split {self.split!r}{hint}")

    def corpus(self, tasks: int = 48) -> tuple[str, ...]:
        """Return texts like those of the training split, from which subword vocabularies are learned.

        The expert, where there is one, plays ``tasks`` tasks, evenly spaced over the split, in an environment of its
        own.
        """
        args, kwargs = self._arguments
        world = _rebuild(type(self), args, kwargs, self.spec, None, None, None)
        world.render_mode = None
        texts = [self.instructions]
        try:
            names = world.tasks(self.splits[0])
            for name in names[:: max(1, len(names) // max(1, tasks))][:tasks]:
                texts.append(world.reset(options={"task": name})[0])
                for action in world.expert() if world.has_expert else ():
                    texts += [action, world.step(action)[0]]
        finally:
            world.close()
        return tuple(dict.fromkeys(texts))

    def _info(self) -> Info:
        split, task = self._started()
        info: Info = {"task": task, "split": split, **self._report(), "turn": self._turn, "invalid": self._invalid}
        if self.free_text:
            info["free_text"] = True
        if self.instructions:
            info["instructions"] = self.instructions
        if (commands := self._admissible_info()) is not None:
            info["admissible"] = list(commands)
        if self._expert_info:
            info["expert"] = None if self._over else self._expert_action()
        return info

    def _admissible_info(self) -> Sequence[str] | None:
        """What ``info`` lists as admissible; a world for which listing is expensive overrides this."""
        return self._admissible()


def _rebuild(
    cls: type[World],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    spec: Any,
    generator: np.random.Generator | None,
    seed: int | None,
    point: Snapshot | None,
) -> World:
    world = cls(*args, **kwargs)
    world.spec, world._np_random, world._np_random_seed = spec, generator, seed
    if point is not None:
        world.restore(point)
    return world
