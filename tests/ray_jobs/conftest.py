"""Run the jobs as a user would: as commands, in processes of their own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent.parent
Job = Callable[..., subprocess.Popen]


@pytest.fixture(scope="session")
def common_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of shards for commands that are about other things: whichever needs some first makes them."""
    return tmp_path_factory.mktemp("shards")


@pytest.fixture
def job(tmp_path: Path, common_shards: Path) -> Job:
    """Start ``python <script> <flags>`` with its output in ``tmp_path/log``; ``shards``: a directory of its own for them."""

    def start(script: str, *flags: str, shards: Path | None = None) -> subprocess.Popen:
        log = (tmp_path / "log").open("w")
        where = ["--set", f"data.shard_dir={shards or common_shards}"]
        return subprocess.Popen(
            [sys.executable, script, *flags, *where],
            cwd=REPOSITORY,
            stdout=log,
            stderr=subprocess.STDOUT,
        )

    return start


def log_of(tmp_path: Path) -> str:
    return (tmp_path / "log").read_text()


TINY = (
    "--samples=200", "--set", "data.dev_samples=16", "--set", "data.validation_samples=16",
    "--set", "data.dev_fraction=0.1", "--batch_size=8", "--set", "encoder.d_model=32", "--set", "encoder.layers=1",
    "--set", "training.log_every=2", "--set", "training.alignment_steps=2", "--set", "evaluation.tuned_text=null",
)  # fmt: skip
"""Flags that make a toy run of seconds."""
ONE_VARIANT = ("--config", str(Path(__file__).parent / "one_variant.yaml"))
"""The toy's space without what makes a second set of shards: seconds less for a sweep that is about other things."""
