"""The checkpoints of one run: ``step-00000120`` and its like in one directory, each whole or not there.

A checkpoint is written aside and renamed, and renamed before it is deleted, so a process that dies at any moment leaves no
half of one: only directories whose names begin with a dot, which :func:`clear_debris` takes away.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from latentwire.assembly import LatentWire
from latentwire.training import checkpoints
from latentwire.training.loop import Trainer


def finished(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(path.parent for path in folder.glob("step-*/manifest.json"))


def metrics_of(path: Path) -> dict[str, Any]:
    """What a checkpoint scored when it was saved; nothing for one that was saved because its run was stopped."""
    return json.loads((path / "manifest.json").read_text())["metrics"]


def score(metrics: Mapping[str, Any], metric: str, mode: str) -> float:
    """More is better; minus infinity where the metric is missing."""
    value = metrics.get(metric)
    return float("-inf") if value is None else float(value if mode == "max" else -value)


def best_of(paths: list[Path], metric: str = "dev_f1", mode: str = "max") -> Path:
    """The best checkpoint by a metric, the later one among equals; a stopped run's last has no score."""
    return max(paths, key=lambda path: (score(metrics_of(path), metric, mode), path))


def save_step(
    folder: Path,
    wire: LatentWire,
    metrics: dict[str, Any],
    pins: dict[str, Any],
    trainer: Trainer,
    metric: str = "dev_f1",
    mode: str = "max",
) -> Path:
    """Save the trainer's step unless it is there already, then keep the run's best by ``metric`` and its last alone."""
    path = folder / f"step-{trainer.progress.step:08d}"
    if not path.exists():
        checkpoints.save(path, wire, metrics, pins, trainer)
    kept = finished(folder)
    for other in set(kept) - {best_of(kept, metric, mode), kept[-1]}:
        checkpoints.remove(other)
    return path


def clear_debris(folder: Path) -> int:
    """Delete what processes that died left of checkpoints they were writing or deleting; returns how many there were.

    Only for a directory that no other process writes to.
    """
    left = [path for kind in ("part", "removed") for path in folder.glob(f".*.{kind}-*") if path.is_dir()]
    for path in left:
        checkpoints.remove_files(path, checkpoints.written_names(path))
    return len(left)
