"""Requests under way at a server.

- ``HTTPStream``: takes them one by one, gives answers back as they come.
- ``no_tokens``: the completion of a request that got none.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from functools import partial

import numpy as np

from ...errors import UsageError
from .base import Completion, EngineStats, Request, SamplingParams, StopReason


class HTTPStream:
    """See ``Stream``. One thread at a time may use it, and any other may close it."""

    def __init__(
        self,
        send: Callable[[Request, SamplingParams], Future[Completion]],
        params: SamplingParams,
        stats: EngineStats,
        on_close: Callable[[HTTPStream], None],
    ) -> None:
        """``send`` starts a request; cancelling its future ends it. ``stats`` counts what is given back."""
        self._send = send
        self._params = params
        self._stats = stats
        self._on_close = on_close
        self._running: dict[int, tuple[Request, Future[Completion]]] = {}
        self._tickets = 0
        self._closed = False
        self._ended: set[int] = set()
        self._change = threading.Condition()

    def add(self, request: Request) -> int:
        """Send a request; return its ticket."""
        if self._closed:
            raise UsageError("the stream is closed")
        future = self._send(request, self._params)
        ticket = self._tickets
        self._tickets += 1
        self._running[ticket] = request, future
        future.add_done_callback(partial(self._end, ticket))
        return ticket

    def step(self) -> list[tuple[int, Completion]]:
        """Wait until at least one request has been answered; return those that were, in ticket order.

        Raises:
            AgentropyError: a request failed. It has ended; the others go on.
        """
        started = time.perf_counter()
        with self._change:
            self._change.wait_for(lambda: self._ended or not self._running)
            ended = sorted(self._ended)
        self._stats.seconds += time.perf_counter() - started
        for ticket in ended:
            error = self._running[ticket][1].exception()
            if error is not None:
                self._take(ticket)
                raise error
        return [(ticket, self._count(ticket)) for ticket in ended]

    def cancel(self, ticket: int) -> Completion:
        """End a request now, its connection too; an answer that has come meanwhile is what it has.

        Raises:
            UsageError: no request of that ticket is running.
        """
        if ticket not in self._running:
            raise UsageError(f"no request with ticket {ticket} is running")
        future = self._running[ticket][1]
        if not future.cancel() and future.exception() is None:
            return replace(self._count(ticket), stop=StopReason.CANCELLED)
        self._take(ticket)
        return no_tokens(StopReason.CANCELLED, self._params)

    @property
    def running(self) -> int:
        """Requests that were added and have not been given back."""
        return len(self._running)

    def arrived(self) -> dict[int, Completion]:
        """The answers that have come and were not given back by ``step``."""
        futures = {ticket: self._running[ticket][1] for ticket in sorted(self._ended)}
        return {ticket: future.result() for ticket, future in futures.items() if future.exception() is None}

    def close(self) -> None:
        """Cancel what runs. Safe to call twice."""
        self._closed = True
        running, self._running = self._running, {}
        for _, future in running.values():
            future.cancel()
        with self._change:
            self._ended.clear()
            self._change.notify_all()
        self._on_close(self)

    def _end(self, ticket: int, _: object) -> None:
        with self._change:
            if ticket in self._running:
                self._ended.add(ticket)
                self._change.notify_all()

    def _take(self, ticket: int) -> tuple[Request, Future[Completion]]:
        with self._change:
            self._ended.discard(ticket)
            return self._running.pop(ticket)

    def _count(self, ticket: int) -> Completion:
        request, future = self._take(ticket)
        completion = future.result()
        self._stats.prefill_tokens += len(request.tokens) - completion.cached_tokens
        self._stats.cached_tokens += completion.cached_tokens
        self._stats.decode_tokens += len(completion.tokens)
        return completion


def no_tokens(stop: StopReason, params: SamplingParams, version: int = 0) -> Completion:
    """A completion without tokens."""
    empty = np.zeros(0, np.float32)
    return Completion(
        empty.astype(np.int32),
        empty,
        empty,
        empty,
        empty,
        stop=stop,
        version=version,
        cached_tokens=0,
        entropy_top_k=params.entropy_top_k,
    )
