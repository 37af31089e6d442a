"""The work of every worker of a trial.

It stands apart from :mod:`latentwire.distributed.trial`, whose importers need no receivers.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from typing import Any

import psutil
import pyarrow as pa
import ray.data
import ray.train
import torch
from ray.train.collective import broadcast_from_rank_zero
from ray.tune.integration.ray_train import CHECKPOINT_PATH_KEY

from latentwire import exports
from latentwire.data import documents, positions, streams
from latentwire.distributed.prometheus import TrialMetrics
from latentwire.distributed.replicas import shared_receivers
from latentwire.distributed.task import EARLIER, WorkerTask, leave_cause
from latentwire.distributed.waiting import is_lasting
from latentwire.distributed.worker_output import ProgressTeller, tell
from latentwire.model import LatentWire
from latentwire.receivers.memory import is_out_of_memory
from latentwire.receivers.remote import RemoteReceiver
from latentwire.threads import use_threads
from latentwire.training import checkpoints, step_checkpoints
from latentwire.training.loop import Trainer
from latentwire.training.workers import Workers

PREEMPTION_STEPS = 5
"""Steps between two looks for a notice that this node goes away: all workers look together, which costs milliseconds."""


def train(task: WorkerTask) -> None:
    """Train; an error that would come again leaves its cause and ends the run without another try."""
    try:
        _train(task)
    except Exception as error:
        if task.run.training.num_workers > 1 or not (is_lasting(error) or is_out_of_memory(error)):
            raise  # of several workers the others would wait for this one
        # To return is to succeed for Ray Train, which then tries nothing again; the cause stays.
        leave_cause(task.folder, task.run, error)
        print(f"error: {error}", flush=True)


def _train(task: WorkerTask) -> None:
    run = task.run
    entered = time.time()
    use_threads(run.training.cpus_per_worker)  # Ray leaves torch at the machine's count
    cap_memory(task.gpus)
    workers = Workers()
    served = task.served
    wire = LatentWire(
        run, None if served is None else shared_receivers(run, served, str(task.folder))
    )
    frozen = wire.fingerprints()
    if (expected := task.pins.get("receivers", frozen)) != frozen:
        raise exports.CheckpointError(
            f"receivers must hash to {expected} as in the manifest, these to {frozen}"
        )
    pins = task.pins | {"receivers": frozen}
    # None: batches are filled by rows, and a step is a fixed share of an epoch.
    units = positions.units_of(run, task.train_shards)
    if units is None:
        steps_per_epoch = max(1, task.train_rows // run.training.rows_per_batch)
        trainer = Trainer(wire, steps_per_epoch, workers, task.train_shards)
    else:
        all_steps = streams.packed_steps(run.training, units)
        trainer = Trainer(wire, 1, workers, task.train_shards, all_steps)
    folder, chosen = task.folder, (task.metric, task.mode)
    trainer.title, name = task.stage, task.home.name
    # All workers go on from the checkpoint that the first one sees.
    last = broadcast_from_rank_zero([path.name for path in step_checkpoints.finished(folder)][-1:])
    checkpoints.restore(trainer, folder / last[0] if last else None)
    if last and workers.rank == 0:
        among = f", workers: {workers.size}" if run.training.is_elastic else ""
        tell(f"{name}: resumed at step {trainer.progress.step} on {socket.gethostname()}{among}")
    blocks = rows_of(task, "dev").iter_batches(batch_size=None, batch_format="pyarrow")
    dev = pa.concat_tables(blocks)
    # A searched init_from was not there to be checked before the sweep.
    if not last and run.training.init_from is not None:
        documents.check_development(
            wire.trained_on, run.training.init_from, dev["document"].to_pylist()
        )
    wire.trained_on = wire.trained_on.with_stage(run, task.train_shards)
    gauges = TrialMetrics(name, trainer.progress.evaluations)
    held = sum(lm.held_bytes for lm in wire.receivers.values())
    started = start_times(task.began, entered)
    times = ", ".join(f"{what} {seconds:.1f} s" for what, seconds in started.items())
    workers.say(f"trial start: {times}")
    rows = rows_of(task, "train")
    tell_progress = ProgressTeller(name)
    named = {"stage": task.stage} if task.output is not None else {}

    def batches(epoch: int) -> Iterator[pa.Table]:
        if units is not None:
            stream = rows.iter_batches(batch_size=streams.SHUFFLE_ROWS, batch_format="pyarrow")
            return streams.packed_batches(
                stream, run.training, epoch, units, workers.rank, workers.size
            )
        size = run.training.rows_per_batch
        only = task.train_rows < size
        # An elastic run cuts whole batches from all rows, so that any number of workers shares
        # them. Otherwise a worker has its share of the rows, and makes its part of each batch.
        if run.training.is_elastic:
            whole = streams.streamed_batches(rows, run.training, epoch, size, keep_short=only)
            return (streams.share_of(batch, workers.rank, workers.size) for batch in whole)
        return streams.streamed_batches(
            rows, run.training, epoch, size // workers.size, keep_short=only
        )

    def epochs(epoch: int) -> Iterator[pa.Table]:
        for batch in batches(epoch):
            # Between steps: here the weights and the step that is saved agree.
            if trainer.progress.step % PREEMPTION_STEPS == 0:
                save_if_preempted()
            if workers.rank == 0:
                step, seconds = trainer.progress.step, max(trainer.progress.seconds, 1e-9)
                tell_progress(
                    step=step,
                    total_steps=trainer.total_steps,
                    train_loss=trainer.progress.loss,
                    examples_per_s=trainer.rows_done / seconds,
                    **named,
                )
            yield batch

    told: list[Any] = []

    def save_if_preempted() -> None:
        """Save once when this node is about to go; Ray starts the run again elsewhere, which counts as no failure."""
        notice = ray.train.get_preemption_info()
        if notice is not None and not told:
            told.append(notice)
            if workers.rank == 0:
                path = step_checkpoints.save_step(folder, wire, {}, pins, trainer, *chosen)
                tell(f"preemption: saved {path}, nodes {', '.join(notice.preempted_node_ids)} go")

    reported = trainer.progress.evaluations

    def placed(metrics: dict[str, Any]) -> dict[str, Any]:
        """Add the step, at which TensorBoard puts a point, and the checkpoint."""
        step = metrics["step"]
        return metrics | {
            "timesteps_total": step,
            CHECKPOINT_PATH_KEY: str(folder / step_checkpoints.step_name(step)),
        }

    traffic = Traffic(wire, trainer)

    def report() -> None:
        metrics: dict[str, Any] = {f"start_{what}_s": value for what, value in started.items()}
        # Before the evaluation, whose requests to shared receivers are none of the training's.
        metrics |= traffic.since_last()
        metrics |= trainer.evaluate(dev)
        traffic.begin()
        if trainer.progress.step >= trainer.total_steps:
            checkpoints.check_frozen(wire, frozen)
        # In trainer.progress, so that the checkpoint holds the evaluations up to this one.
        reported.append(metrics)
        if workers.rank == 0:
            tokens_read = trainer.progress.positions - trainer.progress.padded
            rate = tokens_read / max(trainer.progress.seconds, 1e-9)
            gauges.show(metrics | {"tokens_per_s": rate, "receiver_bytes": held})
            step_checkpoints.save_step(folder, wire, metrics, pins, trainer, *chosen)
        ray.train.report(placed(metrics))

    # The process that saved them may have died before all were told. A report is judged by the
    # scheduler, which must see the last one alone.
    if reported:
        *earlier, latest = map(placed, reported)
        ray.train.report(latest | {EARLIER: json.dumps(earlier)})
    trainer.train(epochs, report)


def rows_of(task: WorkerTask, name: str) -> Any:
    """Return this worker's iterator over ``train`` or ``dev``."""
    return ray.train.get_dataset_shard(name) if task.rows is None else task.rows[name]


class Traffic:
    """Traffic with shared receivers for training, from one evaluation's end to the next one's start."""

    def __init__(self, wire: LatentWire, trainer: Trainer) -> None:
        self.shared = [lm for lm in wire.receivers.values() if isinstance(lm, RemoteReceiver)]
        self.trainer = trainer
        self.begin()

    def begin(self) -> None:
        """Count from here."""
        self.step, self.bytes = self.trainer.progress.step, sum(lm.bytes_sent for lm in self.shared)

    def since_last(self) -> dict[str, float]:
        """Return ``shared_mb_per_step``; nothing where receivers are the worker's own."""
        if not self.shared:
            return {}
        steps = self.trainer.progress.step - self.step
        sent = sum(lm.bytes_sent for lm in self.shared) - self.bytes
        return {"shared_mb_per_step": sent / 1e6 / max(1, steps)}


def cap_memory(gpus: float) -> None:
    """Keep a worker that has a share of a GPU to that share of its memory: Ray counts shares, but holds nobody to them."""
    if 0 < gpus < 1 and torch.cuda.is_available():
        torch.cuda.set_per_process_memory_fraction(gpus)


def start_times(began: float, entered: float) -> dict[str, float]:
    """Return the seconds from a trial's start to this process (Ray's part), to its code (imports), and to here (loading)."""
    here = max(began, psutil.Process().create_time())  # Ray may have had one waiting
    return {"process": here - began, "code": entered - here, "loading": time.time() - entered}
