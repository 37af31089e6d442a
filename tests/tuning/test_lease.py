"""One sweep has one driver, on a disk and in a store; what a dead one held is free at once."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from latentwire import storage
from latentwire.storage import Place, StorageError, text_if_there
from latentwire.tuning import lease
from latentwire.tuning.lease import LEASE_FILE, Driver, Lease, LeaseError, held
from tests.s3 import bucket, point_to

HOLDER = """
import sys, time
from latentwire.storage import place
from latentwire.tuning import lease
lease.SETTLE_SECONDS = 0.0
with lease.held(place(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with bucket() as running:
        yield running


@pytest.fixture(params=["disk", "s3"])
def sweep(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    """A sweep's directory that is not there yet."""
    monkeypatch.setattr(lease, "SETTLE_SECONDS", 0.0)
    if request.param == "disk":
        return tmp_path / "sweep"
    point_to(monkeypatch, request.getfixturevalue("port"))
    return storage.place(f"s3://bucket/{tmp_path.name}")


@pytest.fixture
def holder(sweep: Place) -> Iterator[subprocess.Popen]:
    """A process that holds the sweep."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(sweep)], stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"held\n"
    yield process
    process.kill()
    process.wait()


def held_by(sweep: Place, **changed: Any) -> Driver:
    """A lease of another driver."""
    other = replace(Lease(sweep).me, token="another", **changed)
    storage.write_text(sweep / LEASE_FILE, json.dumps(asdict(other)))
    return other


def test_a_second_driver_is_refused_by_name_and_touches_nothing(
    sweep: Place, holder: subprocess.Popen
) -> None:
    before = (sweep / LEASE_FILE).read_text()
    for force in (False, True):  # what lives is not taken
        said = rf"has process {holder.pid} on \S+, heartbeat \d s old: stop that one"
        with pytest.raises(LeaseError, match=said), held(sweep, force):
            raise AssertionError("let in")
    assert (sweep / LEASE_FILE).read_text() == before


def test_a_driver_that_was_killed_on_this_machine_holds_nothing(
    sweep: Place, holder: subprocess.Popen, capsys: pytest.CaptureFixture[str]
) -> None:
    holder.kill()  # nobody has waited for it yet: a process that is no more, but has its number still
    time.sleep(0.5)
    with held(sweep) as mine:
        assert mine.held()
    assert f"driver before is gone (process {holder.pid} on" in capsys.readouterr().out
    holder.wait()
    held_by(sweep, pid=holder.pid)
    with held(sweep):
        pass


def test_a_number_that_another_process_has_by_now_holds_nothing(sweep: Place) -> None:
    held_by(sweep, started="1")
    with held(sweep):
        pass


def test_one_that_stands_still_is_taken_by_force_alone(
    sweep: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(lease, "BEAT_SECONDS", 0.01)
    other = held_by(sweep, host="elsewhere", machine="another", heartbeat=time.time() - 60)
    with pytest.raises(LeaseError, match=r"process \d+ on elsewhere, heartbeat 6\d s old"):
        Lease(sweep).take(force=True)
    other = held_by(sweep, host="elsewhere", machine="another", heartbeat=time.time() - 130)
    with pytest.raises(
        LeaseError, match=rf"process {other.pid} on elsewhere, heartbeat 13\d s old.*with --force"
    ):
        Lease(sweep).take()
    assert lease.read(sweep) == other
    with held(sweep, force=True) as mine:
        assert lease.read(sweep).token == mine.me.token
    assert (
        "taken over from process" in capsys.readouterr().out and not (sweep / LEASE_FILE).exists()
    )


def test_one_whose_clock_is_behind_is_not_taken_while_it_beats(
    sweep: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = held_by(sweep, machine="another", heartbeat=time.time() - 3600)
    monkeypatch.setattr(
        time, "sleep", lambda _: held_by(sweep, machine="another", heartbeat=other.heartbeat + 10)
    )
    with pytest.raises(LeaseError, match="which lives"):
        Lease(sweep).take(force=True)


def test_a_driver_that_lost_its_lease_hears_of_it_and_leaves_the_others_alone(
    sweep: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "BEAT_SECONDS", 0.05)
    told: list[str] = []
    with held(sweep, lost=told.append) as mine:
        first = lease.read(sweep)
        end = time.time() + 30
        while lease.read(sweep) == first:  # it beats
            assert time.time() < end
            time.sleep(0.02)
        while mine.held():
            held_by(
                sweep
            )  # again where a heartbeat was on its way: who takes a lease reads it back
            assert time.time() < end
            time.sleep(0.1)
        time.sleep(0.2)
    assert (
        len(told) == 1 and f"another driver has taken {sweep} (process {os.getpid()} on" in told[0]
    )
    assert lease.read(sweep).token == "another"


def test_one_that_stood_still_asks_before_it_writes(sweep: Place) -> None:
    with held(sweep) as mine:
        held_by(sweep)
        assert mine.held()  # its last heartbeat is news
        mine.beaten -= 3 * lease.BEAT_SECONDS
        assert not mine.held()


def test_of_two_that_come_at_once_one_has_it(sweep: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda _: held_by(sweep))
    with pytest.raises(LeaseError, match="in the same moment"):
        Lease(sweep).take()
    assert lease.read(sweep).token == "another"


def test_it_is_given_back_on_a_failure_too(sweep: Place) -> None:
    for error in (RuntimeError, KeyboardInterrupt):
        with pytest.raises(error), held(sweep):
            assert (sweep / LEASE_FILE).exists()
            raise error
        assert not (sweep / LEASE_FILE).exists()


def test_a_store_that_does_not_answer_for_a_while_ends_no_sweep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(lease, "SETTLE_SECONDS", 0.0)

    def gone(*_: object) -> None:
        raise StorageError("the bucket does not answer")

    with held(tmp_path) as mine:
        with monkeypatch.context() as broken:
            broken.setattr(lease, "write_text", gone)
            mine.beat()
        assert (
            mine.held()
            and "no heartbeat this time: the bucket does not answer" in capsys.readouterr().err
        )
        mine.beat()
        assert lease.read(tmp_path).token == mine.me.token


def test_a_directory_in_which_a_sweep_did_not_come_to_begin_is_free(sweep: Place) -> None:
    assert lease.is_empty(sweep)
    held_by(sweep)
    if isinstance(sweep, Path):
        (sweep / f".{LEASE_FILE}.part-0123abcd").write_text("{")
    assert lease.is_empty(sweep)
    storage.write_text(sweep / "space.json", "{}")
    assert not lease.is_empty(sweep)


def test_what_is_no_lease_is_said(tmp_path: Path) -> None:
    (tmp_path / LEASE_FILE).write_text("{")
    with pytest.raises(LeaseError, match=r"must name the driver of the sweep, got '\{'; delete it"):
        Lease(tmp_path).take()


def test_a_suspended_driver_is_alive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "SETTLE_SECONDS", 0.0)
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE
    )
    try:
        assert process.stdout is not None and process.stdout.readline() == b"held\n"
        process.send_signal(signal.SIGSTOP)
        other = lease.read(tmp_path)
        assert other is not None and not other.gone
        with pytest.raises(LeaseError, match=f"has process {process.pid} on"):
            Lease(tmp_path).take()
    finally:
        process.kill()
        process.wait()


def test_a_lease_that_is_read_between_two_beats_is_read_again(
    sweep: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first look finds the end of an older text behind the new one."""
    with held(sweep):
        whole, torn = lease.read(sweep), [f'{text_if_there(sweep / LEASE_FILE)}"}}']
        look = lease.text_if_there
        monkeypatch.setattr(
            lease, "text_if_there", lambda place: torn.pop() if torn else look(place)
        )
        assert lease.read(sweep) == whole and not torn
