"""A sweep ends with its report, whatever its trials came to."""

from pathlib import Path

import pytest

from latentwire.api import tune as api
from latentwire.config import SweepConfig
from latentwire.tuning import results
from latentwire.tuning.searcher import StudySearch
from latentwire.tuning.space_file import write_space
from latentwire.tuning.study import JOURNAL


def test_a_sweep_whose_trials_all_failed_has_its_report_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, space = tmp_path / "sweep", SweepConfig()
    output.mkdir()
    write_space(space, output)
    search = StudySearch(
        space, journal=output / JOURNAL, name=output.name, trial_dir=output / "trials"
    )
    search.suggest("a")
    search.on_trial_complete("a", error=True)
    rows = results.trial_rows(search.study, space.tune)
    assert (
        api._without_winner(rows, space, output, "python …", results.SweepError("none is left"))
        == 1
    )
    told = capsys.readouterr()
    assert "the trial's driver died" in told.out and told.err == "error: none is left\n"
    text = (output / "report.md").read_text()
    assert "No winner: none is left." in text and "the trial's driver died" in text
    assert "the trial's driver died" in (output / "report.html").read_text().replace("&#39;", "'")
