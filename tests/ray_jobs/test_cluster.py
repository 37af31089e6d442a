"""Sweeps on clusters: outputs in a bucket, nodes that the autoscaler adds and takes away, nodes that are lost, submitted
jobs that are stopped and submitted again."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import yaml

from latentwire import storage
from tests.ray_jobs.conftest import ONE_VARIANT, REPOSITORY, TINY, Job, log_of
from tests.s3 import SECRET, bucket, point_to

pytestmark = pytest.mark.slow
STEPS = ("--epochs=40", "--set", "training.evaluate_every=20", "--set", "tune.scheduler=none")
TRIAL_NODE = ("--set", "training.worker_resources={trial_node: 1}")


def wait_for(
    condition: Callable[[], object], seconds: float, tell: Callable[[], str], pause: float = 0.5
) -> None:
    """``pause``: seconds between looks; more for those that cost a processor, as every ``ray`` command does."""
    end = time.time() + seconds
    while not condition():
        assert time.time() < end, tell()
        time.sleep(pause)


def test_a_sweep_in_a_bucket_leaves_no_secret_anywhere(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shards, teachers' columns, checkpoints, study, results and export go to the store; no secret of the environment is in
    any of it, nor in the log. The sweep is given another trial from the store alone, and what it had stays as it was."""
    planted = {"HF_TOKEN": "planted-hf-token", "WANDB_API_KEY": "planted-wandb-key"}
    for name, value in planted.items():
        monkeypatch.setenv(name, value)
    with bucket() as port:
        point_to(monkeypatch, port)
        monkeypatch.setenv("LATENTWIRE_CACHE", str(tmp_path / "cache"))
        home = "s3://bucket/home"
        flags = [
            *ONE_VARIANT, *TINY, *STEPS, "--max_steps=40", "--set", "tune.trials=1", "--set", f"data.shard_dir={home}/shards",
            "--set", "losses.kd_weight=0.1",
        ]  # fmt: skip
        log = tmp_path / "log"

        def run(*arguments: str) -> str:
            with log.open("w") as stream:
                done = subprocess.run(
                    [sys.executable, "ray_jobs/tune.py", *arguments],
                    cwd=REPOSITORY, stdout=stream, stderr=subprocess.STDOUT, timeout=900, check=False,
                )  # fmt: skip
            assert done.returncode == 0, log.read_text()
            return log.read_text()

        said = run(*flags, "--output_dir", f"{home}/runs/sweep")
        root = storage.place(f"{home}/runs/sweep")
        with storage.local(root.parent.parent) as copy:
            names = {str(file.relative_to(copy)) for file in copy.rglob("*") if file.is_file()}
            for kind in (
                "space.json",
                "study.journal",
                "results.json",
                "report.md",
                "predictions.parquet",
                "best/manifest.json",
            ):
                assert f"runs/sweep/{kind}" in names, kind
            assert any("trials/trial-0/step-" in name for name in names)
            assert any(name.startswith("shards/teacher-llama-") for name in names)
            secrets = [SECRET, "planted-key", *planted.values()]
            everything = [
                said.encode(),
                *(file.read_bytes() for file in copy.rglob("*") if file.is_file()),
            ]
            assert not [
                secret for secret in secrets for held in everything if secret.encode() in held
            ]

        first = contents(root, "trials/trial-0/", "best/")
        monkeypatch.setenv("LATENTWIRE_CACHE", str(tmp_path / "another_machine"))
        said = run("--resume", f"{home}/runs/sweep", "--set", "tune.trials=2")
        rows = json.loads((root / "results.json").read_text())["trials"]
        assert sorted((row["trial"], row["step"]) for row in rows) == [(0, 40), (1, 40)]
        assert "reused from s3://bucket/home/shards" in said
        (aside,) = [
            path.name for path in storage.children(root) if path.name.startswith("best-until-")
        ]
        trial, best = contents(root, "trials/trial-0/", f"{aside}/")
        assert (
            trial.items() <= first[0].items() and best == first[1]
        )  # of checkpoints, some may have been let go
        assert (root / "best" / "manifest.json").exists()


def contents(root: storage.Place, *starts: str) -> list[dict[str, bytes]]:
    """Of the files in some directories of a sweep, name there → content. A trial that ran again would tell other times."""
    with storage.local(root) as copy:
        return [{str(f.relative_to(copy))[len(start) :]: f.read_bytes() for f in sorted(copy.rglob("*"))
                 if f.is_file() and str(f.relative_to(copy)).startswith(start)} for start in starts]  # fmt: skip


def test_a_drained_node_and_a_lost_one_cost_a_trial_nothing_but_time(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The node that hosts a running trial's worker is about to go, and the next one goes without notice; each time the trial
    continues on another node: from the checkpoint that the notice made or a later one, then from its last one. For the last
    node it has to wait, which it does for longer than Ray Train's own patience with a start, however often that ends."""
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "4")

    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 1, "include_dashboard": True, "dashboard_port": 0},
    )
    try:
        first = cluster.add_node(num_cpus=1, resources={"trial_node": 1})
        cluster.wait_for_nodes()
        monkeypatch.setenv("RAY_ADDRESS", cluster.address)
        output = tmp_path / "sweep"
        process = job("ray_jobs/tune.py", *ONE_VARIANT, *TINY, *STEPS, *TRIAL_NODE, "--max_steps=500", "--set", "training.log_every=50",
                      "--set", "tune.trials=1", "--output_dir", str(output))  # fmt: skip

        def steps() -> list[int]:
            """Steps of whole checkpoints that are there now; or an ended sweep's end."""
            if process.poll() is not None:
                return [500]
            return [
                int(path.parent.name.removeprefix("step-"))
                for path in output.glob("trials/*/step-*/manifest.json")
            ]

        try:
            wait_for(steps, 400, lambda: log_of(tmp_path))
            second = cluster.add_node(num_cpus=1, resources={"trial_node": 1})
            ray_command(
                "drain-node", "--address", cluster.address, "--node-id", first.node_id,
                "--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "a test", "--deadline-remaining-seconds", "20",
            )  # fmt: skip
            wait_for(lambda: "resumed at step" in log_of(tmp_path), 400, lambda: log_of(tmp_path))
            (saved,) = set(re.findall(r"preemption: saved \S+/step-0*(\d+)", log_of(tmp_path)))
            (again,) = set(re.findall(r"resumed at step (\d+) ", log_of(tmp_path)))
            assert int(again) >= int(saved) > 0  # until the deadline the worker trains on
            wait_for(lambda: max(steps(), default=0) > int(again), 400, lambda: log_of(tmp_path))
            cluster.remove_node(second, allow_graceful=False)

            def waited() -> int:
                """Seconds that the trial has waited for room, as it says."""
                waits = re.findall(
                    r"trial-0 has waited (\d+) s for 1 CPU, 1 trial_node: the cluster has",
                    log_of(tmp_path),
                )
                return max(map(int, waits), default=0)

            wait_for(
                lambda: waited() >= 16 or process.poll() is not None, 400, lambda: log_of(tmp_path)
            )
            cluster.add_node(num_cpus=1, resources={"trial_node": 1})
            assert process.wait(800) == 0, log_of(tmp_path)
        finally:
            process.kill()
        resumed = {int(step) for step in re.findall(r"resumed at step (\d+) ", log_of(tmp_path))}
        assert len(resumed) == 2 and min(resumed) == int(again)
        (row,) = json.loads((output / "results.json").read_text())["trials"]
        assert (row["state"], row["step"]) == ("done", 500)
    finally:
        cluster.shutdown()


NODE_TYPES = {
    "cluster_name": "fake",
    "max_workers": 2,
    "idle_timeout_minutes": 0.25,
    "provider": {"type": "fake_multinode", "use_node_id_as_ip": True},  # all have one address: else none is ever known
    "head_node_type": "ray.head.default",
    "upscaling_speed": 1.0,
    "docker": {}, "auth": {}, "file_mounts": {}, "initialization_commands": [], "setup_commands": [],
    "head_setup_commands": [], "worker_setup_commands": [], "head_start_ray_commands": [],
    "worker_start_ray_commands": [], "cluster_synced_files": [], "file_mounts_sync_continuously": False,
    "rsync_exclude": [], "rsync_filter": [],
    "available_node_types": {
        "ray.head.default": {"resources": {"CPU": 1}, "node_config": {}, "min_workers": 0, "max_workers": 0},
        "worker": {"resources": {"CPU": 1, "trial_node": 1}, "node_config": {}, "min_workers": 0, "max_workers": 2},
    },
}  # fmt: skip


@pytest.fixture
def autoscaled(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[str]:
    """A head of one CPU whose autoscaler may start two fake nodes; its address."""
    with socket.socket() as found:
        if found.connect_ex(("127.0.0.1", 6379)) == 0:
            pytest.skip("the fake provider needs port 6379, which another Ray has")
    folder = Path(tmp_path_factory.mktemp("r"))
    (folder / "types.yaml").write_text(yaml.safe_dump(NODE_TYPES))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    subprocess.run(
        [Path(sys.executable).parent / "ray", "get-auth-token", "--generate"],
        check=True,
        capture_output=True,
    )
    environment = os.environ | {"RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1"}
    temp = Path(f"/tmp/lw-{os.getpid()}")
    log = (folder / "head.log").open("w")
    head = subprocess.Popen(
        [Path(sys.executable).parent / "ray", "start", "--head", "--block", "--port=6379", "--num-cpus=1",
         "--dashboard-port=8299", "--dashboard-agent-listen-port=8298",
         f"--temp-dir={temp}", f"--autoscaling-config={folder / 'types.yaml'}"],
        env=environment, stdout=log, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        with contextlib.suppress(AssertionError):
            wait_for(
                lambda: "Ray runtime started" in (folder / "head.log").read_text(), 60, lambda: ""
            )
        assert head.poll() is None, (folder / "head.log").read_text()
        monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:8299")
        yield "127.0.0.1:6379"
    finally:
        for process in psutil.process_iter(
            ["cmdline"]
        ):  # ours: those that name our own temporary directory
            if str(temp) in " ".join(process.info["cmdline"] or []):
                with contextlib.suppress(psutil.Error):
                    process.kill()
        head.kill()
        head.wait()


def ray_command(*arguments: str, seconds: float = 60) -> str:
    done = subprocess.run(
        [Path(sys.executable).parent / "ray", *arguments],
        cwd=REPOSITORY, capture_output=True, text=True, timeout=seconds, check=False,
    )  # fmt: skip
    return done.stdout + done.stderr


def test_a_submitted_sweep_scales_up_is_stopped_goes_on_and_scales_down(
    autoscaled: str, tmp_path: Path, common_shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Jobs find the code by ``PYTHONPATH``: fake nodes share one session directory, in which each would unpack an uploaded
    working directory anew, under the feet of the others. The last job, which fails on the head, is uploaded."""
    output, script = tmp_path / "sweep", str(REPOSITORY / "ray_jobs" / "tune.py")
    first = [sys.executable, script, *ONE_VARIANT, *TINY, *STEPS, *TRIAL_NODE, "--max_steps=200", "--set", "tune.trials=2",
             "--set", f"data.shard_dir={common_shards}", "--output_dir", str(output)]  # fmt: skip
    environment = json.dumps({"env_vars": {"PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1"}})

    def submit(name: str, command: list[str], *upload: str) -> None:
        said: list[str] = []

        def accepted() -> bool:  # a job server that has just started may have no agent yet
            said.append(ray_command("job", "submit", "--no-wait", f"--submission-id={name}", *upload,
                                    "--runtime-env-json", environment, "--", *command))  # fmt: skip
            return "submitted successfully" in said[-1]

        wait_for(accepted, 60, lambda: said[-1])

    def logs(name: str) -> str:
        return ray_command("job", "logs", name)

    submit("one", first)
    wait_for(
        lambda: len(list(output.glob("trials/*/step-*/manifest.json"))) >= 1,
        400,
        lambda: logs("one"),
    )
    assert nodes(autoscaled) >= 2  # a worker node beside the head
    ray_command("job", "stop", "one")
    assert "was stopped" in ray_command("job", "status", "one")
    submit("two", [sys.executable, script, "--resume", str(output)])
    wait_for((output / "best" / "manifest.json").exists, 400, lambda: logs("two"))
    wait_for(
        lambda: "succeeded" in ray_command("job", "status", "two"),
        120,
        lambda: logs("two"),
        pause=5,
    )
    assert "resumed at step" in logs("two")
    rows = json.loads((output / "results.json").read_text())["trials"]
    assert sorted((row["state"], row["step"]) for row in rows) == [("done", 200)] * 2
    submit(
        "three",
        [sys.executable, "ray_jobs/tune.py", "--resume", str(tmp_path / "nowhere")],
        "--working-dir",
        ".",
    )
    wait_for(
        lambda: "failed" in ray_command("job", "status", "three"),
        120,
        lambda: logs("three"),
        pause=5,
    )
    wait_for(
        lambda: nodes(autoscaled) == 1,
        120,
        lambda: ray_command("status", "--address", autoscaled),
        pause=5,
    )


def nodes(address: str) -> int:
    """Living nodes of a cluster."""
    said = subprocess.run(
        [sys.executable, "-c", "import ray, sys; ray.init(sys.argv[1], log_to_driver=False, logging_level=40); "
         "print('nodes', sum(n['Alive'] for n in ray.nodes()))", address],
        capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    return int(said.stdout.split("nodes")[1])


def test_a_run_that_lost_a_worker_goes_on_with_the_other(
    tmp_path: Path, common_shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That its steps have the same rows, whoever is left to read them, is in tests/data and tests/distributed."""
    from ray.cluster_utils import Cluster

    # Ray counts a lost node's CPUs for a moment, tries to start on them, and looks again after this.
    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "8")
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False}
    )
    output = tmp_path / "run"
    flags = [*ONE_VARIANT, *TINY, "--epochs=40", "--max_steps=120", "--set", "training.evaluate_every=20", *TRIAL_NODE,
             "--num_workers=2", "--set", "training.min_workers=1", "--set", f"data.shard_dir={common_shards}"]  # fmt: skip
    try:
        cluster.add_node(num_cpus=1, resources={"trial_node": 1})
        second = cluster.add_node(num_cpus=1, resources={"trial_node": 1})
        cluster.wait_for_nodes()
        monkeypatch.setenv("RAY_ADDRESS", cluster.address)
        with (tmp_path / "log").open("w") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "latentwire", "train", "--ray", *flags, "--output", str(output)],
                cwd=REPOSITORY, stdout=log, stderr=subprocess.STDOUT,
            )  # fmt: skip
        try:
            wait_for(
                lambda: process.poll() is not None or list(output.glob("step-*/manifest.json")),
                400,
                lambda: log_of(tmp_path),
            )
            cluster.remove_node(second, allow_graceful=False)
            assert process.wait(400) == 0, log_of(tmp_path)
        finally:
            process.kill()
        (workers,) = re.findall(r"resumed at step \d+ on \S+, workers: (\d)", log_of(tmp_path))
        assert workers == "1" and (output / "step-00000120" / "manifest.json").exists()
    finally:
        cluster.shutdown()
