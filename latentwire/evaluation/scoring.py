"""Scores of a checkpoint beside the baselines, and its export.

Neither Ray nor Optuna is imported here, so that ``latentwire train`` and ``latentwire evaluate``
run where they are not installed.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from latentwire import card, exports
from latentwire.config import RunConfig
from latentwire.config.resolve import ConfigError
from latentwire.data import shards
from latentwire.evaluation import own_heads, readings
from latentwire.evaluation.conditions import Condition, label, own_condition, with_tuned
from latentwire.evaluation.diagnostics import diagnose
from latentwire.evaluation.evaluator import predict
from latentwire.evaluation.predictions import Prediction
from latentwire.evaluation.progress import ScoringProgress
from latentwire.evaluation.protocol import protocol_hash
from latentwire.evaluation.summary import (
    against_text,
    by_document,
    summarise,
    wider_by_document,
)
from latentwire.model import LatentWire, load_wire
from latentwire.model_addresses import below
from latentwire.models import own_cache
from latentwire.pretrained.weights import skeleton
from latentwire.storage import Place, directory, local, write, write_text


def check_questions(run: RunConfig) -> None:
    """Check that a configuration's rows ask questions that can be scored.

    Raises :class:`~latentwire.config.resolve.ConfigError` where they do not.
    """
    if not run.data.source.has_questions:
        raise ConfigError(
            f"scores need questions, dataset {run.data.dataset} has none; name others, e.g. --set "
            "data.dataset=squad --set losses.bundle=answer"
        )


def check_receivers(run: RunConfig, conditions: Sequence[Condition]) -> None:
    """Check that every receiver can do what the rows of a table ask of it, from its shape alone.

    Raises :class:`~latentwire.pretrained.weights.ReceiverError` where one cannot, and
    :class:`~latentwire.config.resolve.ConfigError` where the wire cannot.
    """
    if any(condition.mode == "own_heads" for condition in conditions):
        own_heads.check(run)
    if any(condition.mode == "own_cache" for condition in conditions):
        for receiver in run.receivers:
            own_cache.check(receiver.name, skeleton(receiver, check=False))


FINAL_CONDITIONS: tuple[Condition, ...] = (
    Condition("text"),
    Condition("latent"),
    Condition("latent", bits=8),
    Condition("latent", bits=4),
    Condition("truncated"),
    Condition("shuffled"),
    Condition("closed_book"),
)
"""Conditions of a sweep's winner: every final mode, and the latents also in packets of fewer
bits."""

Readers = Mapping[str, LatentWire]
"""Key of a tuned row → the text reader that reads it, on the wire's receivers."""


def final_conditions(run: RunConfig) -> tuple[Condition, ...]:
    """Return the rows of a finished run's table.

    Tuned text is in it where the run trains readers. A text reader has its own row, and that of the
    receivers without its prefix.
    """
    if run.is_reader:
        reads = own_condition(run)
        return replace(reads, tuned=False), reads
    return with_tuned(FINAL_CONDITIONS) if run.evaluation.tuned_text else FINAL_CONDITIONS


def score(
    path: Place,
    validation: Place,
    conditions: tuple[Condition, ...] = FINAL_CONDITIONS,
    run: RunConfig | None = None,
) -> dict[str, Any]:
    """Reload a checkpoint in this process and score it on complete shards.

    Returns condition's key → receiver → metrics. ``run`` replaces the configuration it was saved
    with (other data, decoding or device).
    """
    with local(path) as folder:
        wire, _ = load_wire(folder, run)
    return summaries(predict_conditions(wire, validation, conditions))


def predict_conditions(
    wire: LatentWire,
    validation: Place,
    conditions: tuple[Condition, ...] = FINAL_CONDITIONS,
    *,
    joint: bool = True,
    watch: Callable[..., object] | None = None,
    readers: Readers | None = None,
) -> dict[str, list[Prediction]]:
    """Return condition's key → the receivers' answers to all rows of complete shards.

    ``joint``: receivers also score each other's answers. ``watch``: as for
    :class:`~latentwire.evaluation.progress.ScoringProgress`. ``readers``: those of tuned rows.
    """
    table = shards.read_table(validation)
    predictions: dict[str, list[Prediction]] = {}
    with ScoringProgress(table.num_rows * len(conditions), watch=watch) as progress:
        # Minutes each with real receivers: a line after every one.
        for number, condition in enumerate(conditions, start=1):
            on_rows = partial(progress.advance, label(condition.key))
            reader = (readers or {})[condition.key] if condition.tuned else wire
            predictions[condition.key] = list(
                predict(reader, table, condition, joint=joint, on_rows=on_rows)
            )
            print(
                f"scored {number}/{len(conditions)}: {label(condition.key)}, {table.num_rows:,} rows",
                flush=True,
            )
    return predictions


def summaries(predictions: Mapping[str, Sequence[Prediction]]) -> dict[str, Any]:
    """Return condition's key → receiver → metrics, those against full text among them."""
    scores = {key: summarise(predictions[key]) for key in predictions}
    for key, receivers in against_text(predictions).items():
        for name, metrics in receivers.items():
            scores[key][name] |= metrics
    return scores


def diagnose_here(path: Place, validation: Place, run: RunConfig) -> dict[str, float]:
    """Reload a checkpoint in this process and probe its messages."""
    with local(path) as folder:
        wire, _ = load_wire(folder, run)
    return diagnose(wire, shards.read_table(validation))


@dataclass(frozen=True)
class Scored:
    """The final scores and sizes of a wire."""

    scores: dict[str, Any]
    """Condition's key → receiver → metrics on the validation split; empty for a wire pretrained on
    texts alone."""
    readings: dict[str, Any]
    """Earlier readings of those rows (:func:`latentwire.evaluation.readings.note`)."""
    sizes: dict[str, dict[str, int]]
    """Sizes of the trained weights (:func:`latentwire.exports.sizes`)."""
    by_document: dict[str, Any]
    """Intervals over documents (:func:`latentwire.evaluation.summary.by_document`)."""
    readers: dict[str, dict[str, Any]]
    """Key of a tuned row → receiver → the report of its reader's training."""

    @property
    def document(self) -> dict[str, Any]:
        """Entries of ``results.json``."""
        readers = {"text_readers": self.readers} if self.readers else {}
        return {
            "validation": self.scores,
            "by_document": self.by_document,
            "readings": self.readings,
            "weights": self.sizes,
            **readers,
        }

    @property
    def notes(self) -> list[str]:
        """Sentences that belong below the table."""
        read_before = readings.sentence(self.readings)
        return [read_before, *table_notes(self.scores, self.by_document)]


def table_notes(scores: Mapping[str, Any], documents: Mapping[str, Any]) -> list[str]:
    """Return sentences that say what retention is against, and how wide documents make intervals.

    ``scores``: condition's key → receiver → metrics. ``documents``: intervals over documents
    (:func:`latentwire.evaluation.summary.by_document`).
    """
    wider = wider_by_document(documents)
    return [card.retention_note(scores), *([] if wider is None else [wider])]


def score_and_export(
    checkpoint: Place,
    validation: Place,
    export: Place,
    watch: Callable[..., object] | None = None,
    tuned: Callable[[LatentWire, Sequence[Condition]], Readers] | None = None,
) -> Scored:
    """Score the chosen checkpoint once on the validation split, and export it.

    The export has no training state. The scoring is recorded beside the shards. A wire pretrained
    on texts alone has no scores: it is exported for a second stage. ``watch``: as for
    :class:`~latentwire.evaluation.progress.ScoringProgress`. ``tuned``: returns the text readers of
    a table's tuned rows, where the run asks for such.
    """
    if export.exists():
        raise ConfigError(
            f"an export must not overwrite anything, {export} exists; name another output directory"
        )
    with local(checkpoint) as folder:
        wire, manifest = load_wire(folder)
    # All empty for a wire that was pretrained on texts alone.
    read_before, predictions = {}, {}
    readers: Readers = {}
    if wire.run.data.source.has_questions:
        rows = final_conditions(wire.run)
        if any(row.tuned for row in rows):
            assert tuned is not None, "tuned rows need readers"
            readers = tuned(wire, rows)
        # Noted before the rows are read, so that a scoring that breaks off counts too.
        read_before = readings.note(validation, readings.wire_name(manifest), wire.trained_on)
        predictions = predict_conditions(wire, validation, rows, watch=watch, readers=readers)
    table = summaries(predictions)
    pins = manifest["pins"] | {
        "validation": {
            "shards": shards.read_manifest(validation)["key"],
            "evaluation_pin": protocol_hash(validation, wire.run),
        }
    }
    # On an object store the files are written here first, below an address of there.
    address = None if isinstance(export, Path) else partial(below, Path.cwd())
    # The manifest goes last: an export without one is no export.
    with directory(export, last=exports.MANIFEST) as folder:
        metrics = {
            "development": manifest["metrics"],
            "validation": table,
            "readings": read_before,
        }
        exports.save(folder, wire, metrics, pins, address=address)
        sizes = exports.sizes(folder)
    if predictions:
        write_predictions(predictions, export.parent / "predictions.parquet")
    reports = {key: dict(reader.reports) for key, reader in readers.items() if reader.reports}
    return Scored(table, read_before, sizes, by_document(predictions), reports)


def write_predictions(predictions: Mapping[str, Sequence[Prediction]], path: Place) -> None:
    """Write one row per prediction, aside and renamed."""
    every = itertools.chain.from_iterable(predictions.values())
    rows = [asdict(prediction) for prediction in every]
    table = pa.Table.from_pylist(rows)
    write(path, lambda file: pq.write_table(table, file))


def write_results(output: Place, document: dict[str, Any]) -> None:
    """Write ``results.json``, whole or not at all."""
    write_text(output / "results.json", json.dumps(document, indent=1, default=str))
