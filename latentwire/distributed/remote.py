"""Work that needs a worker's resources, as a task on the cluster."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import ray
from ray.exceptions import RayTaskError

from latentwire.config import RunConfig
from latentwire.data import shards
from latentwire.distributed.driver_log import LOG
from latentwire.distributed.worker_output import ProgressTeller, tell
from latentwire.evaluation import scoring
from latentwire.evaluation.progress import ScoringProgress
from latentwire.planning.forecast import matrix_product_rate
from latentwire.storage import Place
from latentwire.training import text_readers

SCORING = "scoring"
"""Name of a scoring among the work that reports its progress."""


def on_cluster(run: RunConfig, gpus: float, function: Any, *arguments: Any) -> Any:
    """Run ``function`` in a task with one worker's resources: the head may have no GPU."""
    return result_of(started(run, gpus, function, *arguments))


def started(run: RunConfig, gpus: float, function: Any, *arguments: Any) -> Any:
    """Start ``function`` in a task with one worker's resources; return the reference to its result."""
    training = run.training
    task = ray.remote(
        num_cpus=training.cpus_per_worker,
        num_gpus=gpus,
        resources=training.worker_resources,
    )(function)
    return task.remote(*arguments)


def result_of(reference: Any) -> Any:
    """Wait for a task of :func:`started`, and return its result."""
    try:
        return ray.get(reference)
    except RayTaskError as error:
        # A user's error reads here as it would without Ray; the remote traceback stays chained.
        raise error.cause from error


def score_and_export(
    run: RunConfig,
    gpus: float,
    checkpoint: Place,
    paths: Mapping[shards.ShardSplit, Place],
    export: Place,
) -> scoring.Scored:
    """Score and export a checkpoint by :func:`on_cluster`, with its progress shown here.

    The task is :func:`latentwire.evaluation.scoring.score_and_export`; text readers that its table
    needs are trained there. ``paths``: the run's shards.
    """
    bars: list[ScoringProgress] = []
    with ExitStack() as shown:

        def show(values: dict[str, Any]) -> None:
            if values["name"] != SCORING:
                return
            # A bar needs the number of all rows, which the task's first line of progress brings.
            if not bars:
                bars.append(shown.enter_context(ScoringProgress(values["total"])))
            # Lines say how far it is, and a bar takes steps; lines may be left out in between.
            bars[0].advance(values["what"], values["done"] - bars[0].done)

        shown.enter_context(LOG.listening(show))
        watch, tuned = ProgressTeller(SCORING), partial(text_readers.ready, paths=paths, say=tell)
        arguments = checkpoint, paths["validation"], export, watch, tuned
        return on_cluster(run, gpus, scoring.score_and_export, *arguments)


def measure_rate(run: RunConfig, gpus: float) -> float:
    """Measure FLOP/s of a matrix product on one worker's resources, in a task of its own."""
    return float(on_cluster(run, gpus, matrix_product_rate, run.training.cpus_per_worker))
