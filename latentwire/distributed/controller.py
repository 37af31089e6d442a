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
from collections.abc import Iterator
from contextlib import contextmanager
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
from ray.train.v2._internal.execution.callback import WorkerGroupCallback
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.preemption import PreemptionWatcher
from ray.train.v2.api.callback import UserCallback
from ray.util.placement_group import PlacementGroup, remove_placement_group

GROUPS = "latentwire placement groups"
"""Namespace of the cluster's key-value store: placement group → the actor whose workers it holds."""
LOOK_SECONDS = 1.0
"""Between two looks for groups whose actor has died."""


def own_actor() -> str | None:
    """Return the id of the actor that this process is; None in a process that is none."""
    actor_id: str | None = ray.get_runtime_context().get_actor_id()
    return actor_id


def run_here(**options: Any) -> Result:
    """Run a controller in this process until its training has ended; return the result.

    ``options``: as Ray Train hands them to its controller. This process must be an actor.
    """
    controller = TrainController(**options)
    asyncio.run(controller.run())
    return controller.get_result()


class TuneReport(UserCallback):
    """Reports to Tune what the first worker reports; for a controller in the process of the trial."""

    def after_report(
        self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any
    ) -> None:
        """Report, and wait until Tune has taken it."""
        ray.tune.report(metrics[0])


class PreemptionThread(PreemptionCallback):
    """Ray Train's watch for nodes that are about to go, in a thread of the controller's process."""

    def after_worker_group_start(self, worker_group: Any) -> None:
        """Watch the nodes of these workers."""
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
            self._watcher._stop_event.set()
            self._watcher = None


# ---------------------------------------------------------------- placement groups of dead controllers


class GroupNote(WorkerGroupCallback):
    """Notes whose workers a placement group holds. Ray keeps a group until the job ends, whoever made it."""

    def after_worker_group_start(self, worker_group: Any) -> None:
        """Note this actor as the one that needs the group."""
        state = worker_group.get_worker_group_state()
        group = state.placement_group_handle.placement_group
        note(group.id.hex(), own_actor(), namespace=GROUPS)


def remove_dead_groups() -> list[str]:
    """Remove the noted groups whose actor has died; return their ids."""
    removed = []
    for group in [name.decode() for name in names_of("", namespace=GROUPS)]:
        actor_id = recall(group, namespace=GROUPS)
        if actor_id is None or actors(actor_id.decode()).get("State", "DEAD") != "DEAD":
            continue
        remove_placement_group(PlacementGroup(PlacementGroupID(bytes.fromhex(group))))
        forget(group, namespace=GROUPS)
        removed.append(group)
    return removed


@contextmanager
def dead_groups_removed() -> Iterator[None]:
    """Look in a thread for groups whose actor has died, and remove them, while the block runs."""
    over = threading.Event()

    def look() -> None:
        while not over.wait(LOOK_SECONDS):
            try:
                remove_dead_groups()
            except (RayError, OSError, RuntimeError):  # the cluster is busy or gone: the next look
                continue

    thread = threading.Thread(target=look, name="dead placement groups", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
