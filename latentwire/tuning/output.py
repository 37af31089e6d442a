"""What an evaluation leaves: tables for the terminal, scores and details as JSON, predictions as Parquet."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

from latentwire.config import RunConfig
from latentwire.config.resolve import ConfigError
from latentwire.evaluation.evaluator import Prediction
from latentwire.evaluation.metrics import question_types
from latentwire.evaluation.settings import Setting
from latentwire.evaluation.summary import baseline_pairs, details, pairs, summarise
from latentwire.storage import write_text
from latentwire.tuning import report, results


def compared(named: Sequence[str] | None, rows: Sequence[Setting]) -> list[tuple[str, str]]:
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


def show_and_write(
    options: argparse.Namespace,
    rows: Sequence[Setting],
    sides: Sequence[tuple[str, str]],
    predictions: Sequence[Prediction],
    run: RunConfig,
    probes: dict[str, float] | None = None,
) -> int:
    """Print the tables and write what ``--output`` asks for; returns the exit status. ``sides``: what :func:`compared` gives."""
    by_key = {row.key: [p for p in predictions if p.setting == row.key] for row in rows}
    scores = {key: summarise(found) for key, found in by_key.items()}
    types = question_types(run.data, "validation" if options.split == "validation" else "train")
    further = details(by_key, sides, types)
    grids = [report.scores_table(scores, f"{options.checkpoint}, {options.split}", run), report.together_table(scores)]
    if options.compare is not None:
        grids.append(report.comparisons_table(further["comparisons"]))
    report.show(grids)
    if probes is not None:
        further["diagnostics"] = probes
        print("latents: " + ", ".join(f"{name} {value:.3f}" for name, value in probes.items()))
    if options.output and options.output.suffix == ".json":
        write_text(options.output, json.dumps(scores, indent=1))
    elif options.output:
        write_text(options.output / "scores.json", json.dumps(scores, indent=1))
        write_text(options.output / "details.json", json.dumps(further, indent=1))
        results.write_predictions(predictions, options.output / "predictions.parquet")
    return 0
