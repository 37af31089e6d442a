"""What a sweep found: its best checkpoint, a row per trial, and how much the choice flattered the winner."""

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
from latentwire.tuning.study import CAUSE, RETRIES, evaluations, own_trials


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


def find_best(study: optuna.Study, config: TuneConfig, numbers: Container[int] | None = None) -> Best:
    """The best evaluation of all trials (``numbers``: of these) that keeps to ``tune.constraints`` and whose checkpoint still exists.

    Raises :class:`SweepError` where no trial left a checkpoint, or none within the limits.
    """
    trials, found, beyond = [t for t in own_trials(study) if numbers is None or t.number in numbers], [], 0
    for trial in trials:
        for report in evaluations(trial):
            path = place(report[CHECKPOINT_PATH_KEY])
            if not (path / exports.MANIFEST).exists():
                continue
            if within_limits(report, config):
                found.append(Best(trial.number, report["step"], report[config.metric], path, dict(trial.params)))
            else:
                beyond += 1
    if not found and beyond:
        limits = ", ".join(f"{name} ≤ {limit.max:g}" for name, limit in config.constraints.items())
        raise SweepError(
            f"a winner must keep to tune.constraints ({limits}), all {beyond} evaluations kept of {len(trials)} trials go "
            f"beyond; widen the limit or the space"
        )
    if not found:
        causes = "; ".join(trial.user_attrs[CAUSE] for trial in trials if CAUSE in trial.user_attrs) or "none failed"
        raise SweepError(f"a sweep needs at least one trial with a checkpoint, got none of {len(trials)} ({causes})")
    return config.best_of(found, key=lambda best: best.score)


def within_limits(report: Mapping[str, Any], config: TuneConfig) -> bool:
    """Whether an evaluation keeps to ``tune.constraints``."""
    return all(report.get(name, math.inf) <= limit.max for name, limit in config.constraints.items())


def trial_rows(study: optuna.Study, config: TuneConfig) -> list[dict[str, Any]]:
    """One row per trial, best first: its number, state (done, stopped by the scheduler, failed, unfinished; beyond a limit),
    step, objectives at its best evaluation, losses, values drawn, cause of failure, and which failed one it takes up.
    Starting points that nobody began have none."""
    rows, front = [], {trial.number for trial in study.best_trials} if config.objectives else set()
    for trial in own_trials(study, tuple(STATES)):
        row: dict[str, Any] = {"trial": trial.number, "state": STATES[trial.state], "values": dict(trial.params)}
        row |= {"error": trial.user_attrs.get(CAUSE, ""), "front": trial.number in front}
        row |= {"retries": trial.user_attrs[RETRIES]} if RETRIES in trial.user_attrs else {}
        reports = evaluations(trial)
        if reports:
            best, last = config.best_of(reports, key=lambda report: report[config.metric]), reports[-1]
            if row["state"] in ("done", "stopped") and not within_limits(last, config):
                row["state"] = "beyond"
            measured = {name: best[name] for name in (config.metric, *config.objectives, *config.constraints)}
            row |= measured | {name: last[name] for name in REPORTED}
        rows.append(row)
    worst = float("-inf") if config.mode == "max" else float("inf")
    return sorted(rows, key=lambda row: row.get(config.metric, worst), reverse=config.mode == "max")


REPORTED = ("step", "first_train_loss", "train_loss", "examples_per_s", "train_seconds")
"""What a trial's row takes from its last evaluation."""


def selection_gap(best: Best, scores: dict[str, Any], metric: str) -> dict[str, float]:
    """The winner's development score, the same metric on the untouched split, and how much the choice flattered it.

    Empty where there are no scores, or none of that kind (``wire_bytes``).
    """
    if not scores or not metric.startswith("dev_"):
        return {}
    kind, _, receiver = metric.removeprefix("dev_").partition("_")
    untouched = scores["latent"][receiver or "mean"][{"loss": "nll"}.get(kind, kind)]
    return {"development": best.score, "validation": untouched, "gap": best.score - untouched}
