"""One run in this process, without Ray workers: for a laptop, a single GPU, or a debugger."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Mapping
from pathlib import Path

import pyarrow as pa

from latentwire.config import RunConfig, TrainingConfig
from latentwire.data import shards, streams
from latentwire.evaluation.protocol import pins
from latentwire.model import LatentWire
from latentwire.storage import Place
from latentwire.training import checkpoints, step_checkpoints
from latentwire.training.loop import Epoch, Trainer, TrainingError


def table_epochs(training: TrainingConfig, train: pa.Table, rank: int = 0, world: int = 1) -> Epoch:
    """The batches of each epoch of a table, in an order that seed and epoch decide."""

    def epochs(epoch: int) -> Iterator[pa.Table]:
        return streams.shuffled_batches(train, training, epoch, rank, world)

    return epochs


def train_here(wire: LatentWire, paths: Mapping[shards.ShardSplit, Place], output: Path) -> Place:
    """Train to the end under ``output/checkpoints``, continuing from the last checkpoint there; returns the best one.

    Keeps the best by ``training.best_by`` and the last. Raises
    :class:`~latentwire.config.resolve.ConfigError` where development rows are of documents that the
    wire it begins with has trained on.
    """
    train = streams.training_table(wire.run, paths["train"])
    dev = shards.read_table(paths["dev"])
    trainer = Trainer(wire, max(1, train.num_rows // wire.run.training.batch_size))
    frozen = wire.fingerprints()
    pinned = pins(paths, wire.run) | {"receivers": frozen}
    folder = output / "checkpoints"
    step_checkpoints.clear_debris(folder)
    previous = step_checkpoints.finished(folder)
    if not previous:
        checkpoints.check_development(wire.run, paths["dev"])
    checkpoints.restore(trainer, previous[-1] if previous else None)
    wire.trained_on = wire.trained_on.with_stage(wire.run, paths["train"])

    def at_evaluation() -> None:
        metrics = trainer.evaluate(dev)
        print(
            "evaluation  " + "  ".join(f"{name} {value:.4g}" for name, value in metrics.items()),
            flush=True,
        )
        step_checkpoints.save_step(folder, wire, metrics, pinned, trainer, *metric_of(wire.run))

    with trainer.stopped_by(signal.SIGTERM):
        trainer.train(table_epochs(wire.run.training, train), at_evaluation)
    if trainer.stop_asked:
        step_checkpoints.save_step(folder, wire, {}, pinned, trainer, *metric_of(wire.run))
        step = trainer.progress.step
        raise TrainingError(
            f"training was stopped by SIGTERM after step {step} and saved; add --resume to go on"
        )
    checkpoints.check_frozen(wire, frozen)
    return step_checkpoints.best_of(step_checkpoints.finished(folder), *metric_of(wire.run))


def metric_of(run: RunConfig) -> tuple[str, str]:
    """The metric that chooses a single run's best checkpoint, and whether more or less of it is better."""
    best_by = run.training.best_by or ("dev_loss" if not run.data.source.has_questions else "dev_f1")
    return best_by, "min" if best_by == "dev_loss" else "max"
