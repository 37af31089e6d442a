"""A sweep goes on as what it was."""

from pathlib import Path

import pytest

from latentwire.cli.flags import refuse_flags
from latentwire.config import SweepConfig
from latentwire.config.resolve import ConfigError
from latentwire.distributed.task import ERROR_FILE
from latentwire.distributed.trial import trial_path
from latentwire.tuning import resume
from latentwire.tuning.reruns import RERUNS
from latentwire.tuning.searcher import StudySearch
from latentwire.tuning.space_file import write_space
from latentwire.tuning.study import JOURNAL
from tests.conftest import flags_of


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """A sweep of one trial that has failed, without results yet."""
    output, space = tmp_path / "sweep", SweepConfig.model_validate({"tune": {"trials": 1}})
    output.mkdir()
    write_space(space, output)
    search = StudySearch(
        space, journal=output / JOURNAL, name=output.name, trial_dir=output / "trials"
    )
    search.suggest("a")
    search.on_trial_complete("a", error=True)
    return output


def test_it_is_finished_with_its_trials_and_its_results(sweep: Path) -> None:
    assert not resume.is_finished(resume.read_space(sweep, []), sweep)
    (sweep / "results.json").write_text("{}")
    assert resume.is_finished(resume.read_space(sweep, []), sweep)
    more = resume.read_space(sweep, ["tune.trials=2"])
    before = (sweep / JOURNAL).read_bytes()
    assert more.tune.trials == 2 and not resume.is_finished(more, sweep)
    assert (sweep / JOURNAL).read_bytes() == before  # another driver may append to it


def test_failed_trials_are_retried_once_in_the_search_and_in_the_re_runs(sweep: Path) -> None:
    space = resume.read_space(sweep, [])
    two = SweepConfig.model_validate({"tune": {"trials": 2}})
    folder = sweep / RERUNS
    search = StudySearch(two, journal=folder / JOURNAL, name=RERUNS, trial_dir=folder / "trials")
    for name in "ab":
        search.suggest(name)
    search.on_trial_complete("b", error=True)
    (sweep / "results.json").write_text("{}")
    left = trial_path(sweep / "trials", 0)
    left.mkdir(parents=True)
    (left / ERROR_FILE).write_text("out of memory")
    assert resume.is_finished(space, sweep) and resume.has_failed(space, sweep)
    assert resume.retry_failed(space, sweep) == [
        "sweep: trial 0 is retried as trial 1; it failed by: the trial's driver died; see Tune's log",
        "finals: trial 1 is retried as trial 2; it failed by: the trial's driver died; see Tune's log",
    ]
    assert not (left / ERROR_FILE).exists()  # it is the new trial's directory, which has not failed
    assert not resume.is_finished(space, sweep) and not resume.has_failed(space, sweep)
    assert resume.retry_failed(space, sweep) == []


def test_small_numbers_stay_numbers(tmp_path: Path) -> None:
    tree = {
        "search": {
            "training.encoder_lr": {"type": "float", "low": 1e-6, "high": 1e-3, "log": True}
        },
        "tune": {"start_with": [{"training.encoder_lr": 3e-6}]},
    }
    space = SweepConfig.model_validate(tree)
    write_space(space, tmp_path)
    assert resume.read_space(tmp_path, []) == space


@pytest.mark.parametrize(
    "assignment", ["training.encoder_lr=1e-3", "run.training.encoder_lr=1e-3", "tune.mode=min"]
)
def test_what_makes_trials_incomparable_is_refused(sweep: Path, assignment: str) -> None:
    with pytest.raises(
        ConfigError,
        match=r"a resumed sweep keeps its space; only tune\.trials.* can change, got (run|tune)",
    ):
        resume.read_space(sweep, [assignment])


def test_no_flag_is_passed_over(sweep: Path) -> None:
    refuse_flags(flags_of("--set", "tune.trials=2")[0], "a resumed sweep")
    with pytest.raises(
        ConfigError,
        match=r"a resumed sweep keeps its configuration, got --config, --max_steps; leave",
    ):
        refuse_flags(flags_of("--max_steps=9", "--space=other.yaml")[0], "a resumed sweep")


def test_a_directory_without_a_sweep_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError,
        match=r"a sweep's directory must hold space\.json, got .*; name one that `latentwire tune`",
    ):
        resume.read_space(tmp_path, [])


def test_an_earlier_winner_is_set_aside_and_not_lost(sweep: Path) -> None:
    resume.set_aside(sweep / "best")  # there is none yet
    (sweep / "best").mkdir()
    (sweep / "best" / "manifest.json").write_text("first")
    resume.set_aside(sweep / "best")
    (kept,) = sweep.glob("best-until-*")
    assert (kept / "manifest.json").read_text() == "first" and not (sweep / "best").exists()
