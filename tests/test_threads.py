"""A process takes the threads that it was given, and lets others run while these wait for each other."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from latentwire.api import evaluate, train
from latentwire.cli import main
from latentwire.config import RunConfig
from latentwire.config.resolve import ConfigError
from latentwire.threads import cores, use_threads


def spin_count(**environment: str) -> int:
    """How often a thread of OpenMP looks for work before it sleeps, in a process that imports the package."""
    here = {
        name: value
        for name, value in os.environ.items()
        if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    }
    done = subprocess.run(
        [sys.executable, "-c", "import latentwire.threads"],
        env=here | {"OMP_DISPLAY_ENV": "VERBOSE"} | environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    found = re.search(r"GOMP_SPINCOUNT = '(\d+)'", done.stderr)
    if found is None:
        pytest.skip("this torch has another OpenMP than GNU's")
    return int(found[1])


def test_threads_wait_asleep_unless_told_otherwise() -> None:
    assert spin_count() == 0
    assert spin_count(OMP_WAIT_POLICY="ACTIVE") > 0


def test_no_more_threads_than_cores() -> None:
    assert use_threads(0.25) == torch.get_num_threads() == 1
    assert use_threads(1e6) == torch.get_num_threads() == cores()


@pytest.mark.skipif(cores() < 2, reason="needs two cores")
def test_training_takes_the_threads_of_a_worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for cpus in (2, 1):
        flags = ["--output_dir", str(tmp_path / "run"), "--set", f"training.cpus_per_worker={cpus}"]
        monkeypatch.setattr(train, "local_shards", stop)
        assert main(["train", *flags]) == 2
        assert torch.get_num_threads() == cpus
        assert (
            f"threads: {cpus} of {cores()} cores (training.cpus_per_worker)"
            in capsys.readouterr().out
        )


@pytest.mark.skipif(cores() < 2, reason="needs two cores")
def test_an_evaluation_takes_the_threads_of_a_worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate.exports, "read_manifest", lambda folder: {})
    monkeypatch.setattr(evaluate.exports, "read_run", lambda folder: RunConfig())
    monkeypatch.setattr(evaluate, "local_shards", stop)
    monkeypatch.setattr(evaluate.exports, "check_models", lambda folder, run: None)
    assert (
        main(["evaluate", "--checkpoint", str(tmp_path), "--set", "training.cpus_per_worker=2"])
        == 2
    )
    assert torch.get_num_threads() == 2


def stop(*_: object, **__: object) -> None:
    """End a command where its long work would begin."""
    raise ConfigError("far enough")
