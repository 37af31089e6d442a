"""The winner keeps to the limits, and what fails on a worker reads as it would have read here."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas
import pytest
import ray
from ray.tune.integration.ray_train import CHECKPOINT_PATH_KEY

from latentwire.config import RunConfig, TuneConfig
from latentwire.config.resolve import ConfigError
from latentwire.tuning import results


def test_an_error_on_a_worker_is_the_users_error() -> None:
    ray.init(num_cpus=1, log_to_driver=False)
    texts = RunConfig.model_validate({"data": {"dataset": "text"}, "losses": {"bundle": "pretrain"}})
    try:
        with pytest.raises(ConfigError, match=r"^scores need questions, dataset text has none"):
            results.on_cluster(RunConfig(), 0.0, results.check_questions, texts)
    finally:
        ray.shutdown()


def result(folder: Path, name: str, scores: list[float], size: float, error: Any = None) -> SimpleNamespace:
    """A trial's result as Tune gives it: one row for each evaluation, of six steps."""
    rows = [
        {
            "step": 3 * number, "total_steps": 6, "dev_f1": score, "wire_bytes": size, "first_train_loss": 2.0,
            "train_loss": 1.0, "examples_per_s": 9.0, "time_total_s": 1.0, CHECKPOINT_PATH_KEY: str(folder),
        }
        for number, score in enumerate(scores, start=1)
    ]  # fmt: skip
    return SimpleNamespace(path=f"x/{name}", metrics_dataframe=pandas.DataFrame(rows), config={"a": 1}, error=error)


def test_the_winner_keeps_to_the_limits(tmp_path: Path) -> None:
    grid: Any = [
        result(tmp_path, "large", [0.5, 0.9], 512),
        result(tmp_path, "small", [0.6, 0.4], 64),
        result(tmp_path, "early", [0.1], 64),
    ]
    config = TuneConfig.model_validate(
        {"objectives": {"wire_bytes": "min"}, "constraints": {"wire_bytes": {"max": 100}}}
    )
    best = results.find_best(grid, config)
    assert (best.trial, best.step, best.score) == ("small", 3, 0.6)
    rows = results.trial_rows(grid, config)
    assert [(row["trial"], row["state"], row["dev_f1"], row["wire_bytes"]) for row in rows] == [
        ("large", "beyond", 0.9, 512), ("small", "done", 0.6, 64), ("early", "stopped", 0.1, 64),
    ]  # fmt: skip
    assert results.find_best(grid, TuneConfig()).trial == "large"
    tight = TuneConfig.model_validate({"constraints": {"wire_bytes": {"max": 10}}})
    with pytest.raises(results.SweepError, match=r"wire_bytes ≤ 10\), all 5 evaluations of 3 trials go beyond"):
        results.find_best(grid, tight)
