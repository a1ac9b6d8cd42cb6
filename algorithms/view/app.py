"""The page's server, as a FastAPI application.

- ``create_app``: what ``agentropy view`` runs.

=====  ================  ==========================================================================================
GET    ``/api/KEY``      an answer of ``Library.answer``; ``/api/runs/ID/metrics?cursor=...`` answers what is new
GET    ``/mode.js``      tells the page that it may ask
GET    ``/...``          the page
=====  ================  ==========================================================================================

It only reads, and answers only those who call it by a name of its own, so that no other site can reach it through the
browser of a person who looks at both (DNS rebinding).
"""

from __future__ import annotations

import hashlib
import ipaddress
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.middleware.gzip import GZipMiddleware
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ...errors import UsageError
from .library import Library

STATIC = Path(__file__).parent / "static"
LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})

_JSON = "application/json"
_HEADERS = {
    "Cache-Control": "no-cache",
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
        "font-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def create_app(library: Library, *, names: Collection[str] = LOOPBACK_NAMES, addresses: bool = False) -> FastAPI:
    """Return the application.

    Args:
        library: what it shows.
        names: hosts that it may be called by, without port.
        addresses: whether any numeric address will do as well, as where it listens on all of them.
    """
    app = FastAPI(title="agentropy view", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(GZipMiddleware, minimum_size=1024, compresslevel=4)
    app.add_middleware(_Guard, names=frozenset(names), addresses=addresses)

    @app.exception_handler(HTTPException)
    async def answer_http_error(_: Request, error: HTTPException) -> Response:
        return _error(error.status_code, str(error.detail))

    @app.exception_handler(UsageError)
    async def answer_usage_error(_: Request, error: UsageError) -> Response:
        return _error(404, str(error))

    @app.exception_handler(Exception)
    async def answer_fault(_: Request, error: Exception) -> Response:
        return _error(500, f"{type(error).__name__}: {error}")

    @app.get("/api/{key:path}")
    def answer(key: str, request: Request, cursor: str | None = None) -> Response:
        body = library.answer(key, cursor)
        if body is None:
            raise HTTPException(404, f"there is no '{key}'")
        tag = f'"{hashlib.blake2b(body, digest_size=12).hexdigest()}"'
        same = tag in (part.strip().removeprefix("W/") for part in request.headers.get("if-none-match", "").split(","))
        return Response(b"" if same else body, 304 if same else 200, {"ETag": tag}, None if same else _JSON)

    @app.get("/mode.js")
    def mode() -> Response:
        return Response(mode_script(live=True), media_type="text/javascript")

    app.mount("/", StaticFiles(directory=STATIC, html=True))
    return app


def mode_script(*, live: bool) -> str:
    """What the page loads first: whether it may ask a server, or must load its answers as scripts."""
    return f"var agentropy = {json.dumps({'live': live})};\n"


class _Guard:
    """Lets in what is called by a name of this server and only reads, and adds headers to every answer."""

    def __init__(self, app: ASGIApp, names: frozenset[str], addresses: bool) -> None:
        self._app, self._names, self._addresses = app, names, addresses

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                extra = [(name.lower().encode(), value.encode()) for name, value in _HEADERS.items()]
                message["headers"] = [*message["headers"], *extra]
            await send(message)

        hosts = [value.decode("latin-1") for name, value in scope["headers"] if name == b"host"]
        if len(hosts) != 1 or not self._own(hosts[0]):
            refusal = _error(
                421, "this server is called by another name; open the address that `agentropy view` printed"
            )
        elif scope["method"] not in ("GET", "HEAD"):
            refusal = _error(405, "this server only reads")
        else:
            await self._app(scope, receive, sending)
            return
        await refusal(scope, receive, sending)

    def _own(self, host: str) -> bool:
        # The port is the client's: it may have come through a tunnel.
        name = host[1:].partition("]")[0] if host.startswith("[") else host.rpartition(":")[0] or host
        if name.lower() in self._names:
            return True
        try:
            return self._addresses and bool(ipaddress.ip_address(name))
        except ValueError:
            return False


def _error(status: int, message: str) -> Response:
    content: Any = json.dumps({"error": message})
    return Response(content, status, media_type=_JSON)
