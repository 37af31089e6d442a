"""Results of a sweep: its best checkpoint, a row per trial, and how far the choice flatters it."""

from __future__ import annotations

import math
from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.trial import TrialState
from ray.tune.integration.ray_train import CHECKPOINT_PATH_KEY

from latentwire import exports
from latentwire.config import TuneConfig
from latentwire.errors import UserError
from latentwire.storage import Place, place
from latentwire.tuning.study import (
    CAUSE,
    CLONE,
    RETRIES,
    clone_record,
    evaluations,
    is_paused,
    own_trials,
    run_values,
    stopped_by,
)


class SweepError(UserError):
    """A sweep without a usable trial; the message quotes the trials' own errors."""


@dataclass(frozen=True)
class Best:
    """The best evaluation of a sweep whose checkpoint still exists."""

    trial: int
    step: int
    score: float
    checkpoint: Place
    values: dict[str, Any]


STATES = {
    TrialState.COMPLETE: "done",
    TrialState.PRUNED: "stopped",
    TrialState.FAIL: "failed",
    TrialState.RUNNING: "unfinished",
}
PAUSED_STATE = "paused"
"""State in a table of a trial that an order has paused; in the study it is unfinished."""
NOT_ENDED = (STATES[TrialState.RUNNING], PAUSED_STATE)
"""States in a table of trials that have not ended."""


def find_best(
    study: optuna.Study, config: TuneConfig, numbers: Container[int] | None = None
) -> Best:
    """Return the best evaluation within ``tune.constraints`` whose checkpoint still exists.

    ``numbers``: of these trials only. Raises :class:`SweepError` where no trial left a checkpoint,
    or none within the limits.
    """
    trials = [t for t in own_trials(study) if numbers is None or t.number in numbers]
    candidates, beyond = [], 0
    for trial in trials:
        for report in evaluations(trial):
            # A checkpoint without its manifest is gone: the budget has deleted it.
            path = place(report[CHECKPOINT_PATH_KEY])
            if not (path / exports.MANIFEST).exists():
                continue
            if not within_limits(report, config):
                beyond += 1
                continue
            score, values = report[config.metric], run_values(trial)
            candidates.append(Best(trial.number, report["step"], score, path, values))
    if not candidates and beyond:
        limits = ", ".join(f"{name} ≤ {limit.max:g}" for name, limit in config.constraints.items())
        raise SweepError(
            f"a winner must keep to tune.constraints ({limits}), all {beyond} evaluations kept of "
            f"{len(trials)} trials go beyond; widen the limit or the space"
        )
    if not candidates:
        causes = [trial.user_attrs[CAUSE] for trial in trials if CAUSE in trial.user_attrs]
        raise SweepError(
            f"a sweep needs at least one trial with a checkpoint, got none of {len(trials)} "
            f"({'; '.join(causes) or 'none failed'})"
        )
    return config.best_of(candidates, key=lambda best: best.score)


def within_limits(report: Mapping[str, Any], config: TuneConfig) -> bool:
    """Return whether an evaluation keeps to ``tune.constraints``."""
    # A report without the metric is beyond every limit.
    limits = config.constraints.items()
    return all(report.get(name, math.inf) <= limit.max for name, limit in limits)


def trial_rows(study: optuna.Study, config: TuneConfig) -> list[dict[str, Any]]:
    """Return one row per trial, best first; starting points that nobody began have none.

    A row has the trial's number, its state (done, stopped by the scheduler, failed, unfinished,
    paused; beyond a limit), step, objectives at its best evaluation, losses, values drawn, cause of
    failure, the failed trial that it retries, what it is a clone of, and who ordered it to stop.
    """
    rows = []
    # Optuna's best trials: with several objectives those that no other one dominates.
    front = {trial.number for trial in study.best_trials} if config.objectives else set()
    for trial in own_trials(study, tuple(STATES)):
        row: dict[str, Any] = {
            "trial": trial.number,
            "state": PAUSED_STATE if is_paused(trial) else STATES[trial.state],
            "values": dict(trial.params),
            "error": trial.user_attrs.get(CAUSE, ""),
            "front": trial.number in front,
        }
        if RETRIES in trial.user_attrs:
            row["retries"] = trial.user_attrs[RETRIES]
        if record := clone_record(trial):
            row[CLONE] = {name: record[name] for name in ("parent", "step", "changed")}
        if record := stopped_by(trial):
            row["stopped_by"] = record["who"]
        reports = evaluations(trial)
        if reports:
            best = config.best_of(reports, key=lambda report: report[config.metric])
            last = reports[-1]
            if row["state"] in ("done", "stopped") and not within_limits(last, config):
                row["state"] = "beyond"
            searched = (config.metric, *config.objectives, *config.constraints)
            row |= {name: best[name] for name in searched}
            row |= {name: last[name] for name in REPORTED}
        rows.append(row)
    # Trials without a report come last.
    worst = float("-inf") if config.mode == "max" else float("inf")
    return sorted(rows, key=lambda row: row.get(config.metric, worst), reverse=config.mode == "max")


REPORTED = ("step", "first_train_loss", "train_loss", "examples_per_s", "train_seconds")
"""Entries of a trial's row that come from its last evaluation."""


def selection_gap(best: Best, scores: dict[str, Any], metric: str) -> dict[str, float]:
    """Return the winner's development score, the untouched split's, and how far the first is above.

    Empty where there are no scores, or none of that kind (``wire_bytes``).
    """
    if not scores or not metric.startswith("dev_"):
        return {}
    # dev_f1_qwen is f1 of qwen, dev_f1 the mean over receivers; scores call a loss nll.
    kind, _, receiver = metric.removeprefix("dev_").partition("_")
    untouched = scores["latent"][receiver or "mean"][{"loss": "nll"}.get(kind, kind)]
    return {"development": best.score, "validation": untouched, "gap": best.score - untouched}
