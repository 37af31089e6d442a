"""The evaluation pin: one hash of everything, besides the wire, that a score hangs on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from latentwire.config import EvaluationConfig, RunConfig
from latentwire.config.knobs import paths_with
from latentwire.data import shards
from latentwire.evaluation.evaluator import METRIC_VERSION
from latentwire.models.weights import load_tokenizer
from latentwire.prompts.sequences import PROMPT_VERSION
from latentwire.prompts.templates import rendered
from latentwire.storage import Place, read_footer, read_parquet

ROW_COLUMNS = ("id", "context", "question", "answers")


def pins(paths: Mapping[shards.ShardSplit, Place], run: RunConfig) -> dict[str, Any]:
    """What a metric hangs on: the rows it was computed on and how they were decoded."""
    return {
        "shards": {split: shards.read_manifest(path)["key"] for split, path in paths.items()},
        "evaluation": run.evaluation.model_dump(),
        "evaluation_pin": protocol_hash(paths["dev"], run),
    }


def protocol_hash(path: Place, run: RunConfig) -> str:
    """Hash of the rows of complete shards (their content, in order), layout version, decoding limit, metric version and rules.

    What chat templates write around a prompt is in it too: it may hold a date, or hang on
    ``template_options``. Tokenisers, anchor and receivers are not: they belong to what is compared.
    Scores with different pins must not be.
    """
    digest = hashlib.sha256()
    for name in shards.read_manifest(path)["files"]:
        columns = [
            column for column in read_footer(path / name).schema.to_arrow_schema().names if column in ROW_COLUMNS
        ]
        for row in read_parquet(path / name, columns).to_pylist():
            digest.update(json.dumps(row, sort_keys=True).encode())
    decides: dict[str, Any] = {
        "rows": digest.hexdigest(),
        "layout_version": PROMPT_VERSION,
        "metric_version": METRIC_VERSION,
        "rules": run.data.dataset,
        "decoding": run.evaluation.model_dump(include=set(paths_with("protocol", model=EvaluationConfig))),
    }
    chats = {receiver.name: rendered(load_tokenizer(receiver), receiver) for receiver in run.receivers}
    if chats := {name: text for name, text in chats.items() if text is not None}:
        decides["chats"] = chats
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:16]
