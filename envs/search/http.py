"""Clients of servers that search or encode.

- ``HttpRetriever``: Search-R1's retrieval server, or ours.
- ``HttpEncoder``: an embedding server with OpenAI's protocol.
- ``RetrieverUnavailableError``: the server could not be reached, or is overloaded, after all attempts.
- ``RetrieverAnswerError``: the server refused the request, or answered with something else.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np

from ...errors import EnvironmentFailedError, UsageError
from ...extras import require
from .passages import Passage
from .retriever import Hit

TOKEN: Final = "AGENTROPY_RETRIEVER_TOKEN"
"""The environment variable that holds the bearer token."""
_AGAIN: Final = frozenset({408, 425, 429, 500, 502, 503, 504})


class RetrieverUnavailableError(EnvironmentFailedError):
    """The server could not be reached, or is overloaded, after all attempts."""


class RetrieverAnswerError(EnvironmentFailedError):
    """The server refused the request, or answered with something that is no answer to it."""


class _Client:
    """Posts JSON, again where that may help. It survives pickling and forking: connections are made when needed."""

    def __init__(self, url: str, token: str | None, timeout: float, attempts: int, pause: float) -> None:
        require("a retriever on a server", "search", ["httpx"])
        if attempts < 1 or timeout <= 0 or pause < 0:
            raise UsageError(
                f"expected attempts >= 1, timeout > 0 and pause >= 0, got {attempts}, {timeout} and {pause}"
            )
        self._url, self._token = url, token
        self._timeout, self._attempts, self._pause = timeout, attempts, pause
        self._connections: Any = None
        self._process = 0

    def post(self, body: Mapping[str, Any]) -> Any:
        import httpx

        why = ""
        for attempt in range(self._attempts):
            if attempt:
                time.sleep(self._pause * 2 ** (attempt - 1))
            try:
                response = self._open().post(self._url, json=body)
            except httpx.InvalidURL as error:
                raise UsageError(f"{self._url!r} is no URL: {error}") from error
            except httpx.TransportError as error:
                why = f"{type(error).__name__}: {error}"
                continue
            if response.status_code in _AGAIN:
                why = f"status {response.status_code}"
                continue
            if response.status_code != 200:
                hint = f"; set {TOKEN}" if response.status_code in (401, 403) else ""
                detail = response.text[:200].strip()
                raise RetrieverAnswerError(f"{self._url} answered with status {response.status_code}: {detail}{hint}")
            try:
                return response.json()
            except ValueError as error:
                raise RetrieverAnswerError(f"{self._url} answered with something that is no JSON") from error
        raise RetrieverUnavailableError(f"{self._url} gave no answer in {self._attempts} attempts; the last: {why}")

    def close(self) -> None:
        if self._connections is not None and self._process == os.getpid():
            self._connections.close()
        self._connections = None

    def _open(self) -> Any:
        import httpx

        if self._connections is None or self._process != os.getpid():
            token = self._token or os.environ.get(TOKEN)
            headers = {"Authorization": f"Bearer {token}"} if token else {}
            self._connections = httpx.Client(timeout=self._timeout, headers=headers)
            self._process = os.getpid()
        return self._connections

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_connections": None, "_process": 0}


class HttpRetriever:
    """Asks a server with Search-R1's protocol: ``POST /retrieve``, queries in, documents with scores out."""

    def __init__(
        self, url: str, *, token: str | None = None, timeout: float = 30.0, attempts: int = 4, pause: float = 0.25
    ) -> None:
        """Remember where the server is; nothing is asked yet.

        Args:
            url: the server's address; ``/retrieve`` is added where it has no path.
            token: bearer token; ``$AGENTROPY_RETRIEVER_TOKEN`` by default.
            timeout: seconds to wait for an answer.
            attempts: how often a request is sent while the server is unreachable or overloaded.
            pause: seconds before the second attempt; each later pause is twice as long.

        Raises:
            UsageError: a number is out of its range.
            MissingDependencyError: the ``search`` extra is not installed.
        """
        address, _, path = url.partition("://")[2].partition("/")
        url = url if path else f"{url.partition('://')[0]}://{address}/retrieve"
        self._client = _Client(url, token, timeout, attempts, pause)

    def search(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
        """Return the ``k`` best passages for each query.

        Raises:
            RetrieverUnavailableError: the server could not be reached, or is overloaded.
            RetrieverAnswerError: the server refused, or does not speak the protocol.
        """
        if not queries:
            return []
        answer = self._client.post({"queries": list(queries), "topk": k, "return_scores": True})
        try:
            results = answer["result"]
            if len(results) != len(queries):
                raise ValueError(f"{len(results)} results for {len(queries)} queries")
            return [[_hit(row) for row in rows[:k]] for rows in results]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise RetrieverAnswerError(f"the retrieval server's answer has not the expected form: {error!r}") from error

    def close(self) -> None:
        """Close the connections."""
        self._client.close()


class HttpEncoder:
    """Asks a server for embeddings: ``POST`` with ``model`` and ``input``, as OpenAI's API has it."""

    def __init__(self, url: str, *, token: str | None = None, timeout: float = 120.0, attempts: int = 4) -> None:
        """Take ``URL#MODEL``; nothing is asked yet."""
        self.name = url
        url, _, self._model = url.partition("#")
        self._client = _Client(url, token, timeout, attempts, 0.5)

    def encode(self, texts: Sequence[str], *, query: bool) -> np.ndarray:
        """Return the server's vectors.

        Raises:
            RetrieverUnavailableError: the server could not be reached, or is overloaded.
            RetrieverAnswerError: the server refused, or does not speak the protocol.
        """
        answer = self._client.post({"model": self._model, "input": list(texts)})
        try:
            rows = sorted(answer["data"], key=lambda row: row["index"])
            vectors = np.array([row["embedding"] for row in rows], np.float32)
            if vectors.ndim != 2 or len(vectors) != len(texts):
                raise ValueError(f"vectors of shape {vectors.shape} for {len(texts)} texts")
        except (KeyError, TypeError, ValueError) as error:
            raise RetrieverAnswerError(f"the embedding server's answer has not the expected form: {error!r}") from error
        return vectors


def _hit(row: Any) -> Hit:
    """Read one document; servers that were built on plain corpora send it without its score."""
    document, score = (row["document"], float(row["score"])) if "document" in row else (row, 0.0)
    if "contents" in document:
        return Hit(Passage.of_contents(str(document.get("id", "")), str(document["contents"])), score)
    return Hit(Passage(str(document.get("id", "")), str(document.get("title") or ""), str(document["text"])), score)
