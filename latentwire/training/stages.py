"""The earlier stages of runs: each trained once, kept beside the shards, and used by every run that agrees in it.

Two runs agree in a stage where all is the same that its wire depends on, the stages before it
included (:mod:`latentwire.data.stages`). A directory that is there is whole; a training that was
killed goes on from its last checkpoint.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from latentwire import exports
from latentwire.config import RunConfig
from latentwire.config.resolve import ConfigError, Stage
from latentwire.data import documents, shards
from latentwire.data.documents import TrainedOn
from latentwire.data.stages import ENTRY, PlacedStage, is_there, report_of
from latentwire.model import LatentWire
from latentwire.storage import Place, directory, local, text_if_there
from latentwire.training import step_checkpoints
from latentwire.training.local import metric_of, train_here
from latentwire.training.workspace import workspace

Train = Callable[[PlacedStage, Place], None]
"""Trains a stage in a directory to its end, from the last checkpoint there."""


def ensure(stage: PlacedStage, train: Train, say: Callable[[str], object] = print) -> None:
    """Train an earlier stage unless it is there.

    Args:
        stage: the stage; those before it are there.
        train: trains it, where no other process does.
        say: takes a line about it.
    """
    assert stage.path is not None, "the last stage is the run itself"
    how = "reused from"
    if not is_there(stage.path):
        waits = f"stage {stage.title}: another process trains it, and is waited for"
        with workspace(stage.path, "training", lambda: say(waits)) as work:
            # Asked again: the process that was waited for has made it.
            if not is_there(stage.path):
                say(f"stage {stage.title} is trained first: {stage.path}")
                train(stage, work)
                _keep(stage, work)
                how = "made in"
    report = report_of(stage.path)
    metric, _ = metric_of(stage.run)
    say(
        f"stage {stage.title}: {metric} {report['metrics'].get(metric, float('nan')):.4g} at step "
        f"{report['step']} ({report['keep']}), {how} {stage.path}"
    )


def train_stage_here(
    paths: Mapping[shards.ShardSplit, Place], stage: PlacedStage, work: Place
) -> None:
    """Train a stage in this process, in ``work``. ``paths``: its shards."""
    train_here(LatentWire(stage.run), paths, work, stage.title, stage.before)


def _keep(stage: PlacedStage, work: Place) -> None:
    """Write a stage's directory from the checkpoints of its training, without what only training needs."""
    assert stage.path is not None
    paths = step_checkpoints.finished(checkpoints_of(work))
    chosen = paths[-1]
    if stage.keep == "best":
        chosen = step_checkpoints.best_of(paths, *metric_of(stage.run))
    # All evaluations, those after the best checkpoint too, are in the last one's progress.
    with local(paths[-1]) as last:
        progress = json.loads((last / "training_state.json").read_text())["progress"]
    with local(chosen) as source:
        manifest = exports.read_manifest(source)
        entry = {
            "name": stage.name,
            "keep": stage.keep,
            "step": int(chosen.name.removeprefix("step-")),
            "metrics": manifest["metrics"],
            "before": dict(stage.before),
            "evaluations": progress["evaluations"],
            "train_seconds": progress["seconds"],
        }
        files = {}
        for name, hash_ in manifest["files"].items():
            if not name.startswith("training_state"):
                files[name] = hash_
        with directory(stage.path, last=exports.MANIFEST) as target:
            _copy(source, target, manifest | {"files": files, ENTRY: entry})


def _copy(source: Path, target: Path, manifest: Mapping[str, Any]) -> None:
    """Copy the files that a manifest names and write it, aside and renamed."""
    aside = target.parent / f".{target.name}.part-{uuid.uuid4().hex[:8]}"
    try:
        for name in (*manifest["files"], exports.CARD):
            (aside / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, aside / name)
        (aside / exports.MANIFEST).write_text(json.dumps(manifest, indent=1))
        os.rename(aside, target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def checkpoints_of(work: Place) -> Place:
    """Return the directory of a training's checkpoints in its workspace."""
    return work / "checkpoints"


def check_documents(
    stages: Sequence[Stage | PlacedStage], shards_of: Callable[[RunConfig], Mapping]
) -> None:
    """Raise where a stage would be compared on documents that an earlier one of the run trains on.

    Before anything is trained. ``shards_of``: the complete shards of a stage. Raises
    :class:`~latentwire.config.resolve.ConfigError`.
    """
    record = TrainedOn()
    for number, stage in enumerate(stages):
        paths = shards_of(stage.run)
        if number:
            names = shards.read_table(paths["dev"], ["document"])["document"].to_pylist()
            documents.check_development(record, f"stage {stages[number - 1].name}", names)
        record = record.with_stage(stage.run, paths["train"])


def check_same_stages(last: Place, stage: PlacedStage) -> None:
    """Raise where a run would go on from a checkpoint whose earlier stages were others.

    Raises :class:`~latentwire.config.resolve.ConfigError`. ``last``: the checkpoint. ``stage``: the
    run's last.
    """
    text = text_if_there(last / exports.MANIFEST)
    pins = {} if text is None else json.loads(text)["pins"]
    before = pins.get("stages", {})
    if before != stage.before:
        raise ConfigError(
            f"a resumed run keeps its stages, {last} came after {_named(before)}, these are "
            f"{_named(stage.before)}; take back what changed in them, or begin a new run"
        )


def _named(before: Mapping[str, str]) -> str:
    return ", ".join(before.values()) or "no other stage"
