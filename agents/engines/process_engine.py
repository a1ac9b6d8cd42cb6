"""The built-in engine in several processes, which share the weights and deal the requests out among themselves.

- ``ProcessEngine``: for small models on a CPU, whose operations are too short for several threads.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import fields
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any

from torch import nn

from ...errors import AgentropyError, UsageError
from .base import Completion, EngineStats, Request, SamplingParams, run_all
from .lanes import Tokenizer
from .radix import RadixTree, Tokens
from .shared_weights import share
from .torch_engine import CACHE_BYTES, load_into

_KNOWN = 4096
"""Sequences whose process is remembered; more are forgotten all at once, which costs a prefill each."""
_CLOSE_SECONDS = 5.0


class ProcessEngine:
    """``TorchEngine`` in ``workers`` processes of one thread each; see ``Engine``.

    A request whose context contains the first one of a family goes to that family's process, a new one to the process
    with the least to do; so members of a group and turns of an episode meet their keys. Which process that is depends
    on the calls so far alone, and so do the results. The module's parameters are moved to shared memory, where an
    optimiser changes them in place: nothing is sent when weights are loaded.
    """

    def __init__(self, model: nn.Module, tokenizer: Tokenizer | None = None, *, workers: int, **options: Any) -> None:
        """Start the processes, and wait for them when they are first needed.

        Args:
            model: a causal language model of transformers on the CPU.
            tokenizer: needed for stop strings only.
            workers: processes.
            options: of ``TorchEngine``; ``max_batch`` and ``cache_tokens`` hold for each process.

        Raises:
            UsageError: there are no workers, or the model is not on the CPU. What ``TorchEngine`` refuses is raised
                when the processes are first needed.
        """
        parameter = next(model.parameters())
        if workers < 1 or parameter.device.type != "cpu":
            raise UsageError(f"workers={workers} for a model on {parameter.device}; expected 1 or more, on the CPU")
        self._model = model
        self.tokenizer = tokenizer
        self.vocabulary: int = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
        self.exact = options.get("dtype") in (None, parameter.dtype)
        self.stats = EngineStats()
        self._known = RadixTree()
        self._owner: dict[int, tuple[int, int]] = {}
        """Of each known sequence the process, and the length of its family's first context."""
        layout = share(model)
        self._path = layout.path
        setup = {
            "model": (type(model), model.config),
            "tokenizer": tokenizer,
            "layout": layout,
            "options": {"cache_bytes": CACHE_BYTES // workers, **options},
        }
        self._workers: list[_Worker] = []
        self._limits: tuple[int, int] | None = None
        self._streams = 0
        self._finalizer = weakref.finalize(self, _stop, self._workers, layout.path)
        try:
            for _ in range(workers):
                self._workers.append(_Worker())
            self._setups = [worker.send("setup", setup) for worker in self._workers]
        except BaseException:
            self.close()
            raise

    @property
    def limits(self) -> tuple[int, int]:
        """The model's positions and ``cache_tokens``; waits for the processes to be ready.

        Raises:
            UsageError: ``TorchEngine`` refuses an option, or the engine is closed.
            AgentropyError: a process could not start.
        """
        if self._limits is None:
            try:
                answers = [worker.receive(number) for worker, number in zip(self._workers, self._setups, strict=False)]
            except BaseException:
                self.close()
                raise
            if not answers:
                raise UsageError("the engine is closed; expected a new one")
            self._limits = answers[0]
            _unlink(self._path)
        return self._limits

    def stream(self, params: SamplingParams) -> _Stream:
        """Open a stream of requests that share ``params``; see ``Engine.stream``.

        Raises:
            UsageError: stop strings are asked of an engine without a tokenizer.
        """
        if params.stop_strings and self.tokenizer is None:
            raise UsageError("stop_strings need a tokenizer; expected ProcessEngine(model, tokenizer, workers=2)")
        self._streams += 1
        return _Stream(self, self._streams, params)

    def generate(self, requests: Sequence[Request], params: SamplingParams) -> list[Completion]:
        """Continue every request; see ``TorchEngine.generate``."""
        stream = self.stream(params)
        try:
            return run_all(stream, requests)
        finally:
            stream.close()

    def load_weights(self, state_dict: Mapping[str, Any] | None, version: int) -> None:
        """Take note of new weights, or of a state dict's, which is loaded into the shared module.

        Raises:
            UsageError: the state dict has other names or shapes than the model.
        """
        if state_dict is not None:
            load_into(self._model, state_dict)
        self._forget()
        self.ask("load", version)

    def release(self, prefixes: Sequence[Tokens] | None = None) -> None:
        """Forget cached sequences that begin with one of ``prefixes``; all of them when ``None``."""
        if prefixes is None:
            self._forget()
        else:
            for prefix in prefixes:
                for sequence in list(self._known.below(prefix)):
                    self._known.remove(sequence)
        _ = self.limits
        for worker in self._workers:
            worker.send("release", prefixes)  # has no answer

    def close(self) -> None:
        """End the processes; calling again does nothing."""
        self._finalizer()

    def ask(self, operation: str, *arguments: Any) -> list[Any]:
        """Have every process do something; their answers."""
        _ = self.limits
        if not self._workers:
            raise UsageError("the engine is closed; expected a new one")
        numbers = [worker.send(operation, *arguments) for worker in self._workers]
        return [worker.receive(number) for worker, number in zip(self._workers, numbers, strict=True)]

    def place(self, context: Tokens, load: Sequence[int]) -> int:
        """The process that a request goes to; ``load`` counts what each has to do."""
        ends, shared = self._known.match(context)
        owner, root = self._owner[ends[0]] if shared else (0, 1)
        if shared < root:  # what all tasks begin with is no kinship
            owner, root = load.index(min(load)), len(context)
        if shared < len(context):
            if len(self._owner) >= _KNOWN:
                self._forget()
            number = len(self._owner)  # of released ones, too: numbers are not used again
            self._known.insert(number, context)
            self._owner[number] = owner, root
        return owner

    def _forget(self) -> None:
        self._known, self._owner = RadixTree(), {}


class _Stream:
    """Requests of one set of parameters in all processes; see ``Stream``."""

    def __init__(self, engine: ProcessEngine, number: int, params: SamplingParams) -> None:
        self._engine = engine
        self._number = number
        self._tickets = 0
        self._waiting: list[list[tuple[int, Request]]] = [[] for _ in engine._workers]
        self._running: dict[int, int] = {}
        """Ticket to process."""
        self._stepping: dict[int, int] = {}
        """Processes that have begun a step which nobody has waited for, and the numbers of their answers."""
        self._ended: list[tuple[int, Completion]] = []
        """What ended in a step whose end had to be waited for early."""
        self._closed = False
        engine.ask("open", number, params)

    @property
    def running(self) -> int:
        return len(self._running) + len(self._ended)

    def add(self, request: Request) -> int:
        """Take a request; see ``TorchStream.add``."""
        engine, tokens = self._engine, request.tokens
        if self._closed:
            raise UsageError("the stream is closed; expected a new one from engine.stream(params)")
        if tokens.min() < 0 or tokens.max() >= engine.vocabulary:
            raise UsageError(
                f"a request holds token {tokens.max()} or {tokens.min()}; "
                f"expected ids from 0 to {engine.vocabulary - 1}"
            )
        engine_limit, cache_limit = engine.limits
        longest = len(tokens) + min(request.max_tokens, engine_limit - len(tokens))
        if len(tokens) < engine_limit and longest > cache_limit:
            raise UsageError(
                f"a sequence of {longest} tokens does not fit in cache_tokens={cache_limit}; "
                "expected cache_tokens of at least the longest context plus max_tokens"
            )
        load = [0] * len(engine._workers)
        for owner in self._running.values():
            load[owner] += 1
        owner = engine.place(tokens, load)
        ticket, self._tickets = self._tickets, self._tickets + 1
        self._waiting[owner].append((ticket, request))
        self._running[ticket] = owner
        return ticket

    def step(self) -> list[tuple[int, Completion]]:
        """Let every process that has something to do begin a step; return what ended in the step before.

        So the processes work while their parent plays what they have said. What a call returns depends on the calls
        before it alone.
        """
        started = time.perf_counter()
        ended = self._collect()
        workers = self._engine._workers
        for owner in sorted(set(self._running.values())):
            self._stepping[owner] = workers[owner].send("step", self._number, self._waiting[owner])
            self._waiting[owner] = []
        self._engine.stats.seconds += time.perf_counter() - started
        return ended

    def _collect(self) -> list[tuple[int, Completion]]:
        """Wait for the step that was begun; what has ended in it or was set aside."""
        stepping, self._stepping = self._stepping, {}
        ended, self._ended = self._ended, []
        failure: Exception | None = None
        for owner, number in stepping.items():
            try:
                done, counts = self._engine._workers[owner].receive(number)
            except Exception as error:  # of one process; the others have stepped and must be heard
                failure = error
                continue
            ended += done
            for name, count in counts.items():
                setattr(self._engine.stats, name, getattr(self._engine.stats, name) + count)
        if failure is not None:
            self.close()
            raise failure
        for ticket, _ in ended:
            self._running.pop(ticket, None)
        return sorted(ended, key=lambda pair: pair[0])

    def cancel(self, ticket: int) -> Completion:
        """End a request now; see ``Stream.cancel``."""
        self._ended = self._collect()
        for place, (known, completion) in enumerate(self._ended):
            if known == ticket:
                del self._ended[place]
                return completion
        if ticket not in self._running:
            raise UsageError(f"no request with ticket {ticket} is running; expected a ticket that has not ended")
        owner = self._running.pop(ticket)
        worker = self._engine._workers[owner]
        number = worker.send("cancel", self._number, self._waiting[owner], ticket)
        self._waiting[owner] = []
        cancelled: Completion = worker.receive(number)
        return cancelled

    def close(self) -> None:
        """Cancel what runs; calling again does nothing."""
        if not self._closed and self._engine._workers:
            self._closed = True
            self._running.clear()
            self._ended.clear()
            for owner, number in self._stepping.items():
                with suppress(Exception):
                    self._engine._workers[owner].receive(number)
            self._stepping = {}
            self._engine.ask("close", self._number)


class _Worker:
    """A process and the way to it."""

    def __init__(self) -> None:
        own, other = socket.socketpair()
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
        command = [sys.executable, "-m", "agentropy.agents.engines.process_worker", str(other.fileno())]
        with other:
            self.process = subprocess.Popen(command, pass_fds=(other.fileno(),), env=environment)
        self._socket = own
        self._connection = Connection(own.fileno())
        self._asked = 0
        self._answers: dict[int, tuple[bool, Any]] = {}
        """Those that nobody has waited for yet."""
        self._arriving: SimpleQueue[Any] = SimpleQueue()
        # Read at once, so that neither side waits for the other to read while it writes.
        self._reader = Thread(target=_read, args=(self._connection, self._arriving), daemon=True)
        self._reader.start()

    def send(self, operation: str, *arguments: Any) -> int:
        """Ask for something; returns the number under which the answer comes."""
        self._asked += 1
        try:
            self._connection.send((self._asked, operation, *arguments))
        except OSError as error:
            raise self._dead() from error
        return self._asked

    def receive(self, number: int) -> Any:
        """Wait for the answer of that number; what the process raised is raised here."""
        while number not in self._answers:
            answer = self._arriving.get()
            if answer is None:
                self._arriving.put(None)
                raise self._dead()
            self._answers[answer[0]] = answer[1:]
        worked, found = self._answers.pop(number)
        if not worked:
            raise found
        return found

    def stop(self) -> None:
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._reader.join(_CLOSE_SECONDS)
        self._connection.close()
        self._socket.detach()
        try:
            self.process.wait(_CLOSE_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def _dead(self) -> AgentropyError:
        return AgentropyError(f"a process of the engine has ended (exit status {self.process.poll()})")


def _read(connection: Connection, arriving: SimpleQueue[Any]) -> None:
    """Take in answers until the process ends, which is told by ``None``."""
    with suppress(EOFError, OSError):
        while True:
            arriving.put(connection.recv())
    arriving.put(None)


def _stop(workers: list[_Worker], path: str) -> None:
    while workers:
        workers.pop().stop()
    _unlink(path)


def _unlink(path: str) -> None:
    Path(path).unlink(missing_ok=True)


def counted(before: EngineStats, after: EngineStats) -> dict[str, int]:
    """What was done between two readings, without the seconds."""
    names = [field.name for field in fields(EngineStats) if field.name != "seconds"]
    return {name: getattr(after, name) - getattr(before, name) for name in names}
