"""Monty: a subset of Python in Rust, in worker processes that many interpreters share.

- ``MontyInterpreter``: no imports from outside, no files, no network, no threads; its state is a string of bytes.
- ``report``: whether this machine has it, and what confines its workers.

A point of an episode is what the worker wrote down of its session, so that going back is free and the next call costs
the reading of it, unless the worker still holds that very point. The clock stands still and random numbers repeat in
every episode. Workers run under Landlock and seccomp where the machine has them.
"""

from __future__ import annotations

import ast
import contextlib
import ctypes
import datetime
import importlib.util
import os
import shlex
import sys
import threading
import weakref
from functools import cache
from pathlib import Path
from typing import Any

from ...extras import require
from .interpreters import OUTPUT_BYTES, Interpreter, Ran, SandboxReport

_GRACE_SECONDS = 0.5
"""How long after its time limit a worker that does not stop by itself is killed."""
_TURN_SECONDS = 60.0
_WORKERS = 2
_HEADROOM = 1 << 29
"""Address space of a worker beyond what code may take."""
_MOST_ECHO = 1 << 15
_MOST_ROUND_TRIPS = 10_000
_POLICY: Any = {"datetime": datetime.datetime(2026, 1, 1), "sleep": "zero", "random_start": {"seed": 0}}
_FULL = ("MemoryError: memory limit exceeded", "MemoryError: the worker exceeded its memory limit")
_CRASHED = "InterpreterError: the interpreter crashed"


class MontyInterpreter(Interpreter):
    """A session of Monty that lives in whichever worker is free."""

    name = "monty"

    def __init__(self, time_limit: float, memory_mb: int, max_output: int) -> None:
        """Take the limits.

        Raises:
            MissingDependencyError: pydantic-monty is not installed.
        """
        require("interpreter 'monty'", "tools", {"pydantic_monty": "pydantic-monty"})
        super().__init__(time_limit, memory_mb, max_output)
        self._state = b""
        self._lease: Any = None

    def run(self, code: str) -> Ran:
        if _forked():  # Monty's own threads stayed in the process that this one was forked from
            from .monty_relay import relay

            ran, self._state = relay(self.time_limit, self.memory_mb, self.max_output).run(self._state, code)
            return ran
        printed, error, fate = self._attempt(code)
        if fate == _CRASHED:  # perhaps the worker had died before, while it waited
            printed, error, fate = self._attempt(code)
        return self._ran(printed, error, fate)

    def _attempt(self, code: str) -> tuple[str, str, str]:
        """Return what ``code`` printed, its error, and what stopped it, if anything did."""
        from pydantic_monty import CollectString, MontyCrashedError, MontyError, MontyRuntimeError, MontySyntaxError

        workers = self._workers()
        session = workers.take(self._state)
        printed = CollectString(OUTPUT_BYTES)
        error, fate = "", ""
        try:
            session.feed(_echoing(code), printed)
        except MontyCrashedError as crash:
            fate = self._timeout() if crash.timed_out or "time limit" in str(crash) else _CRASHED
        except (MontyRuntimeError, MontySyntaxError) as caught:
            error, fate = self._explain(caught, code, len(printed.output))
        except MontyError as caught:
            error = f"{type(caught).__name__}: {caught}"
        except Exception as caught:  # what the binding itself cannot take
            error = f"InterpreterError: {type(caught).__name__}: {caught}"
        if not fate:
            try:
                self._state = session.dump()
            except (MontyError, RuntimeError):  # the latter where the worker has gone already
                fate = _CRASHED
        workers.give(session, b"" if fate else self._state)
        return printed.output, error, fate

    def clear(self) -> None:
        self._state = b""

    def save(self) -> bytes:
        return self._state

    def load(self, state: bytes) -> None:
        self._state = state

    def close(self) -> None:
        if self._lease is not None:
            self._lease()
            self._lease = None

    def _workers(self) -> _Workers:
        """Return this process's workers with these limits."""
        key = os.getpid(), self.time_limit, self.memory_mb
        if self._lease is None or not self._lease.alive or self._key != key:
            self._key = key
            self._shared = _share(key)
            self._lease = weakref.finalize(self, _unshare, key)
        return self._shared

    _key: tuple[int, float, int]
    _shared: _Workers

    def _explain(self, caught: Any, code: str, printed: int) -> tuple[str, str]:
        """Return the error in one line, and what stopped the code if it was a limit."""
        text = caught.display("type-msg")
        if text.startswith(_FULL):
            if f"> {OUTPUT_BYTES} bytes" in text or printed >= OUTPUT_BYTES:
                return "", "OutputError: stopped, the code printed too much"
            return "", f"MemoryError: stopped, the code needs more than {self.memory_mb} MiB"
        if text.startswith("TimeoutError: feed time limit exceeded"):
            return "", self._timeout()
        if text.startswith("RuntimeError") and "suspension" in text:
            return "", "RuntimeError: stopped, too many look-ups of unknown names"
        frames = caught.traceback()
        line = frames[-1].line if frames else 0
        return (f"{text} (line {line})" if 0 < line <= code.count("\n") + 1 else text), ""

    def _timeout(self) -> str:
        return f"TimeoutError: stopped after {self.time_limit:g} s"


class _Session:
    """One worker, and a session in it."""

    def __init__(self, pool: Any, limits: dict[str, Any]) -> None:
        self._pool, self._limits = pool, limits
        self._session: Any = None
        self.state: bytes | None = None
        """The point that the session is at; None where it is none that may be used."""

    def at(self, state: bytes) -> None:
        """Bring the session to ``state``, unless it is there."""
        if self.state is state and self._session is not None:
            return
        self.leave()
        self._session = self._pool.checkout(
            script_name="python", limits=self._limits, os_policy=_POLICY, assert_message_annotations=False
        )
        self._session.__enter__()
        if state:
            self._session.load_session(state)

    def feed(self, code: str, printed: Any) -> None:
        self._session.feed_run(code, print_callback=printed)

    def dump(self) -> bytes:
        return self._session.dump()

    @property
    def held(self) -> Any:
        """The binding's object."""
        return self._session

    def leave(self) -> None:
        session, self._session, self.state = self._session, None, None
        if session is not None:
            session.__exit__(None, None, None)


class _Workers:
    """The worker processes of this process, for calls with the same limits. Threads may share them."""

    def __init__(self, seconds: float, memory: int) -> None:
        from pydantic_monty import Monty

        global _started_in
        _started_in = os.getpid()
        self.users = 0
        self._limits = {
            "max_feed_duration_secs": seconds,
            "max_memory": memory,
            "max_suspensions": _MOST_ROUND_TRIPS,
        }
        self._condition = threading.Condition()
        self._launcher = _Launcher(memory + _HEADROOM) if _confinable() else None
        self._pool = Monty(
            binary_path=self._launcher.path if self._launcher else None,
            min_processes=0,
            max_processes=_WORKERS,
            request_timeout=_TURN_SECONDS + seconds,
            feed_duration_limit_grace=_GRACE_SECONDS,
            max_checkouts_per_worker=10_000,
        )
        self._pool.__enter__()
        self._idle: list[_Session] = []
        self._all: list[_Session] = []

    def take(self, state: bytes) -> _Session:
        """Return a session that is at ``state``; it belongs to the caller until ``give``."""
        from pydantic_monty import MontyError

        with self._condition:
            while not self._idle and len(self._all) >= _WORKERS:
                self._condition.wait()
            session = next((one for one in self._idle if one.state is state), None)
            if session is not None:
                self._idle.remove(session)
            elif self._idle:
                session = self._idle.pop(0)  # the one that was used longest ago
            else:
                session = _Session(self._pool, self._limits)
                self._all.append(session)
        try:
            try:
                session.at(state)
            except MontyError:  # the worker died while it was idle
                session.leave()
                session.at(state)
        except BaseException:
            self.give(session, b"")
            raise
        return session

    def give(self, session: _Session, state: bytes) -> None:
        """Take a session back that is at ``state``; empty where it must not be used as it is."""
        if state:
            session.state = state
        else:
            session.leave()
        with self._condition:
            self._idle.append(session)
            self._condition.notify()

    def never_free(self) -> None:
        """Keep what belongs to another process: freeing it here would end that process's workers."""
        for thing in (self._pool, *(session.held for session in self._all)):
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(thing))

    def close(self) -> None:
        for session in self._idle:
            session.leave()
        self._pool.__exit__(None, None, None)
        if self._launcher is not None:
            self._launcher.close()


class _Launcher:
    """A shell script in memory that confines a process and turns it into a worker; no file is left of it."""

    def __init__(self, memory: int) -> None:
        from pydantic_monty._binary import find_monty_binary

        lockdown = Path(__file__).with_name("sandbox_lockdown.py")
        command = [sys.executable, "-P", "-s", "-S", "-B", str(lockdown), str(memory), find_monty_binary()]
        self._handle = os.memfd_create("agentropy-worker", os.MFD_CLOEXEC)
        os.write(self._handle, f'#!/bin/sh\nexec {shlex.join(command)} "$@"\n'.encode())
        self.path = f"/proc/{os.getpid()}/fd/{self._handle}"

    def close(self) -> None:
        os.close(self._handle)


_lock = threading.Lock()
_shared: dict[tuple[int, float, int], _Workers] = {}
_started_in: int | None = None
"""The process that has used Monty, if this one or one that it was forked from has."""


def _forked() -> bool:
    return _started_in is not None and _started_in != os.getpid()


def _after_fork() -> None:
    global _lock
    _lock = threading.Lock()
    for workers in _shared.values():
        workers.never_free()


os.register_at_fork(after_in_child=_after_fork)


def _share(key: tuple[int, float, int]) -> _Workers:
    with _lock:
        if key not in _shared:
            _shared[key] = _Workers(key[1], key[2] << 20)
        _shared[key].users += 1
        return _shared[key]


def _unshare(key: tuple[int, float, int]) -> None:
    if key[0] != os.getpid():
        return
    with _lock:
        workers = _shared[key]
        workers.users -= 1
        if not workers.users:
            del _shared[key]
            workers.close()


def _echoing(code: str) -> str:
    """Return ``code`` such that a last line that is an expression prints its value, and that its value is None.

    Monty hands the value of the last line to this process as an object, which can be made to fill its memory: a list
    of ten lists of ten lists. So it is printed over there.
    """
    if len(code) <= _MOST_ECHO:
        with contextlib.suppress(SyntaxError, ValueError, MemoryError, RecursionError):
            body = ast.parse(code).body
            if body and isinstance(body[-1], ast.Expr):
                at = body[-1]
                lines = code.encode().split(b"\n")
                if _plain_lines(code) and at.end_lineno is not None and at.end_col_offset is not None:
                    last, first = at.end_lineno - 1, at.lineno - 1
                    lines[last] = lines[last][: at.end_col_offset] + b")" + lines[last][at.end_col_offset :]
                    lines[first] = lines[first][: at.col_offset] + b"_ = (" + lines[first][at.col_offset :]
                    echo = b"\nif _ is not None: print(repr(_))"
                    return (b"\n".join(lines) + echo).decode()
    return code + "\nNone"


def _plain_lines(code: str) -> bool:
    """Whether the parser counts lines as ``split`` does."""
    return "\r" not in code and "\f" not in code


@cache
def _confinable() -> bool:
    """Whether workers run under Landlock and seccomp here."""
    from . import sandbox_lockdown

    return bool(sandbox_lockdown.support()) and hasattr(os, "memfd_create") and os.path.exists("/bin/sh")


def report() -> SandboxReport:
    """Return what confines Monty here."""
    if importlib.util.find_spec("pydantic_monty") is None:
        return SandboxReport("monty", False, (), 'not installed; run: pip install "agentropy[tools]"')
    from . import sandbox_lockdown

    kernel = (*sandbox_lockdown.support(), "no capabilities", "resource limits") if _confinable() else ()
    return SandboxReport("monty", True, ("an interpreter without operating system calls", *kernel))
