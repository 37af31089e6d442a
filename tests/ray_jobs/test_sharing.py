"""A sweep whose trials share their receivers, some of them stopped early."""

import json
import re
from pathlib import Path

import pytest

from tests.ray_jobs.conftest import ONE_VARIANT, TINY, Job, log_of


@pytest.mark.slow
def test_trials_that_are_stopped_leave_nothing_with_shared_receivers(
    job: Job, tmp_path: Path
) -> None:
    output = tmp_path / "sweep"
    steps = (
        "--max_steps=40",
        "--epochs=40",
        "--set",
        "training.evaluate_every=10",
        "--set",
        "tune.grace_steps=10",
    )
    seen = (
        "--set",
        "tune.receivers=shared",
        "--set",
        "tune.reduction_factor=2",
        "--set",
        "tune.metric=dev_loss",  # no two are equal, as scores are that early
        "--set",
        "tune.mode=min",
        "--set",
        "tune.trials=4",
    )
    process = job(
        "ray_jobs/tune.py", *ONE_VARIANT, *TINY, *steps, *seen, "--output_dir", str(output)
    )
    assert process.wait(600) == 0, log_of(tmp_path)
    log = log_of(tmp_path)
    assert "receivers: shared, 1 replica(s) each of llama 0." in log
    document = json.loads((output / "results.json").read_text())
    states = {row["state"] for row in document["trials"]}
    assert len(document["trials"]) == 4 and states == {"done", "stopped"}
    for name in (
        "llama",
        "qwen",
    ):  # the last thing that replicas say, before they go: nothing waits
        (used,) = re.findall(
            rf"shared {name}: ([\d,]+) requests of 4 trials in [\d,]+ passes, 0 of them joined.*; 0 wait still",
            log,
        )
        assert int(used.replace(",", "")) > 60
    # The wire is scored with receivers of its own, and knows them by the same hashes.
    assert document["validation"]["latent"]["llama"]["em"] is not None
