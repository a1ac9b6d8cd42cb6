"""Search by the likeness of vectors.

- ``DenseRetriever``: exact search by cosine over vectors that all processes share.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np

from .encoders import open_encoder
from .passages import Corpus
from .retriever import Hit, best
from .store import cached

_VERSION: Final = "dense-1"
_BATCH: Final = 256


class DenseRetriever:
    """Finds passages whose vectors point the way of the query's."""

    def __init__(self, corpus: Corpus, encoder: str = "lsa") -> None:
        """Map the vectors of ``corpus``; the first time they are made, which may take minutes.

        Args:
            corpus: the passages.
            encoder: see ``encoders.open_encoder``.

        Raises:
            UsageError: there is no such encoder.
            MissingDependencyError: the encoder's package is not installed.
        """
        self._passages = corpus.passages
        self._encoder = open_encoder(encoder, corpus)
        name = hashlib.blake2b(self._encoder.name.encode(), digest_size=8).hexdigest()
        folder = cached(f"{_VERSION}-{corpus.digest}-{name}", self._build)
        self._vectors = np.asarray(np.load(folder / "vectors.npy", mmap_mode="r"))

    def search(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
        """Return the ``k`` best passages for each query."""
        if not queries:
            return []
        scores = _unit(self._encoder.encode(queries, query=True)) @ self._vectors.T
        return [[Hit(self._passages[at], float(row[at])) for at in best(row, k).tolist()] for row in scores]

    def close(self) -> None:
        """Do nothing: the vectors are shared, and go with the last who uses them."""

    def _build(self, folder: Path) -> None:
        parts = []
        for start in range(0, len(self._passages), _BATCH):
            batch = self._passages[start : start + _BATCH]
            texts = [f"{passage.title}\n{passage.text}" for passage in batch]
            parts.append(_unit(self._encoder.encode(texts, query=False)))
        np.save(folder / "vectors.npy", np.concatenate(parts))


def _unit(vectors: np.ndarray) -> np.ndarray:
    """Return ``vectors`` with length 1, but those of length 0."""
    vectors = np.asarray(vectors, np.float32)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
