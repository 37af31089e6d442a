"""One run on Ray: the worker's training loop, and the driver that starts a TorchTrainer for it."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import ray.data
import ray.train
import torch
from ray.train.torch import TorchTrainer

from latentwire.assembly import LatentWire
from latentwire.config import RunConfig
from latentwire.data import streams
from latentwire.training import checkpoints
from latentwire.training.loop import Trainer
from latentwire.training.workers import Workers
from latentwire.tuning.gauges import Gauges

WORKER_START_SECONDS = "600"
"""Ray Train gives a worker one minute to start; a busy machine or a node that is being added takes longer. The planner
has refused what could never start."""


def train_worker(settings: dict[str, Any]) -> None:
    """What every worker of a trial runs; continues from the trial's last checkpoint where there is one.

    ``settings``: ``run`` (a dumped :class:`RunConfig`), ``pins``, ``train_rows``, ``gpus`` (of one
    worker), ``began`` (when the trial did).
    """
    entered = time.time()
    run = RunConfig.model_validate(settings["run"])
    torch.set_num_threads(max(1, int(run.training.cpus_per_worker)))  # Ray leaves torch at the machine's count
    cap_memory(settings["gpus"])
    workers = Workers()
    wire = LatentWire(run)
    frozen = {name: lm.fingerprint() for name, lm in wire.receivers.items()}
    pins = settings["pins"] | {"receivers": frozen}
    batch_size = run.training.batch_size // workers.size
    trainer = Trainer(wire, max(1, settings["train_rows"] // run.training.batch_size), workers)
    previous = ray.train.get_checkpoint()
    if previous is not None:
        with previous.as_directory() as path:
            checkpoints.load_training(Path(path), trainer)
        print(f"resumed at step {trainer.progress.step} from {previous.path}", flush=True)
    elif run.training.init_from is not None:
        checkpoints.initialise(run.training.init_from, wire)
    gauges = Gauges(ray.train.get_context().get_experiment_name())
    held = sum(p.numel() * p.element_size() for lm in wire.receivers.values() for p in lm.lm.parameters())
    notice = Notice(run.training.log_every)
    started = start_times(settings["began"], entered)
    print("trial start: " + ", ".join(f"{what} {seconds:.1f} s" for what, seconds in started.items()), flush=True)
    rows = ray.train.get_dataset_shard("train")
    dev = pa.concat_tables(ray.train.get_dataset_shard("dev").iter_batches(batch_size=None, batch_format="pyarrow"))

    def epochs(epoch: int) -> Iterator[pa.Table]:
        only = settings["train_rows"] < run.training.batch_size
        for batch in streams.streamed_batches(rows, run.training, epoch, batch_size, keep_short=only):
            if notice.given(trainer.progress.step):
                print(f"node is being taken away: checkpoint at step {trainer.progress.step}", flush=True)
                report()
            yield batch

    def report() -> None:
        metrics: dict[str, Any] = trainer.evaluate(dev) | {f"start_{what}_s": value for what, value in started.items()}
        if trainer.progress.step >= trainer.total_steps:
            changed = [name for name, lm in wire.receivers.items() if lm.fingerprint() != frozen[name]]
            if changed:
                raise RuntimeError(f"frozen receivers must not change, {', '.join(changed)} did")
        if workers.rank == 0:
            read = (trainer.progress.positions - trainer.progress.padded) / max(trainer.progress.seconds, 1e-9)
            gauges.show(metrics | {"tokens_per_s": read, "receiver_bytes": held})
            with tempfile.TemporaryDirectory() as folder:
                path = checkpoints.save(Path(folder) / "checkpoint", wire, metrics, pins, trainer)
                ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(path))
        else:
            ray.train.report(metrics)

    trainer.train(epochs, report)


def cap_memory(gpus: float) -> None:
    """Keep a worker that has a share of a GPU to that share of its memory: Ray counts shares, but holds nobody to them."""
    if 0 < gpus < 1 and torch.cuda.is_available():
        torch.cuda.set_per_process_memory_fraction(gpus)


class Notice:
    """Ray's word that a node of this trial is about to be taken away (a spot node, a drained one)."""

    def __init__(self, every: int) -> None:
        """``every``: steps between two questions; each one is a barrier of all workers."""
        self.every, self.asked, self.told = every, -1, False

    def given(self, step: int) -> bool:
        """Whether the notice is there: true once, so that one checkpoint is written for it."""
        if self.told or step == self.asked or step % self.every:
            return False
        self.asked, self.told = step, ray.train.get_preemption_info() is not None
        return self.told


def start_times(began: float, entered: float) -> dict[str, float]:
    """Seconds from a trial's start to this process (Ray's part), to its own code (imports), and to here (loading)."""
    here = psutil.Process().create_time()
    return {"process": here - began, "code": entered - here, "loading": time.time() - entered}


def metric_of(run: RunConfig) -> tuple[str, str]:
    """The metric that chooses a single run's best checkpoint, and whether more or less of it is better."""
    return ("dev_loss", "min") if run.data.dataset == "text" else ("dev_f1", "max")


def make_trainer(
    run: RunConfig,
    datasets: dict[str, ray.data.Dataset],
    train_rows: int,
    *,
    name: str,
    storage_path: str,
    gpus_per_worker: float,
    pins: dict[str, Any],
    metric: str,
    mode: str,
    callbacks: list[Any] | None = None,
) -> TorchTrainer:
    """A TorchTrainer for one run. ``name`` must be stable: Ray resumes a run whose directory exists under that name.

    ``datasets``: ``train``, of so many rows, and ``dev``. The best checkpoint by ``metric`` and the last one are kept.
    """
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", WORKER_START_SECONDS)  # Train hands it on
    resources = {"CPU": run.training.cpus_per_worker} | run.training.worker_resources
    if gpus_per_worker:
        resources["GPU"] = gpus_per_worker
    return TorchTrainer(
        train_worker,
        train_loop_config={
            "run": run.model_dump(mode="json"), "pins": pins, "train_rows": train_rows, "began": time.time(),
            "gpus": gpus_per_worker,
        },
        scaling_config=ray.train.ScalingConfig(
            num_workers=run.training.num_workers, use_gpu=gpus_per_worker > 0, resources_per_worker=resources
        ),
        run_config=ray.train.RunConfig(
            name=name,
            storage_path=storage_path,
            callbacks=callbacks,
            failure_config=ray.train.FailureConfig(max_failures=run.training.max_failures, controller_failure_limit=2),
            checkpoint_config=ray.train.CheckpointConfig(
                num_to_keep=2, checkpoint_score_attribute=metric, checkpoint_score_order=mode
            ),
        ),
        datasets=datasets,
        dataset_config=ray.train.DataConfig(datasets_to_split=["train"]),
    )  # fmt: skip
