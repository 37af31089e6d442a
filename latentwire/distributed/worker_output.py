"""Output of a trial's processes: into a file of the trial, and to the sweep's driver.

Every process of a trial runs in :func:`trial_log`, which copies its output into the trial's
directory. A line that a person at the driver's console should see goes there by :func:`tell`, and
how far work has come by :func:`tell_progress`: Ray brings all lines of all workers to the driver,
where :mod:`latentwire.distributed.driver_log` knows these two kinds by how they begin.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import socket
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from latentwire.storage import Place

TOLD = "[latentwire] "
"""How a line begins that is shown at the driver's console."""
PROGRESS = "[latentwire progress] "
"""How a line begins that says in JSON how far work has come."""
PROGRESS_SECONDS = 5.0
"""Seconds between two such lines of one process."""


def log_file(folder: Place, rank: int = 0) -> Path | None:
    """Return the file that a trial's worker prints into; ``None`` in an object store, where no file grows.

    There the driver's log has the lines. The trial's own driver shares the file of rank 0.
    """
    if not isinstance(folder, Path):
        return None
    return folder / ("log.txt" if rank == 0 else f"log-{rank}.txt")


class Tee(io.TextIOBase):
    """A text stream whose lines also go into a file; a file that cannot be written is passed over."""

    def __init__(self, stream: TextIO, file: TextIO) -> None:
        """Stand for ``stream``; ``file`` is line-buffered, so that no death takes whole lines along."""
        self.stream, self.file = stream, file

    def write(self, text: str) -> int:
        """Write to both."""
        with contextlib.suppress(OSError):  # a full disk must not end a trial
            self.file.write(text)
        return self.stream.write(text)

    def flush(self) -> None:
        """Flush both."""
        with contextlib.suppress(OSError):
            self.file.flush()
        self.stream.flush()

    def fileno(self) -> int:
        """Return the descriptor of the stream."""
        return self.stream.fileno()

    def isatty(self) -> bool:
        """Return False, so that no bars are drawn into a file."""
        return False


@contextlib.contextmanager
def trial_log(folder: Place, rank: int = 0) -> Iterator[None]:
    """Append what this process prints in the block to the trial's file, the traceback of a failure too."""
    path = log_file(folder, rank)
    file = None if path is None else _opened(path)
    if file is None:
        yield
        return
    before = sys.stdout, sys.stderr
    with file:
        file.write(
            f"---- {time.strftime('%F %T')}, process {os.getpid()} on {socket.gethostname()}\n"
        )
        sys.stdout, sys.stderr = Tee(sys.stdout, file), Tee(sys.stderr, file)
        try:
            yield
        except SystemExit:  # Tune stops a trial by it
            raise
        except BaseException:
            traceback.print_exc(file=file)  # Ray shows it to the driver by itself
            raise
        finally:
            sys.stdout, sys.stderr = before


def _opened(path: Path) -> TextIO | None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.open("a", buffering=1, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        print(f"output is not copied to {path}: {error}", file=sys.stderr, flush=True)
        return None


def tell(line: str) -> None:
    """Print a line that the driver's console shows."""
    print(f"{TOLD}{line}", flush=True)


class ProgressTeller:
    """Tells the driver how far work has come, now and then; the trial's file is spared."""

    def __init__(self, name: str) -> None:
        """Begin with nothing told; ``name``: of the work, as the driver knows it."""
        self.name = name
        self._again = 0.0

    def __call__(self, **values: Any) -> None:
        """Tell these ``values`` unless some were told within :data:`PROGRESS_SECONDS`."""
        now = time.monotonic()
        if now < self._again:
            return
        self._again = now + PROGRESS_SECONDS
        # Past the trial's file, to the stream that Ray brings to the driver.
        stream = sys.stdout.stream if isinstance(sys.stdout, Tee) else sys.stdout
        stream.write(f"{PROGRESS}{json.dumps({'name': self.name} | values)}\n")
        stream.flush()
