"""Where questions and passages come from.

- ``Source``: the protocol: questions by split, and the corpus that each split searches.
- ``Generated``: worlds of linked facts, made from a seed; nothing is read.
- ``Files``: a file of questions and one of passages.
- ``open_source``: the source for ``"generated"``, ``"shared"`` or ``"files"``.
- ``QUESTIONS``: how many questions each split of the generated world has by default.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Final, Protocol

from ...errors import UsageError, nearest
from .facts import SMALLEST_WORLD, make_facts, passages
from .names import LARGEST_WORLD, SPLITS
from .passages import Corpus, Question, read_corpus, read_questions
from .questions import HOPS, ask

SOURCES: Final = ("generated", "shared", "files")
QUESTIONS: Final[Mapping[str, int]] = MappingProxyType({"train": 2000, "valid": 200, "test": 200})
_SHARED: Final = "AGENTROPY_SHARED_DATA"


class Source(Protocol):
    """Questions, and the passages that answer them."""

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits, the training one first."""
        ...

    def questions(self, split: str) -> Mapping[str, Question]:
        """Return the questions of ``split`` by id."""
        ...

    def corpus(self, split: str) -> Corpus:
        """Return the passages that questions of ``split`` search."""
        ...


class Generated:
    """One world per split; no name occurs in two of them."""

    splits = SPLITS

    def __init__(
        self,
        num_questions: Mapping[str, int] | None = None,
        world_size: int = 400,
        hops: Sequence[int] = HOPS,
        seed: int = 0,
    ) -> None:
        """Describe the worlds; none is made yet.

        Raises:
            UsageError: a number is out of its range.
        """
        self._sizes = dict(QUESTIONS)
        for split, number in (num_questions or {}).items():
            if split not in SPLITS:
                raise UsageError(f"unknown Search split {split!r}{nearest(split, SPLITS)}")
            if number < 1:
                raise UsageError(f"num_questions must be at least 1, got {number} for {split!r}")
            self._sizes[split] = number
        if not SMALLEST_WORLD <= world_size <= LARGEST_WORLD:
            raise UsageError(f"world_size must be from {SMALLEST_WORLD} to {LARGEST_WORLD}, got {world_size}")
        if not hops or not set(hops) <= set(HOPS):
            raise UsageError(f"hops must be some of {', '.join(map(str, HOPS))}, got {tuple(hops)}")
        if seed < 0:
            raise UsageError(f"game_seed must not be negative, got {seed}")
        self._seed, self._world_size, self._hops = seed, world_size, tuple(sorted(set(hops)))

    def questions(self, split: str) -> Mapping[str, Question]:
        """Return the questions of ``split`` by id."""
        return _questions(self._seed, split, self._world_size, self._sizes[split], self._hops)

    def corpus(self, split: str) -> Corpus:
        """Return the passages of the world of ``split``."""
        return _world_corpus(self._seed, split, self._world_size)


@lru_cache(maxsize=16)
def _world_corpus(seed: int, split: str, size: int) -> Corpus:
    return Corpus.of(passages(make_facts(seed, split, size), seed, split))


@lru_cache(maxsize=16)
def _questions(seed: int, split: str, size: int, number: int, hops: tuple[int, ...]) -> Mapping[str, Question]:
    facts, corpus = make_facts(seed, split, size), _world_corpus(seed, split, size)
    return {question.id: question for question in ask(facts, corpus.passages, seed, split, number, hops)}


class Files:
    """The user's own questions and passages; all splits search the same passages."""

    def __init__(self, questions: str | os.PathLike[str], passages: str | os.PathLike[str]) -> None:
        """Read the questions, and map the passages.

        Raises:
            UsageError: a file is not there or cannot be read.
        """
        self._questions = {
            split: {question.id: question for question in those} for split, those in read_questions(questions).items()
        }
        self._corpus = read_corpus(passages)
        self.splits = tuple(self._questions)

    def questions(self, split: str) -> Mapping[str, Question]:
        """Return the questions of ``split`` by id."""
        return self._questions[split]

    def corpus(self, split: str) -> Corpus:
        """Return all passages."""
        return self._corpus


def open_source(
    source: str,
    *,
    questions: str | os.PathLike[str] | None = None,
    passages: str | os.PathLike[str] | None = None,
    data: str | os.PathLike[str] | None = None,
    num_questions: Mapping[str, int] | None = None,
    world_size: int | None = None,
    hops: int | Sequence[int] | None = None,
    game_seed: int = 0,
) -> Source:
    """Open a source.

    Args:
        source: ``"generated"``, ``"shared"`` (a folder with ``questions.jsonl.xz`` and ``passages.jsonl.xz``) or
            ``"files"``.
        questions: of ``files`` alone: the file of questions.
        passages: of ``files`` alone: the file of passages.
        data: of ``shared`` alone: the folder; by default ``search`` in ``$AGENTROPY_SHARED_DATA``, or in
            ``shared/data`` beside the checkout.
        num_questions: of ``generated`` alone: questions per split; a split left out keeps its default.
        world_size: of ``generated`` alone: passages per split, 400 by default.
        hops: of ``generated`` alone: how many passages a question may take, some of 2, 3 and 4; all by default.
        game_seed: of ``generated`` alone: another non-negative number gives other worlds.

    Raises:
        UsageError: unknown source, a file that is not there, or an option of another source.
    """
    if source not in SOURCES:
        raise UsageError(f"unknown Search source {source!r}{nearest(source, SOURCES)}")
    options: dict[str, dict[str, object]] = {
        "generated": {
            "num_questions": num_questions,
            "world_size": world_size,
            "hops": hops,
            "game_seed": game_seed or None,
        },
        "files": {"questions": questions, "passages": passages},
        "shared": {"data": data},
    }
    for owner, names in options.items():
        for name, given in names.items():
            if owner != source and given is not None:
                raise UsageError(f"source={source!r} takes no {name}; drop it or choose source={owner!r}")
    if source == "generated":
        chosen = HOPS if hops is None else (hops,) if isinstance(hops, int) else tuple(hops)
        return Generated(num_questions, 400 if world_size is None else world_size, chosen, game_seed)
    if source == "files":
        if questions is None or passages is None:
            raise UsageError("source='files' needs questions= and passages=, the paths of two files")
        return _files(os.fspath(questions), os.fspath(passages))
    folder = _shared_folder(data)
    return _files(str(folder / "questions.jsonl.xz"), str(folder / "passages.jsonl.xz"))


def _files(questions: str, passages: str) -> Files:
    """Open two files; environments of one process share what is in them while they do not change."""
    changed = tuple(os.stat(path).st_mtime_ns if os.path.exists(path) else 0 for path in (questions, passages))
    return _unchanged_files(questions, passages, changed)


@lru_cache(maxsize=4)
def _unchanged_files(questions: str, passages: str, changed: tuple[int, ...]) -> Files:
    return Files(questions, passages)


def _shared_folder(data: str | os.PathLike[str] | None) -> Path:
    if data is not None:
        folder = Path(data).expanduser()
    else:
        root = os.environ.get(_SHARED)
        folder = (Path(root) if root else Path(__file__).parents[3] / "shared" / "data") / "search"
    if not folder.is_dir():
        raise UsageError(f"source='shared' found no folder {folder}; name it with data= or set {_SHARED} to its parent")
    return folder
