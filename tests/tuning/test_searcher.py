"""The study is told what happened: stopped, failed, complete; and a restart finds everything as it was."""

import pickle
from pathlib import Path

import optuna
import pytest
from optuna.distributions import FloatDistribution
from optuna.trial import TrialState
from ray.tune.search.optuna import OptunaSearch

from latentwire.tuning.searcher import CAUSE, TRIAL_ID, StudySearch

SPACE = {"training.encoder_lr": FloatDistribution(1e-4, 1e-2, log=True)}


@pytest.fixture
def search(tmp_path: Path) -> StudySearch:
    return StudySearch(
        SPACE, metric="dev_f1", mode="max", journal=tmp_path / "study.journal", name="sweep",
        sampler=optuna.samplers.TPESampler(seed=0),
    )  # fmt: skip


def report(step: int, value: float | None) -> dict:
    return {"step": step, "total_steps": 3, "training_iteration": step} | ({} if value is None else {"dev_f1": value})


def run(search: object, values: list[float | None], trial_id: str = "a", error: bool = False) -> None:
    search.suggest(trial_id)  # type: ignore[attr-defined]
    for step, value in enumerate(values[:-1], start=1):
        search.on_trial_result(trial_id, report(step, value))  # type: ignore[attr-defined]
    last = report(len(values), values[-1]) if values else None
    search.on_trial_complete(trial_id, last, error)  # type: ignore[attr-defined]


def stock() -> OptunaSearch:
    return OptunaSearch(
        SPACE, metric="dev_f1", mode="max", study_name="stock", sampler=optuna.samplers.TPESampler(seed=0)
    )


def only(study: optuna.Study) -> optuna.trial.FrozenTrial:
    (trial,) = study.trials
    return trial


def test_a_complete_trial_counts_with_its_best_evaluation(search: StudySearch) -> None:
    run(search, [0.1, 0.6, 0.5])
    trial = only(search.study)
    assert (trial.state, trial.value) == (TrialState.COMPLETE, 0.6)
    assert trial.intermediate_values == {1: 0.1, 2: 0.6, 3: 0.5}
    assert trial.user_attrs[TRIAL_ID] == "a"


def test_a_stopped_trial_is_pruned(search: StudySearch) -> None:
    run(search, [0.1, 0.2])
    assert only(search.study).state == TrialState.PRUNED
    assert only(search.study).intermediate_values == {1: 0.1, 2: 0.2}
    run(ray := stock(), [0.1, 0.2])
    assert only(ray._ot_study).state == TrialState.COMPLETE  # what makes the subclass necessary


@pytest.mark.parametrize("last", [float("nan"), None])
def test_a_trial_without_a_usable_metric_fails_with_its_cause(search: StudySearch, last: float | None) -> None:
    run(search, [0.1, last])
    assert only(search.study).state == TrialState.FAIL
    assert "a finite dev_f1 is needed, got dev_f1 = " in only(search.study).user_attrs[CAUSE]


def test_the_stock_class_leaves_nan_running_for_ever() -> None:
    run(ray := stock(), [0.1, float("nan")])
    assert only(ray._ot_study).state == TrialState.RUNNING


def test_a_report_without_the_metric_is_no_error(search: StudySearch) -> None:
    run(search, [None, 0.4, 0.5])
    assert only(search.study).intermediate_values == {2: 0.4, 3: 0.5}
    with pytest.raises(KeyError):
        run(stock(), [None, 0.4, 0.5])


def test_a_trial_that_raised_fails(search: StudySearch) -> None:
    run(search, [0.1, 0.2], error=True)
    assert only(search.study).state == TrialState.FAIL
    assert "raised an error" in only(search.study).user_attrs[CAUSE]


def test_nothing_is_told_twice(search: StudySearch) -> None:
    run(search, [0.1, 0.2, 0.3])
    search.on_trial_result("a", report(4, 0.9))
    search.on_trial_complete("a", report(4, 0.9))
    assert only(search.study).value == 0.3 and len(only(search.study).intermediate_values) == 3


def test_a_restart_finds_its_trials_and_leaves_no_orphan(search: StudySearch, tmp_path: Path) -> None:
    run(search, [0.1, 0.2, 0.3])
    values = search.suggest("b")
    search.suggest("c")
    search.on_trial_result("b", report(1, 0.4))
    search.save(str(tmp_path / "state"))
    again = pickle.loads(pickle.dumps(search))  # as Tune does between its own processes
    again.restore(str(tmp_path / "state"))
    assert again.suggest("b") == values and len(again.study.trials) == 3
    again.on_trial_result("b", report(1, 0.4))
    again.on_trial_complete("b", report(3, 0.5))
    again.close(known={"a", "b"})
    assert [trial.state for trial in again.study.trials] == [TrialState.COMPLETE, TrialState.COMPLETE, TrialState.FAIL]
    assert again.study.trials[1].intermediate_values == {1: 0.4, 3: 0.5}


def test_the_sampler_learns_from_what_was_told(search: StudySearch) -> None:
    for number in range(30):
        trial_id = str(number)
        rate = search.suggest(trial_id)["training.encoder_lr"]
        search.on_trial_complete(trial_id, report(3, -abs(rate - 1e-3)))
    late = [search.study.trials[i].params["training.encoder_lr"] for i in range(20, 30)]
    assert sum(abs(rate - 1e-3) for rate in late) / 10 < 2e-3
