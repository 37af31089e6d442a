"""Waiting for room on the cluster: no failure of a trial, and never in silence.

Ray Train counts a start for which there was no room in time as a failure of its controller, like a
worker that died as it started. A limit on both together burns trials on a full cluster. Here the
first is no failure, and the second keeps its limit.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import Any

import ray
from ray.exceptions import RayError
from ray.train import ControllerError, TrainingFailedError
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.constants import (
    DEFAULT_WORKER_GROUP_START_TIMEOUT_S,
    WORKER_GROUP_START_TIMEOUT_S_ENV_VAR,
)
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError
from ray.train.v2._internal.execution.failure_handling import DefaultFailurePolicy, FailureDecision
from ray.train.v2.api.config import FailureConfig

from latentwire.distributed.controller import PreemptionThread, own_actor, run_here
from latentwire.distributed.worker_output import tell
from latentwire.errors import UserError
from latentwire.storage import StorageError


def is_lasting(error: BaseException) -> bool:
    """Return whether a run would fail again in the same way: it, or a worker, met a user's error.

    A store that did not answer may answer the next time.
    """
    failures = [error, *getattr(error, "worker_failures", {}).values()]
    for failure in failures:
        cause = getattr(failure, "_base_exc", failure)  # Train wraps what a worker raised
        if isinstance(cause, UserError) and not isinstance(cause, StorageError):
            return True
    return False


class PatientPolicy(DefaultFailurePolicy):
    """Ray Train's policy, but no room is no failure, and a lasting failure is not tried again."""

    def __init__(
        self, failure_config: FailureConfig, name: str, needed: Mapping[str, float]
    ) -> None:
        """Begin without a wait; ``name``: of the run, ``needed``: resources of all its workers together."""
        super().__init__(failure_config)
        self.name, self.needed = name, dict(needed)
        self._waits_since: float | None = None

    def make_decision(self, training_failed_error: TrainingFailedError) -> FailureDecision:
        """Decide whether to try again: always where there was no room, else as Ray Train does."""
        if isinstance(training_failed_error, ControllerError) and isinstance(
            training_failed_error.controller_failure, WorkerGroupStartupTimeoutError
        ):
            now = time.monotonic()
            # The first time-out comes when it has waited for Train's limit already.
            if self._waits_since is None:
                limit = os.environ.get(
                    WORKER_GROUP_START_TIMEOUT_S_ENV_VAR, DEFAULT_WORKER_GROUP_START_TIMEOUT_S
                )
                self._waits_since = now - float(limit)
            tell(self._line(now - self._waits_since))
            return FailureDecision.RETRY
        # After any other failure a wait is counted anew.
        self._waits_since = None
        if is_lasting(training_failed_error):
            return FailureDecision.RAISE
        return super().make_decision(training_failed_error)

    def _line(self, seconds: float) -> str:
        try:
            there = room(self.needed)
        except RayError as error:  # the line must not end the trial
            there = f"the cluster does not say what it has: {error}"
        return f"{self.name} has waited {seconds:.0f} s for {amounts(self.needed)}: {there}"


class PatientTrainer(TorchTrainer):
    """A TorchTrainer under :class:`PatientPolicy`, whose controller runs in the actor that fits it."""

    def _create_default_callbacks(self) -> list[Any]:
        callbacks = [*super()._create_default_callbacks(), PreemptionThread()]
        # Without datasets nothing is to be handed out: a lone worker has its rows already.
        left_out: list[type] = [] if self.datasets else [DatasetsCallback]
        # Outside an actor Ray's controller is one of its own, and so needs Ray's cleaner.
        if own_actor() is not None:
            left_out.append(PlacementGroupCleanerCallback)
        return [each for each in callbacks if not isinstance(each, tuple(left_out))]

    def _initialize_and_run_controller(self, **options: Any) -> Any:
        scaling = self.scaling_config
        per_worker = scaling.resources_per_worker or {}
        needed = {name: amount * scaling.min_workers for name, amount in per_worker.items()}
        name = str(self.run_config.name)
        options["failure_policy"] = PatientPolicy(self.run_config.failure_config, name, needed)
        run = super()._initialize_and_run_controller if own_actor() is None else run_here
        return run(**options)


def amounts(resources: Mapping[str, float]) -> str:
    """Return resources as a person reads them: ``4 CPU, 1 GPU``."""
    return ", ".join(f"{amount:g} {name}" for name, amount in resources.items())


def room(names: Mapping[str, float]) -> str:
    """Return what the cluster has of some resources, and how much of it is free now. Needs Ray."""
    there, free = ray.cluster_resources(), ray.available_resources()
    parts = [f"{there.get(name, 0.0):g} {name} ({free.get(name, 0.0):g} free)" for name in names]
    return f"the cluster has {', '.join(parts)}"
