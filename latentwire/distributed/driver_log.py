"""A driver's log file: what Ray, its libraries and Optuna say, and every line that a worker prints.

The console is left to what a person waits for. Ray brings the lines of all workers to the driver;
those that begin as :mod:`latentwire.distributed.worker_output` has it are shown or counted, the
rest goes into the file.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

from ray._private import worker as rays_worker

from latentwire.addresses import cache_dir
from latentwire.distributed.worker_output import PROGRESS, TOLD
from latentwire.storage import Place

LIBRARIES = (
    "ray",
    "ray.data",
    "ray.train",
    "ray.tune",
    "optuna",
    "mlflow",
    "alembic",
    "py.warnings",
)
"""Loggers whose records go into the file."""
FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
TRAIN_WORKER = "RayTrainWorker"
"""Name by which Ray knows a training's workers."""
WAITING_WRITES = 20_000
"""Writes that are held while there is no file; of more the last."""

Listener = Callable[[dict[str, Any]], None]


class DriverLog:
    """The log of this process's driver; lines wait in memory until it has a file."""

    def __init__(self) -> None:
        """Begin without a file."""
        self.path: Path | None = None
        self.verbose = False
        """True where the console shows what goes into the file."""
        self.training = False
        """True where the console shows what a training's workers print, as one in this process does."""
        self.handler = logging.StreamHandler(self)
        self.handler.setFormatter(logging.Formatter(FORMAT))
        self._waiting: deque[str] = deque(maxlen=WAITING_WRITES)
        self._file: TextIO | None = None
        self._lock = threading.RLock()
        self._listeners: list[Listener] = []

    # ------------------------------------------------------------------------------------ the file

    def write(self, text: str) -> int:
        """Append text; a disk that is full ends no sweep."""
        with self._lock, contextlib.suppress(OSError):
            if self._file is None:
                self._waiting.append(text)
            else:
                self._file.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush the file."""
        with self._lock, contextlib.suppress(OSError):
            if self._file is not None:
                self._file.flush()

    def open(self, path: Path) -> Path:
        """Write to a file from here on, and what has been said so far; returns it.

        A file that is there goes on: that of a sweep which is resumed, say.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a", buffering=1, encoding="utf-8", errors="backslashreplace")
        file.write(f"---- {time.strftime('%F %T')}, process {os.getpid()}: {' '.join(sys.argv)}\n")
        with self._lock:
            file.writelines(self._waiting)
            self._waiting.clear()
            if self._file is not None:
                self._file.close()
            self._file, self.path = file, path
        return path

    # ------------------------------------------------------------------------- what is sent there

    def divert(self, verbose: bool = False, training: bool = False) -> None:
        """Send here what libraries, workers and Ray's own processes say, and Python's warnings.

        To be called before Ray starts, and again when a further library has been imported.

        Args:
            verbose: let the console show them too, as it does without this.
            training: let it show what a training's workers print.
        """
        self.verbose, self.training = verbose, training
        # Ray hands every batch of workers' lines to this function of its own to print.
        rays_worker.print_to_stdstream = lambda batch, ignore_prefix: self.receive(batch)
        os.environ["RAY_COLOR_PREFIX"] = "0"  # no colours in a file
        if not verbose:  # they become records of the logger py.warnings
            logging.captureWarnings(True)
        for name in LIBRARIES:
            logger = logging.getLogger(name)
            if not verbose:
                for handler in [each for each in logger.handlers if _is_of_a_console(each)]:
                    logger.removeHandler(handler)
            # A logger below "ray" that hands its records on would have them written twice.
            handed_on = logger.propagate and name.startswith("ray.")
            if self.handler not in logger.handlers and not handed_on:
                logger.addHandler(self.handler)
        logging.getLogger("py.warnings").propagate = verbose

    def receive(self, batch: dict[str, Any]) -> None:
        """Sort lines of one process into the log, the console and the listeners.

        Args:
            batch: Ray's: ``lines`` with ``pid``, ``ip`` and names of the process.
        """
        logged, others = [], []
        for line in batch["lines"]:
            # Of steps nothing is logged; what is told is logged and shown; the rest is logged.
            if line.startswith(PROGRESS):
                self._count(line.removeprefix(PROGRESS))
                continue
            logged.append(line)
            if line.startswith(TOLD):
                print(line.removeprefix(TOLD), flush=True)
            else:
                others.append(line)
        if logged:
            rays_worker.print_worker_logs(batch | {"lines": logged}, self)
        if not others:
            return
        if self.training and batch.get("actor_name") == TRAIN_WORKER and not batch["is_err"]:
            print("\n".join(others), flush=True)
        # The autoscaler's lines are of nodes that come or cannot be had.
        elif self.verbose or batch.get("pid") == "autoscaler":
            rays_worker.print_worker_logs(batch | {"lines": others}, sys.stdout)

    def _count(self, text: str) -> None:
        try:
            values = json.loads(text)
        except ValueError:  # half a line
            return
        # A copy: a block may end, and take its listener out, while this thread of Ray's goes on.
        for listener in list(self._listeners):
            listener(values)

    @contextlib.contextmanager
    def listening(self, listener: Listener) -> Iterator[None]:
        """Hand what workers tell of their progress to ``listener`` in the block, from a thread of Ray's."""
        self._listeners.append(listener)
        try:
            yield
        finally:
            self._listeners.remove(listener)


LOG = DriverLog()
"""The log of this process."""


def _is_of_a_console(handler: logging.Handler) -> bool:
    # A FileHandler is a StreamHandler too, and this log's own handler streams into LOG.
    if not isinstance(handler, logging.StreamHandler) or isinstance(handler, logging.FileHandler):
        return False
    return getattr(handler, "stream", None) is not LOG


def path_beside(output: Place, name: str = "log.txt") -> Path:
    """Return where the log of a sweep or run lies: in its directory, or in this machine's cache where that is in a store."""
    if isinstance(output, Path):
        return output / name
    return cache_dir() / "logs" / f"{output.name}.txt"
