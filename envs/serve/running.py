"""A running server.

- ``run``: serve until a signal ends it.
- ``BackgroundServer``: serve from a thread of this process, as in a notebook.
"""

from __future__ import annotations

import asyncio
import contextlib
import resource
import signal
import socket
import threading
from collections.abc import Callable
from typing import Any, cast

import uvicorn

from ...errors import EnvironmentFailedError
from ...listening import listen, url_of
from .app import create_app
from .settings import Settings

_SHUTDOWN_SECONDS = 5
_KEEP_ALIVE_SECONDS = 75
_SILENT_SECONDS = 20.0
"""How long a new connection may take to send its first request."""


def run(settings: Settings, listener: socket.socket) -> None:
    """Serve until SIGINT or SIGTERM; then answer what is under way, and end every process."""
    _raise_file_limit()
    server = uvicorn.Server(_config(settings))
    # uvicorn raises the signal that ended it once more, for whoever handled it before: that is nobody.
    handlers = {number: signal.signal(number, _ignore) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        server.run(sockets=[listener])
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


class BackgroundServer:
    """A server in a thread of this process. Use as a context manager.

    >>> with BackgroundServer(Settings(port=0)) as server:  # doctest: +SKIP
    ...     env = gymnasium.make("agentropy/Remote-v0", url=server.url)
    """

    def __init__(self, settings: Settings) -> None:
        """Start, and return once requests are answered.

        Raises:
            UsageError: the address cannot be had.
            EnvironmentFailedError: the server did not start.
        """
        self._listener = listen(settings.host, settings.port)
        self.url = url_of(self._listener)
        self._server = uvicorn.Server(_config(settings))
        started = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(started.set,), name="agentropy server", daemon=True)
        self._thread.start()
        started.wait(30.0)
        if not self._server.started:
            raise EnvironmentFailedError("the server did not start")

    def _run(self, tell: Callable[[], None]) -> None:
        async def serve() -> None:
            serving = asyncio.ensure_future(self._server.serve(sockets=[self._listener]))
            while not self._server.started and not serving.done():
                await asyncio.sleep(0.005)
            tell()
            await serving

        asyncio.run(serve())

    def close(self) -> None:
        """End the server, its sessions and their processes. Safe to call twice."""
        self._server.should_exit = True
        self._thread.join()

    def __enter__(self) -> BackgroundServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _config(settings: Settings) -> uvicorn.Config:
    config = uvicorn.Config(
        create_app(settings),
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,  # anybody could write them, and be another client with each request
        ws="none",
        timeout_keep_alive=_KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=_SHUTDOWN_SECONDS,
        limit_concurrency=2 * settings.max_sessions + 64,
        backlog=2048,
    )
    config.load()
    config.http_protocol_class = _impatient(config.http_protocol_class)
    return config


def _impatient(protocol: Any) -> Any:
    """Return uvicorn's protocol, with an end to connections that open and say nothing."""

    class Impatient(protocol):  # type: ignore[misc]
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            super().connection_made(transport)
            self.loop.call_later(_SILENT_SECONDS, self._close_if_silent)

        def _close_if_silent(self) -> None:
            if self.cycle is None and not self.transport.is_closing():
                self.transport.close()

    return cast(Any, Impatient)


def _ignore(*_: object) -> None:
    pass


def _raise_file_limit() -> None:
    """Allow as many sockets as the system does."""
    with contextlib.suppress(ValueError, OSError):
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, 1 << 16)), hard))
