"""The protocol hash: one hash of everything, besides the wire, that a score depends on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from latentwire.config import EvaluationConfig, RunConfig
from latentwire.config.knobs import paths_with
from latentwire.data import shards
from latentwire.evaluation.evaluator import METRIC_VERSION
from latentwire.pretrained.weights import load_tokenizer
from latentwire.prompts.sequences import PROMPT_VERSION
from latentwire.prompts.templates import rendered
from latentwire.storage import Place, read_footer, read_parquet

ROW_COLUMNS = ("id", "context", "question", "answers")


def pins(paths: Mapping[shards.ShardSplit, Place], run: RunConfig) -> dict[str, Any]:
    """Return what a metric depends on: the rows it was computed on, and how they were decoded.

    It goes into checkpoints' manifests under ``pins``.
    """
    return {
        "shards": {split: shards.read_manifest(path)["key"] for split, path in paths.items()},
        "evaluation": run.evaluation.model_dump(),
        "evaluation_pin": protocol_hash(paths["dev"], run),
    }


def protocol_hash(path: Place, run: RunConfig) -> str:
    """Return the protocol hash of scores on complete shards.

    It covers the rows (their content, in order), layout version, decoding limit, metric version and
    rules. The text that chat templates write around a prompt is in it too: it may hold a date, or
    depend on ``template_options``. Tokenisers, anchor and receivers are not: they belong to what is
    compared. Scores with different hashes must not be compared.
    """
    digest = hashlib.sha256()
    for name in shards.read_manifest(path)["files"]:
        # Those columns that these shards have.
        stored = read_footer(path / name).schema.to_arrow_schema().names
        columns = [column for column in stored if column in ROW_COLUMNS]
        for row in read_parquet(path / name, columns).to_pylist():
            digest.update(json.dumps(row, sort_keys=True).encode())
    # Names of keys are part of the hash too: none may change.
    decides: dict[str, Any] = {
        "rows": digest.hexdigest(),
        "layout_version": PROMPT_VERSION,
        "metric_version": METRIC_VERSION,
        "rules": run.data.dataset,
        "decoding": run.evaluation.model_dump(
            include=set(paths_with("protocol", model=EvaluationConfig))
        ),
    }
    chats = {}
    for receiver in run.receivers:
        text = rendered(load_tokenizer(receiver), receiver)
        if text is not None:
            chats[receiver.name] = text
    # Receivers without a chat template add nothing to the hash.
    if chats:
        decides["chats"] = chats
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:16]
