"""The script for Slurm runs a sweep: here on one node, with stand-ins for Slurm's own commands."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.ray_jobs.conftest import ONE_VARIANT, TINY
from tests.test_cluster_files import REPOSITORY

SCRIPT = REPOSITORY / "deploy" / "slurm" / "sweep.sbatch"
SRUN = """#!/usr/bin/env bash
# Runs the command once, as Slurm does on an allocation of one node; what it was asked for is in $STAND_INS/srun.log.
printf '%s\\n' "$*" >> "$STAND_INS/srun.log"
while [ "${1#--}" != "$1" ]; do shift; done
exec "$@"
"""
RAY = """#!/usr/bin/env bash
# Runs what follows the two dashes, as on the first node; how it was called is in $STAND_INS/ray.log.
printf '%s\\n' "$@" > "$STAND_INS/ray.log"
while [ "$1" != -- ]; do shift; done
shift
[ -e "$STAND_INS/no-start" ] || exec "$@"
"""
PYTHON = f"""#!/usr/bin/env bash
# Python, but for the sweep: how it was called is in $STAND_INS/tune.log.
[ "$1" = ray_jobs/tune.py ] || exec {sys.executable} "$@"
printf '%s\\n' "$@" > "$STAND_INS/tune.log"
env > "$STAND_INS/environment"
exit "${{STATUS:-0}}"
"""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """Of a job on one node, in which ``srun`` is a stand-in; ``ray`` is the environment's."""
    folder = tmp_path / "stand_ins"
    folder.mkdir()
    stand_in(folder / "srun", SRUN)
    stand_in(folder / "squeue", "#!/bin/sh\necho N/A\n")  # a job without a limit
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("RAY_", "SLURM_", "HEAD_"))
    }
    return kept | {
        "STAND_INS": str(folder),
        "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}",
        "VENV": str(Path(sys.executable).parents[1]),
        "SLURM_JOB_ID": "123456",
        "SLURM_JOB_NUM_NODES": "1",
        "SLURM_CPUS_ON_NODE": "2",
        "HEAD_ADDRESS": "127.0.0.1",
        "OUTPUT": str(tmp_path / "sweep"),
    }


def stand_in(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


def without_ray(environment: dict[str, str], tmp_path: Path) -> dict[str, str]:
    """The same with a ``ray`` and a sweep that write down how they were called, and nothing else."""
    folder = tmp_path / "venv" / "bin"
    folder.mkdir(parents=True)
    stand_in(folder / "ray", RAY)
    stand_in(folder / "python", PYTHON)
    return environment | {"VENV": str(folder.parent)}


def run(environment: dict[str, str], *flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(SCRIPT), *flags], cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=60,
    )  # fmt: skip


def called(environment: dict[str, str], program: str = "ray") -> list[str]:
    """Arguments of the program's last call."""
    return (Path(environment["STAND_INS"]) / f"{program}.log").read_text().splitlines()


def test_its_shell_is_well_formed() -> None:
    checked = subprocess.run(["bash", "-n", str(SCRIPT)], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="no shellcheck on the PATH")
def test_shellcheck_finds_nothing() -> None:
    checked = subprocess.run(["shellcheck", str(SCRIPT)], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout


def test_slurm_reads_its_options_before_the_first_command() -> None:
    lines = SCRIPT.read_text().splitlines()
    options = [number for number, line in enumerate(lines) if line.startswith("#SBATCH ")]
    first = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
    assert len(options) >= 6 and max(options) < first
    assert "#SBATCH --exclusive" in lines and "#SBATCH --ntasks-per-node=1" in lines


def test_a_new_sweep_is_started_with_the_flags_of_the_job(
    environment: dict[str, str], tmp_path: Path
) -> None:
    environment = without_ray(environment, tmp_path)
    done = run(environment, "--config", "toy", "--set", "tune.trials=2")
    assert done.returncode == 0, done.stderr
    port = 20_000 + 123_456 % 10_000
    call = called(environment)
    assert call[: call.index("--")] == [
        "symmetric-run", "--address", f"127.0.0.1:{port}", "--min-nodes", "1",
    ]  # fmt: skip
    assert called(environment, "tune") == [
        "ray_jobs/tune.py", "--config", "toy", "--set", "tune.trials=2", "--output_dir", environment["OUTPUT"],
    ]  # fmt: skip
    seen = (Path(environment["STAND_INS"]) / "environment").read_text()
    assert f"RAY_ADDRESS=127.0.0.1:{port}\n" in seen
    assert not list(Path(environment["OUTPUT"]).parent.glob("sweep.began*"))
    asked = (Path(environment["STAND_INS"]) / "srun.log").read_text()
    assert asked.startswith("--nodes=1 --ntasks=1 --ntasks-per-node=1 --cpus-per-task=2 ")


def test_every_job_has_a_token_of_its_own_that_no_argument_shows(
    environment: dict[str, str], tmp_path: Path
) -> None:
    environment = without_ray(environment, tmp_path)
    tokens = set()
    for _ in range(2):
        done = run(environment)
        seen = (Path(environment["STAND_INS"]) / "environment").read_text()
        (token,) = re.findall(r"^RAY_AUTH_TOKEN=([0-9a-f]{64})$", seen, re.MULTILINE)
        assert "RAY_AUTH_MODE=token\n" in seen and "RAY_TMPDIR=/tmp/ray-123456\n" in seen
        assert token not in done.stdout + done.stderr + " ".join(called(environment))
        tokens.add(token)
    assert len(tokens) == 2


def test_the_same_job_again_goes_on_and_ends_before_its_time(
    environment: dict[str, str], tmp_path: Path
) -> None:
    environment = without_ray(environment, tmp_path)
    output = Path(environment["OUTPUT"])
    output.mkdir()
    (output / "space.json").touch()
    environment["SLURM_JOB_END_TIME"] = str(int(time.time()) + 90 * 60 + 20)
    assert run(environment, "--config", "toy").returncode == 0
    assert called(environment, "tune")[1:] == [
        "--resume", str(output), "--force", "--set", "tune.time_budget_minutes=80",
    ]  # fmt: skip
    environment["SLURM_JOB_END_TIME"] = str(int(time.time()) + 60)
    run(environment)
    assert called(environment, "tune")[-1] == "tune.time_budget_minutes=1"


def test_an_older_slurm_tells_the_end_by_squeue(
    environment: dict[str, str], tmp_path: Path
) -> None:
    environment = without_ray(environment, tmp_path)
    end = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(time.time() + 90 * 60 + 20))
    squeue = Path(environment["STAND_INS"]) / "squeue"
    stand_in(
        squeue, f"#!/bin/sh\n[ \"$*\" = '--noheader --jobs=123456 --format=%e' ] && echo {end}\n"
    )
    assert run(environment).returncode == 0
    assert called(environment, "tune")[-2:] == ["--set", "tune.time_budget_minutes=80"]


def test_the_job_fails_with_its_sweep_and_where_ray_did_not_start(
    environment: dict[str, str], tmp_path: Path
) -> None:
    environment = without_ray(environment, tmp_path)
    assert run(environment | {"STATUS": "130"}).returncode == 130
    (Path(environment["STAND_INS"]) / "no-start").touch()  # `ray symmetric-run` ends with 0 then
    done = run(environment)
    assert done.returncode == 1 and "error: Ray must start on all 1 nodes" in done.stderr


def test_on_several_nodes_the_first_one_is_the_head(
    environment: dict[str, str], tmp_path: Path
) -> None:
    environment = without_ray(environment, tmp_path)
    del environment["HEAD_ADDRESS"]
    environment["SLURM_JOB_NUM_NODES"] = "4"
    stand_in(
        Path(environment["STAND_INS"]) / "hostname", "#!/bin/sh\necho '10.1.2.3 172.17.0.1 '\n"
    )
    assert run(environment).returncode == 0
    call = called(environment)
    assert call[1:5] == ["--address", "10.1.2.3:23456", "--min-nodes", "4"]
    first, second = (Path(environment["STAND_INS"]) / "srun.log").read_text().splitlines()
    assert first == "--nodes=1 --ntasks=1 --relative=0 hostname -I"
    assert second.startswith("--nodes=4 --ntasks=4 --ntasks-per-node=1 ")


@pytest.mark.parametrize(
    ("missing", "said"),
    [
        ("SLURM_JOB_ID", "start this script with sbatch"),
        ("OUTPUT", "must name the directory of the sweep on a disk that all nodes see"),
    ],
)
def test_what_is_missing_is_named(environment: dict[str, str], missing: str, said: str) -> None:
    del environment[missing]
    done = run(environment)
    assert done.returncode != 0 and said in done.stderr


def test_an_environment_without_ray_is_named(environment: dict[str, str], tmp_path: Path) -> None:
    done = run(environment | {"VENV": str(tmp_path), "PATH": "/usr/bin:/bin"})
    assert done.returncode == 2 and f"ray must be in VENV, got {tmp_path}" in done.stderr


NAMESPACE = ("unshare", "--net", "--pid", "--fork", "--kill-child", "--mount-proc")
"""A machine of its own as far as Ray can see. `ray symmetric-run` refuses to start where it sees another Ray, and ends by
stopping all that it sees."""


def can_unshare() -> bool:
    return (
        shutil.which("unshare") is not None
        and not subprocess.run([*NAMESPACE, "true"], capture_output=True).returncode
    )


UP = "import fcntl, socket, struct; s = socket.socket(); fcntl.ioctl(s, 0x8914, struct.pack('16sh', b'lo', 0x1 | 0x40))"
"""Python that sets the namespace's loopback interface up (SIOCSIFFLAGS with IFF_UP and IFF_RUNNING)."""


@pytest.mark.slow
def test_a_sweep_runs_on_one_node_and_goes_on(environment: dict[str, str], tmp_path: Path) -> None:
    """With the real ``ray symmetric-run``: a sweep of one trial, and the same job again for another."""
    if not can_unshare():
        pytest.skip("this machine gives no namespaces, in which Ray would be alone")
    environment["RAY_TMPDIR"] = f"/tmp/lw-slurm-{os.getpid()}"
    output = Path(environment["OUTPUT"])
    flags = [*ONE_VARIANT, *TINY, "--max_steps=4", "--set", "tune.trials=1",
             "--set", f"data.shard_dir={tmp_path / 'shards'}"]  # fmt: skip

    def job() -> str:
        script = f'"{sys.executable}" -c "{UP}" && exec bash "{SCRIPT}" "$@"'
        done = subprocess.run(
            [*NAMESPACE, "bash", "-c", script, "job", *flags],
            cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=600,
        )  # fmt: skip
        said = done.stdout + done.stderr
        assert done.returncode == 0, said
        return said

    try:
        said = job()
        assert "On head node. Starting Ray cluster head..." in said
        rows = json.loads((output / "results.json").read_text())["trials"]
        assert [row["state"] for row in rows] == ["done"]
        assert "--resume" in job()
        assert (output / "best" / "manifest.json").exists()
    finally:
        shutil.rmtree(environment["RAY_TMPDIR"], ignore_errors=True)
