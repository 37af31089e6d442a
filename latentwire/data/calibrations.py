"""Names of what a wire into retrieval heads begins from, kept beside the shards.

``<shard_dir>/heads-<receiver>-<hash>.json`` ranks one receiver's heads,
``<shard_dir>/moments-<hash>.safetensors`` holds the sums of which its closed form is made
(:mod:`latentwire.closed_form`), and ``<shard_dir>/solution-<hash>.safetensors`` that closed form.
The hashes cover rows, weights, the prefix that texts are read behind, and the knobs that decide
what is computed. :mod:`latentwire.distributed.calibrations` makes all but the solution, which the
first run makes that begins from it.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

from latentwire.config import ReceiverConfig, RunConfig
from latentwire.data import shards
from latentwire.data.readers import is_reader, teaching_reader, weights_id
from latentwire.models.senders import sender_sources
from latentwire.storage import Place

CALIBRATION_VERSION = 1
"""Raised whenever the same knobs would give other numbers."""


def readers(run: RunConfig, train: Place) -> dict[str, Place]:
    """Return receiver → directory of the text reader that its prefix begins as; else nothing."""
    if run.prefix is None or run.prefix.begin != "reader":
        return {}
    return {r.name: teaching_reader(run, r, train) for r in run.receivers}


def ranking_path(run: RunConfig, receiver: ReceiverConfig, train: Place) -> Place:
    """Return the file that ranks a receiver's heads, whether it is there or not."""
    spec = _read(run, receiver, train) | {"texts": run.adapter.ranking_texts}
    return train.parent / f"heads-{receiver.name}-{_hash(spec)}.json"


def moments_path(run: RunConfig, train: Place) -> Place:
    """Return the file of a closed form's sums, whether it is there or not."""
    assert run.closed_form is not None, "nobody asked for a closed form"
    named = {receiver.name: receiver for receiver in run.receivers}
    spec = {
        "rankings": [ranking_path(run, receiver, train).name for receiver in run.receivers],
        "cache_share": run.adapter.cache_share,
        "tokens_per_latent": run.encoder.tokens_per_latent,
        "senders": [_weights(sender) for sender in sender_sources(run.encoder, named)],
        "states": [run.encoder.depths, run.encoder.lead],
        "texts": [run.closed_form.texts, run.closed_form.gradient_texts],
    }
    return train.parent / f"moments-{_hash(spec)}.safetensors"


def solution_path(run: RunConfig, train: Place) -> Place:
    """Return the file of a solved closed form, whether it is there or not."""
    closed_form, encoder = run.closed_form, run.encoder
    assert closed_form is not None, "nobody asked for a closed form"
    spec = {
        "moments": moments_path(run, train).name,
        "codes": [encoder.d_z, encoder.tokens_per_latent],
        "solved": closed_form.model_dump(include={"metric", "ridge", "floor", "weights"}),
    }
    return train.parent / f"solution-{_hash(spec)}.safetensors"


def paths(run: RunConfig, train: Place) -> list[Place]:
    """Return the files that a run begins from; none but for retrieval heads."""
    if run.adapter.kind != "heads" or run.is_reader:
        return []
    rankings = [ranking_path(run, receiver, train) for receiver in run.receivers]
    return rankings if run.closed_form is None else [*rankings, moments_path(run, train)]


def complete(run: RunConfig, train: Place) -> bool:
    """Return whether all that a run begins from is there."""
    there = all(path.exists() for path in paths(run, train))
    return there and all(is_reader(path) for path in readers(run, train).values())


def _read(run: RunConfig, receiver: ReceiverConfig, train: Place) -> dict[str, Any]:
    """Return what a receiver's reading of the training texts hangs on."""
    spec: dict[str, Any] = {
        "calibration_version": CALIBRATION_VERSION,
        "shards": shards.read_manifest(train)["key"],
        "weights": _weights(receiver),
        "prefix": None if run.prefix is None else run.prefix.model_dump(),
    }
    if reader := readers(run, train).get(receiver.name):
        spec["reader"] = reader.name
    return spec


def _weights(receiver: ReceiverConfig) -> list[Any]:
    return [weights_id(receiver), receiver.dtype, receiver.quantization, receiver.revision]


def _hash(spec: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest()[:16]
