"""Ray Train's controller in the process of a trial's driver, and what that saves.

By itself Ray gives every trial a process for Train's controller, for the queue by which Tune hears of
its reports, for a watch for nodes that are about to go, for a cleaner of placement groups, and two
that hand out rows. Each imports Ray Train before it can begin. Here the controller and the watch run
in the driver of the trial, reports need no queue, one thread of the sweep's driver cleans up for all
trials, and a lone worker reads its rows by itself (:func:`latentwire.distributed.trial.make_trainer`).
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import ray
import ray.tune
from ray._private.state import actors
from ray._raylet import PlacementGroupID
from ray.exceptions import RayError
from ray.experimental.internal_kv import _internal_kv_del as forget
from ray.experimental.internal_kv import _internal_kv_get as recall
from ray.experimental.internal_kv import _internal_kv_list as names_of
from ray.experimental.internal_kv import _internal_kv_put as note
from ray.train import Result
from ray.train.v2._internal.callbacks.preemption_callback import PreemptionCallback
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.preemption import PreemptionWatcher
from ray.train.v2._internal.execution.worker_group import WorkerGroup
from ray.train.v2._internal.execution.worker_group.placement_group_handle import (
    PlacementGroupHandle,
)
from ray.train.v2.api.callback import UserCallback
from ray.util.placement_group import PlacementGroup, remove_placement_group

GROUPS = "latentwire placement groups"
"""Namespace of the cluster's key-value store: placement group → the actor whose workers it holds."""
LOOK_SECONDS = 1.0
"""Seconds between two looks for groups whose actor has died."""


def own_actor() -> str | None:
    """Return the id of the actor that this process is, where it is one."""
    if not ray.is_initialized():  # to ask its context would start it
        return None
    actor_id: str | None = ray.get_runtime_context().get_actor_id()
    return actor_id


class NotedGroup(WorkerGroup):
    """A group of workers that notes its placement group as soon as there is one.

    Ray keeps a placement group until the job ends, whoever made it: an actor that dies leaves its own.
    """

    def _create_placement_group(self, *arguments: Any, **options: Any) -> PlacementGroupHandle:
        handle = super()._create_placement_group(*arguments, **options)
        # At once: an actor that dies while it waits for the group's resources leaves it too.
        note(handle.placement_group.id.hex(), own_actor(), namespace=GROUPS)
        return handle


class Controller(TrainController):
    """Ray Train's controller, whose placement groups can be found."""

    worker_group_cls = NotedGroup


def run_here(**options: Any) -> Result:
    """Run a controller in this process until its training has ended; return the result.

    ``options``: as Ray Train hands them to its controller. This process must be an actor.
    """
    controller = Controller(**options)
    asyncio.run(controller.run())
    return controller.get_result()


class TuneReport(UserCallback):
    """Reports to Tune what the first worker reports; for a controller in the process of the trial."""

    def after_report(
        self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any
    ) -> None:
        """Report, and wait until Tune has taken it."""
        ray.tune.report(metrics[0])  # one entry for each worker, by rank


class PreemptionThread(PreemptionCallback):
    """Ray Train's watch for nodes that are about to go, in a thread of the controller's process."""

    def after_worker_group_start(self, worker_group: Any) -> None:
        """Watch the nodes of these workers."""
        # Ray's version of this method, but the watcher is no actor. A group that failed as it began
        # was not shut down, and its watcher runs still.
        self._stop_watcher()
        ranks: dict[str, list[int]] = {}
        handles = {}
        for worker in worker_group.get_workers():
            rank = worker.distributed_context.world_rank
            ranks.setdefault(worker.metadata.node_id, []).append(rank)
            handles[rank] = worker.actor
        self._watcher = PreemptionWatcher(ranks, self._poll_interval_s, handles)

    def _stop_watcher(self) -> None:
        if self._watcher is not None:
            # Ray kills an actor here; this ends the watcher's thread.
            self._watcher._stop_event.set()
            self._watcher = None


# ---------------------------------------------------------------- placement groups of dead controllers


def is_dead(actor_id: str) -> bool:
    """Return whether the cluster knows that an actor has died."""
    return bool(actors(actor_id).get("State") == "DEAD")


def remove_dead_groups() -> list[str]:
    """Remove the noted groups whose actor is known to have died; return their ids.

    A cluster that is too busy to say anything about an actor has not said that it died.
    """
    return _remove_where(is_dead)


def remove_own_groups() -> list[str]:
    """Remove the noted groups of this job's actors, living or not; return their ids."""
    job_id = ray.get_runtime_context().get_job_id()  # the end of the id of each of its actors
    return _remove_where(lambda actor_id: actor_id.endswith(job_id))


def _remove_where(is_over: Callable[[str], bool]) -> list[str]:
    removed = []
    for group in [name.decode() for name in names_of("", namespace=GROUPS)]:
        # None: another driver has removed it since the names were listed.
        actor_id = recall(group, namespace=GROUPS)
        if actor_id is None or not is_over(actor_id.decode()):
            continue
        # Removed before it is forgotten: a death in between leaves the note, and no group is lost.
        remove_placement_group(PlacementGroup(PlacementGroupID(bytes.fromhex(group))))
        forget(group, namespace=GROUPS)
        removed.append(group)
    return removed


@contextmanager
def dead_groups_removed() -> Iterator[None]:
    """Remove groups whose actor has died while the block runs, and all of this job's after it.

    So too where the block ends by an error: the process may go on, as a notebook's does. No trial
    goes on after the block. Its actor may die a moment later, and what comes next needs what its
    group holds.
    """
    over = threading.Event()

    def look() -> None:
        # wait() is False after LOOK_SECONDS, and True as soon as the block is over.
        while not over.wait(LOOK_SECONDS):
            try:
                remove_dead_groups()
            except (RayError, OSError, RuntimeError):  # the cluster is busy or gone: the next look
                continue

    thread = threading.Thread(target=look, name="dead placement groups", daemon=True)
    thread.start()
    try:
        try:
            yield
        finally:
            over.set()
            thread.join()
    except BaseException:
        # The block's own error is the one to tell, whatever the cluster says to this.
        with suppress(RayError, OSError, RuntimeError):
            remove_own_groups()
        raise
    remove_own_groups()
