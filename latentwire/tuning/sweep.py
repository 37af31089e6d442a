"""The search of a sweep: files once for all trials, then Tune with Optuna and a scheduler over them."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import optuna
import ray
import ray.data
from optuna.trial import FrozenTrial
from ray import tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, MedianStoppingRule, TrialScheduler

from latentwire.config import RunConfig, SpaceFile, TuneConfig
from latentwire.config.resolve import ConfigError
from latentwire.data import documents, pipeline, shards, streams, teachers
from latentwire.evaluation.pin import evaluation_pin, pins
from latentwire.storage import Place
from latentwire.training import checkpoints
from latentwire.tuning import progress
from latentwire.tuning.janitor import Janitor, clear_debris
from latentwire.tuning.planner import Plan
from latentwire.tuning.searcher import StudySearch
from latentwire.tuning.space import data_variants, largest_run, longest_run, variant_key
from latentwire.tuning.stopping import Stop
from latentwire.tuning.study import JOURNAL, evaluations, keep_journal, own_trials
from latentwire.tuning.trial import NUMBER, Variant, drive_trial

SHARDS_AT_ONCE = 3
"""Splits that are sharded side by side."""

DRIVER_RESOURCES = {"node:__internal_head__": 0.001}
"""What a trial's driver asks for: a sliver of a resource that every head has. Drivers must not take the CPUs that
their own workers need (two of them would deadlock two cores), and a cluster needs nothing declared for this."""


@dataclass(frozen=True)
class Files:
    """What the trials of one data variant read."""

    shards: dict[shards.ShardSplit, Place]
    teachers: dict[str, Place]
    """Receiver → what it says on the training shards' texts; empty where no trial compares with it."""
    columns: tuple[str, ...]
    """Of the training shards, those that some trial reads."""

    @property
    def keys(self) -> dict[str, str]:
        """What the files are named by: split → key of its shards, and receiver → its teacher's columns."""
        named = {str(split): shards.read_manifest(path)["key"] for split, path in self.shards.items()}
        return named | {f"teacher {name}": path.name for name, path in self.teachers.items()}

    @property
    def train_rows(self) -> int:
        """Rows to train on."""
        return shards.read_manifest(self.shards["train"])["rows"]


def prepare(space: SpaceFile, gpus_per_worker: float) -> dict[str, Files]:
    """Shards and teachers' columns of every data variant the space can draw, by :func:`variant_key`.

    A few splits are made at once: one small source is one task, which leaves the other cores idle. Raises
    :class:`~latentwire.config.resolve.ConfigError` as :func:`common_pin` does, before training rows are made.
    """
    variants = data_variants(space)
    named = [{split: shards.shard_path(run, split) for split in shards.SPLITS} for run in variants]
    needed = {path: (run, split, path) for run, own in zip(variants, named, strict=True) for split, path in own.items()}
    dev = [path for path, of in needed.items() if of[1] == "dev"]
    if len(dev) > 1:
        _make([needed.pop(path) for path in dev])
        common_pin(space, dev)
    _make(needed.values())
    for run, own in zip(variants, named, strict=True):
        checkpoints.check_development(run, own["dev"])
        documents.of_shards(own["train"])  # once here, or every worker would read all of its rows for it
    continued = any(run.losses.continuation_ce_weight for run in (*variants, largest_run(space)))
    files: dict[str, Files] = {}
    for run, own in zip(variants, named, strict=True):
        key = variant_key(run)
        said = teachers.ensure_teachers(run, own["train"], gpus_per_worker)
        if key not in files or said:  # of two bundles with the same shards, one may need a teacher
            files[key] = Files(own, said, tuple(streams.training_columns(run, continued=continued)))
    return files


def _make(wanted: Iterable[tuple[RunConfig, shards.ShardSplit, Place]]) -> None:
    with ThreadPoolExecutor(SHARDS_AT_ONCE) as pool:
        try:
            for made in [pool.submit(pipeline.ensure_shards, *of) for of in wanted]:
                made.result()
        except KeyboardInterrupt:
            ray.shutdown()  # else the others, which nobody wants any more, would be waited for
            raise


def load_datasets(files: Files, in_memory: bool) -> dict[str, ray.data.Dataset]:
    """Training rows, in the object store once for all trials or to be streamed, and development rows, which are few."""
    dev = files.shards["dev"]
    return {
        "train": streams.ray_dataset(files.shards["train"], files.teachers, files.columns, in_memory=in_memory),
        "dev": ray.data.from_arrow(shards.read_table(dev)).materialize(),
    }


def common_pin(space: SpaceFile, dev: Iterable[Place]) -> str:
    """The evaluation pin that all trials share. ``dev``: shards of development rows.

    Raises :class:`~latentwire.config.resolve.ConfigError` where a searched knob changes the development rows: scores on
    different rows say nothing about the wires.
    """
    found = {evaluation_pin(path, space.run) for path in dev}
    if len(found) > 1:
        searched = ", ".join(path for path in space.search if path.startswith(shards.SHARD_KNOBS))
        raise ConfigError(
            f"all trials must be scored on the same development rows, got {len(found)} different sets; what makes them "
            f"differ must not be searched, which is among {searched}"
        )
    return found.pop()


class MedianRule(MedianStoppingRule):
    """Ray's rule, which cannot do with a trial that ends before it has reported anything."""

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """Leave out a trial that has nothing to be compared by."""
        if self._time_attr in result and self._metric in result:
            super().on_trial_complete(tune_controller, trial, result)


class Earlier:
    """Stands for a trial of a driver that is gone, before a scheduler."""

    def __init__(self, number: int) -> None:
        self.trial_id, self.status = f"earlier-{number}", "TERMINATED"


class NothingRuns:
    """Stands for Tune's controller meanwhile."""

    def get_live_trials(self) -> list[Any]:
        """None."""
        return []


def replay(scheduler: TrialScheduler, ended: Iterable[FrozenTrial]) -> None:
    """Show a fresh scheduler what ended trials reported, up to where it would stop one: it compares those to come with them too."""
    controller: Any = NothingRuns()
    for trial in ended:
        stand_in: Any = Earlier(trial.number)
        scheduler.on_trial_add(controller, stand_in)
        for report in evaluations(trial):
            if scheduler.on_trial_result(controller, stand_in, report) == TrialScheduler.STOP:
                break


def total_steps(run: RunConfig, train_rows: int) -> int:
    """Optimiser steps of a run on that many rows."""
    return min(run.training.epochs * max(1, train_rows // run.training.batch_size), run.training.max_steps or 10**12)


def make_scheduler(config: TuneConfig, steps: int) -> TrialScheduler:
    """What stops trials early, by training steps. All are compared on the same development rows.

    ``steps``: of the longest trial, since ASHA stops every trial that has done as many.
    """
    compared: dict[str, Any] = {"time_attr": "step", "metric": config.metric, "mode": config.mode}
    grace = min(config.grace_steps, steps)
    if config.scheduler == "asha":
        return ASHAScheduler(max_t=steps, grace_period=grace, reduction_factor=config.reduction_factor, **compared)
    if config.scheduler == "median":
        return MedianRule(grace_period=grace, **compared)
    return FIFOScheduler()


def run_sweep(
    space: SpaceFile,
    plan: Plan,
    files: dict[str, Files],
    output: Place,
    receivers: Mapping[str, str] | None = None,
    served: Any = None,
    stop: Stop | None = None,
) -> optuna.Study:
    """Search the space until its study has ``tune.trials`` finished trials; everything is written under ``output``.

    What the study holds already counts, and trials that a driver which died left unfinished go on from their checkpoints.
    Trials that fail are told to the study, not raised. ``receivers``: hashes that their weights must have. ``served``: the
    replicas that trials share, where they do. ``stop``: may end the search before; then trials that run are cut, stay
    unfinished in the study, and :class:`~latentwire.tuning.stopping.SweepStopped` is raised.
    """
    stop = stop or Stop()
    config, trial_dir = space.tune, output / "trials"
    pin = common_pin(space, {own.shards["dev"] for own in files.values()})
    search = StudySearch(space, journal=output / JOURNAL, name=output.name, trial_dir=trial_dir, pin=pin, stop=stop)
    ended = [trial for trial in own_trials(search.study) if trial.state.is_finished()]
    janitor = Janitor(search)
    clear_debris(trial_dir)
    missing = config.trials - len(ended)
    if missing <= 0:
        return search.study
    variants = {
        key: Variant(
            load_datasets(own, space.run.data.in_memory),
            own.train_rows,
            own.shards["train"],
            pins(own.shards, space.run) | ({} if receivers is None else {"receivers": dict(receivers)}),
        )
        for key, own in files.items()
    }
    os.environ["TUNE_DISABLE_STRICT_METRIC_CHECKING"] = "1"  # a trial may fail before it has any: the study is told
    scheduler = make_scheduler(config, total_steps(longest_run(space), max(own.train_rows for own in files.values())))
    replay(scheduler, ended)
    driver = tune.with_parameters(
        drive_trial,
        space=space,
        variants=variants,
        gpus_per_worker=plan.worker_gpus,
        trial_dir=trial_dir,
        served=served,
    )
    tuner = tune.Tuner(
        tune.with_resources(driver, DRIVER_RESOURCES),
        tune_config=tune.TuneConfig(
            search_alg=search,
            scheduler=scheduler,
            num_samples=missing,
            max_concurrent_trials=plan.max_concurrent_trials,
            trial_dirname_creator=lambda trial: f"trial-{trial.config[NUMBER]}",
            trial_name_creator=lambda trial: f"trial-{trial.config[NUMBER]}",
        ),
        run_config=tune.RunConfig(
            name=time.strftime("%Y%m%d-%H%M%S"),
            storage_path=str(output / "tune"),
            verbose=1,
            stop=stop,
            callbacks=[janitor, *progress.trackers(config, output)],
            progress_reporter=progress.table(space),
            failure_config=tune.FailureConfig(max_failures=config.max_failures),
        ),
    )
    with stop.searching(config.time_budget_minutes):
        tuner.fit()
    if not stop.taken:
        keep_journal(output / JOURNAL)
    stop.check(complete=sum(trial.state.is_finished() for trial in own_trials(search.study)) >= config.trials)
    clear_debris(trial_dir)
    janitor.tidy()
    return search.study


def tidy_at_last(space: SpaceFile, output: Place) -> None:
    """Keep to the checkpoint budget once more when a while has passed: a stopped trial's worker may have saved since."""
    Janitor(
        StudySearch(space, journal=output / JOURNAL, name=output.name, trial_dir=output / "trials")
    ).tidy_if_reached()
