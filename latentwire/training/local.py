"""One run in this process, without Ray workers: for a laptop, a single GPU, or a debugger."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator, Mapping
from pathlib import Path

import pyarrow as pa

from latentwire.assembly import LatentWire
from latentwire.config import TrainingConfig
from latentwire.data import shards, streams
from latentwire.storage import Place
from latentwire.training import checkpoints
from latentwire.training.loop import Epoch, Trainer, TrainingError


def table_epochs(training: TrainingConfig, train: pa.Table, rank: int = 0, world: int = 1) -> Epoch:
    """The batches of each epoch of a table, in an order that seed and epoch decide."""

    def epochs(epoch: int) -> Iterator[pa.Table]:
        return streams.shuffled_batches(train, training, epoch, rank, world)

    return epochs


def train_here(wire: LatentWire, paths: Mapping[shards.ShardSplit, Place], output: Path) -> Path:
    """Train to the end under ``output/checkpoints``, continuing from the last checkpoint there; returns the best one.

    Keeps the best by development F1 and the last.
    """
    train = streams.training_table(wire.run, paths["train"])
    dev = shards.read_table(paths["dev"])
    trainer = Trainer(wire, max(1, train.num_rows // wire.run.training.batch_size))
    frozen = {name: lm.fingerprint() for name, lm in wire.receivers.items()}
    pins = {
        "shards": {split: shards.read_manifest(path)["key"] for split, path in paths.items()},
        "evaluation": wire.run.evaluation.model_dump(),
        "receivers": frozen,
    }
    folder = output / "checkpoints"
    trainer.stop_when(signal.SIGTERM)
    previous = finished(folder)
    if previous:
        checkpoints.load_training(previous[-1], trainer)
        print(f"resumed at step {trainer.progress.step} from {previous[-1]}", flush=True)
    elif wire.run.training.init_from is not None:
        checkpoints.initialise(wire.run.training.init_from, wire)

    def at_evaluation() -> None:
        metrics = trainer.evaluate(dev)
        print("evaluation  " + "  ".join(f"{name} {value:.4g}" for name, value in metrics.items()), flush=True)
        target = folder / f"step-{trainer.progress.step:08d}"
        if target.exists():
            return  # resumed exactly at the end
        checkpoints.save(target, wire, metrics, pins, trainer)
        kept = finished(folder)
        for path in set(kept) - {best_of(kept), kept[-1]}:
            checkpoints.remove(path)

    trainer.train(table_epochs(wire.run.training, train), at_evaluation)
    if trainer.stop_asked:
        step = trainer.progress.step
        if not (target := folder / f"step-{step:08d}").exists():
            checkpoints.save(target, wire, {}, pins, trainer)
        raise TrainingError(f"training was stopped by SIGTERM after step {step} and saved; add --resume to go on")
    changed = [name for name, lm in wire.receivers.items() if lm.fingerprint() != frozen[name]]
    if changed:
        raise RuntimeError(f"frozen receivers must not change, {', '.join(changed)} did")
    return best_of(finished(folder))


def finished(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(path.parent for path in folder.glob("step-*/manifest.json"))


def best_of(paths: list[Path]) -> Path:
    """The checkpoint with the highest development F1, the later one among equals; a stopped run's last has no score.

    Where no question was asked, the one with the lowest loss.
    """

    def score(path: Path) -> float:
        metrics = json.loads((path / "manifest.json").read_text())["metrics"]
        return metrics.get("dev_f1", -metrics.get("dev_loss", float("inf")))

    return max(paths, key=lambda path: (score(path), path))
