"""What a person sees while a sweep runs: Tune's table, TensorBoard, and the trackers that are asked for.

Tune writes TensorBoard's files beside each trial's results by itself (tensorboardX comes with ``ray[tune]``).
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterable
from typing import Any

from ray.tune import Callback, CLIReporter

from latentwire.config import SweepConfig, TuneConfig
from latentwire.config.resolve import ConfigError
from latentwire.storage import Place
from latentwire.tuning.columns import column_names

REPORT_SECONDS = 30
"""Between two tables in the terminal."""


STORES = ("s3", "gs")
"""Schemes of addresses where MLflow keeps no runs: it needs a server or a database."""


def check_trackers(config: TuneConfig, output: Place) -> None:
    """Raise :class:`~latentwire.config.resolve.ConfigError` for a tracker whose package is not installed, or that cannot write."""
    for name in config.trackers:
        if importlib.util.find_spec(name) is None:
            raise ConfigError(
                f"tune.trackers {name} needs the package {name}, which is not installed; pip install 'latentwire[tracking]'"
            )
    if "mlflow" in config.trackers:
        uri = os.environ.get("MLFLOW_TRACKING_URI", str(output))
        if uri.partition("://")[0] in STORES:
            raise ConfigError(
                f"tune.trackers mlflow keeps its runs in a server or a database, not in an object store, got {uri}; set "
                f"MLFLOW_TRACKING_URI to a server (http://…) or a file that outlives this machine (sqlite:////nfs/mlflow.db)"
            )


RANK = "rank"
"""Key by which the table is sorted: the metric, or the worst there is where a trial has none."""


class Ranked:
    """A trial as the table sees it: with a rank, and a value for every knob, drawn or not."""

    def __init__(self, trial: Any, rank: float, knobs: Iterable[str]) -> None:
        drawn = trial.last_result.get("config", {})
        self.trial = trial
        self.last_result = {**trial.last_result, RANK: rank, "config": dict.fromkeys(knobs) | drawn}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.trial, name)

    def __str__(self) -> str:
        return str(self.trial)


class Table(CLIReporter):
    """Tune's table, for trials that have reported nothing, too, and for conditional knobs."""

    def __init__(self, by: str, mode: str, knobs: dict[str, str], **options: Any) -> None:
        super().__init__(metric=RANK, mode=mode, sort_by_metric=True, parameter_columns=knobs, **options)
        self.by, self.knobs = by, knobs
        self.worst = float("-inf") if mode == "max" else float("inf")

    def _progress_str(self, trials: list[Any], done: bool, *sys_info: Any, **options: Any) -> str:
        ranked: list[Any] = [Ranked(t, t.last_result.get(self.by, self.worst), self.knobs) for t in trials]
        return super()._progress_str(ranked, done, *sys_info, **options)

    def _current_best_trial(self, trials: list[Any]) -> tuple[Any, str]:
        best, _ = super()._current_best_trial(trials)
        return (best if best is not None and self.by in best.last_result else None), self.by


def table(space: SweepConfig) -> CLIReporter:
    """Tune's table with the step, what is searched by, the losses and the pace, and what each trial drew.

    Ray 2.60 takes a reporter only without its newer output, whose table shows four metrics of its own choice.
    """
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"
    tune = space.tune
    measured = dict.fromkeys(("step", tune.metric, *tune.objectives, *tune.constraints, "train_loss", "examples_per_s"))
    return Table(
        tune.metric,
        tune.mode,
        knobs=column_names(space.search),
        metric_columns={name: name for name in measured},
        max_report_frequency=REPORT_SECONDS,
        max_column_length=30,
    )


def trackers(config: TuneConfig, output: Place) -> list[Callback]:
    """Ray's own callbacks for MLflow and Weights & Biases, a run per trial, grouped by the sweep's name.

    MLflow writes to ``MLFLOW_TRACKING_URI``, else to ``<output>/mlflow.db``; W&B follows its own variables (``WANDB_MODE``).
    """
    found: list[Any] = []
    if "mlflow" in config.trackers:
        from ray.air.integrations.mlflow import MLflowLoggerCallback

        uri = os.environ.get("MLFLOW_TRACKING_URI", f"sqlite:///{output / 'mlflow.db'}")
        found.append(MLflowLoggerCallback(tracking_uri=uri, experiment_name=output.name))
    if "wandb" in config.trackers:
        from ray.air.integrations.wandb import WandbLoggerCallback

        found.append(WandbLoggerCallback(project="latentwire", group=output.name))
    return found
