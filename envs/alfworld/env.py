"""ALFWorld as a Gymnasium environment.

- ``ALFWorldEnv``: text observations and commands; ``tasks``, ``snapshot``, ``restore`` and ``expert`` beside the usual.
- ``ALFWorldSnapshot``: a point of an episode; small, picklable, restorable in any process.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import gymnasium
from gymnasium.error import ResetNeeded

from ...errors import MissingDependencyError, UsageError, nearest
from ..text import TextSpace
from .games import SPLITS, TASK_TYPES, Game, Playable, check_split, open_index, task_type, unknown_task

BANNER = "-= Welcome to TextWorld, ALFRED! =-\n\n"
NOTHING = "Nothing happens."
ENGINES = ("native", "textworld")
EXPERTS = ("oracle", "explorer")
Info = dict[str, Any]


@dataclass(frozen=True, slots=True)
class ALFWorldSnapshot:
    """A point of an episode: the game and the commands that lead there."""

    split: str
    task: str
    digest: str
    """``Game.digest``, so that a snapshot is never restored in another game of the same name."""
    commands: tuple[str, ...]
    """The admissible commands so far; those that did nothing only show in ``turn``."""
    turn: int
    observation: str
    invalid: bool


class ALFWorldEnv(gymnasium.Env[str, str]):
    """Household tasks in text (Shridhar et al. 2021), under ALFWorld's domain and TextWorld's grammar of it.

    An observation is TextWorld's text without its banner; the first one ends with the task. An action is a command;
    one that is not admissible costs a turn and is answered by "Nothing happens." The reward is ``reward_scale`` on
    the turn that reaches the goal and 0 before, less ``invalid_penalty`` where a command was not admissible. Episodes
    are truncated after ``max_turns`` turns.

    ``info``: ``task`` (id), ``split``, ``goal`` (the task as a sentence), ``won``, ``score`` (0.0 or 1.0),
    ``admissible`` (sorted commands), ``turn``, ``invalid`` (the last action was not admissible), and with
    ``expert_info`` the expert's next action as ``expert`` (None when the episode is over).
    """

    metadata = {"render_modes": ["ansi", "human"], "render_fps": 4}  # noqa: RUF012

    def __init__(
        self,
        split: str = "train",
        source: str = "generated",
        data: str | os.PathLike[str] | None = None,
        *,
        task_types: Sequence[str] | None = None,
        num_games: Mapping[str, int] | None = None,
        game_seed: int = 0,
        max_turns: int = 50,
        reward_scale: float = 1.0,
        invalid_penalty: float = 0.0,
        progress_reward: float = 0.0,
        engine: str = "native",
        expert: str = "oracle",
        expert_info: bool = False,
        render_mode: str | None = None,
    ) -> None:
        """Open a source of games.

        Args:
            split: ``"train"``, ``"valid_seen"`` or ``"valid_unseen"``; ``reset`` draws from it.
            source: ``"generated"``, ``"dataset"`` or ``"pack"``.
            data: where the dataset or pack lies.
            task_types: keep only tasks of these of the six types; None keeps all.
            num_games: generated games per split, such as ``{"train": 10_000}``; a split left out keeps its 10,000
                (train) or 200. The first games stay the same whatever their number.
            game_seed: another number, not negative, generates other games.
            max_turns: turns before truncation, at least 1.
            reward_scale: the reward of success (1 by default; verl-agent uses 10).
            invalid_penalty: taken from the reward of a turn whose command was not admissible (verl-agent: 0.1).
            progress_reward: paid in parts as the episode comes closer to its end: a turn after which the oracle needs
                ``n`` commands fewer gets ``n`` of the ``N`` that it needs from the start, and one that leads away
                pays it back. This is potential-based shaping (Ng, Harada and Russell 1999), which leaves the best
                policy the best.
            engine: ``"native"``, the rules of ALFWorld's domain and grammar in Python, or ``"textworld"``, which runs
                the two as they are. They play the same, byte for byte; a game under another domain or grammar is
                played by the latter in either case, with a warning.
            expert: ``"oracle"`` reads the true facts, ``"explorer"`` acts on what the episode has shown.
            expert_info: put the expert's next action in ``info``.
            render_mode: ``"ansi"``, ``"human"`` (prints) or None.

        Raises:
            UsageError: an argument is none of these, or there is no such data.
            MissingDependencyError: the ``alfworld`` extra is not installed.
        """
        check_split(split)
        task_types = (task_types,) if isinstance(task_types, str) else task_types
        for kind in task_types or ():
            if kind not in TASK_TYPES:
                raise UsageError(f"unknown task type {kind!r}{nearest(kind, TASK_TYPES)}")
        if max_turns < 1:
            raise UsageError(f"max_turns must be at least 1, got {max_turns}")
        if engine not in ENGINES:
            raise UsageError(f"unknown ALFWorld engine {engine!r}{nearest(engine, ENGINES)}")
        if expert not in EXPERTS:
            raise UsageError(f"unknown ALFWorld expert {expert!r}{nearest(expert, EXPERTS)}")
        if render_mode is not None and render_mode not in self.metadata["render_modes"]:
            raise UsageError(
                f"unknown render mode {render_mode!r}{nearest(render_mode, self.metadata['render_modes'])}"
            )
        if engine == "textworld":
            require_engine()
        self._engine = engine
        self.split = split
        self.max_turns = max_turns
        self.reward_scale = reward_scale
        self.invalid_penalty = invalid_penalty
        self.progress_reward = progress_reward
        self.render_mode = render_mode
        self.observation_space = TextSpace(max_length=1 << 14)
        self.action_space = TextSpace(max_length=256)
        self._expert_kind = expert
        self._expert_info = expert_info
        self._types = frozenset(task_types or TASK_TYPES)
        self._index = open_index(source, data, num_games=num_games, game_seed=game_seed)
        self._tasks: dict[str, tuple[str, ...]] = {}
        if not self.tasks():
            raise UsageError(f"split {split!r} has no task of type {', '.join(sorted(self._types))}")
        self._game: Game | None = None
        self._playable: Playable[Any]
        self._point: Any
        """Where in ``_playable`` the episode is."""
        self._commands: tuple[str, ...] = ()
        self._seen: frozenset[str] = frozenset()
        """What the commands so far have made known; kept for the explorer only."""
        self._turn = 0
        self._invalid = False
        self._observation = ""
        self._left = self._start_distance = 0
        """Commands that the oracle needs from here; kept for ``progress_reward`` only."""

    def lexicon(self) -> tuple[str, ...]:
        """Return texts that together hold every word of observations, commands and goals."""
        from .lexicon import lexicon

        return lexicon()

    def tasks(self, split: str | None = None) -> tuple[str, ...]:
        """Return the task ids of ``split`` (by default the environment's) in sorted order."""
        split = self.split if split is None else split
        if split not in self._tasks:
            self._tasks[split] = tuple(task for task in self._index.tasks(split) if task_type(task) in self._types)
        return self._tasks[split]

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, Info]:
        """Start an episode.

        Args:
            seed: seeds the generator that draws tasks.
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
            tasks = self.tasks()
            self._start(self.split, tasks[int(self.np_random.integers(len(tasks)))])
        else:
            self._start(self._split_of(task), task)
        if self.render_mode == "human":
            self.render()
        return self._observation, self._info()

    def step(self, action: str) -> tuple[str, float, bool, bool, Info]:
        """Play one command.

        Raises:
            ResetNeeded: no episode is running.
        """
        self._started()
        if self._over:
            raise ResetNeeded("the episode is over; call reset()")
        move = self._playable.step(self._point, command := action.strip())
        self._turn += 1
        self._invalid = move is None
        if move is None:
            self._observation = NOTHING
        else:
            self._point, self._observation = move
            self._remember(command)
        if self.render_mode == "human":
            print(f"> {command}")
            self.render()
        won = self._point.won
        truncated = not won and self._turn >= self.max_turns
        reward = self.reward_scale * won - self.invalid_penalty * self._invalid
        if self.progress_reward and move is not None:
            left = self._distance()
            reward += self.progress_reward * (self._left - left) / self._start_distance
            self._left = left
        return self._observation, reward, won, truncated, self._info()

    def snapshot(self) -> ALFWorldSnapshot:
        """Return the current point of the episode."""
        game = self._started()
        return ALFWorldSnapshot(
            split=game.split,
            task=game.id,
            digest=game.digest,
            commands=self._commands,
            turn=self._turn,
            observation=self._observation,
            invalid=self._invalid,
        )

    def restore(self, snapshot: ALFWorldSnapshot) -> tuple[str, Info]:
        """Continue from ``snapshot``, taken by any environment with the same source; return what it had returned.

        Where the game was played in this process before, its states are known and this takes microseconds.

        Raises:
            UsageError: the game of that name is another one here.
        """
        self._start(snapshot.split, snapshot.task)
        if self._started().digest != snapshot.digest:
            raise UsageError(
                f"the snapshot is of another game called {snapshot.task!r}; open the source that it came from"
            )
        for command in snapshot.commands:
            move = self._playable.step(self._point, command)
            if move is None:
                raise UsageError(f"the snapshot does not replay: {command!r} is not admissible")
            self._point = move[0]
            self._remember(command)
        if self.progress_reward:
            self._left = self._distance()
        self._turn = snapshot.turn
        self._observation, self._invalid = snapshot.observation, snapshot.invalid
        return self._observation, self._info()

    def expert(self) -> Iterator[str]:
        """Yield the expert's next action from whatever state the environment is in, until the episode is over.

        The ``oracle`` is the game's walkthrough while the episode has followed it, else a plan on the true facts.
        The ``explorer`` knows what the episode has shown, and searches.
        """
        self._started()
        while (action := self._expert_action()) is not None:
            yield action

    def render(self) -> str | None:  # type: ignore[override]
        """Return the last observation (``"ansi"``) or print it (``"human"``)."""
        if self.render_mode == "human":
            print(self._observation, flush=True)
            return None
        return self._observation if self.render_mode == "ansi" else None

    def _start(self, split: str, task: str) -> None:
        if self._game is None or (self._game.split, self._game.id) != (split, task):
            game = self._index.load(split, task)
            self._playable = self._load(game)
            self._game = game
        self._point = self._playable.root
        self._commands, self._turn, self._invalid, self._seen = (), 0, False, frozenset()
        self._observation = self._playable.intro.removeprefix(BANNER)
        if self.progress_reward:
            self._left = self._distance()
            self._start_distance = max(1, self._left)

    def _load(self, game: Game) -> Playable[Any]:
        """Return ``game`` on the engine that plays it."""
        if self._engine == "native":
            from .native import native, unsupported

            why = unsupported(game)
            if why is None:
                return native(game)
            gymnasium.logger.warn(f"ALFWorld game {game.id!r} is played by TextWorld's engine: its {why}")
            require_engine()
        from .engine import ground

        return ground(game)

    def _distance(self) -> int:
        """Return how many commands the oracle needs from here."""
        from .expert import goal_of, plan

        if self._point.won:
            return 0
        return len(plan(goal_of(self._started()), self._playable.facts(self._point), self._playable.names))

    def _remember(self, command: str) -> None:
        """Note that ``command`` has led to the current state."""
        self._commands = (*self._commands, command)
        if self._expert_kind == "explorer":
            from .explorer import reveals

            shown = reveals(command, self._playable.facts(self._point), self._playable.names)
            if shown is not None:
                self._seen |= {shown}

    def _split_of(self, task: str) -> str:
        """Return the split that holds ``task``, looking into the environment's own first."""
        if task not in self.tasks():
            for split in SPLITS:
                if split != self.split and split in self._index.splits and task in self.tasks(split):
                    return split
            raise unknown_task(task, self.split, self.tasks())
        return self.split

    def _started(self) -> Game:
        if self._game is None:
            raise ResetNeeded("call reset() before anything else")
        return self._game

    @property
    def _over(self) -> bool:
        return self._point.won or self._turn >= self.max_turns

    def _info(self) -> Info:
        game = self._started()
        info: Info = {
            "task": game.id,
            "split": game.split,
            "goal": game.task,
            "won": self._point.won,
            "score": float(self._point.won),
            "admissible": list(self._playable.admissible(self._point)),
            "turn": self._turn,
            "invalid": self._invalid,
        }
        if self._expert_info:
            info["expert"] = self._expert_action()
        return info

    def _expert_action(self) -> str | None:
        if self._over:
            return None
        game, playable = self._started(), self._playable
        admissible = playable.admissible(self._point)
        if self._expert_kind == "explorer":
            from .explorer import explorer_action

            return explorer_action(game, playable.facts(self._point), self._seen, admissible, playable.names)
        plan, done = game.walkthrough, len(self._commands)
        if done < len(plan) and plan[:done] == self._commands and plan[done] in admissible:
            return plan[done]
        from .expert import oracle_action

        return oracle_action(game, playable.facts(self._point), admissible, playable.names)


def require_engine() -> None:
    """Raise ``MissingDependencyError`` unless TextWorld, ALFWorld and Fast Downward are installed."""
    modules = {"textworld": "textworld", "fast_downward": "fast-downward-textworld", "alfworld": "alfworld"}
    missing = [name for module, name in modules.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise MissingDependencyError(
            f"ALFWorld needs {', '.join(missing)}, which is not installed (fast-downward-textworld is compiled on "
            'installation: first `apt install g++ cmake`); run: pip install "agentropy[alfworld]"'
        )
