"""The environment that a pool's worker runs for one session.

- ``HostedEnv``: its actions are requests and its observations answers, so that a pool carries every operation.
- ``Request``, ``Answer``: bodies as they travel over HTTP; workers decode and encode them, not the server's one loop.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import pickle
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import gymnasium
from gymnasium.error import ResetNeeded
from gymnasium.spaces import Text

from ...errors import EnvironmentFailedError, UsageError
from ..world import World
from . import wire
from .spaces import describe_space
from .wire import Code

HOSTED = f"{__name__}:agentropy/Hosted-v0"
METHODS = frozenset({"tasks", "tasks_hash", "admissible", "corpus", "lexicon"})
"""What a client may call on an environment that has it."""
ATTRIBUTES = ("splits", "split", "max_turns", "has_expert", "instructions")
"""What a client sees of an environment that has it."""
_MOST_REPLAYED = 1 << 16


@dataclass(frozen=True, slots=True)
class Request:
    """An operation and its body."""

    op: str
    body: bytes = b""
    form: str = wire.MSGPACK
    """Of the body, and of the answer unless that is bytes."""


@dataclass(frozen=True, slots=True)
class Answer:
    """The status, content type and body of the answer to a request."""

    status: int
    form: str
    body: bytes

    @classmethod
    def of_problem(cls, status: int, code: Code, detail: str) -> Answer:
        """Return the answer that tells an error."""
        return cls(status, wire.PROBLEM, wire.problem(status, code, detail))


@dataclass(frozen=True, slots=True)
class _Point:
    """What a snapshot holds beside the world's own. The server signs it, so it is unpickled only where it was made."""

    turn: int
    shown: tuple[str, dict[str, Any]]
    state: Any


class HostedEnv(gymnasium.Env[Any, Any]):
    """One environment of a session. ``reset`` only forgets the last session; a request never raises."""

    observation_space = action_space = Text(1)

    def __init__(self, env_id: str, env_kwargs: Mapping[str, Any]) -> None:
        """Remember what to make; it is made when it is first needed.

        Args:
            env_id: a Gymnasium id, also as ``module:id``.
            env_kwargs: its arguments.
        """
        self._env_id = env_id
        self._env_kwargs = dict(env_kwargs)
        self._env: gymnasium.Env[Any, Any] | None = None
        self._limit: int | None = None
        self._turn = 0
        self._shown: tuple[str, dict[str, Any]] | None = None
        """Observation and info of the episode under way."""
        self._told: str | None = None
        """The state of the generator that the client knows."""

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        """Begin a session."""
        self.close()
        return "", {}

    def step(self, action: Request) -> tuple[Answer, float, bool, bool, dict[str, Any]]:  # type: ignore[override]
        """Answer one request; the pool's episode is the session, which its close ends."""
        return self._answer(action), 0.0, action.op == "close", False, {}

    def close(self) -> None:
        """Close the environment; the next request makes another one."""
        env, self._env, self._shown, self._told = self._env, None, None, None
        if env is not None:
            with contextlib.suppress(Exception):
                env.close()

    def _answer(self, request: Request) -> Answer:
        try:
            body = self._body(request)
            reply = getattr(self, f"_on_{request.op}")(body)
            if isinstance(reply, bytes):
                return Answer(200, wire.BYTES, reply)
            try:
                return Answer(200, request.form, wire.encode(reply, request.form))
            except wire.WireError as error:
                raise EnvironmentFailedError(f"its answer cannot be sent: {error}") from error
        except ResetNeeded as error:
            return Answer.of_problem(409, Code.RESET_NEEDED, str(error))
        except wire.WireError as error:
            return Answer.of_problem(400, Code.MALFORMED, str(error))
        except UsageError as error:
            return Answer.of_problem(422, Code.USAGE, str(error))
        except BaseException as error:
            if request.op in ("reset", "step", "restore", "replay"):
                self.close()  # what raised in the middle of a move cannot be trusted to go on
            text = str(error) if isinstance(error, EnvironmentFailedError) else f"{type(error).__name__}: {error}"
            return Answer.of_problem(500, Code.FAILED, f"{self._env_id} failed in {request.op}: {text}")

    def _body(self, request: Request) -> Any:
        if request.op == "restore" or not request.body:
            return request.body
        body = wire.decode(request.body, request.form)
        if not isinstance(body, dict):
            raise UsageError(f"the body of {request.op!r} is an object, not {type(body).__name__}")
        return body

    def _opened(self) -> gymnasium.Env[Any, Any]:
        if self._env is None:
            module, _, name = self._env_id.rpartition(":")
            if module:
                importlib.import_module(module)
            spec, kwargs = gymnasium.spec(name), dict(self._env_kwargs)
            # The limit is kept here: a wrapper that counts would not be part of a snapshot.
            self._limit = kwargs.pop("max_episode_steps", spec.max_episode_steps)
            spec = dataclasses.replace(spec, order_enforce=False, disable_env_checker=True, max_episode_steps=None)
            try:
                self._env = gymnasium.make(spec, **kwargs)
            except TypeError as error:  # an argument that the environment does not have
                raise UsageError(str(error)) from error
        return self._env

    def _world(self) -> Any:
        return self._opened().unwrapped

    def _needed(self, name: str, what: str) -> Any:
        """Return the environment's method of an episode under way."""
        world = self._world()
        if self._shown is None:
            raise ResetNeeded("call reset() before anything else")
        if not hasattr(world, name):
            raise UsageError(f"'{self._env_id}' cannot {what}: it has no method {name}()")
        return getattr(world, name)

    def _on_open(self, _: Any) -> dict[str, Any]:
        world = self._world()
        return {
            "env_id": self._env_id,
            "name": type(world).__name__,
            "world": isinstance(world, World),
            "observation_space": describe_space(world.observation_space, self._env_id),
            "action_space": describe_space(world.action_space, self._env_id),
            "attributes": {name: getattr(world, name) for name in ATTRIBUTES if hasattr(world, name)},
            "methods": sorted(name for name in METHODS | {"snapshot", "expert"} if hasattr(world, name)),
        }

    def _on_close(self, _: Any) -> dict[str, Any]:
        self.close()
        return {}

    def _on_reset(self, body: dict[str, Any]) -> dict[str, Any]:
        env, world = self._opened(), self._world()
        seed, options, generator = _start_of(body)
        if seed is None and generator is not None:
            world.np_random = wire.load_generator(generator)
        self._told = None
        observation, info = env.reset(seed=seed, options=options)
        self._turn, self._shown = 0, (observation, info)
        return self._reply(observation, 0.0, False, False, info)

    def _on_step(self, body: dict[str, Any]) -> dict[str, Any]:
        if self._shown is None:
            raise ResetNeeded("call reset() before anything else")
        return self._play(_field(body, "action", str))

    def _play(self, action: str) -> dict[str, Any]:
        observation, reward, terminated, truncated, info = self._opened().step(action)
        self._turn += 1
        truncated = bool(truncated) or (self._limit is not None and self._turn >= self._limit)
        self._shown = observation, info
        return self._reply(observation, float(reward), bool(terminated), truncated, info)

    def _reply(
        self, observation: str, reward: float, terminated: bool, truncated: bool, info: dict[str, Any]
    ) -> dict[str, Any]:
        reply = {
            "observation": observation,
            "reward": reward,
            "terminated": terminated,
            "truncated": truncated,
            "info": info,
        }
        state = wire.dump_generator(self._world()._np_random)
        if state != self._told:
            reply["generator"] = self._told = state
        return reply

    def _on_replay(self, body: dict[str, Any]) -> dict[str, Any]:
        actions = _field(body, "actions", list)
        if len(actions) > _MOST_REPLAYED or not all(isinstance(action, str) for action in actions):
            raise UsageError(f"'actions' are at most {_MOST_REPLAYED} texts")
        reply = self._on_reset(body)
        digest = wire.link(b"", reply["observation"], 0.0, False, False)
        for action in actions:
            reply = self._play(action)
            digest = wire.link(digest, reply["observation"], reply["reward"], reply["terminated"], reply["truncated"])
        if digest.hex() != _field(body, "digest", str):
            raise EnvironmentFailedError("the episode did not play again as it had been played")
        return {**reply, "generator": self._told}

    def _on_snapshot(self, _: Any) -> bytes:
        snapshot = self._needed("snapshot", "be forked")
        assert self._shown is not None
        return zlib.compress(pickle.dumps(_Point(self._turn, self._shown, snapshot()), pickle.HIGHEST_PROTOCOL), 1)

    def _on_restore(self, body: bytes) -> dict[str, Any]:
        world = self._world()
        if not hasattr(world, "restore"):
            raise UsageError(f"'{self._env_id}' cannot be forked: it has no method restore()")
        point: _Point = pickle.loads(zlib.decompress(body))
        observation, info = world.restore(point.state) or point.shown
        self._turn, self._shown, self._told = point.turn, (observation, info), None
        return self._reply(observation, 0.0, False, False, info)

    def _on_expert(self, _: Any) -> dict[str, Any]:
        return {"action": next(self._needed("expert", "show expert play")(), None)}

    def _on_call(self, body: dict[str, Any]) -> dict[str, Any]:
        name, arguments = _field(body, "method", str), body.get("arguments", {})
        if name not in METHODS or not hasattr(self._world(), name):
            raise UsageError(f"'{self._env_id}' has no method {name!r} for clients")
        if not isinstance(arguments, dict):
            raise UsageError("'arguments' are an object of names and values")
        method = self._needed(name, name) if name == "admissible" else getattr(self._world(), name)
        try:
            return {"value": method(**arguments)}
        except TypeError as error:
            raise UsageError(f"{name}: {error}") from error


def _start_of(body: dict[str, Any] | bytes) -> tuple[int | None, dict[str, Any] | None, str | None]:
    """Return seed, options and state of the generator from the body of a reset."""
    if isinstance(body, bytes):
        return None, None, None
    seed, options, generator = body.get("seed"), body.get("options"), body.get("generator")
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int) or seed < 0):
        raise UsageError(f"'seed' is a number that is not negative, or null, not {seed!r}")
    if options is not None and not isinstance(options, dict):
        raise UsageError(f"'options' are an object or null, not {type(options).__name__}")
    if generator is not None and not isinstance(generator, str):
        raise UsageError(f"'generator' is a text or null, not {type(generator).__name__}")
    return seed, options, generator


def _field(body: dict[str, Any] | bytes, name: str, kind: type) -> Any:
    value = body.get(name) if isinstance(body, dict) else None
    if not isinstance(value, kind):
        raise UsageError(f"the body needs {name!r}, a {kind.__name__}")
    return value


gymnasium.register("agentropy/Hosted-v0", entry_point=f"{__name__}:HostedEnv")
