"""One run in this process, without Ray workers: for a laptop, a single GPU, or a debugger."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Mapping
from pathlib import Path

import pyarrow as pa

from latentwire.assembly import LatentWire
from latentwire.config import RunConfig, TrainingConfig
from latentwire.data import shards, streams
from latentwire.evaluation.pin import evaluation_pin
from latentwire.storage import Place, local
from latentwire.training import checkpoints, kept
from latentwire.training.loop import Epoch, Trainer, TrainingError


def table_epochs(training: TrainingConfig, train: pa.Table, rank: int = 0, world: int = 1) -> Epoch:
    """The batches of each epoch of a table, in an order that seed and epoch decide."""

    def epochs(epoch: int) -> Iterator[pa.Table]:
        return streams.shuffled_batches(train, training, epoch, rank, world)

    return epochs


def train_here(wire: LatentWire, paths: Mapping[shards.ShardSplit, Place], output: Path) -> Place:
    """Train to the end under ``output/checkpoints``, continuing from the last checkpoint there; returns the best one.

    Keeps the best by ``training.best_by`` and the last.
    """
    train = streams.training_table(wire.run, paths["train"])
    dev = shards.read_table(paths["dev"])
    trainer = Trainer(wire, max(1, train.num_rows // wire.run.training.batch_size))
    frozen = {name: lm.fingerprint() for name, lm in wire.receivers.items()}
    pins = {
        "shards": {split: shards.read_manifest(path)["key"] for split, path in paths.items()},
        "evaluation": wire.run.evaluation.model_dump(),
        "evaluation_pin": evaluation_pin(paths["dev"], wire.run),
        "receivers": frozen,
    }
    folder = output / "checkpoints"
    kept.clear_debris(folder)
    previous = kept.finished(folder)
    if previous:
        with local(previous[-1]) as last:
            checkpoints.load_training(last, trainer)
        print(f"resumed at step {trainer.progress.step} from {previous[-1]}", flush=True)
    elif wire.run.training.init_from is not None:
        checkpoints.initialise(wire.run.training.init_from, wire)

    def at_evaluation() -> None:
        metrics = trainer.evaluate(dev)
        print("evaluation  " + "  ".join(f"{name} {value:.4g}" for name, value in metrics.items()), flush=True)
        kept.save_step(folder, wire, metrics, pins, trainer, *metric_of(wire.run))

    with trainer.stopped_by(signal.SIGTERM):
        trainer.train(table_epochs(wire.run.training, train), at_evaluation)
    if trainer.stop_asked:
        kept.save_step(folder, wire, {}, pins, trainer, *metric_of(wire.run))
        step = trainer.progress.step
        raise TrainingError(f"training was stopped by SIGTERM after step {step} and saved; add --resume to go on")
    changed = [name for name, lm in wire.receivers.items() if lm.fingerprint() != frozen[name]]
    if changed:
        raise RuntimeError(f"frozen receivers must not change, {', '.join(changed)} did")
    return kept.best_of(kept.finished(folder), *metric_of(wire.run))


def metric_of(run: RunConfig) -> tuple[str, str]:
    """The metric that chooses a single run's best checkpoint, and whether more or less of it is better."""
    best_by = run.training.best_by or ("dev_loss" if run.data.dataset == "text" else "dev_f1")
    return best_by, "min" if best_by == "dev_loss" else "max"
