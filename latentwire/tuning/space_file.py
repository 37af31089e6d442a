"""The resolved space in a sweep's directory."""

from __future__ import annotations

from latentwire.config import SweepConfig
from latentwire.storage import Place, write_text

SPACE_FILE = "space.json"
"""The resolved space in a sweep's directory."""


def write_space(space: SweepConfig, output: Place) -> None:
    """Write the resolved space into the sweep's directory, whole or not at all."""
    write_text(output / SPACE_FILE, space.model_dump_json(indent=1))


def with_trials(space: SweepConfig, trials: int) -> SweepConfig:
    """Return a space with another number of trials."""
    tune = space.tune.model_copy(update={"trials": trials})
    return space.model_copy(update={"tune": tune})
