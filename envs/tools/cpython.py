"""CPython in a process of its own, confined by the kernel.

- ``CPythonInterpreter``: all of Python and its standard library, under Landlock, seccomp and limits.
- ``report``: whether this machine can do that. It is refused where Landlock or seccomp is missing.

The state lives in the child, so a point of an episode is the code that led to it. Coming back runs that code again and
compares what it printed.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import select
import signal
import struct
import subprocess
import sys
import time
import weakref
from dataclasses import dataclass
from pathlib import Path

from ...errors import EnvironmentFailedError, UsageError
from .interpreters import OUTPUT_BYTES, Interpreter, Ran, SandboxReport
from .janitor import PrivateFolder

_NONCE = 16
_START_SECONDS = 30.0
_FOLDER_BYTES, _FOLDER_FILES = 16 << 20, 256
_WATCH_SECONDS = 0.02
_MOST_ERROR = 1 << 14
_ENVIRONMENT = {"PYTHONHASHSEED": "0", "PYTHONIOENCODING": "utf-8:replace", "PYTHONUTF8": "1"}


@dataclass(frozen=True, slots=True)
class Cells:
    """The code that leads to a point, and a hash of all that it printed."""

    codes: tuple[str, ...] = ()
    digest: bytes = b""

    def after(self, code: str, text: str) -> Cells:
        return Cells((*self.codes, code), hashlib.blake2b(self.digest + text.encode(), digest_size=16).digest())


class CPythonInterpreter(Interpreter):
    """CPython as it is installed, with its standard library; no installed packages, no threads, no processes."""

    name = "cpython"

    def __init__(self, time_limit: float, memory_mb: int, max_output: int) -> None:
        """Take the limits.

        Raises:
            UsageError: this machine cannot confine a process.
        """
        super().__init__(time_limit, memory_mb, max_output)
        able = report()
        if not able.available:
            raise UsageError(f"interpreter 'cpython' is refused: {able.reason}; interpreter='monty' runs anywhere")
        self._cells = Cells()
        self._at = self._cells
        """Where the child is."""
        self._child: _Child | None = None

    def run(self, code: str) -> Ran:
        try:
            child = self._ready()
        except _NotRepeatedError:
            self._cells = Cells()
            return Ran("InterpreterError: the variables of earlier calls are lost; nothing was run", False)
        printed, error, fate = child.run(code, self.time_limit)
        ran = self._ran(printed, error, fate)
        if fate:
            self.close()
        else:
            self._at = self._cells = self._cells.after(code, ran.text)
        return ran

    def clear(self) -> None:
        self._cells = Cells()
        if self._child is not None and self._at.codes:
            self.close()
            self._child, self._at = self._new(), Cells()  # starts while the agent reads its next task

    def save(self) -> Cells:
        return self._cells

    def load(self, state: Cells) -> None:
        self._cells = state
        self._ready()

    def close(self) -> None:
        if self._child is not None:
            self._child.close()
            self._child = None

    def _ready(self) -> _Child:
        """Return a child that is at the current point."""
        moved = self._at is not self._cells and bool(self._at.codes)  # one that has run nothing is as good as a new one
        if self._child is not None and (moved or not self._child.alive()):
            self.close()
        if self._child is None:
            self._child, self._at = self._new(), Cells()
        self._child.greet()
        if self._at != self._cells:
            for code in self._cells.codes[len(self._at.codes) :]:
                printed, error, fate = self._child.run(code, self.time_limit * 2)
                self._at = self._at.after(code, self._ran(printed, error, fate).text)
                if fate:
                    break
            if self._at != self._cells:
                self.close()
                raise _NotRepeatedError("the code of this episode did not print the same when it was run again")
        self._at = self._cells
        return self._child

    def _new(self) -> _Child:
        return _Child(self.memory_mb << 20)


class _NotRepeatedError(EnvironmentFailedError):
    """Code that was run again to come back to a point led to another."""


class _Child:
    """One process that runs code, and the folder it may write."""

    def __init__(self, memory: int) -> None:
        self._folder = PrivateFolder()
        with contextlib.ExitStack() as stack:
            theirs = []
            for name in ("requests", "replies", "output"):
                reading, writing = os.pipe()
                mine, other = (writing, reading) if name == "requests" else (reading, writing)
                stack.callback(os.close, other)
                os.set_blocking(mine, False)
                setattr(self, "_" + name, mine)
                theirs.append(other)
            driver = Path(__file__).with_name("sandbox_driver.py")
            flags = ["-P", "-s", "-S", "-B"]
            numbers = [*theirs[:2], os.getpid(), memory, 0]
            self._process = subprocess.Popen(
                [sys.executable, *flags, str(driver), *map(str, numbers)],
                stdin=subprocess.DEVNULL,
                stdout=theirs[2],
                stderr=theirs[2],
                pass_fds=theirs[:2],
                cwd=self._folder.path,
                env=_ENVIRONMENT,
                start_new_session=True,
            )
        self._owner = os.getpid()
        pipes = self._requests, self._replies, self._output
        self._end = weakref.finalize(self, _end, self._process, pipes, self._folder, self._owner)
        self._greeted = False

    def greet(self) -> None:
        """Wait until it is confined.

        Raises:
            EnvironmentFailedError: it could not be.
        """
        if not self._greeted:
            hello = self._converse(b"", 4, _START_SECONDS)[0]
            if b"Landlock" not in hello or b"seccomp" not in hello:
                self.close()
                raise EnvironmentFailedError("the Python interpreter could not be confined, so it was not started")
            self._greeted = True

    _requests: int
    _replies: int
    _output: int

    def alive(self) -> bool:
        """Whether it runs, and was started by this process."""
        return self._owner == os.getpid() and self._process.poll() is None

    def close(self) -> None:
        self._end()

    def run(self, code: str, seconds: float) -> tuple[str, str, str]:
        """Return what ``code`` printed, its error, and what ended the process, if anything did."""
        data, nonce = code.encode("utf-8", "replace"), os.urandom(_NONCE)
        request = struct.pack(f"<{_NONCE}sI", nonce, len(data)) + data
        self._process.send_signal(signal.SIGCONT)
        reply, printed, fate = self._converse(request, _NONCE + 4, seconds)
        # Code that sent the reply by itself might still be running. Nothing runs between two calls.
        self._process.send_signal(signal.SIGSTOP)
        fate = fate or self._too_full()
        if not fate and reply[:_NONCE] != nonce:
            fate = "InterpreterError: the code wrote into the interpreter's own channel"
        return self._text(printed), self._text(reply[_NONCE + 4 :]), fate

    def _text(self, data: bytes) -> str:
        """Decode, and give the folder, whose name is another one every time, a fixed name."""
        return data.decode("utf-8", "replace").replace(self._folder.path, "/sandbox")

    def _converse(self, request: bytes, head: int, seconds: float) -> tuple[bytes, bytes, str]:
        """Send ``request`` and wait for a reply: ``head`` bytes, of which the last four say how many follow."""
        deadline = time.monotonic() + seconds
        watched = time.monotonic()
        reply, printed = bytearray(), bytearray()
        left = memoryview(request)
        poll = select.poll()
        for pipe in (self._replies, self._output):
            poll.register(pipe, select.POLLIN)
        poll.register(self._requests, select.POLLOUT if left else 0)
        expected = head
        while True:
            now = time.monotonic()
            if now > deadline:
                return bytes(reply), bytes(printed), f"TimeoutError: stopped after {seconds:g} s"
            if now > watched + _WATCH_SECONDS:
                watched = now
                if fate := self._too_full():
                    return bytes(reply), bytes(printed), fate
            for pipe, event in poll.poll(1000 * min(_WATCH_SECONDS, deadline - now)):
                if pipe == self._requests:
                    try:
                        left = left[os.write(pipe, left[: 1 << 16]) :] if left else left
                    except BlockingIOError:
                        continue
                    except BrokenPipeError:
                        return b"", bytes(printed), self._death()
                    if not left:
                        poll.unregister(pipe)
                elif pipe == self._output:
                    part = _read(pipe)
                    printed += part
                    if not part and event & select.POLLHUP:
                        poll.unregister(pipe)
                else:
                    part = _read(pipe)
                    reply += part
                    if not part:
                        return b"", bytes(printed), self._death()
            if len(printed) > OUTPUT_BYTES:
                return bytes(reply), bytes(printed), "OutputError: stopped, the code printed too much"
            if len(reply) >= head and expected == head:
                expected = head + struct.unpack("<I", reply[head - 4 : head])[0]
            if len(reply) > head + _MOST_ERROR or (len(reply) >= head and len(reply) > expected):
                return b"", bytes(printed), "InterpreterError: the code wrote into the interpreter's own channel"
            if len(reply) >= head and len(reply) == expected:
                while part := _read(self._output):  # printed before the reply was sent, so it is there
                    printed += part
                    if len(printed) > OUTPUT_BYTES:
                        break
                return bytes(reply), bytes(printed), ""

    def _death(self) -> str:
        """Say how the process ended."""
        try:
            code = self._process.wait(1)
        except subprocess.TimeoutExpired:
            return "InterpreterError: the code closed the interpreter's own channel"
        if code < 0:
            return f"InterpreterError: the code crashed the interpreter ({signal.Signals(-code).name})"
        return f"InterpreterError: the code ended the interpreter (exit status {code})"

    def _too_full(self) -> str:
        with os.scandir(self._folder.path) as entries:
            sizes = [_size(entry) for entry in entries]
        if sum(sizes) > _FOLDER_BYTES or len(sizes) > _FOLDER_FILES:
            return f"DiskError: stopped, files may take {_FOLDER_BYTES >> 20} MiB in all and be {_FOLDER_FILES}"
        return ""


def report() -> SandboxReport:
    """Return what confines CPython here."""
    from . import sandbox_lockdown

    means = sandbox_lockdown.support()
    if not means:
        reason = "it needs Linux 5.13 or newer with Landlock and seccomp, on x86-64 or ARM64"
        return SandboxReport("cpython", False, (), reason)
    return SandboxReport("cpython", True, (*means, "no capabilities", "resource limits", "own session"))


def _size(entry: os.DirEntry[str]) -> int:
    try:
        return entry.stat(follow_symlinks=False).st_blocks * 512
    except OSError:
        return 0


def _read(pipe: int) -> bytes:
    try:
        return os.read(pipe, 1 << 16)
    except BlockingIOError:
        return b""


def _end(process: subprocess.Popen[bytes], pipes: tuple[int, ...], folder: PrivateFolder, owner: int) -> None:
    """Kill the process and all it may have started, and remove its folder."""
    for pipe in pipes:
        os.close(pipe)
    if os.getpid() != owner:
        return  # in a fork of the process that started it, which still uses it
    with contextlib.suppress(ProcessLookupError):
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    folder.close()
