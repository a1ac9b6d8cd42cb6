"""The client's side of a server.

- ``Connection``: sends a request until it is answered, or until patience ends; shared by all sessions of a process.
- ``RemoteSession``: one environment there.
- ``SessionGone``, ``EpisodeLost``, ``ForeignSnapshot``: failures that a client may recover from.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib.util
import os
import random
import secrets
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

import httpx
from gymnasium.error import ResetNeeded

from ...errors import EnvironmentFailedError, UsageError, nearest
from . import wire
from .settings import is_loopback
from .wire import Code

FORMS = {"json": wire.JSON, "msgpack": wire.MSGPACK}
_FIRST_SECONDS = 15.0
"""How long to try a server that has never answered: it is more likely absent than slow."""
_CONNECT_SECONDS = 5.0
_ATTEMPT_SECONDS = 15.0
"""After which a request without an answer is sent again; the server plays it once all the same."""
_OPENINGS = 3
"""How often to ask for a session whose process died meanwhile."""
_GOODBYE_SECONDS = 2.0
_LONGEST_PAUSE = 2.0
_KEEP_SECONDS = 60.0
"""How long an idle socket is kept: less than the server does."""
_GATEWAY = (502, 504)


class SessionGone(EnvironmentFailedError):
    """The server does not know the session any more."""


class EpisodeLost(EnvironmentFailedError):
    """The process that played the episode died; the session can go on with another one."""


class ForeignSnapshot(UsageError):
    """The snapshot was signed by another server, or before this one was started again."""


class UnreachableError(EnvironmentFailedError):
    """No answer came in time; whether the request was played is not known."""


class Connection:
    """A server, as one process sees it. Safe for threads; not for use after a fork, for which ``connect`` cares."""

    def __init__(self, url: str, token: str | None) -> None:
        """Remember the address; nothing is sent.

        Raises:
            UsageError: it is no URL.
        """
        try:
            parsed = httpx.URL(url)
        except (httpx.InvalidURL, TypeError) as error:
            raise UsageError(f"not a URL: {url!r} ({error})") from error
        if parsed.scheme not in ("http", "https") or not parsed.host:
            raise UsageError(f"a server's URL is like http://127.0.0.1:8321, not {url!r}")
        self.url = url
        self.pid = os.getpid()
        self.users = 0
        self.open: set[str] = set()
        """Names of the sessions that this process has at the server."""
        self._abandoned: deque[str] = deque()
        self._answered = False
        self._server: str | None = None
        """The run of the server that answered last."""
        self._pauses = random.Random(secrets.randbits(64))
        self._options: dict[str, Any] = {
            "base_url": url,
            "headers": {} if token is None else {"authorization": f"Bearer {token}"},
            "limits": httpx.Limits(keepalive_expiry=_KEEP_SECONDS),
            "trust_env": not is_loopback(parsed.host.strip("[]")),
            "verify": httpx.create_ssl_context() if parsed.scheme == "https" else False,
        }
        self._idle: list[httpx.Client] = []
        """One socket each: with many in one pool, httpx looks through all of them for every request."""
        self._made: list[httpx.Client] = []

    def send(
        self,
        method: str,
        path: str,
        *,
        seconds: float,
        body: bytes = b"",
        form: str = wire.JSON,
        accept: str = wire.JSON,
        query: Mapping[str, str] | None = None,
    ) -> httpx.Response:
        """Send a request until it is answered; it must be one that the server does not play twice.

        Args:
            method: of HTTP.
            path: below the server's URL.
            seconds: how long to try.
            body: what is sent.
            form: content type of ``body``.
            accept: content type of the answer.
            query: after the path.

        Raises:
            UnreachableError: no answer, or only that the server is full.
        """
        self._bury()
        with self._client() as client:
            return self._send(client, method, path, seconds, body, form, accept, query)

    def _send(
        self,
        client: httpx.Client,
        method: str,
        path: str,
        seconds: float,
        body: bytes,
        form: str,
        accept: str,
        query: Mapping[str, str] | None,
    ) -> httpx.Response:
        start = time.monotonic()
        pause = 0.05
        request = client.build_request(
            method, path, content=body, params=query, headers={"content-type": form, "accept": accept}
        )
        attempt = min(seconds, _ATTEMPT_SECONDS)
        request.extensions["timeout"] = httpx.Timeout(
            attempt, connect=min(seconds, _CONNECT_SECONDS), pool=seconds
        ).as_dict()
        while True:
            patience = seconds
            try:
                response = client.send(request)
            except httpx.TransportError as error:
                problem = f"{type(error).__name__}: {error}".rstrip(": ")
                if not self._answered:
                    patience = min(seconds, _FIRST_SECONDS)
                wait = pause
            else:
                self._answered = True
                if response.status_code not in (429, 503, *_GATEWAY) and not _is_busy(response):
                    self._server = response.headers.get("agentropy-server", self._server)
                    return response
                problem = _detail(response)
                wait = max(pause, _retry_after(response))
            left = start + patience - time.monotonic()
            if left <= 0:
                raise UnreachableError(f"{self.url} gave no answer in {patience:g} seconds: {problem}")
            time.sleep(min(left, wait * self._pauses.uniform(0.5, 1.0)))
            pause = min(2 * pause, _LONGEST_PAUSE)

    @contextlib.contextmanager
    def _client(self) -> Iterator[httpx.Client]:
        """Lend a client that nobody uses."""
        try:
            client = self._idle.pop()
        except IndexError:
            client = httpx.Client(**self._options)
            self._made.append(client)
        try:
            yield client
        finally:
            self._idle.append(client)

    @property
    def server(self) -> str | None:
        """The run of the server that answered last; another one after it was started again."""
        return self._server

    def abandon(self, name: str) -> None:
        """Close a session with the next request. Sends nothing, so that garbage collection may call it anywhere."""
        self._abandoned.append(name)

    def end(self, name: str) -> bool:
        """Close a session, if the server can be reached; return whether it could."""
        self.open.discard(name)
        try:
            with self._client() as client:
                client.delete(f"/v1/sessions/{name}", timeout=_GOODBYE_SECONDS)
        except httpx.HTTPError:
            return False
        return True

    def _bury(self) -> None:
        while self._abandoned:
            with contextlib.suppress(IndexError):  # another thread was faster
                if not self.end(self._abandoned.popleft()):
                    self._abandoned.clear()  # the server will notice that nobody uses them

    def close(self) -> None:
        """Close every session and socket."""
        for name in list(self.open):
            if not self.end(name):
                break
        for client in self._made:
            client.close()


_connections: dict[tuple[int, str, str | None], Connection] = {}
_lock = threading.Lock()


def _renew_lock() -> None:
    global _lock
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_renew_lock)


def connect(url: str, token: str | None) -> Connection:
    """Return this process's connection to a server; ``disconnect`` gives it back."""
    with _lock:
        key = os.getpid(), url, token
        if key not in _connections:
            _connections[key] = Connection(url, token)
        connection = _connections[key]
        connection.users += 1
        return connection


def disconnect(connection: Connection) -> None:
    """Give a connection back; the last one closes it."""
    if connection.pid != os.getpid():  # a fork has no say in its parent's sessions
        return
    with _lock:
        connection.users -= 1
        if connection.users:
            return
        for key in [key for key, other in _connections.items() if other is connection]:
            del _connections[key]
    connection.close()


@atexit.register
def _say_goodbye() -> None:
    for connection in list(_connections.values()):
        if connection.pid == os.getpid():
            connection.close()


def choose_form(name: str) -> str:
    """Return the content type for ``"auto"``, ``"msgpack"`` or ``"json"``.

    Raises:
        UsageError: it is none of these.
    """
    if name == "auto":
        return wire.MSGPACK if importlib.util.find_spec("msgpack") is not None else wire.JSON
    if name not in FORMS:
        raise UsageError(f"unknown message format {name!r}{nearest(name, [*FORMS, 'auto'])}")
    return FORMS[name]


class RemoteSession:
    """One environment at a server."""

    def __init__(
        self,
        connection: Connection,
        env_id: str,
        arguments: Mapping[str, Any],
        *,
        form: str,
        seconds: float,
        name: str | None = None,
        about: dict[str, Any] | None = None,
    ) -> None:
        """Open it.

        Args:
            connection: to the server.
            env_id: the environment.
            arguments: its arguments.
            form: content type of messages.
            seconds: how long to try each request.
            name: of a session that exists already.
            about: what the server says of such a one.

        Raises:
            UsageError: the server refuses the environment or the arguments.
            EnvironmentFailedError: the environment cannot be made, or the server cannot be reached.
        """
        self.connection = connection
        self.pid = os.getpid()
        self.name = name or secrets.token_hex(16)
        self.form, self.seconds = form, seconds
        self._number = 0
        self._path = f"/v1/sessions/{self.name}"
        connection.open.add(self.name)
        try:
            if about is None:
                body = wire.encode({"env_id": env_id, "arguments": dict(arguments)}, form)
                for _ in range(_OPENINGS):
                    response = connection.send("PUT", self._path, body=body, form=form, seconds=seconds)
                    if _code(response) != Code.LOST:
                        break
                if response.status_code not in (200, 201):
                    raise_problem(response, connection)
                about = wire.decode(response.content, wire.form_of(response.headers["content-type"]) or form)
        except BaseException:
            connection.abandon(self.name)
            raise
        self.about: dict[str, Any] = about
        self.server = connection.server

    def operate(self, op: str, body: Any = None, raw: bytes | None = None) -> Any:
        """Return what the server answers to an operation: a value, or bytes.

        Args:
            op: its name.
            body: its message.
            raw: bytes instead of a message.

        Raises:
            UsageError, ResetNeeded, EnvironmentFailedError: as the environment would.
        """
        self._number += 1
        response = self.connection.send(
            "POST",
            f"{self._path}/{op}",
            query={"number": str(self._number)},
            body=wire.encode({} if body is None else body, self.form) if raw is None else raw,
            form=self.form if raw is None else wire.BYTES,
            accept=self.form,
            seconds=self.seconds,
        )
        if response.status_code != 200:
            raise_problem(response, self.connection, self.server)
        form = wire.form_of(response.headers.get("content-type"))
        return response.content if form == wire.BYTES else wire.decode(response.content, form or self.form)

    def close(self) -> None:
        """Close it, if the server can be reached."""
        if self.pid == os.getpid():
            self.connection.end(self.name)


def raise_problem(response: httpx.Response, connection: Connection, server: str | None = None) -> NoReturn:
    """Raise the error that an answer tells.

    Args:
        response: the answer.
        connection: where it came from.
        server: the run of the server that opened the session.
    """
    detail = _detail(response)
    match _code(response):
        case Code.RESET_NEEDED:
            raise ResetNeeded(detail)
        case Code.UNKNOWN_SESSION:
            if server is not None and server != connection.server:
                detail = "the server was started again, and knows nothing of the session"
            raise SessionGone(f"{connection.url}: {detail}")
        case Code.LOST:
            raise EpisodeLost(detail)
        case Code.FAILED:
            raise EnvironmentFailedError(detail)
        case Code.FOREIGN_SNAPSHOT:
            raise ForeignSnapshot(detail)
        case Code.UNAUTHORIZED:
            raise UsageError(f"{connection.url}: {detail}; give token=... or set AGENTROPY_TOKEN")
    if 400 <= response.status_code < 500:
        raise UsageError(f"{connection.url}: {detail}")
    raise EnvironmentFailedError(f"{connection.url}: {detail}")


def _problem(response: httpx.Response) -> dict[str, Any]:
    if response.headers.get("content-type", "").startswith(wire.PROBLEM):
        with contextlib.suppress(ValueError):
            body = response.json()
            if isinstance(body, dict):
                return body
    return {}


def _code(response: httpx.Response) -> str | None:
    return _problem(response).get("code")


def _detail(response: httpx.Response) -> str:
    return str(_problem(response).get("detail") or f"HTTP {response.status_code}: {response.text[:200]!r}")


def _is_busy(response: httpx.Response) -> bool:
    return response.status_code == 409 and _code(response) == Code.BUSY


def _retry_after(response: httpx.Response) -> float:
    value = response.headers.get("retry-after", "")
    return float(value) if value.isdigit() else 0.0
