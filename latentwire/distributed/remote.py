"""Work that needs a worker's resources, as a task on the cluster."""

from __future__ import annotations

from typing import Any

import ray
from ray.exceptions import RayTaskError

from latentwire.config import RunConfig
from latentwire.planning.forecast import matrix_product_rate


def on_cluster(run: RunConfig, gpus: float, function: Any, *arguments: Any) -> Any:
    """Run ``function`` in a task with one worker's resources: the head may have no GPU."""
    training = run.training
    task = ray.remote(
        num_cpus=training.cpus_per_worker,
        num_gpus=gpus,
        resources=training.worker_resources,
    )(function)
    try:
        return ray.get(task.remote(*arguments))
    except RayTaskError as error:
        # A user's error reads here as it would without Ray; the remote traceback stays chained.
        raise error.cause from error


def measure_rate(run: RunConfig, gpus: float) -> float:
    """Measure FLOP/s of a matrix product on one worker's resources, in a task of its own."""
    return float(on_cluster(run, gpus, matrix_product_rate, run.training.cpus_per_worker))
