"""What an evaluation leaves: tables for the terminal, scores and details as JSON, predictions as Parquet."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latentwire import exports
from latentwire.config import RunConfig
from latentwire.config.resolve import ConfigError
from latentwire.data import documents, shards
from latentwire.evaluation import readings, scoring
from latentwire.evaluation.conditions import Condition, conditions
from latentwire.evaluation.evaluator import Prediction
from latentwire.evaluation.metrics import question_types
from latentwire.evaluation.summary import baseline_pairs, details, pairs
from latentwire.reports import tables
from latentwire.storage import Place, write_text


def compared(named: Sequence[str] | None, rows: Sequence[Condition]) -> list[tuple[str, str]]:
    """The rows of the table to set side by side, by their keys: the two that ``--compare`` names, or latents and each baseline.

    Raises :class:`~latentwire.config.resolve.ConfigError` where the table has no such rows.
    """
    match named:
        case None | []:
            found = baseline_pairs(rows)
        case [first, second]:
            found = pairs(rows, first, second)
        case _:
            found = []
    if named is not None and not found:
        raise ConfigError(
            f"--compare must name two different rows of the table ({', '.join(row.key for row in rows)}), or none where it "
            f"has latents and a baseline, got {' and '.join(named) or 'none'}"
        )
    return found


@dataclass(frozen=True)
class Known:
    """What is known of the wire that was scored, besides its predictions."""

    sizes: dict[str, dict[str, int]]
    """Its trained weights (:func:`latentwire.exports.sizes`)."""
    readings: dict[str, Any] | None
    """How often the rows were read before; ``None`` for rows that are there to be compared on, which nobody counts."""
    probes: dict[str, float] | None = None
    """What ``--diagnose`` found in its messages."""


def known_of(folder: Path, split: str, rows: Place) -> Known:
    """Return what is known of a wire's directory. A scoring of validation rows is recorded beside their shards."""
    manifest, read = exports.read_manifest(folder), None
    if split == "validation":
        read = readings.note(rows, readings.wire_name(manifest), documents.read(folder, manifest))
    return Known(exports.sizes(folder), read)


@dataclass(frozen=True)
class Asked:
    """What an evaluation was asked for, and what it reads of the data's source: before the scoring, which a file that cannot be
    read would lose."""

    rows: tuple[Condition, ...]
    """Of the table."""
    sides: list[tuple[str, str]]
    """Rows to set side by side, by their keys."""
    types: dict[str, str]
    """id → type of its question, where the dataset has such."""


def asked(options: argparse.Namespace, run: RunConfig) -> Asked:
    """The flags, checked. Raises :class:`~latentwire.config.resolve.ConfigError`, and
    :class:`~latentwire.data.sources.DataError` for data that cannot be read."""
    if options.data_dir is not None:
        raise ConfigError(
            f"--data_dir belongs to --predictions, got {options.data_dir} with --checkpoint; name the directory by "
            f"--set data.data_dir={options.data_dir}"
        )
    scoring.check_questions(run)
    rows = conditions(run, options.modes, options.tokens_per_latent, options.latent_len, options.bits)
    sides = compared(options.compare, rows)
    return Asked(rows, sides, question_types(run.data, shards.source_of(options.split)))


def show_and_write(
    options: argparse.Namespace,
    wanted: Asked,
    predictions: Mapping[str, Sequence[Prediction]],
    run: RunConfig,
    known: Known,
) -> int:
    """Print the tables and write what ``--output`` asks for; returns the exit status."""
    scores = scoring.summaries(predictions)
    further = details(predictions, wanted.sides, wanted.types) | {"weights": known.sizes}
    grids = [
        tables.scores_table(scores, f"{options.checkpoint}, {options.split}", run),
        tables.together_table(scores),
        tables.weights_table(known.sizes),
    ]
    if options.compare is not None:
        grids.append(tables.comparisons_table(further["comparisons"]))
    tables.show(grids)
    if known.readings is not None:
        further["readings"] = known.readings
        print(readings.sentence(known.readings))
    if known.probes is not None:
        further["diagnostics"] = known.probes
        print("latents: " + ", ".join(f"{name} {value:.3f}" for name, value in known.probes.items()))
    if options.output and options.output.name.endswith(".json"):
        write_text(options.output, json.dumps(scores, indent=1))
    elif options.output:
        write_text(options.output / "scores.json", json.dumps(scores, indent=1))
        write_text(options.output / "details.json", json.dumps(further, indent=1))
        scoring.write_predictions(predictions, options.output / "predictions.parquet")
    return 0
