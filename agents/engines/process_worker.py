"""One process of ``ProcessEngine``: ``python -m agentropy.agents.engines.process_worker DESCRIPTOR``.

It answers messages until the connection ends, so it ends with its parent however that ends.
"""

from __future__ import annotations

import atexit
import gc
import sys
from copy import copy
from multiprocessing.connection import Connection
from typing import Any

import torch
from transformers.utils import logging

from .base import SamplingParams
from .process_engine import counted
from .shared_weights import adopt
from .stream import TorchStream
from .torch_engine import TorchEngine


class _Server:
    """An engine and its streams, by their numbers; a stream knows requests by the tickets of the parent."""

    def __init__(self, setup: dict[str, Any]) -> None:
        kind, config = setup["model"]
        model = kind(config)
        adopt(model, setup["layout"])
        self.engine = TorchEngine(model.eval(), setup["tokenizer"], **setup["options"])
        self.limits = self.engine.max_positions, self.engine.cache_tokens
        self._streams: dict[int, tuple[TorchStream, dict[int, int]]] = {}

    def open(self, number: int, params: SamplingParams) -> None:
        self._streams[number] = self.engine.stream(params), {}

    def step(self, number: int, requests: list[Any]) -> tuple[list[Any], dict[str, int]]:
        stream, tickets = self._streams[number]
        before = copy(self.engine.stats)
        self._add(number, requests)
        ended = [(tickets.pop(own), completion) for own, completion in stream.step()]
        return ended, counted(before, self.engine.stats)

    def cancel(self, number: int, requests: list[Any], ticket: int) -> Any:
        stream, tickets = self._streams[number]
        self._add(number, requests)
        own = next(own for own, known in tickets.items() if known == ticket)
        del tickets[own]
        return stream.cancel(own)

    def close(self, number: int) -> None:
        if number in self._streams:
            self._streams.pop(number)[0].close()

    def load(self, version: int) -> None:
        self.engine.load_weights(None, version)

    def release(self, prefixes: Any) -> None:
        self.engine.release(prefixes)

    def _add(self, number: int, requests: list[Any]) -> None:
        stream, tickets = self._streams[number]
        for ticket, request in requests:
            tickets[stream.add(request)] = ticket


def main() -> None:
    """Serve the connection whose descriptor is the first argument."""
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    connection = Connection(int(sys.argv[1]))
    server: _Server | None = None
    while True:
        try:
            number, operation, *arguments = connection.recv()
        except (EOFError, OSError, KeyboardInterrupt):
            return
        try:
            if server is None:
                server = _Server(arguments[0])
                # Collections need not look at modules and weights again: a tenth of the time of a small model.
                gc.collect()
                gc.freeze()
                atexit.register(gc.unfreeze)
                answer: Any = server.limits
            else:
                answer = getattr(server, operation)(*arguments)
            if operation != "release":
                connection.send((number, True, answer))
        except KeyboardInterrupt:
            return
        except Exception as error:
            connection.send((number, False, error))


if __name__ == "__main__":
    main()
