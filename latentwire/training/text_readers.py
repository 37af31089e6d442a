"""Text readers of a comparison: trained once, kept beside the shards, reused by every wire.

A text reader is a frozen receiver behind a constant prefix that was trained to read a text (or a
part of it, or none) on the wire's own rows. ``<shard_dir>/reader-<receiver>-<reads>-<hash>`` is one
as an export. The hash covers what made it: rows, the receiver's weights, what is read, and
everything that ``evaluation.tuned_text`` says. A directory that is there is whole; a training that
was killed goes on from its last checkpoint.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from filelock import FileLock

from latentwire import exports
from latentwire.config import (
    EncoderConfig,
    FeaturesConfig,
    LossConfig,
    PrefixConfig,
    ReceiverConfig,
    RunConfig,
    TrainingConfig,
    TunedTextConfig,
)
from latentwire.data import shards
from latentwire.data.teachers import weights_id
from latentwire.evaluation.conditions import Condition, label, own_condition
from latentwire.model import LatentWire, load_wire
from latentwire.prompts.shown import Reads
from latentwire.storage import Place, directory, local
from latentwire.training import step_checkpoints
from latentwire.training.local import train_here

READER_VERSION = 1
"""Raised whenever the same knobs would train another reader."""
BUDGETED = ("truncated", "window", "own_cache")
"""Modes that show or keep as much as a message has positions."""
EVALUATIONS = 3
"""Evaluations of each training, of which the best is kept."""
FROM_WIRE = (
    "bucket_batches",
    "questions_together",
    "accumulation",
    "logit_rows",
    "gradient_checkpointing",
    "seed",
    "cpus_per_worker",
    "max_bad_steps",
)
"""Knobs of the wire's training that its readers share."""

Splits = Mapping[shards.ShardSplit, Place]


@dataclass(frozen=True)
class Budget:
    """The training that a reader gets."""

    steps: int
    batch_size: int

    @property
    def questions(self) -> int:
        """Questions that are answered in training, each as often as it is drawn."""
        return self.steps * self.batch_size


def budget_of(run: RunConfig, rows: int) -> Budget:
    """Return the training of a wire itself on so many rows."""
    training = run.training
    per_epoch = max(1, rows // training.batch_size)
    steps = min(training.epochs * per_epoch, training.max_steps or 10**12)
    return Budget(steps, training.batch_size)


def reader_budget(run: RunConfig, rows: int) -> Budget:
    """Return the training that ``evaluation.tuned_text`` gives to a wire's readers."""
    tuned, of_wire = tuned_text(run), budget_of(run, rows)
    return Budget(tuned.steps or of_wire.steps, tuned.batch_size or of_wire.batch_size)


def tuned_text(run: RunConfig) -> TunedTextConfig:
    """Return what a run says about readers, which it must."""
    assert run.evaluation.tuned_text is not None, "nobody asked for text readers"
    return run.evaluation.tuned_text


def reader_run(
    run: RunConfig,
    receivers: Sequence[ReceiverConfig],
    condition: Condition,
    budget: Budget,
    rows: int,
    rate: float,
) -> RunConfig:
    """Return the configuration of a reader.

    Args:
        run: the wire's configuration.
        receivers: those that read, each behind its own prefix.
        condition: what is read, and how much of it.
        budget: steps and questions.
        rows: training rows.
        rate: the prefix's peak learning rate.
    """
    tuned = tuned_text(run)
    training = TrainingConfig(
        **run.training.model_dump(include=set(FROM_WIRE)),
        max_steps=budget.steps,
        epochs=1 + budget.questions // max(1, rows - rows % budget.batch_size),
        batch_size=budget.batch_size,
        prefix_lr=rate,
        warmup_steps=budget.steps // 10,
        evaluate_every=math.ceil(budget.steps / EVALUATIONS),
        best_by="dev_loss",
        log_every=max(1, budget.steps // 10),
    )
    return RunConfig(
        receivers=tuple(receivers),
        data=run.data,
        prompt=run.prompt.model_copy(update={"reads": condition.trained_for.mode}),
        prefix=PrefixConfig(tokens=tuned.tokens, layers=tuned.layers),
        encoder=_lengths(run, condition),
        features=FeaturesConfig(),
        losses=LossConfig(answer_ce_weight=1.0),
        training=training,
        evaluation=run.evaluation.model_copy(update={"tuned_text": None}),
    )


def _lengths(run: RunConfig, condition: Condition) -> EncoderConfig:
    """Return the part of an encoder's configuration that says how long its messages are."""
    if condition.mode not in BUDGETED:
        return EncoderConfig()  # readers of the whole text are the same for wires of every length
    changed: dict[str, Any] = {}
    if run.encoder.lender is not None:  # by its own name: the reader may be of another receiver
        models = {receiver.name: receiver.model for receiver in run.receivers}
        changed["model"] = models[run.encoder.lender]
    if run.encoder.has_memory:  # nothing is appended to a text that is not encoded
        changed |= {"pooling": "queries", "projection": True}
    if condition.budget is not None:
        changed[condition.budget.knob] = condition.budget.value
    return run.encoder.model_copy(update=changed)


def reader_path(
    run: RunConfig, receiver: ReceiverConfig, condition: Condition, paths: Splits
) -> Place:
    """Return the directory of a reader, whether it is there or not."""
    rows = shards.read_manifest(paths["train"])["rows"]
    budget, encoder = reader_budget(run, rows), _lengths(run, condition)
    lengths = ("kind", "tokens_per_latent", "latent_len", "private_len", "split", "bytes_per_patch")
    spec = {
        "reader_version": READER_VERSION,
        "shards": [shards.read_manifest(paths[split])["key"] for split in ("train", "dev")],
        "weights": weights_id(receiver),
        "reads": [condition.mode, receiver.dtype, receiver.quantization, receiver.revision],
        "lengths": encoder.model_dump(include=set(lengths)),
        "tuned_text": tuned_text(run).model_dump(),
        "budget": [budget.steps, budget.batch_size],
        "training": run.training.model_dump(
            include={"bucket_batches", "questions_together", "seed"}
        ),
    }
    key = hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest()[:16]
    return paths["train"].parent / f"reader-{receiver.name}-{condition.mode}-{key}"


def ready(
    wire: LatentWire,
    conditions: Sequence[Condition],
    paths: Splits,
    say: Callable[[str], object] = print,
) -> dict[str, LatentWire]:
    """Return the readers of the tuned rows of a table, on the receivers of ``wire``, by key.

    Those that are missing are trained first, in this process.
    """
    places = ensure_readers(wire, conditions, paths, say)
    return load_readers(wire, conditions, places)


Places = Mapping[str, Mapping[str, Place]]
"""Key of a tuned row → receiver → the directory of its reader."""


def ensure_readers(
    wire: LatentWire,
    conditions: Sequence[Condition],
    paths: Splits,
    say: Callable[[str], object] = print,
) -> Places:
    """Return the directories of all readers that the tuned rows of a table need.

    Args:
        wire: holds the receivers; readers that are missing are trained through them.
        conditions: rows of a table; those that are not tuned need no reader.
        paths: the shards that the wire was trained on.
        say: takes a line about the readers of each row.
    """
    # A text reader reads its own row itself.
    tuned = [row for row in conditions if row.tuned and not wire.run.is_reader]
    places: dict[str, dict[str, Place]] = {}
    for number, condition in enumerate(tuned, start=1):
        places[condition.key], losses = {}, []
        for receiver in wire.run.receivers:
            trained_for = condition.trained_for
            path = reader_path(wire.run, receiver, trained_for, paths)
            made = not (path / exports.MANIFEST).exists()
            if made:
                _train(wire, receiver, trained_for, paths, path)
            with local(path) as folder:
                report = report_of(folder)
            how = f"made in {report['seconds']:.0f} s" if made else f"reused from {path.name}"
            losses.append(f"{receiver.name} {report['dev_loss']:.4g} ({how})")
            places[condition.key][receiver.name] = path
        say(
            f"text readers {number}/{len(tuned)}, {label(condition.key)}: development loss "
            f"{', '.join(losses)}"
        )
    return places


def ensure_at(
    checkpoint: Place,
    run: RunConfig,
    conditions: Sequence[Condition],
    paths: Splits,
    say: Callable[[str], object],
) -> tuple[Places, dict[str, dict[str, dict[str, Any]]]]:
    """Make the readers for a checkpoint in a process of its own; return places and reports."""
    with local(checkpoint) as folder:
        wire, _ = load_wire(folder, run)
    places = ensure_readers(wire, conditions, paths, say)
    readers = load_readers(wire, conditions, places)
    return places, {key: dict(reader.reports) for key, reader in readers.items()}


def report_of(folder: Path) -> dict[str, Any]:
    """Read what a reader says about its training, from the manifest of its directory."""
    return exports.read_manifest(folder)["metrics"]["reader"]


def load_readers(
    wire: LatentWire, conditions: Sequence[Condition], places: Places
) -> dict[str, LatentWire]:
    """Return the readers of the tuned rows of a table, by key.

    Each holds the prefixes of all receivers of ``wire``, and reads through its receivers. Where
    ``wire`` is a text reader itself, it is that of its own row. Raises
    :class:`~latentwire.exports.CheckpointError` for one that was trained for other weights.
    """
    if wire.run.is_reader:
        return {own_condition(wire.run).key: wire}
    readers = {}
    fingerprints = wire.fingerprints() if places else {}
    for condition in conditions:
        if not condition.tuned:
            continue
        run = reader_run(wire.run, wire.run.receivers, condition, Budget(1, 1), 1, 1.0)
        reader, reports = LatentWire(run, wire.receivers), {}
        for name, path in places[condition.key].items():
            with local(path) as folder:
                manifest = exports.read_manifest(folder)
                reports[name] = manifest["metrics"]["reader"]
                trained_for = manifest["pins"]["receivers"][name]
                if trained_for != fingerprints[name]:
                    raise exports.CheckpointError(
                        f"the reader of {path} must be of receiver {name} as it is, whose weights "
                        f"hash to {fingerprints[name][:12]}…, got {trained_for[:12]}…; delete it"
                    )
                file = folder / f"prefixes/{name}.safetensors"
                exports.fill(file, reader.interlingua.prefixes[name])
        reader.reports = reports
        readers[condition.key] = reader
    return readers


def _train(
    wire: LatentWire,
    receiver: ReceiverConfig,
    condition: Condition,
    paths: Splits,
    path: Place,
) -> None:
    """Train a reader once for each rate that Optuna draws, and keep the best as ``path``."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    rows, began = shards.read_manifest(paths["train"])["rows"], time.monotonic()
    tuned, budget = tuned_text(wire.run), reader_budget(wire.run, rows)
    with _workspace(path) as work:
        if (path / exports.MANIFEST).exists():  # another process has just made it
            return
        trained: dict[float, tuple[float, Place, int]] = {}

        def loss_at(rate: float) -> float:
            run = reader_run(wire.run, [receiver], condition, budget, rows, rate)
            reader = LatentWire(run, {receiver.name: wire.receivers[receiver.name]})
            output = work / f"rate-{rate:.6g}"
            best = train_here(reader, paths, output)
            last = step_checkpoints.finished(output / "checkpoints")[-1]
            loss = float(step_checkpoints.metrics_of(best)["dev_loss"])
            trained[rate] = loss, best, int(step_checkpoints.metrics_of(last)["step"])
            return loss

        low, high = tuned.lr
        study = optuna.create_study(
            direction="minimize", sampler=optuna.samplers.TPESampler(seed=wire.run.training.seed)
        )
        study.enqueue_trial({"rate": math.sqrt(low * high)})
        for number in range(1, tuned.trials + 1):
            trial = study.ask()
            rate = trial.suggest_float("rate", low, high, log=True)
            print(
                f"text reader of {receiver.name}, {label(condition.key)}: training "
                f"{number}/{tuned.trials} at rate {rate:.3g}, {budget.steps:,} steps of "
                f"{budget.batch_size}",
                flush=True,
            )
            study.tell(trial, loss_at(rate))
        rate = study.best_params["rate"]
        loss, best, steps = trained[rate]
        run = reader_run(wire.run, [receiver], condition, budget, rows, rate)
        reader = LatentWire(run, {receiver.name: wire.receivers[receiver.name]})
        exports.load_weights(cast(Path, best), reader, exports.read_manifest(cast(Path, best)))
        parameters = sum(p.numel() for p in reader.interlingua.parameters())
        report = {
            "receiver": receiver.name,
            "reads": cast(Reads, condition.mode),
            "budget": None if condition.budget is None else str(condition.budget),
            "tokens": tuned.tokens,
            "parameters": parameters,
            "rows": rows,
            "steps": steps,
            "batch_size": budget.batch_size,
            "rate": rate,
            "dev_loss": loss,
            "trials": [[one, trained[one][0]] for one in trained],
            "seconds": time.monotonic() - began,
        }
        pins = exports.read_manifest(cast(Path, best))["pins"]
        with directory(path, last=exports.MANIFEST) as folder:
            exports.save(folder, reader, {"reader": report}, pins)


@contextlib.contextmanager
def _workspace(path: Place) -> Iterator[Path]:
    """Yield a directory for the trainings of a reader, which one process at a time has.

    It lies beside the reader, so that a training that was killed goes on; in a temporary directory
    where shards are in an object store. It is deleted when the reader is there.
    """
    if not isinstance(path, Path):
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)
        return
    work = path.parent / f".{path.name}.trials"
    work.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{work}.lock"):
        yield work
    shutil.rmtree(work, ignore_errors=True)
    Path(f"{work}.lock").unlink(missing_ok=True)
