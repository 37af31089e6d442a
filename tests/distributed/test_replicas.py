"""Replicas on Ray answer as receivers of one's own do, outlive their deaths, and forget who dies."""

import contextlib
import dataclasses
import os
import signal
import threading
import time
from pathlib import Path

import psutil
import pytest

from latentwire.config import RunConfig, SweepConfig, TuneConfig
from latentwire.distributed.replica_sets import serving, usage
from latentwire.distributed.replicas import ReplicaActor, Served, shared_receivers
from latentwire.model import LatentWire
from latentwire.planning.planner import plan
from latentwire.pretrained.weights import ReceiverError
from latentwire.training.loop import Trainer
from tests.conftest import shard_table


def replica_processes() -> list[psutil.Process]:
    """Of this test's Ray."""
    found = []
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it has just died
            if (child.cmdline() or [""])[0].startswith("ray::ReplicaActor"):
                found.append(child)
    return found


@pytest.mark.slow
def test_replicas_serve_survive_and_forget(run: RunConfig, tmp_path: Path) -> None:
    import ray

    space = SweepConfig(run=run, tune=TuneConfig(receivers="shared", trials=2))
    sharing = plan(space, {"CPU": 2}, 32e9).sharing
    assert sharing is not None
    table = shard_table(run, 4)
    expected = Trainer(LatentWire(run), 100).step(table)
    ray.init(num_cpus=2, include_dashboard=False)
    try:
        with (
            pytest.raises(
                ReceiverError,
                match="replicas of receiver llama must have hash 00 as in the manifest, got",
            ),
            serving(space, sharing, {"llama": "00", "qwen": "00"}),
        ):
            pass
        crowded = dataclasses.replace(sharing, gpus_per_replica={"llama": 0.6, "qwen": 0.6})
        hurried = space.model_copy(
            update={"tune": space.tune.model_copy(update={"wait_minutes": 0.02})}
        )
        with (
            pytest.raises(
                ReceiverError,
                match=r"no room for llama and qwen, 1\.2 GPU: the cluster has 0 GPU \(0 free\)",
            ),
            serving(hurried, crowded),
        ):
            pass
        with serving(space, sharing) as served:
            assert served is not None and {name: len(own) for name, own in served.items()} == {
                "llama": 1,
                "qwen": 1,
            }
            wire = LatentWire(run, shared_receivers(run, served, "here"))
            assert Trainer(wire, 100).step(table) == pytest.approx(expected, rel=1e-4)

            processes = replica_processes()
            assert len(processes) == 2
            for process in processes:  # both machines that hold weights die while a trial asks
                process.send_signal(signal.SIGKILL)
            again = LatentWire(run, {**wire.receivers})
            assert Trainer(again, 100).step(table) == pytest.approx(expected, rel=1e-4)
            assert {p.pid for p in replica_processes()}.isdisjoint(p.pid for p in processes)

            @ray.remote(num_cpus=1)
            def ask_and_die() -> None:
                mine = LatentWire(run, shared_receivers(run, served, "dying"))
                trainer = Trainer(mine, 10_000)
                trainer.step(table)  # what it imports may take a while
                threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGKILL)).start()
                while True:
                    trainer.step(table)

            with pytest.raises(ray.exceptions.WorkerCrashedError):
                ray.get(ask_and_die.options(max_retries=0).remote())
            end = time.time() + 20
            actors = [replicas[0].actor for replicas in served.values()]
            while any(
                report["waiting"] for report in ray.get([actor.report.remote() for actor in actors])
            ):
                assert time.time() < end, "a dead trial's request still waits"
                time.sleep(0.1)
            (report,) = ray.get([served["llama"][0].actor.report.remote()])
            accounts = report["accounts"]
            assert set(accounts) == {"here", "dying"} and accounts["dying"]["requests"] > 0
            assert "2 trials" in usage("llama", [report])
        end = time.time() + 20
        while replica_processes():
            assert time.time() < end, "replicas must go with the sweep"
            time.sleep(0.1)
    finally:
        ray.shutdown()


def test_a_replica_begins_at_once_and_answers_when_it_has_loaded(run: RunConfig) -> None:
    """What it cannot load is told by whoever asks, as the receiver's own error."""
    training = {"gradient_checkpointing": False, "compile": False}
    replica = ReplicaActor(run.receivers[0].model_dump(mode="json"), training, 0, 1)
    assert replica.facts().fingerprint == replica.fingerprint()
    assert replica.report() == {"accounts": {}, "passes": 0, "waiting": 0}
    peers = [Served("node-0", replica), Served("node-1", replica)]
    assert replica.met() == []  # as after a restart
    replica.meet(peers)
    assert replica.met() == peers
    missing = run.receivers[0].model_copy(update={"model": "nowhere/at-all"})
    with pytest.raises(ReceiverError):
        ReplicaActor(missing.model_dump(mode="json"), training, 0, 1).facts()
