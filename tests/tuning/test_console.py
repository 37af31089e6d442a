"""What is asked for is shown and tracked; what is not installed is said before anything starts."""

import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlflow
import pytest

from latentwire.config import SweepConfig, TuneConfig
from latentwire.config.resolve import ConfigError
from latentwire.storage import Remote
from latentwire.tuning import console


def test_a_missing_tracker_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    console.check_trackers(TuneConfig(), Path("runs"))
    with pytest.raises(ConfigError, match=r"tune\.trackers wandb needs the package wandb.*latentwire\[tracking\]"):
        console.check_trackers(TuneConfig(trackers=("wandb",)), Path("runs"))


@pytest.mark.parametrize("uri", [None, "s3://bucket/mlflow"])
def test_mlflow_beside_an_output_in_a_bucket_needs_a_place_of_its_own(
    uri: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    if uri is not None:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    config, output = TuneConfig(trackers=("mlflow",)), Remote("s3://bucket/sweep")
    with pytest.raises(ConfigError, match=rf"not in an object store, got {uri or output}; set MLFLOW_TRACKING_URI"):
        console.check_trackers(config, output)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://localhost:5000")
    console.check_trackers(config, output)
    console.check_trackers(TuneConfig(), output)
    assert not list(tmp_path.iterdir())


def test_mlflow_gets_every_evaluation_without_a_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    config = TuneConfig(trackers=("mlflow",))
    console.check_trackers(config, tmp_path)
    (callback,) = console.trackers(config, tmp_path)
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
    space = SweepConfig.model_validate({
        "search": {"encoder.latent_len": {"type": "int", "low": 4, "high": 16}},
        "tune": {"metric": "dev_em", "constraints": {"wire_bytes": {"max": 9}}},
    })  # fmt: skip
    reporter = console.table(space)
    assert list(reporter._metric_columns) == ["step", "dev_em", "wire_bytes", "train_loss", "examples_per_s"]
    assert reporter._parameter_columns == {"encoder.latent_len": "latent_len"}


class Shown:
    """A trial of Tune's, as far as its table looks at one."""

    def __init__(self, name: str, status: str, result: dict[str, Any], config: dict[str, Any]) -> None:
        self.trial_id, self.status, self.config = name, status, config
        self.last_result = {"trial_id": name} | ({"config": config} | result if result else {})
        self.evaluated_params, self.error_file, self.local_experiment_path = config, None, "/tmp"
        self.temporary_state = SimpleNamespace(location="here")

    def __str__(self) -> str:
        return self.trial_id


@pytest.mark.parametrize("mode", ["max", "min"])
def test_the_table_has_a_place_for_a_trial_that_failed_before_it_was_evaluated(mode: str) -> None:
    rank = {"type": "int", "low": 2, "high": 8, "when": {"encoder.kind": "lm"}}
    space = SweepConfig.model_validate({
        "run": {"encoder": {"model": "receiver:llama"}},
        "search": {"encoder.kind": {"type": "categorical", "choices": ["byte", "lm"]}, "encoder.lora_rank": rank},
        "tune": {"mode": mode},
    })  # fmt: skip
    reporter = console.table(space)
    trials: list[Any] = [
        Shown("trial-0", "TERMINATED", {}, {"encoder.kind": "lm", "encoder.lora_rank": 4}),
        Shown("trial-1", "TERMINATED", {"dev_f1": 0.5}, {"encoder.kind": "byte"}),  # which draws no rank
        Shown("trial-2", "TERMINATED", {"dev_f1": 0.75}, {"encoder.kind": "byte"}),
        Shown("trial-3", "RUNNING", {}, {"encoder.kind": "byte"}),
    ]
    told = reporter._progress_str(trials, True)
    better, worse = ("trial-2", "trial-1") if mode == "max" else ("trial-1", "trial-2")
    rows = [line.split()[1] for line in told.splitlines() if line.startswith("| trial-")]
    assert rows == ["trial-3", better, worse, "trial-0"]
    assert f"Current best trial: {better} with dev_f1=0." in told and "inf" not in told
    assert "Current best" not in reporter._progress_str(trials[:1], True)
