"""A Java process, and calls into it by py4j's text protocol.

- ``Gateway``: one process and the one socket to it.
- ``Reference``: an object that lives in the process, until it is released.
- ``JavaError``: a Java method threw; the process goes on. ``GatewayError``: the process is gone or hangs.

Py4j's own client frees Java objects from finalizers, through further sockets and with log messages when the process is
no longer there. This one has nothing that runs by itself.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import tempfile
import weakref
from collections.abc import Sequence
from pathlib import Path

START_SECONDS = 60.0
CALL_SECONDS = 600.0
"""A call that takes longer hangs; the longest known takes 20 s."""
_JAVA_OPTIONS = ("JAVA_TOOL_OPTIONS", "_JAVA_OPTIONS", "JDK_JAVA_OPTIONS")
_ERROR_CHARACTERS = 2000


class JavaError(Exception):
    """A Java method threw; the message is Java's."""


class GatewayError(Exception):
    """The process is gone, hangs, or did not start."""


class Reference(str):
    """The name of an object that lives in the process."""

    __slots__ = ()


Value = Reference | str | int | float | bool | None


class Gateway:
    """A Java process that does what it is told through one socket; not for several threads at once.

    It ends when ``close`` is called and when this process ends in whatever way, since its standard input is a pipe from
    here.
    """

    def __init__(self, java: Path, options: Sequence[str], classpath: Sequence[Path], folder: Path) -> None:
        """Start the process.

        Args:
            java: the program.
            options: of the Java virtual machine.
            classpath: archives of classes; one of them is py4j's.
            folder: where the process runs.

        Raises:
            GatewayError: it did not start.
        """
        path = os.pathsep.join(map(str, classpath))
        command = [str(java), *options, "-classpath", path, "py4j.GatewayServer"]
        environment = {name: value for name, value in os.environ.items() if name not in _JAVA_OPTIONS}
        self._socket: socket.socket | None = None
        with tempfile.TemporaryFile() as errors:
            try:
                # Its own group, so that Control-C reaches it through this process only.
                self._process = subprocess.Popen(
                    [*command, "--die-on-broken-pipe", "--enable-auth", "0"],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    cwd=folder,
                    env=environment,
                    process_group=0,
                )
            except OSError as error:
                raise GatewayError(f"cannot run {java}: {error}") from error
            _live.add(self)
            try:
                self._connect()
            except (OSError, ValueError) as error:
                self.close()
                errors.seek(0)
                said = errors.read(_ERROR_CHARACTERS).decode("utf-8", "replace").strip()
                raise GatewayError(f"Java did not start ({error}){': ' if said else ''}{said}") from error

    @property
    def pid(self) -> int:
        """The process."""
        return self._process.pid

    def create(self, name: str, *arguments: Value) -> Reference:
        """Return a new object of the class ``name``."""
        made = self._ask(f"i\n{name}\n{_encode(arguments)}e\n")
        assert isinstance(made, Reference)
        return made

    def call(self, target: str, method: str, *arguments: Value) -> Value:
        """Call ``method`` of an object, or of a class where ``target`` is ``"z:"`` and its name.

        Raises:
            JavaError: the method threw, or there is none of this name and arguments.
            GatewayError: the process is gone or hangs.
        """
        return self._ask(f"c\n{target}\n{method}\n{_encode(arguments)}e\n")

    def refer(self, target: str, method: str, *arguments: Value) -> Reference:
        """``call`` for a method that returns an object."""
        value = self.call(target, method, *arguments)
        assert isinstance(value, Reference), f"{method} returned {value!r}"
        return value

    def text(self, target: str, method: str, *arguments: Value) -> str:
        """``call``, with the result as Java writes it."""
        value = self.call(target, method, *arguments)
        if isinstance(value, Reference):
            written = self.call(value, "toString")
            self.release(value)
            return str(written)
        return str(value)

    def release(self, reference: Reference) -> None:
        """Let the process forget an object; nothing happens when the process is gone."""
        if self._socket is not None:
            with contextlib.suppress(GatewayError):
                self._ask(f"m\nd\n{reference}\ne\n")

    @property
    def alive(self) -> bool:
        """Whether the process can be asked."""
        return self._socket is not None and self._process.poll() is None

    def close(self) -> None:
        """End the process; calling again does nothing."""
        self._disconnect()
        if self._process.poll() is None:
            self._process.kill()  # it holds nothing that must be saved
        self._process.wait()

    def _connect(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as said:
            port, token = int(said.readline()), said.readline().decode().strip()
        connection = socket.create_connection(("127.0.0.1", port), timeout=START_SECONDS)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._reader = connection.makefile("rb")
        self._socket = connection
        self._ask(f"A\n{token}\n")
        self._socket.settimeout(CALL_SECONDS)

    def _ask(self, command: str) -> Value:
        if self._socket is None:
            raise GatewayError("the Java process has ended")
        try:
            self._socket.sendall(command.encode("utf-8"))
            line = self._reader.readline()
        except TimeoutError as error:
            self.close()
            raise GatewayError(f"the Java process has not answered for {CALL_SECONDS:.0f} s") from error
        except OSError:
            line = b""
        answer = line.decode("utf-8")[1:-1]
        if not answer:
            self.close()
            raise GatewayError(f"the Java process has ended with status {self._process.returncode}")
        value = _decode(answer[1:])
        if answer[0] == "y":
            return value
        if isinstance(value, Reference):
            message = self.text(value, "toString")
            self.release(value)
            raise JavaError(message)
        raise JavaError(str(value).partition("\n")[0])

    def _disconnect(self) -> None:
        if self._socket is not None:
            self._reader.close()
            self._socket.close()
            self._socket = None
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()

    def _forget(self) -> None:
        """In a fork, which must neither keep the process alive nor talk to it."""
        self._disconnect()
        self._process.returncode = 0  # it is no child of the fork


_live: weakref.WeakSet[Gateway] = weakref.WeakSet()


def _after_fork() -> None:
    for gateway in list(_live):
        gateway._forget()


os.register_at_fork(after_in_child=_after_fork)


def _encode(arguments: Sequence[Value]) -> str:
    return "".join(f"{_argument(value)}\n" for value in arguments)


def _argument(value: Value) -> str:
    match value:
        case None:
            return "n"
        case bool():
            return f"b{str(value).lower()}"
        case Reference():
            return f"r{value}"
        case str():
            return "s" + value.replace("\\", "\\\\").replace("\r", "\\r").replace("\n", "\\n")
        case int():
            return f"i{value}" if -(2**31) <= value < 2**31 else f"L{value}"
        case float():
            return f"d{value!r}"


def _decode(answer: str) -> Value:
    kind, value = answer[:1], answer[1:]
    match kind:
        case "s":
            return _unescape(value)
        case "i" | "L":
            return int(value)
        case "d":
            return float(value)
        case "b":
            return value == "true"
        case "" | "n" | "v":
            return None
        case _:  # an object, array, list, map, set, iterator or class: all are called alike
            return Reference(value)


def _unescape(text: str) -> str:
    if "\\" not in text:
        return text
    parts = text.split("\\\\")
    return "\\".join(part.replace("\\r", "\r").replace("\\n", "\n") for part in parts)
