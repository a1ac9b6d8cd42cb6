"""An OpenAI-compatible server around any engine, so that a trained checkpoint serves any client.

- ``ModelServer``: serves from threads of this process; use as a context manager.
- ``serve_model``: serves until a signal ends it. ``serve_folder``: the command ``agentropy serve model``.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import AgentropyError
from ..extras import require
from ..listening import listen, url_of
from .engines.base import Engine
from .model_batching import Batcher
from .model_protocol import ServedModel

_SHUTDOWN_SECONDS = 5
_KEEP_ALIVE_SECONDS = 75
_START_SECONDS = 30.0
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


class ModelServer:
    """Serves an engine over HTTP; it answers once the object is made. Only it may use the engine meanwhile.

    >>> with ModelServer(engine, tokenizer, port=0) as server:  # doctest: +SKIP
    ...     openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Any = None,
        host: str = "127.0.0.1",
        port: int = 8000,
        *,
        name: str = "agentropy",
        max_positions: int | None = None,
        stop_token_ids: Sequence[int] = (),
        api_key: str | None = None,
    ) -> None:
        """Listen and start.

        Args:
            engine: generates the tokens; it stays open when the server is closed.
            tokenizer: needed for prompts of text and for chats.
            host: the address; weights can only be changed over the loopback interface, or with an ``api_key``.
            port: 0 takes a free one.
            name: the model's name.
            max_positions: longest sequence, where the engine has a bound.
            stop_token_ids: where completions end beside the tokenizer's own end, unless a request says ``ignore_eos``.
            api_key: bearer token that clients must send.

        Raises:
            UsageError: the address cannot be had.
            MissingDependencyError: FastAPI or uvicorn is not installed.
            AgentropyError: the server did not start.
        """
        _require()
        import uvicorn

        from .model_api import create_app

        listener = listen(host, port)
        self.url = url_of(listener)
        self._batcher = Batcher(engine)
        model = ServedModel(
            self._batcher,
            tokenizer,
            name=name,
            vocabulary=engine.vocabulary,
            max_positions=max_positions,
            stop_token_ids=stop_token_ids,
        )
        app = create_app(model, api_key=api_key, updates=host in _LOOPBACK or api_key is not None)
        config = uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            server_header=False,
            ws="none",
            lifespan="off",
            timeout_keep_alive=_KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=_SHUTDOWN_SECONDS,
            backlog=2048,
        )
        self._server = uvicorn.Server(config)
        started = threading.Event()
        self._thread = threading.Thread(
            target=self._run, args=(listener, started), name="agentropy model server", daemon=True
        )
        self._thread.start()
        started.wait(_START_SECONDS)
        if not self._server.started:
            self.close()
            raise AgentropyError(f"the server did not start on {self.url}")

    @property
    def running(self) -> int:
        """Requests in the engine."""
        return self._batcher.running

    def wait(self, seconds: float | None = None) -> None:
        """Return when the server has ended, or after ``seconds``."""
        self._thread.join(seconds)

    def close(self) -> None:
        """Answer what is under way for a few seconds, cancel the rest, and end the threads. Safe to call twice."""
        self._server.should_exit = True
        self._thread.join()
        self._batcher.close()

    def __enter__(self) -> ModelServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self, listener: socket.socket, started: threading.Event) -> None:
        async def serve() -> None:
            serving = asyncio.ensure_future(self._server.serve(sockets=[listener]))
            while not self._server.started and not serving.done():
                await asyncio.sleep(0.005)
            started.set()
            await serving

        with contextlib.closing(listener):
            asyncio.run(serve())


def serve_model(engine: Engine, tokenizer: Any, host: str = "127.0.0.1", port: int = 8000, **options: Any) -> None:
    """Serve until SIGINT or SIGTERM; ``options`` are those of ``ModelServer``. Prints the address."""
    over = threading.Event()
    handlers = {number: signal.signal(number, lambda *_: over.set()) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with ModelServer(engine, tokenizer, host, port, **options) as server:
            print(f"serving {options.get('name', 'agentropy')} on {server.url}", flush=True)
            over.wait()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def serve_folder(
    folder: str | os.PathLike[str],
    host: str = "127.0.0.1",
    port: int = 8000,
    *,
    name: str | None = None,
    device: str = "cpu",
    dtype: str = "float32",
    max_batch: int = 128,
    api_key: str | None = None,
) -> None:
    """Serve a checkpoint, or any model of transformers, with the built-in engine until a signal ends it.

    Args:
        folder: a folder or a hub name; see ``load_model``.
        host: see ``ModelServer``, as are ``port`` and ``api_key``.
        port: 0 takes a free one.
        name: what clients call the model; the folder's name by default.
        device: where to compute.
        dtype: of the weights.
        max_batch: requests that run at once.
        api_key: bearer token that clients must send.

    Raises:
        UsageError: there is no such model, or the address cannot be had.
        MissingDependencyError: FastAPI or uvicorn is not installed.
    """
    _require()
    from .engines.torch_engine import TorchEngine
    from .models import load_model

    model, tokenizer = load_model(folder, dtype=dtype, device=device)
    ends = getattr(model.generation_config, "eos_token_id", None)
    engine = TorchEngine(model, tokenizer, max_batch=max_batch)
    try:
        serve_model(
            engine,
            tokenizer,
            host,
            port,
            name=name or Path(folder).name,
            max_positions=getattr(model.config, "max_position_embeddings", None),
            stop_token_ids=ends if isinstance(ends, list) else [] if ends is None else [ends],
            api_key=api_key,
        )
    finally:
        engine.close()


def _require() -> None:
    require("serving a model", "serve", ("fastapi", "uvicorn"))
