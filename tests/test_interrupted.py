"""A test run that is interrupted leaves no process behind."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests import conftest, guard

REPOSITORY = Path(__file__).parents[1]
TEST = """
import os, pathlib, subprocess, time

def test_that_takes_long():
    # As Ray starts its daemons: in a session of its own, below nobody once what started it has gone.
    subprocess.run(["setsid", "--fork", "sh", "-c", "echo $$ > daemon; exec sleep 600"])
    script = subprocess.Popen(["sh", "-c", "echo $$ > script; sleep 600; true"])
    pathlib.Path("test").write_text(str(os.getpid()))
    script.wait()
"""


def begin(folder: Path, *flags: str) -> tuple[subprocess.Popen[bytes], list[psutil.Process]]:
    """A run of pytest in the middle of a test, and what that has started."""
    (folder / "test_long.py").write_text(TEST)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        *flags,
        "test_long.py",
    ]
    run = subprocess.Popen(
        command,
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.DEVNULL,
        # What starts this test in the background may have it ignore Ctrl-C, and so would the run.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    names = ("daemon", "script", "test")
    end = time.monotonic() + 120
    while not all(
        (folder / name).exists() and (folder / name).read_text().strip() for name in names
    ):
        assert run.poll() is None and time.monotonic() < end
        time.sleep(0.05)
    return run, [psutil.Process(int((folder / name).read_text())) for name in names]


def still_there(processes: list[psutil.Process], seconds: float) -> list[psutil.Process]:
    """Those that are alive after so long at most."""
    end = time.monotonic() + seconds
    while True:
        alive = []
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                    alive.append(process)
        if not alive or time.monotonic() > end:
            return alive
        time.sleep(0.1)


@pytest.mark.parametrize("workers", [0, 1], ids=["alone", "xdist"])
@pytest.mark.parametrize(
    "sent", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda sent: sent.name
)
def test_nothing_is_left(tmp_path: Path, sent: signal.Signals, workers: int) -> None:
    run, started = begin(tmp_path, "-p", "tests.guard", *(["-n", str(workers)] if workers else []))
    below = psutil.Process(run.pid).children(recursive=True)
    run.send_signal(sent)
    assert not still_there([*started, *below], 60)
    assert run.wait(60) != 0


def test_without_the_guard_daemons_are_left(tmp_path: Path) -> None:
    """What the others would find if the guard did nothing."""
    run, started = begin(tmp_path)
    run.terminate()
    run.wait(60)
    left = still_there(started, 1)
    for process in left:
        process.kill()
    assert len(left) == 2


def test_this_very_run_is_guarded() -> None:
    assert conftest.pytest_configure is guard.pytest_configure
    assert os.environ[guard.MARK]
