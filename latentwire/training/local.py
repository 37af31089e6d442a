"""One run in this process, without Ray workers: for a laptop, a single GPU, or a debugger."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Mapping

import pyarrow as pa

from latentwire.config import RunConfig, TrainingConfig
from latentwire.data import positions, shards, streams
from latentwire.data.packing import Units
from latentwire.evaluation.protocol import pins
from latentwire.model import LatentWire
from latentwire.storage import Place
from latentwire.training import checkpoints, step_checkpoints
from latentwire.training.loop import Epoch, Trainer, TrainingError


def table_epochs(
    training: TrainingConfig,
    train: pa.Table,
    rank: int = 0,
    world: int = 1,
    units: Units | None = None,
) -> Epoch:
    """Return the batches of each epoch of a table, in an order that seed and epoch decide.

    ``units``: of its rows, where batches are filled by positions.
    """

    def epochs(epoch: int) -> Iterator[pa.Table]:
        if units is not None:
            return streams.packed_batches([train], training, epoch, units, rank, world)
        return streams.shuffled_batches(train, training, epoch, rank, world)

    return epochs


def train_here(
    wire: LatentWire,
    paths: Mapping[shards.ShardSplit, Place],
    output: Place,
    title: str = "",
    before: Mapping[str, str] | None = None,
) -> Place:
    """Train to the end under ``output/checkpoints`` and return the best checkpoint.

    Continues from the last checkpoint there. Keeps the best by ``training.best_by`` and the last.

    Args:
        wire: what is trained.
        paths: shards of all that it reads.
        output: the run's directory.
        title: of the stage that this is, for its lines.
        before: each stage before it → the name of its directory, for the checkpoints' manifests.

    Raises:
        ConfigError: development rows are of documents that the wire it begins with has trained on.
    """
    train = streams.training_table(wire.run, paths["train"])
    dev = shards.read_table(paths["dev"])
    training = wire.run.training
    units = positions.units_of(wire.run, train)
    if units is None:
        # Rows that fill no batch are left out, but where they are all there is.
        steps_per_epoch = max(1, train.num_rows // training.rows_per_batch)
        trainer = Trainer(wire, steps_per_epoch, train=paths["train"])
    else:
        steps = streams.packed_steps(training, units)
        trainer = Trainer(wire, 1, train=paths["train"], all_steps=steps)
    # Compared after the training: receivers must not have changed.
    frozen = wire.fingerprints()
    provenance = pins(paths, wire.run) | {"receivers": frozen}
    if before:
        provenance["stages"] = dict(before)
    trainer.title = title
    folder = output / "checkpoints"
    # A process that died here may have left halves of checkpoints.
    step_checkpoints.clear_debris(folder)
    previous = step_checkpoints.finished(folder)
    if not previous:
        checkpoints.check_development(wire.run, paths["dev"])
    checkpoints.restore(trainer, previous[-1] if previous else None)
    wire.trained_on = wire.trained_on.with_stage(wire.run, paths["train"])

    def at_evaluation() -> None:
        metrics = trainer.evaluate(dev)
        values = "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())
        print(f"{trainer.lead}evaluation  {values}", flush=True)
        # Before it is saved: a resumed run must know that this step was evaluated.
        trainer.progress.evaluations.append(metrics)
        step_checkpoints.save_step(folder, wire, metrics, provenance, trainer, *metric_of(wire.run))

    with trainer.stopped_by(signal.SIGTERM):
        trainer.train(table_epochs(training, train, units=units), at_evaluation)
    if trainer.stop_asked:
        step_checkpoints.save_step(folder, wire, {}, provenance, trainer, *metric_of(wire.run))
        step = trainer.progress.step
        raise TrainingError(
            f"training was stopped by SIGTERM after step {step} and saved; add --resume to go on"
        )
    checkpoints.check_frozen(wire, frozen)
    return step_checkpoints.best_of(step_checkpoints.finished(folder), *metric_of(wire.run))


def metric_of(run: RunConfig) -> tuple[str, str]:
    """Return the metric that chooses a run's best checkpoint, and ``max`` or ``min``."""
    best_by = run.training.best_by or ("dev_f1" if run.data.source.has_questions else "dev_loss")
    return best_by, "min" if best_by == "dev_loss" else "max"
