"""What must end or vanish with this process, even when it is killed.

- ``PrivateFolder``: a temporary folder, removed when it is closed or this process ends, however it ends.
- ``Guarded``: a program that is killed, with all that it starts, when this process ends.

Both rest on a shell that waits at a pipe whose other end only this process holds.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import threading
import weakref
from collections.abc import Mapping, Sequence

_REMOVE = 'trap "" HUP INT TERM; while read -r _; do :; done; sleep 0.1; rm -rf -- "$1"'
# The shell leads a session, so that 0 means the program and whatever it started. Its own input is the pipe to wait at;
# the program's is the descriptor that $0 names.
_GUARD = '"$@" <"/dev/fd/$0" & exec 1>/dev/null; while read -r _; do :; done; kill -9 0'


class PrivateFolder:
    """An empty folder that only its user can enter; ``path`` is where."""

    _lock = threading.Lock()
    _root: tuple[int, str, subprocess.Popen[bytes]] | None = None
    """The process, its folder of such folders, and the shell that removes it."""
    _users = 0

    def __init__(self) -> None:
        """Make it, in a folder that goes with this process."""
        cls = PrivateFolder
        with cls._lock:
            if cls._root is None or cls._root[0] != os.getpid():
                root = tempfile.mkdtemp(prefix="agentropy-")
                cls._root, cls._users = (os.getpid(), root, _janitor(root)), 0
            cls._users += 1
            self.path = tempfile.mkdtemp(dir=cls._root[1])
        self.close = weakref.finalize(self, _remove, self.path, os.getpid())
        """Remove it with all that is in it; a second call changes nothing."""


def _remove(path: str, owner: int) -> None:
    if os.getpid() != owner:
        return  # in a fork of the process that made it
    shutil.rmtree(path, ignore_errors=True)
    cls = PrivateFolder
    with cls._lock:
        cls._users -= 1
        if cls._users == 0 and cls._root is not None and cls._root[0] == owner:
            _, root, janitor = cls._root
            cls._root = None
            shutil.rmtree(root, ignore_errors=True)
            janitor.kill()
            janitor.communicate()


def _janitor(root: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        ["/bin/sh", "-c", _REMOVE, "janitor", root],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd="/",
        env={"PATH": os.defpath},
        start_new_session=True,
    )


class Guarded:
    """A running program, its input (``requests``) and its output (``replies``), both descriptors."""

    def __init__(self, command: Sequence[str], env: Mapping[str, str] | None, cwd: str | None) -> None:
        """Start it; what it writes to its standard error is dropped."""
        wait_at, lifeline = os.pipe()
        theirs, self.requests = os.pipe()
        self.replies, output = os.pipe()
        try:
            self._process = subprocess.Popen(
                ["/bin/sh", "-c", _GUARD, str(theirs), *command],
                stdin=wait_at,
                stdout=output,
                stderr=subprocess.DEVNULL,
                pass_fds=(theirs,),
                env=None if env is None else dict(env),
                cwd=cwd,
                start_new_session=True,
            )
        finally:
            for pipe in (wait_at, theirs, output):
                os.close(pipe)
        os.set_blocking(self.requests, False)
        os.set_blocking(self.replies, False)
        pipes = lifeline, self.requests, self.replies
        self.close = weakref.finalize(self, _kill, self._process, pipes, os.getpid())
        """End the program; a second call changes nothing."""


def _kill(process: subprocess.Popen[bytes], pipes: tuple[int, ...], owner: int) -> None:
    for pipe in pipes:
        os.close(pipe)
    if os.getpid() == owner:  # not in a fork of the process that started it, which still uses it
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
