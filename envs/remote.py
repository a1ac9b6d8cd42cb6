"""An environment that a server runs, as a Gymnasium environment.

- ``RemoteEnv``: the same episodes as the environment itself would give, over HTTP.
- ``RemoteSnapshot``: a point of its episode.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import gymnasium
import numpy as np
from gymnasium.error import ResetNeeded
from gymnasium.spaces import Space

from ..errors import EnvironmentFailedError, UsageError, nearest
from ..extras import require
from .serve import wire

DEFAULT_ENV = "agentropy/ALFWorld-v0"
TOKEN_VARIABLE = "AGENTROPY_TOKEN"
URL_VARIABLE = "AGENTROPY_REMOTE_URL"
_ATTEMPTS = 3
"""How often in a row an episode may be lost before it is given up: its action may be what kills the process."""
_ATTRIBUTES = frozenset({"splits", "split", "max_turns", "has_expert", "instructions"})
_METHODS = frozenset({"corpus", "lexicon"})
_MOVES = frozenset({"reset", "step", "restore"})


@dataclass(frozen=True, slots=True)
class RemoteSnapshot:
    """A point of an episode at a server. Picklable.

    ``sealed`` is the world's own snapshot. The server signed it and takes back nothing but what it signed since its
    start; where it does not, the actions are played again and must show what they had shown.
    """

    env_id: str
    sealed: bytes
    start: Mapping[str, Any]
    """Seed, options and state of the generator with which the episode began."""
    actions: tuple[str, ...]
    digest: bytes
    """Of everything that the episode has shown."""
    observation: str


class RemoteEnv(gymnasium.Env[str, str]):
    """An environment of texts that a server of ``agentropy serve envs`` runs.

    Episodes, spaces, ``info``, ``tasks``, ``snapshot``, ``expert`` and errors are those of the environment itself, for
    the same seeds. The generator that draws tasks is the client's: it travels with each reset, so that a server that
    is started again, or a session that was idle for too long, changes nothing between episodes. In the middle of one,
    ``recover=True`` plays its actions again, verifies that they show what they had shown, and goes on;
    otherwise the episode ends in an ``EnvironmentFailedError``, as it does where its process has died.

    A request is sent again as long as no answer comes, and is played once. The connection is made when it is first
    needed, in each process anew: the environment may be pickled, and used after a fork.

    >>> from agentropy.envs.serve.running import BackgroundServer
    >>> from agentropy.envs.serve.settings import Settings
    >>> with BackgroundServer(Settings(port=0, workers=1)) as server:  # or `agentropy serve envs`, elsewhere
    ...     env = gym.make("agentropy/Remote-v0", url=server.url, env_id="agentropy/ALFWorld-v0").unwrapped
    ...     observation, info = env.reset(seed=0)
    ...     for action in env.expert():
    ...         observation, reward, terminated, truncated, info = env.step(action)
    ...     env.close()
    >>> info["won"]
    True
    """

    metadata = {"render_modes": ["ansi", "human"], "render_fps": 4}  # noqa: RUF012
    _arguments: tuple[tuple[Any, ...], dict[str, Any]]

    def __new__(cls, *args: Any, **kwargs: Any) -> RemoteEnv:
        """Remember the arguments, for pickling."""
        env = super().__new__(cls)
        env._arguments = args, kwargs
        return env

    def __init__(
        self,
        url: str | None = None,
        env_id: str = DEFAULT_ENV,
        env_kwargs: Mapping[str, Any] | None = None,
        *,
        split: str | None = None,
        token: str | None = None,
        timeout: float = 180.0,
        recover: bool = False,
        message_format: str = "auto",
        render_mode: str | None = None,
        **arguments: Any,
    ) -> None:
        """Remember where the environment is; nothing is sent yet.

        Args:
            url: of the server, such as ``"http://127.0.0.1:8321"``; ``$AGENTROPY_REMOTE_URL`` when left out.
            env_id: the environment to open there.
            env_kwargs: its arguments.
            split: its split; its own default when left out.
            token: bearer token; ``$AGENTROPY_TOKEN`` when left out.
            timeout: seconds to try a request, also while the server is full or being started again.
            recover: play an episode again when the server has lost it.
            message_format: ``"msgpack"``, ``"json"``, or ``"auto"``, the first of these that is installed.
            render_mode: ``"ansi"``, ``"human"`` (prints) or None.
            arguments: more arguments of the environment, as ``expert_info=True``.

        Raises:
            UsageError: an argument makes no sense.
            MissingDependencyError: httpx is not installed.
        """
        require("A remote environment", "serve", ["httpx"])
        from .serve.connection import choose_form

        url = url or os.environ.get(URL_VARIABLE)
        if not url:
            raise UsageError(
                "a remote environment needs the URL of its server: give url='http://HOST:PORT' or set "
                f"{URL_VARIABLE}; `agentropy serve envs` starts a server and prints its URL"
            )
        if not timeout > 0:
            raise UsageError(f"timeout must be positive, got {timeout}")
        modes = self.metadata["render_modes"]
        if render_mode is not None and render_mode not in modes:  # type: ignore[operator]
            raise UsageError(f"unknown render mode {render_mode!r}{nearest(render_mode, modes)}")  # type: ignore[arg-type]
        self.url = url.rstrip("/")
        self.env_id = env_id
        self.env_kwargs = {**(env_kwargs or {}), **arguments, **({} if split is None else {"split": split})}
        self.timeout = timeout
        self.recover = recover
        self.recoveries = 0
        """How often an episode was brought back after the server had lost it."""
        self.render_mode = render_mode
        self._token = token if token is not None else os.environ.get(TOKEN_VARIABLE) or None
        self._form = choose_form(message_format)
        self._held = _Held()
        self._finalizer = weakref.finalize(self, self._held.abandon)
        self._finalizer.atexit = False
        self._about: dict[str, Any] | None = None
        self._spaces: dict[str, Space[Any]] = {}
        self._tasks: dict[str | None, tuple[str, ...]] = {}
        self._episode: _Episode | None = None
        self._attached = False
        """Whether the session has the episode."""
        self._lost: str | None = None
        """Why it does not have it any more."""

    @property
    def observation_space(self) -> Space[Any]:  # type: ignore[override]
        """That of the environment."""
        return self._space("observation_space")

    @property
    def action_space(self) -> Space[Any]:  # type: ignore[override]
        """That of the environment."""
        return self._space("action_space")

    def tasks(self, split: str | None = None) -> tuple[str, ...]:
        """Return the task ids of ``split`` (by default the environment's) in sorted order.

        Raises:
            UsageError: there is no such split, or the environment has no tasks.
        """
        if split not in self._tasks:
            self._tasks[split] = tuple(self._method("tasks", {} if split is None else {"split": split}))
        return self._tasks[split]

    def tasks_hash(self, split: str | None = None) -> str:
        """Return a hash of ``tasks(split)``: equal hashes are equal panels."""
        return self._method("tasks_hash", {} if split is None else {"split": split})

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        """Start an episode, as the environment itself would.

        Raises:
            UsageError: an unknown option or task.
            EnvironmentFailedError: the world broke, or the server cannot be reached.
        """
        super().reset(seed=seed)
        generator = wire.dump_generator(self.np_random) if seed is None else None
        start = {"seed": seed, "options": options, "generator": generator}
        reply = self._call("reset", start)
        self._episode, self._attached, self._lost = _Episode(start), True, None
        self._take(reply)
        if self.render_mode == "human":
            self.render()
        return reply["observation"], reply["info"]

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Play one action, once.

        Raises:
            ResetNeeded: no episode is under way.
            UsageError: the action is no text.
            EnvironmentFailedError: the episode is lost.
        """
        episode = self._started()
        if not isinstance(action, str):
            raise UsageError(f"an action is a text, not {type(action).__name__}")
        reply = self._call("step", {"action": action})
        episode.actions.append(action)
        self._take(reply)
        if self.render_mode == "human":
            print(f"> {action}")
            self.render()
        return reply["observation"], reply["reward"], reply["terminated"], reply["truncated"], reply["info"]

    def snapshot(self) -> RemoteSnapshot:
        """Return the current point of the episode. What happens later does not change it.

        Raises:
            ResetNeeded: no episode was begun.
            UsageError: the environment has no snapshots.
        """
        self._started()
        return self._point(self._call("snapshot"))

    def restore(self, snapshot: RemoteSnapshot) -> tuple[str, dict[str, Any]]:
        """Continue from ``snapshot``, taken by any client of the environment; return what it had returned.

        Raises:
            UsageError: the snapshot is of another environment or task.
            EnvironmentFailedError: the world did not come back to the same point.
        """
        if not isinstance(snapshot, RemoteSnapshot):
            raise UsageError(f"a remote environment restores a RemoteSnapshot, not a {type(snapshot).__name__}")
        if snapshot.env_id != self.env_id:
            raise UsageError(f"the snapshot is of {snapshot.env_id}, not of {self.env_id}")
        reply = self._call("restore", snapshot)
        self._episode, self._attached, self._lost = _Episode.at(snapshot), True, None
        return reply["observation"], reply["info"]

    def fork(self) -> RemoteEnv:
        """Return another environment that continues the episode as well.

        Raises:
            ResetNeeded: no episode was begun.
            UsageError: the environment has no snapshots.
        """
        twin = _rebuild(type(self), self._arguments, self.spec, self._np_random, self._np_random_seed, None)
        twin.restore(self.snapshot())
        return twin

    def expert(self) -> Iterator[str]:
        """Yield the expert's next action from whatever point the environment is at, until the episode is over.

        Raises:
            UsageError: the environment has no expert.
        """
        self._started()
        while (action := self._call("expert")["action"]) is not None:
            yield action

    def admissible(self) -> tuple[str, ...]:
        """Return the commands that do something at the current point, sorted.

        Raises:
            UsageError: the environment lists none.
        """
        self._started()
        return tuple(self._call("call", {"method": "admissible"})["value"])

    def render(self) -> str | None:  # type: ignore[override]
        """Return the last observation (``"ansi"``) or print it (``"human"``)."""
        observation = "" if self._episode is None else self._episode.observation
        if self.render_mode == "human":
            print(observation, flush=True)
            return None
        return observation if self.render_mode == "ansi" else None

    def close(self) -> None:
        """Close the session, and the connection with the last one. Safe to call twice."""
        self._episode, self._attached, self._lost = None, False, None
        self._held.release()

    def __getattr__(self, name: str) -> Any:
        """Return what else the environment has: ``splits``, ``split``, ``max_turns``, ``has_expert`` and so on."""
        if name in _ATTRIBUTES and name in (attributes := self._look()["attributes"]):
            return attributes[name]
        if name in _METHODS and name in self._look()["methods"]:
            return lambda **arguments: self._method(name, arguments)
        raise AttributeError(f"'{type(self).__name__}' object has no attribute {name!r}")

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle and copy as the arguments, the generator and the point of the episode."""
        point = None
        if self._episode is not None:
            try:
                point = self.snapshot()
            except (EnvironmentFailedError, UsageError):  # it can still be played again
                point = None if self._episode is None else self._point(b"")
        return _rebuild, (type(self), self._arguments, self.spec, self._np_random, self._np_random_seed, point)

    def _look(self) -> dict[str, Any]:
        """Return what the server says of the environment."""
        if self._about is None:
            self._about = self._session().about
        return self._about

    def _space(self, name: str) -> Space[Any]:
        if name not in self._spaces:
            from .serve.spaces import build_space

            self._spaces[name] = build_space(self._look()[name])
        return self._spaces[name]

    def _method(self, name: str, arguments: dict[str, Any]) -> Any:
        return self._call("call", {"method": name, "arguments": arguments})["value"]

    def _started(self) -> _Episode:
        if self._episode is None:
            raise ResetNeeded("call reset() before anything else")
        return self._episode

    def _take(self, reply: dict[str, Any]) -> None:
        """Note what a move has shown, and the generator where it has drawn."""
        episode = self._started()
        episode.observation, episode.sealed = reply["observation"], b""
        moved = reply["reward"], reply["terminated"], reply["truncated"]
        episode.digest = wire.link(episode.digest, reply["observation"], *moved)
        self._follow(reply)

    def _follow(self, reply: dict[str, Any]) -> None:
        if (state := reply.get("generator")) is not None:
            self._np_random = wire.load_generator(state)

    def _point(self, sealed: bytes) -> RemoteSnapshot:
        episode = self._started()
        return RemoteSnapshot(
            self.env_id, sealed, episode.start, tuple(episode.actions), episode.digest, episode.observation
        )

    def _session(self) -> Any:
        """Return the session of this process, a new one where there is none."""
        from .serve.connection import RemoteSession, connect

        held = self._held
        if (
            held.connection is not None and held.connection.pid != os.getpid()
        ):  # the parent of this fork goes on with it
            held.connection = held.session = None
            self._attached = False
        session = held.session
        if session is None:
            if held.connection is None:
                held.connection = connect(self.url, self._token)
            try:
                session = RemoteSession(
                    held.connection, self.env_id, self.env_kwargs, form=self._form, seconds=self.timeout
                )
            except BaseException:
                held.release()
                raise
            held.session = session
        return session

    def _call(self, op: str, body: Any = None) -> Any:
        """Return the answer to an operation, recovering what was lost where it may be."""
        from .serve.connection import EpisodeLost, SessionGone, UnreachableError

        needs_episode = op not in ("reset", "restore") and not (op == "call" and body["method"] != "admissible")
        for _ in range(_ATTEMPTS):
            try:
                session = self._session()
                if needs_episode:
                    self._attach(session)
                return self._restored(session, body) if op == "restore" else session.operate(op, body)
            except (SessionGone, EpisodeLost) as error:
                failure: EnvironmentFailedError = error
                self._attached, self._lost = False, str(error)
                if isinstance(error, SessionGone):
                    self._held.release()
            except UnreachableError as error:
                self._attached, self._lost = False, str(error)
                self._held.abandon()
                raise
            except EnvironmentFailedError:
                if op in _MOVES:
                    self._episode = None
                raise
        self._episode = None
        raise EnvironmentFailedError(f"lost {_ATTEMPTS} times in a row: {failure}") from failure

    def _attach(self, session: Any) -> None:
        """Bring the episode into a session that does not have it."""
        episode = self._started()
        if self._attached:
            return
        if self._lost is not None and not self.recover:
            self._episode, reason = None, self._lost
            raise EnvironmentFailedError(f"{reason}; recover=True would play the episode again")
        self._restored(session, self._point(episode.sealed))
        self.recoveries += self._lost is not None
        self._attached, self._lost = True, None

    def _restored(self, session: Any, point: RemoteSnapshot) -> dict[str, Any]:
        """Continue from ``point``: by its snapshot if the server signed it, else by its actions."""
        from .serve.connection import ForeignSnapshot

        if point.sealed:
            try:
                reply = session.operate("restore", raw=point.sealed)
                self._follow(reply)
                return reply
            except ForeignSnapshot:
                pass
        body = {**point.start, "actions": list(point.actions), "digest": point.digest.hex()}
        reply = session.operate("replay", body)
        if not self._look()["world"]:  # whose episodes draw nothing, so that restoring one changes no generator
            self._follow(reply)
        return reply


@dataclass(slots=True)
class _Episode:
    """The episode under way, as far as it must be known to be played again."""

    start: Mapping[str, Any]
    actions: list[str]
    digest: bytes
    observation: str
    sealed: bytes
    """A snapshot of this very point, where there is one."""

    def __init__(self, start: Mapping[str, Any]) -> None:
        self.start, self.actions, self.digest, self.observation, self.sealed = start, [], b"", "", b""

    @classmethod
    def at(cls, point: RemoteSnapshot) -> _Episode:
        episode = cls(point.start)
        episode.actions, episode.digest = list(point.actions), point.digest
        episode.observation, episode.sealed = point.observation, point.sealed
        return episode


class _Held:
    """What an environment has at the server, apart from it so that it can be given up when the environment is gone."""

    def __init__(self) -> None:
        self.connection: Any = None
        self.session: Any = None

    def release(self) -> None:
        """Close the session and give the connection back."""
        from .serve.connection import disconnect

        session, self.session = self.session, None
        connection, self.connection = self.connection, None
        if session is not None:
            session.close()
        if connection is not None:
            disconnect(connection)

    def abandon(self) -> None:
        """Do so without sending anything now."""
        session, self.session = self.session, None
        if session is not None and session.pid == os.getpid():
            session.connection.abandon(session.name)


def _rebuild(
    cls: type[RemoteEnv],
    arguments: tuple[tuple[Any, ...], dict[str, Any]],
    spec: Any,
    generator: np.random.Generator | None,
    seed: int | None,
    point: RemoteSnapshot | None,
) -> RemoteEnv:
    args, kwargs = arguments
    env = cls(*args, **kwargs)
    env.spec, env._np_random, env._np_random_seed = spec, generator, seed
    if point is not None:
        env._episode = _Episode.at(point)
    return env
