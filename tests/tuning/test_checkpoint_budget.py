"""Over all trials the best checkpoints stay, and of each running trial the last."""

import json
from pathlib import Path
from typing import Any

import pytest

from latentwire.config import SweepConfig
from latentwire.distributed.trial import trial_path
from latentwire.storage import StorageError
from latentwire.training import step_checkpoints
from latentwire.tuning import study as studies
from latentwire.tuning.checkpoint_budget import CheckpointBudget, bytes_in, clear_debris
from latentwire.tuning.searcher import StudySearch
from latentwire.tuning.study import JOURNAL
from latentwire.tuning.sweep import tidy_at_last


def saved(folder: Path, number: int, step: int, score: float | None, size: float = 64) -> Path:
    """A checkpoint with a file, as far as the budget looks at it."""
    path = trial_path(folder, number) / f"step-{step:08d}"
    path.mkdir(parents=True)
    (path / "interlingua.safetensors").write_bytes(b"x" * 1000)
    metrics = {} if score is None else {"dev_f1": score, "wire_bytes": size}
    (path / "manifest.json").write_text(
        json.dumps({"files": {"interlingua.safetensors": ""}, "metrics": metrics})
    )
    return path


def reported(
    search: StudySearch, number: int, step: int, score: float | None, size: float = 64
) -> Path:
    """A checkpoint whose evaluation, if it has one, the study has heard of."""
    path = saved(search.trial_dir, number, step, score, size)
    if score is not None:
        report = {"step": step, "total_steps": 9, "dev_f1": score, "wire_bytes": size}
        search.on_trial_result(str(number), report)
    return path


def left(folder: Path) -> dict[int, list[int]]:
    """Trial → steps of its checkpoints."""
    found = {
        int(path.name.removeprefix("trial-")): step_checkpoints.finished(path)
        for path in sorted(folder.glob("trial-*"))
    }
    return {
        number: [int(path.name.removeprefix("step-")) for path in paths]
        for number, paths in found.items()
        if paths
    }


def sweep(folder: Path, trials: int, **tune: object) -> tuple[StudySearch, CheckpointBudget]:
    space = SweepConfig.model_validate({"tune": tune})
    search = StudySearch(
        space, journal=folder / JOURNAL, name=folder.name, trial_dir=folder / "trials"
    )
    for number in range(trials):
        search.suggest(str(number))
    return search, CheckpointBudget(search)


def end(search: StudySearch, number: int) -> None:
    report = {"step": 9, "total_steps": 9, "dev_f1": 0.1, "wire_bytes": 64}
    search.on_trial_complete(str(number), report)


def test_the_best_over_all_trials_stay_and_each_running_trials_last(tmp_path: Path) -> None:
    search, budget = sweep(tmp_path, 4, keep_checkpoints=2)
    trials = tmp_path / "trials"
    for number, scores in enumerate(((0.1, 0.9), (0.8, 0.2), (0.3, 0.4), (0.7, None))):
        for step, score in enumerate(scores, start=1):
            reported(search, number, step, score)
    (trial_path(trials, 2) / "notes.txt").write_text("mine")
    budget.tidy()  # all of them run: what is neither among the best nor a trial's last goes
    assert left(trials) == {0: [2], 1: [1, 2], 2: [2], 3: [2]}
    for number in range(3):
        end(search, number)
    budget.tidy()
    assert left(trials) == {0: [2], 1: [1], 3: [2]}
    assert budget.ended == {2} and (trial_path(trials, 2) / "notes.txt").exists()
    reported(search, 3, 3, 0.95)
    budget.tidy()
    assert left(trials) == {0: [2], 3: [2, 3]}  # the study may yet hear of 2
    assert 3000 < bytes_in([trials]) < 4000
    again = CheckpointBudget(search)  # a new driver comes to the same
    again.tidy()
    assert left(trials) == {0: [2], 3: [2, 3]}


def test_those_within_the_limits_come_first(tmp_path: Path) -> None:
    search, budget = sweep(
        tmp_path, 2, keep_checkpoints=1, constraints={"wire_bytes": {"max": 100}}
    )
    reported(search, 0, 1, 0.9, size=200)
    reported(search, 1, 1, 0.2, size=64)
    for number in range(2):
        end(search, number)
    budget.tidy()
    assert left(tmp_path / "trials") == {1: [1]}


def test_what_a_stopped_trials_worker_saved_too_late_counts_for_nothing(tmp_path: Path) -> None:
    """Else it would take the place of checkpoints that can win, and could not win itself: a sweep ended without any."""
    search, budget = sweep(tmp_path, 3, keep_checkpoints=2)
    trials = tmp_path / "trials"
    reported(search, 0, 3, 0.2)
    end(search, 0)
    for number in (1, 2):
        search.on_trial_result(
            str(number), {"step": 3, "total_steps": 9, "dev_f1": 0.1, "wire_bytes": 64}
        )
        search.on_trial_complete(
            str(number), {"step": 3, "total_steps": 9, "dev_f1": 0.1, "wire_bytes": 64}
        )
        saved(trials, number, 6, 0.9)
    budget.tidy()
    assert left(trials) == {0: [3]}


def test_what_a_worker_saved_after_the_last_trials_end_goes_too(tmp_path: Path) -> None:
    search, budget = sweep(tmp_path, 2, keep_checkpoints=1)
    reported(search, 0, 3, 0.5), reported(search, 1, 3, 0.4)
    end(search, 0), end(search, 1)
    budget.tidy()
    saved(search.trial_dir, 1, 6, 0.9)
    tidy_at_last(search.space, tmp_path)
    assert left(search.trial_dir) == {0: [3]}


def test_a_trials_failure_is_tidied_up_after_too(tmp_path: Path) -> None:
    search, budget = sweep(tmp_path, 2, keep_checkpoints=1)
    for number, step in ((0, 3), (0, 6), (1, 3)):
        reported(search, number, step, 0.1 + number)
    search.on_trial_complete("0", error=True)
    budget.on_trial_error(1, [], None)
    assert left(search.trial_dir) == {0: [6], 1: [3]}


def test_debris_of_dead_workers_is_cleared(tmp_path: Path) -> None:
    (trial_path(tmp_path, 0) / ".step-00000004.part-0123abcd").mkdir(parents=True)
    path = saved(tmp_path, 1, 2, 0.5)
    path.rename(path.with_name(".step-00000002.removed-0123abcd"))
    assert clear_debris(tmp_path) == 2
    assert not [*trial_path(tmp_path, 0).iterdir(), *trial_path(tmp_path, 1).iterdir()]


def test_a_store_that_does_not_answer_ends_no_sweep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, budget = sweep(tmp_path, 1)

    def gone(path: Path) -> None:
        raise StorageError("the bucket does not answer")

    monkeypatch.setattr(step_checkpoints, "finished", gone)
    none: Any = None
    budget.on_trial_result(1, [], none, {})
    assert (
        capsys.readouterr().err == "checkpoints not tidied this time: the bucket does not answer\n"
    )
    with pytest.raises(StorageError):
        budget.tidy()


def test_a_failed_trial_keeps_its_last_for_the_one_that_takes_it_up(tmp_path: Path) -> None:
    search, budget = sweep(tmp_path, 2, keep_checkpoints=1)
    trials = search.trial_dir
    for number, step, score in ((0, 3, 0.2), (0, 6, 0.1), (1, 3, 0.9)):
        reported(search, number, step, score)
    search.on_trial_complete("0", error=True)
    end(search, 1)
    budget.tidy()
    assert left(trials) == {0: [6], 1: [3]}
    studies.retry_failed(search.study)
    again = StudySearch(search.space, journal=search.journal, name=search.name, trial_dir=trials)
    budget = CheckpointBudget(again)
    budget.tidy()
    assert left(trials) == {0: [6], 1: [3]}  # it waits
    again.suggest("2")
    saved(trials, 0, 9, 0.8)
    again.on_trial_complete("2", {"step": 9, "total_steps": 9, "dev_f1": 0.8, "wire_bytes": 64})
    budget.tidy()
    assert left(trials) == {1: [3]} and budget.ended == {2}
