"""Progress of a scoring, and an estimate of the time it still takes."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

LINE_SECONDS = 60.0
"""Seconds between two lines where there is no terminal, as in a job's log."""


class ScoringProgress:
    """A bar in a terminal; elsewhere a line now and then.

    Rows count once for each condition that they are scored in.
    """

    def __init__(
        self, total: int, console: Console | None = None, watch: Callable[..., object] | None = None
    ) -> None:
        """Begin a scoring of ``total`` rows.

        ``watch``: called with ``what``, ``done`` and ``total`` whenever rows are scored, to show
        the progress elsewhere.
        """
        self.total, self.done, self.watch = total, 0, watch
        self.console = console or Console()
        self.began = self.last_line = time.monotonic()
        self.bar = Progress(
            TextColumn("scoring {task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("rows"),
            TimeElapsedColumn(),
            TextColumn("left:"),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        )
        self.task = self.bar.add_task("", total=total)

    def __enter__(self) -> ScoringProgress:
        self.bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.bar.stop()

    def advance(self, what: str, rows: int) -> None:
        """Count ``rows`` more as scored; ``what`` names the condition."""
        self.done += rows
        self.bar.update(self.task, advance=rows, description=what)
        if self.watch is not None:
            self.watch(what=what, done=self.done, total=self.total)
        now = time.monotonic()
        is_early = now - self.last_line < LINE_SECONDS
        # A terminal has its bar, and the end is told by who scores.
        if self.console.is_terminal or is_early or self.done >= self.total:
            return
        self.last_line = now
        left = seconds_left(self.done, self.total, now - self.began)
        print(
            f"scoring {what}: {self.done:,}/{self.total:,} rows, about {duration(left)} left",
            flush=True,
        )


def seconds_left(done: int, total: int, seconds: float) -> float:
    """Return the time left, if a row still takes what it took so far."""
    return seconds / done * (total - done)


def duration(seconds: float) -> str:
    """Return a time as a person writes it: ``2 h 5 min``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
