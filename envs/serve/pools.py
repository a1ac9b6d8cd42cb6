"""The pool of processes behind the sessions of one environment and its arguments.

- ``Pool``: an ``EnvPool`` in a thread of its own, for use from an asyncio loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import selectors
import socket
import threading
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ...errors import UsageError
from ..pool import EnvPool, EnvResult
from .hosted import HOSTED, Answer, Request
from .wire import Code


class _Bell:
    """A socket among those of the workers, which wakes the thread that waits for them."""

    def __init__(self) -> None:
        self.socket, self._rope = socket.socketpair()
        self.socket.setblocking(False)
        self._rope.setblocking(False)

    def ring(self) -> None:
        """Wake the thread. From any thread."""
        with contextlib.suppress(OSError):  # a full buffer wakes it as well, and a closed one has nobody to wake
            self._rope.send(b"\0")

    def receive(self) -> tuple[list[Any], bool]:
        """Answer as a worker that has nothing to say."""
        with contextlib.suppress(BlockingIOError):
            self.socket.recv(1 << 12)
        return [], False

    def close(self) -> None:
        self.socket.close()
        self._rope.close()


class _WakeablePool(EnvPool):
    """A pool whose wait ends when a bell rings."""

    def listen(self, bell: _Bell) -> None:
        self._selector.register(bell.socket, selectors.EVENT_READ, bell)

    def next(self) -> list[EnvResult]:
        """Block until there is something to do; return the results that are there, perhaps none."""
        if not self._finished:
            self._pump(math.inf)
        return self._collect({result.slot for result in self._finished})


@dataclass(frozen=True, slots=True, eq=False)
class _Job:
    slot: int
    request: Request
    future: asyncio.Future[Answer]


class Pool:
    """The slots of one environment. Methods are for the thread of the loop that made it; nothing raises.

    A request in a slot whose process died is answered with ``Code.LOST``; so are the next requests of the other
    episodes there. A slot has at most one request under way.
    """

    def __init__(
        self, env_id: str, env_kwargs: Mapping[str, Any], *, num_envs: int, num_workers: int, timeout: float
    ) -> None:
        """Start the processes, without waiting for them.

        Args:
            env_id: a Gymnasium id.
            env_kwargs: its arguments.
            num_envs: the number of slots.
            num_workers: the number of processes.
            timeout: seconds after which a request counts as hung.
        """
        self._loop = asyncio.get_running_loop()
        self._make: Callable[[], _WakeablePool] = lambda: _WakeablePool(
            HOSTED,
            {"env_id": env_id, "env_kwargs": dict(env_kwargs)},
            num_envs=num_envs,
            num_workers=num_workers,
            timeout=timeout,
        )
        self._bell = _Bell()
        self._jobs: deque[_Job | None] = deque()
        self._under_way: dict[int, _Job] = {}
        self._begun: set[int] = set()
        """Slots in which an episode of the pool, which is a session, is under way."""
        self._answers: list[tuple[asyncio.Future[Answer], Answer]] = []
        self.broken: str | None = None
        """Why nothing is served any more."""
        self._thread = threading.Thread(target=self._run, name=f"pool of {env_id}", daemon=True)
        self._thread.start()

    def submit(self, slot: int, request: Request) -> asyncio.Future[Answer]:
        """Return the answer to come."""
        future: asyncio.Future[Answer] = self._loop.create_future()
        if self.broken is not None:
            future.set_result(_lost(self.broken))
        else:
            self._jobs.append(_Job(slot, request, future))
            self._bell.ring()
        return future

    async def close(self, seconds: float = 15.0) -> None:
        """End the processes; what is under way is answered with ``Code.LOST``. Safe to call twice."""
        self._jobs.append(None)
        self._bell.ring()
        await asyncio.to_thread(self._thread.join, seconds)

    def _run(self) -> None:
        reason = "the server closed the pool"
        try:
            with contextlib.closing(self._make()) as pool:
                pool.listen(self._bell)
                while self._dispatch(pool):
                    for result in pool.next():
                        self._finish(pool, result)
                    self._deliver()
        except Exception as error:  # no process can be started, for example
            reason = f"the pool broke: {type(error).__name__}: {error}"
        finally:
            self._loop_calls(self._give_up, reason)
            self._bell.close()

    def _dispatch(self, pool: _WakeablePool) -> bool:
        """Send the requests that have come; return whether to go on."""
        while self._jobs:
            job = self._jobs.popleft()
            if job is None:
                return False
            self._under_way[job.slot] = job
            try:
                if job.slot in self._begun:
                    pool.step(job.slot, job.request)  # type: ignore[arg-type]
                else:
                    pool.reset(job.slot)
            except UsageError as error:
                self._answer(self._under_way.pop(job.slot), Answer.of_problem(500, Code.FAILED, str(error)))
        return True

    def _finish(self, pool: _WakeablePool, result: EnvResult) -> None:
        job = self._under_way[result.slot]
        if result.failed:
            self._begun.discard(result.slot)
            self._answer(self._under_way.pop(result.slot), _lost(str(result.error)))
        elif job.slot in self._begun:
            if result.terminated:
                self._begun.discard(result.slot)
            self._answer(self._under_way.pop(result.slot), result.observation)  # type: ignore[arg-type]
        else:
            self._begun.add(job.slot)
            pool.step(job.slot, job.request)  # type: ignore[arg-type]

    def _answer(self, job: _Job, answer: Answer) -> None:
        self._answers.append((job.future, answer))

    def _deliver(self) -> None:
        if self._answers:
            answers, self._answers = self._answers, []
            self._loop_calls(_set_all, answers)

    def _give_up(self, reason: str) -> None:
        """In the loop, after the thread's last work: whatever was asked is answered."""
        self.broken = reason
        _set_all(self._answers)
        jobs = [*self._under_way.values(), *(job for job in self._jobs if job is not None)]
        _set_all([(job.future, _lost(reason)) for job in jobs])
        self._under_way.clear()
        self._jobs.clear()

    def _loop_calls(self, function: Callable[[Any], None], argument: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits for an answer
            self._loop.call_soon_threadsafe(function, argument)


def _lost(reason: str) -> Answer:
    return Answer.of_problem(500, Code.LOST, f"the episode was lost: {reason}")


def _set_all(answers: list[tuple[asyncio.Future[Answer], Answer]]) -> None:
    for future, answer in answers:
        if not future.done():
            future.set_result(answer)
