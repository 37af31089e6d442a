"""What Ray adds to a run, and how soon a trial trains."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray

from benchmarks.measure import Row
from latentwire.config import RunConfig, SweepConfig
from latentwire.config.resolve import with_values
from latentwire.config.space import TuneConfig
from latentwire.distributed import sweep_files
from latentwire.model import LatentWire
from latentwire.planning import planner
from latentwire.training.local import table_epochs
from latentwire.training.loop import Trainer
from latentwire.tuning import sweep
from latentwire.tuning.study import evaluations


def rows(space: SweepConfig, table: pa.Table, steps: int) -> list[Row]:
    """One trial of ``2 · steps`` steps through Data, Train and Tune, the second half beside the same steps of the bare loop."""
    run = in_halves(space.run, steps)
    space = SweepConfig(run=run, tune=TuneConfig(trials=1, scheduler="none"))
    plan = planner.plan(
        space, ray.cluster_resources(), planner.node_memory(run.training.gpus_per_worker)
    )
    with tempfile.TemporaryDirectory() as folder:
        files = sweep_files.prepare(space, plan.gpus_per_worker)
        (trial,) = sweep.run_sweep(space, plan, files, Path(folder) / "sweep").trials
        half, end = evaluations(trial)
    # The second half alone: the first has Ray's start and the first step in it.
    examples = steps * run.training.batch_size
    under_ray = examples / (end["train_seconds"] - half["train_seconds"])
    bare = examples / second_half_seconds(run, table)
    parts, first = start_parts(end), float(half["first_step_s"])
    total = sum(parts.values()) + first
    detail = (
        f"Ray until the process {parts['process']:.1f} s, until our code {parts['code']:.1f} s (of which imports "
        f"{_imports():.1f} s), loading {parts['loading']:.1f} s, first step with its rows {first:.1f} s"
    )
    return [
        Row("examples/s under Ray ÷ the bare loop", under_ray / bare, "≥ 0.95", f"{under_ray:.0f} / {bare:.0f} examples/s"),
        Row("trial start to first step, in seconds", total, "≤ 6", detail),
    ]  # fmt: skip


def start_parts(report: Mapping[str, Any]) -> dict[str, float]:
    """Seconds of a trial's start, by what they went on."""
    return {part: float(report[f"start_{part}_s"]) for part in ("process", "code", "loading")}


def in_halves(run: RunConfig, steps: int) -> RunConfig:
    """A run of ``2 · steps`` steps that is looked at half-way and at its end."""
    values = {
        "training.max_steps": 2 * steps,
        "training.evaluate_every": steps,
        "training.epochs": 10**6,
    }
    return with_values(run, values)


def second_half_seconds(run: RunConfig, table: pa.Table, rank: int = 0, world: int = 1) -> float:
    """Return the bare loop's seconds for the second half of :func:`in_halves`, on a worker's share."""
    trainer = Trainer(LatentWire(run), 10**6)
    seconds: list[float] = []
    # Called at each evaluation: half-way and at the end.
    trainer.train(
        table_epochs(run.training, table, rank, world),
        lambda: seconds.append(trainer.progress.seconds),
    )
    return seconds[1] - seconds[0]


def _imports() -> float:
    """Seconds that a fresh interpreter takes for what a worker imports."""
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import latentwire.distributed.worker"], check=True)
    return time.perf_counter() - began
