"""A journal that a death tore goes on from its whole lines, and what was torn is kept."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from optuna.trial import TrialState

from latentwire import storage
from latentwire.storage import Place
from latentwire.tuning import study as studies
from latentwire.tuning.journal import LINES_PAST_A_TEAR, JournalError, find_tear
from latentwire.tuning.study import JOURNAL, keep_journal, open_study, read_earlier, read_study
from tests.s3 import bucket, point_to

F1 = {"dev_f1": "max"}
HALF = b'{"op_code":5,"worker_id":"0b5c","trial_id":1,"st'
TAILS = {
    "half a line": HALF,
    "NUL bytes": b"\0" * 512,
    "half a line and NUL bytes": HALF + b"\0" * 64,
    "a line written behind half a line": HALF
    + b'{"op_code":0,"worker_id":"77aa","study_name":"sweep","directions":[2]}\n',
    "two more, which Optuna could not read any more": HALF
    + b'{"op_code":0,"worker_id":"77aa","study_name":"sweep","directions":[2]}\n' * 2,
    "a line without its end": b'{"op_code":2,"worker_id":"0b5c","study_id":0,"user_attr":{"a":1}}',
}


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """A sweep with a trial that has ended and one that runs."""
    study = open_study(tmp_path / "sweep" / JOURNAL, "sweep", F1)
    study.tell(study.ask(), 0.5)
    study.ask()
    return tmp_path / "sweep"


def append(sweep: Path, tail: bytes) -> bytes:
    """Tear a journal; returns what was whole."""
    whole = (sweep / JOURNAL).read_bytes()
    (sweep / JOURNAL).write_bytes(whole + tail)
    return whole


@pytest.mark.parametrize("tail", TAILS.values(), ids=TAILS)
def test_a_torn_end_is_set_aside_and_the_sweep_goes_on(
    sweep: Path, tail: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = append(sweep, tail)
    for _ in range(3):  # as often as it is opened again
        study = open_study(sweep / JOURNAL, "sweep", F1)
        assert [trial.state for trial in study.trials[:2]] == [
            TrialState.COMPLETE,
            TrialState.RUNNING,
        ]
        study.tell(study.ask(), 0.7)
    assert [trial.value for trial in open_study(sweep / JOURNAL, "sweep", F1).trials] == [
        0.5,
        None,
        0.7,
        0.7,
        0.7,
    ]
    assert (sweep / JOURNAL).read_bytes().startswith(whole)
    (aside,) = sweep.glob(f"{JOURNAL}-torn-*")
    assert aside.read_bytes() == tail
    told = capsys.readouterr().err
    assert (
        told.count("ended in a torn line") == 1
        and f"{len(tail):,} bytes from line" in told
        and str(aside) in told
    )


@pytest.mark.parametrize("tail", TAILS.values(), ids=TAILS)
def test_others_read_a_torn_journal_and_leave_it_as_it_is(sweep: Path, tail: bytes) -> None:
    append(sweep, tail)
    before = (sweep / JOURNAL).read_bytes()
    for source in (sweep, sweep / JOURNAL):
        assert [trial.value for trial in read_earlier(source, F1)] == [0.5]
    with read_study(sweep / JOURNAL, "sweep", F1) as study:
        assert [trial.value for trial in study.trials] == [0.5, None]
    assert (sweep / JOURNAL).read_bytes() == before and [file.name for file in sweep.iterdir()] == [
        JOURNAL
    ]


def test_a_look_at_a_journal_that_another_driver_writes_changes_nothing(sweep: Path) -> None:
    before = (sweep / JOURNAL).read_bytes()
    with read_study(sweep / JOURNAL, "sweep", F1) as study:
        assert len(study.trials) == 2
    with read_study(sweep / "none", "sweep", F1) as study:
        assert study.trials == []
    assert (sweep / JOURNAL).read_bytes() == before


def test_a_line_that_was_whole_once_is_no_torn_end(sweep: Path) -> None:
    """Leaving out all that follows it would lose trials, and leaving it out alone would mix them up."""
    study = open_study(sweep / JOURNAL, "sweep", F1)
    for number in range(LINES_PAST_A_TEAR + 1):
        study.set_user_attr(f"note {number}", number)
    lines = (sweep / JOURNAL).read_bytes().splitlines(keepends=True)
    damaged = len(lines) - LINES_PAST_A_TEAR - 2
    lines[damaged] = lines[damaged][:20] + b"\n"
    (sweep / JOURNAL).write_bytes(b"".join(lines))
    before = (sweep / JOURNAL).read_bytes()
    for look in (lambda: open_study(sweep / JOURNAL, "sweep", F1), lambda: read_earlier(sweep, F1)):
        with pytest.raises(
            JournalError, match=rf"got a damaged line {damaged + 1} with 21 whole ones after it"
        ):
            look()
    assert (sweep / JOURNAL).read_bytes() == before
    lines[-1:] = []
    (sweep / JOURNAL).write_bytes(b"".join(lines))
    assert find_tear(sweep / JOURNAL) is not None  # so many a dying driver may have appended


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with bucket() as running:
        yield running


@pytest.mark.parametrize("torn", ["this machine's copy", "the store's"])
def test_a_torn_journal_in_a_store_goes_on(
    torn: str, port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    point_to(monkeypatch, port)
    monkeypatch.setenv("LATENTWIRE_CACHE", str(tmp_path / "cache"))
    journal: Place = storage.place(f"s3://bucket/{tmp_path.name}/{JOURNAL}")
    study = open_study(journal, "sweep", F1)
    study.tell(study.ask(), 0.5)
    keep_journal(journal)
    file = studies.own_journal(journal)
    with file.open("ab") as end:
        end.write(HALF)
    if torn == "the store's":
        keep_journal(journal)
        monkeypatch.setenv("LATENTWIRE_CACHE", str(tmp_path / "another machine"))
        assert [trial.value for trial in read_earlier(journal, F1)] == [0.5]
    for _ in range(2):
        study = open_study(journal, "sweep", F1)
        study.tell(study.ask(), 0.7)
        keep_journal(journal)
    assert [trial.value for trial in open_study(journal, "sweep", F1).trials] == [0.5, 0.7, 0.7]
    asides = [
        path
        for path in storage.children(journal.parent)
        if path.name.startswith(f"{JOURNAL}-torn-")
    ]
    assert [path.read_bytes() for path in asides] == [HALF]
    assert not list(tmp_path.rglob(f"{JOURNAL}-until-*"))


def test_a_sweep_whose_directory_was_renamed_keeps_its_study(sweep: Path) -> None:
    renamed = sweep.rename(sweep.parent / "renamed")
    with read_study(renamed / JOURNAL, "renamed", F1) as study:
        assert [trial.state for trial in study.trials] == [TrialState.COMPLETE, TrialState.RUNNING]
    assert len(open_study(renamed / JOURNAL, "renamed", F1).trials) == 2
