"""ALFWorld as a Gymnasium environment.

- ``ALFWorldEnv``: household tasks; an observation is a text, an action a command.
- ``Point``: where an episode is, as its snapshots keep it.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import gymnasium

from ...errors import EnvironmentFailedError, MissingDependencyError, UsageError, nearest
from ..world import Info, Turn, World
from .games import SPLITS, TASK_TYPES, Game, Playable, open_index, task_type
from .native import State, native, unsupported

BANNER = "-= Welcome to TextWorld, ALFRED! =-\n\n"
NOTHING = "Nothing happens."
ENGINES = ("native", "textworld")
EXPERTS = ("oracle", "explorer")


@dataclass(frozen=True, slots=True)
class Point:
    """Where an episode is."""

    commands: tuple[str, ...]
    """The admissible commands so far; those that did nothing only show in the turn."""
    state: State | None
    """Of the native engine; the other one plays ``commands`` again."""
    seen: frozenset[str]
    left: int
    start_distance: int


class ALFWorldEnv(World):
    """Household tasks in text (Shridhar et al. 2021), under ALFWorld's domain and TextWorld's grammar of it.

    An observation is TextWorld's text without its banner; the first one ends with the task. An action is a command;
    one that is not admissible costs a turn and is answered by "Nothing happens." The reward is ``reward_scale`` on
    the turn that reaches the goal and 0 before, less ``invalid_penalty`` where a command was not admissible. Episodes
    are truncated after ``max_turns`` turns.

    ``info`` is that of every ``World``, with ``admissible``; ``goal`` is the task as a sentence.

    >>> env = gym.make("agentropy/ALFWorld-v0", task_types=["pick_and_place_simple"]).unwrapped
    >>> observation, info = env.reset(seed=0)
    >>> observation
    'You are in the middle of a room. ...Your task is to: put a spraybottle in shelf.'
    >>> for action in env.expert():
    ...     print(f"> {action}\\n{env.step(action)[0]}")
    > go to countertop 1
    You arrive at countertop 1. On the countertop 1, you see a candle 3, a soapbar 1, a spraybottle 2, and ...
    > take spraybottle 2 from countertop 1
    You pick up the spraybottle 2 from the countertop 1.
    > go to shelf 1
    You arrive at shelf 1. On the shelf 1, you see nothing.
    > move spraybottle 2 to shelf 1
    You move the spraybottle 2 to the shelf 1.
    """

    splits = SPLITS
    has_expert = True

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
        super().__init__(
            split,
            max_turns=max_turns,
            max_action=256,
            expert_info=expert_info,
            render_mode=render_mode,
        )
        task_types = (task_types,) if isinstance(task_types, str) else task_types
        for kind in task_types or ():
            if kind not in TASK_TYPES:
                raise UsageError(f"unknown task type {kind!r}{nearest(kind, TASK_TYPES)}")
        if engine not in ENGINES:
            raise UsageError(f"unknown ALFWorld engine {engine!r}{nearest(engine, ENGINES)}")
        if expert not in EXPERTS:
            raise UsageError(f"unknown ALFWorld expert {expert!r}{nearest(expert, EXPERTS)}")
        if engine == "textworld":
            require_engine()
        self._engine = engine
        self.reward_scale = reward_scale
        self.invalid_penalty = invalid_penalty
        self.progress_reward = progress_reward
        self._expert_kind = expert
        self._types = frozenset(task_types or TASK_TYPES)
        self._index = open_index(source, data, num_games=num_games, game_seed=game_seed)
        if not self.tasks():
            raise UsageError(f"split {split!r} has no task of type {', '.join(sorted(self._types))}")
        self._game: Game | None = None
        self._playable: Playable[Any]
        self._point: Any
        """Where in ``_playable`` the episode is."""
        self._commands: tuple[str, ...] = ()
        self._seen: frozenset[str] = frozenset()
        """What the commands so far have made known; kept for the explorer only."""
        self._left = self._start_distance = 0
        """Commands that the oracle needs from here; kept for ``progress_reward`` only."""

    def lexicon(self) -> tuple[str, ...]:
        """Return texts that together hold every word of observations, commands and goals."""
        from .lexicon import lexicon

        return lexicon()

    def _list(self, split: str) -> Iterable[str]:
        if split not in self._index.splits:
            return ()
        return (task for task in self._index.tasks(split) if task_type(task) in self._types)

    def _begin(self, split: str, task: str) -> str:
        self._enter(split, task)
        self._point = self._playable.root
        self._commands, self._seen = (), frozenset()
        if self.progress_reward:
            self._left = self._distance()
            self._start_distance = max(1, self._left)
        return self._playable.intro.removeprefix(BANNER)

    def _act(self, action: str) -> Turn:
        move = self._playable.step(self._point, command := action.strip())
        if move is None:
            return Turn(NOTHING, -self.invalid_penalty, invalid=True)
        self._point, observation = move
        self._remember(command)
        won = self._point.won
        reward = self.reward_scale * won
        if self.progress_reward:
            left = self._distance()
            reward += self.progress_reward * (self._left - left) / self._start_distance
            self._left = left
        return Turn(observation, reward, over=won)

    def _report(self) -> Info:
        game = self._played()
        return {"goal": game.task, "won": self._point.won, "score": float(self._point.won)}

    def _admissible(self) -> Sequence[str]:
        return self._playable.admissible(self._point)

    def _identity(self, split: str, task: str) -> str:
        return self._game_of(split, task).digest

    def _save(self) -> Point:
        state = self._point if isinstance(self._point, State) else None
        return Point(self._commands, state, self._seen, self._left, self._start_distance)

    def _load(self, split: str, task: str, state: Point) -> None:
        self._enter(split, task)
        if state.state is not None and isinstance(self._playable.root, State):
            self._point = state.state
        else:
            self._point = self._playable.root
            for command in state.commands:
                move = self._playable.step(self._point, command)
                if move is None:
                    raise EnvironmentFailedError(f"{task!r} does not play again: {command!r} is not admissible")
                self._point = move[0]
        self._commands, self._seen = state.commands, state.seen
        self._left, self._start_distance = state.left, state.start_distance

    def _game_of(self, split: str, task: str) -> Game:
        """Return the game, which the environment keeps at hand."""
        if self._game is None or (self._game.split, self._game.id) != (split, task):
            return self._index.load(split, task)
        return self._game

    def _enter(self, split: str, task: str) -> None:
        game = self._game_of(split, task)
        if game is not self._game:
            self._playable = self._engine_for(game)
            self._game = game

    def _played(self) -> Game:
        assert self._game is not None
        return self._game

    def _engine_for(self, game: Game) -> Playable[Any]:
        """Return ``game`` on the engine that plays it."""
        if self._engine == "native":
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
        return len(plan(goal_of(self._played()), self._playable.facts(self._point), self._playable.names))

    def _remember(self, command: str) -> None:
        """Note that ``command`` has led to the current state."""
        self._commands = (*self._commands, command)
        if self._expert_kind == "explorer":
            from .explorer import reveals

            shown = reveals(command, self._playable.facts(self._point), self._playable.names)
            if shown is not None:
                self._seen |= {shown}

    def _expert_action(self) -> str | None:
        game, playable = self._played(), self._playable
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
