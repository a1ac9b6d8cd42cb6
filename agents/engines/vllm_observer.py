"""What vLLM's sampler does not return: normalisers at the sampling temperature and the mass that filters keep.

- ``Observer``: a logits processor that leaves the logits as they are and writes these two down.

vLLM tells log-probabilities either of softmax(logits) or of what is drawn from, never both; with the former and these
numbers all are known. Importing this module imports vLLM.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.v1.sample.logits_processor import LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates

from ...kernels.sampling import sample

KEY = "agentropy"
"""Name of the request's entry in vLLM's ``SamplingParams.extra_args``."""


class Observer(LogitsProcessor):
    """Writes down two numbers for every token of the requests whose ``extra_args`` carry ``KEY``."""

    seen: ClassVar[dict[str, dict[int, tuple[float, float]]]] = {}
    """By the value of ``KEY`` and the token's number: log Σ exp(raw / temperature), and the log of the kept mass.

    Of the class, since vLLM makes the object: engine and sampler share one process.
    """

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        self._rows: dict[int, tuple[Any, list[int]]] = {}

    def is_argmax_invariant(self) -> bool:
        # It changes nothing; but those that are invariant run after the temperature and not for greedy rows.
        return False

    def update_state(self, batch_update: Any) -> None:
        def state(params: Any, _: Any, sampled: list[int]) -> tuple[Any, list[int]] | None:
            return (params, sampled) if params.extra_args and KEY in params.extra_args else None

        process_dict_updates(self._rows, batch_update, state)

    def apply(self, logits: Tensor) -> Tensor:
        alike: dict[tuple[float, int, float], list[int]] = defaultdict(list)
        for row, (params, _) in self._rows.items():
            alike[params.temperature, params.top_k, params.top_p].append(row)
        for (temperature, top_k, top_p), rows in alike.items():
            some = logits[torch.tensor(rows, device=logits.device)]
            normaliser = (some / temperature).logsumexp(-1) - some.logsumexp(-1) / temperature
            mass = torch.zeros_like(normaliser)
            if top_k > 0 or top_p < 1:
                nothing = torch.zeros(len(rows), dtype=torch.float64, device=logits.device)
                mass = sample(some, nothing, temperature, max(top_k, 0), top_p, 1).kept_logmass
            for row, *numbers in zip(rows, normaliser.tolist(), mass.tolist(), strict=True):
                params, sampled = self._rows[row]
                # Where a token is drawn and thrown away, the number is written again.
                self.seen.setdefault(params.extra_args[KEY], {})[len(sampled)] = (numbers[0], numbers[1])
        return logits
