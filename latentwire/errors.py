"""Every error that a user can cause, for the entry points to print as one line instead of a traceback."""

from __future__ import annotations

import sys

from latentwire.config.resolve import ConfigError
from latentwire.data.layout import LayoutError
from latentwire.data.sources import DataError
from latentwire.exports import CheckpointError
from latentwire.models.weights import ReceiverError
from latentwire.storage import StorageError
from latentwire.training.loop import TrainingError
from latentwire.tuning.planner import PlanError
from latentwire.tuning.results import SweepError
from latentwire.wire import WireError

USER_ERRORS = (
    ConfigError, LayoutError, DataError, ReceiverError, WireError, CheckpointError, TrainingError, PlanError, SweepError,
    StorageError,
)  # fmt: skip


def fail(error: Exception) -> int:
    """Print one clear error and return the exit status for it.

    What a Ray task raised comes with the task's traceback for a text; its cause has the one line.
    """
    while isinstance(cause := getattr(error, "cause", None), Exception):
        error = cause
    print(f"error: {error}", file=sys.stderr, flush=True)
    return 2
