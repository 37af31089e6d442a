"""Placement groups that dead drivers leave behind on a cluster that outlives them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import ray
from ray._raylet import PlacementGroupID
from ray.util.placement_group import PlacementGroup, remove_placement_group
from ray.util.state import list_actors, list_jobs, list_placement_groups
from ray.util.state.common import ActorState, JobState, PlacementGroupState

AT_MOST = 10_000
"""Most rows that the State API gives at once."""
ASKED = "RAY_API_SERVER_ADDRESS"
"""Environment variable by which the State API chooses a cluster, before any address it is given."""


def remove_orphaned_groups() -> list[str]:
    """Remove placement groups that nobody is left to use from this driver's cluster.

    Returns their ids. Ray removes a job's groups when the job ends. A group that the job's actors
    ask for in that very moment is made after the others were removed, and holds its CPUs and GPUs
    for as long as the cluster lives (docs/experiments/chaos.md, "Fifty deaths").
    """
    with _this_cluster():
        # Jobs and actors after the groups: those that have ended by then can use none of them.
        groups = list_placement_groups(
            filters=[("state", "!=", "REMOVED")], limit=AT_MOST, detail=True
        )
        if not groups:
            return []
        living = list_actors(filters=[("state", "!=", "DEAD")], limit=AT_MOST)
        orphans = orphaned(groups, list_jobs(limit=AT_MOST), living)
    for group in orphans:
        remove_placement_group(PlacementGroup(PlacementGroupID(bytes.fromhex(group))))
    return orphans


def orphaned(
    groups: Iterable[PlacementGroupState], jobs: Iterable[JobState], living: Iterable[ActorState]
) -> list[str]:
    """List the ids of groups whose job has ended and left no living actor.

    An actor may outlive its job on purpose, and so may the groups that it made: those are detached,
    and are left out.
    """
    ended = {job.job_id for job in jobs if job.status.is_terminal()}
    ended -= {actor.job_id for actor in living}
    left_behind = [group for group in groups if group.creator_job_id in ended]
    return [group.placement_group_id for group in left_behind if not group.is_detached]


@contextmanager
def _this_cluster() -> Iterator[None]:
    """Let the State API ask the cluster of this driver, of several on the machine."""
    before = os.environ.get(ASKED)
    # It stands before the address that the State API is given, and may name another cluster.
    os.environ[ASKED] = ray.get_runtime_context().gcs_address
    try:
        yield
    finally:
        os.environ.pop(ASKED)
        if before is not None:
            os.environ[ASKED] = before
