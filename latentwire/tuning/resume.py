"""A sweep's own record of its space, and how it goes on after a death or with more trials."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping

from optuna.trial import TrialState

from latentwire.config import SweepConfig
from latentwire.config.knobs import paths_with
from latentwire.config.overrides import assigned
from latentwire.config.resolve import ConfigError, load_space
from latentwire.distributed.task import ERROR_FILE
from latentwire.distributed.trial import trial_path
from latentwire.planning.resolved import objectives
from latentwire.storage import Place, delete, local, rename
from latentwire.tuning import study as studies
from latentwire.tuning.reruns import RERUNS
from latentwire.tuning.space_file import SPACE_FILE
from latentwire.tuning.study import CAUSE, JOURNAL, open_study, own_trials, read_study

CHANGEABLE = paths_with("may_change", "resumed sweep", SweepConfig)
"""Paths that a resumed sweep may change: none that its trials are compared by."""
RESULTS = "results.json"
"""The scores in the directory of a sweep that came to its end."""


def read_space(output: Place, assignments: list[str]) -> SweepConfig:
    """Return the space of a sweep that is to go on, with ``PATH=VALUE`` assignments laid over it.

    Raises :class:`~latentwire.config.resolve.ConfigError` where there is no sweep, and for
    assignments that would make its trials incomparable.
    """
    if not (output / SPACE_FILE).is_file():
        raise ConfigError(
            f"a sweep's directory must hold {SPACE_FILE}, got {output}, which does not; name one that `latentwire tune` "
            f"wrote (a single run has its scores in results.json, and no report)"
        )
    overrides = assigned(assignments)
    for path in overrides:
        if path not in CHANGEABLE:
            raise ConfigError(
                f"a resumed sweep keeps its space; only {', '.join(CHANGEABLE)} can change, got "
                f"{path}. For another space start a new sweep with --set tune.warm_start={output}"
            )
    with local(output / SPACE_FILE) as file:
        return load_space(file, overrides)


def is_finished(space: SweepConfig, output: Place) -> bool:
    """Return whether a sweep has all its trials and its results.

    Nothing is written: another driver may have it.
    """
    if not (output / RESULTS).exists():
        return False
    with read_study(output / JOURNAL, output.name, objectives(space)) as study:
        return sum(trial.state.is_finished() for trial in own_trials(study)) >= space.tune.trials


def has_failed(space: SweepConfig, output: Place) -> bool:
    """Return whether a sweep's search or re-runs have failed trials; nothing is written."""
    for folder, directed in _folders(space, output):
        with read_study(folder / JOURNAL, folder.name, directed) as study:
            if own_trials(study, (TrialState.FAIL,)):
                return True
    return False


def retry_failed(space: SweepConfig, output: Place) -> list[str]:
    """Enqueue the failed trials of a sweep and its re-runs again; returns a line for each.

    A new trial of the same values goes on in the failed one's directory, from its last checkpoint.
    Only while no driver runs.
    """
    lines: list[str] = []
    for folder, directed in _folders(space, output):
        study = open_study(folder / JOURNAL, folder.name, directed)
        for number, failed in studies.retry_failed(study).items():
            # Else the old cause would be taken for the new trial's, should that one leave none.
            delete(trial_path(folder / "trials", studies.directory_of(failed)) / ERROR_FILE)
            cause = failed.user_attrs.get(CAUSE, "no cause is known")
            lines.append(
                f"{folder.name}: trial {failed.number} is retried as trial {number}; it failed by: {cause}"
            )
        studies.keep_journal(folder / JOURNAL)
    return lines


def _folders(space: SweepConfig, output: Place) -> Iterator[tuple[Place, Mapping[str, str]]]:
    """Yield directory and objectives of a sweep's search, and of its re-runs if there are any."""
    # Re-runs are compared by the metric alone.
    first = {space.tune.metric: space.tune.mode}
    for folder, directed in ((output, objectives(space)), (output / RERUNS, first)):
        if (folder / JOURNAL).exists():
            yield folder, directed


def set_aside(export: Place) -> None:
    """Give an earlier winner's export another name: with more trials there may be a better one."""
    if export.exists():
        rename(export, time.strftime(f"{export.name}-until-%Y%m%d-%H%M%S"))
