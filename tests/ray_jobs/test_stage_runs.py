"""A sweep whose trials share a first stage: killed in it, it goes on, and a single run finds it made."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.ray_jobs.conftest import REPOSITORY, TINY, log_of

pytestmark = pytest.mark.slow

STEPS = (
    "--max_steps=4", "--set", "training.evaluate_every=2", "--set", "stages.recite.training.max_steps=40",
    "--set", "stages.recite.training.evaluate_every=10", "--set", "stages.recite.training.alignment_steps=4",
    "--set", "stages.recite.training.coarsening_steps=4",
)  # fmt: skip


def test_a_shared_stage_survives_its_driver_and_serves_a_single_run(tmp_path: Path) -> None:
    shards, output = tmp_path / "shards", tmp_path / "sweep"

    def command(*words: str) -> subprocess.Popen:
        log = (tmp_path / "log").open("w")
        return subprocess.Popen(
            [sys.executable, "-m", "latentwire", *words],
            cwd=REPOSITORY,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def wait_for(condition: Callable[[], object]) -> None:
        end = time.time() + 400
        while not condition():
            assert process.poll() is None and time.time() < end, log_of(tmp_path)
            time.sleep(0.2)

    places = ("--set", f"data.shard_dir={shards}")
    flags = ("--config", "toy_stages", *TINY, *STEPS, *places)
    process = command("tune", *flags, "--set", "tune.trials=2", "--output", str(output))
    try:
        work = ".stage-recite-*.training/checkpoints/step-*/manifest.json"
        wait_for(lambda: list(shards.glob(work)))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert not list(shards.glob("stage-recite-*"))
        process = command("tune", "--resume", str(output))
        assert process.wait(800) == 0, log_of(tmp_path)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    logs = [(output / "trials" / f"trial-{n}" / "log.txt").read_text() for n in (0, 1)]
    assert sum("resumed at step" in log.partition("stage answers")[0] for log in logs) == 1
    assert sum(log.count("stage recite 1/2  step 40/40") for log in logs) == 1
    (recite,) = shards.glob("stage-recite-*")
    assert not list(shards.glob(".stage-*"))
    document = json.loads((output / "results.json").read_text())
    assert [row["state"] for row in document["trials"]] == ["done"] * 2
    (stage,) = document["stages"]
    assert stage["directory"] == str(recite)
    assert [one["step"] for one in stage["evaluations"]] == [10, 20, 30, 40]
    assert "Learning curves: stage recite" in (output / "report.html").read_text()
    pins = json.loads((output / "best" / "manifest.json").read_text())["pins"]
    assert pins["stages"] == {"recite": recite.name}

    single = tmp_path / "single"
    assert command("train", *flags, "--output", str(single), "--ray").wait(600) == 0, log_of(
        tmp_path
    )
    assert f"reused from {recite}" in log_of(tmp_path)
    assert "stage answers 2/2  step 4/4" in log_of(tmp_path)
    results = json.loads((single / "results.json").read_text())
    assert results["stages"] == document["stages"]
