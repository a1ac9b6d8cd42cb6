"""The parent's side of one pool worker: a fresh interpreter at the other end of a socket.

- ``Call``: a request that awaits its reply; a worker replies in the order of the requests.
- ``WorkerProcess``: start, send, receive, deadline, kill.
- ``raise_failure``: an environment's exception, raised again in the parent.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from dataclasses import dataclass, replace
from typing import Any, NoReturn

from ..errors import EnvironmentFailedError
from .pool_worker import Failure, Frames, Ready, Setup

_EXIT_SECONDS = 2.0
"""How long a worker whose stream has ended may take to exit, so that its exit code can be told."""
_PAGE = resource.getpagesize()
_NO_REPLY = object()
_BOOT = f"""import sys
fd, sys.path[:], sys.argv[1:] = int(sys.argv[1]), sys.argv[2:], []
from {__package__}.pool_worker import serve
serve(fd)"""
"""The worker's program: it finds every module that the parent finds."""


@dataclass(slots=True, eq=False)
class Call:
    """A request on its way. ``slot`` is None for calls that a method of the pool blocks on."""

    op: str
    slot: int | None = None
    reply: Any = _NO_REPLY

    @property
    def done(self) -> bool:
        return self.reply is not _NO_REPLY


class WorkerProcess:
    """One worker, restartable. One that takes ``timeout`` seconds for a request, or ``start_timeout`` to start, hangs.

    The interpreter is started afresh (``fork`` would copy torch's threads in an undefined state) and, unlike
    multiprocessing's spawn, never imports the parent's main module: scripts need no ``__main__`` guard, and
    ``python -c`` and standard input work.
    """

    def __init__(self, index: int, setup: Setup, timeout: float, start_timeout: float) -> None:
        self.index = index
        self.calls: deque[Call] = deque()
        self.channel: socket.socket | None = None
        self.ready: Ready | None = None
        self._setup = setup
        self._timeout = timeout
        self._start_timeout = start_timeout
        self._deadline = 0.0
        self._stuck = False
        self._complaint = ""
        self.fresh = 0

    def start(self) -> Call:
        """Start the process; the call returned is answered once its first environment exists."""
        self.channel, other = socket.socketpair()
        self.channel.settimeout(self._timeout)
        self._frames = Frames()
        self.ready = None
        self._stuck = False
        self._complaint = ""
        with other:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-c", _BOOT, str(other.fileno()), *map(str, sys.path)],
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                stdin=subprocess.DEVNULL,
                stdout=2,  # what a world prints must not mix with the parent's own output
                pass_fds=(other.fileno(),),
                process_group=0,  # Ctrl-C is for the parent alone; one kill ends grandchildren too
            )
        main_thread = threading.current_thread() is threading.main_thread()
        call = Call("start")
        self._post(replace(self._setup, die_with_parent=main_thread), call)
        return call

    @property
    def memory(self) -> int:
        """Resident memory of the process in bytes; 0 where it cannot be told."""
        try:
            with open(f"/proc/{self.process.pid}/statm") as file:
                _, resident, shared, *_ = map(int, file.read().split())
                return (resident - shared) * _PAGE
        except (OSError, ValueError, IndexError):
            return 0

    def request(self, call: Call, payload: Any = None, slot: int | None = None) -> Call:
        """Send a request; ``slot`` is the environment it is about, by default the call's own."""
        self._post((call.op, call.slot if slot is None else slot, payload), call)
        return call

    def release(self, slot: int) -> None:
        """Let the worker reuse a slot's environment; there is no reply."""
        if self.channel is not None:
            self._post(("release", slot, None), None)

    def _post(self, message: Any, call: Call | None) -> None:
        assert self.channel is not None
        data = Frames.encode(message)
        if call is not None:
            if not self.calls:
                self._deadline = time.monotonic() + self._patience(call)
            self.calls.append(call)
        try:
            self.channel.sendall(data)
        except TimeoutError:  # it reads nothing, and now has half a message
            self._stuck = True
        except OSError:
            pass  # it died: the next read finds the end of the stream, and every call fails there

    def _patience(self, call: Call) -> float:
        return self._start_timeout if call.op == "start" else self._timeout

    @property
    def deadline(self) -> float | None:
        """When the request in progress counts as hung (``time.monotonic``); None where there is none."""
        if self._stuck:
            return 0.0
        return self._deadline if self.calls else None

    def receive(self) -> tuple[list[Call], bool]:
        """Read what has arrived, without blocking: the calls now answered, and whether the stream ended."""
        assert self.channel is not None
        try:
            data = os.read(self.channel.fileno(), 1 << 20)
        except BlockingIOError:
            return [], False
        except OSError:
            data = b""
        answered = []
        for body in self._frames.feed(data):
            call = self.calls.popleft()
            try:
                call.reply = pickle.loads(body)
            except Exception as error:  # a class that exists in the worker only
                call.reply = Failure.of(error)
            if call.op == "start":
                if isinstance(call.reply, Ready):
                    self.ready = call.reply
                    self.fresh = self.memory
                else:
                    self._complaint = f": {call.reply.text}"
            answered.append(call)
        if answered:
            self._deadline = time.monotonic() + self._timeout
        return answered, not data

    def bury(self, hung: bool) -> tuple[str, list[Call]]:
        """End the process; return what happened in one sentence, and the calls that it will never answer."""
        name = f"pool worker {self.index} (pid {self.process.pid})"
        patience = self._patience(self.calls[0]) if self.calls else self._timeout
        code = self.kill(grace=0.0 if hung else _EXIT_SECONDS)
        if hung:
            reason = f"{name} gave no answer for {patience:g} s and was killed"
        elif code < 0:
            reason = f"{name} died: {signal.Signals(-code).name}"
        else:
            reason = f"{name} died: exit code {code}{self._complaint}"
        calls = list(self.calls)
        self.calls.clear()
        return reason, calls

    def say_goodbye(self) -> None:
        """Ask the worker to close its environments and exit."""
        if self.channel is not None:
            with contextlib.suppress(OSError):
                self.channel.settimeout(0)
                self.channel.sendall(Frames.encode(None))

    def kill(self, grace: float = 0.0) -> int:
        """End the process and its children after at most ``grace`` seconds; return the exit code."""
        if self.channel is None:
            return 0
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(grace)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.channel.close()
        self.channel = None
        return self.process.wait()


def raise_failure(failure: Failure) -> NoReturn:
    """Raise what the environment raised: the same type where it can be unpickled here."""
    error = None
    if failure.pickled is not None:
        with contextlib.suppress(Exception):
            error = pickle.loads(failure.pickled)
    if not isinstance(error, Exception):
        error = EnvironmentFailedError(failure.text)
    error.add_note(f"In a pool worker:\n{failure.traceback}")
    raise error
