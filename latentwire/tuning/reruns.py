"""The winner by fresh seeds: a sweep's best trials are trained again, and the best mean wins."""

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
from latentwire.tuning.study import JOURNAL, evaluations, open_study, own_trials
from latentwire.tuning.sweep import run_sweep

SEED = "training.seed"
RERUNS = "finals"
"""Directory of the finals in a sweep's."""


@dataclass(frozen=True)
class Finalist:
    """One of a sweep's best trials: its score in the search, and those of its fresh seeds (failed ones are missing)."""

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
    """Train the finalists with fresh seeds, in a study of their own that a restart goes on with; the best mean wins.

    The winner's checkpoint is the best of its fresh runs. Where there are no finalists (none asked for, or no trial ran to
    its end), or no fresh run came to a checkpoint, the best trial wins as it is. Raises
    :class:`~latentwire.tuning.results.SweepError` where no checkpoint is left.
    """
    chosen = best_trials(study, space)
    if not chosen:
        return find_best(study, space.tune), []
    wanted = rerun_space(space, chosen)
    trials = wanted.tune.trials + _others(wanted, output / RERUNS)
    wanted = wanted.model_copy(update={"tune": wanted.tune.model_copy(update={"trials": trials})})
    finals = run_sweep(wanted, plan, files, output / RERUNS, served=served, stop=stop)
    held = []
    for trial in chosen:
        own = [t for t in own_trials(finals, (TrialState.COMPLETE,)) if _without_seed(t.params) == trial.params]
        held.append((Finalist(trial.number, float(trial.values[0]), tuple(float(t.values[0]) for t in own)), own))
    standing = [(finalist, own) for finalist, own in held if own]
    if not standing:
        finalists = [finalist for finalist, _ in held]
        try:
            return find_best(finals, space.tune), finalists
        except SweepError as error:
            print(f"finals: the best trial of the search wins as it is, since of its fresh runs: {error}", flush=True)
            return find_best(study, space.tune), finalists
    winner, own = space.tune.best_of(standing, key=lambda item: item[0].mean)
    best = find_best(finals, space.tune, {trial.number for trial in own})
    return Best(winner.trial, best.step, winner.mean, best.checkpoint, best.values), [finalist for finalist, _ in held]


def best_trials(study: optuna.Study, space: SweepConfig) -> list[FrozenTrial]:
    """The ``tune.finalists`` best complete trials within the limits, best first; of trials with the same values the best one."""
    complete = [
        trial
        for trial in own_trials(study, (TrialState.COMPLETE,))
        if within_limits(evaluations(trial)[-1], space.tune)
    ]
    complete.sort(key=lambda trial: trial.values[0], reverse=space.tune.mode == "max")
    distinct = [trial for i, trial in enumerate(complete) if trial.params not in [t.params for t in complete[:i]]]
    return distinct[: space.tune.finalists]


def rerun_space(space: SweepConfig, chosen: list[FrozenTrial]) -> SweepConfig:
    """The space of the finals: the chosen trials' values as starting points with fresh seeds, none stopped early."""
    first = space.run.training.seed + 1
    points = [trial.params | {SEED: seed} for trial in chosen for seed in range(first, first + space.tune.final_seeds)]
    tune = space.tune.model_copy(
        update={
            "trials": len(points),
            "start_with": tuple(points),
            "sampler": SamplerConfig(name="random"),
            "scheduler": "none",
            "objectives": {},
            "warm_start": None,
            "keep_checkpoints": len(points),  # the best mean wins, whose own best may be no other's match
        }
    )
    seeds = IntDimension(type="int", low=0, high=first + space.tune.final_seeds)
    return space.model_copy(update={"tune": tune, "search": space.search | {SEED: seeds}})


def _others(space: SweepConfig, output: Place) -> int:
    """Return how many trials the finals' study has of finalists that are none any more.

    With more trials in the search, its best ones may be others.
    """
    if not (output / JOURNAL).exists():
        return 0
    study = open_study(output / JOURNAL, output.name, {space.tune.metric: space.tune.mode})
    drawn = [trial.params or trial.system_attrs.get("fixed_params") for trial in own_trials(study)]
    return sum(values not in space.tune.start_with for values in drawn)


def _without_seed(params: dict[str, Any]) -> dict[str, Any]:
    return {path: value for path, value in params.items() if path != SEED}
