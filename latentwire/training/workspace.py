"""A directory for trainings whose result is kept under a name of its own: one process at a time has it."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from latentwire.storage import Place, delete_directory

POLL_SECONDS = 0.5
"""Between two looks for whether another process has ended its work there."""


@contextlib.contextmanager
def workspace(
    path: Place, kind: str, waits: Callable[[], object] = lambda: None, *, here: bool = False
) -> Iterator[Place]:
    """Yield the directory in which a result is made; other processes that want it wait.

    It lies beside the result, so that a training that was killed goes on, and is deleted when the
    block has ended well: then the result is there. In an object store it lies there too, and those
    who wait are processes of this machine.

    Args:
        path: where the result will be.
        kind: the end of the directory's name.
        waits: called once where another process has it.
        here: work in a temporary directory where the result will be in an object store.
    """
    if here and not isinstance(path, Path):
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)
        return
    work = path.with_name(f".{path.name}.{kind}")
    if isinstance(work, Path):
        work.mkdir(parents=True, exist_ok=True)
        file = f"{work}.lock"
    else:
        file = str(Path(tempfile.gettempdir()) / f"latentwire-{path.name}.lock")
    # The system frees the lock of a process that dies: a killed training blocks no other.
    lock = FileLock(file)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        waits()
        lock.acquire(poll_interval=POLL_SECONDS)
    try:
        yield work
    finally:
        lock.release()
    # Only where the block has ended well: after an exception the next attempt goes on.
    if isinstance(work, Path):
        shutil.rmtree(work, ignore_errors=True)
        Path(file).unlink(missing_ok=True)
    elif work.is_dir():
        delete_directory(work)
