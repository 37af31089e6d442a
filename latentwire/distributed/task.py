"""A trial's work as it is sent to its workers, and the cause of a failure as they leave it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ray.train

from latentwire.config import RunConfig
from latentwire.distributed.worker_output import log_file
from latentwire.receivers.memory import is_out_of_memory
from latentwire.storage import Place, text_if_there, write_text

EARLIER = "earlier_evaluations"
"""Key of the reports before the one that a resumed trial makes again, as JSON."""
ERROR_FILE = "error.txt"
"""File in which a trial's driver or worker leaves the cause of a failure."""
OUT_OF_MEMORY = "out of memory with"
"""Beginning of the cause where memory ran out; the size of the run follows."""


@dataclass(frozen=True)
class WorkerTask:
    """The work of one trial's workers, the same for each of them."""

    run: RunConfig
    pins: dict[str, Any]
    """Hashes that the metrics depend on."""
    train_rows: int
    train_shards: Place
    """Directory of the training rows: a wire keeps which documents it has trained on."""
    began: float
    """When the trial began, in seconds since 1970."""
    folder: Place
    """Directory of the trial's checkpoints."""
    metric: str
    mode: str
    """``max`` or ``min``: which values of ``metric`` the kept checkpoints have."""
    gpus: float
    """GPUs of one worker."""
    served: Any
    """Replicas of the receivers; None where the workers hold their own."""
    stage: str = ""
    """Name and place of the stage that this is, where the run has several."""
    output: Place | None = None
    """Directory whose log has the workers' output; None: ``folder``."""
    rows: Mapping[str, Any] | None = None
    """Iterators over ``train`` and ``dev`` for a lone worker; None where Ray Train hands them out."""

    @property
    def home(self) -> Place:
        """The directory of the trial that the workers belong to."""
        return self.output or self.folder


def leave_cause(path: Place, run: RunConfig, error: BaseException) -> None:
    """Write why a trial failed, how large it was where that is why, and which file has its output."""
    # Train wraps what stopped its controller.
    failure = getattr(error, "controller_failure", error)
    lines = str(failure).strip().splitlines() or [type(failure).__name__]
    # A worker's error comes as a traceback, whose last line names it.
    is_traceback = isinstance(error, ray.train.WorkerGroupError)
    cause = lines[-1] if is_traceback else " ".join(lines)
    if is_out_of_memory(error) and OUT_OF_MEMORY not in cause:  # a stage's cause has its own size
        cause = f"{OUT_OF_MEMORY} {size_of(run)}: {cause}"
    # worker_failures: rank → error. Of workers that failed together the lowest rank's output is named.
    log = log_file(path, min(getattr(error, "worker_failures", None) or [0]))
    if log is not None and log.exists():
        cause = f"{cause}; output: {log}"
    write_text(path / ERROR_FILE, cause)


def cause_left(path: Place) -> str | None:
    """Return why the last attempt at a run failed, where one did."""
    return text_if_there(path / ERROR_FILE)


def size_of(run: RunConfig) -> str:
    """Summarise in one line what determines a run's memory."""
    training, encoder = run.training, run.encoder
    length = f"latent_len {encoder.latent_len}"
    if encoder.tokens_per_latent:
        length = f"{encoder.tokens_per_latent} tokens per latent"
    receivers = " and ".join(f"{receiver.model} ({receiver.dtype})" for receiver in run.receivers)
    return (
        f"{training.measure} over {training.num_workers} worker(s) in {training.accumulation} part(s), "
        f"sequential_models {str(training.sequential_models).lower()}, {length}, d_z {encoder.d_z}, {receivers}"
    )
