"""The checkpoint budget of a sweep: over all of its trials the best few are kept, and each running trial's last."""

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
from latentwire.tuning.results import within_limits
from latentwire.tuning.searcher import StudySearch
from latentwire.tuning.study import directory_of, evaluations, own_trials


class CheckpointBudget(Callback):
    """Keeps the ``tune.keep_checkpoints`` best by ``tune.metric``, those within ``tune.constraints`` first.

    A trial's own worker keeps its best and its last; what of these is not among the best of the sweep goes when the trial
    has ended, and before that unless it is its last, from which it would go on. A failed one keeps
    its last too, from which another may take it up. A worker runs on for a while when its trial has
    been stopped; what it saves then the study never hears of, and it counts for nothing. Scores are those in the
    checkpoints' manifests, so a driver that was killed and started again keeps the same ones.
    """

    def __init__(self, search: StudySearch) -> None:
        """``search``: whose study says which trials run."""
        self.search = search
        self.ended: set[int] = set()
        """Trials that have nothing left to delete: a sweep of a thousand is not walked through at every report."""

    def tidy(self) -> None:
        """Delete what nothing needs any more."""
        config, folder = self.search.space.tune, self.search.trial_dir
        own = own_trials(self.search.study)
        states = {trial.number: trial.state for trial in own}
        told = {
            trial.number: {step_checkpoints.step_name(report["step"]) for report in evaluations(trial)} for trial in own
        }
        open_trials = [trial for trial in own if trial.number not in self.ended]
        found = {t.number: step_checkpoints.finished(trial_path(folder, directory_of(t))) for t in open_trials}
        every = [path for number, paths in found.items() for path in paths if path.name in told[number]]
        best = set(sorted(every, key=lambda path: _rank(path, config), reverse=True)[: config.keep_checkpoints])
        for number, paths in found.items():
            running = states[number] in (TrialState.RUNNING, TrialState.WAITING)
            goes_on = running or states[number] is TrialState.FAIL
            for path in paths[: -1 if goes_on else None]:
                if path not in best and (path.name in told[number] or not running):
                    checkpoints.remove(path)
            if not running and not (goes_on and paths) and not best & set(paths):
                self.ended.add(number)

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """After every evaluation of a trial."""
        self.tidy_if_reached()

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """After a trial's end."""
        self.tidy_if_reached()

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """After a trial's failure."""
        self.tidy_if_reached()

    def tidy_if_reached(self) -> None:
        """What an error here would end is the whole sweep; the next call does what this one could not."""
        try:
            self.tidy()
        except StorageError as error:
            print(f"checkpoints not tidied this time: {error}", file=sys.stderr, flush=True)


def clear_debris(trial_dir: Place) -> int:
    """Delete what dead processes left half written or half deleted; returns how many. Only while no trial runs."""
    return sum(
        step_checkpoints.clear_debris(folder) for folder in children(trial_dir) if folder.name.startswith("trial-")
    )


def bytes_in(folders: Iterable[Place]) -> int:
    """Bytes of all files under some directories."""
    return sum(size for folder in folders for size in files_below(folder).values())


def _rank(path: Place, config: TuneConfig) -> tuple[bool, float]:
    metrics = step_checkpoints.metrics_of(path)
    return within_limits(metrics, config), step_checkpoints.score(metrics, config.metric, config.mode)
