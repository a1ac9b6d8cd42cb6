"""What every request passes before it is looked at.

- ``Guard``: token, host and size; an ASGI application around another one.
- ``Client``: who sends a request.
"""

from __future__ import annotations

import hashlib
import hmac
from typing import NamedTuple

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from . import wire
from .settings import Settings, is_loopback
from .wire import Code

OPEN_PATHS = frozenset({"/health"})
"""Answered to anybody."""
SERVER_HEADER = b"agentropy-server"
_LONGEST_LENGTH = 18
"""Digits of a ``Content-Length``."""


class Client(NamedTuple):
    """Who sends a request: limits go by both, and what a session's name is good for by the token."""

    token: int | None
    """Its number."""
    host: str


class Guard:
    """Refuses requests without the token, for another host, or too large; writes who it is on every answer.

    Without a token, the server listens on loopback only, where a web page of another site could still reach it through
    the browser of somebody on this machine. So the ``Host`` must then be a loopback name, and the rest of the server
    takes content types only that browsers never send to another site unasked.

    ``scope["state"]["client"]`` is the ``Client``.
    """

    def __init__(self, app: ASGIApp, settings: Settings, instance: str) -> None:
        """Take the application inside, and the name of this run of the server."""
        self._app = app
        self._tokens = [hashlib.sha256(token.encode()).digest() for token in settings.tokens]
        self._max_body = settings.max_body
        self._server = instance.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request, or refuse it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def signed(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (SERVER_HEADER, self._server)]
            await send(message)

        headers = dict(scope["headers"])
        token = self._token(headers)
        refusal = self._refuse(scope, headers, token)
        if refusal is None:
            host = scope["client"][0] if scope.get("client") else ""
            scope.setdefault("state", {})["client"] = Client(token, host)
            await self._app(scope, receive, signed)
            return
        status, code, detail = refusal
        body = wire.problem(status, code, detail)
        answer: list[tuple[bytes, bytes]] = [
            (b"content-type", wire.PROBLEM.encode()),
            (b"content-length", str(len(body)).encode()),
            (b"connection", b"close"),  # what is left of the request is not read
        ]
        if status == 401:
            answer.append((b"www-authenticate", b"Bearer"))
        await signed({"type": "http.response.start", "status": status, "headers": answer})
        await signed({"type": "http.response.body", "body": body})

    def _token(self, headers: dict[bytes, bytes]) -> int | None:
        """Return the number of the token that the request bears. Every one is compared, whichever it is."""
        scheme, _, token = headers.get(b"authorization", b"").partition(b" ")
        given = hashlib.sha256(token.strip()).digest()
        equal = [hmac.compare_digest(given, known) for known in self._tokens]
        return equal.index(True) if any(equal) and scheme.lower() == b"bearer" else None

    def _refuse(self, scope: Scope, headers: dict[bytes, bytes], token: int | None) -> tuple[int, Code, str] | None:
        if scope["path"] in OPEN_PATHS:
            return None
        if self._tokens and token is None:
            what = "it is none of this server's" if b"authorization" in headers else "none was given"
            return 401, Code.UNAUTHORIZED, f"the server wants a bearer token, and {what}"
        host = headers.get(b"host", b"").decode("latin-1")
        if not self._tokens and not is_loopback(_name(host)):
            return 403, Code.FORBIDDEN, f"a server without a token is for this machine alone, not for host {host!r}"
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or len(length) > _LONGEST_LENGTH or int(length) > self._max_body:
            return 413, Code.TOO_LARGE, f"a request has at most {self._max_body} bytes"
        return None


def _name(host: str) -> str:
    """Return a ``Host`` header without its port."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0]
