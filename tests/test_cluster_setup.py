"""What the cluster files run on a node, run here: in a root that holds nothing but stubs, which refuse what comes too early."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from ray.autoscaler._private.command_runner import _with_interactive

from latentwire.distributed import spot
from tests.test_cluster_files import FILES, REPOSITORY, read

TOOLS = ("bash", "cat", "env", "grep", "id", "sh", "touch")
"""Of this machine: what every Ubuntu has."""
STUBS = {
    "sudo": 'exec "$@"',
    "sleep": "",
    "timeout": f'shift; exec {shutil.which("timeout")} 2 "$@"',
    "cloud-init": "touch booted; exit 2",  # it booted, with warnings
    "apt-get": """
        [ -e booted ] || { echo 'E: Could not get lock' >&2; exit 100; }
        case "$*" in *update) touch updated; exit 0;; esac
        [ -e updated ] || { echo 'E: Unable to locate package' >&2; exit 100; }
        for package in "$@"; do case $package in
          docker.io) cp later/docker bin/;; nfs-common) cp later/mount.nfs4 bin/;; pciutils) cp later/lspci bin/;;
        esac; done""",
    "nvidia-smi": "[ -e driver ] && exit 0; touch driver; [ ! -e no-driver ] || rm driver; exit 9",
    "usermod": "[ -e bin/docker ]",
    "chown": """
        case "$2" in /var/run/docker.sock) [ -e daemon ] || { echo 'no such socket' >&2; exit 1; };;
        *) echo "$1" | grep -q '^[0-9]*:[0-9]*$';; esac""",
    "mountpoint": "[ -e mounted ]",
    "mkdir": "touch made",
    "mount": """
        [ -e bin/mount.nfs4 ] && [ -e made ] || { echo 'bad option; need a helper program' >&2; exit 32; }
        [ -e resolves ] || { touch resolves; echo 'Failed to resolve server' >&2; exit 32; }
        touch mounted""",
    "chmod": '[ "$1" != 1777 ] || [ -e mounted ]',
    "pip": "touch installed",
    "ray": '[ "$1" = stop ] || [ -e installed ]',
    "setsid": 'exec "$@"',
    "flock": '[ "$1" = --nonblock ] && shift 2 && exec "$@"',
    "python": "",
}
LATER = {
    "docker": '[ -e daemon ] && exit 0; touch daemon; echo "Cannot connect to the Docker daemon" >&2; exit 1',
    "mount.nfs4": "",
    "lspci": "cat pci",
}
"""What the barest image lacks."""
NVIDIA = "31:00.0 3D controller: NVIDIA Corporation AD102GL [L40S] (rev a1)\n"


def bare(root: Path, *, gpu: bool, ready: bool = False) -> Path:
    """A root with stubs that write their calls into ``log``; ``ready``: with what an image for GPUs brings."""
    for name in ("bin", "later", "home"):
        (root / name).mkdir(parents=True)
    for name in TOOLS:
        (root / "bin" / name).symlink_to(shutil.which(name) or pytest.fail(f"no {name} here"))
    for folder, stubs in (("bin", STUBS | (LATER if ready else {})), ("later", LATER)):
        for name, body in stubs.items():
            (root / folder / name).write_text(f'#!/bin/sh\necho "{name} $*" >> log\n{body}\n')
            (root / folder / name).chmod(0o755)
    # apt-get copies, so it needs the real one under a name that no command uses.
    text = (root / "bin" / "apt-get").read_text().replace("cp later", f"{shutil.which('cp')} later")
    (root / "bin" / "apt-get").write_text(text)
    for name in ("nvidia-smi", "sleep"):
        text = (
            (root / "bin" / name).read_text().replace("rm driver", f"{shutil.which('rm')} driver")
        )
        (root / "bin" / name).write_text(text)
    (root / "pci").write_text(NVIDIA if gpu else "00:03.0 Ethernet controller: Amazon.com, Inc.\n")
    (root / "home" / ".bash_profile").write_text(f"export PATH={root}/bin\n")
    (root / "home" / ".bashrc").touch()
    return root


def run(command: str, root: Path) -> subprocess.CompletedProcess[str]:
    """One command as Ray runs it over ssh: by an interactive login shell, in an environment of its own."""
    environment = {
        "HOME": str(root / "home"),
        "USER": "ubuntu",
        "RAY_HEAD_IP": "10.0.0.1",
        "PATH": f"{root}/bin",
    }
    shell = ["bash", "-c", " ".join(_with_interactive(command))]
    return subprocess.run(
        shell,
        cwd=root,
        env=environment,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=60,
    )


def log(root: Path) -> list[str]:
    """Calls of the stubs, in order."""
    return (root / "log").read_text().splitlines()


def place(calls: list[str], start: str) -> int:
    """Where the last call that begins so stands."""
    return max(number for number, call in enumerate(calls) if call.startswith(start))


def commands(name: str) -> list[str]:
    """All that a worker runs, in Ray's order."""
    config = read(name)
    return [
        *config["initialization_commands"],
        *config["setup_commands"],
        *config["worker_start_ray_commands"],
    ]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(("gpu", "ready"), [(False, False), (True, True)], ids=["bare", "gpu"])
def test_each_step_finds_what_it_needs(tmp_path: Path, name: str, gpu: bool, ready: bool) -> None:
    root = bare(tmp_path / "root", gpu=gpu, ready=ready)
    for command in commands(name):
        done = run(command, root)
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}\n{log(root)}"
    calls = log(root)
    assert ("nvidia-smi " in calls) == gpu
    assert (
        any(call.startswith("apt-get") for call in calls) != ready
    )  # nothing is installed where it is there already
    order = [
        "cloud-init",
        "docker info",
        "chown ubuntu /var/run/docker.sock",
        "mount -t nfs4",
        "chmod 1777",
        "pip",
        "ray start",
    ]
    assert [place(calls, start) for start in order] == sorted(
        place(calls, start) for start in order
    )
    if gpu:
        assert place(calls, "nvidia-smi") < place(calls, "docker info")


@pytest.mark.parametrize("name", FILES)
def test_a_second_run_changes_nothing(tmp_path: Path, name: str) -> None:
    root = bare(tmp_path / "root", gpu=False)
    for command in [*commands(name), *commands(name)]:
        assert run(command, root).returncode == 0, command
    assert (
        sum(call.startswith(("apt-get -q -y", "mount ")) for call in log(root)) == 3
    )  # one install, a mount that is tried twice


@pytest.mark.parametrize("name", FILES)
def test_a_worker_watches_for_its_end(tmp_path: Path, name: str) -> None:
    """In the background, behind a lock that a second watcher does not get, and with what the file mounts bring."""
    mounts = read(name)["file_mounts"]
    assert mounts["/home/ray/spot.py"] == f"./{Path(spot.__file__).relative_to(REPOSITORY)}"
    root = bare(tmp_path / "root", gpu=False)
    (root / "bin" / "python").write_text("#!/bin/sh\necho watching; echo >&2 here\n")
    (command,) = (line for line in commands(name) if "spot.py" in line)
    assert run(command, root).returncode == 0
    written, end = root / "home" / "latentwire-spot.log", time.monotonic() + 30
    while not written.exists() or written.read_text() != "watching\nhere\n":
        assert time.monotonic() < end, log(root)
        time.sleep(0.05)
    program = "python /home/ray/spot.py"
    locked = f"flock --nonblock /tmp/latentwire-spot.lock {program}"
    assert log(root) == [f"setsid {locked}", locked]
    assert commands(name).index(command) > commands(name).index(
        "ray start --address=$RAY_HEAD_IP:6379"
    )
    assert not any("spot.py" in line for line in read(name)["head_start_ray_commands"])


@pytest.mark.parametrize("name", FILES)
def test_a_node_whose_driver_never_comes_fails(tmp_path: Path, name: str) -> None:
    root = bare(tmp_path / "root", gpu=True, ready=True)
    (root / "no-driver").touch()
    codes = [run(command, root).returncode for command in read(name)["initialization_commands"]]
    assert 124 in codes


@pytest.mark.parametrize("name", FILES)
def test_the_shell_of_every_command_is_well_formed(name: str) -> None:
    config = read(name)
    for key in (
        "initialization_commands",
        "setup_commands",
        "head_start_ray_commands",
        "worker_start_ray_commands",
    ):
        for command in config[key]:
            checked = subprocess.run(["bash", "-n", "-c", command], capture_output=True, text=True)
            assert checked.returncode == 0, checked.stderr
            assert shlex.split(command)
