"""Continuous batching: requests join and leave while others run.

- ``TorchStream``: the stream of the built-in engine.
"""

from __future__ import annotations

import time
from collections import deque
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...errors import AgentropyError, UsageError
from ...kernels.paged import OutOfBlocks
from .base import Completion, Request, SamplingParams
from .generic import evaluating
from .lanes import Lanes, Progress
from .radix import RadixTree

if TYPE_CHECKING:
    from .torch_engine import TorchEngine

Array = NDArray[np.int64]

_SHARED_WORTH_WAITING = 16
"""A request waits for another one's prefill when that spares it more tokens than this."""
_PREFILL_TOKENS = 8192
"""Tokens of one forward pass: bounds the memory of its activations."""


class TorchStream:
    """Every step packs the new tokens of all running requests, one or many, into one forward pass.

    Requests that wait are admitted in order as long as there is room; of those that share a long prefix that is not
    cached the first is computed first, in a pass of its own, and equal contexts are computed once. When memory runs
    out the later half of the requests goes back to waiting, with what it has sampled.
    """

    def __init__(self, engine: TorchEngine, params: SamplingParams) -> None:
        self._engine = engine
        self._lanes = Lanes(engine.max_batch, params, engine.tokenizer)
        self._waiting: deque[Progress] = deque()
        self._running: list[Progress] = []
        self._ended: list[tuple[int, Completion]] = []
        self._tickets = 0
        self._limit = engine.max_batch
        self._closed = False

    def add(self, request: Request) -> int:
        """Take a request; see ``Stream.add``.

        Raises:
            UsageError: a token is outside the vocabulary, the sequence exceeds ``cache_tokens``, or the stream is
                closed.
        """
        if self._closed:
            raise UsageError("the stream is closed; expected a new one from engine.stream(params)")
        engine, tokens = self._engine, request.tokens
        if tokens.min() < 0 or tokens.max() >= engine.vocabulary:
            raise UsageError(
                f"a request holds token {tokens.max()} or {tokens.min()}; "
                f"expected ids from 0 to {engine.vocabulary - 1}"
            )
        limit = min(request.max_tokens, engine.max_positions - len(tokens))
        progress = Progress(self._tickets, request, limit)
        if limit > 0:
            engine.cache.check(len(tokens) + limit)
            self._waiting.append(progress)
        else:
            self._ended.append((progress.ticket, self._lanes.completion(progress, engine.version)))
        self._tickets += 1
        return progress.ticket

    @property
    def running(self) -> int:
        """Requests that were added and have not ended."""
        return len(self._waiting) + len(self._running) + len(self._ended)

    def step(self) -> list[tuple[int, Completion]]:
        """Sample one token for every request that there is room for; see ``Stream.step``.

        Raises:
            AgentropyError: the model's logits are not finite, or other streams hold the whole cache. Running
                requests of the stream are given up in the first case.
        """
        started = time.perf_counter()
        ended = []
        if self._waiting or self._running:
            with torch.inference_mode(), evaluating(self._engine.modules), self._engine.threads():
                ended = self._advance()
        ended += self._ended
        self._ended = []
        self._engine.stats.seconds += time.perf_counter() - started
        return sorted(ended, key=lambda pair: pair[0])

    def cancel(self, ticket: int) -> Completion:
        """End a request now; see ``Stream.cancel``.

        Raises:
            UsageError: no such request is running.
        """
        for number, (known, completion) in enumerate(self._ended):
            if known == ticket:
                del self._ended[number]
                return completion
        for group in (self._waiting, self._running):
            for progress in group:
                if progress.ticket == ticket:
                    group.remove(progress)
                    self._give_up(progress)
                    return self._lanes.completion(progress, self._engine.version, cancelled=True)
        raise UsageError(f"no request with ticket {ticket} is running; expected a ticket that has not ended")

    def close(self) -> None:
        """Cancel what runs; calling again does nothing."""
        self.suspend()
        self._waiting.clear()
        self._ended.clear()
        self._closed = True
        self._engine.forget(self)

    def suspend(self) -> None:
        """Let running requests wait again, in order; they go on with what they have sampled."""
        for progress in self._running:
            self._give_up(progress)
        self._waiting = deque(sorted((*self._running, *self._waiting), key=lambda progress: progress.ticket))
        self._running = []

    def _give_up(self, progress: Progress) -> None:
        """Leave what has been computed of a request to the cache."""
        if progress.sequence >= 0:
            context = self._lanes.context(progress)
            # Its last token is left to compute, as the next one's logits come from it.
            self._engine.cache.finish(progress.sequence, context[: min(progress.computed, len(context) - 1)])
            progress.sequence, progress.computed = -1, 0

    def _advance(self) -> list[tuple[int, Completion]]:
        while True:
            try:
                done, logits = self._compute()
                over, finite = self._lanes.draw(np.array([progress.lane for progress in done]), logits)
                break
            except Exception as error:
                # Whatever it was: nobody may count as computed whose next token has not been drawn.
                count = len(self._running)
                self.suspend()
                if not _out_of_memory(error) or count <= 1:
                    raise
                self._limit = count // 2
        version = self._engine.version
        if not finite:
            for progress in (*self._running, *self._waiting):
                self._give_up(progress)
                self._lanes.completion(progress, version)
            self._running, self._waiting = [], deque()
            self._engine.reset()
            raise AgentropyError(
                "the model's logits are not finite; its weights have diverged (lower the learning rate)"
            )
        self._engine.stats.decode_tokens += len(done)
        ended = []
        for progress, last in zip(done, over.tolist(), strict=True):
            if progress.version < 0:
                progress.version = version
            if last:
                self._give_up(progress)
                ended.append((progress.ticket, self._lanes.completion(progress, version)))
        if ended:
            self._running = [progress for progress in self._running if progress.sequence >= 0]
        return ended

    def _compute(self) -> tuple[list[Progress], Tensor]:
        """Admit and compute, in as many passes as shared prefixes ask for; return who has logits [n, V]."""
        decoding = list(self._running)
        done: list[Progress] = []
        parts: list[Tensor] = []
        rows: list[int] = []
        while True:
            leaders, twins, later = self._admit()
            batch = leaders if later else [*decoding, *leaders]
            if batch:
                ordered, logits = self._forward(batch)
                row = {progress.ticket: len(done) + i for i, progress in enumerate(ordered)}
                rows += range(sum(map(len, parts)), sum(map(len, parts)) + len(ordered))
                parts.append(logits)
                done += ordered
                for twin, leader in twins:
                    if not self._copy(twin, leader):
                        break
                    rows.append(rows[row[leader.ticket]])
                    done.append(twin)
            if not later:
                break
        if not done:
            raise AgentropyError(
                "other streams of this engine hold its whole cache; step them, or give the engine more cache_tokens"
            )
        logits = parts[0] if len(parts) == 1 else torch.cat(parts)
        if len(rows) > len(logits):
            logits = logits[torch.tensor(rows, device=logits.device)]
        return done, logits

    def _admit(self) -> tuple[list[Progress], list[tuple[Progress, Progress]], bool]:
        """Let waiting requests in.

        Returns:
            Those to compute now; those whose context equals one of theirs, with it, which are first in line until
            they are copied; and whether some that have room gain by waiting for the keys of these.
        """
        engine = self._engine
        wave = RadixTree()
        leaders: list[Progress] = []
        twins: list[tuple[Progress, Progress]] = []
        followers: list[Progress] = []
        while self._waiting and len(self._running) + len(twins) + len(followers) < self._limit:
            progress = self._waiting.popleft()
            context = self._lanes.context(progress)
            ends, shared = wave.match(context)
            if shared == len(context) and wave.length(ends[0]) == shared:
                twins.append((progress, leaders[ends[0]]))
                continue
            gain = min(shared, len(context) - 1)
            if gain > _SHARED_WORTH_WAITING and gain - engine.cache.tree.match(context)[1] > _SHARED_WORTH_WAITING:
                followers.append(progress)
                continue
            claimed = engine.cache.claim(context, len(progress.request.tokens) + progress.limit)
            if claimed is None:
                self._waiting.appendleft(progress)
                break
            self._start(progress, *claimed, context_length=len(context))
            wave.insert(len(leaders), context)
            leaders.append(progress)
        self._waiting.extendleft(reversed([*(twin for twin, _ in twins), *followers]))
        return leaders, twins, bool(followers)

    def _start(self, progress: Progress, sequence: int, known: int, context_length: int) -> None:
        self._lanes.take(progress)
        progress.sequence, progress.computed = sequence, known
        if progress.cached < 0:
            progress.cached = known
        self._engine.stats.prefill_tokens += context_length - known
        self._engine.stats.cached_tokens += known
        self._running.append(progress)

    def _copy(self, twin: Progress, leader: Progress) -> bool:
        """Start the first in line, whose context has just been computed for another one; without room it waits."""
        positions = len(twin.request.tokens) + twin.limit
        sequence = self._engine.cache.duplicate(leader.sequence, positions)
        if sequence is None:
            return False
        self._waiting.popleft()
        self._start(twin, sequence, leader.computed, context_length=leader.computed)
        return True

    def _forward(self, batch: list[Progress]) -> tuple[list[Progress], Tensor]:
        """Compute the tokens of each request that are not in the cache; return them in order with logits [n, V]."""
        cache, lanes = self._engine.cache, self._lanes
        sequences = np.array([progress.sequence for progress in batch])
        starts = np.array([progress.computed for progress in batch])
        drawn = lanes.count[[progress.lane for progress in batch]]
        lengths = np.array([len(progress.request.tokens) for progress in batch]) + drawn
        cache.append(sequences, lengths - cache.kv.length[sequences])
        cache.kv.flush()
        counts = lengths - starts
        reading = np.flatnonzero(counts > 1)
        tokens = np.empty(int(counts.sum()), dtype=np.int64)
        firsts = counts.cumsum() - counts
        tokens[firsts] = [lanes.last(progress) for progress in batch]
        contexts = {}
        for i in reading.tolist():
            context = contexts[i] = lanes.context(batch[i])
            tokens[firsts[i] : firsts[i] + counts[i]] = context[starts[i] :]
        logits = self._passes(sequences, starts, counts, tokens)
        for progress, length in zip(batch, lengths.tolist(), strict=True):
            progress.computed = length
        for i, progress in enumerate(batch):
            if i in contexts:
                cache.commit(progress.sequence, contexts[i])
        return batch, logits

    def _passes(self, sequences: Array, starts: Array, counts: Array, tokens: Array) -> Tensor:
        """Run the forward pass over all tokens, at most ``_PREFILL_TOKENS`` at a time; logits of each last token."""
        runner, kv = self._engine.runner, self._engine.cache.kv
        if len(tokens) <= _PREFILL_TOKENS:
            return runner.forward(kv, sequences, starts, counts, tokens)
        ends = counts.cumsum()
        parts: list[Tensor] = []
        for begin in range(0, len(tokens), _PREFILL_TOKENS):
            end = min(begin + _PREFILL_TOKENS, len(tokens))
            inside = np.minimum(ends, end) - np.maximum(ends - counts, begin)
            rows = np.flatnonzero(inside > 0)
            passed = np.maximum(begin - (ends - counts)[rows], 0)
            logits = runner.forward(kv, sequences[rows], starts[rows] + passed, inside[rows], tokens[begin:end])
            whole = ends[rows] <= end
            parts.append(logits[torch.from_numpy(np.flatnonzero(whole)).to(logits.device)])
        return torch.cat(parts)


def _out_of_memory(error: Exception) -> bool:
    text = str(error).lower()
    return isinstance(error, (torch.OutOfMemoryError, OutOfBlocks)) or (
        "out of memory" in text or "can't allocate memory" in text or "not enough memory" in text
    )
