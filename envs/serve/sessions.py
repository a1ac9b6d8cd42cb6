"""The sessions of a server: who may open how many, which request is under way, and when they end.

- ``Sessions``: opens, forks, serves and closes them, and closes those that nobody uses any more.
- ``Session``: one environment of one client. ``Refusal``: a request that is not served, and why.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import secrets
import time
from collections import Counter
from collections.abc import AsyncIterator, Coroutine, Mapping
from dataclasses import dataclass, field
from typing import Any

from ...errors import UsageError
from . import arguments, wire
from .guard import Client
from .hosted import Answer, Request
from .pools import Pool
from .settings import Settings
from .wire import Code

_MAC_BYTES = 32
_FULL_SECONDS = 2
"""When to ask again for a session that there is no room for."""


class Refusal(Exception):
    """A request that is not served."""

    def __init__(self, status: int, code: Code, detail: str, retry_after: int | None = None) -> None:
        """Take the answer's parts; ``retry_after`` is in seconds."""
        super().__init__(detail)
        self.answer = Answer.of_problem(status, code, detail)
        self.retry_after = retry_after


@dataclass(slots=True, eq=False)
class _Group:
    """The sessions of one environment and equal arguments."""

    key: str
    env_id: str
    pool: Pool
    free: list[int]
    desk_slot: int
    """Serves questions that need no session, one at a time."""
    desk: asyncio.Lock = field(default_factory=asyncio.Lock)
    used: int = 0
    idle_since: float = field(default_factory=time.monotonic)


@dataclass(slots=True, eq=False)
class Session:
    """One environment of one client. Its requests carry increasing numbers, and the last one may be sent again."""

    name: str
    client: Client
    group: _Group
    slot: int
    reply: asyncio.Future[Answer]
    """To the last request."""
    about: asyncio.Future[Answer]
    """What the environment is like."""
    number: int = 0
    mark: bytes = b""
    """Hash of the last request."""
    touched: float = field(default_factory=time.monotonic)


class Sessions:
    """All sessions of a server. For one asyncio loop."""

    def __init__(self, settings: Settings) -> None:
        """Open nothing yet."""
        self.settings = settings
        self.counts: Counter[str] = Counter()
        """Of what happened since the start, by the name of the metric."""
        self._key = secrets.token_bytes(32)
        self._sessions: dict[str, Session] = {}
        self._per_client: Counter[Client] = Counter()
        self._groups: dict[str, _Group] = {}
        self._background: set[asyncio.Task[None]] = set()
        self._closing = False

    def __len__(self) -> int:
        return len(self._sessions)

    @property
    def pools(self) -> int:
        """How many pools there are."""
        return len(self._groups)

    @property
    def busy(self) -> int:
        """How many sessions wait for an answer."""
        return sum(not session.reply.done() for session in self._sessions.values())

    async def open(self, name: str, client: Client, env_id: Any, env_kwargs: Any) -> tuple[Answer, bool]:
        """Open a session, once however often it is asked for.

        Returns:
            What the environment is like, and whether the session is new.

        Raises:
            Refusal: it cannot be had.
        """
        key, kwargs = self._checked(env_id, env_kwargs)
        session = self._sessions.get(name)
        new = session is None
        if session is None:
            session = self._enter(name, client, self._group(key, env_id, kwargs))
        elif session.client.token != client.token or session.group.key != key:
            raise Refusal(409, Code.EXISTS, f"there is another session called {name}")
        answer = await asyncio.shield(session.about)
        if answer.status != 200 and self._sessions.get(name) is session:
            self._end(session)
        return answer, new

    def operate(self, session: Session, number: int, request: Request) -> asyncio.Future[Answer]:
        """Return the answer to come; a request sent again gets the one of the first time.

        Raises:
            Refusal: another request is under way, or a later one was served.
        """
        mark = hashlib.blake2b(request.body, digest_size=16, key=request.op.encode()).digest()
        again = number == session.number and mark == session.mark
        if again and not _was_full(session.reply):
            self.counts["requests_repeated"] += 1
            return session.reply
        if number <= session.number and not again:
            raise Refusal(
                409, Code.STALE, f"request {number} of the session is too old: number {session.number} was served"
            )
        if not session.reply.done():
            raise Refusal(409, Code.BUSY, "the session's last request is not answered yet", retry_after=1)
        if request.op == "snapshot":
            session.reply = asyncio.ensure_future(self._sealed(session, request))
        elif request.op == "restore":
            body = self._unsealed(session.group, request.body)
            session.reply = session.group.pool.submit(session.slot, Request("restore", body, request.form))
        elif request.op == "fork":
            session.reply = asyncio.ensure_future(self._fork(session, request))
        else:
            session.reply = session.group.pool.submit(session.slot, request)
        session.number, session.mark = number, mark
        session.touched = time.monotonic()
        self.counts["requests"] += 1
        if request.op == "step":
            self.counts["steps"] += 1
        session.reply.add_done_callback(lambda reply: self._served(session, reply))
        return session.reply

    def get(self, name: str, client: Client) -> Session:
        """Return a session of the client's token, whose address may have changed.

        Raises:
            Refusal: there is none of that name.
        """
        session = self._sessions.get(name)
        if session is None or session.client.token != client.token:
            raise Refusal(
                404,
                Code.UNKNOWN_SESSION,
                "the server does not know the session: it was closed, or nobody used it for "
                f"{self.settings.idle_seconds:g} seconds, or the server was started again since",
            )
        session.touched = time.monotonic()
        return session

    def close(self, session: Session) -> None:
        """End a session; what it still does is waited for in the background."""
        self.counts["sessions_closed"] += 1
        self._end(session)

    async def ask(self, env_id: Any, env_kwargs: Any, requests: list[Request]) -> list[Answer]:
        """Answer requests that need no session.

        Raises:
            Refusal: the environment is not served, or there is no room for it.
        """
        key, kwargs = self._checked(env_id, env_kwargs)
        group = self._group(key, env_id, kwargs)
        async with group.desk:
            answers = [await group.pool.submit(group.desk_slot, request) for request in requests]
            await group.pool.submit(group.desk_slot, Request("close"))
            return answers

    async def watch(self) -> None:
        """Close sessions and pools that nobody uses, until cancelled."""
        idle = self.settings.idle_seconds
        while True:
            await asyncio.sleep(max(0.05, min(5.0, idle / 4)))
            now = time.monotonic()
            for session in list(self._sessions.values()):
                if session.reply.done() and now - session.touched > idle:
                    self.counts["sessions_expired"] += 1
                    self._end(session)
            for group in list(self._groups.values()):
                if group.pool.broken or (self._unused(group) and now - group.idle_since > idle):
                    self._drop(group)

    async def close_all(self) -> None:
        """End every session and pool."""
        self._closing = True
        groups = list(self._groups.values())
        self._sessions.clear()
        self._groups.clear()
        await asyncio.gather(*(group.pool.close() for group in groups))
        while self._background:
            await asyncio.wait(self._background)

    def _checked(self, env_id: Any, env_kwargs: Any) -> tuple[str, dict[str, Any]]:
        if self._closing:
            raise Refusal(503, Code.FULL, "the server is shutting down", retry_after=_FULL_SECONDS)
        try:
            kwargs = arguments.check(env_id, env_kwargs, self.settings.env_ids, self.settings.allowed)
            return arguments.key(env_id, kwargs), kwargs
        except UsageError as error:
            raise Refusal(422, Code.USAGE, str(error)) from error

    def _enter(self, name: str, client: Client, group: _Group) -> Session:
        """Give a new session a slot."""
        settings = self.settings
        most = settings.max_sessions_per_client
        if most is not None and self._per_client[client] >= most:
            self.counts["refused_client"] += 1
            raise Refusal(429, Code.FULL, f"this client has its {most} sessions already", _FULL_SECONDS)
        if len(self._sessions) >= settings.max_sessions or not group.free:
            self.counts["refused_full"] += 1
            raise Refusal(503, Code.FULL, f"the server has its {settings.max_sessions} sessions already", _FULL_SECONDS)
        slot = group.free.pop()
        reply = group.pool.submit(slot, Request("open"))
        session = Session(name, client, group, slot, reply, reply)
        reply.add_done_callback(lambda done: self._served(session, done))
        group.used += 1
        self._sessions[name] = session
        self._per_client[client] += 1
        self.counts["sessions_opened"] += 1
        return session

    def _group(self, key: str, env_id: str, kwargs: Mapping[str, Any]) -> _Group:
        group = self._groups.get(key)
        if group is not None and group.pool.broken:
            self._drop(group)
            group = None
        if group is None:
            settings = self.settings
            if len(self._groups) >= settings.max_pools:
                unused = [other for other in self._groups.values() if self._unused(other)]
                if not unused:
                    self.counts["refused_full"] += 1
                    detail = f"the server has its {settings.max_pools} different environments and arguments already"
                    raise Refusal(503, Code.FULL, detail, _FULL_SECONDS)
                self._drop(min(unused, key=lambda other: other.idle_since))
            count = settings.max_sessions
            pool = Pool(env_id, kwargs, num_envs=count + 1, num_workers=settings.workers, timeout=settings.step_seconds)
            group = self._groups[key] = _Group(key, env_id, pool, list(range(count)), count)
        group.idle_since = time.monotonic()
        return group

    @staticmethod
    def _unused(group: _Group) -> bool:
        return not group.used and not group.desk.locked()

    def _drop(self, group: _Group) -> None:
        """Forget a pool, and close it in the background."""
        if self._groups.get(group.key) is group:
            del self._groups[group.key]
        self._later(group.pool.close())

    def _served(self, session: Session, reply: asyncio.Future[Answer]) -> None:
        session.touched = time.monotonic()
        if not reply.cancelled() and reply.result().status == 500:
            self.counts["episodes_failed"] += 1

    def _end(self, session: Session) -> None:
        """Forget a session, and free its slot once its last request is answered."""
        del self._sessions[session.name]
        self._per_client[session.client] -= 1
        if not self._per_client[session.client]:
            del self._per_client[session.client]
        self._later(self._vacate(session))

    async def _vacate(self, session: Session) -> None:
        group = session.group
        await asyncio.wait([session.reply])
        await group.pool.submit(session.slot, Request("close"))
        group.free.append(session.slot)
        group.used -= 1
        group.idle_since = time.monotonic()

    def _later(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    async def _sealed(self, session: Session, request: Request) -> Answer:
        """Return a snapshot with this server's signature before it."""
        answer = await session.group.pool.submit(session.slot, request)
        if answer.status != 200:
            return answer
        return Answer(200, wire.BYTES, self._mac(session.group, answer.body) + answer.body)

    def _unsealed(self, group: _Group, data: bytes) -> bytes:
        """Return a snapshot that this server has signed; nothing else is ever unpickled."""
        mac, body = data[:_MAC_BYTES], data[_MAC_BYTES:]
        if not hmac.compare_digest(mac, self._mac(group, body)):
            detail = f"the snapshot is not one that this server, since its start, has taken of {group.env_id}"
            raise Refusal(422, Code.FOREIGN_SNAPSHOT, detail)
        return body

    def _mac(self, group: _Group, body: bytes) -> bytes:
        name = group.env_id.encode()
        return hmac.digest(self._key, len(name).to_bytes(4, "big") + name + body, "sha256")

    async def _fork(self, source: Session, request: Request) -> Answer:
        """Open a session that continues the episode of ``source`` as well; return what restoring it returns.

        The body of the request is the name of the new session.
        """
        name = request.body.decode()
        if name in self._sessions:
            return Answer.of_problem(409, Code.EXISTS, f"there is another session called {name}")
        snapshot = await source.group.pool.submit(source.slot, Request("snapshot"))
        if snapshot.status != 200:
            return snapshot
        try:
            session = self._enter(name, source.client, source.group)
        except Refusal as refusal:
            return refusal.answer
        session.reply = asyncio.ensure_future(
            self._begin_fork(session, Request("restore", snapshot.body, request.form))
        )
        answer = await asyncio.shield(session.reply)
        if answer.status != 200:
            self._end(session)
        return answer

    async def _begin_fork(self, session: Session, restore: Request) -> Answer:
        await asyncio.wait([session.about])
        return await session.group.pool.submit(session.slot, restore)


def _was_full(reply: asyncio.Future[Answer]) -> bool:
    """Whether there was no room, so that the request is to be tried, not answered, again."""
    return reply.done() and not reply.cancelled() and reply.result().status in (429, 503)


@contextlib.asynccontextmanager
async def watched(sessions: Sessions) -> AsyncIterator[None]:
    """Watch ``sessions`` inside, and close all afterwards."""
    watcher = asyncio.ensure_future(sessions.watch())
    try:
        yield
    finally:
        watcher.cancel()
        await sessions.close_all()
