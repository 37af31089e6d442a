"""What stops trials early counts the steps of the longest one, and a restart shows it what was there before."""

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from latentwire.config import SweepConfig, TuneConfig
from latentwire.config.resolve import ConfigError
from latentwire.data import shards
from latentwire.distributed import sweep_files
from latentwire.distributed.sweep_files import Files, common_protocol_hash, prepare
from latentwire.planning.variants import longest_run, total_steps
from latentwire.storage import Place
from latentwire.tuning.searcher import StudySearch
from latentwire.tuning.study import JOURNAL
from latentwire.tuning.sweep import Earlier, NothingRuns, make_scheduler, replay


def test_trials_are_compared_on_development_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The validation rows are for the chosen wire alone."""
    paths: dict[shards.ShardSplit, Place] = {split: tmp_path / split for split in shards.SPLITS}
    monkeypatch.setattr(sweep_files.streams, "ray_dataset", lambda path, *_, **__: path.name)
    monkeypatch.setattr(sweep_files.shards, "read_table", lambda path: path.name)
    monkeypatch.setattr(
        sweep_files.ray.data, "from_arrow", lambda rows: SimpleNamespace(materialize=lambda: rows)
    )
    assert sweep_files.load_datasets(Files(paths, {}, ()), True) == {"train": "train", "dev": "dev"}


def ended(folder: Path, scores: Sequence[Sequence[float]]) -> list[Any]:
    """Trials that reported these scores every third step."""
    search = StudySearch(SweepConfig(), journal=folder / JOURNAL, name="sweep", trial_dir=folder)
    for number, trial_scores in enumerate(scores):
        search.suggest(str(number))
        for step, score in enumerate(trial_scores, start=1):
            report = {"step": 3 * step, "total_steps": 9, "dev_f1": score, "wire_bytes": 64}
            search.on_trial_result(str(number), report)
        search.on_trial_complete(str(number), report)
    return search.study.trials


@pytest.mark.parametrize("scheduler", ["asha", "median", "none"])
def test_a_restart_shows_the_scheduler_what_was_reported(tmp_path: Path, scheduler: Any) -> None:
    trials = ended(
        tmp_path,
        [(0.5, 0.8, 0.9), (0.4, 0.7, 0.8), (0.4, 0.6, 0.8), (0.1, 0.1, 0.9), (0.6, 0.7, 0.9)],
    )
    config = TuneConfig(scheduler=scheduler, grace_steps=3)
    fresh = make_scheduler(config, 9)
    replay(fresh, trials)
    late: Any = Earlier(99)
    controller: Any = NothingRuns()
    fresh.on_trial_add(controller, late)
    verdict = fresh.on_trial_result(controller, late, {"step": 3, "dev_f1": 0.0})
    assert verdict == ("CONTINUE" if scheduler == "none" else "STOP")


@pytest.mark.parametrize("scheduler", ["asha", "median", "none"])
def test_a_scheduler_does_without_a_trial_that_failed_before_it_was_evaluated(
    scheduler: Any,
) -> None:
    fresh = make_scheduler(TuneConfig(scheduler=scheduler, grace_steps=3), 9)
    controller: Any = NothingRuns()
    trials: list[Any] = [Earlier(number) for number in (0, 1)]
    for trial in trials:
        fresh.on_trial_add(controller, trial)
    nothing = {"trial_id": "a", "done": True}
    fresh.on_trial_result(controller, trials[0], nothing)
    fresh.on_trial_complete(controller, trials[0], nothing)
    assert fresh.on_trial_result(controller, trials[1], {"step": 3, "dev_f1": 0.5}) == "CONTINUE"


def test_the_longest_trial_has_the_smallest_batches_and_the_most_epochs() -> None:
    search = {
        "training.batch_size": {"type": "categorical", "choices": [32, 16, 64]},
        "training.epochs": {"type": "int", "low": 1, "high": 3},
        "training.max_steps": {"type": "categorical", "choices": [100, 40]},
    }
    space = SweepConfig.model_validate({"run": {"training": {"max_steps": 50}}, "search": search})
    assert total_steps(longest_run(space), 320) == 60
    assert longest_run(SweepConfig()) == SweepConfig().run


def test_trials_on_different_development_rows_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    search = {"data.dev_samples": {"type": "categorical", "choices": [8, 16]}}
    space = SweepConfig.model_validate({"search": search})
    dev = [Path("dev-8"), Path("dev-16")]
    monkeypatch.setattr(sweep_files, "protocol_hash", lambda path, run: "same")
    assert common_protocol_hash(space, dev) == "same"
    monkeypatch.setattr(sweep_files, "protocol_hash", lambda path, run: path.name)
    made: list[str] = []
    monkeypatch.setattr(
        sweep_files.pipeline, "ensure_shards", lambda run, split, path: made.append(split)
    )
    with pytest.raises(
        ConfigError,
        match=r"the same development rows, got 2 different sets; .* among data\.dev_samples",
    ):
        prepare(space, 0)
    assert made == ["dev", "dev"]  # and no training rows before it is said
