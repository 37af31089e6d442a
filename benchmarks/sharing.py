"""What shared receivers cost and save: one trial with its own, one that shares, and four that share at once."""

from __future__ import annotations

import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import ray

from benchmarks.gpu_shapes import SHAPES
from benchmarks.measure import Row
from benchmarks.trials import in_halves, start_parts
from latentwire.config import RunConfig, SweepConfig
from latentwire.config.resolve import load_space, with_values
from latentwire.config.space import TuneConfig
from latentwire.distributed import cluster, replica_sets, sweep_files
from latentwire.planning import planner
from latentwire.tuning import sweep
from latentwire.tuning.study import evaluations

TOGETHER = 4
HOLDERS = ("ray::RayTrainWorker", "ray::ReplicaActor")
"""Processes that hold weights, activations or trained parameters."""
GPU_BYTES = 141e9
"""Of an H200."""


@dataclass(frozen=True)
class Sweep:
    """What a small sweep measured."""

    examples_per_s: float
    """Of all trials, each in its second half."""
    peak_bytes: float
    """Of the holders together, each page counted once (PSS)."""
    starts: list[float]
    """Seconds from each trial's start to its first step, in order."""
    parts: dict[str, float]
    """Of the last trial's start."""


class Peak:
    """The largest sum of the holders' memory while this context lasts."""

    def __enter__(self) -> Peak:
        self.bytes, self._end = 0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._end.set()
        self._thread.join()

    def _watch(self) -> None:
        # wait is a pause of a second that the end cuts short.
        while not self._end.wait(1.0):
            self.bytes = max(self.bytes, sum(map(_pss, psutil.Process().children(recursive=True))))


def _pss(process: psutil.Process) -> int:
    try:
        # Ray names its workers by what they run.
        is_holder = (process.cmdline() or [""])[0].startswith(HOLDERS)
        return process.memory_full_info().pss if is_holder else 0
    except psutil.Error:
        # The process has ended meanwhile.
        return 0


def rows(space: SweepConfig, steps: int) -> list[Row]:
    """The second of two halves of ``steps`` steps each, and the memory at its worst."""
    run = in_halves(space.run, steps)
    alone = _sweep(run, "own", 1)
    one = _sweep(run, "shared", 1)
    # Four trials share the CPUs that one has.
    part = with_values(run, {"training.cpus_per_worker": run.training.cpus_per_worker / TOGETHER})
    four = _sweep(part, "shared", TOGETHER)
    pair = " + ".join(receiver.name for receiver in run.receivers)
    gb = f"{pair}: {four.peak_bytes / 1e9:.2f} / {alone.peak_bytes / 1e9:.2f} GB (PSS of workers and replicas)"
    start = ", ".join(f"{what} {seconds:.1f} s" for what, seconds in four.parts.items())
    starts = ", ".join(f"{seconds:.1f}" for seconds in one.starts + four.starts)
    rates = f"{four.examples_per_s:.2f} / {alone.examples_per_s:.2f} examples/s"
    return [
        Row(f"memory of {TOGETHER} trials that share ÷ one with its own", four.peak_bytes / alone.peak_bytes, "≤ 1.3", gb),
        Row("start of a trial that shares, to its first step, in seconds", min(four.starts[1:] + one.starts), "≤ 5",
            f"alone {one.starts[0]:.1f}, four at once {starts}; with its own {alone.starts[0]:.1f}; the last: {start}"),
        Row(f"examples/s of {TOGETHER} that share ÷ one after another with its own", four.examples_per_s / alone.examples_per_s,
            "≥ 1.0", rates),
        Row("time of a step of one trial that shares ÷ with its own", alone.examples_per_s / one.examples_per_s, "≤ 1.1",
            f"{run.training.batch_size / one.examples_per_s:.2f} / {run.training.batch_size / alone.examples_per_s:.2f} s"),
    ]  # fmt: skip


def _sweep(run: RunConfig, receivers: Any, trials: int) -> Sweep:
    tune = TuneConfig(
        trials=trials, scheduler="none", receivers=receivers, max_concurrent_trials=trials
    )
    space = SweepConfig(run=run, tune=tune)
    cluster.start_ray()
    try:
        plan = planner.plan(
            space, ray.cluster_resources(), planner.node_memory(run.training.gpus_per_worker)
        )
        with tempfile.TemporaryDirectory() as folder:
            files = sweep_files.prepare(space, plan.gpus_per_worker)
            with Peak() as peak, replica_sets.serving(space, plan.sharing) as served:
                study = sweep.run_sweep(space, plan, files, Path(folder) / "sweep", served=served)
            rate, starts, parts = 0.0, [], {}
            # in_halves: two evaluations a trial. Its second half has no start and no compilation.
            for half, end in map(evaluations, study.trials):
                seconds = end["train_seconds"] - half["train_seconds"]
                rate += (end["step"] - half["step"]) * run.training.batch_size / seconds
                parts = start_parts(end) | {"first step": float(half["first_step_s"])}
                starts.append(sum(parts.values()))
        return Sweep(rate, peak.bytes, starts, parts)
    finally:
        ray.shutdown()


def on_one_gpu(accumulation: int) -> list[Row]:
    """Memory and trials by the planner, for the full-size pair in bf16 and the README's byte encoder: configurations alone, no weights.

    Batches of eight texts of up to 2 KiB, in so many parts.
    """
    space = load_space(Path(__file__).parents[1] / "search_spaces" / "llama_qwen.yaml")
    with tempfile.TemporaryDirectory() as folder:
        models = {}
        for name, (kind, sizes) in SHAPES.items():
            models[name] = f"{folder}/{name}"
            kind(**sizes, tie_word_embeddings=False).save_pretrained(models[name])
        receivers = [r.model_copy(update={"model": models[r.name]}) for r in space.run.receivers]
        values = {
            "encoder.latent_len": 32,
            "encoder.d_z": 256,
            "data.max_context_bytes": 2048,
            "training.batch_size": 8,
            "training.accumulation": accumulation,
            "training.coarsening_steps": 0,
            "encoder.pooling": "queries",
            "features.deep_prefix": None,
        }
        run = with_values(space.run, values).model_copy(update={"receivers": tuple(receivers)})
        tune = TuneConfig(trials=1000, receivers="shared", joined_trials=1)
        plan = planner.plan(
            SweepConfig(run=run, tune=tune), {"CPU": 1e5, "GPU": 1.0}, GPU_BYTES, files=False
        )
    assert plan.sharing is not None
    shared, alone = plan.max_concurrent_trials, int(GPU_BYTES // plan.bytes_per_worker)
    # The replicas once, and what each trial holds besides.
    replicas = sum(plan.sharing.bytes_per_replica.values())
    together = replicas + TOGETHER * plan.sharing.bytes_per_worker
    what = f"8B + 7B, by the planner, batches of 8 in {accumulation} part(s)"
    return [
        Row(f"memory of {TOGETHER} trials that share ÷ one with its own: {what}", together / plan.bytes_per_worker, "≤ 1.3",
            f"{together / 1e9:.1f} / {plan.bytes_per_worker / 1e9:.1f} GB"),
        Row(f"trials that fit one GPU of 141 GB, shared ÷ own: {what}", shared / max(1, alone), "3 → ≥ 30",
            f"{alone} → {shared}; {plan.sharing}"),
    ]  # fmt: skip
