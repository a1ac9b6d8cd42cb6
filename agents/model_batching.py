"""One thread that runs an engine for many others.

- ``Batcher``: requests join the running batch as they arrive, and leave it when they are done or nobody waits.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from ..errors import AgentropyError
from .engines.base import Completion, Engine, Request, SamplingParams, Stream

_LOG = logging.getLogger(__name__)


@dataclass(eq=False)
class _Job:
    request: Request
    params: SamplingParams
    future: Future[Completion]


@dataclass(eq=False)
class _Update:
    work: Callable[[Engine], Any]
    future: Future[Any]


@dataclass
class _Batch:
    """The requests of one stream, by ticket."""

    stream: Stream
    jobs: dict[int, _Job] = field(default_factory=dict)


class Batcher:
    """Owns an engine: only its thread calls it, so the engine need not know of threads.

    Requests with equal sampling parameters share a stream; the streams take turns, a step each. A stream is closed when
    it is empty. A request whose future is cancelled is taken out of its stream before the next step.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._inbox: queue.SimpleQueue[_Job | _Update | None] = queue.SimpleQueue()
        self._batches: dict[SamplingParams, _Batch] = {}
        self._held: list[_Job] = []
        self._updates: list[_Update] = []
        self._lock = threading.Lock()
        self._closed = False
        self.waiting = 0
        """Requests that were submitted and have not ended."""
        self._thread = threading.Thread(target=self._run, name="agentropy engine", daemon=True)
        self._thread.start()

    @property
    def running(self) -> int:
        """Requests in the engine."""
        return sum(len(batch.jobs) for batch in list(self._batches.values()))

    def submit(self, request: Request, params: SamplingParams) -> Future[Completion]:
        """Add a request; cancelling the future ends it.

        Raises:
            AgentropyError: the batcher is closed.
        """
        job = _Job(request, params, Future())
        with self._lock:
            if self._closed:
                raise AgentropyError("the server is shutting down")
            self.waiting += 1
            self._inbox.put(job)
        job.future.add_done_callback(self._ended)
        return job.future

    def update(self, work: Callable[[Engine], Any]) -> Future[Any]:
        """Do ``work`` with the engine when what runs has ended; requests that come meanwhile wait for it."""
        update = _Update(work, Future())
        with self._lock:
            if self._closed:
                raise AgentropyError("the server is shutting down")
            self._inbox.put(update)
        return update.future

    def close(self) -> None:
        """Cancel what runs and end the thread; the engine stays open. Safe to call twice."""
        with self._lock:
            self._closed = True
            self._inbox.put(None)
        self._thread.join()

    def _ended(self, _: object) -> None:
        with self._lock:
            self.waiting -= 1

    def _run(self) -> None:
        while self._listen():
            self._drop_cancelled()
            if self._updates and not self._batches:
                self._do_updates()
            for params in list(self._batches):
                self._step(params)
        for batch in self._batches.values():
            batch.stream.close()
        left: list[_Job | _Update] = [job for batch in self._batches.values() for job in batch.jobs.values()]
        self._batches.clear()
        for one in [*left, *self._held, *self._updates]:
            _fail(one, AgentropyError("the server is shutting down"))

    def _do_updates(self) -> None:
        updates, self._updates = self._updates, []
        for update in updates:
            try:
                result = update.work(self._engine)
            except Exception as error:  # whatever the engine raises is the caller's to hear
                _fail(update, error)
            else:
                if update.future.set_running_or_notify_cancel():
                    update.future.set_result(result)
        held, self._held = self._held, []
        for job in held:
            self._start(job)

    def _listen(self) -> bool:
        """Take in what has come, waiting for it where there is nothing else to do; False at the end."""
        idle = not self._batches and not self._updates
        while True:
            try:
                message = self._inbox.get(block=idle)
            except queue.Empty:
                return True
            if message is None:
                return False
            if isinstance(message, _Update):
                self._updates.append(message)
            elif self._updates:
                self._held.append(message)
            else:
                self._start(message)
            idle = False

    def _start(self, job: _Job) -> None:
        if job.future.cancelled():
            return
        try:
            batch = self._batches.get(job.params)
            if batch is None:
                batch = self._batches[job.params] = _Batch(self._engine.stream(job.params))
            batch.jobs[batch.stream.add(job.request)] = job
        except Exception as error:  # this request's fault; the others go on
            _fail(job, error)
            if batch is not None:
                self._close_empty(job.params, batch)

    def _drop_cancelled(self) -> None:
        for params, batch in list(self._batches.items()):
            for ticket in [ticket for ticket, job in batch.jobs.items() if job.future.cancelled()]:
                del batch.jobs[ticket]
                batch.stream.cancel(ticket)
            self._close_empty(params, batch)

    def _step(self, params: SamplingParams) -> None:
        batch = self._batches[params]
        try:
            ended = batch.stream.step()
        except Exception as fault:  # one bad batch must not end the server
            error = fault
            if not isinstance(fault, AgentropyError):
                _LOG.exception("the engine failed")
                error = AgentropyError(f"the engine failed: {type(fault).__name__}: {fault}")
            del self._batches[params]
            batch.stream.close()
            for job in batch.jobs.values():
                _fail(job, error)
            return
        for ticket, completion in ended:
            job = batch.jobs.pop(ticket)
            if job.future.set_running_or_notify_cancel():
                job.future.set_result(completion)
        self._close_empty(params, batch)

    def _close_empty(self, params: SamplingParams, batch: _Batch) -> None:
        if not batch.jobs:
            del self._batches[params]
            batch.stream.close()


def _fail(job: _Job | _Update, error: Exception) -> None:
    if job.future.set_running_or_notify_cancel():
        job.future.set_exception(error)
