"""What a trial's processes print is in a file of the trial, whatever becomes of them."""

import io
import json
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from latentwire.distributed import worker_output
from latentwire.distributed.worker_output import (
    PROGRESS,
    TOLD,
    ProgressTeller,
    log_file,
    tell,
    trial_log,
)
from latentwire.storage import Remote


def test_lines_go_to_both_and_later_ones_are_appended(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for attempt in ("first", "second"):
        with trial_log(tmp_path / "trial-3", 1):
            print(attempt, flush=True)
            handler = logging.StreamHandler()  # of a library that logs
            handler.emit(logging.LogRecord("a", logging.WARNING, "", 0, "careful", None, None))
    print("after")
    head, first, careful, again, second, _ = (
        (tmp_path / "trial-3" / "log-1.txt").read_text().splitlines()
    )
    assert (first, careful, second) == ("first", "careful", "second")
    assert head.startswith("---- ") and f"process {os.getpid()} on " in again
    shown = capsys.readouterr()
    assert shown.out == "first\nsecond\nafter\n" and shown.err == "careful\ncareful\n"


def test_whole_lines_outlive_a_process_that_is_killed(tmp_path: Path) -> None:
    job = (
        "import sys; from pathlib import Path; from latentwire.distributed.worker_output import trial_log\n"
        "with trial_log(Path(sys.argv[1])):\n    print('step 1'); sys.stdin.read()"
    )
    process = subprocess.Popen([sys.executable, "-c", job, str(tmp_path)], stdin=subprocess.PIPE)
    file = tmp_path / "log.txt"
    while not (file.exists() and "step 1" in file.read_text()):
        assert process.poll() is None
    process.kill()
    assert process.wait(30) == -signal.SIGKILL
    assert file.read_text().endswith("\nstep 1\n")


def test_a_failure_leaves_its_traceback(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a fault"), trial_log(tmp_path):
        raise ValueError("a fault")
    assert (tmp_path / "log.txt").read_text().rstrip().endswith("ValueError: a fault")


class Full(io.StringIO):
    """A file on a disk without room."""

    def write(self, text: str) -> int:
        raise OSError(28, "No space left on device")


def test_a_disk_without_room_ends_no_trial(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tee = worker_output.Tee(sys.stdout, Full())
    assert tee.write("step 1\n") == 7
    (tmp_path / "a file").touch()
    with trial_log(tmp_path / "a file"):
        print("step 2")
    shown = capsys.readouterr()
    assert shown.out == "step 1\nstep 2\n" and "output is not copied to" in shown.err


def test_in_an_object_store_there_is_no_file(capsys: pytest.CaptureFixture[str]) -> None:
    folder = Remote("s3://bucket/sweep/trials/trial-0")
    assert log_file(folder) is None
    with trial_log(folder):
        print("step 1")
    assert capsys.readouterr().out == "step 1\n"


def test_what_the_driver_shows_is_in_the_file_and_progress_is_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with trial_log(tmp_path):
        tell("trial-0 waits")
        teller = ProgressTeller("trial-0")
        teller(step=1)
        teller(step=2)  # too soon
    waits, progress = capsys.readouterr().out.splitlines()
    assert waits == f"{TOLD}trial-0 waits" and waits in (tmp_path / "log.txt").read_text()
    assert json.loads(progress.removeprefix(PROGRESS)) == {"name": "trial-0", "step": 1}
    assert "step" not in (tmp_path / "log.txt").read_text()
