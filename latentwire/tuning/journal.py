"""A study's journal as a file: this machine's copy of one in a store, and the repair of torn lines.

Optuna appends a line of JSON for everything that happens. A driver that dies while it writes, a
full disk or a lost server leaves half a line. Optuna does not see it while it is the last, writes
the next one behind it, and cannot read the file from then on.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from optuna.storages.journal import JournalFileSymlinkLock

from latentwire.addresses import cache_dir
from latentwire.errors import UserError
from latentwire.storage import Place, Remote, local, upload, write

JOURNAL = "study.journal"
"""Name of the journal in a sweep's directory."""
LINES_PAST_A_TEAR = 20
"""Most whole lines of one process behind a torn line that a death can explain. Optuna reads after
every line that it appends, and fails where one follows a torn line: a driver gets a few lines past
it while it ends. With more of them the line must have been whole once."""


class JournalError(UserError):
    """A journal that lost something in its middle; the message names the line and the next move."""


@dataclass(frozen=True)
class Tear:
    """The torn end of a journal."""

    start: int
    """Byte where it begins: what lies before is whole."""
    line: int
    """Number of the torn line, from 1."""
    size: int
    """Bytes from there to the end."""


def find_tear(file: Path) -> Tear | None:
    """Return where a journal stops being whole lines of JSON; ``None`` where it does not.

    Raises :class:`JournalError` where so much follows that the line must have been whole when it
    was written: to leave all of that out would lose trials.
    """
    torn: Tear | None = None
    # followers: process → whole lines of its own behind the first torn one.
    position, followers = 0, Counter[str]()
    size = file.stat().st_size
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            writer = _writer(line)
            if writer is None and torn is None:
                torn = Tear(position, number, size - position)
            elif writer is not None and torn is not None:
                followers[writer] += 1
            position += len(line)
    if torn is not None and max(followers.values(), default=0) > LINES_PAST_A_TEAR:
        raise JournalError(
            "a journal may be torn at its end, where a death or a full disk leaves half a line, "
            f"got a damaged line {torn.line} with {sum(followers.values()):,} whole ones after it "
            f"in {file}: put back a copy of the file from before the damage, or begin a new sweep "
            "with --set tune.warm_start=<such a copy>"
        )
    return torn


def _writer(line: bytes) -> str | None:
    """Return the process that wrote a line of a journal; ``None`` for a line that is not whole."""
    # A record without its end of line is torn too: Optuna would write the next one behind it.
    if not line.endswith(b"\n"):
        return None
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return str(record.get("worker_id")) if isinstance(record, dict) else None


def mend(journal: Place, file: Path) -> None:
    """Set the torn end of a journal aside, so that the sweep goes on from the whole lines.

    The torn end goes into a file beside the journal. Its content is recovered where a trial goes
    on: the trial's checkpoints hold its evaluations. Only for the driver that holds the sweep:
    nobody else may append. ``file``: the journal, or this machine's copy of one in a store, which
    is mended too.
    """
    if find_tear(file) is None:
        return
    # The lock that Optuna holds while it appends.
    lock = JournalFileSymlinkLock(str(file))
    lock.acquire()  # what looked torn may have been a line on its way
    try:
        torn = find_tear(file)
        if torn is None:
            return
        name = time.strftime(f"{JOURNAL}-torn-%Y%m%d-%H%M%S")
        aside = file.with_name(name)
        with file.open("r+b") as whole:
            whole.seek(torn.start)
            tail = whole.read()
            # Written before the journal is cut: a death in between loses nothing.
            write(aside, lambda part: part.write_bytes(tail))
            whole.truncate(torn.start)
            os.fsync(whole.fileno())
    finally:
        lock.release()
    torn_end = journal.with_name(name)
    if isinstance(journal, Remote) and isinstance(torn_end, Remote):
        upload(aside, torn_end)
        upload(file, journal)
    print(
        f"{journal} ended in a torn line ({torn.size:,} bytes from line {torn.line} on, as a death or "
        f"a full disk leaves): set aside as {torn_end}, the sweep goes on from the lines before it",
        file=sys.stderr,
        flush=True,
    )


@contextlib.contextmanager
def readable(journal: Place) -> Iterator[Path]:
    """Yield a journal as a file of whole lines while the block lasts; the journal itself stays.

    Raises :class:`JournalError` where it lost something in its middle.
    """
    with local(journal) as file:
        torn = find_tear(file)
        if torn is None:
            yield file
            return
        print(
            f"{journal}: read without its torn end, from line {torn.line} on",
            file=sys.stderr,
            flush=True,
        )
        with tempfile.TemporaryDirectory() as folder, file.open("rb") as lines:
            whole = Path(folder) / JOURNAL
            whole.write_bytes(lines.read(torn.start))  # the bytes before the tear
            yield whole


def own_journal(journal: Place) -> Path:
    """Return the journal as a file on this machine without a torn end, for Optuna to append to.

    It is the journal itself, or this machine's copy of one in a store. The store's content is
    fetched unless this machine has the same and more. Should they differ, the store counts, and the
    copy is set aside under another name.
    """
    if isinstance(journal, Path):
        journal.parent.mkdir(parents=True, exist_ok=True)
        if journal.exists():
            mend(journal, journal)
        return journal
    file = _copy_of(journal)
    file.parent.mkdir(parents=True, exist_ok=True)
    if journal.exists():
        stored = journal.read_bytes()
        # A journal only grows: a copy that begins with the stored bytes has them, and perhaps more
        # that a driver on this machine could not put into the store.
        if not (file.exists() and file.read_bytes().startswith(stored)):
            if file.exists():
                file.rename(file.with_name(time.strftime(f"{JOURNAL}-until-%Y%m%d-%H%M%S")))
            write(file, lambda aside: aside.write_bytes(stored))
    if file.exists():
        mend(journal, file)
    return file


def keep_journal(journal: Place) -> None:
    """Put this machine's copy of a journal into the store.

    Raises :class:`~latentwire.storage.StorageError`.
    """
    if isinstance(journal, Remote):
        upload(_copy_of(journal), journal)


def _copy_of(journal: Remote) -> Path:
    return (
        cache_dir() / "studies" / hashlib.sha256(str(journal).encode()).hexdigest()[:16] / JOURNAL
    )
