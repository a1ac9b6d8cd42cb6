"""TextWorld as a Gymnasium environment.

- ``TextWorldEnv``: text adventures, made by TextWorld's generator or the user's own.
- ``Point``: where an episode is, as its snapshots keep it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import UsageError, nearest
from ...extras import require
from ..world import Info, Turn, World
from .challenges import recipe
from .games import FileGames, Games, GeneratedGames, Loaded
from .inform import INVALID, InformGame
from .native import State

ENGINES = ("native", "inform")
REWARDS = ("dense", "sparse")
GOAL = "Win the game."
INSTRUCTIONS = (
    "You play a text adventure. Answer with one command at a time. Commands: look, inventory, go DIRECTION, "
    "examine X, take X, take X from Y, drop X, put X on Y, insert X into Y, open X, close X, lock X with Y, "
    "unlock X with Y, eat X."
)
COOKING = (
    " Also: drink X, cook X with Y (a stove fries, an oven roasts, a BBQ grills), chop X with Y, slice X with Y, "
    "dice X with Y, prepare meal (in the kitchen). The cookbook has the recipe."
)


@dataclass(frozen=True, slots=True)
class Point:
    """Where an episode is."""

    state: State
    followed: int
    """How many commands of the walkthrough have been played; -1 once the agent has left it."""


class TextWorldEnv(World):
    """Text adventures (Cote et al. 2018), with the rules and words of TextWorld's compiled games.

    An observation is what the compiled game prints, without its banner, prompt and status line; the first one is the
    objective and the first room. An action is a command; one that does nothing here costs a turn and is answered by
    "Invalid command." An episode ends when the game is won or lost, and is truncated after ``max_turns`` turns.

    ``info`` is that of every ``World``, with ``admissible`` and ``lost``; ``goal`` is the objective, ``score`` the
    share of the game's points.

    Where TextWorld's two engines differ, this is the compiled game: only what the game itself calls a loss ends the
    episode, and "prepare meal" waits for every ingredient, prepared as the recipe says. Its expert plays TextWorld's
    walkthrough, and plans over the true facts once the agent has left that.

    >>> env = gym.make("agentropy/TextWorld-v0", challenge="cooking", recipe=1, take=1, cook=True).unwrapped
    >>> observation, info = env.reset(seed=0)
    >>> print(info["goal"])
    You are hungry! Let's cook a delicious meal. Check the cookbook in the kitchen for the recipe. ...
    >>> for action in env.expert():
    ...     print(f"> {action}: {' '.join(env.step(action)[0].split())}")
    > inventory: You are carrying nothing.
    > examine cookbook: You open the copy of "Cooking: A Modern Approach (3rd Ed.)" and start reading: ...
    > take red hot pepper from counter: You take the red hot pepper from the counter. Your score has just gone up ...
    > cook red hot pepper with stove: You fried the red hot pepper. Your score has just gone up by one point.
    > prepare meal: Adding the meal to your inventory. Your score has just gone up by one point.
    > eat meal: You eat the meal. Not bad. Your score has just gone up by one point. *** The End *** ...
    """

    has_expert = True

    def __init__(
        self,
        split: str = "train",
        challenge: str = "custom",
        *,
        games: object = None,
        num_games: Mapping[str, int] | None = None,
        game_seed: int = 0,
        reward: str = "dense",
        invalid_penalty: float = 0.0,
        engine: str = "native",
        max_turns: int = 50,
        expert_info: bool = False,
        render_mode: str | None = None,
        **options: int | bool | str,
    ) -> None:
        """Open a source of games.

        Args:
            split: ``"train"``, ``"valid"`` or ``"test"``; ``reset`` draws from it.
            challenge: ``"custom"``, ``"coin_collector"``, ``"treasure_hunter"``, ``"cooking"`` or ``"simple"``.
            games: the user's own games instead: a ``.json`` or ``.z8`` file, a folder, a list of these, or such for
                each split.
            num_games: generated games per split, such as ``{"train": 500}``; a split left out keeps its 10,000 (train)
                or 200.
            game_seed: another number, from 0 to 428, generates other games.
            reward: ``"dense"`` pays points as they are won, 1 in total; ``"sparse"`` pays 1 for winning.
            invalid_penalty: taken from the reward of a turn whose command did nothing.
            engine: ``"native"``, the games' rules and words in Python, or ``"inform"``, the compiled game, whose parser
                reads free text. Both print the same; a game of the user's own that the first cannot play is played by
                the second in either case.
            max_turns: turns before truncation, at least 1.
            expert_info: put the expert's next action in ``info``.
            render_mode: ``"ansi"``, ``"human"`` (prints) or None.
            **options: of the challenge, such as ``rooms=6`` or ``level=3``; ``challenges.CHALLENGES`` lists them.

        Raises:
            UsageError: an argument is none of these, or there is no such game.
            MissingDependencyError: TextWorld is not installed.
        """
        require("TextWorld", "textworld", ["textworld"])
        for what, value, known in (("engine", engine, ENGINES), ("reward", reward, REWARDS)):
            if value not in known:
                raise UsageError(f"unknown TextWorld {what} {value!r}{nearest(str(value), known)}")
        self._games: Games
        if games is None:
            self._games = GeneratedGames(recipe(challenge, options), num_games, game_seed)
            self.instructions = INSTRUCTIONS + (COOKING if challenge == "cooking" else "")
        else:
            for name, given in (
                ("num_games", num_games is not None),
                ("game_seed", game_seed != 0),
                ("challenge", challenge != "custom"),
                *((name, True) for name in options),
            ):
                if given:
                    raise UsageError(f"games= takes no {name}: drop one of the two")
            self._games = FileGames(games)
            self.instructions = INSTRUCTIONS
        self.splits = self._games.splits
        super().__init__(split, max_turns=max_turns, expert_info=expert_info, render_mode=render_mode)
        self.reward = reward
        self.invalid_penalty = invalid_penalty
        self._engine = engine
        self._loaded: Loaded | None = None
        self._key: tuple[str, str] | None = None
        """Split and task of ``_loaded``."""
        self._inform: InformGame | None = None
        """The episode, where the compiled game is played; else ``_state`` is."""
        self._state: State
        self._followed = 0

    def corpus(self, tasks: int = 12) -> tuple[str, ...]:
        """Return the instructions, the words of TextWorld's grammars, and ``tasks`` episodes of the expert."""
        from .upstream import phrases

        return tuple(
            dict.fromkeys((*super().corpus(tasks), *(phrases() if isinstance(self._games, GeneratedGames) else ())))
        )

    def file(self, task: str) -> Path:
        """Return the compiled game of a task, which TextWorld's own loop plays; made when it is not there yet.

        Raises:
            UsageError: there is no such task.
        """
        path = self._games.load(self._split_of(task), task, "inform").path
        assert path is not None
        return path

    def close(self) -> None:
        """Free the interpreter, if one is open."""
        if self._inform is not None:
            self._inform.close()
            self._inform, self._loaded, self._key = None, None, None
        super().close()

    def _list(self, split: str) -> Iterable[str]:
        return self._games.tasks(split)

    def _begin(self, split: str, task: str) -> str:
        loaded = self._enter(split, task)
        self._followed = 0
        if loaded.game is not None:
            self._state = loaded.game.root
            return loaded.game.intro
        assert self._inform is not None
        return self._inform.reset()

    def _act(self, action: str) -> Turn:
        before = self._points
        if self._inform is not None:
            text, invalid = self._inform.step(action)
            won, lost = self._inform.won, self._inform.lost
        else:
            text, invalid = self._play(action)
            won, lost = self._state.won, self._state.lost
        reward = float(won)
        if self.reward == "dense" and self._most:
            reward = (self._points - before) / self._most
        return Turn(text, reward - self.invalid_penalty * invalid, over=won or lost, invalid=invalid)

    def _play(self, action: str) -> tuple[str, bool]:
        """Play on the native engine; return the text and whether the command did nothing."""
        game = self._native
        command = game.understand(self._state, action)
        after = None if command is None else game.step(self._state, command)
        if after is None:
            return INVALID, True
        walkthrough = game.story.walkthrough
        if self._followed >= 0:
            if self._followed < len(walkthrough) and command == walkthrough[self._followed]:
                self._followed += 1
            elif after[0].facts != self._state.facts:
                self._followed = -1
        self._state, text = after
        return text, False

    def _report(self) -> Info:
        playing = self._inform or self._state
        goal = self._inform.objective if self._inform is not None else self._native.story.objective
        won = playing.won
        score = min(1.0, max(0.0, self._points / self._most)) if self._most else float(won)
        return {"goal": goal or GOAL, "won": won, "lost": playing.lost, "score": score}

    def _admissible(self) -> Sequence[str] | None:
        if self._inform is not None:
            return self._inform.admissible()
        return tuple(self._native.admissible(self._state))

    def _expert_action(self) -> str | None:
        if self._inform is not None:
            return self._inform.policy()
        walkthrough = self._native.story.walkthrough
        if 0 <= self._followed < len(walkthrough):
            return walkthrough[self._followed]
        assert self._loaded is not None and self._loaded.expert is not None
        return self._loaded.expert.action(self._state)

    def _identity(self, split: str, task: str) -> str:
        loaded = self._loaded if self._key == (split, task) else None
        return (loaded or self._games.load(split, task, self._engine)).digest

    def _save(self) -> Any:
        return super()._save() if self._inform is not None else Point(self._state, self._followed)

    def _load(self, split: str, task: str, state: Any) -> None:
        if not isinstance(state, Point):
            super()._load(split, task, state)
            return
        self._enter(split, task)
        self._state, self._followed = state.state, state.followed

    def _enter(self, split: str, task: str) -> Loaded:
        if self._loaded is None or self._key != (split, task):
            loaded = self._games.load(split, task, self._engine)
            if self._inform is not None:
                self._inform.close()
                self._inform = None
            if loaded.path is not None:
                self._inform = InformGame(loaded.path)
            self._loaded, self._key = loaded, (split, task)
        return self._loaded

    @property
    def _native(self) -> Any:
        assert self._loaded is not None and self._loaded.game is not None
        return self._loaded.game

    @property
    def _points(self) -> int:
        return self._inform.score if self._inform is not None else self._state.score

    @property
    def _most(self) -> int:
        return self._inform.max_score if self._inform is not None else self._native.story.max_score
