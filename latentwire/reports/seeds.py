"""Scores of one wire that was trained with several seeds, in one table."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from latentwire import card, exports
from latentwire.config.resolve import ConfigError
from latentwire.evaluation.conditions import label
from latentwire.reports import tables
from latentwire.reports.tables import Grid
from latentwire.storage import Place, text_if_there

PERCENT = {"em": "EM", "f1": "F1", "match": "match"} | card.AGAINST_TEXT
"""Metric in percent → its column."""


@dataclass(frozen=True)
class SeedScores:
    """The scores of a wire that was trained with one seed."""

    output: Place
    """Directory of the run, or of the evaluation."""
    seed: int
    protocol: str
    """Protocol hash of the scores (:func:`latentwire.evaluation.protocol.protocol_hash`)."""
    scores: dict[str, Any]
    """Condition's key → receiver → metrics."""


def read(output: Place) -> SeedScores:
    """Read the scores of a finished run or sweep, or of an evaluation's directory.

    Raises :class:`~latentwire.config.resolve.ConfigError` where they are not there.
    """
    # An evaluation's directory first, then that of a run, whose scores stand in results.json.
    scores, details = _json(output / "scores.json"), _json(output / "details.json")
    if "protocol" in details:
        return SeedScores(output, details["seed"], details["protocol"], scores)
    manifest = _json(output / "best" / exports.MANIFEST)
    pins = manifest.get("pins", {}).get("validation")
    scores = _json(output / "results.json").get("validation") or {}
    if not pins or not scores:
        raise ConfigError(
            f"a seed's scores must lie in the directory of a finished run, or of `latentwire "
            f"evaluate --output DIR`, which names their protocol; {output} holds none; score the "
            f"wire again"
        )
    seed = _json(output / "best" / "config.json")["training"]["seed"]
    return SeedScores(output, seed, pins["evaluation_pin"], scores)


def _json(file: Place) -> dict[str, Any]:
    text = text_if_there(file)
    return json.loads(text) if text is not None else {}


def seeds_table(seeds: Sequence[SeedScores]) -> Grid:
    """Return the mean of each score over seeds, with the least and the greatest.

    Raises :class:`~latentwire.config.resolve.ConfigError` for scores of different protocols, which
    must not be compared, and for a seed that is there twice.
    """
    if len({seed.protocol for seed in seeds}) > 1:
        protocols = ", ".join(f"{seed.output} {seed.protocol}" for seed in seeds)
        raise ConfigError(
            f"seeds must be scored by one protocol (rows, prompts, decoding and metrics), got "
            f"{protocols}; score them again by `latentwire evaluate` with the same --set"
        )
    numbers = [seed.seed for seed in seeds]
    if len(set(numbers)) < len(numbers):
        named = ", ".join(f"{seed.output} seed {seed.seed}" for seed in seeds)
        raise ConfigError(f"seeds must differ, got {named}; leave out what is there twice")
    keys = _shared([seed.scores for seed in seeds])
    # Keys that not every seed has, each once, in their order.
    scored = dict.fromkeys(itertools.chain.from_iterable(seed.scores for seed in seeds))
    left_out = [key for key in scored if key not in keys]
    body = []
    for key in keys:
        for receiver in seeds[0].scores[key]:
            # One row of metrics a seed; an empty one where it has no such receiver.
            rows = [seed.scores[key].get(receiver, {}) for seed in seeds]
            if receiver != "mean" and all(rows):
                body.append([label(key), receiver, rows])
    # A metric has a column where all seeds have it in some row at least.
    shared: set[str] = set()
    for *_, rows in body:
        shared.update(_shared(rows))
    columns = [name for name in PERCENT if name in shared]
    lines = []
    for reads, receiver, rows in body:
        ranges = [_range(rows, name, 100, 1) for name in columns]
        lines.append([reads, receiver, *ranges, _range(rows, "nll")])
    title = f"seeds {', '.join(map(str, numbers))}: mean (least to greatest)"
    if left_out:
        title += f"; not scored for all of them: {', '.join(map(label, left_out))}"
    header = ["the receiver reads", "receiver", *(PERCENT[name] for name in columns), "NLL"]
    return title, header, lines


def show(seeds: Sequence[SeedScores]) -> None:
    """Print the table of seeds, and what retention is against."""
    tables.show([seeds_table(seeds)])
    print(card.retention_note(seeds[0].scores))


def _shared(tables: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the keys of the first table that all of them have."""
    return [key for key in tables[0] if all(key in table for table in tables)]


def _range(rows: Sequence[dict[str, float]], name: str, factor: float = 1, digits: int = 2) -> str:
    """Return the mean of a score over seeds with its range; a dash where a seed has none."""
    if any(name not in row for row in rows):
        return "–"
    values = [factor * row[name] for row in rows]
    mean, least, greatest = sum(values) / len(values), min(values), max(values)
    return f"{mean:.{digits}f} ({least:.{digits}f} to {greatest:.{digits}f})"
