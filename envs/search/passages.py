"""Passages and questions, and reading them from files.

- ``Passage``: one entry of a corpus.
- ``Question``: one question with its accepted answers and, where known, the passages that it takes.
- ``Corpus``: passages with a hash of their content.
- ``read_corpus``: passages of a file, kept memory-mapped in the cache folder after the first time.
- ``read_questions``: questions of a file, by split.
- ``read_rows``: the rows of a JSON-lines file (plain, ``.gz`` or ``.xz``) or a Parquet file.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import lzma
import mmap
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, overload

import numpy as np

from ...errors import MissingDependencyError, UsageError
from ..text import storable
from .store import cached

_FORMAT = "passages-1"
_OPENERS: Mapping[str, Callable[..., IO[str]]] = {".xz": lzma.open, ".gz": gzip.open}  # type: ignore[dict-item]


@dataclass(frozen=True, slots=True)
class Passage:
    """One entry of a corpus."""

    id: str
    title: str
    text: str

    @property
    def contents(self) -> str:
        """Title and text in the one field that the Search-R1 retrieval server has for them."""
        return f'"{self.title}"\n{self.text}'

    @classmethod
    def of_contents(cls, id: str, contents: str) -> Passage:
        """Undo ``contents``."""
        title, _, text = contents.partition("\n")
        return cls(id, title.strip().strip('"'), text)


@dataclass(frozen=True, slots=True)
class Question:
    """One question."""

    id: str
    text: str
    answers: tuple[str, ...]
    """All that are accepted; the first one is the expert's."""
    gold: tuple[str, ...] = ()
    """Titles of the passages that it takes, in the order in which they lead to the answer where that is known."""
    kind: str = ""
    """Such as ``"bridge"`` or ``"comparison"``."""

    def digest(self) -> str:
        """Hash of everything that an episode shows or pays for."""
        return _hash(json.dumps([self.text, self.answers, self.gold]).encode())


@dataclass(frozen=True, slots=True)
class Corpus:
    """Passages that are searched together."""

    passages: Sequence[Passage]
    digest: str
    """Hash of the content: equal digests, equal passages in the same order."""

    @classmethod
    def of(cls, passages: Iterable[Passage]) -> Corpus:
        """Keep ``passages`` in memory."""
        kept = tuple(passages)
        return cls(kept, _hash(json.dumps([[p.id, p.title, p.text] for p in kept]).encode()))


class MappedPassages(Sequence[Passage]):
    """Passages in a folder of the cache, read where they lie, so that all processes share one copy."""

    def __init__(self, folder: Path) -> None:
        """Map what ``write`` has written."""
        self._folder = folder
        self._ends = np.asarray(np.load(folder / "ends.npy", mmap_mode="r"))
        with open(folder / "passages.jsonl", "rb") as file:
            self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    @staticmethod
    def write(folder: Path, passages: Iterable[Passage]) -> None:
        """Write passages, at least one."""
        end, ends = 0, []
        with open(folder / "passages.jsonl", "wb") as file:
            for passage in passages:
                end += file.write(json.dumps([passage.id, passage.title, passage.text]).encode())
                ends.append(end)
        np.save(folder / "ends.npy", np.array(ends, np.int64))

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, index: int) -> Passage: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Passage, ...]: ...
    def __getitem__(self, index: int | slice) -> Passage | tuple[Passage, ...]:
        if isinstance(index, slice):
            return tuple(self[at] for at in range(*index.indices(len(self))))
        if not 0 <= index < len(self):
            raise IndexError(index)
        start = int(self._ends[index - 1]) if index else 0
        return Passage(*json.loads(self._data[start : int(self._ends[index])]))

    def __reduce__(self) -> tuple[Any, ...]:
        return MappedPassages, (self._folder,)


def read_corpus(path: str | os.PathLike[str]) -> Corpus:
    """Open the passages of a file with the fields ``title`` and ``text``, or ``contents``, and perhaps ``id``.

    Raises:
        UsageError: there is no such file, or it holds no passages.
        MissingDependencyError: it is a Parquet file and pyarrow is not installed.
    """
    path = _existing(path)
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, lambda: hashlib.blake2b(_FORMAT.encode(), digest_size=16)).hexdigest()

    def build(folder: Path) -> None:
        passages = [_passage(path, number, row) for number, row in enumerate(read_rows(path))]
        if not passages:
            raise UsageError(f"{path} holds no passages")
        MappedPassages.write(folder, passages)

    return Corpus(MappedPassages(cached(f"passages-{digest}", build)), digest)


def read_questions(path: str | os.PathLike[str]) -> dict[str, tuple[Question, ...]]:
    """Return the questions of a file by split, ``"train"`` first; all are ``"train"`` where rows name no ``split``.

    A row has ``question``, and ``answer``, ``answers`` or ``golden_answers`` (a text or a list of texts); it may have
    ``id`` (the row's number by default), ``gold`` (titles of the passages that it takes) and ``type``.

    Raises:
        UsageError: there is no such file, a row lacks something, or an id occurs twice in a split.
        MissingDependencyError: it is a Parquet file and pyarrow is not installed.
    """
    path = _existing(path)
    splits: dict[str, dict[str, Question]] = {}
    for number, row in enumerate(read_rows(path)):
        where = splits.setdefault(str(row.get("split") or "train"), {})
        question = _question(path, number, row)
        if question.id in where:
            raise UsageError(f"{path}, row {number + 1}: the id {question.id!r} occurs twice")
        where[question.id] = question
    if not splits:
        raise UsageError(f"{path} holds no questions")
    return {split: tuple(splits[split].values()) for split in sorted(splits, key=lambda name: (name != "train", name))}


def read_rows(path: Path) -> Iterator[Mapping[str, Any]]:
    """Yield the rows of a file as mappings.

    Raises:
        UsageError: a line is no JSON object, or the file cannot be read.
    """
    if path.suffix == ".parquet":
        try:
            import pyarrow.parquet
        except ImportError as error:
            raise MissingDependencyError(f"reading {path} needs pyarrow; run: pip install pyarrow") from error

        try:
            yield from pyarrow.parquet.read_table(path).to_pylist()
        except (pyarrow.ArrowException, OSError) as error:
            raise UsageError(f"cannot read {path}: {error}") from error
        return
    try:
        with _OPENERS.get(path.suffix, open)(path, "rt", encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    row = json.loads(line)
                    if not isinstance(row, dict):
                        raise UsageError(f"{path}, line {number}: expected a JSON object")
                    yield row
    except (OSError, EOFError, ValueError, lzma.LZMAError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"cannot read {path} as JSON lines: {error}") from error


def _existing(path: str | os.PathLike[str]) -> Path:
    path = Path(path).expanduser()
    if not path.is_file():
        raise UsageError(f"there is no file {path}")
    return path


def _passage(path: Path, number: int, row: Mapping[str, Any]) -> Passage:
    id = str(number if row.get("id") is None else row["id"])
    if isinstance(row.get("text"), str):
        return Passage(id, storable(str(row.get("title") or "")), storable(row["text"]))
    if isinstance(row.get("contents"), str):
        return Passage.of_contents(id, storable(row["contents"]))
    raise UsageError(f"{path}, row {number + 1}: a passage has 'title' and 'text', or 'contents'; found {sorted(row)}")


def _question(path: Path, number: int, row: Mapping[str, Any]) -> Question:
    given = next((row[name] for name in ("answer", "answers", "golden_answers") if row.get(name) is not None), None)
    answers = (given,) if isinstance(given, str | int | float) else tuple(given or ())
    if not isinstance(row.get("question"), str) or not answers:
        raise UsageError(f"{path}, row {number + 1}: a question has 'question' and 'answer'; found {sorted(row)}")
    return Question(
        id=f"{number:06d}" if row.get("id") is None else str(row["id"]),
        text=storable(row["question"].strip()),
        answers=tuple(storable(str(answer)) for answer in answers),
        gold=tuple(dict.fromkeys(storable(str(title)) for title in row.get("gold") or ())),
        kind=str(row.get("type") or ""),
    )


def _hash(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()
