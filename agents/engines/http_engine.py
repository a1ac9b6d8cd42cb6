"""The engine behind a server that speaks OpenAI's protocol: vLLM's, SGLang's, llama.cpp's or this package's.

- ``HTTPEngine``: sends token ids, waits out a server that is down, loses and repeats nothing.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import UsageError
from .base import Completion, EngineStats, Request, SamplingParams
from .http_asking import Asker, Mode
from .http_client import Courier, EventLoop, ServerRefused, ServerUnavailable
from .http_stream import HTTPStream

_API_KEY = "OPENAI_API_KEY"


class HTTPEngine:
    """Continues token sequences on a server; see ``Engine``.

    With token ids (``mode="tokens"``) the completion holds the very ids that were sampled. Servers that take only text
    answer with text, which is tokenised once, here: whether those are the ids that were sampled is not known, and so
    the engine is for evaluation only (``trainable`` is False) and its statistics are nan. A server of this package
    answers with all statistics; of others the entropies are estimates, and what they do not tell is nan.

    When the server dies or hangs, everything waits for it up to ``patience`` seconds, and what has not been answered
    is sent again. All methods may be called from any thread.

    Attributes:
        exact: always False: another process may compute with another precision.
        mode: ``"tokens"``, ``"text"`` or ``"chat"``.
        model: its name at the server.
        reported: what the server's log-probabilities are of.
    """

    exact = False

    def __init__(
        self,
        url: str,
        model: str | None = None,
        *,
        tokenizer: Any = None,
        api_key: str | None = None,
        api_key_env: str = _API_KEY,
        concurrency: int = 64,
        timeout: float = 120.0,
        retries: int = 6,
        backoff: float = 0.5,
        patience: float = 600.0,
        mode: Mode = "auto",
        entropy_top_k: int = 5,
        vocabulary: int | None = None,
        max_positions: int | None = None,
        module: Any = None,
        on_wait: Callable[[str], None] | None = None,
    ) -> None:
        """Ask the server what it serves and what it takes; a few requests of one token each.

        Args:
            url: its address, with or without ``/v1``.
            model: its name there; the first that it lists by default.
            tokenizer: needed for text and chat.
            api_key: bearer token; the environment variable ``api_key_env`` by default.
            api_key_env: the name of that variable.
            concurrency: requests under way at once.
            timeout: seconds without a byte after which a request counts as lost; a completion comes in one piece, so
                it must have time to be generated.
            retries: how often a request is sent again.
            backoff: seconds before the first repeat; each later pause is twice as long, up to 30 s.
            patience: seconds to wait for a server that is down.
            mode: how contexts are sent; ``"auto"`` takes the first of tokens, text and chat that works.
            entropy_top_k: entropies are estimated from so many tokens where the sampling parameters ask for exact
                ones, which only this package's server has.
            vocabulary: number of token ids; by default what the server says, or the tokenizer's length.
            max_positions: longest sequence; by default what the server says.
            module: the learner's, whose weights are sent when ``load_weights`` is told that they changed in place.
            on_wait: is told when waiting for the server begins and ends; a warning in the log by default.

        Raises:
            UsageError: an option is wrong, the model is not served, or no mode works.
            ServerUnavailable: there was no answer for ``patience`` seconds.
            ServerRefused: the server does not let us in.
        """
        if entropy_top_k < 1:
            raise UsageError(f"entropy_top_k is {entropy_top_k}; expected at least 1")
        self._courier = Courier(
            url,
            api_key=api_key or os.environ.get(api_key_env),
            concurrency=concurrency,
            timeout=timeout,
            retries=retries,
            backoff=backoff,
            patience=patience,
            on_wait=on_wait,
        )
        self._asker = Asker(self._courier, tokenizer, entropy_top_k, max_positions)
        self._module = module
        self.stats = EngineStats()
        self._streams: set[HTTPStream] = set()
        self._closed = self._told = False
        self._loop = EventLoop("agentropy http engine")
        try:
            self._loop.call(self._asker.connect(model, mode))
            about = self._asker.about
            told = about.get("vocab_size") or (about.get("meta") or {}).get("n_vocab")
            self.vocabulary = int(vocabulary or told or (len(tokenizer) if tokenizer is not None else 0))
            if not self.vocabulary:
                raise UsageError(f"{self._courier.url} does not say how many tokens there are; give vocabulary")
        except BaseException:
            self.close()
            raise
        self.mode, self.model, self.reported = self._asker.mode, self._asker.model, self._asker.reported
        if not self.trainable:
            warnings.warn(
                f"{self._courier.url} is asked by {self.mode}: its answers are tokenised here, so this engine is for "
                "evaluation only",
                stacklevel=2,
            )

    @property
    def trainable(self) -> bool:
        """Whether completions hold the ids that were sampled, so that a policy can be trained on them."""
        return self.mode == "tokens"

    @property
    def takes_weights(self) -> bool:
        """Whether the server is one of this package, so that ``load_weights`` can reach it."""
        return self._asker.ours

    def generate(self, requests: Sequence[Request], params: SamplingParams) -> list[Completion]:
        """Continue every request; completions come back in the order of the requests.

        Raises:
            UsageError: a token is outside the vocabulary.
            ServerUnavailable: the server was away for too long; its ``answered`` holds what had come by then.
            ServerRefused, BadAnswer: one request was refused or answered with nonsense; the others are cancelled.
        """
        for request in requests:
            self._check(request)
        done: dict[int, Completion] = {}
        stream = self.stream(params)
        try:
            for request in requests:
                stream.add(request)
            while stream.running:
                done.update(stream.step())
        except ServerUnavailable as error:
            error.answered = done | stream.arrived()
            raise
        finally:
            stream.close()
        return [done[ticket] for ticket in range(len(requests))]

    def stream(self, params: SamplingParams) -> HTTPStream:
        """Open a stream of requests that share ``params``; a request is sent as soon as it is added."""
        self._open()
        if self._asker.hides(params) and not self._told:
            self._told = True
            warnings.warn(
                f"{self._courier.url} reports {self.reported} log-probabilities: those under softmax(logits / "
                f"temperature) are nan with {params}; vLLM tells them, where nothing is filtered, with "
                "--logprobs-mode processed_logprobs",
                stacklevel=2,
            )
        stream = HTTPStream(self._send, params, self.stats, self._streams.discard)
        self._streams.add(stream)
        return stream

    def load_weights(self, state_dict: Mapping[str, Any] | str | os.PathLike[str] | None, version: int) -> None:
        """Send new weights (``module``'s for None), or name a folder that the server can read.

        It must be a server of this package. It finishes what is running with the old weights first. A folder is
        loaded again when the server was restarted.

        Raises:
            UsageError: nothing was given, the weights do not fit, or the server is another one.
        """
        self._open()
        if not self._asker.ours:
            raise UsageError(
                f"{self._courier.url} takes no weights; expected a server of `agentropy serve model`, "
                "or the built-in engine for training"
            )
        if state_dict is None:
            if self._module is None:
                raise UsageError(
                    "there is no module to read; expected a state dict, a folder, or HTTPEngine(module=...)"
                )
            state_dict = self._module.state_dict()
        if isinstance(state_dict, Mapping):
            from safetensors.torch import save

            # Copies, because tied tensors share memory, which safetensors refuses.
            tensors = {name: value.detach().cpu().contiguous().clone() for name, value in state_dict.items()}
            loading = self._asker.load_tensors(save(tensors), version)
        else:
            loading = self._asker.load_folder(os.path.abspath(state_dict), version)
        try:
            self._loop.call(loading)
        except ServerRefused as error:
            raise UsageError(f"the server did not take the weights: {error.message}") from error

    def release(self, prefixes: Sequence[NDArray[np.int32]] | None = None) -> None:
        """Let a server of this package forget all; single prefixes, and other servers, are left to themselves."""
        if prefixes is None and self._asker.ours:
            self._open()
            self._loop.call(self._asker.release())

    def close(self) -> None:
        """Cancel what is under way and end the thread and its connections. Safe to call twice."""
        if self._closed:
            return
        self._closed = True
        for stream in list(self._streams):
            stream.close()
        try:
            self._loop.call(self._courier.close())
        finally:
            self._loop.close()

    def _open(self) -> None:
        if self._closed:
            raise UsageError("the engine is closed")

    def _send(self, request: Request, params: SamplingParams) -> Future[Completion]:
        self._check(request)
        return self._loop.submit(self._asker.ask(request, params))

    def _check(self, request: Request) -> None:
        if request.tokens.min() < 0 or request.tokens.max() >= self.vocabulary:
            raise UsageError(
                f"a request holds token {request.tokens.max()} or {request.tokens.min()}; "
                f"expected ids from 0 to {self.vocabulary - 1}"
            )
