"""What every wrapper of text worlds shares.

- ``WorldWrapper``: a Gymnasium wrapper that keeps the suite's contract: tasks, expert, snapshots, pickling.
- ``WrapperSnapshot``: a point of a wrapped episode; picklable, restorable by any equally wrapped environment.
- ``Reply``: what one action led to, on its way through a wrapper.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import gymnasium
from gymnasium.error import ResetNeeded
from gymnasium.spaces import Text
from gymnasium.utils import RecordConstructorArgs
from gymnasium.wrappers import OrderEnforcing, PassiveEnvChecker, TimeLimit

from ...errors import UsageError
from ..text import cut, storable

Info = dict[str, Any]


@dataclass(slots=True)
class Reply:
    """What one action led to: Gymnasium's five, and what a wrapper adds to ``info``."""

    observation: str
    reward: float
    terminated: bool
    truncated: bool
    info: Info
    """As it came from below; not changed."""
    notes: Info = field(default_factory=dict)
    """Goes over ``info``. Values must be immutable: snapshots keep them."""


@dataclass(frozen=True, slots=True)
class WrapperSnapshot:
    """A point of a wrapped episode: the point of the environment below, and the wrapper's own state."""

    wrapper: str
    options: Info
    """What the wrapper was made with."""
    inner: Any
    """The snapshot of the next wrapper below, or of the world."""
    limits: tuple[int, ...]
    """Turns that the ``TimeLimit`` wrappers in between have counted, outermost first."""
    state: Any
    observation: str
    notes: Info
    over: bool

    @property
    def world(self) -> str:
        """The whole stack, outermost first; a bare world that is given this snapshot refuses it by this name."""
        return f"{self.wrapper}({getattr(self.inner, 'world', type(self.inner).__name__)})"


class WorldWrapper(gymnasium.Wrapper[str, str, str, str], RecordConstructorArgs):
    """The base of the wrappers: a wrapped world is a text world again.

    ``tasks``, ``tasks_hash``, ``admissible``, ``lexicon``, ``corpus``, ``instructions``, ``has_expert`` and so on are
    those of the world; ``expert`` and ``info["expert"]`` say the expert's action in the form that the wrapper reads.
    ``snapshot`` and ``restore`` go through the whole stack. Gymnasium's own checks and ``TimeLimit`` may stand in
    between; the state of any other foreign wrapper is not part of a snapshot.

    A wrapper defines ``name``, and of the following what it changes: ``_begin`` and ``_turn``, which keep everything
    that an episode needs in ``_state`` (immutable, or replaced and never changed in place, and picklable); ``_say``
    where it changes how actions are written; ``_instruct`` and ``_texts`` where it adds words.
    """

    name: ClassVar[str]
    """In configurations and snapshots."""
    reads_messages: ClassVar[bool] = False
    """It takes the command out of a whole message; then ``info["free_text"]`` is True whatever the world reads."""

    def __init__(self, env: gymnasium.Env[str, str], **options: Any) -> None:
        """Wrap ``env``; ``options`` are the wrapper's arguments, from which Gymnasium makes it again.

        Raises:
            UsageError: observations or actions of ``env`` are no texts.
        """
        RecordConstructorArgs.__init__(self, **options)
        gymnasium.Wrapper.__init__(self, env)
        for space in (env.observation_space, env.action_space):
            if not isinstance(space, Text):
                raise UsageError(
                    f"the wrapper {self.name!r} is for text worlds, and {env} has a {type(space).__name__}"
                )
        self._state: Any = None
        self._begun = self._over = False
        self._shown = ""
        self._notes: Info = {}
        self._info: Info = {}
        """The last ``info`` from below."""

    def _begin(self, observation: str, info: Info) -> tuple[str, Info]:
        """Set ``_state`` for a new episode; return the first observation and what goes over ``info``."""
        return observation, {}

    def _turn(self, action: str) -> Reply:
        """Play one action."""
        return self._below(action)

    def _say(self, action: str) -> str:
        """Return how an agent says what the environment below reads as ``action``."""
        return action

    def _instruct(self, instructions: str) -> str:
        """Return the instructions of the environment below with the wrapper's own."""
        return instructions

    def _texts(self) -> Sequence[str]:
        """Return the fixed texts that the wrapper adds, for vocabularies."""
        return ()

    def reset(self, *, seed: int | None = None, options: Info | None = None) -> tuple[str, Info]:
        """Start an episode, as the environment below does."""
        observation, info = self.env.reset(seed=seed, options=options)
        shown, notes = self._begin(observation, info)
        return self._answer(shown, info, notes, over=False)

    def step(self, action: str) -> tuple[str, float, bool, bool, Info]:
        """Play one action.

        Raises:
            ResetNeeded: no episode is under way.
            UsageError: the action is no text.
        """
        if not self._begun:
            raise ResetNeeded("call reset() before anything else")
        if self._over:
            raise ResetNeeded("the episode is over; call reset()")
        if not isinstance(action, str):
            raise UsageError(f"an action is a text, not {type(action).__name__}")
        reply = self._turn(action)
        over = reply.terminated or reply.truncated
        observation, info = self._answer(reply.observation, reply.info, reply.notes, over=over)
        return observation, float(reply.reward), reply.terminated, reply.truncated, info

    @property
    def snapshot(self) -> Callable[[], WrapperSnapshot]:
        """``snapshot()`` returns the current point of the episode. What happens later does not change it."""
        self._needs("snapshot")
        return self._snapshot

    @property
    def restore(self) -> Callable[[WrapperSnapshot], tuple[str, Info]]:
        """``restore(snapshot)`` continues from there and returns the observation and ``info`` that were shown there.

        The environment must be wrapped as the one that took the snapshot was; else it raises ``UsageError``.
        """
        self._needs("restore")
        return self._restore

    def tasks(self, split: str | None = None) -> tuple[str, ...]:
        """Return the world's task ids of ``split``."""
        tasks: tuple[str, ...] = self._of_world("tasks")(split)
        return tasks

    def tasks_hash(self, split: str | None = None) -> str:
        """Return the hash of ``tasks(split)``."""
        return str(self._of_world("tasks_hash")(split))

    def admissible(self) -> tuple[str, ...]:
        """Return the world's admissible commands, bare: a wrapper that reads another form wants them inside it."""
        commands: tuple[str, ...] = self._of_world("admissible")()
        return commands

    def expert(self) -> Iterator[str]:
        """Yield the expert's next action, in the form that the wrapper reads, until the episode is over."""
        for action in self._of_world("expert")():
            if self._over:
                return
            yield self._say(action)

    def corpus(self, tasks: int = 48) -> tuple[str, ...]:
        """Return the world's corpus and the texts that wrappers add."""
        return tuple(dict.fromkeys((*self._of_world("corpus")(tasks), *self._texts())))

    @property
    def lexicon(self) -> Callable[[], tuple[str, ...]]:
        """``lexicon()`` returns the world's lexicon and the texts that wrappers add, where the world has one."""
        words = self._of_world("lexicon")
        return lambda: tuple(dict.fromkeys((*words(), *self._texts())))

    @property
    def has_expert(self) -> bool:
        """Whether the world has an expert."""
        return bool(self._of_world("has_expert"))

    @property
    def free_text(self) -> bool:
        """Whether an action is a whole message."""
        return self.reads_messages or bool(self._of_world("free_text"))

    @property
    def splits(self) -> Sequence[str]:
        """Names of the splits, the training one first."""
        splits: Sequence[str] = self._of_world("splits")
        return splits

    @property
    def split(self) -> str:
        """The split that ``reset`` draws from."""
        return str(self._of_world("split"))

    @property
    def instructions(self) -> str:
        """What an agent should be told before it starts."""
        return self._instruct(self._of_world("instructions"))

    def _of_world(self, attribute: str) -> Any:
        """Return an attribute of the next layer below that has it.

        ``get_wrapper_attr`` reads an attribute twice per layer, which for properties that look below is 2 to the depth.
        """
        env: gymnasium.Env[Any, Any] = self.env
        while isinstance(env, gymnasium.Wrapper) and not (hasattr(type(env), attribute) or attribute in vars(env)):
            env = env.env
        return getattr(env, attribute)

    def _needs(self, method: str) -> None:
        """Raise ``AttributeError`` unless the world has this method, so that ``hasattr`` tells the truth."""
        if not hasattr(self.unwrapped, method):
            raise AttributeError(f"{self.unwrapped} has no {method}()")

    def _below(self, action: str) -> Reply:
        observation, reward, terminated, truncated, info = self.env.step(action)
        return Reply(observation, float(reward), terminated, truncated, info)

    def _answer(self, observation: str, info: Info, notes: Info, *, over: bool) -> tuple[str, Info]:
        """Keep what is shown, for ``restore``, and return it."""
        if (told := self._instruct(before := info.get("instructions", ""))) != before:
            notes["instructions"] = told
        if self.reads_messages:
            notes["free_text"] = True
        if (command := info.get("expert")) is not None:
            notes["expert"] = None if over else self._say(command)
        self._begun, self._over, self._info, self._notes = True, over, info, notes
        self._shown = cut(storable(observation), self.observation_space.max_length)  # type: ignore[attr-defined]
        return self._shown, {**info, **notes}

    def _snapshot(self) -> WrapperSnapshot:
        inner, limits = self._save_below()
        if not self._begun:
            raise ResetNeeded("call reset() before anything else")
        options = dict(self._saved_kwargs)
        return WrapperSnapshot(
            self.name, options, inner, limits, self._state, self._shown, dict(self._notes), self._over
        )

    def _restore(self, snapshot: WrapperSnapshot) -> tuple[str, Info]:
        if not isinstance(snapshot, WrapperSnapshot):
            raise UsageError(f"the snapshot was taken without the wrapper {self.name!r}")
        if snapshot.wrapper != self.name:
            raise UsageError(f"the snapshot was taken under the wrapper {snapshot.wrapper!r}, not {self.name!r}")
        if snapshot.options != self._saved_kwargs:
            raise UsageError(
                f"the snapshot was taken under another {self.name!r}: with {snapshot.options}, not {self._saved_kwargs}"
            )
        _, info = self._load_below(snapshot.inner, snapshot.limits)
        self._state, self._shown, self._notes = snapshot.state, snapshot.observation, dict(snapshot.notes)
        self._begun, self._over, self._info = True, snapshot.over, info
        return self._shown, {**info, **self._notes}

    def _between(self) -> tuple[list[gymnasium.Wrapper[Any, Any, Any, Any]], Any]:
        """Return the foreign wrappers directly below, and what lies under them."""
        layers, env = [], self.env
        while isinstance(env, gymnasium.Wrapper) and not isinstance(env, WorldWrapper):
            layers.append(env)
            env = env.env
        return layers, env

    def _save_below(self) -> tuple[Any, tuple[int, ...]]:
        layers, env = self._between()
        inner = env.snapshot()
        return inner, tuple(layer._elapsed_steps or 0 for layer in layers if isinstance(layer, TimeLimit))

    def _load_below(self, inner: Any, limits: tuple[int, ...]) -> tuple[str, Info]:
        """Bring everything below back to a point, also Gymnasium's wrappers, which take a restored episode for none."""
        layers, env = self._between()
        clocks = [layer for layer in layers if isinstance(layer, TimeLimit)]
        if len(clocks) != len(limits):
            raise UsageError(f"the snapshot was taken under {len(limits)} time limits, not under {len(clocks)}")
        observation, info = env.restore(inner)
        for clock, elapsed in zip(clocks, limits, strict=True):
            clock._elapsed_steps = elapsed  # type: ignore[assignment]
        for layer in layers:
            if isinstance(layer, OrderEnforcing):
                layer._has_reset = True
            elif isinstance(layer, PassiveEnvChecker) and getattr(layer, "_previous_data", ()) is None:
                layer.checked_step = layer.checked_data_reuse = True  # it compares with a reset that never was
        return observation, info
