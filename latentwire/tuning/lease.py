"""Lease of a sweep, with a heartbeat, on a disk or in an object store: one sweep has one driver.

A driver writes its name into ``driver.json``, reads it back, and renews it again and again. Another
driver reads that name and is refused before it has touched anything. A driver whose process is gone
from this machine holds nothing. One on another machine, or one that stands still, gives way to
``--force`` alone, when its last heartbeat is old.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from latentwire.errors import UserError
from latentwire.storage import Place, StorageError, children, delete, text_if_there, write_text

LEASE_FILE = "driver.json"
"""Name of the lease in a sweep's directory, while a driver has it."""
BEAT_SECONDS = 10.0
"""Seconds between two heartbeats."""
LIMIT_SECONDS = 120.0
"""Age of the last heartbeat from which on ``--force`` may take a sweep over."""
WATCHED_BEATS = 3
"""Beats for which a lease is watched before ``--force`` takes it: ages go by two machines' clocks,
which may differ."""
SETTLE_SECONDS = 1.0
"""Seconds between writing a lease and reading it back: of two drivers that come at once, the one
that wrote last has it."""


class LeaseError(UserError):
    """A sweep that another driver holds; the message names the driver and the next move."""


@dataclass(frozen=True)
class Driver:
    """The driver that holds a sweep."""

    token: str
    """Name of this one command, unlike that of any other."""
    host: str
    machine: str
    """Machine or container whose process ids these are: two may share a host name."""
    pid: int
    started: str
    """Start of the process, as its machine counts time: another may have its id by now."""
    heartbeat: float
    """Time of the last heartbeat, in seconds since 1970."""

    @property
    def age(self) -> float:
        """Seconds since the last heartbeat, by this machine's clock."""
        return time.time() - self.heartbeat

    @property
    def gone(self) -> bool:
        """Return whether its process ran on this machine and has ended.

        It is false for processes of another machine, which cannot be seen.
        """
        if self.machine != this_machine():
            return False
        try:
            # Another process may have its id by now. A zombie has ended, and waits for its parent.
            if start_of(self.pid) != self.started:
                return True
            return psutil.Process(self.pid).status() == psutil.STATUS_ZOMBIE
        except (psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError):
            return True

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, heartbeat {max(0.0, self.age):.0f} s old"


def this_machine() -> str:
    """Return a name of this machine or container, whose process ids are its own."""
    # The boot's id tells machines apart, and one before and after a restart; the namespace of process
    # ids tells containers on one machine apart.
    boot, numbering = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    if boot.exists() and numbering.exists():
        return f"{socket.gethostname()} {boot.read_text().strip()} {os.readlink(numbering)}"
    return f"{socket.gethostname()} {psutil.boot_time():.0f}"


def start_of(pid: int) -> str:
    """Return when a process started.

    The unit is ticks since the boot where the system counts them: its clock may be set meanwhile.
    """
    if Path("/proc/self/stat").exists():
        # Field 22 of proc(5), starttime. The second field, a name in brackets, may hold spaces, so
        # fields are counted behind the last bracket, from field 3 on.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    return f"{psutil.Process(pid).create_time():.0f}"


def read(sweep: Place) -> Driver | None:
    """Return the driver that holds a sweep; ``None`` where there is none.

    A store asks for a file's size, then for its bytes: a heartbeat in between gives neither the old
    text nor the new one, so a text that makes no sense is read once more. Raises
    :class:`LeaseError` where it makes none again.
    """
    for last in (False, True):
        text = text_if_there(sweep / LEASE_FILE)
        if text is None:
            return None
        try:
            return Driver(**json.loads(text))
        except (ValueError, TypeError) as error:
            if last:
                raise LeaseError(
                    f"{sweep / LEASE_FILE} must name the driver of the sweep, got {text[:80]!r}; "
                    f"delete it if none runs"
                ) from error
    return None


def lives(driver: Driver | None) -> bool:
    """Return whether a driver has given a heartbeat of late, and is not known to be gone."""
    return driver is not None and not driver.gone and driver.age <= LIMIT_SECONDS


def is_empty(sweep: Place) -> bool:
    """Return whether a sweep's directory is missing, or holds nothing but a lease.

    A driver that died as it began leaves no more than that.
    """
    if sweep.is_file():
        return False
    # A lease that was being written has a name of its own: ".driver.json" and more.
    return all(path.name.lstrip(".").startswith(LEASE_FILE) for path in children(sweep))


def check(sweep: Place, force: bool = False) -> None:
    """Raise :class:`LeaseError` where another driver has a sweep; nothing is written.

    ``force``: as for :meth:`Lease.take`.
    """
    other = read(sweep)
    if other is not None and not other.gone:
        refuse(sweep, other, force)


def refuse(sweep: Place, other: Driver, force: bool) -> None:
    """Raise :class:`LeaseError` for a driver that lives, or that might and ``force`` is off."""
    if other.age <= LIMIT_SECONDS:
        raise LeaseError(
            f"one sweep has one driver, and {sweep} has {other}: stop that one, or wait until it "
            f"ends; --force takes over only where there was no heartbeat for {LIMIT_SECONDS:.0f} s"
        )
    if not force:
        raise LeaseError(
            f"one sweep has one driver, and {sweep} has {other}: it looks dead, but it may only "
            f"stand still or be cut off; make sure that it has ended, then give the same command "
            f"with --force"
        )


class Lease:
    """The lease of one driver on a sweep, from :meth:`take` to :meth:`release`."""

    def __init__(self, sweep: Place, lost: Callable[[str], None] = lambda why: None) -> None:
        """Prepare a lease, and write nothing yet.

        ``lost``: called once, with the reason, when another driver has taken the sweep.
        """
        self.sweep, self.on_lost = sweep, lost
        self.me = Driver(
            token=uuid.uuid4().hex,
            host=socket.gethostname(),
            machine=this_machine(),
            pid=os.getpid(),
            started=start_of(os.getpid()),
            heartbeat=time.time(),
        )
        self.lost = False
        self.beaten = 0.0
        """Time of the last heartbeat that was written, in seconds since 1970."""
        self._ended = threading.Event()
        self._turn = threading.Lock()
        self._thread = threading.Thread(target=self._beat_on, name="sweep-lease", daemon=True)

    def take(self, force: bool = False) -> None:
        """Take the sweep, and send heartbeats from now on.

        ``force``: take it also from a driver whose last heartbeat is old. Raises
        :class:`LeaseError` where another driver has it, before anything is written.
        """
        other = read(self.sweep)
        if other is not None:
            self._take_over(other, force)
        # Of two drivers that come at once both write; the later one reads its own token back.
        self._write()
        time.sleep(SETTLE_SECONDS)
        holder = read(self.sweep)
        if holder is None or holder.token != self.me.token:
            raise LeaseError(
                f"one sweep has one driver, and {holder} took {self.sweep} in the same moment; leave it to that one"
            )
        self._thread.start()

    def _take_over(self, other: Driver, force: bool) -> None:
        """Check that the sweep may be taken from another driver.

        Raises :class:`LeaseError` where it may not.
        """
        if other.gone:
            print(f"the driver before is gone ({other}): its sweep goes on here", flush=True)
            return
        refuse(self.sweep, other, force)
        seconds = WATCHED_BEATS * BEAT_SECONDS
        print(f"--force: watching for a sign of {other} for {seconds:.0f} s", flush=True)
        time.sleep(seconds)
        # Compared with itself, not with this machine's clock.
        again = read(self.sweep)
        if again is not None and again.heartbeat != other.heartbeat:
            raise LeaseError(
                f"--force takes over from a dead driver only, and {self.sweep} has {again}, which "
                "lives; stop that one first"
            )
        print(f"taken over from {other}", flush=True)

    def held(self) -> bool:
        """Return whether the sweep is still this driver's.

        The lease is read anew where the last heartbeat is old: a process that stood still (on a
        suspended machine) asks before it writes anything.
        """
        if not self.lost and time.time() - self.beaten > 2 * BEAT_SECONDS:
            self.beat()
        return not self.lost

    def beat(self) -> None:
        """Write a heartbeat, unless another driver has taken the sweep.

        A store that does not answer is asked again later.
        """
        # The thread beats, and so may the driver itself, in held().
        with self._turn:
            if self.lost or self._ended.is_set():
                return
            try:
                holder = read(self.sweep)
                if holder is not None and holder.token != self.me.token:
                    self.lost = True
                else:
                    # A lease that is missing is written anew.
                    self._write()
            except LeaseError as error:
                self.lost, holder = True, None
                print(error, file=sys.stderr, flush=True)
            except (StorageError, OSError) as error:
                print(f"no heartbeat this time: {error}", file=sys.stderr, flush=True)
                return
        # Outside the lock, once: a beat after this one returns above.
        if self.lost:
            self.on_lost(f"another driver has taken {self.sweep} ({holder})")

    def release(self) -> None:
        """Give the sweep back, if it is still this driver's."""
        # Under the lock: a beat that has begun ends first, and no later one writes.
        with self._turn:
            self._ended.set()
        if self._thread.is_alive():
            self._thread.join()
        try:
            holder = read(self.sweep)
            if holder is not None and holder.token == self.me.token:
                delete(self.sweep / LEASE_FILE)
        except (LeaseError, StorageError, OSError) as error:
            print(
                f"lease not released; it ends with this process: {error}",
                file=sys.stderr,
                flush=True,
            )

    def _write(self) -> None:
        now = time.time()
        record: dict[str, Any] = asdict(self.me) | {"heartbeat": now}
        write_text(self.sweep / LEASE_FILE, json.dumps(record, indent=1))
        self.beaten = now

    def _beat_on(self) -> None:
        while not self._ended.wait(BEAT_SECONDS):
            self.beat()


@contextlib.contextmanager
def held(
    sweep: Place, force: bool = False, lost: Callable[[str], None] = lambda why: None
) -> Iterator[Lease]:
    """Hold a sweep for as long as the block lasts, whatever ends it.

    Raises :class:`LeaseError` where another driver has it.
    """
    lease = Lease(sweep, lost)
    lease.take(force)
    try:
        yield lease
    finally:
        lease.release()
