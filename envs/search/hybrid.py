"""Several retrievers as one.

- ``HybridRetriever``: reciprocal rank fusion (Cormack, Clarke and Büttcher 2009).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from .passages import Passage
from .retriever import Hit, Retriever

_CONSTANT: Final = 60
"""The paper's k: how little the first ranks differ."""
_DEPTH: Final = 100
"""Ranks of each retriever that count."""


class HybridRetriever:
    """A passage scores ``1 / (60 + rank)`` in each retriever that finds it."""

    def __init__(self, retrievers: Sequence[Retriever]) -> None:
        """Join ``retrievers`` over the same passages; of equal scores, those of the first come first."""
        self._retrievers = tuple(retrievers)

    def search(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
        """Return the ``k`` best passages for each query."""
        answers = [retriever.search(queries, max(k, _DEPTH)) for retriever in self._retrievers]
        return [_fuse(lists, k) for lists in zip(*answers, strict=True)]

    def close(self) -> None:
        """Close all."""
        for retriever in self._retrievers:
            retriever.close()


def _fuse(lists: Sequence[Sequence[Hit]], k: int) -> list[Hit]:
    scores: dict[str, float] = {}
    passages: dict[str, Passage] = {}
    for hits in lists:
        for rank, hit in enumerate(hits, 1):
            passages.setdefault(hit.passage.id, hit.passage)
            scores[hit.passage.id] = scores.get(hit.passage.id, 0.0) + 1 / (_CONSTANT + rank)
    ranked = sorted(scores, key=lambda id: -scores[id])
    return [Hit(passages[id], scores[id]) for id in ranked[:k]]
