"""Tools of servers that speak the Model Context Protocol over their standard input and output.

- ``MCPServer``: what to start, and how it is used.
- ``MCPTool``: one tool of a server. ``open_server``: start a server and return its tools.

The protocol is lines of JSON-RPC 2.0, and the client is synchronous: no threads, no event loop. A server is killed with
everything it started when its last environment is closed or this process ends, however it ends.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import select
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...errors import EnvironmentFailedError, UsageError, nearest
from .janitor import Guarded
from .protocol import Tool, ToolError, as_text, check_name, without_titles

_VERSION = "2025-06-18"
_MOST_BYTES = 8 << 20
_NO_METHOD = -32601


@dataclass(frozen=True)
class MCPServer:
    """A server to start."""

    command: Sequence[str]
    """Program and arguments."""
    env: Mapping[str, str] | None = None
    """Its environment; by default ``PATH``, ``HOME``, ``LANG`` and ``TMPDIR`` of this process."""
    cwd: str | None = None
    tools: Sequence[str] | None = None
    """Names of the tools to offer; all by default."""
    stateful: bool = False
    """Answers depend on earlier calls: each environment has a server of its own, which is started anew for every
    episode, and snapshots play the episode again. Others are shared."""
    time_limit: float = 30.0
    """Seconds for a call, and for the start."""


class MCPTool(Tool):
    """One tool of a server."""

    def __init__(self, connection: _Connection, listed: Mapping[str, Any]) -> None:
        """Take the connection and what the server says of the tool."""
        self.name = str(listed["name"])
        check_name(self.name)
        self.description = " ".join(str(listed.get("description") or self.name).split())
        self.schema = without_titles(listed.get("inputSchema") or {"type": "object", "properties": {}})
        self._connection = connection
        self.replayed = connection.server.stateful  # type: ignore[misc]

    def call(self, arguments: Mapping[str, Any]) -> str:
        known = self.schema.get("properties", {})
        for name in arguments:
            if known and name not in known and self.schema.get("additionalProperties") is not True:
                raise ToolError(f"{self.name}: unknown argument {str(name)[:40]!r}{nearest(str(name)[:40], known)}")
        for name in self.schema.get("required", []):
            if name not in arguments:
                raise ToolError(f"{self.name}: the argument {name!r} is missing")
        result = self._connection.request("tools/call", {"name": self.name, "arguments": dict(arguments)})
        text = "\n".join(_content(item) for item in result.get("content") or [])
        if not text and "structuredContent" in result:
            text = as_text(result["structuredContent"])
        if result.get("isError"):
            raise ToolError(text or f"{self.name} failed")
        return text or "(no output)"

    def clear(self) -> None:
        if self.replayed:
            self._connection.restart_once_used()

    def close(self) -> None:
        self._connection.release(self)


def open_server(server: MCPServer) -> list[MCPTool]:
    """Start ``server``, or take the one that runs already, and return its tools.

    Raises:
        UsageError: it does not start, does not speak the protocol, or lacks a tool that was asked for.
    """
    connection = _Connection.shared(server)
    try:
        listed = connection.tools()
        names = [str(item["name"]) for item in listed]
        for name in server.tools or ():
            if name not in names:
                raise UsageError(f"{server.command[0]} has no tool {name!r}{nearest(name, names)}")
        chosen = [item for item in listed if server.tools is None or item["name"] in server.tools]
        tools = [MCPTool(connection, item) for item in chosen]
    except BaseException as error:
        connection.abandon()
        if isinstance(error, ToolError):
            raise UsageError(f"the MCP server {' '.join(server.command)!r} cannot be used: {error}") from error
        raise
    connection.lease(tools)
    return tools


class _Connection:
    """A conversation with one process of a server. Threads may share it."""

    _running: dict[tuple[int, str], _Connection] = {}  # noqa: RUF012
    _guard = threading.Lock()

    def __init__(self, server: MCPServer) -> None:
        self.server = server
        self._lock = threading.RLock()
        self._users: set[int] = set()
        self._ids = itertools.count(1)
        self._used = False
        self._program: Guarded | None = None
        self._listed: list[dict[str, Any]] | None = None

    @classmethod
    def shared(cls, server: MCPServer) -> _Connection:
        if server.stateful:
            return cls(server)
        with cls._guard:
            return cls._running.setdefault((os.getpid(), repr(server)), cls(server))

    def lease(self, users: Sequence[Tool]) -> None:
        with self._lock:
            self._users.update(map(id, users))

    def release(self, user: Tool) -> None:
        with self._lock:
            self._users.discard(id(user))
            self.abandon()

    def abandon(self) -> None:
        """Stop the server unless somebody uses it."""
        with self._guard, self._lock:
            if not self._users:
                self._running.pop((os.getpid(), repr(self.server)), None)
                self._stop()

    def tools(self) -> list[dict[str, Any]]:
        if self._listed is None:
            listed: list[dict[str, Any]] = []
            cursor: dict[str, Any] = {}
            while True:
                page = self.request("tools/list", cursor)
                listed += page.get("tools", [])
                if not page.get("nextCursor"):
                    break
                cursor = {"cursor": page["nextCursor"]}
            self._listed = listed
            self._used = False
        return self._listed

    def restart_once_used(self) -> None:
        with self._lock:
            if self._used:
                self._stop()

    def request(self, method: str, params: Mapping[str, Any]) -> dict[str, Any]:
        """Return the result of a request; start the server if it does not run."""
        with self._lock:
            if self._program is None:
                self._start()
            self._used = True
            return self._ask(method, params)

    def _start(self) -> None:
        env = self.server.env
        if env is None:
            env = {name: os.environ[name] for name in ("PATH", "HOME", "LANG", "TMPDIR") if name in os.environ}
        try:
            self._program = Guarded(self.server.command, env, self.server.cwd)
        except OSError as error:
            raise EnvironmentFailedError(f"an MCP server could not be started: {error}") from error
        self._buffer = b""
        client = {"name": "agentropy", "version": "0"}
        self._ask("initialize", {"protocolVersion": _VERSION, "capabilities": {}, "clientInfo": client})
        self._send({"method": "notifications/initialized"}, time.monotonic() + self.server.time_limit)
        self._used = False

    _buffer: bytes

    def _stop(self) -> None:
        if self._program is not None:
            self._program.close()
            self._program = None

    def _ask(self, method: str, params: Mapping[str, Any]) -> dict[str, Any]:
        number = next(self._ids)
        deadline = time.monotonic() + self.server.time_limit
        try:
            self._send({"id": number, "method": method, "params": dict(params)}, deadline)
            while True:
                message = self._receive(deadline)
                if "method" in message:
                    if "id" in message:  # the server asks for something; only signs of life are given
                        alive = message["method"] == "ping"
                        answer = {"result": {}} if alive else {"error": {"code": _NO_METHOD, "message": "not offered"}}
                        self._send({"id": message["id"], **answer}, deadline)
                elif message.get("id") == number:
                    break
        except TimeoutError:
            if method == "tools/call" and not self.server.stateful:
                with contextlib.suppress(OSError, TimeoutError):
                    cancel = {"requestId": number, "reason": "time limit"}
                    self._send({"method": "notifications/cancelled", "params": cancel}, time.monotonic() + 1)
            else:
                self._stop()
            raise ToolError(f"no answer within {self.server.time_limit:g} s") from None
        except (OSError, EOFError, ValueError) as error:
            self._stop()
            what = "ended before it was ready" if method == "initialize" else "ended and will be started again"
            raise ToolError(f"the tool's server {what}") from error
        if "error" in message:
            raise ToolError(str((message["error"] or {}).get("message", "the server refused")))
        result = message.get("result")
        return result if isinstance(result, dict) else {}

    def _send(self, message: Mapping[str, Any], deadline: float) -> None:
        assert self._program is not None
        left = memoryview(json.dumps({"jsonrpc": "2.0", **message}).encode() + b"\n")
        while left:
            ready = select.select([], [self._program.requests], [], max(0.0, deadline - time.monotonic()))[1]
            if not ready:
                raise TimeoutError
            left = left[os.write(self._program.requests, left[: 1 << 12]) :]

    def _receive(self, deadline: float) -> dict[str, Any]:
        assert self._program is not None
        while True:
            while b"\n" in self._buffer:
                line, _, self._buffer = self._buffer.partition(b"\n")
                with contextlib.suppress(ValueError, RecursionError):  # a server that prints is not worth failing for
                    message = json.loads(line)
                    if isinstance(message, dict):
                        return message
            if len(self._buffer) > _MOST_BYTES:
                raise ValueError("a message is too long")
            poll = select.poll()
            poll.register(self._program.replies, select.POLLIN)
            if not poll.poll(1000 * max(0.0, deadline - time.monotonic())):
                raise TimeoutError
            part = os.read(self._program.replies, 1 << 16)
            if not part:
                raise EOFError
            self._buffer += part


def _content(item: Mapping[str, Any]) -> str:
    kind = item.get("type")
    if kind == "text":
        return str(item.get("text", ""))
    if kind == "resource":
        return str((item.get("resource") or {}).get("text", "[resource]"))
    return f"[{kind}]"
