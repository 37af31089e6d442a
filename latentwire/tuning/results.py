"""What a sweep found: the best checkpoint, its scores beside the baselines, and the export."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import optuna
import pyarrow as pa
import pyarrow.parquet as pq
import ray
from ray import tune
from ray.exceptions import RayTaskError
from ray.tune.integration.ray_train import CHECKPOINT_PATH_KEY

from latentwire.config import RunConfig, TuneConfig
from latentwire.config.resolve import ConfigError
from latentwire.data import shards
from latentwire.evaluation.baselines import FINAL_MODES, Mode
from latentwire.evaluation.evaluator import METRIC_VERSION, Prediction, predict, summarise
from latentwire.training import checkpoints
from latentwire.tuning.study import TRIAL_ID


class SweepError(RuntimeError):
    """A sweep without a usable trial; the message quotes the trials' own errors."""


@dataclass(frozen=True)
class Best:
    """The best evaluation of a sweep whose checkpoint still exists."""

    trial: str
    step: int
    score: float
    checkpoint: Path
    values: dict[str, Any]


def find_best(grid: tune.ResultGrid, config: TuneConfig) -> Best:
    """The best row over all trials' evaluations that keep to ``tune.constraints``. Under Train V2 a trial's result names no
    checkpoint: its rows do.

    Raises :class:`SweepError` where no trial left a checkpoint, or none within the limits.
    """
    metric, found, beyond = config.metric, [], 0
    for result in grid:
        frame = result.metrics_dataframe
        if frame is None or CHECKPOINT_PATH_KEY not in frame or metric not in frame:
            continue
        for row in frame.to_dict("records"):
            path = row[CHECKPOINT_PATH_KEY]
            if isinstance(path, str) and Path(path).exists():
                if not within_limits(row, config):
                    beyond += 1
                    continue
                found.append(
                    Best(_trial_id(result), int(row["step"]), float(row[metric]), Path(path), dict(result.config or {}))
                )
    if not found and beyond:
        limits = ", ".join(f"{name} ≤ {limit.max:g}" for name, limit in config.constraints.items())
        raise SweepError(
            f"a winner must keep to tune.constraints ({limits}), all {beyond} evaluations of {len(grid)} trials go beyond; "
            f"widen the limit or the space"
        )
    if not found:
        errors = "; ".join(str(e).strip().splitlines()[-1] for e in grid.errors[:3]) or "none reported one"
        raise SweepError(f"a sweep needs at least one trial with a checkpoint, got none of {len(grid)} ({errors})")
    return (max if config.mode == "max" else min)(found, key=lambda best: best.score)


def within_limits(row: Mapping[str, Any], config: TuneConfig) -> bool:
    """Whether an evaluation keeps to ``tune.constraints``."""
    return all(row.get(name, math.inf) <= limit.max for name, limit in config.constraints.items())


def front(study: optuna.Study) -> set[str]:
    """Ids of the trials that no other beats in every objective (those beyond a limit are left out)."""
    return {trial.user_attrs[TRIAL_ID] for trial in study.best_trials if TRIAL_ID in trial.user_attrs}


def _trial_id(result: Any) -> str:
    return Path(result.path).name


def trial_rows(grid: tune.ResultGrid, config: TuneConfig) -> list[dict[str, Any]]:
    """One row per trial, best first: id, state (done, stopped by the scheduler, beyond a limit, failed), step, best score,
    other objectives, losses, values drawn."""
    rows, (metric, mode) = [], (config.metric, config.mode)
    for result in grid:
        frame = result.metrics_dataframe
        row: dict[str, Any] = {"trial": _trial_id(result), "state": "failed" if result.error else "done"}
        if frame is not None and metric in frame:
            last, best = frame.iloc[-1], frame.sort_values(metric).iloc[-1 if mode == "max" else 0]
            state = "done" if last["step"] >= last["total_steps"] else "stopped"
            row |= {
                "state": "failed" if result.error else state if within_limits(last, config) else "beyond",
                "step": int(last["step"]),
                **{name: float(best[name]) for name in (metric, *config.objectives, *config.constraints)},
                "first_train_loss": float(last["first_train_loss"]),
                "train_loss": float(last["train_loss"]),
                "examples_per_s": float(last["examples_per_s"]),
                "seconds": float(last["time_total_s"]),
            }
        rows.append(row | {"values": dict(result.config or {}), "error": str(result.error or "")})
    order = sorted(rows, key=lambda r: r.get(metric, float("-inf") if mode == "max" else float("inf")))
    return order[::-1] if mode == "max" else order


def check_questions(run: RunConfig) -> None:
    """Raise :class:`~latentwire.config.resolve.ConfigError` where a configuration's rows ask nothing that could be scored."""
    if run.data.dataset == "text":
        raise ConfigError(
            "scores need questions, dataset text has none; name others, e.g. --set data.dataset=squad "
            "--set losses.bundle=answer"
        )


def score(
    path: Path, validation: Path, modes: tuple[Mode, ...] = FINAL_MODES, run: RunConfig | None = None
) -> tuple[dict[str, Any], list[Prediction]]:
    """Reload a checkpoint in this process and score it on complete shards: mode → receiver → metrics.

    ``run`` replaces the configuration it was saved with (other data, decoding or device).
    """
    wire, _ = checkpoints.load_wire(path, run)
    table = shards.read_table(validation)
    predictions = [p for mode in modes for p in predict(wire, table, mode)]
    return {mode: summarise([p for p in predictions if p.mode == mode]) for mode in modes}, predictions


def score_and_export(checkpoint: Path, validation: Path, export: Path) -> dict[str, Any]:
    """Score the chosen checkpoint once on the validation split, and export it without its training state.

    A wire pretrained on texts alone has no scores: it is exported for a second stage.
    """
    wire, manifest = checkpoints.load_wire(checkpoint)
    texts = wire.run.data.dataset == "text"
    table, predictions = ({}, []) if texts else score(checkpoint, validation)
    pins = manifest["pins"] | {
        "validation": {"shards": shards.read_manifest(validation)["key"], "metric_version": METRIC_VERSION}
    }
    checkpoints.save(export, wire, {"development": manifest["metrics"], "validation": table}, pins)
    if predictions:
        rows = pa.Table.from_pylist([asdict(p) for p in predictions])
        pq.write_table(rows, export.parent / "predictions.parquet")
    return table


def on_cluster(run: RunConfig, gpus: float, function: Any, *arguments: Any) -> Any:
    """Run ``function`` in a task with one worker's resources: the head may have no GPU."""
    task = ray.remote(num_cpus=run.training.cpus_per_worker, num_gpus=gpus)(function)
    try:
        return ray.get(task.remote(*arguments))
    except RayTaskError as error:
        # What the user did wrong over there reads here as it would without Ray; the remote traceback stays chained.
        raise error.cause from error


def write_results(output: Path, document: dict[str, Any]) -> None:
    """``results.json``, written aside and renamed."""
    aside = output / ".results.json.part"
    aside.write_text(json.dumps(document, indent=1, default=str))
    aside.rename(output / "results.json")
