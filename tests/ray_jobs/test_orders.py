"""A real sweep is steered from outside, by every order, and its driver dies between one and its deed."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from latentwire.api.sweep import Sweep
from latentwire.training.step_checkpoints import step_name
from latentwire.tuning.orders import OrderError
from latentwire.tuning.resume import read_space
from latentwire.tuning.study import JOURNAL, read_study
from tests.ray_jobs.conftest import ONE_VARIANT, REPOSITORY, TINY, log_of

pytestmark = pytest.mark.slow


def test_a_sweep_is_steered_while_it_runs_and_while_its_driver_is_dead(
    tmp_path: Path, common_shards: Path
) -> None:
    output = tmp_path / "sweep"
    steps = ("--max_steps=9000", "--epochs=900", "--set", "training.evaluate_every=20")
    seen = ("--set", "tune.scheduler=none", "--set", "tune.trials=2", "--set", f"data.shard_dir={common_shards}")  # fmt: skip

    def command(*arguments: str) -> subprocess.Popen:
        with (tmp_path / "log").open("w") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "latentwire", "tune", *arguments],
                cwd=REPOSITORY, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    def wait_for(condition: Callable[[], object]) -> None:
        end = time.time() + 800
        while not condition():
            assert process.poll() is None and time.time() < end, log_of(tmp_path)
            time.sleep(0.2)

    def states() -> dict[int, str]:
        with read_study(output / JOURNAL, output.name, {"dev_f1": "max"}) as study:
            return {trial.number: trial.state.name for trial in study.trials}

    def outcome(order_id: str) -> str:
        (each,) = [each for each in Sweep(output).status().orders if each.id == order_id]
        return "open" if each.outcome is None else f"{each.outcome.state}: {each.outcome.reason}"

    def trial_log(number: int) -> str:
        return (output / "trials" / f"trial-{number}" / "log.txt").read_text()

    def checkpoints(number: int) -> list[Path]:
        return list(output.glob(f"trials/trial-{number}/step-*/manifest.json"))

    process = command(*ONE_VARIANT, *TINY, *steps, *seen, "--output", str(output))
    try:
        wait_for(lambda: checkpoints(0) and checkpoints(1))
        sweep = Sweep(output)
        # A checkpoint lies there before the driver has written its score into the study.
        wait_for(lambda: sweep.status().best is not None)
        assert sweep.status().has_driver
        stop, more = sweep.stop(0), sweep.add(1)
        wait_for(lambda: states().get(0) == "PRUNED" and 2 in states())
        wait_for(lambda: outcome(stop.id).startswith("done: trial 0 is stopped at step "))
        wait_for(lambda: outcome(more.id) == "done: tune.trials is 3")
        assert states()[1] == "RUNNING"
        wait_for(lambda: checkpoints(2))

        pause = sweep.pause(1)
        wait_for(lambda: outcome(pause.id).startswith("done: trial 1 is paused at step "))
        paused_at = max(checkpoints(1))
        clone = sweep.clone(2, {"training.warmup_steps": 5})
        wait_for(lambda: outcome(clone.id).startswith("done: trial 3 is a clone of 2 at step "))
        wait_for(lambda: checkpoints(3))  # in the place that the paused trial has left
        assert f"started from {output}/trials/clone-{clone.id}/" in trial_log(3)
        up, free = sweep.resume(1), sweep.stop(2)
        wait_for(lambda: states()[2] == "PRUNED" and max(checkpoints(1)) > paused_at)
        wait_for(lambda: outcome(up.id).startswith("done: trial 1 goes on at step "))
        (resumed,) = re.findall(r"resumed at step (\d+) from", trial_log(1))
        assert step_name(int(resumed)) >= paused_at.parent.name
        wait_for(lambda: outcome(free.id).startswith("done"))

        os.kill(process.pid, signal.SIGSTOP)  # so that it reads no order before it dies
        between = sweep.add(1)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert not sweep.status().has_driver and outcome(between.id) == "open"
        process = command("--resume", str(output))
        wait_for(lambda: outcome(between.id) == "done: tune.trials is 5")
        assert read_space(output, []).tune.trials == 5
        end = sweep.end()
        assert process.wait(800) == 0, log_of(tmp_path)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert outcome(end.id).startswith("done: the search ended with 2 of 5 trials; cut, with their")
    assert states()[0] == "PRUNED" and set(states().values()) <= {"PRUNED", "RUNNING"}
    status = sweep.status()
    assert status.is_over and status.space.tune.trials == status.ended == 2
    assert all(not each.is_open for each in status.orders)
    document = json.loads((output / "results.json").read_text())
    assert {row["trial"]: row["state"] for row in document["trials"]}[0] == "stopped"
    assert (output / "best" / "manifest.json").exists() and (output / "report.html").exists()
    with pytest.raises(OrderError, match="sweep is over"):
        sweep.stop(1)
