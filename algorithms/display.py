"""What a person sees while a run goes on: a live table on a terminal, plain lines elsewhere.

- ``Display``: one row a step (success with its interval, turns, entropy, tokens a second, time left) and a
  status line under the table, with alarms between them.
"""

from __future__ import annotations

import math
import time
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from .stats import Proportion

COLUMNS = ("step", "success (95 %)", "turns", "entropy", "tokens/s", "time left")
WIDTHS = (12, 20, 7, 9, 10, 10)
VISIBLE_ROWS = 12
"""The live table shows the first row and the newest ones; the run folder keeps all."""


def clock(seconds: float | None) -> str:
    """``1:05`` or ``2:03:04``; a dash when unknown.

    >>> clock(65.4), clock(7384), clock(None)
    ('1:05', '2:03:04', '–')
    """
    if seconds is None or not math.isfinite(seconds):
        return "–"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class Display:
    """A context manager. On a terminal it redraws a table; otherwise each row is printed once, as a line."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console()
        self._rows: list[tuple[str, ...]] = []
        self._alarms: list[str] = []
        self._status = ""
        self._phase = ""
        self._started = time.monotonic()
        self._live: Live | None = None

    def __enter__(self) -> Display:
        if self.console.is_terminal:
            # transient: the full table is printed once at the end.
            self._live = Live(self._render(), console=self.console, refresh_per_second=4, transient=True)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None
            if self._rows:
                self.console.print(self._table(self._rows))
            for text in self._alarms:
                self.console.print(Text(text, style="yellow"))

    def say(self, text: str) -> None:
        """Print a line that stays, above the live table."""
        self.console.print(text, highlight=False)

    def alarm(self, text: str) -> None:
        """Show a line that stays under the table; without a terminal, print it once."""
        self._alarms.append(text)
        if self._live is None:
            self.console.print(text, highlight=False, markup=False, soft_wrap=True)
        self._refresh()

    def status(self, phase: str, detail: str = "") -> None:
        """Say what is going on. Without a terminal only a change of ``phase`` is printed."""
        if self._live is None and phase != self._phase:
            self.console.print(f"[{clock(time.monotonic() - self._started)}] {phase}", highlight=False, markup=False)
        self._phase = phase
        self._status = f"{phase} {detail}".rstrip()
        self._refresh()

    def row(
        self,
        step: str,
        success: Proportion,
        turns: float,
        entropy: float,
        tokens_per_second: float,
        seconds_left: float | None,
    ) -> None:
        """Add a finished step. ``entropy`` is in nats a token, ``turns`` the mean number in an episode."""
        cells = (
            step,
            str(success),
            f"{turns:.1f}",
            f"{entropy:.3f}",
            f"{tokens_per_second:,.0f}",
            clock(seconds_left),
        )
        if self._live is None:
            if not self._rows:
                self._print_line(COLUMNS)
            self._print_line(cells)
        self._rows.append(cells)
        self._refresh()

    def _print_line(self, cells: tuple[str, ...]) -> None:
        line = "".join(f"{cell:>{width}}" for cell, width in zip(cells, WIDTHS, strict=True))
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def _refresh(self) -> None:
        if self._live is not None:
            self._live.update(self._render())

    def _render(self) -> Group:
        rows = self._rows
        if len(rows) > VISIBLE_ROWS:
            rows = [rows[0], ("⋮",) + ("",) * (len(COLUMNS) - 1), *rows[-VISIBLE_ROWS:]]
        elapsed = clock(time.monotonic() - self._started)
        warnings = [Text(text, style="yellow") for text in self._alarms]
        return Group(self._table(rows), *warnings, Text(f"{elapsed}  {self._status}", style="dim"))

    @staticmethod
    def _table(rows: list[tuple[str, ...]]) -> Table:
        table = Table()
        for name in COLUMNS:
            table.add_column(name, justify="right", no_wrap=True)
        for cells in rows:
            table.add_row(*cells)
        return table
