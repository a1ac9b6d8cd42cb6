"""BM25 in this process, over an index that all processes share.

- ``BM25Retriever``: bm25s's index (Lu 2024), memory-mapped and searched with numpy.
- ``terms``: the stemmed words of a text.
- ``Index``: the arrays of an index on disk.

bm25s computes every score when the index is built, so that a query only adds a few columns up. Its own search is not
used: which of two equal scores comes first there depends on whether numba is installed, and its import takes longer
than a thousand queries. The columns are added here in the order of the query's words, and equal scores are told apart
by position, so that a corpus is searched alike everywhere.
"""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

import numpy as np

from ...extras import require
from .passages import Corpus
from .retriever import Hit, best
from .store import cached

_VERSION: Final = "bm25-1"
_K1: Final = 1.2
_B: Final = 0.75
_WORD: Final = re.compile(r"\w\w+")
_STOP: Final = frozenset(
    re.split(
        " ",
        "a an and are as at be but by for if in into is it no not of on or such that the their then there these they "
        "this to was will with",
    )
)
"""Lucene's."""
_LONGEST: Final = 4096
"""Characters of a query that are read."""
_STEMMING: Final = threading.Lock()


@cache
def _stemmer() -> Any:
    import Stemmer

    return Stemmer.Stemmer("english")


def terms(text: str) -> list[str]:
    """Return the stems of the words of ``text``, without stop words."""
    words = [word for word in _WORD.findall(text.lower()) if word not in _STOP]
    with _STEMMING:  # a stemmer is not for two threads at once
        return _stemmer().stemWords(words)


@dataclass(frozen=True)
class Index:
    """A sparse matrix of scores, [terms, passages], by term."""

    hashes: np.ndarray
    """64-bit hash of each term, ascending."""
    starts: np.ndarray
    """Where a term's entries start in the next two; one more for the end."""
    passages: np.ndarray
    scores: np.ndarray

    @classmethod
    def of(cls, corpus: Corpus) -> Index:
        """Map the index of ``corpus``, which is built where the cache does not have it."""
        folder = cached(f"{_VERSION}-{corpus.digest}", lambda folder: _build(corpus, folder))
        names = ("hashes", "starts", "passages", "scores")
        return cls(*(np.asarray(np.load(folder / f"{name}.npy", mmap_mode="r")) for name in names))

    def row(self, term: str) -> int | None:
        """Return the row of ``term``; None for one that no passage has."""
        key = _hash(term)
        at = int(np.searchsorted(self.hashes, key))
        return at if at < len(self.hashes) and self.hashes[at] == key else None


class BM25Retriever:
    """Finds passages by the words that they share with the query."""

    def __init__(self, corpus: Corpus) -> None:
        """Map the index of ``corpus``; the first time it is built, which takes seconds for tens of thousands.

        Raises:
            MissingDependencyError: the ``search`` extra is not installed.
        """
        require("BM25 search", "search", {"bm25s": "bm25s", "Stemmer": "PyStemmer"})
        self._passages = corpus.passages
        self._index = Index.of(corpus)

    def search(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
        """Return the ``k`` best passages for each query; passages that share no word with it are left out."""
        return [self._search(query, k) for query in queries]

    def close(self) -> None:
        """Do nothing: the maps are shared, and go with the last who uses them."""

    def _search(self, query: str, k: int) -> list[Hit]:
        scores = np.zeros(len(self._passages), np.float32)
        for term in terms(query[:_LONGEST]):
            row = self._index.row(term)
            if row is not None:
                entries = slice(self._index.starts[row], self._index.starts[row + 1])
                scores[self._index.passages[entries]] += self._index.scores[entries]
        return [Hit(self._passages[at], float(scores[at])) for at in best(scores, k).tolist() if scores[at] > 0]


def _hash(term: str) -> np.uint64:
    return np.uint64(int.from_bytes(hashlib.blake2b(term.encode(), digest_size=8).digest(), "big"))


def _build(corpus: Corpus, folder: Path) -> None:
    vocabulary: dict[str, int] = {}
    documents = [
        [vocabulary.setdefault(term, len(vocabulary)) for term in terms(f"{passage.title} {passage.text}")]
        for passage in corpus.passages
    ]
    starts, passages, scores = _columns(documents, vocabulary)
    hashes = np.array([_hash(term) for term in vocabulary], np.uint64)
    order = np.argsort(hashes)
    lengths = np.diff(starts)[order]
    moved = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    entries = np.arange(moved[-1]) - np.repeat(moved[:-1] - starts[:-1][order], lengths)
    arrays = {"hashes": hashes[order], "starts": moved, "passages": passages[entries], "scores": scores[entries]}
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)


def _columns(documents: list[list[int]], vocabulary: dict[str, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return bm25s's matrix as (starts, passages, scores), by term."""
    if not vocabulary:  # nothing but stop words and signs
        return np.zeros(1, np.int64), np.empty(0, np.int32), np.empty(0, np.float32)
    import bm25s

    model = bm25s.BM25(method="lucene", k1=_K1, b=_B, backend="numpy")
    tokens = bm25s.tokenization.Tokenized(ids=documents, vocab=dict(vocabulary))
    model.index(tokens, create_empty_token=False, show_progress=False, leave_progress=False)
    starts, passages, scores = (model.scores[name] for name in ("indptr", "indices", "data"))
    return np.asarray(starts, np.int64), np.asarray(passages, np.int32), np.asarray(scores, np.float32)
