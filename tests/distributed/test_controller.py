"""A trial's driver does what Ray Train has helpers for."""

import time
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.train.v2._internal.execution import preemption

from latentwire.distributed import controller, worker
from latentwire.distributed.controller import PreemptionThread, TuneReport


def workers_on(*nodes: str) -> tuple[Any, list[Any]]:
    """A worker group with a worker on each of these nodes, and the notices that its workers get."""
    notices: list[Any] = []
    workers = [
        SimpleNamespace(
            distributed_context=SimpleNamespace(world_rank=rank),
            metadata=SimpleNamespace(node_id=node),
            actor=SimpleNamespace(mark_preempt=SimpleNamespace(remote=notices.append)),
        )
        for rank, node in enumerate(nodes)
    ]
    return SimpleNamespace(get_workers=lambda: workers), notices


def test_every_worker_gets_notice_of_a_node_that_goes_until_the_watch_ends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    draining: dict[str, int] = {"elsewhere": 5}
    looks: list[float] = []

    def drained() -> dict[str, int]:
        looks.append(time.monotonic())
        return dict(draining)

    monkeypatch.setenv("RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S", "0.01")
    monkeypatch.setattr(preemption, "_get_draining_nodes", drained)
    monkeypatch.setattr(ray, "nodes", lambda: [])
    group, notices = workers_on("first", "second", "first")
    watch = PreemptionThread()
    watch.after_worker_group_start(group)
    while len(looks) < 3:
        time.sleep(0.01)
    assert notices == []
    draining["first"] = 1_000
    while len(notices) < 3:
        time.sleep(0.01)
    assert {notice.deadline_ms for notice in notices} == {1_000}
    assert all(notice.preempted_node_to_ranks == {"first": [0, 2]} for notice in notices)
    watch.before_worker_group_shutdown(group)
    time.sleep(0.1)
    count = len(looks)
    time.sleep(0.1)
    assert len(looks) == count and len(notices) == 3


def test_tune_hears_what_the_first_worker_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    reports: list[dict[str, float]] = []
    monkeypatch.setattr(controller.ray.tune, "report", reports.append)
    TuneReport().after_report(None, [{"dev_f1": 0.5}, {"dev_f1": 0.25}], None)
    assert reports == [{"dev_f1": 0.5}]


def test_a_process_that_waited_for_its_trial_took_no_time_to_start() -> None:
    began = time.time() + 5
    parts = worker.start_times(began, began + 2)
    assert parts["process"] == 0 and parts["code"] == pytest.approx(2)
