"""Searching a corpus.

- ``Retriever``: the protocol that every way of searching follows.
- ``Hit``: a passage and how well it matches.
- ``open_retriever``: the retriever for ``"bm25"``, ``"dense"``, ``"hybrid"`` or the URL of a server.
- ``best``: the rows of the largest scores, in an order that does not depend on the machine.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol, runtime_checkable

import numpy as np

from ...errors import UsageError, nearest
from .passages import Corpus, Passage

RETRIEVERS: Final = ("bm25", "dense", "hybrid")
_BLOCK: Final = 64
_KEPT: Final = 8
"""Retrievers that a process keeps open."""


@dataclass(frozen=True, slots=True)
class Hit:
    """A passage that a query found."""

    passage: Passage
    score: float
    """Larger is better; comparable within one answer only."""


@runtime_checkable
class Retriever(Protocol):
    """Something that finds passages."""

    def search(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
        """Return the ``k`` passages that match each query best, best first; fewer where fewer match at all."""
        ...

    def close(self) -> None:
        """Free what it holds; it may be called twice."""
        ...


def open_retriever(spec: str, corpus: Callable[[], Corpus], *, encoder: str = "lsa") -> Retriever:
    """Open a retriever; those that search in this process are shared by all that ask for the same.

    Args:
        spec: ``"bm25"``, ``"dense"``, ``"hybrid"`` or the URL of a server that speaks Search-R1's protocol.
        corpus: gives the passages, where they are needed here.
        encoder: of ``dense`` and ``hybrid``: what turns texts to vectors (see ``encoders.open_encoder``).

    Raises:
        UsageError: there is no such retriever or encoder.
        MissingDependencyError: the ``search`` extra is not installed.
    """
    if spec.startswith(("http://", "https://")):
        from .http import HttpRetriever

        return HttpRetriever(spec)
    if spec not in RETRIEVERS:
        raise UsageError(f"unknown retriever {spec!r}{nearest(spec, [*RETRIEVERS, 'http://HOST:PORT'])}")
    return _OPEN.get(spec, corpus(), encoder if spec != "bm25" else "")


class _Open:
    """The retrievers that this process used last. They hold maps of files and arrays, which are freed with them."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._retrievers: OrderedDict[tuple[str, str, str], Retriever] = OrderedDict()

    def get(self, spec: str, corpus: Corpus, encoder: str) -> Retriever:
        key = (spec, corpus.digest, encoder)
        with self._lock:
            retriever = self._retrievers.pop(key, None) or self._open(spec, corpus, encoder)
            self._retrievers[key] = retriever
            while len(self._retrievers) > _KEPT:
                self._retrievers.popitem(last=False)
            return retriever

    def _open(self, spec: str, corpus: Corpus, encoder: str) -> Retriever:
        if spec == "bm25":
            from .bm25 import BM25Retriever

            return BM25Retriever(corpus)
        if spec == "dense":
            from .dense import DenseRetriever

            return DenseRetriever(corpus, encoder)
        from .hybrid import HybridRetriever

        return HybridRetriever([self.get("bm25", corpus, ""), self.get("dense", corpus, encoder)])


_OPEN: Final = _Open()


def best(scores: np.ndarray, k: int) -> np.ndarray:
    """Return the indices of the ``k`` largest of ``scores``, best first; of equal ones the first come first.

    >>> best(np.array([1.0, 3.0, 1.0, 3.0, 1.0]), 3).tolist()
    [1, 3, 0]
    """
    k = min(k, len(scores))
    if k == 0:
        return np.empty(0, np.int64)
    blocks = len(scores) // _BLOCK
    candidates = np.arange(len(scores))
    if blocks > 4 * k:
        # Whatever is among the k largest lies in a block whose own largest is among the k largest of the blocks'.
        tops = scores[: blocks * _BLOCK].reshape(blocks, _BLOCK).max(axis=1)
        chosen = np.flatnonzero(tops >= np.partition(tops, -k)[-k])
        inside = (chosen[:, None] * _BLOCK + np.arange(_BLOCK)).ravel()
        candidates = np.concatenate([inside, candidates[blocks * _BLOCK :]])
    values = scores[candidates]
    kept = values >= np.partition(values, -k)[-k]
    candidates, values = candidates[kept], values[kept]
    return candidates[np.argsort(-values, kind="stable")[:k]]
