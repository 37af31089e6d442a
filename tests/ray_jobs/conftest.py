"""Run the jobs as a user would: as commands, in processes of their own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent.parent
Job = Callable[..., subprocess.Popen]


@pytest.fixture
def job(tmp_path: Path) -> Job:
    """Start ``python <script> <flags>`` with its shards under ``tmp_path`` and its output in ``tmp_path/log``."""

    def start(script: str, *flags: str) -> subprocess.Popen:
        log = (tmp_path / "log").open("w")
        shards = ["--set", f"data.shard_dir={tmp_path / 'shards'}"]
        return subprocess.Popen(
            [sys.executable, script, *flags, *shards],
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
