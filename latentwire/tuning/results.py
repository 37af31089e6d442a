"""What a sweep found: the best checkpoint, its scores beside the baselines, and the export."""

from __future__ import annotations

import json
import math
from collections.abc import Container, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import optuna
import pyarrow as pa
import pyarrow.parquet as pq
import ray
from optuna.trial import TrialState
from ray.exceptions import RayTaskError
from ray.tune.integration.ray_train import CHECKPOINT_PATH_KEY

from latentwire import exports
from latentwire.assembly import LatentWire
from latentwire.config import RunConfig, TuneConfig
from latentwire.config.resolve import ConfigError
from latentwire.data import shards
from latentwire.errors import UserError
from latentwire.evaluation.baselines import FINAL_MODES
from latentwire.evaluation.diagnostics import diagnose
from latentwire.evaluation.evaluator import Prediction, predict
from latentwire.evaluation.pin import evaluation_pin
from latentwire.evaluation.settings import Setting, label
from latentwire.evaluation.summary import summarise
from latentwire.storage import Place, directory, local, place, write, write_text
from latentwire.training import checkpoints
from latentwire.tuning.study import CAUSE, evaluations, own_trials


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
    step, objectives at its best evaluation, losses, values drawn, cause of failure. Starting points that nobody began have none."""
    rows, front = [], {trial.number for trial in study.best_trials} if config.objectives else set()
    for trial in own_trials(study, tuple(STATES)):
        row: dict[str, Any] = {"trial": trial.number, "state": STATES[trial.state], "values": dict(trial.params)}
        row |= {"error": trial.user_attrs.get(CAUSE, ""), "front": trial.number in front}
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


def check_questions(run: RunConfig) -> None:
    """Raise :class:`~latentwire.config.resolve.ConfigError` where a configuration's rows ask nothing that could be scored."""
    if run.data.dataset == "text":
        raise ConfigError(
            "scores need questions, dataset text has none; name others, e.g. --set data.dataset=squad "
            "--set losses.bundle=answer"
        )


FINAL_SETTINGS = tuple(
    Setting(mode, bits=bits) for mode in FINAL_MODES for bits in ((None, 8, 4) if mode == "latent" else (None,))
)
"""What a sweep's winner is scored with: every mode, and the latents also as they travel in fewer bits."""


def score(
    path: Place,
    validation: Place,
    settings: tuple[Setting, ...] = FINAL_SETTINGS,
    run: RunConfig | None = None,
    *,
    joint: bool = True,
) -> tuple[dict[str, Any], list[Prediction]]:
    """Reload a checkpoint in this process and score it on complete shards: setting's key → receiver → metrics.

    ``run`` replaces the configuration it was saved with (other data, decoding or device). ``joint``: receivers also judge
    each other's answers.
    """
    with local(path) as folder:
        wire, _ = checkpoints.load_wire(folder, run)
    return score_wire(wire, validation, settings, joint=joint)


def score_wire(
    wire: LatentWire, validation: Place, settings: tuple[Setting, ...] = FINAL_SETTINGS, *, joint: bool = True
) -> tuple[dict[str, Any], list[Prediction]]:
    """The same of a wire that is loaded already."""
    table = shards.read_table(validation)
    predictions: dict[str, list[Prediction]] = {}
    for number, setting in enumerate(settings, start=1):  # minutes each with real receivers
        predictions[setting.key] = list(predict(wire, table, setting, joint=joint))
        print(f"scored {number}/{len(settings)}: {label(setting.key)}, {table.num_rows:,} rows", flush=True)
    scores = {key: summarise(found) for key, found in predictions.items()}
    return scores, [p for found in predictions.values() for p in found]


def diagnose_here(path: Place, validation: Place, run: RunConfig) -> dict[str, float]:
    """Reload a checkpoint in this process and look into its messages."""
    with local(path) as folder:
        wire, _ = checkpoints.load_wire(folder, run)
    return diagnose(wire, shards.read_table(validation))


def score_and_export(checkpoint: Place, validation: Place, export: Place) -> dict[str, Any]:
    """Score the chosen checkpoint once on the validation split, and export it without its training state.

    A wire pretrained on texts alone has no scores: it is exported for a second stage.
    """
    if export.exists():
        raise SweepError(f"an export must not overwrite anything, {export} exists; name another output_dir")
    with local(checkpoint) as folder:
        wire, manifest = checkpoints.load_wire(folder)
    texts = wire.run.data.dataset == "text"
    table, predictions = ({}, []) if texts else score_wire(wire, validation)
    pins = manifest["pins"] | {
        "validation": {
            "shards": shards.read_manifest(validation)["key"],
            "evaluation_pin": evaluation_pin(validation, wire.run),
        }
    }
    with directory(export, last=exports.MANIFEST) as folder:
        checkpoints.save(folder, wire, {"development": manifest["metrics"], "validation": table}, pins)
    if predictions:
        write_predictions(predictions, export.parent / "predictions.parquet")
    return table


def write_predictions(predictions: Sequence[Prediction], path: Place) -> None:
    """One row per prediction, written aside and renamed."""
    rows = pa.Table.from_pylist([asdict(p) for p in predictions])
    write(path, lambda file: pq.write_table(rows, file))


def on_cluster(run: RunConfig, gpus: float, function: Any, *arguments: Any) -> Any:
    """Run ``function`` in a task with one worker's resources: the head may have no GPU."""
    wanted = run.training
    task = ray.remote(num_cpus=wanted.cpus_per_worker, num_gpus=gpus, resources=wanted.worker_resources)(function)
    try:
        return ray.get(task.remote(*arguments))
    except RayTaskError as error:
        # What the user did wrong over there reads here as it would without Ray; the remote traceback stays chained.
        raise error.cause from error


def write_results(output: Place, document: dict[str, Any]) -> None:
    """``results.json``, whole or as it was."""
    write_text(output / "results.json", json.dumps(document, indent=1, default=str))
