"""What is asked for is shown and tracked; what is not installed is said before anything starts."""

import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlflow
import pytest

from latentwire.config import SpaceFile, TuneConfig
from latentwire.config.resolve import ConfigError
from latentwire.tuning import progress


def test_a_missing_tracker_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    progress.check_trackers(TuneConfig())
    with pytest.raises(ConfigError, match=r"tune\.trackers wandb needs the package wandb.*latentwire\[tracking\]"):
        progress.check_trackers(TuneConfig(trackers=("wandb",)))


def test_mlflow_gets_every_evaluation_without_a_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    config = TuneConfig(trackers=("mlflow",))
    progress.check_trackers(config)
    (callback,) = progress.trackers(config, tmp_path)
    callback.setup()
    trial: Any = SimpleNamespace(config={"encoder.latent_len": 6}, trial_id="a", logdir=str(tmp_path))
    trial = type("Trial", (SimpleNamespace,), {"__str__": lambda self: "trial-0", "__hash__": object.__hash__})(
        **vars(trial)
    )
    callback.log_trial_start(trial)
    for step, score in ((3, 0.25), (6, 0.5)):
        callback.log_trial_result(step, trial, {"dev_f1": score, "training_iteration": step, "config": trial.config})
    callback.log_trial_end(trial)
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    experiment = client.get_experiment_by_name(tmp_path.name)
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.data.params["encoder.latent_len"] == "6" and run.info.status == "FINISHED"
    assert [m.value for m in client.get_metric_history(run.info.run_id, "dev_f1")] == [0.25, 0.5]


def test_the_table_shows_what_is_searched_by(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AIR_NEW_OUTPUT", "1")
    space = SpaceFile.model_validate({
        "search": {"encoder.latent_len": {"type": "int", "low": 4, "high": 16}},
        "tune": {"metric": "dev_em", "constraints": {"wire_bytes": {"max": 9}}},
    })  # fmt: skip
    reporter = progress.table(space)
    assert list(reporter._metric_columns) == ["step", "dev_em", "wire_bytes", "train_loss", "examples_per_s"]
    assert reporter._parameter_columns == {"encoder.latent_len": "latent_len"}
