"""A sweep: shards once, trials by Tune and Optuna, the best one reloaded, scored and exported."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import optuna
import ray
import ray.data
import ray.train
from optuna.trial import FrozenTrial
from ray import tune
from ray.tune.integration.ray_train import TuneReportCallback
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, MedianStoppingRule, TrialScheduler

from latentwire.config import RunConfig, SpaceFile, TuneConfig
from latentwire.config.resolve import with_values
from latentwire.data import pipeline, shards, streams, teachers
from latentwire.storage import Place, write_text
from latentwire.tuning.planner import Plan
from latentwire.tuning.searcher import ERROR_FILE, NUMBER, StudySearch, trial_path
from latentwire.tuning.space import data_variants, largest_run
from latentwire.tuning.study import JOURNAL, evaluations, keep_journal, own_trials
from latentwire.tuning.trial import make_trainer

SHARDS_AT_ONCE = 3
"""Splits that are sharded side by side."""

DRIVER_RESOURCES = {"node:__internal_head__": 0.001}
"""What a trial's driver asks for: a sliver of a resource that every head has. Drivers must not take the CPUs that
their own workers need (two of them would deadlock two cores), and a cluster needs nothing declared for this."""


def start_ray() -> None:
    """Join the cluster of ``RAY_ADDRESS`` (a submitted job has one), else start Ray on this machine.

    The dashboard stays on: Train's cleaner of placement groups asks its State API, and a sweep hangs without it.
    """
    ray.init(ignore_reinit_error=True, log_to_driver=True)


@dataclass(frozen=True)
class Files:
    """What the trials of one data variant read."""

    shards: dict[shards.ShardSplit, Place]
    teachers: dict[str, Place]
    """Receiver → what it says on the training shards' texts; empty where no trial compares with it."""
    columns: tuple[str, ...]
    """Of the training shards, those that some trial reads."""

    @property
    def train_rows(self) -> int:
        """Rows to train on."""
        return shards.read_manifest(self.shards["train"])["rows"]


def prepare(space: SpaceFile, gpus_per_worker: float) -> dict[str, Files]:
    """Shards and teachers' columns of every data variant the space can draw, by :func:`variant_key`.

    A few splits are made at once: one small source is one task, which leaves the other cores idle.
    """
    variants = list(data_variants(space))
    with ThreadPoolExecutor(SHARDS_AT_ONCE) as pool:
        waiting = {
            (variant_key(run), split): pool.submit(pipeline.ensure_shards, run, split)
            for run in variants
            for split in shards.SPLITS
        }
        paths = {key: future.result() for key, future in waiting.items()}
    continued = any(run.losses.continuation_ce_weight for run in (*variants, largest_run(space)))
    files: dict[str, Files] = {}
    for run in variants:
        key = variant_key(run)
        own = {split: paths[key, split] for split in shards.SPLITS}
        said = teachers.ensure_teachers(run, own["train"], gpus_per_worker)
        if key not in files or said:  # of two bundles with the same shards, one may need a teacher
            files[key] = Files(own, said, tuple(streams.training_columns(run, continued=continued)))
    return files


def variant_key(run: RunConfig) -> str:
    """Names the files of a run within one sweep."""
    losses = run.losses
    said = [losses.kd_temperature, losses.kd_top_k, losses.hidden_kd_depths]
    encoder = [run.encoder.kind, run.encoder.model, run.encoder.split]
    tree = {"data": run.data.model_dump(), "prompt": run.prompt.model_dump(), "encoder": encoder, "teachers": said}
    return json.dumps(tree, sort_keys=True)


def load_datasets(files: Files, in_memory: bool) -> dict[str, ray.data.Dataset]:
    """Training rows, in the object store once for all trials or to be streamed, and development rows, which are few."""
    dev = files.shards["dev"]
    return {
        "train": streams.ray_dataset(files.shards["train"], files.teachers, files.columns, in_memory=in_memory),
        "dev": ray.data.from_arrow(shards.read_table(dev)).materialize(),
    }


def pins(paths: dict[shards.ShardSplit, Place], run: RunConfig) -> dict[str, Any]:
    """What a metric hangs on: the rows it was computed on and how they were decoded."""
    return {
        "shards": {split: shards.read_manifest(path)["key"] for split, path in paths.items()},
        "evaluation": run.evaluation.model_dump(),
    }


class Earlier:
    """Stands for a trial of a driver that is gone, before a scheduler."""

    def __init__(self, number: int) -> None:
        self.trial_id, self.status = f"earlier-{number}", "TERMINATED"


def replay(scheduler: TrialScheduler, ended: Iterable[FrozenTrial]) -> None:
    """Show a fresh scheduler what ended trials reported: it compares the trials to come with them too."""
    for trial in ended:
        stand_in: Any = Earlier(trial.number)
        scheduler.on_trial_add(None, stand_in)
        for report in evaluations(trial):
            scheduler.on_trial_result(None, stand_in, report)


def drive_trial(
    values: dict[str, Any],
    *,
    space: SpaceFile,
    plan: Plan,
    datasets: dict[str, dict[str, ray.data.Dataset]],
    files: dict[str, Files],
    trial_dir: Place,
) -> None:
    """One trial's driver: resolves the configuration and runs a TorchTrainer under a name that a restart finds again."""
    number = values[NUMBER]
    run = with_values(space.run, {path: value for path, value in values.items() if path != NUMBER})
    key, path = variant_key(run), trial_path(trial_dir, number)
    trainer = make_trainer(
        run,
        datasets[key],
        files[key].train_rows,
        name=path.name,
        storage_path=str(trial_dir),
        gpus_per_worker=plan.gpus_per_worker,
        pins=pins(files[key].shards, run),
        metric=space.tune.metric,
        mode=space.tune.mode,
        callbacks=[TuneReportCallback()],
    )
    try:
        trainer.fit()
    except ray.train.TrainingFailedError as error:
        write_text(path / ERROR_FILE, str(error).strip().splitlines()[-1])
        raise


def total_steps(run: RunConfig, train_rows: int) -> int:
    """Optimiser steps of a run on that many rows."""
    return min(run.training.epochs * max(1, train_rows // run.training.batch_size), run.training.max_steps or 10**12)


def make_scheduler(config: TuneConfig, steps: int) -> TrialScheduler:
    """What stops trials early, by training steps. All are compared on the same development rows."""
    compared: dict[str, Any] = {"time_attr": "step", "metric": config.metric, "mode": config.mode}
    grace = min(config.grace_steps, steps)
    if config.scheduler == "asha":
        return ASHAScheduler(max_t=steps, grace_period=grace, reduction_factor=config.reduction_factor, **compared)
    if config.scheduler == "median":
        return MedianStoppingRule(grace_period=grace, **compared)
    return FIFOScheduler()


def run_sweep(space: SpaceFile, plan: Plan, files: dict[str, Files], output: Place) -> optuna.Study:
    """Search the space until its study has ``tune.trials`` finished trials; everything is written under ``output``.

    What the study holds already counts, and trials that a driver which died left unfinished go on from their checkpoints.
    Trials that fail are told to the study, not raised.
    """
    config, trial_dir = space.tune, output / "trials"
    search = StudySearch(space, journal=output / JOURNAL, name=output.name, trial_dir=trial_dir)
    ended = [trial for trial in own_trials(search.study) if trial.state.is_finished()]
    missing = config.trials - len(ended)
    if missing <= 0:
        return search.study
    datasets = {key: load_datasets(own, space.run.data.in_memory) for key, own in files.items()}
    scheduler = make_scheduler(config, total_steps(space.run, min(own.train_rows for own in files.values())))
    replay(scheduler, ended)
    driver = tune.with_parameters(
        drive_trial, space=space, plan=plan, datasets=datasets, files=files, trial_dir=trial_dir
    )
    tune.Tuner(
        tune.with_resources(driver, DRIVER_RESOURCES),
        tune_config=tune.TuneConfig(
            search_alg=search,
            scheduler=scheduler,
            num_samples=missing,
            max_concurrent_trials=plan.max_concurrent_trials,
            time_budget_s=None if config.time_budget_minutes is None else 60 * config.time_budget_minutes,
            trial_dirname_creator=lambda trial: f"trial-{trial.config[NUMBER]}",
            trial_name_creator=lambda trial: f"trial-{trial.config[NUMBER]}",
        ),
        run_config=tune.RunConfig(
            name=time.strftime("%Y%m%d-%H%M%S"),
            storage_path=str(output / "tune"),
            verbose=1,
            failure_config=tune.FailureConfig(max_failures=config.max_failures),
        ),
    ).fit()
    keep_journal(output / JOURNAL)
    return search.study
