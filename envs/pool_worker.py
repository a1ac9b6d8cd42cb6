"""The worker's side of ``EnvPool``: hosts many environments in one process and serves requests in order.

- ``Frames``: length-prefixed pickles over a stream socket, so that no read ever blocks inside a message.
- ``Setup``, ``Ready``, ``Failure``: what a worker is told, what it answers, and an exception on its way home.
- ``serve``: the life of a worker, started by ``WorkerProcess`` in a fresh interpreter.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import os
import pickle
import queue
import resource
import signal
import socket
import struct
import sys
import threading
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import gymnasium

_LENGTH = struct.Struct("!Q")
_PR_SET_PDEATHSIG = 1
_CHANGES_STATE = frozenset({"reset", "step", "restore", "fork"})


@dataclass(frozen=True, slots=True)
class Setup:
    """How to make the environments. ``max_steps`` is the time limit, applied by the worker itself."""

    spec: gymnasium.envs.registration.EnvSpec
    kwargs: Mapping[str, Any]
    max_steps: int | None
    memory_limit: int | None
    """Bytes of private memory that this process and each one that it starts may have."""
    idle_seconds: float
    """After so long without a request, environments without an episode are closed."""
    die_with_parent: bool
    """Ask Linux for SIGKILL when the thread that started the worker ends: right only for a main thread."""


@dataclass(frozen=True, slots=True)
class Ready:
    """The first environment exists; which optional methods it has."""

    can_snapshot: bool
    can_list_tasks: bool


@dataclass(frozen=True, slots=True)
class Failure:
    """An exception raised by an environment. ``pickled`` is None where it does not survive pickling."""

    text: str
    pickled: bytes | None
    traceback: str

    @classmethod
    def of(cls, error: BaseException) -> Failure:
        """Describe ``error`` as its last traceback line and the innermost place it came from."""
        text = traceback.format_exception_only(error)[-1].strip()
        frames = traceback.extract_tb(error.__traceback__)
        if frames:
            text += f" ({os.path.basename(frames[-1].filename)}:{frames[-1].lineno}, in {frames[-1].name})"
        pickled = None
        with contextlib.suppress(Exception):
            pickled = pickle.dumps(error)
            pickle.loads(pickled)
        return cls(text, pickled, "".join(traceback.format_exception(error)))


class Frames:
    """Messages as an eight-byte length and a pickle; ``feed`` takes the stream in pieces of any size."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    @staticmethod
    def encode(message: Any) -> bytes:
        """Return the bytes of one message; raises whatever pickling raises."""
        body = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
        return _LENGTH.pack(len(body)) + body

    def feed(self, data: bytes) -> list[bytes]:
        """Take more of the stream and return the pickles that are now complete."""
        self._buffer += data
        bodies, start = [], 0
        while len(self._buffer) - start >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._buffer, start)
            end = start + _LENGTH.size + length
            if len(self._buffer) < end:
                break
            bodies.append(bytes(self._buffer[start + _LENGTH.size : end]))
            start = end
        del self._buffer[:start]
        return bodies


@dataclass(slots=True)
class _Episode:
    """One environment and how many steps its episode has taken."""

    env: gymnasium.Env[Any, Any]
    turn: int = 0
    over: bool = False


class _Host:
    """The environments of one worker, by slot. Environments of slots that moved away are reused."""

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self._episodes: dict[int, _Episode] = {}
        self._free = [self._make()]
        env = self._free[0]
        # Asked from the outside in: a wrapper with a state of its own has snapshots of its own.
        self.ready = Ready(
            can_snapshot=env.has_wrapper_attr("snapshot") and env.has_wrapper_attr("restore"),
            can_list_tasks=env.has_wrapper_attr("tasks"),
        )

    def _make(self) -> gymnasium.Env[Any, Any]:
        return gymnasium.make(self._setup.spec, **self._setup.kwargs)

    def rest(self) -> None:
        """Close the environments that no slot uses; a world's engine ends with the last of them."""
        for slot in [slot for slot, episode in self._episodes.items() if episode.over]:
            self._free.append(self._episodes.pop(slot).env)
        while self._free:
            with contextlib.suppress(Exception):
                self._free.pop().close()

    def _episode(self, slot: int) -> _Episode:
        if slot not in self._episodes:
            self._episodes[slot] = _Episode(self._free.pop() if self._free else self._make())
        return self._episodes[slot]

    def handle(self, op: str, slot: int, payload: Any) -> Any:
        """Serve one request. An episode whose environment raised is dropped: its state cannot be trusted."""
        try:
            return getattr(self, op)(slot, payload)
        except BaseException as error:
            if op in _CHANGES_STATE and slot in self._episodes:
                with contextlib.suppress(Exception):
                    self._episodes.pop(slot).env.close()
            return Failure.of(error)

    def reset(self, slot: int, payload: tuple[int | None, dict[str, Any] | None]) -> tuple[Any, dict[str, Any]]:
        seed, options = payload
        episode = self._episode(slot)
        episode.turn, episode.over = 0, False
        return episode.env.reset(seed=seed, options=options)

    def step(self, slot: int, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        episode = self._episodes[slot]
        observation, reward, terminated, truncated, info = episode.env.step(action)
        episode.turn += 1
        limit = self._setup.max_steps
        truncated = bool(truncated) or (limit is not None and episode.turn >= limit)
        episode.over = bool(terminated) or truncated
        return observation, float(reward), bool(terminated), truncated, info

    def snapshot(self, slot: int, _: None) -> tuple[int, Any]:
        episode = self._episodes[slot]
        return episode.turn, episode.env.get_wrapper_attr("snapshot")()

    def restore(self, slot: int, state: tuple[int, Any]) -> None:
        episode = self._episode(slot)
        (episode.turn, world), episode.over = state, False
        episode.env.get_wrapper_attr("restore")(world)

    def admissible(self, slot: int, _: None) -> tuple[str, ...]:
        return tuple(self._episodes[slot].env.get_wrapper_attr("admissible")())

    def fork(self, slot: int, source: int) -> None:
        self.restore(slot, self.snapshot(source, None))

    def release(self, slot: int, _: None) -> None:
        if slot in self._episodes:
            self._free.append(self._episodes.pop(slot).env)

    def tasks(self, _: int, split: str | None) -> tuple[str, ...]:
        if not self._free:
            self._free.append(self._make())
        return tuple(self._free[0].get_wrapper_attr("tasks")(split))

    def close(self) -> None:
        """Close every environment; one that raises does not keep the others open."""
        for env in [*self._free, *(episode.env for episode in self._episodes.values())]:
            with contextlib.suppress(Exception):
                env.close()


def _listen(channel: socket.socket, frames: Frames, requests: queue.SimpleQueue[bytes]) -> None:
    """Move requests from the socket to the queue, so that the parent never waits in a send.

    End of file means that the parent is gone: the whole process group dies, whatever the main thread does.
    """
    while data := _receive(channel):
        for body in frames.feed(data):
            requests.put(body)
    os.killpg(0, signal.SIGKILL)


def _receive(channel: socket.socket) -> bytes:
    """Return some bytes of the stream, none at its end."""
    try:
        return channel.recv(1 << 16)
    except OSError:
        return b""


def _send(channel: socket.socket, reply: Any) -> None:
    try:
        message = Frames.encode(reply)
    except Exception as error:  # an observation, info or snapshot that cannot be pickled
        message = Frames.encode(Failure.of(error))
    with contextlib.suppress(OSError):  # the parent is gone; the listener ends this process
        channel.sendall(message)


def _next(requests: queue.SimpleQueue[bytes], host: _Host, idle_seconds: float) -> bytes:
    """Wait for a request; rest once when it is long in coming."""
    try:
        return requests.get(timeout=idle_seconds)
    except queue.Empty:
        host.rest()
        return requests.get()


def serve(fd: int) -> None:
    """Serve the parent at the other end of socket ``fd``: a ``Setup``, then requests until ``None``."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    faulthandler.enable()
    channel, frames = socket.socket(fileno=fd), Frames()
    requests: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(channel, frames, requests), daemon=True).start()
    try:
        setup: Setup = pickle.loads(requests.get())
        if setup.die_with_parent and sys.platform == "linux":
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if setup.memory_limit is not None:
            _, most = resource.getrlimit(resource.RLIMIT_DATA)
            limit = setup.memory_limit if most == resource.RLIM_INFINITY else min(setup.memory_limit, most)
            resource.setrlimit(resource.RLIMIT_DATA, (limit, most))
        host = _Host(setup)
    except BaseException as error:
        _send(channel, Failure.of(error))
        return
    _send(channel, host.ready)
    while (request := pickle.loads(_next(requests, host, setup.idle_seconds))) is not None:
        reply = host.handle(*request)
        if request[0] != "release":
            _send(channel, reply)
    host.close()
