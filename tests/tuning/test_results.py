"""The winner keeps to the limits, and what fails on a worker reads as it would have read here."""

from pathlib import Path

import optuna
import pytest
import ray
from ray.tune.integration.ray_train import CHECKPOINT_PATH_KEY

from latentwire.config import RunConfig, SweepConfig, TuneConfig
from latentwire.config.resolve import ConfigError
from latentwire.distributed import remote
from latentwire.evaluation import scoring
from latentwire.reports.tables import front_table
from latentwire.tuning import results
from latentwire.tuning.searcher import StudySearch
from latentwire.tuning.study import JOURNAL


@pytest.mark.slow
def test_an_error_on_a_worker_is_the_users_error() -> None:
    ray.init(num_cpus=1, log_to_driver=False, include_dashboard=False)
    texts = RunConfig.model_validate(
        {"data": {"dataset": "text"}, "losses": {"bundle": "pretrain"}}
    )
    try:
        with pytest.raises(ConfigError, match=r"^scores need questions, dataset text has none"):
            remote.on_cluster(RunConfig(), 0.0, scoring.check_questions, texts)
    finally:
        ray.shutdown()


def study_with(
    folder: Path, trials: list[tuple[list[float], float]], config: TuneConfig
) -> optuna.Study:
    """A study with trials of six steps: their scores every third step, and the size of their messages."""
    search = StudySearch(
        SweepConfig(tune=config),
        journal=folder / JOURNAL,
        name="sweep",
        trial_dir=folder / "trials",
    )
    folder.mkdir(exist_ok=True)
    (folder / "manifest.json").write_text("{}")  # stands for that of every checkpoint
    for number, (scores, size) in enumerate(trials):
        search.suggest(str(number))
        for place, score in enumerate(scores, start=1):
            report = {
                "step": 3 * place, "total_steps": 6, "dev_f1": score, "wire_bytes": size, "first_train_loss": 2.0,
                "train_loss": 1.0, "examples_per_s": 9.0, "train_seconds": 1.0, CHECKPOINT_PATH_KEY: str(folder),
            }  # fmt: skip
            search.on_trial_result(str(number), report)
        search.on_trial_complete(str(number), report)
    return search.study


def test_the_winner_keeps_to_the_limits(tmp_path: Path) -> None:
    trials: list[tuple[list[float], float]] = [([0.5, 0.9], 512), ([0.6, 0.4], 64), ([0.1], 64)]
    config = TuneConfig.model_validate(
        {"objectives": {"wire_bytes": "min"}, "constraints": {"wire_bytes": {"max": 100}}}
    )
    study = study_with(tmp_path / "a", trials, config)
    best = results.find_best(study, config)
    assert (best.trial, best.step, best.score) == (1, 3, 0.6)
    rows = results.trial_rows(study, config)
    assert [(row["trial"], row["state"], row["dev_f1"], row["wire_bytes"], row["front"]) for row in rows] == [
        (0, "beyond", 0.9, 512, False), (1, "done", 0.6, 64, True), (2, "stopped", 0.1, 64, False),
    ]  # fmt: skip
    assert front_table(rows, config)[2] == [["1", "64", "0.6"]]
    free = study_with(tmp_path / "b", trials, TuneConfig())
    assert results.find_best(free, TuneConfig()).trial == 0
    assert (
        results.selection_gap(best, {"latent": {}}, "wire_bytes")
        == results.selection_gap(best, {}, "dev_f1")
        == {}
    )
    (tmp_path / "b" / "manifest.json").unlink()  # a checkpoint that is gone cannot win
    with pytest.raises(
        results.SweepError, match="needs at least one trial with a checkpoint, got none of 3"
    ):
        results.find_best(free, TuneConfig())
    tight = TuneConfig.model_validate({"constraints": {"wire_bytes": {"max": 10}}})
    with pytest.raises(
        results.SweepError, match=r"wire_bytes ≤ 10\), all 5 evaluations kept of 3 trials go beyond"
    ):
        results.find_best(study_with(tmp_path / "c", trials, tight), tight)


def test_a_sweep_without_a_checkpoint_says_why(tmp_path: Path) -> None:
    search = StudySearch(
        SweepConfig(), journal=tmp_path / JOURNAL, name="sweep", trial_dir=tmp_path
    )
    search.suggest("a")
    search.on_trial_complete("a", error=True)
    with pytest.raises(results.SweepError, match=r"got none of 1 \(the trial's driver died"):
        results.find_best(search.study, TuneConfig())
    (row,) = results.trial_rows(search.study, TuneConfig())
    assert (row["state"], row["error"]) == ("failed", "the trial's driver died; see Tune's log")


def test_starting_points_that_nobody_began_have_no_row(tmp_path: Path) -> None:
    points = ({"encoder.latent_len": 4}, {"encoder.latent_len": 8})
    space = SweepConfig.model_validate(
        {
            "search": {"encoder.latent_len": {"type": "int", "low": 4, "high": 8}},
            "tune": {"start_with": points},
        }
    )
    search = StudySearch(space, journal=tmp_path / JOURNAL, name="sweep", trial_dir=tmp_path)
    search.suggest("a")
    assert [trial.state.name for trial in search.study.trials] == ["RUNNING", "WAITING"]
    (row,) = results.trial_rows(search.study, space.tune)
    assert (row["state"], row["values"]) == ("unfinished", points[0])
