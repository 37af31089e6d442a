"""The best trials run again with fresh seeds, and the best mean wins."""

import math
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState
from ray.tune.integration.ray_train import CHECKPOINT_PATH_KEY

from latentwire.config import SweepConfig
from latentwire.config.resolve import ConfigError
from latentwire.planning.variants import check_metrics
from latentwire.reports.tables import reruns_table, verdict
from latentwire.tuning import reruns, results
from latentwire.tuning.searcher import StudySearch
from latentwire.tuning.study import JOURNAL

SPACE = {
    "search": {"encoder.latent_len": {"type": "int", "low": 4, "high": 16}},
    "tune": {"trials": 4, "finalists": 2, "final_seeds": 2, "start_with": [{"encoder.latent_len": n} for n in (4, 6, 8, 10)]},
}  # fmt: skip
SCORES = {4: 0.3, 6: 0.9, 8: 0.8, 10: 0.95}  # the best one is stopped early
FRESH = {(6, 1): 0.5, (6, 2): 0.7, (8, 1): 0.75, (8, 2): 0.81}


def search_all(space: SweepConfig, output: Path, steps: int = 6) -> Any:
    """What a sweep does, with scores from the tables above instead of training."""
    search = StudySearch(
        space, journal=output / JOURNAL, name=output.name, trial_dir=output / "trials"
    )
    for number in range(space.tune.trials):
        values = search.suggest(str(number))
        length, seed = values["encoder.latent_len"], values.get(reruns.SEED)
        path = output / f"checkpoint-{number}"
        path.mkdir(parents=True)
        (path / "manifest.json").write_text("{}")
        report = {
            "step": 3 if length == 10 else 6, "total_steps": steps, "wire_bytes": 64, CHECKPOINT_PATH_KEY: str(path),
            "dev_f1": SCORES[length] if seed is None else FRESH[length, seed],
        }  # fmt: skip
        search.on_trial_complete(str(number), report)
    return search.study


def test_the_best_mean_over_fresh_seeds_wins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    space = SweepConfig.model_validate(SPACE)
    study = search_all(space, tmp_path / "sweep")
    assert results.find_best(study, space.tune).score == 0.95
    monkeypatch.setattr(
        reruns, "run_sweep", lambda space, plan, files, output, **_: search_all(space, output)
    )
    plan: Any = None
    best, finalists = reruns.rerun_best(space, plan, {}, tmp_path / "sweep", study)
    assert [(f.trial, f.score, f.fresh) for f in finalists] == [
        (1, 0.9, (0.5, 0.7)),
        (2, 0.8, (0.75, 0.81)),
    ]
    assert (best.trial, best.step, best.score) == (2, 6, pytest.approx(0.78))
    assert best.values == {"encoder.latent_len": 8, reruns.SEED: 2}
    assert best.checkpoint == tmp_path / "sweep" / "finals" / "checkpoint-3"
    assert reruns_table(finalists, "dev_f1")[2][0] == ["1", "0.9", "0.5, 0.7", "0.6", "0.3"]
    gap = results.selection_gap(best, {"latent": {"mean": {"f1": 0.7}}}, "dev_f1")
    assert (
        verdict(best, gap, "dev_f1")
        == "best: trial 2, step 6, development dev_f1 0.7800, validation 0.7000, gap +0.0800"
    )


def test_where_all_fresh_runs_were_lost_the_best_evaluation_that_is_left_wins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    space = SweepConfig.model_validate(SPACE)
    study = search_all(space, tmp_path / "sweep")

    def stopped(space: SweepConfig, plan: Any, files: Any, output: Path, **_: Any) -> Any:
        """Fresh runs that end early, as by a time budget."""
        return search_all(space, output, steps=9)

    monkeypatch.setattr(reruns, "run_sweep", stopped)
    plan: Any = None
    best, finalists = reruns.rerun_best(space, plan, {}, tmp_path / "sweep", study)
    assert [f.fresh for f in finalists] == [(), ()] and math.isnan(finalists[0].mean)
    assert (best.score, best.values[reruns.SEED]) == (0.81, 2)
    assert reruns_table(finalists, "dev_f1")[2][0][2:4] == ["–", "nan"]


def test_finalists_that_more_trials_bring_are_trained_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    space = SweepConfig.model_validate(SPACE)
    study = search_all(space, tmp_path / "sweep")
    trained: list[tuple[int, int]] = []

    def run(space: SweepConfig, plan: Any, files: Any, output: Path, **_: Any) -> Any:
        search = StudySearch(
            space, journal=output / JOURNAL, name=output.name, trial_dir=output / "trials"
        )
        ended = sum(trial.state.is_finished() for trial in search.study.trials)
        (output / "manifest.json").write_text("{}")  # stands for that of every checkpoint
        for number in range(ended, space.tune.trials):
            values = search.suggest(str(number))
            trained.append((values["encoder.latent_len"], values[reruns.SEED]))
            score = {
                "dev_f1": values["encoder.latent_len"] / 100,
                "wire_bytes": 64,
                CHECKPOINT_PATH_KEY: str(output),
            }
            search.on_trial_complete(str(number), {"step": 6, "total_steps": 6} | score)
        return search.study

    monkeypatch.setattr(reruns, "run_sweep", run)
    plan: Any = None
    reruns.rerun_best(space, plan, {}, tmp_path / "sweep", study)
    study.add_trial(optuna.trial.create_trial(state=TrialState.COMPLETE, values=[0.97], params={"encoder.latent_len": 12},
                                        distributions=study.trials[0].distributions,
                                        user_attrs={"evaluations": {"6": {"step": 6, "dev_f1": 0.97}}}))  # fmt: skip
    best, finalists = reruns.rerun_best(space, plan, {}, tmp_path / "sweep", study)
    assert trained == [(6, 1), (6, 2), (8, 1), (8, 2), (12, 1), (12, 2)]
    assert best.values["encoder.latent_len"] == 12 and [len(f.fresh) for f in finalists] == [2, 2]


def test_where_no_fresh_run_came_to_a_checkpoint_the_search_has_its_winner(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    space = SweepConfig.model_validate(SPACE)
    study = search_all(space, tmp_path / "sweep")

    def failing(space: SweepConfig, plan: Any, files: Any, output: Path, **_: Any) -> Any:
        search = StudySearch(
            space, journal=output / JOURNAL, name=output.name, trial_dir=output / "trials"
        )
        for number in range(space.tune.trials):
            search.suggest(str(number))
            search.on_trial_complete(str(number), error=True)
        return search.study

    monkeypatch.setattr(reruns, "run_sweep", failing)
    plan: Any = None
    best, finalists = reruns.rerun_best(space, plan, {}, tmp_path / "sweep", study)
    assert (best.trial, best.score) == (3, 0.95) and [f.fresh for f in finalists] == [(), ()]
    assert "got none of 4 (the trial's driver died" in capsys.readouterr().out


def test_without_finalists_the_best_trial_wins_as_it_is(tmp_path: Path) -> None:
    space = SweepConfig.model_validate(SPACE | {"tune": SPACE["tune"] | {"finalists": 0}})
    plan: Any = None
    best, finalists = reruns.rerun_best(
        space, plan, {}, tmp_path, search_all(space, tmp_path / "sweep")
    )
    assert (best.trial, best.score, finalists) == (3, 0.95, [])


def test_a_seed_cannot_be_searched_and_varied(tmp_path: Path) -> None:
    seeds = {"training.seed": {"type": "int", "low": 0, "high": 9}}
    with pytest.raises(ConfigError, match=r"training\.seed cannot be searched"):
        check_metrics(
            SweepConfig.model_validate(SPACE | {"search": seeds, "tune": {"finalists": 1}})
        )


def test_trials_with_the_same_values_are_one_finalist(tmp_path: Path) -> None:
    points = [{"encoder.latent_len": n} for n in (6, 8, 10, 4)]
    space = SweepConfig.model_validate(SPACE | {"tune": SPACE["tune"] | {"start_with": points}})
    study = search_all(space, tmp_path / "sweep")
    twice = study.trials[0]
    study.add_trial(twice)
    assert [t.params["encoder.latent_len"] for t in reruns.best_trials(study, space)] == [6, 8]
