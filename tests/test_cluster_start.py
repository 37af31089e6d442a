"""What keeps Ray from starting or being joined is one line, before long work."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import ray
from ray._private import utils
from ray.exceptions import AuthenticationError

from latentwire.distributed import cluster
from latentwire.distributed.cluster import ClusterError

JOB = "from latentwire.distributed.cluster import start_ray; start_ray()"


def start(**environment: str) -> str:
    """The last line of a process that starts Ray."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in ("RAY_ADDRESS", "RAY_TMPDIR")
    }
    done = subprocess.run(
        [sys.executable, "-c", JOB],
        env=kept | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    return done.stderr.splitlines()[-1]


def test_a_temporary_directory_too_long_for_sockets(tmp_path: Path) -> None:
    folder = tmp_path / ("long" * 20)
    folder.mkdir()
    said = start(RAY_ADDRESS="local", TMPDIR=str(folder))
    assert f"paths of Ray's sockets may have 107 bytes, got a temporary directory {folder}" in said
    assert (
        said.startswith("latentwire.distributed.cluster.ClusterError: ")
        and "export RAY_TMPDIR=/tmp/ray-" in said
    )


def test_a_temporary_directory_of_another_user() -> None:
    said = start(RAY_ADDRESS="local", TMPDIR="/sys")  # where root may make nothing either
    assert "Ray's files must be this user's to write, got [Errno" in said and "'/sys/ray'" in said
    assert "another user's, or read-only; export RAY_TMPDIR=/tmp/ray-" in said


def test_an_address_where_no_ray_is(monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        socket.socket() as silent
    ):  # holds its port, which another test's Ray might take, and hears nothing
        silent.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setenv("RAY_ADDRESS", address)
        with pytest.raises(
            ClusterError, match=rf"a running Ray's address, got {address}, which does not answer"
        ):
            cluster.start_ray()
    for other in ("auto", "local", "ray://host:10001"):
        cluster.check_reached(other)


def failing(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """Let Ray fail so."""

    def init(**_: Any) -> None:
        raise error

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "is_initialized", lambda: True)


def test_a_cluster_of_another_version(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError) as theirs:  # as Ray says it
        utils.check_version_info(
            {"ray_version": "2.9.3", "python_version": "3.10.1"}, "node 10.0.0.1", True
        )
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    failing(monkeypatch, theirs.value)
    with pytest.raises(ClusterError) as caught:
        cluster.start_ray()
    assert f"got Ray {ray.__version__} on Python " in str(caught.value) and "\n" not in str(
        caught.value
    )
    assert "here and Ray 2.9.3 on Python 3.10.1 at 10.0.0.1:6379; install those" in str(
        caught.value
    )


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            AuthenticationError("wrong token"),
            r"must have its cluster's token.*put its token into RAY_AUTH_TOKEN",
        ),
        (
            ConnectionError("Could not find any running Ray instance."),
            r"a running Ray's address, got auto",
        ),
        (
            Exception("The current node timed out during startup."),
            r"other work keeps this machine busy",
        ),
    ],
)
def test_what_else_is_said(error: Exception, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    failing(monkeypatch, error)
    with pytest.raises(ClusterError, match=said):
        cluster.start_ray()


def test_an_error_that_is_nobodys_fault_keeps_its_traceback(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    failing(monkeypatch, RuntimeError("a bug"))
    with pytest.raises(RuntimeError, match="a bug"):
        cluster.start_ray()
