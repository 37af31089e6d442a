"""Names of the directories in which the earlier stages of runs are kept beside the shards.

``<shard_dir>/stage-<name>-<hash>`` is the wire that one leaves, as an export with its evaluations. The
hash covers what made it: rows, the receivers' weights, the stage before, and every knob that its
result depends on. :mod:`latentwire.training.stages` trains them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from latentwire.config import RunConfig
from latentwire.config.knobs import paths_with
from latentwire.config.resolve import Stage, stages_of, with_values
from latentwire.data import shards
from latentwire.data.readers import weights_id
from latentwire.storage import Place, place, text_if_there

STAGE_VERSION = 1
"""Raised whenever the same knobs would train another wire."""
MANIFEST = "manifest.json"
ENTRY = "stage"
"""Key in the manifest of a stage's directory of what is known of its training."""
WITHOUT_EFFECT = (
    *paths_with("may_change", "repeated trial"),
    "data.in_memory",
    "data.stream_cpus",
    "data.validation_samples",
    "data.validation_skip",
    "stages",
    "training.init_from",
    "training.log_every",
    "training.max_failures",
    "training.worker_resources",
)
"""Knobs that a stage's wire does not depend on, or that other entries of its hash stand for."""
ELSEWHERE = {"model", "device"}
"""Knobs of a receiver that say where its weights lie and go; their content is in the hash."""

Keys = Callable[[RunConfig], Sequence[str]]
"""Returns the hashes that name the training and development rows of a stage."""


@dataclass(frozen=True)
class PlacedStage:
    """A stage, and the directory in which its wire is kept."""

    name: str
    title: str
    """Its name and place, e.g. ``recite 1/2``; empty where the run has no stages."""
    run: RunConfig
    """All that it is trained with, and begins with the directory of the stage before."""
    keep: str
    path: Place | None
    """Its directory, whether it is there or not. ``None``: the last stage's wire is the run's."""
    before: Mapping[str, str]
    """Each stage before it → the name of that one's directory."""


def placed(run: RunConfig, keys: Keys | None = None) -> tuple[PlacedStage, ...]:
    """Return the stages of a run with their directories; nothing needs to be there.

    Args:
        run: the configuration.
        keys: names the rows. None: tokenizers are loaded for it, and sources looked at.
    """
    keys = keys or keys_of
    stages = stages_of(run)
    # ``start`` is what the next stage begins with: the wire of ``training.init_from`` for the
    # first, the directory of the one before for the others.
    before: dict[str, str] = {}
    start = run.training.init_from
    result = []
    for number, stage in enumerate(stages, start=1):
        values = {"training.init_from": start} if before else {}
        resolved = with_values(stage.run, values) if values else stage.run
        path = None  # the last stage's wire is the run's own
        if number < len(stages):
            hashed = _hash(resolved, stage, keys(resolved), list(before.values()))
            folder = place(resolved.data.shard_dir).absolute()
            path = folder / f"stage-{stage.name}-{hashed}"
        title = f"{stage.name} {number}/{len(stages)}" if stage.name else ""
        config = stage.config
        result.append(PlacedStage(stage.name, title, resolved, config.keep, path, dict(before)))
        if path is not None:
            before[stage.name], start = path.name, str(path)
    return tuple(result)


def keys_of(run: RunConfig) -> list[str]:
    """Return the hashes that name a run's training and development rows."""
    return [shards.shard_key(run, "train")[0], shards.shard_key(run, "dev")[0]]


def is_there(path: Place) -> bool:
    """Return whether a stage's wire is there: its manifest is written last."""
    return (path / MANIFEST).exists()


def report_of(path: Place) -> dict[str, Any]:
    """Read what is known of the training of a stage that is there."""
    entry: dict[str, Any] = json.loads((path / MANIFEST).read_text())[ENTRY]
    return entry | {"directory": str(path)}


def reports(stages: Sequence[PlacedStage]) -> list[dict[str, Any]]:
    """Read what is known of those of a run's earlier stages that are there: it can go on without them."""
    paths = [stage.path for stage in stages if stage.path is not None]
    return [report_of(path) for path in paths if is_there(path)]


def _hash(run: RunConfig, stage: Stage, keys: Sequence[str], before: Sequence[str]) -> str:
    knobs = run.model_dump(mode="json")
    # Dotted paths: walk to the section that a knob is in, and take it out there.
    for path in WITHOUT_EFFECT:
        *parents, leaf = path.split(".")
        section = knobs
        for name in parents:
            section = section[name]
        section.pop(leaf, None)
    receivers = []
    for receiver in run.receivers:
        entry = receiver.model_dump(mode="json", exclude=ELSEWHERE)
        receivers.append(entry | {"weights": weights_id(receiver)})
    knobs["receivers"] = receivers
    # The name of the directory before this one holds the hash of all that led there.
    spec = {
        "stage_version": STAGE_VERSION,
        "knobs": knobs,
        "shards": list(keys),
        "keep": stage.config.keep,
        "begins": before[-1] if before else _start(run),
    }
    return hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest()[:16]


def _start(run: RunConfig) -> Any:
    """Return what identifies the wire that the first stage begins with; ``None`` where it is fresh."""
    if run.training.init_from is None:
        return None
    text = text_if_there(place(run.training.init_from) / MANIFEST)
    return run.training.init_from if text is None else json.loads(text)["files"]
