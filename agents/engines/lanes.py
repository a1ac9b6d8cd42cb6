"""What is sampled while requests run: tokens and statistics of up to ``max_batch`` of them.

- ``Tokenizer``: what stop strings need.
- ``Progress``: one request and what it has sampled so far.
- ``Lanes``: draws the next token of many of them at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...kernels.sampling import sample
from .base import Completion, Request, SamplingParams, StopReason
from .uniforms import counter_uniforms

_STATISTICS = 6
_FIRST_WIDTH = 32


class Tokenizer(Protocol):
    """What stop strings need of a tokenizer."""

    def decode(self, token_ids: list[int], /) -> str | list[str]:
        """Return the text of ``token_ids``, special tokens included; tokenizers of batches return lists too."""
        ...


@dataclass(slots=True)
class Progress:
    """A request on its way: waiting, or running in a lane.

    Attributes:
        ticket: its number in the stream.
        request: what was asked.
        limit: tokens that it may sample, at most ``request.max_tokens`` and the model's positions.
        lane: its row in ``Lanes``.
        sequence: what it holds of the cache while it runs, else -1.
        computed: tokens of that sequence whose keys and values are in the cache.
        cached: ``Completion.cached_tokens``, -1 before it first ran.
        version: of the oldest weights that sampled a token of it, -1 before the first.
    """

    ticket: int
    request: Request
    limit: int
    lane: int = -1
    sequence: int = -1
    computed: int = 0
    cached: int = -1
    version: int = -1


class Lanes:
    """Rows of sampled tokens and statistics; row i belongs to one request from ``take`` to ``completion``.

    The n-th token of a request is drawn with the uniform number ``counter_uniforms(seed, n)``.
    """

    def __init__(self, lanes: int, params: SamplingParams, tokenizer: Tokenizer | None) -> None:
        self.count = np.zeros(lanes, dtype=np.int64)
        """Tokens sampled in each lane."""
        self.tokens = np.zeros((lanes, _FIRST_WIDTH), dtype=np.int32)
        self._statistics = np.zeros((lanes, _FIRST_WIDTH, _STATISTICS), dtype=np.float32)
        self._seeds = np.zeros(lanes, dtype=np.uint64)
        self._limits = np.zeros(lanes, dtype=np.int64)
        self._stopped = np.zeros(lanes, dtype=bool)
        self._free = list(range(lanes))[::-1]
        self._params = params
        self._tokenizer = tokenizer
        self._stops = np.array(params.stop_token_ids, dtype=np.int64)

    def take(self, progress: Progress) -> None:
        """Give a request a lane, if it has none."""
        if progress.lane < 0:
            lane = progress.lane = self._free.pop() if self._free else self._grow()
            self.count[lane] = 0
            self._stopped[lane] = False
            self._seeds[lane] = progress.request.seed
            self._limits[lane] = progress.limit

    def _grow(self) -> int:
        lanes = len(self.count)
        for name in ("count", "tokens", "_statistics", "_seeds", "_limits", "_stopped"):
            array = getattr(self, name)
            setattr(self, name, np.concatenate((array, np.zeros_like(array))))
        self._free = list(range(lanes + 1, 2 * lanes))[::-1]
        return lanes

    def context(self, progress: Progress) -> NDArray[np.int32]:
        """Everything that the request's next token depends on."""
        if progress.lane < 0 or not self.count[progress.lane]:
            return progress.request.tokens
        return np.concatenate((progress.request.tokens, self.tokens[progress.lane, : self.count[progress.lane]]))

    def last(self, progress: Progress) -> int:
        """The last token of that context."""
        count = self.count[progress.lane]
        return int(self.tokens[progress.lane, count - 1] if count else progress.request.tokens[-1])

    def draw(self, lanes: NDArray[np.int64], logits: Tensor) -> tuple[NDArray[np.bool_], bool]:
        """Draw the next token of each lane from logits [n, V]; return which of them end, and whether all is finite."""
        params = self._params
        numbers = self.count[lanes]
        if int(numbers.max()) >= self.tokens.shape[1]:
            self.tokens = np.concatenate((self.tokens, np.zeros_like(self.tokens)), axis=1)
            self._statistics = np.concatenate((self._statistics, np.zeros_like(self._statistics)), axis=1)
        uniforms = torch.from_numpy(counter_uniforms(self._seeds[lanes], numbers.astype(np.uint64)))
        drawn = sample(
            logits, uniforms.to(logits.device), params.temperature, params.top_k, params.top_p, params.entropy_top_k
        )
        columns = torch.stack(
            (
                drawn.logprob_tempered,
                drawn.logprob_raw,
                drawn.entropy_tempered,
                drawn.entropy_raw,
                drawn.logprob_processed,
                drawn.kept_logmass,
            ),
            dim=1,
        )
        tokens, statistics = drawn.token.cpu().numpy(), columns.float().cpu().numpy()
        self.tokens[lanes, numbers] = tokens
        self._statistics[lanes, numbers] = statistics
        stopped = np.isin(tokens, self._stops) if len(self._stops) else np.zeros(len(lanes), dtype=bool)
        if params.stop_strings and self._tokenizer is not None:
            for i, (lane, last) in enumerate(zip(lanes.tolist(), numbers.tolist(), strict=True)):
                text = str(self._tokenizer.decode(self.tokens[lane, : last + 1].tolist()))
                stopped[i] |= any(stop in text for stop in params.stop_strings)
        # Last, so that whatever failed before has drawn nothing.
        self.count[lanes] = numbers + 1
        self._stopped[lanes] = stopped
        return stopped | (self.count[lanes] >= self._limits[lanes]), bool(np.isfinite(statistics).all())

    def completion(self, progress: Progress, version: int, cancelled: bool = False) -> Completion:
        """Free the request's lane, if it has one; return what it sampled. ``version`` serves where that is nothing."""
        lane, count, stopped = progress.lane, 0, False
        if lane >= 0:
            count, stopped = int(self.count[lane]), bool(self._stopped[lane])
            self._free.append(lane)
            progress.lane = -1
        columns = self._statistics[lane, :count].T.copy()
        reason = StopReason.CONTEXT if progress.limit < progress.request.max_tokens else StopReason.LENGTH
        if stopped or cancelled:
            reason = StopReason.CANCELLED if cancelled else StopReason.STOP
        return Completion(
            self.tokens[lane, :count].copy(),
            columns[0],
            columns[1],
            columns[2],
            columns[3],
            stop=reason,
            version=version if progress.version < 0 else progress.version,
            cached_tokens=max(progress.cached, 0),
            entropy_top_k=self._params.entropy_top_k,
            processed_logprobs=columns[4],
            kept_logmass=columns[5],
        )
