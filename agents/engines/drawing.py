"""Drawing tokens from logits, row by row until each row's stop.

- ``Tokenizer``: what stop strings need.
- ``Generation``: the tokens and statistics of one batch while it is generated.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...kernels.sampling import sample
from .base import SamplingParams
from .uniforms import counter_uniforms


class Tokenizer(Protocol):
    """What stop strings need of a tokenizer."""

    def decode(self, token_ids: list[int], /) -> str | list[str]:
        """Return the text of ``token_ids``, special tokens included; tokenizers of batches return lists too."""
        ...


class Generation:
    """The tokens drawn so far in one wave, and which rows go on."""

    def __init__(
        self,
        slots: NDArray[np.int64],
        lengths: NDArray[np.int64],
        seeds: NDArray[np.uint64],
        limits: NDArray[np.int64],
        params: SamplingParams,
        tokenizer: Tokenizer | None,
    ) -> None:
        self.slots = slots
        self.lengths = lengths
        self.active = np.arange(len(slots))
        self.tokens: list[NDArray[np.int64]] = []
        self.finite = True
        self._statistics: list[NDArray[np.float64]] = []
        self._seeds = seeds
        self._limits = limits
        self._params = params
        self._tokenizer = tokenizer
        self._stops = np.array(params.stop_token_ids, dtype=np.int64)
        self._count = np.zeros(len(slots), dtype=np.int64)
        self._stopped = np.zeros(len(slots), dtype=bool)

    def step(self, logits: Tensor) -> NDArray[np.int64]:
        """Draw the next token of every active row from logits [active, V]; return the rows that go on."""
        rows, number, params = self.active, len(self.tokens), self._params
        uniforms = torch.from_numpy(counter_uniforms(self._seeds[rows], np.array(number, dtype=np.uint64)))
        drawn = sample(
            logits, uniforms.to(logits.device), params.temperature, params.top_k, params.top_p, params.entropy_top_k
        )
        statistics = torch.stack((drawn.logprob_tempered, drawn.logprob_raw, drawn.entropy_tempered, drawn.entropy_raw))
        tokens = np.zeros(len(self.slots), dtype=np.int64)
        tokens[rows] = drawn.token.cpu().numpy()
        columns = np.zeros((4, len(self.slots)))
        columns[:, rows] = statistics.cpu().numpy()
        self.tokens.append(tokens)
        self._statistics.append(columns)
        self._count[rows] += 1
        self.finite = self.finite and bool(np.isfinite(columns).all())
        self._stopped[rows] = np.isin(tokens[rows], self._stops)
        if params.stop_strings and self._tokenizer is not None:
            for row in rows:
                text = str(self._tokenizer.decode([int(step[row]) for step in self.tokens]))
                self._stopped[row] |= any(stop in text for stop in params.stop_strings)
        going = ~self._stopped[rows] & (self._count[rows] < self._limits[rows])
        self.active = rows[going] if self.finite else rows[:0]
        return self.active

    def columns(self) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.int64], NDArray[np.bool_]]:
        """Return tokens [rows, steps], statistics [4, rows, steps], tokens per row, and which rows stopped.

        Statistics are log-probabilities, raw log-probabilities, entropies and raw entropies.
        """
        return np.stack(self.tokens, axis=-1), np.stack(self._statistics, axis=-1), self._count, self._stopped
