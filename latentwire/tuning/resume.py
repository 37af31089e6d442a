"""A sweep's own record of what it searches, and how it goes on after its driver died or is given more trials."""

from __future__ import annotations

import time

from latentwire.config import SpaceFile
from latentwire.config.resolve import ConfigError, load_space
from latentwire.options import assigned
from latentwire.storage import Place, local, rename, write_text
from latentwire.tuning.searcher import objectives
from latentwire.tuning.study import JOURNAL, open_study, own_trials

SPACE_FILE = "space.json"
"""The resolved space in a sweep's directory."""
CHANGEABLE = (
    "tune.trials",
    "tune.max_concurrent_trials",
    "tune.time_budget_minutes",
    "tune.max_failures",
    "tune.keep_checkpoints",
)
"""What a resumed sweep may change: not what its trials are compared by."""


def write_space(space: SpaceFile, output: Place) -> None:
    """Keep the resolved space in the sweep's directory, whole or as it was."""
    write_text(output / SPACE_FILE, space.model_dump_json(indent=1))


def read_space(output: Place, assignments: list[str]) -> SpaceFile:
    """The space of a sweep that is to go on, with ``PATH=VALUE`` assignments laid over it.

    Raises :class:`~latentwire.config.resolve.ConfigError` where there is no sweep, and for assignments that would make its
    trials incomparable.
    """
    path = output / SPACE_FILE
    if not path.is_file():
        raise ConfigError(f"resume must name a sweep's directory (one with {SPACE_FILE}), got {output}")
    overrides = assigned(assignments)
    for name in overrides:
        if name not in CHANGEABLE:
            raise ConfigError(
                f"a resumed sweep keeps its space; only {', '.join(CHANGEABLE)} can change, got {name}. For another space "
                f"start a new sweep with --set tune.warm_start={output}"
            )
    with local(path) as file:
        return load_space(file, overrides)


def is_finished(space: SpaceFile, output: Place) -> bool:
    """Whether a sweep has all its trials and its results."""
    if not (output / "results.json").exists():
        return False
    study = open_study(output / JOURNAL, output.name, objectives(space))
    return sum(trial.state.is_finished() for trial in own_trials(study)) >= space.tune.trials


def set_aside(export: Place) -> None:
    """Give an earlier winner's export another name: with more trials there may be a better one, and nothing is lost."""
    if export.exists():
        rename(export, time.strftime(f"{export.name}-until-%Y%m%d-%H%M%S"))
