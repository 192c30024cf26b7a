"""Progress bars on a terminal, plain lines elsewhere."""

import time
from collections.abc import Callable, Sequence
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text


class Display:
    """Says how far a run is, on `console`.

    A run has phases, one after the other. On a terminal the phase under way has a bar that
    `update` moves; elsewhere `update` prints a line now and then.

    Args:
      console: where to; usually standard error.
      check: called between two batches; may raise KeyboardInterrupt.
    """

    def __init__(self, console: Console, check: Callable[[], None] = lambda: None) -> None:
        self.check = check
        self._console = console
        self._live = console.is_terminal
        self._pause = 0.2 if self._live else 10.0  # seconds between two updates
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not self._live,
        )
        self._task: TaskID | None = None
        self._phase, self._total, self._updated = "", 0, 0.0

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def phase(self, name: str, total: int) -> None:
        """Begins a phase of `total` rows."""
        if self._task is not None:
            self._progress.remove_task(self._task)
        self._task = self._progress.add_task(name, total=total, note="")
        self._phase, self._total, self._updated = name, total, time.monotonic()

    @property
    def is_due(self) -> bool:
        """Whether it is time for another `update`."""
        return time.monotonic() - self._updated >= self._pause

    def update(self, rows: int, note: str = "") -> None:
        """Shows that `rows` rows of the phase are done."""
        self._updated = time.monotonic()
        if self._task is not None and self._live:
            self._progress.update(self._task, completed=min(rows, self._total), note=note)
        else:
            self.line(f"{self._phase}: {rows:,} of {self._total:,} rows  {note}".rstrip())

    def move(self, done: int) -> None:
        """Moves the bar, where there is one."""
        if self._task is not None:
            self._progress.update(self._task, completed=done)

    def done(self) -> None:
        """Ends the phase: its bar is full, however many of the rows were malformed."""
        if self._task is not None:
            self._progress.update(self._task, completed=self._total)
            self._progress.refresh()  # The next phase takes the bar away.

    def table(self, title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Prints a table above the bar; elsewhere than on a terminal as lines of equal columns."""
        if self._live:
            table = Table(*header, title=title)
            for row in rows:
                table.add_row(*map(Text, row))
            self._console.print(table)
            return
        widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
        self.line(title)
        for row in (header, *rows):
            cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
            self.line(f"  {'  '.join(cells)}".rstrip())

    def line(self, text: str) -> None:
        """Prints a line above the bar."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)
