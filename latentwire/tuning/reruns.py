"""Re-runs of a sweep's best trials with fresh seeds: the best mean wins."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from latentwire.config import IntDimension, SamplerConfig, SweepConfig
from latentwire.distributed.sweep_files import Files
from latentwire.planning.planner import Plan
from latentwire.storage import Place
from latentwire.tuning.results import Best, SweepError, find_best, within_limits
from latentwire.tuning.stopping import Stop
from latentwire.tuning.study import JOURNAL, clone_record, evaluations, open_study, own_trials
from latentwire.tuning.sweep import run_sweep

SEED = "training.seed"
RERUNS = "finals"
"""Directory of the re-runs in a sweep's directory, and name of their study."""


@dataclass(frozen=True)
class Finalist:
    """One of a sweep's best trials: its score in the search, and those of its fresh seeds.

    Failed re-runs are missing.
    """

    trial: int
    score: float
    fresh: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean over the fresh seeds; not a number where all have failed."""
        return statistics.mean(self.fresh) if self.fresh else float("nan")


def rerun_best(
    space: SweepConfig,
    plan: Plan,
    files: dict[str, Files],
    output: Place,
    study: optuna.Study,
    served: Any = None,
    stop: Stop | None = None,
) -> tuple[Best, list[Finalist]]:
    """Train the finalists again with fresh seeds, and choose the winner by the best mean.

    The re-runs have a study of their own, which a restart goes on with. The winner's checkpoint is
    the best of its re-runs. The best trial of the search wins as it is where there are no finalists
    (none asked for, or no trial ran to its end), or no re-run left a checkpoint. Raises
    :class:`~latentwire.tuning.results.SweepError` where no checkpoint is left.
    """
    chosen = best_trials(study, space)
    if not chosen:
        return find_best(study, space.tune), []
    again = rerun_space(space, chosen)
    # Re-runs of former finalists count as trials of the study too, beside those of the present ones.
    trials = again.tune.trials + _others(again, output / RERUNS)
    again = again.model_copy(update={"tune": again.tune.model_copy(update={"trials": trials})})
    rerun_study = run_sweep(again, plan, files, output / RERUNS, served=served, stop=stop)
    complete = own_trials(rerun_study, (TrialState.COMPLETE,))
    finalists, numbers = [], {}
    for trial in chosen:
        # A re-run is known by its values: those of the trial, and a seed.
        reruns = [rerun for rerun in complete if _without_seed(rerun.params) == trial.params]
        scores = tuple(float(rerun.values[0]) for rerun in reruns)
        finalists.append(Finalist(trial.number, float(trial.values[0]), scores))
        numbers[trial.number] = {rerun.number for rerun in reruns}
    with_scores = [finalist for finalist in finalists if finalist.fresh]
    if not with_scores:
        try:
            return find_best(rerun_study, space.tune), finalists
        except SweepError as error:
            print(
                f"re-runs: the best trial of the search wins as it is, since of its fresh runs: {error}",
                flush=True,
            )
            return find_best(study, space.tune), finalists
    winner = space.tune.best_of(with_scores, key=lambda finalist: finalist.mean)
    # The mean chooses the values; the export is the best single run with them.
    best = find_best(rerun_study, space.tune, numbers[winner.trial])
    return Best(winner.trial, best.step, winner.mean, best.checkpoint, best.values), finalists


def best_trials(study: optuna.Study, space: SweepConfig) -> list[FrozenTrial]:
    """Return the ``tune.finalists`` best complete trials within the limits, best first.

    Of trials with the same values only the best one counts. Clones are left out: a fresh seed would
    begin without the wire that they began with.
    """
    complete = []
    for trial in own_trials(study, (TrialState.COMPLETE,)):
        # By its last evaluation, as the sampler is told.
        if within_limits(evaluations(trial)[-1], space.tune) and not clone_record(trial):
            complete.append(trial)
    complete.sort(key=lambda trial: trial.values[0], reverse=space.tune.mode == "max")
    distinct: list[FrozenTrial] = []
    for trial in complete:
        if trial.params not in [better.params for better in distinct]:
            distinct.append(trial)
    return distinct[: space.tune.finalists]


def rerun_space(space: SweepConfig, chosen: list[FrozenTrial]) -> SweepConfig:
    """Return the space of the re-runs: the chosen trials' values, each with fresh seeds.

    None is stopped early.
    """
    first = space.run.training.seed + 1
    fresh = range(first, first + space.tune.final_seeds)
    points = []
    for trial in chosen:
        points += [trial.params | {SEED: seed} for seed in fresh]
    tune = space.tune.model_copy(
        update={
            "trials": len(points),
            "start_with": tuple(points),
            "sampler": SamplerConfig(name="random"),
            "scheduler": "none",
            "objectives": {},
            "warm_start": None,
            "keep_checkpoints": len(points),  # the best mean wins, and its best may not be the best
        }
    )
    seeds = IntDimension(type="int", low=0, high=first + space.tune.final_seeds)
    return space.model_copy(update={"tune": tune, "search": space.search | {SEED: seeds}})


def _others(space: SweepConfig, output: Place) -> int:
    """Count the trials in the re-runs' study whose values no finalist has any more.

    With more trials in the search, its best ones may be others.
    """
    if not (output / JOURNAL).exists():
        return 0
    study = open_study(output / JOURNAL, output.name, {space.tune.metric: space.tune.mode})
    # A trial that waits has drawn nothing yet; what it was enqueued with is an attribute of Optuna's.
    drawn = [trial.params or trial.system_attrs.get("fixed_params") for trial in own_trials(study)]
    return sum(values not in space.tune.start_with for values in drawn)


def _without_seed(params: dict[str, Any]) -> dict[str, Any]:
    return {path: value for path, value in params.items() if path != SEED}
