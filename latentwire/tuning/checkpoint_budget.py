"""Checkpoint budget of a sweep: the best few of all its trials, and each running trial's last."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from optuna.trial import TrialState
from ray.tune import Callback

from latentwire.config import TuneConfig
from latentwire.distributed.trial import trial_path
from latentwire.storage import Place, StorageError, children, files_below
from latentwire.training import checkpoints, step_checkpoints
from latentwire.tuning.clones import PREFIX
from latentwire.tuning.results import within_limits
from latentwire.tuning.searcher import StudySearch
from latentwire.tuning.study import directory_of, evaluations, own_trials


class CheckpointBudget(Callback):
    """Keeps the ``tune.keep_checkpoints`` best by ``tune.metric``, those within the limits first.

    The limits are ``tune.constraints``. A trial's own worker keeps its best and its last
    checkpoint. Of these, what is not among the best of the sweep is deleted when the trial has
    ended. Before that the last one stays, since the trial would go on from it. A failed trial keeps
    its last too, for a trial that retries it.

    A stopped trial's worker runs on for a while. The study never hears of what it saves then, and
    that counts for nothing. Scores are those in the checkpoints' manifests, so a driver that was
    killed and started again keeps the same ones.
    """

    def __init__(self, search: StudySearch) -> None:
        """Keep the budget of ``search``, whose study says which trials run."""
        self.search = search
        self.ended: set[int] = set()
        """Trials that have nothing left to delete, so that a sweep of a thousand is not walked
        through at every report."""

    def tidy(self) -> None:
        """Delete the checkpoints that nothing needs any more."""
        config, folder = self.search.space.tune, self.search.trial_dir
        trials = [t for t in own_trials(self.search.study) if t.number not in self.ended]
        paths_of: dict[int, list[Place]] = {}
        reported: list[Place] = []
        for trial in trials:
            paths = step_checkpoints.finished(trial_path(folder, directory_of(trial)))
            # A directory may also hold what the study has not heard of: it is not ranked.
            names = {step_checkpoints.step_name(report["step"]) for report in evaluations(trial)}
            paths_of[trial.number] = paths
            reported += [path for path in paths if path.name in names]
        ranked = sorted(reported, key=lambda path: _rank(path, config), reverse=True)
        best = set(ranked[: config.keep_checkpoints])
        for trial in trials:
            paths = paths_of[trial.number]
            running = trial.state in (TrialState.RUNNING, TrialState.WAITING)
            goes_on = running or trial.state is TrialState.FAIL
            # Paths are sorted by step; from the last one an unfinished trial would go on.
            for path in paths[:-1] if goes_on else paths:
                # What a running trial has saved and not reported yet may be its best.
                if path not in best and (path in reported or not running):
                    checkpoints.remove(path)
            # Nothing of it is left that a later report of another trial could push out.
            if not running and not (goes_on and paths) and not best & set(paths):
                self.ended.add(trial.number)

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """Tidy after every evaluation of a trial."""
        self.tidy_if_reached()

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Tidy after a trial's end."""
        self.tidy_if_reached()

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Tidy after a trial's failure."""
        self.tidy_if_reached()

    def tidy_if_reached(self) -> None:
        """Tidy, and leave it to the next call where the store does not answer.

        An error here would end the whole sweep.
        """
        try:
            self.tidy()
        except StorageError as error:
            print(f"checkpoints not tidied this time: {error}", file=sys.stderr, flush=True)


def clear_debris(trial_dir: Place) -> int:
    """Delete what dead processes left half written or half deleted; returns how many.

    Only while no trial runs.
    """
    kinds = ("trial-", PREFIX)
    folders = [folder for folder in children(trial_dir) if folder.name.startswith(kinds)]
    return sum(step_checkpoints.clear_debris(folder) for folder in folders)


def bytes_in(folders: Iterable[Place]) -> int:
    """Add up the bytes of all files under some directories."""
    return sum(sum(files_below(folder).values()) for folder in folders)


def _rank(path: Place, config: TuneConfig) -> tuple[bool, float]:
    # True sorts above False: within the limits comes before any score beyond them.
    metrics = step_checkpoints.metrics_of(path)
    score = step_checkpoints.score(metrics, config.metric, config.mode)
    return within_limits(metrics, config), score
