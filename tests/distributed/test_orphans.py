"""Groups that a killed driver or trial leaves are removed, and nobody else's."""

import subprocess
import sys
import time
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import ray
import ray.train
from ray.util import placement_group_table
from ray.util.placement_group import placement_group
from ray.util.state.common import ActorState, JobState, PlacementGroupState

from latentwire.distributed import controller
from latentwire.distributed.orphans import orphaned, remove_orphaned_groups

RESTLESS = """
import sys, time, ray
from ray.util.placement_group import placement_group, remove_placement_group

ray.init(address=sys.argv[1], log_to_driver=False)
placement_group([{"CPU": 0.01}], name=sys.argv[2], lifetime="detached")

@ray.remote(num_cpus=0)
class Maker:
    def run(self):
        while True:
            remove_placement_group(placement_group([{"CPU": 0.01}]))

makers = [Maker.remote() for _ in range(3)]
waiting = [maker.run.remote() for maker in makers]
print("ready", flush=True)
time.sleep(600)
"""
"""A driver whose actors ask for groups without pause."""


def test_only_groups_of_ended_jobs_without_actors_are_orphans() -> None:
    def group(name: str, job: str, detached: bool = False) -> PlacementGroupState:
        return PlacementGroupState(
            placement_group_id=name,
            name="",
            creator_job_id=job,
            state="CREATED",
            is_detached=detached,
        )

    def job(job_id: str, status: str) -> JobState:
        return JobState(job_id=job_id, type="DRIVER", status=status, entrypoint="")

    def actor(job_id: str) -> ActorState:
        fields = dict.fromkeys(
            ("actor_id", "class_name", "name", "node_id", "pid", "ray_namespace"), "1"
        )
        return ActorState(state="ALIVE", job_id=job_id, **fields)

    jobs = [job("01", "RUNNING"), job("02", "SUCCEEDED"), job("03", "FAILED"), job("04", "STOPPED")]
    groups = [
        group("a", "01"),
        group("b", "02"),
        group("c", "02", detached=True),
        group("d", "03"),
        group("e", "04"),
    ]
    assert orphaned(groups, jobs, [actor("01"), actor("03")]) == ["b", "e"]


@pytest.fixture(scope="module")
def _ray() -> Iterator[None]:
    ray.init(num_cpus=2)
    yield
    ray.shutdown()


def groups() -> set[str]:
    """Names of the placement groups that are there."""
    table = placement_group_table().values()
    return {group["name"] for group in table if group["state"] != "REMOVED"}


def wait_for(names: set[str], seconds: float = 20) -> None:
    """Until these groups and no others are there."""
    end = time.time() + seconds
    while groups() != names:
        assert time.time() < end, placement_group_table()
        time.sleep(0.2)


@pytest.mark.slow
@pytest.mark.usefixtures("_ray")
def test_what_a_killed_driver_left_is_removed() -> None:
    before = groups()
    address = ray.get_runtime_context().gcs_address
    mine = placement_group([{"CPU": 0.01}], name="mine")
    kept = before | {"mine"}
    for attempt in range(10):  # about two of three drivers leave one
        command = [sys.executable, "-c", RESTLESS, address, f"kept {attempt}"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as driver:
            assert driver.stdout is not None and driver.stdout.readline() == b"ready\n"
            kept.add(f"kept {attempt}")
            time.sleep(1.5)
            assert remove_orphaned_groups() == []  # its job is there
            driver.kill()
        time.sleep(6)  # Ray's own removing, and the ends of the actors
        if removed := remove_orphaned_groups():
            break
    assert removed, "no driver left a group: Ray may have mended it, and this could go"
    wait_for(kept)
    assert remove_orphaned_groups() == [] and mine.wait(5)


@ray.remote(num_cpus=0)
class TrialDriver:
    """An actor that holds a group for workers, and notes it as a trial's driver does."""

    def __init__(self, name: str) -> None:
        self.group = placement_group([{"CPU": 0.01}], name=name)
        self.group.wait(20)
        controller.note(self.group.id.hex(), controller.own_actor(), namespace=controller.GROUPS)

    def group_id(self) -> str:
        return self.group.id.hex()


@pytest.mark.slow
@pytest.mark.usefixtures("_ray")
def test_what_a_killed_trial_left_is_removed_while_the_sweep_goes_on() -> None:
    before = groups()
    drivers = {name: TrialDriver.remote(name) for name in ("killed", "living")}
    group_ids = {name: ray.get(driver.group_id.remote()) for name, driver in drivers.items()}
    assert controller.remove_dead_groups() == [] and groups() == before | {"killed", "living"}
    ray.kill(drivers["killed"])
    time.sleep(2)
    assert "killed" in groups(), "Ray removed the group by itself, and ours could go"
    with controller.dead_groups_removed():
        wait_for(before | {"living"})
        assert controller.remove_dead_groups() == []  # it is forgotten
        assert controller.recall(group_ids["living"], namespace=controller.GROUPS) is not None
    # No trial goes on after a search: the group of one that is still about to die goes at once.
    wait_for(before)
    assert ray.get(drivers["living"].group_id.remote()) == group_ids["living"]


@pytest.mark.slow
@pytest.mark.usefixtures("_ray")
def test_a_group_is_noted_before_its_workers_start() -> None:
    """A trial that is killed as they do would else leave it behind."""

    @ray.remote(num_cpus=0)
    class Starting:
        def create(self) -> str:
            group = controller.NotedGroup.__new__(controller.NotedGroup)
            scaling = ray.train.ScalingConfig(num_workers=1)
            wanted = SimpleNamespace(
                resources_per_worker={"CPU": 0.01},
                num_workers=1,
                placement_strategy="PACK",
                label_selector=None,
            )
            return group._create_placement_group(scaling, wanted).placement_group.id.hex()

    starting = Starting.remote()
    group_id = ray.get(starting.create.remote())
    noted = controller.recall(group_id, namespace=controller.GROUPS)
    assert noted is not None and noted.decode() == starting._actor_id.hex()
    ray.kill(starting)
    end = time.time() + 20
    while group_id not in controller.remove_dead_groups():
        assert time.time() < end
        time.sleep(0.2)


def test_a_cluster_that_says_nothing_of_an_actor_has_not_called_it_dead(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Else a busy cluster's silence would end trials that run."""
    said = {"aa": {}, "bb": {"State": "ALIVE"}, "cc": {"State": "DEAD"}}
    removed: list[str] = []
    monkeypatch.setattr(controller, "names_of", lambda *_, **__: [b"1" * 36, b"2" * 36, b"3" * 36])
    holders = {"1" * 36: b"aa", "2" * 36: b"bb", "3" * 36: b"cc"}
    monkeypatch.setattr(controller, "recall", lambda group, **_: holders[group])
    monkeypatch.setattr(controller, "actors", said.__getitem__)
    monkeypatch.setattr(
        controller, "remove_placement_group", lambda group: removed.append(group.id.hex())
    )
    monkeypatch.setattr(controller, "forget", lambda *_, **__: None)
    assert controller.remove_dead_groups() == removed == ["3" * 36]


def test_groups_of_a_search_that_ends_by_an_error_are_removed_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    removed: list[str] = []

    def remove() -> list[str]:
        removed.append("own")
        raise RuntimeError("the cluster is gone")

    monkeypatch.setattr(controller, "remove_own_groups", remove)
    with pytest.raises(KeyError, match="its own"), controller.dead_groups_removed():
        raise KeyError("its own")
    assert removed == ["own"]
