"""What is asked for is shown and tracked; what is not installed is said before anything starts."""

import importlib.util
import io
import json
import pickle
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlflow
import pytest
from rich.console import Console

from latentwire.config import SweepConfig, TuneConfig
from latentwire.config.resolve import ConfigError
from latentwire.distributed.driver_log import LOG
from latentwire.distributed.worker_output import PROGRESS
from latentwire.storage import Remote, write_text
from latentwire.tuning import console
from latentwire.tuning.searcher import StudySearch
from latentwire.tuning.study import JOURNAL


def test_a_missing_tracker_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    console.check_trackers(TuneConfig(), Path("runs"))
    with pytest.raises(
        ConfigError, match=r"tune\.trackers wandb needs the package wandb.*latentwire\[tracking\]"
    ):
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
    with pytest.raises(
        ConfigError, match=rf"not in an object store, got {uri or output}; set MLFLOW_TRACKING_URI"
    ):
        console.check_trackers(config, output)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://localhost:5000")
    console.check_trackers(config, output)
    console.check_trackers(TuneConfig(), output)
    assert not list(tmp_path.iterdir())


def test_mlflow_gets_every_evaluation_without_a_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    config = TuneConfig(trackers=("mlflow",))
    console.check_trackers(config, tmp_path)
    (callback,) = console.trackers(config, tmp_path)
    callback.setup()
    trial: Any = SimpleNamespace(
        config={"encoder.latent_len": 6}, trial_id="a", logdir=str(tmp_path)
    )
    trial = type(
        "Trial",
        (SimpleNamespace,),
        {"__str__": lambda self: "trial-0", "__hash__": object.__hash__},
    )(**vars(trial))
    callback.log_trial_start(trial)
    for step, score in ((3, 0.25), (6, 0.5)):
        callback.log_trial_result(
            step, trial, {"dev_f1": score, "training_iteration": step, "config": trial.config}
        )
    callback.log_trial_end(trial)
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    experiment = client.get_experiment_by_name(tmp_path.name)
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.data.params["encoder.latent_len"] == "6" and run.info.status == "FINISHED"
    assert [m.value for m in client.get_metric_history(run.info.run_id, "dev_f1")] == [0.25, 0.5]


SPACE = SweepConfig.model_validate(
    {
        "search": {
            "encoder.latent_len": {"type": "int", "low": 4, "high": 16},
            "encoder.heads": {"type": "categorical", "choices": [2, 4]},
            "features.deep_prefix.heads": {"type": "categorical", "choices": [0, 2]},
        },
        "run": {"features": {"deep_prefix": {}}},
        "tune": {"trials": 8},
    }
)
STEPS = 100


class Sweep:
    """A search as Tune drives it, of which the console is told as by Tune: searcher first."""

    def __init__(self, folder: Path, screen: Console) -> None:
        self.search = StudySearch(
            SPACE, journal=folder / JOURNAL, name="sweep", trial_dir=folder / "trials"
        )
        self.console = console.SweepConsole(self.search, STEPS, folder / "log.txt", screen)
        self.trials: list[Any] = []

    def begin(self) -> int:
        number = len(self.trials)
        self.trials.append(
            SimpleNamespace(config=self.search.suggest(str(number)), trial_id=str(number))
        )
        return number

    def progress(self, number: int, step: int) -> None:
        """A worker says how far it is, as a line of its output."""
        values = {
            "name": f"trial-{number}",
            "step": step,
            "total_steps": STEPS,
            "train_loss": 1.5,
            "examples_per_s": 7.0,
        }
        LOG.receive({"lines": [PROGRESS + json.dumps(values)], "pid": 1, "is_err": False})
        self.console.on_step_end(0, self.trials)

    def report(self, number: int, step: int, score: float) -> None:
        result = {
            "step": step,
            "total_steps": STEPS,
            "dev_f1": score,
            "wire_bytes": 64,
            "train_loss": 1.25,
        }
        result |= dict.fromkeys(("first_train_loss", "examples_per_s", "train_seconds"), 2.0)
        self.search.on_trial_result(str(number), result)

    def end(self, number: int, error: bool = False) -> None:
        self.search.on_trial_complete(str(number), error=error)
        (self.console.on_trial_error if error else self.console.on_trial_complete)(
            0, self.trials, self.trials[number]
        )


def eight_trials(sweep: Sweep) -> None:
    """Five run to their end, two are stopped, one fails as its worker says why."""
    with sweep.console.shown():
        for number in range(8):
            sweep.begin()
            for step in range(0, 50, 5):
                sweep.progress(number, step)
            if number == 3:
                output = sweep.search.trial_dir / "trial-3" / "log.txt"
                write_text(
                    output.parent / "error.txt", f"gradients must be finite; output: {output}"
                )
                sweep.end(number)
                continue
            sweep.report(number, 50, number / 10)
            if number not in (4, 5):
                sweep.report(number, 100, number / 8)
            sweep.end(number)


def test_a_sweep_of_eight_trials_has_a_line_for_each_where_there_is_no_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    eight_trials(Sweep(tmp_path, Console(width=80)))
    first, *lines = capsys.readouterr().out.splitlines()
    assert first == f"8 trials; their output: {tmp_path}/trials/trial-<number>/log.txt"
    assert len(lines) == 8
    assert re.match(
        r"trial 2 done, dev_f1 0.25 at step 100; 3 of 8 trials ended, 0 running, about .* left$",
        lines[2],
    )
    log = tmp_path / "trials" / "trial-3" / "log.txt"
    assert lines[3].startswith(
        f"trial 3 failed: gradients must be finite; output: {log}; 4 of 8 trials ended"
    )
    assert lines[4].startswith("trial 4 stopped, dev_f1 0.4 at step 50; 5 of 8")


def test_in_a_terminal_failures_alone_stay_and_the_table_is_one(tmp_path: Path) -> None:
    screen = Console(
        width=140,
        height=30,
        force_terminal=True,
        force_interactive=True,
        record=True,
        file=io.StringIO(),
    )
    sweep = Sweep(tmp_path, screen)
    eight_trials(sweep)
    with sweep.console.shown():
        sweep.progress(sweep.begin(), 10)
    with screen.capture() as capture:
        screen.print(sweep.console.drawing(sweep.console._rows()))
    table = capture.get()
    assert [
        name
        for name in ("latent_len", "encoder.heads", "deep_prefix.heads", "dev_f1")
        if name not in table
    ] == []
    assert (
        re.search(r"8 +running +10/100", table)
        and re.search(r"3 +failed", table)
        and "about" in table
    )
    assert screen.export_text().count("trial 3 failed: gradients must be finite") == 1
    assert "trial 2 done" not in screen.export_text()


def test_a_trial_whose_driver_died_names_the_log_of_the_sweep(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = Sweep(tmp_path, Console(width=80))
    sweep.begin()
    sweep.console.on_trial_recover(0, sweep.trials, sweep.trials[0])
    sweep.end(0, error=True)
    again, failed = capsys.readouterr().out.splitlines()
    assert again.endswith(
        f"goes on from its last checkpoint; output: {tmp_path / 'trials' / 'trial-0' / 'log.txt'}"
    )
    assert (
        failed.startswith("trial 0 failed: the trial's driver died")
        and f"output: {tmp_path / 'log.txt'};" in failed
    )


def test_a_sweep_that_takes_long_says_so_now_and_then(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "LINE_SECONDS", 0.0)
    sweep = Sweep(tmp_path, Console(width=80))
    with sweep.console.shown():
        sweep.progress(sweep.begin(), 10)
    _, line = capsys.readouterr().out.splitlines()
    assert re.match(r"0 of 8 trials ended, 1 running, about .* left$", line)


def test_an_earlier_drivers_trials_are_not_told_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = Sweep(tmp_path, Console(width=80))
    first.report(first.begin(), 100, 0.5)
    first.end(0)
    capsys.readouterr()
    again = Sweep(tmp_path, Console(width=80))
    again.console.report_end(0)
    assert capsys.readouterr().out == "" and again.console.steps_before == 100
    assert (
        pickle.loads(pickle.dumps(again.console)) is not None
    )  # as Tune does with all of its callbacks


def test_a_trial_in_an_earlier_stage_says_so_and_its_steps_there_count_for_nothing(
    tmp_path: Path,
) -> None:
    screen = Console(width=140, height=30, force_terminal=True, file=io.StringIO())
    sweep = Sweep(tmp_path, screen)
    with sweep.console.shown():
        number = sweep.begin()
        told = {"name": f"trial-{number}", "stage": "recite 1/2", "step": 30, "total_steps": 40}
        sweep.console.hear(told)
        with screen.capture() as capture:
            screen.print(sweep.console.drawing(sweep.console._rows()))
        assert "stage recite 1/2: 30/40" in capture.get()
        assert sweep.console._steps(sweep.console._rows()) == (0, 8 * STEPS)
        sweep.progress(number, 10)
        with screen.capture() as capture:
            screen.print(sweep.console.drawing(sweep.console._rows()))
        assert re.search(r"0 +running +10/100", capture.get()) and "recite" not in capture.get()
