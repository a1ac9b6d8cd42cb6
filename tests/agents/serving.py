"""A tiny model to serve, in this process or, as a program, in one of its own."""

from __future__ import annotations

import contextlib
import functools
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

from agentropy.agents.engines.torch_engine import TorchEngine
from agentropy.agents.model_server import ModelServer, serve_model
from agentropy.agents.models import build_small_model
from agentropy.agents.tokenizer import build_word_tokenizer

POSITIONS = 256
WORDS = [f"word{i}" for i in range(90)]
TEMPLATE = (
    "{% for message in messages %}<obs>{{ message['role'] }} {{ message['content'] }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<act>{% endif %}"
)


@functools.cache
def tokenizer() -> Any:
    made = build_word_tokenizer([" ".join(WORDS)])
    made.chat_template = TEMPLATE
    return made


VOCABULARY = len(tokenizer())


def model(seed: int = 0) -> Any:
    return build_small_model(
        len(tokenizer()), hidden=32, layers=2, heads=2, intermediate=64, max_positions=POSITIONS, seed=seed
    )


def engine(seed: int = 0, **options: Any) -> TorchEngine:
    return TorchEngine(model(seed), tokenizer(), **options)


@functools.cache
def reference(seed: int = 0) -> TorchEngine:
    """What the servers must agree with; never closed."""
    return engine(seed)


@contextlib.contextmanager
def served(seed: int = 0, made: Any = None, **options: Any) -> Iterator[ModelServer]:
    """A server in this process, on a free port."""
    options = {"port": 0, "name": "tiny", "max_positions": POSITIONS} | options
    behind = engine(seed) if made is None else made
    with ModelServer(behind, tokenizer(), **options) as server:
        yield server
    behind.close()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


class Process:
    """A server in a process of its own, which can be killed and followed by another one on the same port.

    That one gets ready meanwhile, because importing takes longer than all else. Use as a context manager.
    """

    def __init__(self, seed: int = 0, max_batch: int = 8) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._command = [sys.executable, __file__, str(self.port), str(seed), str(max_batch)]
        self._processes: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        """Let the next one serve; who asks must wait for it."""
        stdin = self._processes[0].stdin
        assert stdin is not None
        stdin.write(b"\n")
        stdin.flush()

    def kill(self) -> None:
        """End the one that serves as a crash does."""
        process = self._processes.pop(0)
        process.kill()
        process.communicate(timeout=20)

    def __enter__(self) -> Process:
        for _ in range(2):
            self._processes.append(subprocess.Popen(self._command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL))
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        while self._processes:
            self.kill()


if __name__ == "__main__":
    import torch

    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    port, seed, max_batch = (int(argument) for argument in sys.argv[1:])
    made = engine(seed, max_batch=max_batch)
    sys.stdin.readline()
    serve_model(made, tokenizer(), port=port, name="tiny", max_positions=POSITIONS)
