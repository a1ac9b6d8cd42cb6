"""The metrics of a run that may be under way.

- ``MetricsFile``: its rows so far, and those after a place that a reader has seen.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

Row = dict[str, Any]

NOTHING_READ = "0-00000000"
"""The cursor before the first row."""


class MetricsFile:
    """Rows of ``metrics.jsonl``, read again when the file has changed.

    A cursor names a place in the file by its offset and the checksum of all before, so that one from before a run was
    resumed, which cuts rows away and writes others, is told from one that still holds.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stamp: tuple[int, ...] | None = None
        self.rows: list[Row] = []
        self._offset = self._checksum = 0
        self._cursors = {NOTHING_READ: 0}
        """Rows before each place."""

    @property
    def cursor(self) -> str:
        """The place behind the last row."""
        return f"{self._offset}-{self._checksum:08x}"

    def refresh(self) -> None:
        """Read what is new. A last line that is still being written waits for the next time."""
        try:
            status = self._path.stat()
            stamp = (status.st_ino, status.st_size, status.st_mtime_ns)
            if stamp == self._stamp:
                return
            data = self._path.read_bytes()
        except FileNotFoundError:
            stamp, data = None, b""
        except OSError:  # it may be readable again: what was read of it stays
            return
        if len(data) < self._offset or zlib.crc32(data[: self._offset]) != self._checksum:
            self.rows, self._offset, self._checksum, self._cursors = [], 0, 0, {NOTHING_READ: 0}
        for line in data[self._offset :].splitlines(keepends=True):
            if not line.endswith(b"\n"):
                break
            self._offset += len(line)
            self._checksum = zlib.crc32(line, self._checksum)
            row = _row(line)
            if row is not None:
                self.rows.append(row)
            self._cursors[self.cursor] = len(self.rows)
        self._stamp = stamp

    def after(self, cursor: str | None) -> tuple[bool, list[Row]]:
        """Whether a reader at ``cursor`` must begin anew, and the rows that it lacks: then, all of them."""
        seen = self._cursors.get(cursor or "")
        return (True, self.rows) if seen is None else (False, self.rows[seen:])


def _row(line: bytes) -> Row | None:
    """None for what is no row, as where a kill cut a line short and a later one was written behind it."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) and "phase" in row else None
