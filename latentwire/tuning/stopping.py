"""Early end of a sweep: by a signal, its time budget, or another driver that has taken it.

Tune's own ways of stopping let the steps after the search run: re-runs, scores, export. Here the
search ends, its trials stay unfinished in the study, and the command says how to go on.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

from ray.tune import Stopper

from latentwire.tuning.lease import Lease

SIGNALS = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}
"""Signals that stop a sweep, and their everyday names. Exit statuses are the shell's: 128 and the
signal's number."""
SIGINT_STATUS = 128 + signal.SIGINT
"""Exit status after Ctrl-C."""
NOT_THROUGH = 1
"""Exit status where the time budget is over, and where another driver has taken the sweep."""


class SweepStopped(KeyboardInterrupt):
    """A sweep that stops before its end; nothing has failed.

    As a ``KeyboardInterrupt`` it passes every ``except Exception`` on the way.
    """


class Stop(Stopper):
    """The reason for which a sweep is to stop, if any; Tune asks for it after every event."""

    def __init__(self) -> None:
        """Start without a reason to stop."""
        self.reason: str | None = None
        self.status = 0
        """Exit status of the command."""
        self.taken = False
        """True when another driver has taken the sweep: then nothing may be written any more."""
        self.lease: Lease | None = None
        """Lease of the driver on its sweep; ``None`` where it needs none."""
        self.by_budget = False
        """True when the time budget alone ended the sweep: then complete trials may be scored."""
        self._deadline: float | None = None
        self._searching = False
        self._heard = False

    def __reduce__(self) -> tuple[type[Stop], tuple[()]]:
        """Let Tune pickle its stopper as a fresh one, which is never asked."""
        return Stop, ()

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Return False: no single trial is stopped."""
        return False

    def stop_all(self) -> bool:
        """Return whether the search ends now."""
        if self.reason is None and self._deadline is not None and time.monotonic() > self._deadline:
            self.by_budget = True
            self.ask("tune.time_budget_minutes is over", NOT_THROUGH)
        return self.reason is not None

    def ask(self, reason: str, status: int) -> None:
        """Let the sweep stop; the first reason counts."""
        if self.reason is None:
            self.reason, self.status = reason, status

    def lose(self, why: str) -> None:
        """Let the sweep stop because another driver has taken it."""
        self.taken = True
        self.ask(why, NOT_THROUGH)

    def may_write(self) -> bool:
        """Return whether the sweep is still this driver's."""
        if self.lease is not None:
            self.lease.held()  # calls lose() where it has been taken
        return not self.taken

    def check_taken(self) -> None:
        """Raise :class:`SweepStopped` where another driver has the sweep, and its files."""
        if not self.may_write():
            raise SweepStopped(self.reason)

    def check(self, complete: bool) -> None:
        """Raise :class:`SweepStopped` where the sweep is to stop.

        Time that ran out as the search was ``complete`` does not count.
        """
        if self.reason is not None and not (complete and self.by_budget):
            raise SweepStopped(self.reason)

    @contextlib.contextmanager
    def searching(self, minutes: float | None) -> Iterator[None]:
        """Let a signal in the block end the search in good order instead of at once.

        ``minutes``: time budget of this and all further such blocks.
        """
        # Search and re-runs share one budget, from the first block on.
        if self._deadline is None and minutes is not None:
            self._deadline = time.monotonic() + 60 * minutes
        self._searching = True
        try:
            yield
        finally:
            self._searching = False

    @contextlib.contextmanager
    def by_signals(self) -> Iterator[None]:
        """Stop at a signal of :data:`SIGNALS` in the block. Main thread only.

        A second signal does not wait for the search.
        """
        os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"  # Tune's own lets re-runs and scores begin
        before = {number: signal.signal(number, self._hear) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        # Asked for during the search, Tune ends it; at any other time nobody would look.
        first, self._heard = not self._heard, True
        if self.by_budget:
            # Whoever stops a search that the budget is ending wants no scores of it either.
            self.by_budget, self.reason = False, None
        self.ask(SIGNALS[signal.Signals(number)], 128 + number)
        if not (first and self._searching):
            raise SweepStopped(self.reason)
        print(
            "stopping: trials are cut and keep their checkpoints; once more to stop at once",
            file=sys.stderr,
            flush=True,
        )
