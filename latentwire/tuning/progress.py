"""What a person sees while a sweep runs: Tune's table, TensorBoard, and the trackers that are asked for.

Tune writes TensorBoard's files beside each trial's results by itself (tensorboardX comes with ``ray[tune]``).
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

from ray.tune import Callback, CLIReporter

from latentwire.config import SpaceFile, TuneConfig
from latentwire.config.resolve import ConfigError

REPORT_SECONDS = 30
"""Between two tables in the terminal."""


def check_trackers(config: TuneConfig) -> None:
    """Raise :class:`~latentwire.config.resolve.ConfigError` for a tracker whose package is not installed."""
    for name in config.trackers:
        if importlib.util.find_spec(name) is None:
            raise ConfigError(
                f"tune.trackers {name} needs the package {name}, which is not installed; pip install 'latentwire[tracking]'"
            )


def table(space: SpaceFile) -> CLIReporter:
    """Tune's table with the step, what is searched by, the losses and the pace, and what each trial drew.

    Ray 2.60 takes a reporter only without its newer output, whose table shows four metrics of its own choice.
    """
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"
    tune = space.tune
    measured = dict.fromkeys(("step", tune.metric, *tune.objectives, *tune.constraints, "train_loss", "examples_per_s"))
    return CLIReporter(
        metric_columns={name: name for name in measured},
        parameter_columns={path: path.rpartition(".")[2] for path in space.search},
        metric=tune.metric,
        mode=tune.mode,
        sort_by_metric=True,
        max_report_frequency=REPORT_SECONDS,
        max_column_length=30,
    )


def trackers(config: TuneConfig, output: Path) -> list[Callback]:
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
