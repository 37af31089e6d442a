"""The image is of the project's versions, runs as no root, and is built from a small context that has all it needs."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

from tests.test_cluster_files import REPOSITORY

DOCKERFILE = REPOSITORY / "deploy" / "Dockerfile"


def instructions() -> list[tuple[str, str]]:
    """Instruction and the rest of its line, comments left out and continued lines joined."""
    lines = [line for line in DOCKERFILE.read_text().splitlines() if not line.startswith("#")]
    text = "\n".join(lines).replace("\\\n", " ")
    return [
        (name, " ".join(rest.split()))
        for name, _, rest in (line.partition(" ") for line in text.splitlines() if line.strip())
    ]


def context() -> list[Path]:
    """Tracked files that .dockerignore lets through, by Docker's rules for the patterns that it uses: all are out, a few names of
    the root are in again, and last comes what is out everywhere."""
    first, *patterns = [
        line
        for line in (REPOSITORY / ".dockerignore").read_text().splitlines()
        if not line.startswith("#")
    ]
    names = {line.removeprefix("!") for line in patterns if line.startswith("!")}
    everywhere = {line.removeprefix("**/") for line in patterns if line.startswith("**/")}
    assert first == "*" and len(names) + len(everywhere) == len(patterns)
    assert all((REPOSITORY / name).exists() for name in names)
    tracked = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=REPOSITORY, capture_output=True, text=True, check=True,
    ).stdout.splitlines()  # fmt: skip
    paths = [Path(name) for name in tracked]
    return [
        path for path in paths
        if path.parts[0] in names and not everywhere.intersection(path.parts)
        and (REPOSITORY / path).is_file()
    ]  # fmt: skip


def test_versions_are_the_projects() -> None:
    stages = [rest for name, rest in instructions() if name == "FROM"]
    ray = f"rayproject/ray:{version('ray')}-py311"
    assert stages == [f"{ray} AS cpu", f"{ray}-gpu AS cuda", "${DEVICE}"]
    assert instructions()[0] == ("ARG", "DEVICE=cpu")


def test_it_runs_as_no_root() -> None:
    users = [rest for name, rest in instructions() if name == "USER"]
    assert users == ["1000"]  # Ray's own, by number: so Kubernetes can see that it is not root
    copied = [rest for name, rest in instructions() if name in ("COPY", "ADD")]
    assert copied and all(rest.startswith("--chown=ray:users ") for rest in copied)
    assert not any(name == "RUN" and "sudo" in rest for name, rest in instructions())


def test_it_installs_the_pins() -> None:
    runs = [rest for name, rest in instructions() if name == "RUN"]
    assert "--requirement cluster/requirements.txt" in runs[0]
    assert "PIP_CONSTRAINT=constraints.txt" in runs[1] and "--no-deps ." in runs[1]


def test_the_context_is_small_and_holds_no_more_than_the_image_needs() -> None:
    sizes = {path: (REPOSITORY / path).stat().st_size for path in context()}
    assert sum(sizes.values()) < 15_000_000
    folders = {path.parts[0] for path in sizes if len(path.parts) > 1}
    assert folders == {"cluster", "latentwire", "presets", "ray_jobs", "search_spaces"}
    assert Path("cluster/requirements.txt") in sizes and Path("ray_jobs/tune.py") in sizes


@pytest.mark.slow
def test_the_package_is_built_from_the_context_alone(tmp_path: Path) -> None:
    """What `pip install .` does in the image, without a network: a wheel with every file of the package, data too."""
    root = tmp_path / "context"
    for path in context():
        (root / path.parent).mkdir(parents=True, exist_ok=True)
        shutil.copy(REPOSITORY / path, root / path)
    command = ["-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
    built = subprocess.run(
        [sys.executable, *command, "--wheel-dir", str(tmp_path), "."],
        cwd=root, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert built.returncode == 0, built.stdout + built.stderr
    (wheel,) = tmp_path.glob("latentwire-*.whl")
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert packed == {str(path) for path in context() if path.parts[0] == "latentwire"}


def test_the_cpu_image_can_take_a_cpu_wheel() -> None:
    """The argument comes before it is used, in the stage that uses it."""
    text = DOCKERFILE.read_text()
    assert (
        text.index("FROM ${DEVICE}")
        < text.index("ARG TORCH_WHEELS")
        < text.index("${TORCH_WHEELS}")
    )
    assert re.search(
        r"^torch==", (REPOSITORY / "cluster" / "requirements.txt").read_text(), re.MULTILINE
    )
