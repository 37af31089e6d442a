"""Output of an evaluation: tables for the terminal, scores as JSON, answers as Parquet."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from latentwire import exports
from latentwire.config import RunConfig
from latentwire.config.resolve import ConfigError
from latentwire.data import documents, shards
from latentwire.evaluation import readings, scoring
from latentwire.evaluation.baselines import Mode
from latentwire.evaluation.conditions import Condition, conditions, with_tuned
from latentwire.evaluation.metrics import question_types
from latentwire.evaluation.predictions import Prediction
from latentwire.evaluation.protocol import protocol_hash
from latentwire.evaluation.summary import baseline_pairs, by_document, details, pairs
from latentwire.message import Bits
from latentwire.reports import tables
from latentwire.storage import Place, write_text


def compared(named: Sequence[str] | None, rows: Sequence[Condition]) -> list[tuple[str, str]]:
    """Return the rows of the table to set side by side, by their keys.

    They are the two that ``--compare`` names, or latents and each baseline. Raises
    :class:`~latentwire.config.resolve.ConfigError` where the table has no such rows.
    """
    match named:
        # Nothing named: the JSON of an evaluation has these comparisons anyway.
        case None | []:
            sides = baseline_pairs(rows)
        case [first, second]:
            sides = pairs(rows, first, second)
        case _:
            sides = []
    if named is not None and not sides:
        keys = ", ".join(row.key for row in rows)
        raise ConfigError(
            f"--compare must name two different rows of the table ({keys}), or none where it has "
            f"latents and a baseline, got {' and '.join(named) or 'none'}"
        )
    return sides


@dataclass(frozen=True)
class Known:
    """Facts about the wire that was scored, besides its predictions."""

    sizes: dict[str, dict[str, int]]
    """Sizes of its trained weights (:func:`latentwire.exports.sizes`)."""
    protocol: str
    """Protocol hash of its scores (:func:`latentwire.evaluation.protocol.protocol_hash`)."""
    readings: dict[str, Any] | None
    """Earlier readings of the rows; ``None`` for rows that are there to be compared on, which
    nobody counts."""
    probes: dict[str, float] | None = None
    """Probes of its latents, where they were asked for."""
    readers: Mapping[str, Mapping[str, dict[str, Any]]] = field(default_factory=dict)
    """Key of a tuned row → receiver → the report of its reader's training."""


def known_of(
    folder: Path,
    manifest: dict[str, Any],
    run: RunConfig,
    split: str,
    rows: Place,
    probes: dict[str, float] | None = None,
    readers: Mapping[str, Mapping[str, dict[str, Any]]] | None = None,
) -> Known:
    """Describe the wire of a checkpoint or export.

    A scoring of validation rows is recorded beside their shards. ``manifest``: the directory's,
    already read. ``run``: the configuration that is evaluated. ``rows``: the split's shards.
    ``readers``: reports of the text readers.
    """
    read_before = None
    if split == "validation":
        trained_on = documents.read(folder, manifest)
        read_before = readings.note(rows, readings.wire_name(manifest), trained_on)
    protocol = protocol_hash(rows, run)
    return Known(exports.sizes(folder), protocol, read_before, probes, readers or {})


@dataclass(frozen=True)
class Questions:
    """The checked questions of an evaluation, before the scoring that a wrong one would waste."""

    conditions: tuple[Condition, ...]
    """Rows of the table."""
    sides: list[tuple[str, str]]
    """Conditions to set side by side, by their keys."""
    types: dict[str, str]
    """id → type of its question, where the dataset has such."""
    compared: bool
    """True where the table of paired differences was asked for."""


def questions_of(
    run: RunConfig,
    split: shards.ShardSplit,
    modes: Sequence[Mode],
    tokens_per_latent: Sequence[int],
    latent_len: Sequence[int],
    bits: Sequence[Bits],
    compare: Sequence[str] | None,
) -> Questions:
    """Return the checked conditions of an evaluation.

    See :func:`latentwire.evaluate` for the arguments. Raises
    :class:`~latentwire.config.resolve.ConfigError`, :class:`~latentwire.data.sources.DataError` for
    data that cannot be read, and :class:`~latentwire.pretrained.weights.ReceiverError` for receivers
    that cannot do what a row asks.
    """
    scoring.check_questions(run)
    # A text reader reads one thing only: modes and lengths are not asked of it.
    if run.is_reader:
        rows = scoring.final_conditions(run)
    else:
        rows = conditions(run, modes, tokens_per_latent, latent_len, bits)
        rows = rows if run.evaluation.tuned_text is None else with_tuned(rows)
    scoring.check_receivers(run, rows)
    types = question_types(run.data, shards.source_of(split))
    return Questions(rows, compared(compare, rows), types, compare is not None)


@dataclass(frozen=True)
class Evaluation:
    """The answers of every receiver to every row, under each condition."""

    run: RunConfig
    """The configuration that was evaluated."""
    questions: Questions
    """The rows of the table, and what is compared."""
    predictions: Mapping[str, Sequence[Prediction]]
    """Condition → one prediction for each row and receiver."""
    known: Known
    """The wire's sizes, how often the rows were read, and probes of the latents."""

    @cached_property
    def scores(self) -> dict[str, Any]:
        """Condition → receiver → metrics, with intervals over contexts."""
        return scoring.summaries(self.predictions)

    @cached_property
    def details(self) -> dict[str, Any]:
        """Paired differences, scores by parts of the rows, and intervals over documents."""
        further = details(self.predictions, self.questions.sides, self.questions.types)
        return further | {"by_document": self.by_document}

    @cached_property
    def by_document(self) -> dict[str, Any]:
        """Condition → receiver → intervals over documents; empty where they say nothing new."""
        return by_document(self.predictions)


def show(evaluation: Evaluation, title: str) -> None:
    """Print an evaluation's tables."""
    scores, known, questions = evaluation.scores, evaluation.known, evaluation.questions
    grids = [
        tables.scores_table(scores, title, evaluation.run),
        tables.against_text_table(scores),
        tables.together_table(scores),
        tables.weights_table(known.sizes),
        *tables.readers_tables(known.readers, evaluation.run),
    ]
    if questions.compared:
        grids.append(tables.comparisons_table(evaluation.details["comparisons"]))
    tables.show(grids)
    print("\n".join(scoring.table_notes(scores, evaluation.by_document)))
    if known.readings is not None:
        print(readings.sentence(known.readings))
    if known.probes is not None:
        measures = ", ".join(f"{name} {value:.3f}" for name, value in known.probes.items())
        print(f"latents: {measures}")


def write(evaluation: Evaluation, output: Place) -> None:
    """Write an evaluation's scores to a ``.json`` file, or all of it to a directory.

    A directory holds scores, details and predictions.
    """
    scores, known = evaluation.scores, evaluation.known
    if output.name.endswith(".json"):
        write_text(output, json.dumps(scores, indent=1))
        return
    further = evaluation.details | {"weights": known.sizes, "protocol": known.protocol}
    further |= {"seed": evaluation.run.training.seed}
    further |= {} if known.readings is None else {"readings": known.readings}
    further |= {"text_readers": known.readers} if known.readers else {}
    further |= {} if known.probes is None else {"diagnostics": known.probes}
    write_text(output / "scores.json", json.dumps(scores, indent=1))
    write_text(output / "details.json", json.dumps(further, indent=1))
    scoring.write_predictions(evaluation.predictions, output / "predictions.parquet")
