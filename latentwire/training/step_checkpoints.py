"""The checkpoints of one run: ``step-00000120`` and the like, each whole or not there.

A checkpoint is written aside and renamed, and renamed before it is deleted, so a process that dies
at any moment leaves no half of one: only directories whose names begin with a dot, which
:func:`clear_debris` takes away. In an object store the manifest arrives last and goes first, and
what has none is debris.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from latentwire import exports
from latentwire.model import LatentWire
from latentwire.storage import Place, children, directory, text_if_there, write_text
from latentwire.training import checkpoints
from latentwire.training.loop import Trainer


def finished(folder: Place) -> list[Place]:
    """List the complete checkpoints, oldest first."""
    # Steps have leading zeros, so the order of names is that of steps.
    steps = [path for path in children(folder) if path.name.startswith("step-")]
    return [path for path in steps if (path / exports.MANIFEST).exists()]


def step_name(step: int) -> str:
    """Return the name of a checkpoint that is saved after ``step`` steps."""
    return f"step-{step:08d}"


def metrics_of(path: Place) -> dict[str, Any]:
    """Read a checkpoint's metrics.

    There are none where its run was stopped, or where another process has just deleted it.
    """
    manifest = text_if_there(path / exports.MANIFEST)
    return {} if manifest is None else json.loads(manifest)["metrics"]


def score(metrics: Mapping[str, Any], metric: str, mode: str) -> float:
    """Return a score of which more is better; minus infinity where the metric is missing or no number."""
    value = metrics.get(metric)
    if value is None or math.isnan(value):
        return float("-inf")
    return float(value if mode == "max" else -value)


def best_of(paths: list[Place], metric: str = "dev_f1", mode: str = "max") -> Place:
    """Return the best checkpoint by a metric, the later one among equals.

    The last one of a stopped run has no score.
    """
    return max(paths, key=lambda path: (score(metrics_of(path), metric, mode), path.name))


def save_step(
    folder: Place,
    wire: LatentWire,
    metrics: dict[str, Any],
    provenance: dict[str, Any],
    trainer: Trainer,
    metric: str,
    mode: str,
) -> Place:
    """Save the trainer's step unless it is there, then keep the run's best and last alone.

    A run that was stopped left a checkpoint without metrics; it gets them when it is evaluated.
    """
    path = folder / step_name(trainer.progress.step)
    manifest = text_if_there(path / exports.MANIFEST)
    if manifest is not None and metrics and not (document := json.loads(manifest))["metrics"]:
        write_text(path / exports.MANIFEST, json.dumps(document | {"metrics": metrics}, indent=1))
    if manifest is None:  # a store may hold a part, of a process that died while it was sent
        with directory(path, last=exports.MANIFEST) as target:
            checkpoints.save(target, wire, metrics, provenance, trainer)
    keep_best_and_last(folder, metric, mode)
    return path


def keep_best_and_last(folder: Place, metric: str, mode: str) -> None:
    """Delete all of a run's checkpoints but these two."""
    paths = finished(folder)
    for path in set(paths) - {best_of(paths, metric, mode), paths[-1]}:
        checkpoints.remove(path)


def clear_debris(folder: Place) -> int:
    """Delete the halves of checkpoints that processes which died have left; return their number.

    Only for a directory that no other process writes to.
    """
    if not isinstance(folder, Path):
        steps = [path for path in children(folder) if path.name.startswith("step-")]
        halves = [path for path in steps if not (path / exports.MANIFEST).exists()]
        for half in halves:
            checkpoints.remove(half)
        return len(halves)
    # ``part``: a write that did not end. ``removed``: a deletion that did not.
    left: list[Path] = []
    for kind in ("part", "removed"):
        left += [path for path in folder.glob(f".*.{kind}-*") if path.is_dir()]
    for path in left:
        checkpoints.remove_files(path, checkpoints.written_names(path))
    return len(left)
