"""The space of all texts that the worlds read and write.

- ``TextSpace``: Gymnasium's ``Text`` over all of Unicode, usable in ``AsyncVectorEnv``.
- ``cut``: a text of limited length that says what it lacks.
- ``storable``: a text without the code points that no file and no tokenizer can hold.

Gymnasium's asynchronous vector environment reads a ``Text`` observation from shared memory only once, when it is made,
and shows that for ever. The functions registered here hand it a view that reads whenever it is looked at.
"""

from __future__ import annotations

import multiprocessing
import string
from collections.abc import Sequence
from ctypes import c_char
from typing import Any, overload

import numpy as np
from gymnasium.spaces import Text
from gymnasium.vector.utils import create_shared_memory, read_from_shared_memory, write_to_shared_memory

CHARACTERS = string.ascii_letters + string.digits + string.punctuation + " \n"
"""What samples are made of."""
_LENGTH_BYTES = 4
_CUT = "[{} characters left out]"
_MOST_BYTES = 4
"""Of one character in UTF-8."""


class TextSpace(Text):
    """All texts of at most ``max_length`` characters, the empty one included; samples are of printable ASCII."""

    def __init__(self, max_length: int, seed: int | np.random.Generator | None = None) -> None:
        """Take the largest length, in characters."""
        super().__init__(max_length, min_length=0, charset=CHARACTERS, seed=seed)

    def contains(self, x: Any) -> bool:
        """Whether ``x`` is a text that is short enough."""
        return isinstance(x, str) and len(x) <= self.max_length


def storable(text: str) -> str:
    """Return ``text`` with a question mark for each lone surrogate, which UTF-8 cannot write.

    >>> storable("caf\\u00e9 \\ud800")
    'café ?'
    """
    return text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")


def cut(text: str, limit: int, keep: str = "head") -> str:
    """Return ``text``, or as much of it as fits ``limit`` characters with a note of how much was left out.

    Args:
        text: any.
        limit: at least 0; a note that does not fit is cut itself.
        keep: ``"head"``, ``"tail"`` or ``"both"``: which part stays.

    >>> cut("a" * 100, 40)
    'aaaaaaaaaaaaaa\\n[86 characters left out]'
    >>> cut("short", 40)
    'short'
    """
    if len(text) <= limit:
        return text
    edges = {"head": ("\n", ""), "tail": ("", "\n"), "both": ("\n", "\n")}[keep]
    # The number of characters left out has at most as many digits as that of all.
    kept = max(0, limit - len(_CUT.format(len(text)).join(edges)))
    note = _CUT.format(len(text) - kept).join(edges)
    head = {"head": kept, "tail": 0, "both": kept - kept // 2}[keep]
    return (text[:head] + note + text[len(text) - (kept - head) :])[:limit]


class _SharedTexts(Sequence[str]):
    """The texts that lie in shared memory now. A copy is a plain tuple."""

    def __init__(self, memory: np.ndarray) -> None:
        """Take the memory as bytes, [number of texts, length prefix + largest length]."""
        self._memory = memory

    def __len__(self) -> int:
        return len(self._memory)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[str, ...]: ...
    def __getitem__(self, index: int | slice) -> str | tuple[str, ...]:
        if isinstance(index, slice):
            return tuple(self[at] for at in range(*index.indices(len(self))))
        row = self._memory[index].tobytes()
        length = int.from_bytes(row[:_LENGTH_BYTES], "little")
        return row[_LENGTH_BYTES : _LENGTH_BYTES + length].decode("utf-8")

    def __deepcopy__(self, memo: dict[int, Any]) -> tuple[str, ...]:
        return tuple(self)


def _row_size(space: TextSpace) -> int:
    return _LENGTH_BYTES + _MOST_BYTES * space.max_length


@create_shared_memory.register(TextSpace)
def _create(space: TextSpace, n: int = 1, ctx: Any = multiprocessing) -> Any:
    return ctx.Array(c_char, n * _row_size(space))


@read_from_shared_memory.register(TextSpace)
def _read(space: TextSpace, shared_memory: Any, n: int = 1) -> _SharedTexts:
    return _SharedTexts(np.frombuffer(shared_memory.get_obj(), np.uint8).reshape(n, _row_size(space)))


@write_to_shared_memory.register(TextSpace)
def _write(space: TextSpace, index: int, values: str, shared_memory: Any) -> None:
    encoded = storable(values).encode("utf-8")
    data = len(encoded).to_bytes(_LENGTH_BYTES, "little") + encoded
    memory = memoryview(shared_memory.get_obj()).cast("B")
    start = index * _row_size(space)
    memory[start : start + len(data)] = data
