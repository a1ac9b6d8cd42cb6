"""The server as a FastAPI application.

- ``create_app``: what ``agentropy serve envs`` runs.

Every operation on a session has a number: a request that is sent again under its number is answered, not played,
again. Bodies of operations go to the workers as they came, and answers come back as bytes.

========  =====================================  ===================================================================
PUT       ``/v1/sessions/{name}``                open; ``{"env_id": ..., "arguments": {...}}``, name of 32 hex digits
POST      ``/v1/sessions/{name}/{op}?number=n``  reset, step, snapshot, restore, fork, replay, expert, call
GET       ``/v1/sessions/{name}``                keep it alive; its last number
DELETE    ``/v1/sessions/{name}``                close
GET       ``/v1/envs``                           the ids that are served
GET       ``/v1/envs/{id}/tasks?split=s``        task ids and their hash; ``arguments`` as JSON
GET       ``/health``, ``/metrics``              JSON for anybody; Prometheus text
========  =====================================  ===================================================================
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import secrets
import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.routing import Route

from ... import __version__
from . import wire
from .guard import Client, Guard
from .hosted import Answer
from .hosted import Request as Operation
from .sessions import Refusal, Sessions, watched
from .settings import Settings
from .wire import Code

OPERATIONS = frozenset({"reset", "step", "snapshot", "restore", "fork", "replay", "expert", "call"})
_RAW = frozenset({"restore", "fork"})
"""Operations whose body is bytes."""
_NAME = re.compile(r"[0-9a-f]{32}")


def create_app(settings: Settings) -> FastAPI:
    """Return the application; its lifespan owns sessions and pools.

    Args:
        settings: what to serve, and to whom.
    """
    instance, started = secrets.token_hex(8), time.monotonic()
    sessions = Sessions(settings)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with watched(sessions):
            yield

    app = FastAPI(title="agentropy", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(Guard, settings=settings, instance=instance)

    @app.exception_handler(Refusal)
    async def refuse(_: Request, refusal: Refusal) -> Response:
        headers = {} if refusal.retry_after is None else {"retry-after": str(refusal.retry_after)}
        return _respond(refusal.answer, headers)

    @app.exception_handler(HTTPException)
    async def not_found(request: Request, error: HTTPException) -> Response:
        detail = f"{request.method} {request.url.path}: {error.detail}"
        return _respond(Answer.of_problem(error.status_code, Code.NOT_FOUND, detail), dict(error.headers or {}))

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {
            "status": "ok",
            "version": __version__,
            "server": instance,
            "seconds": round(time.monotonic() - started, 3),
            "sessions": len(sessions),
            "pools": sessions.pools,
        }

    @app.get("/metrics")
    async def metrics() -> Response:
        gauges = {"sessions": len(sessions), "sessions_busy": sessions.busy, "pools": sessions.pools}
        lines = [f"# TYPE agentropy_{name} gauge\nagentropy_{name} {value}" for name, value in gauges.items()]
        for name, value in sorted(sessions.counts.items()):
            lines.append(f"# TYPE agentropy_{name}_total counter\nagentropy_{name}_total {value}")
        return Response("\n".join(lines) + "\n", media_type="text/plain; version=0.0.4")

    @app.get("/v1/envs")
    async def envs() -> dict[str, Any]:
        return {"envs": list(settings.env_ids)}

    @app.get("/v1/envs/{env_id:path}/tasks")
    async def tasks(request: Request, env_id: str) -> Response:
        try:
            arguments = json.loads(request.query_params.get("arguments", "{}"))
        except ValueError as error:
            raise Refusal(422, Code.USAGE, f"'arguments' must be JSON: {error}") from error
        split = request.query_params.get("split")
        calls = [
            Operation("call", wire.encode({"method": method, "arguments": {"split": split}}, wire.JSON), wire.JSON)
            for method in ("tasks", "tasks_hash")
        ]
        listed, hashed = await sessions.ask(env_id, arguments, calls)
        if listed.status != 200:
            return _respond(listed)
        body = {"env_id": env_id, "split": split, "tasks": list(wire.decode(listed.body, wire.JSON)["value"])}
        if hashed.status == 200:  # only worlds of this package hash their tasks
            body["tasks_hash"] = wire.decode(hashed.body, wire.JSON)["value"]
        return Response(json.dumps(body), media_type=wire.JSON)

    @app.put("/v1/sessions/{name}")
    async def open_session(request: Request, name: str) -> Response:
        _check_name(name)
        form = _form_of(request, raw=False)
        try:
            body = wire.decode(await _read(request, settings), form)
        except wire.WireError as error:
            raise Refusal(400, Code.MALFORMED, str(error)) from error
        if not isinstance(body, dict):
            raise Refusal(422, Code.USAGE, f"the body is an object, not {type(body).__name__}")
        answer, new = await sessions.open(name, _client(request), body.get("env_id"), body.get("arguments", {}))
        if answer.status != 200:
            return _respond(answer)
        about = {**wire.decode(answer.body, wire.MSGPACK), "idle_seconds": settings.idle_seconds}
        return _respond(Answer(201 if new else 200, form, wire.encode(about, form)))

    @app.get("/v1/sessions/{name}")
    async def look(request: Request, name: str) -> dict[str, Any]:
        session = sessions.get(name, _client(request))
        return {"env_id": session.group.env_id, "number": session.number, "busy": not session.reply.done()}

    @app.delete("/v1/sessions/{name}")
    async def close_session(request: Request, name: str) -> Response:
        sessions.close(sessions.get(name, _client(request)))
        return Response(status_code=204)

    async def operate(request: Request) -> Response:
        name, op = request.path_params["name"], request.path_params["op"]
        if op not in OPERATIONS:
            raise Refusal(404, Code.NOT_FOUND, f"there is no operation {op!r}, only {', '.join(sorted(OPERATIONS))}")
        session = sessions.get(name, _client(request))
        number = request.query_params.get("number", "")
        if not number.isdecimal() or not 1 <= len(number) <= 18 or int(number) < 1:
            raise Refusal(422, Code.USAGE, "the query needs number=n, larger with every new request of the session")
        form = _form_of(request, raw=op in _RAW)
        body = await _read(request, settings)
        if op == "fork":
            _check_name(body.decode("latin-1"))
        return _respond(await asyncio.shield(sessions.operate(session, int(number), Operation(op, body, form))))

    # The one path that must be fast; bytes in, bytes out leave FastAPI nothing to do.
    app.router.routes.insert(0, Route("/v1/sessions/{name}/{op}", operate, methods=["POST"]))
    return app


def _respond(answer: Answer, headers: dict[str, str] | None = None) -> Response:
    return Response(answer.body, answer.status, headers, answer.form)


def _client(request: Request) -> Client:
    client: Client = request.scope["state"]["client"]
    return client


def _check_name(name: str) -> None:
    if not _NAME.fullmatch(name):
        raise Refusal(422, Code.USAGE, "a session's name is 32 lowercase hexadecimal digits, chosen at random")


def _form_of(request: Request, raw: bool) -> str:
    """Return the format of the answer: that of the body, or for a body of bytes the one that is accepted."""
    given = request.headers.get("content-type")
    form = wire.form_of(given)
    if form is None or (form == wire.BYTES) != raw:
        expected = wire.BYTES if raw else f"{wire.MSGPACK} or {wire.JSON}"
        raise Refusal(415, Code.USAGE, f"the content type must be {expected}, not {given}")
    return (wire.form_of(request.headers.get("accept")) or wire.JSON) if raw else form


async def _read(request: Request, settings: Settings) -> bytes:
    """Return the body, as long as it is neither too large nor too slow."""
    parts, size = [], 0
    try:
        async with asyncio.timeout(settings.body_seconds):
            async for part in request.stream():
                size += len(part)
                if size > settings.max_body:
                    raise Refusal(413, Code.TOO_LARGE, f"a request has at most {settings.max_body} bytes")
                parts.append(part)
    except TimeoutError as error:
        detail = f"the request did not arrive within {settings.body_seconds:g} seconds"
        raise Refusal(408, Code.TOO_SLOW, detail) from error
    return b"".join(parts)
