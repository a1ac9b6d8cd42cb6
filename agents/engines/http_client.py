"""Requests to a server that may be slow, overloaded, hung, dead or restarted.

- ``Courier``: sends JSON until it is answered or refused, or until patience ends.
- ``EventLoop``: an event loop in a thread of its own.
- ``ServerUnavailable``, ``ServerRefused``, ``BadAnswer``: how a request can fail.
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
import threading
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from ...errors import AgentropyError, UsageError
from ...extras import require
from .base import Completion

if TYPE_CHECKING:
    import httpx

T = TypeVar("T")

_LOG = logging.getLogger(__name__)
_PROBE_SECONDS = 5.0
_CONNECT_SECONDS = 10.0
_LONGEST_PAUSE = 30.0
_LONGEST_PROBE_PAUSE = 5.0
_OVERLOADED = frozenset({408, 425, 429})
_GATEWAY = frozenset({502, 503, 504})
_ABSENT = frozenset({404, 405, 501})
_LOOPBACK = ("localhost", "127.0.0.1", "::1")


class ServerUnavailable(AgentropyError):
    """No answer came in time, or after all attempts.

    Attributes:
        url: the server.
        reason: what went wrong last.
        seconds: how long it was tried.
        answered: what had been answered when it was raised by ``generate``, by the request's position.
    """

    def __init__(self, url: str, reason: str, seconds: float) -> None:
        super().__init__(f"{url} gave no answer for {seconds:.1f} s; the last attempt: {reason}")
        self.url, self.reason, self.seconds = url, reason, seconds
        self.answered: dict[int, Completion] = {}


class ServerRefused(AgentropyError):
    """The server said no, and would say so again."""

    def __init__(self, url: str, status: int, message: str) -> None:
        super().__init__(f"{url} refused with status {status}: {message}")
        self.url, self.status, self.message = url, status, message


class BadAnswer(AgentropyError):
    """The server answered with something that is no answer to the request."""


class EventLoop:
    """An event loop in a daemon thread."""

    def __init__(self, name: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Start a coroutine; cancelling the future cancels it."""
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def call(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine to its end; an interrupt cancels it."""
        future = self.submit(work)
        try:
            return future.result()
        finally:
            future.cancel()

    def close(self) -> None:
        """Cancel everything, and end the thread. Safe to call twice."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
        finally:
            tasks = asyncio.all_tasks(self._loop)
            for task in tasks:
                task.cancel()
            self._loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())
            self._loop.close()


class Courier:
    """Sends requests to one server; all methods but the constructor run in the event loop.

    A request is sent again with exponential back-off after a lost connection, a timeout, status 408, 425, 429 or 5xx.
    While the server cannot be reached or says that it is not healthy, nothing is sent but one probe at a time: the
    requests wait until it is back, and are then sent again. Other statuses are final.
    """

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None,
        concurrency: int,
        timeout: float,
        retries: int,
        backoff: float,
        patience: float,
        on_wait: Callable[[str], None] | None = None,
    ) -> None:
        """Remember how to ask; nothing is sent yet.

        Raises:
            UsageError: a number is out of its range, or the address is none.
            MissingDependencyError: httpx is not installed.
        """
        require("the HTTP engine", "http", ["httpx"])
        if concurrency < 1 or timeout <= 0 or retries < 0 or backoff < 0 or patience < 0:
            raise UsageError(
                f"concurrency={concurrency}, timeout={timeout}, retries={retries}, backoff={backoff}, "
                f"patience={patience}; expected concurrency >= 1, timeout > 0 and the others >= 0"
            )
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UsageError(f"{url!r} is no server; expected a URL such as http://localhost:8000")
        self.url = url.rstrip("/").removesuffix("/v1")
        self.sent = 0
        """Requests sent so far, repeats included."""
        self._local = parts.hostname in _LOOPBACK
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._timeout, self._retries, self._backoff, self._patience = timeout, retries, backoff, patience
        self._tell = on_wait or _LOG.warning
        self._jitter = random.Random()
        self._slots = asyncio.Semaphore(concurrency)
        self._verify: Any = None
        """The context of secure connections, made once because that takes long."""
        self._clients: list[httpx.AsyncClient] = []
        self._idle: list[httpx.AsyncClient] = []
        self._outage: asyncio.Future[None] | None = None
        self.prepare: Callable[[], Coroutine[Any, Any, None]] | None = None
        """Called when the server is well again, before requests are sent to it; uses ``once`` only."""

    async def get(self, path: str) -> Any:
        """Return the JSON at ``path``; see ``send``."""
        return await self.send("GET", path)

    async def post(self, path: str, body: Any) -> Any:
        """Post JSON and return the JSON that answers it; see ``send``."""
        return await self.send("POST", path, json.dumps(body).encode(), "application/json")

    async def send(
        self, method: str, path: str, content: bytes | None = None, kind: str = "", *, timeout: float | None = None
    ) -> Any:
        """Send one request until it is answered.

        Raises:
            ServerUnavailable: there was no server for ``patience`` seconds, or it failed ``retries + 1`` times.
            ServerRefused: it answered with a status that sending again will not change.
            BadAnswer: the answer is no JSON.
        """
        import httpx

        started, attempt = time.monotonic(), 0
        while True:
            wait: float | None = None
            gone = True
            if self._outage is not None:
                await asyncio.shield(self._outage)
            try:
                async with self._slots:
                    response = await self.once(method, path, content, kind, timeout=timeout)
            except httpx.TransportError as error:
                reason = f"{type(error).__name__}{': ' if str(error) else ''}{error}"
            else:
                status = response.status_code
                if status < 300:
                    return _parsed(response, self.url + path)
                reason = f"status {status}: {reason_of(response)}"
                if status not in _OVERLOADED and status < 500:
                    raise ServerRefused(self.url + path, status, reason_of(response))
                wait = _retry_after(response)
                gone = status in _GATEWAY and wait is None
            attempt += 1
            if attempt > self._retries:
                raise ServerUnavailable(self.url + path, reason, time.monotonic() - started)
            if gone:
                await self.until_back(reason)
            await asyncio.sleep(self._pause(attempt, _LONGEST_PAUSE) if wait is None else min(wait, self._patience))

    async def once(
        self, method: str, path: str, content: bytes | None = None, kind: str = "", *, timeout: float | None = None
    ) -> httpx.Response:
        """Send a request once; ``httpx.TransportError`` where that fails."""
        import httpx

        self.sent += 1
        limits = self._limits(self._timeout if timeout is None else timeout)
        headers = {"Content-Type": kind} if kind else {}
        client = self._idle.pop() if self._idle else self._open()
        try:
            return await client.request(method, self.url + path, content=content, headers=headers, timeout=limits)
        except httpx.InvalidURL as error:
            raise UsageError(f"{self.url!r} is no URL: {error}") from error
        finally:
            self._idle.append(client)

    async def until_back(self, reason: str) -> None:
        """Return once the server is well; all requests wait for one probe."""
        if self._outage is None:
            self._outage = asyncio.ensure_future(self._probe(reason))
            self._outage.add_done_callback(self._over)
        await asyncio.shield(self._outage)

    async def close(self) -> None:
        """Close the connections."""
        for client in self._clients:
            await client.aclose()
        self._clients, self._idle = [], []

    def _open(self) -> httpx.AsyncClient:
        """A client with one connection: httpx's own pool looks at all connections whenever one of them changes."""
        import httpx

        if self._verify is None:
            plain = self._local and self.url.startswith("http:")
            self._verify = False if plain else httpx.create_ssl_context()
        client = httpx.AsyncClient(
            limits=httpx.Limits(max_connections=1),
            headers=self._headers,
            verify=self._verify,
            trust_env=not self._local,
        )
        self._clients.append(client)
        return client

    @staticmethod
    def _limits(seconds: float) -> httpx.Timeout:
        import httpx

        return httpx.Timeout(seconds, connect=min(seconds, _CONNECT_SECONDS), pool=None)

    def _pause(self, attempt: int, longest: float) -> float:
        return min(longest, self._backoff * 2 ** (attempt - 1)) * self._jitter.uniform(0.5, 1.5)

    def _over(self, outage: asyncio.Future[None]) -> None:
        self._outage = None
        if not outage.cancelled():
            outage.exception()  # retrieved even when nobody waits any more

    async def _probe(self, reason: str) -> None:
        started, attempt = time.monotonic(), 0
        while not await self._well():
            seconds = time.monotonic() - started
            if attempt == 0:
                self._tell(f"{self.url} does not answer ({reason}); waiting for it up to {self._patience:g} s")
            if seconds >= self._patience:
                raise ServerUnavailable(self.url, reason, seconds)
            attempt += 1
            pause = self._pause(attempt, _LONGEST_PROBE_PAUSE)
            await asyncio.sleep(min(max(pause, 0.01), self._patience - seconds))
        if attempt:
            self._tell(f"{self.url} answers again after {time.monotonic() - started:.1f} s")

    async def _well(self) -> bool:
        """Whether the server says that it is healthy, or at least lists its models where it has no such page."""
        import httpx

        seconds = min(self._timeout, _PROBE_SECONDS)
        try:
            response = await self.once("GET", "/health", timeout=seconds)
            if response.status_code in _ABSENT:
                response = await self.once("GET", "/v1/models", timeout=seconds)
            if response.status_code < 500 and self.prepare is not None:
                await self.prepare()
        except httpx.TransportError:
            return False
        return response.status_code < 500


def _parsed(response: httpx.Response, url: str) -> Any:
    try:
        return response.json()
    except ValueError as error:
        raise BadAnswer(f"{url} answered with something that is no JSON: {response.text[:200]!r}") from error


def reason_of(response: httpx.Response) -> str:
    """The server's own words: OpenAI's form, FastAPI's, or the text."""
    try:
        body = response.json()
    except ValueError:
        return response.text[:500].strip() or "no reason given"
    if isinstance(body, dict):
        error = body.get("error", body)
        if isinstance(error, dict):
            error = error.get("message") or error.get("detail") or error
        return str(error)[:2000]
    return str(body)[:500]


def _retry_after(response: httpx.Response) -> float | None:
    """Seconds that the server asks to wait (RFC 9110, section 10.2.3): a number or a date."""
    given = response.headers.get("retry-after", "").strip()
    if given.replace(".", "", 1).isdecimal():
        return float(given)
    try:
        return max(0.0, parsedate_to_datetime(given).timestamp() - time.time())
    except (TypeError, ValueError):
        return None
