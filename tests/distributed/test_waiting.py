"""A trial that finds no room waits and says for what; what is a failure is counted as one."""

from collections.abc import Callable
from typing import Any

import pytest
import ray
from ray.exceptions import RayError
from ray.train import ControllerError, FailureConfig, WorkerGroupError
from ray.train.v2._internal.exceptions import (
    UserExceptionWithTraceback,
    WorkerGroupStartupFailedError,
    WorkerGroupStartupTimeoutError,
)
from ray.train.v2._internal.execution.failure_handling import FailureDecision
from ray.train.v2.api import data_parallel_trainer

from latentwire.config import RunConfig
from latentwire.config.resolve import with_values
from latentwire.distributed import trial
from latentwire.distributed.waiting import PatientPolicy
from latentwire.distributed.worker_output import TOLD
from latentwire.storage import StorageError
from latentwire.training.loop import TrainingError

RETRY, RAISE = FailureDecision.RETRY, FailureDecision.RAISE


class Started(Exception):
    """Train has been asked to begin."""


@pytest.fixture(autouse=True)
def _a_busy_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 64.0, "GPU": 8.0})
    monkeypatch.setattr(ray, "available_resources", lambda: {"CPU": 12.0})


@pytest.fixture
def policy(monkeypatch: pytest.MonkeyPatch) -> PatientPolicy:
    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "120")
    limits = FailureConfig(max_failures=1, controller_failure_limit=2)
    return PatientPolicy(limits, "trial-3", {"CPU": 1.0, "GPU": 1.0})


def no_room() -> ControllerError:
    return ControllerError(WorkerGroupStartupTimeoutError(1))


def died(error: Exception) -> WorkerGroupError:
    """A worker's end as Train tells it."""
    return WorkerGroupError("rank 0", {0: UserExceptionWithTraceback(error, "Traceback …")})


def test_waiting_for_room_is_no_failure_and_says_what_it_waits_for(
    policy: PatientPolicy, capsys: pytest.CaptureFixture[str]
) -> None:
    assert {policy.make_decision(no_room()) for _ in range(20)} == {RETRY}
    first, *_ = capsys.readouterr().out.splitlines()
    assert first == (
        f"{TOLD}trial-3 has waited 120 s for 1 CPU, 1 GPU: the cluster has 64 CPU (12 free), 8 GPU (0 free)"
    )
    broken = ControllerError(WorkerGroupStartupFailedError("a worker died as it started"))
    assert [policy.make_decision(broken) for _ in range(3)] == [
        RETRY,
        RETRY,
        RAISE,
    ]  # the limit is theirs alone


def test_a_cluster_that_does_not_answer_ends_no_trial_that_waits(
    policy: PatientPolicy, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def unanswered() -> dict[str, float]:
        raise RayError("no answer")

    monkeypatch.setattr(ray, "cluster_resources", unanswered)
    assert policy.make_decision(no_room()) is RETRY
    assert "the cluster does not say what it has: no answer" in capsys.readouterr().out


def test_deaths_of_workers_are_counted_whatever_was_waited_for(policy: PatientPolicy) -> None:
    decisions = [
        policy.make_decision(error) for error in (died(ValueError("a fault")), no_room(), no_room())
    ]
    assert decisions == [RETRY] * 3
    assert policy.make_decision(died(ValueError("a fault"))) is RAISE


@pytest.mark.parametrize(
    ("error", "decision"), [(TrainingError("not finite"), RAISE), (StorageError("no"), RETRY)]
)
def test_what_would_fail_again_is_not_tried_again(
    policy: PatientPolicy, error: Exception, decision: FailureDecision
) -> None:
    assert policy.make_decision(died(error)) is decision


def test_a_trials_controller_is_given_these_rules(
    run: RunConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.setattr(trial, "name_cluster", lambda: None)
    monkeypatch.delenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", raising=False)
    given: dict[str, Any] = {}

    def start(self: Any, **options: Any) -> Any:
        given.update(options)
        raise Started

    monkeypatch.setattr(
        data_parallel_trainer, "ObjectRefWrapper", lambda function: function
    )  # which would start Ray
    monkeypatch.setattr(
        data_parallel_trainer.DataParallelTrainer, "_initialize_and_run_controller", start
    )
    two = with_values(run, {"training.num_workers": 2})
    make: Callable[..., Any] = trial.make_trainer
    chosen = {"pins": {}, "metric": "dev_f1", "mode": "max"}
    trainer = make(
        two, {}, 16, tmp_path, folder=tmp_path / "trial-7", gpus_per_worker=0.5, **chosen
    )
    with pytest.raises(Started):
        trainer.fit()
    policy = given["failure_policy"]
    assert isinstance(policy, PatientPolicy) and policy.name == "trial-7"
    assert policy.needed == {"CPU": 2.0, "GPU": 1.0}
    assert policy.failure_config.controller_failure_limit == trial.START_FAILURES
