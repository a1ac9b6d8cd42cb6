"""Latent semantic analysis: vectors for words, learned from the corpus alone.

- ``LSAEncoder``: texts as sums of word vectors (Deerwester et al. 1990), over the BM25 weights of the corpus.

The matrix of BM25 scores, terms by passages, is projected on its leading left singular vectors, found by subspace
iteration from a fixed start (Halko, Martinsson and Tropp 2011).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np

from ...extras import require
from .bm25 import Index, terms
from .passages import Corpus
from .store import cached

_VERSION: Final = "lsa-1"
DIMENSIONS: Final = 256
_ITERATIONS: Final = 2
_CHUNK: Final = 1 << 12


class LSAEncoder:
    """Encodes queries and passages alike."""

    def __init__(self, corpus: Corpus, dimensions: int = DIMENSIONS) -> None:
        """Map the word vectors of ``corpus``; the first time they are computed."""
        require("latent semantic analysis", "search", {"bm25s": "bm25s", "Stemmer": "PyStemmer"})
        self.name = f"{_VERSION}-{dimensions}"
        self._index = Index.of(corpus)
        dimensions = min(dimensions, len(corpus.passages), len(self._index.hashes))

        def build(folder: Path) -> None:
            np.save(folder / "words.npy", _left_vectors(self._index, len(corpus.passages), dimensions))

        folder = cached(f"{self.name}-{corpus.digest}", build)
        self._words = np.asarray(np.load(folder / "words.npy", mmap_mode="r"))
        counts = np.diff(self._index.starts)
        self._weights = np.log1p(len(corpus.passages) / np.maximum(counts, 1)).astype(np.float32)

    def encode(self, texts: Sequence[str], *, query: bool) -> np.ndarray:
        """Return the weighted sums of the vectors of the words of each text."""
        vectors = np.zeros((len(texts), self._words.shape[1]), np.float32)
        for vector, text in zip(vectors, texts, strict=True):
            rows = [row for term in terms(text) if (row := self._index.row(term)) is not None]
            if rows:
                unique, counts = np.unique(rows, return_counts=True)
                weights = self._weights[unique] * (1 + np.log(counts)).astype(np.float32)
                vector += weights @ self._words[unique]
        return vectors


def _left_vectors(index: Index, passages: int, dimensions: int) -> np.ndarray:
    """Return the leading left singular vectors of the index's matrix, [terms, dimensions]."""
    by_passage = np.argsort(index.passages, kind="stable")
    term_of = np.repeat(np.arange(len(index.hashes), dtype=np.int32), np.diff(index.starts))
    scores = np.asarray(index.scores)
    passage_starts = np.concatenate([[0], np.cumsum(np.bincount(index.passages, minlength=passages))])
    rows = (scores, np.asarray(index.passages), np.asarray(index.starts))
    columns = (scores[by_passage], term_of[by_passage], passage_starts)
    start = np.random.Generator(np.random.PCG64(0)).standard_normal((passages, dimensions), dtype=np.float32)
    basis = _orthonormal(_times(*rows, start))
    for _ in range(_ITERATIONS):
        basis = _orthonormal(_times(*rows, _times(*columns, basis)))
    return basis


def _orthonormal(vectors: np.ndarray) -> np.ndarray:
    """Return an orthonormal basis of the columns; zeros for those that depend on others.

    By the eigenvectors of the small Gram matrix, twice since one pass is only as exact as that matrix; for tall
    matrices this is many times faster than a QR decomposition.
    """
    for _ in range(2):
        values, rotation = np.linalg.eigh(vectors.T.astype(np.float64) @ vectors)
        scale = np.where(values > 1e-9 * values[-1], 1 / np.sqrt(np.maximum(values, 1e-300)), 0.0)
        vectors = vectors @ (rotation * scale).astype(np.float32)
    return vectors


def _times(data: np.ndarray, columns: np.ndarray, starts: np.ndarray, dense: np.ndarray) -> np.ndarray:
    """Return a compressed sparse row matrix times a dense one, some rows at a time so that memory stays small."""
    result = np.zeros((len(starts) - 1, dense.shape[1]), np.float32)
    first = 0
    while first < len(starts) - 1:
        last = max(first + 1, int(np.searchsorted(starts, starts[first] + _CHUNK, side="right")) - 1)
        entries = slice(int(starts[first]), int(starts[last]))
        filled = np.flatnonzero(np.diff(starts[first : last + 1])) + first
        if len(filled):
            products = data[entries, None] * dense[columns[entries]]
            result[filled] = np.add.reduceat(products, starts[filled] - starts[first], axis=0)
        first = last
    return result
