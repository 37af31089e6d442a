"""Text readers of a comparison: trained once, kept beside the shards, reused by every wire.

A text reader is a frozen receiver behind a constant prefix that was trained to read a text (or a
part of it, or none) on the wire's own rows. ``<shard_dir>/reader-<receiver>-<reads>-<hash>`` is one
as an export. The hash covers what made it: rows, the receiver's weights, what is read, and
everything that ``evaluation.tuned_text`` says. A directory that is there is whole; a training that
was killed goes on from its last checkpoint.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from latentwire import exports, loading
from latentwire.config import (
    EncoderConfig,
    FeaturesConfig,
    LossConfig,
    PrefixConfig,
    ReceiverConfig,
    RunConfig,
    TrainingConfig,
)
from latentwire.config.resolve import with_values
from latentwire.data import shards
from latentwire.data.readers import (
    Splits,
    TrainingBudget,
    is_reader,
    reader_budget,
    reader_directory,
    tuned_text,
)
from latentwire.evaluation.conditions import Condition, label, own_condition
from latentwire.model import LatentWire, load_wire
from latentwire.models.senders import sender_sources
from latentwire.models.unfolding import text_stride
from latentwire.prompts.shown import Reads
from latentwire.receivers.base import Receiver
from latentwire.storage import Place, directory, local
from latentwire.training import step_checkpoints
from latentwire.training.local import train_here
from latentwire.training.workspace import workspace

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


def reader_run(
    run: RunConfig,
    receivers: Sequence[ReceiverConfig],
    condition: Condition,
    budget: TrainingBudget,
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
        # Enough epochs for all steps: ⌊steps · size / rows of an epoch⌋ whole ones, and one more.
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
    if run.encoder.kind == "senders":
        by_name = {receiver.name: receiver for receiver in run.receivers}
        changed["senders"] = tuple(s.model for s in sender_sources(run.encoder, by_name))
    if run.encoder.has_memory:  # nothing is appended to a text that is not encoded
        changed |= {"pooling": "queries", "projection": True}
    if run.adapter.kind == "heads":  # as many positions as have as many entries
        # A message fills that share of the text's cache: one position in 1 / share has as much.
        changed |= {
            "pooling": "queries",
            "sender_heads": False,
            "tokens_per_latent": text_stride(run.cache_share),
        }
    if condition.budget is not None:
        changed[condition.budget.knob] = condition.budget.value
    return run.encoder.model_copy(update=changed)


def reader_path(
    run: RunConfig, receiver: ReceiverConfig, condition: Condition, paths: Splits
) -> Place:
    """Return the directory of a reader, whether it is there or not."""
    return reader_directory(run, receiver, condition.mode, _lengths(run, condition), paths)


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
        for name, lm in wire.receivers.items():
            path, loss = ensure_reader(wire.run, lm, condition.trained_for, paths)
            losses.append(loss)
            places[condition.key][name] = path
        say(
            f"text readers {number}/{len(tuned)}, {label(condition.key)}: development loss "
            f"{', '.join(losses)}"
        )
    return places


def ensure_reader(
    run: RunConfig, lm: Receiver, condition: Condition, paths: Splits
) -> tuple[Place, str]:
    """Train one receiver's reader unless it is there.

    Args:
        run: the configuration of the wire that it is compared with, or teaches.
        lm: the receiver.
        condition: what the reader is trained for.
        paths: the shards of that run.

    Returns:
        Its directory, and its development loss in a few words.
    """
    path = reader_path(run, lm.config, condition, paths)
    missing = not is_reader(path)
    if missing:
        _train(run, lm, condition, paths, path)
    with local(path) as folder:
        report = report_of(folder)
    how = f"made in {report['seconds']:.0f} s" if missing else f"reused from {path.name}"
    return path, f"{lm.name} {report['dev_loss']:.4g} ({how})"


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
    tuned = [condition for condition in conditions if condition.tuned]
    fingerprints = wire.fingerprints() if tuned else {}
    readers = {}
    for row in tuned:
        row_places = places[row.key]
        readers[row.key] = load_reader(wire.run, wire.receivers, row, row_places, fingerprints)
    return readers


def load_reader(
    run: RunConfig,
    receivers: Mapping[str, Receiver],
    condition: Condition,
    places: Mapping[str, Place],
    fingerprints: Mapping[str, str],
) -> LatentWire:
    """Return one row's reader, which holds the prefixes of all given receivers.

    Args:
        run: the configuration of the wire that it is compared with, or teaches.
        receivers: those that read.
        condition: the row.
        places: receiver → the directory of its reader.
        fingerprints: receiver → hash of its weights.

    Raises:
        CheckpointError: a reader was trained for other weights.
    """
    configs = [lm.config for lm in receivers.values()]
    # One step at any rate: of this configuration nothing is trained.
    reader = LatentWire(
        reader_run(run, configs, condition, TrainingBudget(1, 1), 1, 1.0), receivers
    )
    reports = {}
    for name in receivers:
        with local(places[name]) as folder:
            manifest = exports.read_manifest(folder)
            reports[name] = manifest["metrics"]["reader"]
            trained_for, weights = manifest["pins"]["receivers"][name], fingerprints[name]
            if trained_for != weights:
                raise exports.CheckpointError(
                    f"the reader of {places[name]} must be of receiver {name} as it is, whose weights "
                    f"hash to {weights[:12]}…, got {trained_for[:12]}…; delete it"
                )
            file = folder / f"prefixes/{name}.safetensors"
            loading.fill(file, reader.interlingua.prefixes[name])
    reader.reports = reports
    return reader


def _train(run: RunConfig, lm: Receiver, condition: Condition, paths: Splits, path: Place) -> None:
    """Train a reader once for each rate that Optuna draws, and keep the best as ``path``."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    rows, began = shards.read_manifest(paths["train"])["rows"], time.monotonic()
    tuned, budget = tuned_text(run), reader_budget(run, rows)
    with workspace(path, "trials", here=True) as work:
        if is_reader(path):  # another process has just made it
            return
        trained: dict[float, tuple[float, Place, int]] = {}

        def reader_at(rate: float, **values: Any) -> LatentWire:
            of_one = reader_run(run, [lm.config], condition, budget, rows, rate)
            return LatentWire(with_values(of_one, values), {lm.name: lm})

        def loss_at(rate: float) -> float:
            # The best is chosen by loss: what would be said takes most of an evaluation's time.
            reader = reader_at(rate, **{"evaluation.max_answer_tokens": 1})
            output = work / f"rate-{rate:.6g}"
            best = train_here(reader, paths, output)
            last = step_checkpoints.finished(output / "checkpoints")[-1]
            loss = float(step_checkpoints.metrics_of(best)["dev_loss"])
            # The best may be an earlier step: the last checkpoint says how many were taken.
            trained[rate] = loss, best, int(step_checkpoints.metrics_of(last)["step"])
            return loss

        low, high = tuned.lr
        study = optuna.create_study(
            direction="minimize", sampler=optuna.samplers.TPESampler(seed=run.training.seed)
        )
        # The first trial is in the middle of the range, on its logarithmic scale.
        study.enqueue_trial({"rate": math.sqrt(low * high)})
        for number in range(1, tuned.trials + 1):
            trial = study.ask()
            rate = trial.suggest_float("rate", low, high, log=True)
            print(
                f"text reader of {lm.name}, {label(condition.key)}: training "
                f"{number}/{tuned.trials} at rate {rate:.3g}, {budget.steps:,} steps of "
                f"{budget.batch_size}",
                flush=True,
            )
            study.tell(trial, loss_at(rate))
        # The best checkpoint of the best rate, under the run's own settings of evaluation.
        rate = study.best_params["rate"]
        loss, best, steps = trained[rate]
        reader = reader_at(rate)
        loading.load_weights(cast(Path, best), reader, exports.read_manifest(cast(Path, best)))
        parameters = sum(p.numel() for p in reader.interlingua.parameters())
        report = {
            "receiver": lm.name,
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
