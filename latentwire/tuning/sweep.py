"""The search of a sweep: files once for all trials, then Tune with Optuna and a scheduler over them."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping
from typing import Any

import optuna
from optuna.trial import FrozenTrial
from ray import tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, MedianStoppingRule, TrialScheduler
from ray.tune.stopper import CombinedStopper

from latentwire.config import SweepConfig, TuneConfig
from latentwire.config.resolve import last_stage
from latentwire.distributed.controller import dead_groups_removed
from latentwire.distributed.driver_log import LOG
from latentwire.distributed.sweep_files import (
    Files,
    common_protocol_hash,
    compared_on,
    load_datasets,
)
from latentwire.distributed.trial import NUMBER, Variant, drive_trial
from latentwire.evaluation.protocol import pins
from latentwire.planning.planner import Plan
from latentwire.planning.variants import most_steps
from latentwire.storage import Place
from latentwire.tuning import console
from latentwire.tuning.checkpoint_budget import CheckpointBudget, clear_debris
from latentwire.tuning.searcher import StudySearch
from latentwire.tuning.steering import Steering
from latentwire.tuning.stopping import Stop
from latentwire.tuning.study import JOURNAL, evaluations, keep_journal, own_trials

DRIVER_RESOURCES = {"node:__internal_head__": 0.001}
"""Resources of a trial's driver: a sliver of one that every head has. Drivers must not take the CPUs that
their own workers need (two of them would deadlock two cores), and a cluster needs nothing declared for this."""


class MedianRule(MedianStoppingRule):
    """Ray's rule, which cannot do with a trial that ends before it has reported anything."""

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """Leave out a trial that has nothing to be compared by."""
        if self._time_attr in result and self._metric in result:
            super().on_trial_complete(tune_controller, trial, result)


class Earlier:
    """Stands for a trial of a driver that is gone, before a scheduler."""

    def __init__(self, number: int) -> None:
        """Take the name of the study's trial ``number``."""
        self.trial_id, self.status = f"earlier-{number}", "TERMINATED"


class NothingRuns:
    """Stands for Tune's controller meanwhile."""

    def get_live_trials(self) -> list[Any]:
        """Return no trials: those of a driver that is gone do not run."""
        return []


def replay(scheduler: TrialScheduler, ended: Iterable[FrozenTrial]) -> None:
    """Show a fresh scheduler what ended trials reported, up to where it would stop one: it compares those to come with them too."""
    controller: Any = NothingRuns()
    for trial in ended:
        stand_in: Any = Earlier(trial.number)
        scheduler.on_trial_add(controller, stand_in)
        for report in evaluations(trial):
            # A live trial would have ended here; a scheduler is told nothing of one that it stopped.
            if scheduler.on_trial_result(controller, stand_in, report) == TrialScheduler.STOP:
                break


def make_scheduler(config: TuneConfig, steps: int) -> TrialScheduler:
    """Build the scheduler that stops trials early, by training steps.

    All are compared on the same development rows. ``steps``: of the longest trial, since ASHA stops every trial that has done as many.
    """
    compared: dict[str, Any] = {"time_attr": "step", "metric": config.metric, "mode": config.mode}
    grace = min(config.grace_steps, steps)  # ASHA refuses a first rung above its last
    if config.scheduler == "asha":
        return ASHAScheduler(
            max_t=steps, grace_period=grace, reduction_factor=config.reduction_factor, **compared
        )
    if config.scheduler == "median":
        return MedianRule(grace_period=grace, **compared)
    return FIFOScheduler()


def run_sweep(
    space: SweepConfig,
    plan: Plan,
    files: dict[str, Files],
    output: Place,
    receivers: Mapping[str, str] | None = None,
    served: Any = None,
    stop: Stop | None = None,
    *,
    takes_orders: bool = False,
) -> optuna.Study:
    """Search the space until its study has ``tune.trials`` finished trials; everything is written under ``output``.

    What the study holds already counts, and trials that a driver which died left unfinished go on from their checkpoints.
    Trials that fail are told to the study, not raised. ``receivers``: hashes that their weights must have. ``served``: the
    replicas that trials share, where they do. ``stop``: may end the search before; then trials that run are cut, stay
    unfinished in the study, and :class:`~latentwire.tuning.stopping.SweepStopped` is raised. ``takes_orders``: those of
    ``output`` are carried out meanwhile, and may change how many trials there are.
    """
    stop = stop or Stop()
    config, trial_dir = space.tune, output / "trials"
    pin, run = common_protocol_hash(space, compared_on(files)), last_stage(space.run)
    search = StudySearch(
        space,
        journal=output / JOURNAL,
        name=output.name,
        trial_dir=trial_dir,
        protocol=pin,
        stop=stop,
    )
    steering = Steering(search, output) if takes_orders else None
    if steering is not None:
        steering.look(now=True)
        config = search.space.tune  # an order may have changed it
    ended = [trial for trial in own_trials(search.study) if trial.state.is_finished()]
    budget = CheckpointBudget(search)
    clear_debris(trial_dir)
    missing = config.trials - len(ended)
    if steering is not None and (missing <= 0 or steering.ending is not None):
        steering.finish()
        return search.study
    if missing <= 0:
        return search.study
    if steering is not None:
        steering.stop_if_all_is_paused()
        stop.check(complete=False)
    receiver_pins = {} if receivers is None else {"receivers": dict(receivers)}
    variants = {}
    for key, variant_files in files.items():
        variants[key] = Variant(
            load_datasets(variant_files, space.run.data.in_memory),
            variant_files.train_rows,
            variant_files.shards["train"],
            pins(variant_files.shards, run) | receiver_pins,
        )
    # A trial may fail before it has any metric: the study is told.
    os.environ["TUNE_DISABLE_STRICT_METRIC_CHECKING"] = "1"
    # Tune's newer output prints a table of its own whatever it is told.
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"
    # A trial's steps are those of its last stage, which alone is scored.
    scored = {key: each for key, each in files.items() if each.is_scored}
    trains = {key: each.shards["train"] for key, each in scored.items()}
    steps = most_steps(space, max(each.train_rows for each in scored.values()), trains)
    scheduler = make_scheduler(config, steps)
    replay(scheduler, ended)
    driver = tune.with_parameters(
        drive_trial,
        space=space,
        variants=variants,
        gpus_per_worker=plan.worker_gpus,
        trial_dir=trial_dir,
        served=served,
    )
    trackers = console.trackers(config, output)
    LOG.divert(LOG.verbose, LOG.training)  # Tune and they have been imported since
    screen = console.SweepConsole(search, steps, LOG.path)
    if steering is not None:
        steering.say = screen.say
    tuner = tune.Tuner(
        tune.with_resources(driver, DRIVER_RESOURCES),
        tune_config=tune.TuneConfig(
            search_alg=search,
            scheduler=scheduler,
            num_samples=missing if steering is None else -1,  # orders may add some
            max_concurrent_trials=plan.max_concurrent_trials,
            trial_dirname_creator=lambda trial: f"trial-{trial.config[NUMBER]}",
            trial_name_creator=lambda trial: f"trial-{trial.config[NUMBER]}",
        ),
        run_config=tune.RunConfig(
            name=time.strftime("%Y%m%d-%H%M%S"),
            storage_path=str(output / "tune"),
            verbose=0,
            stop=stop if steering is None else CombinedStopper(stop, steering),
            callbacks=[budget, screen, *trackers, *([] if steering is None else [steering])],
            failure_config=tune.FailureConfig(max_failures=config.max_failures),
        ),
    )
    with stop.searching(config.time_budget_minutes), screen.shown(), dead_groups_removed():
        tuner.fit()
    if not stop.taken:
        keep_journal(output / JOURNAL)
    ended_now = sum(trial.state.is_finished() for trial in own_trials(search.study))
    stop.check(complete=ended_now >= search.space.tune.trials)
    if steering is not None:
        steering.finish()
    clear_debris(trial_dir)
    budget.tidy()
    return search.study


def tidy_at_last(space: SweepConfig, output: Place) -> None:
    """Keep to the checkpoint budget once more when a while has passed: a stopped trial's worker may have saved since."""
    CheckpointBudget(
        StudySearch(space, journal=output / JOURNAL, name=output.name, trial_dir=output / "trials")
    ).tidy_if_reached()
