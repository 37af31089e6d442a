"""What a test run started ends with it, however it ends: Ctrl-C, a signal, a crash.

A run marks its environment, which every process below it inherits: workers of pytest-xdist, scripts, Ray's daemons, which belong
to nobody once their driver is dead. A process beside it waits for its end and then kills whatever bears the mark.
``tests/conftest.py`` starts it; so does ``pytest -p tests.guard``.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
import uuid

import psutil
import pytest

MARK = "LATENTWIRE_TEST_RUN"
"""Its value is a path: a run that a test starts has its own mark below that test's."""
LOOK_SECONDS = 0.2
GIVE_UP_SECONDS = 30.0


def pytest_configure(config: pytest.Config) -> None:
    """Mark this run and have it waited for; a worker of pytest-xdist has the mark of its controller."""
    if hasattr(config, "workerinput") or config.stash.get(_GUARDED, False):
        return
    config.stash[_GUARDED] = True
    os.environ[MARK] = f"{os.environ.get(MARK, '')}/{uuid.uuid4().hex}"
    subprocess.Popen(
        [sys.executable, __file__, str(os.getpid()), os.environ[MARK]],
        start_new_session=True,  # Ctrl-C is not for it
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )


_GUARDED = pytest.StashKey[bool]()


def wait_and_clear(parent: int, mark: str) -> None:
    """Wait until that process is gone, then kill what bears the mark, until nothing does."""
    while os.getppid() == parent:
        time.sleep(LOOK_SECONDS)
    end = time.monotonic() + GIVE_UP_SECONDS
    while (left := marked(mark)) and time.monotonic() < end:
        for process in left:
            with contextlib.suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(left, timeout=LOOK_SECONDS)


def marked(mark: str) -> list[psutil.Process]:
    """Processes with that mark or one below it, and all that they started: Ray's workers write their titles over theirs."""
    found: dict[int, psutil.Process] = {}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.environ().get(MARK, "").startswith(mark):
                found |= {each.pid: each for each in (process, *process.children(recursive=True))}
    found.pop(os.getpid(), None)
    return [process for process in found.values() if process.status() != psutil.STATUS_ZOMBIE]


if __name__ == "__main__":
    wait_and_clear(int(sys.argv[1]), sys.argv[2])
