"""Monty for a process that was forked from one that had used it: another process runs it instead.

- ``relay``: this process's relay for some limits. ``Relay``: the process, and a connection to it.
- ``main``: what that process does.

A fork has none of the threads that the binding started before, and waits for them for ever.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import weakref
from multiprocessing.connection import Connection, Pipe
from typing import Any

from .interpreters import UNDONE, Ran, make_interpreter

_START = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from {0} import main; main(*sys.argv[2:])"
_relays: dict[tuple[int, float, int, int], Relay] = {}
_lock = threading.Lock()


class Relay:
    """A process that runs code from any state and returns the next one. Threads may share it."""

    def __init__(self, *limits: float) -> None:
        """Take the limits of an interpreter."""
        self._limits = limits
        self._lock = threading.Lock()
        self._connection: Connection[Any, Any] | None = None

    def run(self, state: bytes, code: str) -> tuple[Ran, bytes]:
        """Return what ``code`` led to and the state after it."""
        with self._lock:
            for _ in range(2):  # once more if the process had ended while it waited
                try:
                    connection = self._connection or self._start()
                    connection.send((state, code))
                    return connection.recv()
                except (EOFError, OSError):
                    self._connection = None
        return Ran(f"InterpreterError: the interpreter crashed{UNDONE}", False), state

    def _start(self) -> Connection[Any, Any]:
        ours, theirs = Pipe()
        arguments = [json.dumps(sys.path), str(theirs.fileno()), *map(str, self._limits)]
        process = subprocess.Popen(
            [sys.executable, "-c", _START.format(__name__), *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            pass_fds=(theirs.fileno(),),
            start_new_session=True,
        )
        theirs.close()
        weakref.finalize(ours, _end, process)
        self._connection = ours
        return ours


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()


def relay(time_limit: float, memory_mb: int, max_output: int) -> Relay:
    """Return the relay of this process for some limits; it ends with this process."""
    key = os.getpid(), time_limit, memory_mb, max_output
    with _lock:
        if key not in _relays:
            _relays[key] = Relay(*key[1:])
        return _relays[key]


def main(handle: str, time_limit: str, memory_mb: str, max_output: str) -> None:
    """Answer requests until the other end is closed."""
    connection: Connection[Any, Any] = Connection(int(handle))
    interpreter = make_interpreter(
        "monty", time_limit=float(time_limit), memory_mb=int(memory_mb), max_output=int(max_output)
    )
    try:
        while True:
            state, code = connection.recv()
            interpreter.load(state)
            ran = interpreter.run(code)
            connection.send((ran, interpreter.save()))
    except (EOFError, OSError):
        interpreter.close()
