"""Names of what a wire into retrieval heads begins from, kept beside the shards.

``<shard_dir>/heads-<receiver>-<hash>.json`` ranks one receiver's heads,
``<shard_dir>/moments-<hash>.safetensors`` holds the sums of which its closed form is made
(:mod:`latentwire.closed_form`), and ``<shard_dir>/solution-<hash>.safetensors`` that closed form.
The hashes cover rows, weights, the prefix that texts are read behind, and the knobs that decide
what is computed. :mod:`latentwire.distributed.calibrations` makes all but the solution, which the
first run makes that begins from it. For parts that ``training.init_from`` holds nothing is made.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any, Literal

from latentwire.config import ReceiverConfig, RunConfig
from latentwire.config.stages import STAGE
from latentwire.data import shards
from latentwire.data.readers import is_reader, teaching_reader, weights_id
from latentwire.models.senders import sender_sources
from latentwire.storage import Place, place, text_if_there

ENCODER = "interlingua.safetensors"
CALIBRATION_VERSION = 1
"""Raised whenever the same knobs would give other numbers."""
SOLUTION_VERSION = 2
"""Raised whenever a solution holds something else."""


def readers(run: RunConfig, train: Place) -> dict[str, Place]:
    """Return receiver → directory of the text reader that its prefix begins as; else nothing."""
    if run.prefix is None or run.prefix.begin != "reader":
        return {}
    return {r.name: teaching_reader(run, r, train) for r in run.receivers}


def loaded(run: RunConfig) -> Mapping[str, str]:
    """Return the files of ``training.init_from``, from which parts of a fresh run are loaded, with their hashes.

    Empty where it is not there yet: a sweep may search it. The stages of a run have the same parts,
    whose hashes are not known beforehand.
    """
    if run.training.init_from is None:
        return {}
    if run.training.init_from.startswith(STAGE):
        # The stage before may not be trained yet: its files are known all the same.
        files = [ENCODER]
        for part in ("adapters", "prefixes"):
            files += [f"{part}/{receiver.name}.safetensors" for receiver in run.receivers]
        return dict.fromkeys(files, "")
    manifest = text_if_there(place(run.training.init_from) / "manifest.json")
    return {} if manifest is None else json.loads(manifest)["files"]


def fresh(run: RunConfig, folder: Literal["adapters", "prefixes"]) -> list[str]:
    """Return the receivers whose adapter or prefix comes from no earlier wire."""
    files = loaded(run)
    names = [receiver.name for receiver in run.receivers]
    return [name for name in names if f"{folder}/{name}.safetensors" not in files]


def has_fresh_encoder(run: RunConfig) -> bool:
    """Return whether the encoder comes from no earlier wire. If not, receivers join that one."""
    return ENCODER not in loaded(run)


def needed_readers(run: RunConfig, train: Place) -> dict[str, Place]:
    """Return those of :func:`readers` that a run begins from."""
    names = needed_readers_of(run)
    return {name: path for name, path in readers(run, train).items() if name in names}


def needed_readers_of(run: RunConfig) -> list[str]:
    """Return the receivers whose text readers a run begins from.

    A receiver's heads are ranked behind the prefix of its reader, too.
    """
    if run.prefix is None or run.prefix.begin != "reader":
        return []
    prefixes = fresh(run, "prefixes")
    adapters = fresh(run, "adapters") if run.adapter.kind == "heads" else []
    return [one.name for one in run.receivers if one.name in {*prefixes, *adapters}]


def ranking_path(run: RunConfig, receiver: ReceiverConfig, train: Place) -> Place:
    """Return the file that ranks a receiver's heads, whether it is there or not."""
    spec = _read(run, receiver, train) | {"texts": run.adapter.ranking_texts}
    return train.parent / f"heads-{receiver.name}-{_hash(spec)}.json"


def moments_path(run: RunConfig, train: Place) -> Place:
    """Return the file of a closed form's sums, whether it is there or not."""
    assert run.closed_form is not None, "nobody asked for a closed form"
    named = {receiver.name: receiver for receiver in run.receivers}
    rankings = _rankings(run, train)
    # For a receiver that joins there is nothing to be weighed.
    gradient_texts = run.closed_form.gradient_texts if has_fresh_encoder(run) else 0
    # Other files stand here by their names, which hold the hashes of all that made them.
    states: list[Any] = [run.encoder.depths, run.encoder.lead]
    if run.encoder.sender_heads:
        states.append("heads")
        if not has_fresh_encoder(run):
            # The senders' heads are those of the wire that is joined.
            states.append(loaded(run)[ENCODER])
    spec = {
        "rankings": [path.name for path in rankings],
        "cache_share": run.adapter.cache_share,
        "tokens_per_latent": run.encoder.tokens_per_latent,
        "senders": [_weights(sender) for sender in sender_sources(run.encoder, named)],
        "states": states,
        "texts": [run.closed_form.texts, gradient_texts],
    }
    return train.parent / f"moments-{_hash(spec)}.safetensors"


def solution_path(run: RunConfig, train: Place) -> Place:
    """Return the file of a solved closed form, whether it is there or not."""
    closed_form, encoder = run.closed_form, run.encoder
    assert closed_form is not None, "nobody asked for a closed form"
    spec = {
        "solution_version": SOLUTION_VERSION,
        "moments": moments_path(run, train).name,
        "codes": [encoder.d_z, encoder.tokens_per_latent],
        "solved": closed_form.model_dump(include={"metric", "ridge", "floor", "weights"}),
    }
    return train.parent / f"solution-{_hash(spec)}.safetensors"


def paths(run: RunConfig, train: Place) -> list[Place]:
    """Return the files that a run begins from; none but for retrieval heads."""
    if run.adapter.kind != "heads" or run.is_reader:
        return []
    rankings = _rankings(run, train)
    has_moments = bool(rankings) and run.closed_form is not None
    return [*rankings, moments_path(run, train)] if has_moments else rankings


def _rankings(run: RunConfig, train: Place) -> list[Place]:
    names = fresh(run, "adapters")
    return [ranking_path(run, one, train) for one in run.receivers if one.name in names]


def complete(run: RunConfig, train: Place) -> bool:
    """Return whether all that a run begins from is there."""
    there = all(path.exists() for path in paths(run, train))
    return there and all(is_reader(path) for path in needed_readers(run, train).values())


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
    # 64 bits in hex. Sorted, so that the order in which a spec is written does not count.
    return hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest()[:16]
