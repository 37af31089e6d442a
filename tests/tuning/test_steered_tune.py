"""Orders while Ray Tune itself runs the trials: its loop stops, pauses, adds and ends as the study says."""

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray import tune

from latentwire.api.sweep import Sweep
from latentwire.config import SweepConfig
from latentwire.distributed.trial import NUMBER, TAKES_UP, trial_path
from latentwire.tuning import resume, steering, sweep
from latentwire.tuning.space_file import write_space
from latentwire.tuning.study import own_trials

pytestmark = pytest.mark.slow
STEPS = 1_000_000
WAIT = 600.0
REPORT_SECONDS = 1.0
"""Between two reports of a trial, and two looks at the sweep: the driver that is looked at is in this process."""


def fake_trial(values: dict[str, Any], *, trial_dir: Path, **_: Any) -> None:
    """Report step after step, from where the directory says that an earlier process was."""
    folder = trial_path(trial_dir, values.get(TAKES_UP, values[NUMBER]))
    folder.mkdir(parents=True, exist_ok=True)
    last = folder / "last"
    step = int(last.read_text()) if last.exists() else 0
    while step < STEPS:
        step += 1
        time.sleep(REPORT_SECONDS)
        last.write_text(str(step))
        tune.report({"step": step, "total_steps": STEPS, "dev_f1": 0.5, "wire_bytes": 64} | dict.fromkeys(
            ("first_train_loss", "train_loss", "examples_per_s", "train_seconds"), 1.0
        ))  # fmt: skip


@pytest.fixture
def running_ray() -> Iterator[None]:
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.mark.usefixtures("running_ray")
def test_every_order_is_carried_out_in_tunes_own_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "sweep"
    space = SweepConfig.model_validate({"tune": {"trials": 2, "scheduler": "none"}})
    write_space(space, output)
    monkeypatch.setattr(steering, "LOOK_SECONDS", 0.5)
    for name, value in {
        "common_protocol_hash": lambda *_: "pin", "load_datasets": lambda *_: {}, "pins": lambda *_: {},
        "most_steps": lambda *_: STEPS, "drive_trial": fake_trial,
    }.items():  # fmt: skip
        monkeypatch.setattr(sweep, name, value)
    files: Any = {
        "all": SimpleNamespace(shards={"dev": None, "train": None}, train_rows=1, is_scored=True)
    }
    plan: Any = SimpleNamespace(worker_gpus=0, max_concurrent_trials=2)
    steered, seen = Sweep(output), dict[str, Any]()

    def steps() -> dict[int, int]:
        return {row["trial"]: row.get("step", 0) for row in steered.status().trials}

    def states() -> dict[int, str]:
        return {row["trial"]: row["state"] for row in steered.status().trials}

    def wait_for(condition: Callable[[], object]) -> None:
        end = time.time() + WAIT
        while not condition():
            assert time.time() < end, (states(), steered.status().orders)
            time.sleep(REPORT_SECONDS)

    def outcome(order_id: str) -> str:
        (each,) = [each for each in steered.status().orders if each.id == order_id]
        return "open" if each.outcome is None else f"{each.outcome.state}: {each.outcome.reason}"

    def give_orders() -> None:
        try:
            wait_for(lambda: all(steps().get(number) for number in (0, 1)))
            stop, add = steered.stop(0), steered.add(1)
            wait_for(lambda: states()[0] == "stopped" and steps().get(2))
            seen["running"] = states()[1]
            wait_for(lambda: outcome(stop.id).startswith("done: trial 0 is stopped at step "))
            seen["added"] = outcome(add.id)
            pause = steered.pause(1)
            wait_for(lambda: states()[1] == "paused" and outcome(pause.id).startswith("done"))
            paused_at = steps()[1]
            up = steered.resume(1)
            wait_for(lambda: steps()[1] > paused_at + 1)
            seen["resumed"] = outcome(up.id)
        finally:
            seen["end"] = steered.end().id

    thread = threading.Thread(target=give_orders)
    thread.start()
    study = sweep.run_sweep(space, plan, files, output, takes_orders=True)
    thread.join()
    assert seen["running"] == "unfinished" and seen["added"] == "done: tune.trials is 3"
    assert seen["resumed"].startswith("done: trial 1 goes on at step ")
    assert outcome(seen["end"]).startswith("done: the search ended with 1 of 3 trials; cut, with")
    assert [trial.state.name for trial in own_trials(study)] == ["PRUNED", "RUNNING", "RUNNING"]
    values = study.trials[1].intermediate_values
    assert sorted(values) == list(range(1, len(values) + 1))  # it went on, and began nothing anew
    assert resume.read_space(output, []).tune.trials == 1
