"""Many environments in a few processes; whichever finishes first is handed back first.

- ``EnvPool``: asynchronous ``reset``, ``step``, ``restore`` and ``fork`` on numbered slots, and ``wait``.
- ``EnvResult``: what one of them came to.
- ``PoolSnapshot``: an episode that can be continued in any slot.
- ``usable_cores``: how many workers make sense.
"""

from __future__ import annotations

import importlib
import math
import os
import pickle
import selectors
import time
import weakref
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import gymnasium

from ..errors import EnvironmentFailedError, UsageError
from .pool_process import Call, WorkerProcess, raise_failure
from .pool_worker import Failure, Frames, Setup

LEAST_MEMORY = 1 << 30
"""Bytes that a worker always has."""
_CLOSE_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class EnvResult:
    """The outcome of a reset, step, restore or fork; the reward of all but a step is 0.

    A failed result (the environment raised, its worker died or hung) ends the episode: ``terminated`` is True,
    ``error`` one sentence, and ``info`` holds ``task``, ``won=False`` and ``failed=True``.
    """

    slot: int
    observation: str
    reward: float
    terminated: bool
    truncated: bool
    info: dict[str, Any]
    failed: bool = False
    error: str | None = None


@dataclass(frozen=True, slots=True)
class PoolSnapshot:
    """An episode at one moment: the environment's own snapshot and the result that led there. Picklable."""

    state: Any
    result: EnvResult


@dataclass(slots=True)
class _Slot:
    worker: int | None = None
    task: str | None = None
    pending: bool = False
    live: bool = False
    """An episode is under way: it was begun and has neither ended nor failed."""
    last: EnvResult | None = None
    copied: EnvResult | None = None
    """The result that a restore or fork under way will report."""
    lost: str | None = None
    """Why the episode is gone although no result has said so yet."""


@dataclass(slots=True)
class _State:
    """What is left to close when the pool itself is garbage."""

    workers: list[WorkerProcess]
    selector: selectors.BaseSelector
    owner: int = field(default_factory=os.getpid)

    def close(self) -> None:
        if os.getpid() != self.owner:  # a fork of the parent must not end the parent's workers
            return
        for worker in self.workers:
            worker.say_goodbye()
        end = time.monotonic() + _CLOSE_SECONDS
        for worker in self.workers:
            worker.kill(grace=max(0.0, end - time.monotonic()))
        self.selector.close()


class EnvPool:
    """``num_envs`` slots of one registered environment, on ``num_workers`` processes.

    ``reset``, ``step``, ``restore`` and ``fork`` return at once; ``wait`` hands back results in order of
    completion. A slot has at most one such call under way: from the call until its result is handed back.

    A slot lives in one worker; where it lives may change when an episode begins. Episodes of one task go to one
    worker as far as the load allows, so that worlds which keep caches per task profit; results do not depend
    on it. A worker that dies, or works for more than ``timeout`` seconds on one call, is replaced: its pending
    slots are reported as failed, its idle ones at their next step, and a reset brings each back.

    Not for use from several threads at once. Workers end with the pool, with the interpreter, and with the
    parent process however it dies.

    >>> with EnvPool("agentropy/ALFWorld-v0", {"split": "train"}, num_envs=8) as pool:  # doctest: +SKIP
    ...     for slot, task in zip(range(8), pool.tasks("train")):
    ...         pool.reset(slot, task=task)
    ...     for result in pool.wait():
    ...         pool.step(result.slot, result.info["admissible"][0])

    Args:
        env_id: a Gymnasium id, also as ``module:id``.
        env_kwargs: arguments of ``gymnasium.make``.
        num_envs: the number of slots.
        num_workers: the number of processes; by default one for each core that this process may use.
        timeout: seconds after which one call counts as hung.
        start_timeout: the same for the start of a worker, which imports and makes its first environment.
        wrappers: wrappers of ``agentropy.envs.wrappers`` around each environment, the innermost first.
        memory_limit: bytes of private memory that a worker, and each process that it starts, may have; beyond them
            its world gets a ``MemoryError``. A worker that holds half of it between episodes is replaced. By default
            four fifths of the machine's memory, shared out among the workers.
        idle_seconds: a worker that is asked nothing for so long closes the environments that are in no episode.

    Raises:
        UsageError: an argument is out of range or cannot be sent to another process.
        Exception: whatever making the environment raises, with its type and message.
    """

    def __init__(
        self,
        env_id: str,
        env_kwargs: Mapping[str, Any] | None = None,
        *,
        num_envs: int,
        num_workers: int | None = None,
        timeout: float = 120.0,
        start_timeout: float = 120.0,
        wrappers: Sequence[str | Mapping[str, Any]] = (),
        memory_limit: int | None = None,
        idle_seconds: float = 300.0,
    ) -> None:
        times = min(timeout, start_timeout, idle_seconds)
        if num_envs < 1 or (num_workers is not None and num_workers < 1) or not times > 0:
            raise UsageError(
                "a pool needs num_envs >= 1, num_workers >= 1, timeout > 0, start_timeout > 0 and idle_seconds > 0, "
                f"not {num_envs=}, {num_workers=}, {timeout=}, {start_timeout=}, {idle_seconds=}"
            )
        if memory_limit is not None and memory_limit < LEAST_MEMORY:
            raise UsageError(f"memory_limit is {memory_limit} bytes; a worker needs at least {LEAST_MEMORY}")
        count = min(num_workers or usable_cores(), num_envs)
        self._memory_limit = memory_limit or max(LEAST_MEMORY, _machine_memory() * 4 // 5 // count)
        setup = _setup(env_id, dict(env_kwargs or {}), wrappers)
        setup = replace(setup, memory_limit=self._memory_limit, idle_seconds=idle_seconds)
        self.env_id = env_id
        self.num_envs = num_envs
        self.num_workers = count
        self._slots = [_Slot() for _ in range(num_envs)]
        self._homes: dict[str, int] = {}
        self._finished: deque[EnvResult] = deque()
        self._workers = [WorkerProcess(index, setup, timeout, start_timeout) for index in range(count)]
        self._selector = selectors.DefaultSelector()
        self._finalizer = weakref.finalize(self, _State(self._workers, self._selector).close)
        try:
            for call in [self._start(worker) for worker in self._workers]:
                self._block(call)
        except BaseException:
            self.close()
            raise

    def tasks(self, split: str | None = None) -> tuple[str, ...]:
        """The world's sorted task ids of ``split``; blocks. Raises what the world raises."""
        self._check_open()
        worker = self._running(0)
        if worker.ready is not None and not worker.ready.can_list_tasks:
            raise UsageError(f"'{self.env_id}' lists no tasks: it has no method tasks(split)")
        return self._block(worker.request(Call("tasks"), split, slot=-1))

    def reset(self, slot: int, *, task: str | None = None, seed: int | None = None) -> None:
        """Begin an episode in ``slot``: of ``task``, or of one that the environment draws."""
        state = self._idle(slot)
        options = None if task is None else {"task": task}
        self._begin(slot, state, task).request(Call("reset", slot), (seed, options))

    def step(self, slot: int, action: str) -> None:
        """Play ``action`` in ``slot``.

        Raises:
            UsageError: no episode is under way there.
        """
        state = self._idle(slot)
        self._check_live(slot, state)
        state.pending = True
        if state.lost is not None:
            self._fail(slot, state.lost)
        else:
            self._worker_of(state).request(Call("step", slot), action)

    def snapshot(self, slot: int) -> PoolSnapshot:
        """The episode in ``slot`` as it is now; blocks.

        Raises:
            UsageError: no episode was begun there, or the world has no snapshots.
            EnvironmentFailedError: the episode was lost with its worker.
        """
        state = self._idle(slot)
        self._check_live(slot, state)
        self._check_snapshots()
        if state.lost is not None:
            raise EnvironmentFailedError(state.lost)
        assert state.last is not None
        call = self._worker_of(state).request(Call("snapshot"), slot=slot)
        return PoolSnapshot(self._block(call), state.last)

    def admissible(self, slot: int) -> tuple[str, ...]:
        """The commands that do something in ``slot`` now; blocks. For worlds that list them on demand only.

        Raises:
            UsageError: no episode is under way there, or what the world raises.
            EnvironmentFailedError: the episode was lost with its worker.
        """
        state = self._idle(slot)
        self._check_live(slot, state)
        if state.lost is not None:
            raise EnvironmentFailedError(state.lost)
        return self._block(self._worker_of(state).request(Call("admissible"), slot=slot))

    def restore(self, slot: int, snapshot: PoolSnapshot) -> None:
        """Continue ``snapshot`` in ``slot``; the result repeats the observation and info it was taken at."""
        state = self._idle(slot)
        self._check_snapshots()
        worker = self._begin(slot, state, snapshot.result.info.get("task"))
        state.copied = snapshot.result
        worker.request(Call("restore", slot), snapshot.state)

    def fork(self, src: int, dst: int) -> None:
        """Continue the episode of ``src`` in ``dst`` as well; only ``dst`` becomes pending."""
        source, state = self._idle(src), self._idle(dst)
        self._pump(0.0)  # its worker may have died
        self._check_live(src, source)
        self._check_snapshots()
        if src == dst:
            raise UsageError(f"cannot fork slot {src} into itself")
        if source.lost is not None:
            state.pending = True
            state.task = source.task
            self._fail(dst, source.lost)
            return
        worker = self._begin(dst, state, source.task, source.worker)
        state.copied = source.last
        worker.request(Call("fork", dst), src)

    def wait(
        self, slots: Collection[int] | None = None, *, all: bool = False, timeout: float | None = None
    ) -> list[EnvResult]:
        """Hand back finished results in order of completion, at least one.

        Args:
            slots: look at these slots only; others keep their results.
            all: wait for every pending one of them.
            timeout: give up after so many seconds and hand back what there is, perhaps nothing.

        Raises:
            UsageError: nothing is pending (with ``all``, the answer is an empty list).
        """
        self._check_open()
        chosen = range(self.num_envs) if slots is None else slots
        wanted = {slot for slot in chosen if self._slot(slot).pending}
        if not wanted and not all:
            raise UsageError("nothing to wait for: no reset, step, restore or fork is under way in these slots")
        end = math.inf if timeout is None else time.monotonic() + timeout
        results: list[EnvResult] = []
        self._pump(0.0)
        while True:
            results += self._collect(wanted)
            left = end - time.monotonic()
            if not wanted or left <= 0 or (results and not all):
                return results
            self._pump(left)

    def pids(self) -> list[int]:
        """The process ids of the workers that are running."""
        return [worker.process.pid for worker in self._workers if worker.channel is not None]

    def close(self) -> None:
        """End every worker; what is pending is dropped. Safe to call twice."""
        self._finalizer()

    def __enter__(self) -> EnvPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _slot(self, slot: int) -> _Slot:
        if not 0 <= slot < self.num_envs:
            raise UsageError(f"no slot {slot}: this pool has slots 0 to {self.num_envs - 1}")
        return self._slots[slot]

    def _check_open(self) -> None:
        if not self._finalizer.alive:
            raise UsageError("the pool is closed")

    def _idle(self, slot: int) -> _Slot:
        self._check_open()
        state = self._slot(slot)
        if state.pending:
            raise UsageError(f"slot {slot} is busy: wait() has not handed back the result of its last call")
        return state

    def _check_live(self, slot: int, state: _Slot) -> None:
        if not state.live:
            how = "the last one is over" if state.last is not None else "reset it first"
            raise UsageError(f"no episode is under way in slot {slot}: {how}")

    def _check_snapshots(self) -> None:
        ready = next((worker.ready for worker in self._workers if worker.ready is not None), None)
        if ready is not None and not ready.can_snapshot:
            raise UsageError(f"'{self.env_id}' cannot be forked: it has no snapshot() and restore()")

    def _worker_of(self, state: _Slot) -> WorkerProcess:
        assert state.worker is not None
        return self._workers[state.worker]

    def _begin(self, slot: int, state: _Slot, task: str | None, worker: int | None = None) -> WorkerProcess:
        """Make ``slot`` pending, and bind it to a worker: to ``worker`` or where ``task`` is best served."""
        chosen = self._route(state, task) if worker is None else worker
        process = self._running(chosen)
        if state.worker not in (None, chosen):
            self._worker_of(state).release(slot)
        state.worker, state.task = chosen, task
        state.pending, state.live, state.lost, state.copied = True, True, None, None
        return process

    def _route(self, state: _Slot, task: str | None) -> int:
        """The worker that served ``task`` last, unless it is busier than the idlest by a quarter of its share."""
        load = [0] * self.num_workers
        for other in self._slots:
            if other.live and other is not state and other.worker is not None:
                load[other.worker] += 1
        home = state.worker if task is None else self._homes.get(task)
        if home is None or load[home] > min(load) + self.num_envs // (4 * self.num_workers):
            home = load.index(min(load))
        if task is not None:
            self._homes[task] = home
        return home

    def _running(self, index: int) -> WorkerProcess:
        """The worker, started again if it has died in the meantime."""
        self._pump(0.0)
        worker = self._workers[index]
        if worker.channel is not None and self._outgrown(worker):
            self._selector.unregister(worker.channel)
            worker.say_goodbye()
            worker.kill(grace=_CLOSE_SECONDS)
        if worker.channel is None:
            self._start(worker)
        return worker

    def _outgrown(self, worker: WorkerProcess) -> bool:
        """Whether the worker is between episodes and holds more memory than it should keep."""
        if worker.calls or worker.memory <= max(self._memory_limit // 2, worker.fresh + self._memory_limit // 4):
            return False
        return not any(state.live or state.pending for state in self._slots if state.worker == worker.index)

    def _start(self, worker: WorkerProcess) -> Call:
        call = worker.start()
        self._selector.register(worker.channel, selectors.EVENT_READ, worker)  # type: ignore[arg-type]
        return call

    def _block(self, call: Call) -> Any:
        while not call.done:
            self._pump(math.inf)
        if isinstance(call.reply, Failure):
            raise_failure(call.reply)
        return call.reply

    def _pump(self, seconds: float) -> None:
        """Take in replies, waiting at most ``seconds`` for the first, and bury workers that died or hang."""
        deadlines = [worker.deadline for worker in self._workers if worker.deadline is not None]
        if deadlines:
            seconds = min(seconds, max(0.0, min(deadlines) - time.monotonic()))
        for key, _ in self._selector.select(None if seconds == math.inf else seconds):
            worker = key.data
            calls, ended = worker.receive()
            for call in calls:
                if call.slot is not None:
                    self._finish(call.slot, call.reply)
            if ended:
                self._bury(worker, hung=False)
        for worker in self._workers:
            if worker.deadline is not None and worker.deadline <= time.monotonic():
                self._bury(worker, hung=True)

    def _bury(self, worker: WorkerProcess, hung: bool) -> None:
        self._selector.unregister(worker.channel)  # type: ignore[arg-type]
        was_ready = worker.ready is not None
        reason, calls = worker.bury(hung)
        for state in self._slots:
            if state.worker == worker.index and state.live:
                state.lost = reason
        for call in calls:
            if call.slot is None:
                call.reply = Failure(reason, None, reason)
            else:
                self._fail(call.slot, reason)
        if was_ready:  # one that cannot even start is tried again when it is needed, not in a loop
            self._start(worker)

    def _finish(self, slot: int, reply: Any) -> None:
        if isinstance(reply, Failure):
            self._fail(slot, reply.text)
            return
        copied = self._slots[slot].copied
        if copied is not None:
            result = replace(copied, slot=slot, reward=0.0)
        elif len(reply) == 2:
            result = EnvResult(slot, reply[0], 0.0, False, False, reply[1])
        else:
            result = EnvResult(slot, *reply)
        self._finished.append(result)

    def _fail(self, slot: int, error: str) -> None:
        info = {"task": self._slots[slot].task, "won": False, "failed": True}
        self._finished.append(EnvResult(slot, "", 0.0, True, False, info, failed=True, error=error))

    def _collect(self, wanted: set[int]) -> list[EnvResult]:
        """Take the finished results of ``wanted`` slots, and take those slots out of it."""
        results = [result for result in self._finished if result.slot in wanted]
        if results:
            self._finished = deque(result for result in self._finished if result.slot not in wanted)
        for result in results:
            wanted.discard(result.slot)
            state = self._slots[result.slot]
            state.pending, state.copied, state.last = False, None, result
            state.live = not (result.terminated or result.truncated)
            state.task = result.info.get("task", state.task)
        return results


def usable_cores() -> int:
    """The number of cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _machine_memory() -> int:
    """Bytes of memory that the machine has."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _setup(env_id: str, kwargs: dict[str, Any], wrappers: Sequence[str | Mapping[str, Any]]) -> Setup:
    """Find the registered environment here, so that workers need none of the parent's registrations."""
    module, _, name = env_id.rpartition(":")
    if module:
        importlib.import_module(module)
    spec = gymnasium.spec(name)
    if getattr(spec.entry_point, "__module__", None) == "__main__":
        raise UsageError(
            f"'{env_id}' is made by {spec.entry_point!r}, which workers cannot import: "
            "move it into a module of its own and register it there"
        )
    # The pool itself enforces order and the time limit: wrappers that count would not be part of a snapshot.
    max_steps = kwargs.pop("max_episode_steps", spec.max_episode_steps)
    spec = replace(spec, order_enforce=False, disable_env_checker=True, max_episode_steps=None)
    if wrappers:
        from .wrappers import wrapper_specs

        spec = replace(spec, additional_wrappers=(*spec.additional_wrappers, *wrapper_specs(wrappers)))
    setup = Setup(spec, kwargs, max_steps, memory_limit=None, idle_seconds=math.inf, die_with_parent=False)
    try:
        Frames.encode(setup)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise UsageError(f"the arguments of '{env_id}' cannot be sent to another process: {error}") from error
    return setup
