"""What libraries and workers say is in the driver's log; the console shows what it must."""

import json
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from latentwire.distributed import driver_log
from latentwire.distributed.driver_log import LIBRARIES, DriverLog, path_beside
from latentwire.distributed.worker_output import PROGRESS, TOLD
from latentwire.storage import Remote


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Iterator[DriverLog]:
    """A log of its own, and the loggers as they were afterwards."""
    loggers = [logging.getLogger(name) for name in LIBRARIES]
    before = [(list(logger.handlers), logger.propagate) for logger in loggers]
    logging.captureWarnings(False)  # a test before may have left it on, with a hook that is gone
    fresh = DriverLog()
    monkeypatch.setattr(driver_log, "LOG", fresh)
    yield fresh
    logging.captureWarnings(False)
    for logger, (handlers, propagate) in zip(loggers, before, strict=True):
        logger.handlers, logger.propagate = handlers, propagate


def batch(*lines: str, **values: Any) -> dict[str, Any]:
    """Lines of a process, as Ray brings them."""
    return {
        "lines": list(lines),
        "pid": 7,
        "ip": "here",
        "localhost": "here",
        "is_err": False,
    } | values


def test_libraries_speak_to_the_file_alone(
    log: DriverLog, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    logger = logging.getLogger("ray.tune")
    logger.addHandler(logging.StreamHandler())
    log.divert()
    logger.warning("before there is a file")
    file = log.open(tmp_path / "sweep" / "log.txt")
    log.divert()  # once more, as another library is imported
    logger.warning("a trial is slow")
    with warnings.catch_warnings():
        logging.captureWarnings(True)
        warnings.simplefilter("always")
        warnings.warn("experimental", stacklevel=1)
    text = file.read_text()
    assert (
        text.startswith("---- ") and text.count("WARNING ray.tune: before there is a file\n") == 1
    )
    assert text.count("a trial is slow") == 1 and "UserWarning: experimental" in text
    assert capsys.readouterr() == ("", "")


def test_a_verbose_console_shows_all_of_it(
    log: DriverLog, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    logger = logging.getLogger("ray.tune")
    logger.addHandler(logging.StreamHandler())
    log.divert(verbose=True)
    file = log.open(tmp_path / "log.txt")
    logger.warning("a trial is slow")
    log.receive(batch("step 1/10", actor_name="RayTrainWorker"))
    shown = capsys.readouterr()
    assert "a trial is slow" in shown.err and "(RayTrainWorker pid=7) step 1/10\n" in shown.out
    assert (
        "a trial is slow" in file.read_text()
        and "(RayTrainWorker pid=7) step 1/10\n" in file.read_text()
    )


def test_workers_lines_are_sorted(
    log: DriverLog, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = log.open(tmp_path / "log.txt")
    heard: list[dict[str, Any]] = []
    progress = PROGRESS + json.dumps({"name": "trial-0", "step": 3})
    with log.listening(heard.append):
        log.receive(batch("step 1/10", f"{TOLD}trial-0 waits", progress, f"{PROGRESS}{{half a li"))
    log.receive(batch(progress))
    assert (
        heard == [{"name": "trial-0", "step": 3}] and capsys.readouterr().out == "trial-0 waits\n"
    )
    assert [line for line in file.read_text().splitlines() if "pid=7" in line] == [
        "(pid=7) step 1/10",
        f"(pid=7) {TOLD}trial-0 waits",
    ]


def test_a_training_shows_what_its_workers_print(
    log: DriverLog, capsys: pytest.CaptureFixture[str]
) -> None:
    log.divert(training=True)
    for lines, is_err in (
        (batch("step 1/10", f"{TOLD}trial-0 waits"), False),
        (batch("careful"), True),
    ):
        log.receive(lines | {"actor_name": "RayTrainWorker", "is_err": is_err})
    log.receive(batch("requesting resources", actor_name="TrainController"))
    assert capsys.readouterr().out == "trial-0 waits\nstep 1/10\n"


def test_a_resumed_sweep_goes_on_in_the_same_file(tmp_path: Path) -> None:
    for line in ("first", "second"):
        log = DriverLog()
        log.open(tmp_path / "log.txt")
        log.write(f"{line}\n")
    assert (tmp_path / "log.txt").read_text().splitlines()[1::2] == ["first", "second"]


def test_a_sweep_in_a_bucket_has_its_log_on_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LATENTWIRE_CACHE", str(tmp_path))
    assert path_beside(Remote("s3://bucket/runs/one")) == tmp_path / "logs" / "one.txt"
    assert path_beside(tmp_path / "runs" / "one") == tmp_path / "runs" / "one" / "log.txt"
