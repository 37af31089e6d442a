"""Clones: new trials that begin with the last checkpoint of another one, under changed values.

A clone is a run of its own: it starts at step 0 with a fresh optimiser and the parent's wire, by
``training.init_from``. The checkpoint is copied, since the parent's own go as its training goes on.
"""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial

from latentwire import exports
from latentwire.config import SweepConfig
from latentwire.config.errors import nearest
from latentwire.config.knobs import has_property, knobs, paths_with
from latentwire.config.resolve import ConfigError, check_point, with_values
from latentwire.distributed.trial import trial_path
from latentwire.storage import Place, StorageError, directory, local
from latentwire.training import step_checkpoints
from latentwire.tuning.orders import Order
from latentwire.tuning.study import CLONE, clone_record, directory_of, run_values

CHANGEABLE = paths_with("may_change", "cloned trial")
"""Paths below ``run`` that a clone may change."""
AFRESH: dict[str, Any] = {"training.alignment_steps": 0, "training.coarsening_steps": 0}
"""What a trained wire has behind it and does not begin again."""
PREFIX = "clone-"
"""Beginning of the name of a directory, beside those of trials, with the checkpoint that a clone begins with."""
RULES = {
    "shards": "it makes other rows",
    "teachers": "it makes other teachers' columns",
    "calibrates": "it makes another calibration",
    "protocol": "scores under it could not be compared",
    "steps": "it makes for another number of steps than the sweep is planned for",
    "changes_receivers": "trials that differ in it cannot share receivers",
}
"""Property of a knob → why a clone keeps the parent's value."""
COPIES = 3
"""Attempts to copy a checkpoint, which a running parent may replace meanwhile."""


def check(order: Order, parent: FrozenTrial, space: SweepConfig, sweep: Place) -> None:
    """Raise :class:`~latentwire.config.resolve.ConfigError` for a clone that cannot be made, with the knob's rule."""
    if not order.values:
        raise ConfigError(
            f"a clone needs a changed value, got none; name one by --set, of {', '.join(CHANGEABLE)}"
        )
    if space.run.stages:
        raise ConfigError(
            f"a clone begins with its parent's wire, which a run with stages makes anew, got stages "
            f"{', '.join(space.run.stages)}; start a new sweep of the last one by --set run.stages={{}} "
            f"--set training.init_from=<checkpoint>"
        )
    before = with_values(space.run, run_values(parent))
    for path, value in order.values.items():
        _check_value(path, value, parent, space)
    with_values(before, order.values, f"a clone of trial {parent.number}")
    last_checkpoint(sweep, parent)


def _check_value(path: str, value: Any, parent: FrozenTrial, space: SweepConfig) -> None:
    names = dict(knobs())
    if path not in names:
        raise ConfigError(f"a clone changes knobs of run, got {path}{nearest(path, names)}")
    if path not in CHANGEABLE:
        reasons = [why for name, why in RULES.items() if has_property(path, name)]
        why = reasons[0] if reasons else "the parent's wire was made with it"
        raise ConfigError(
            f"a clone keeps its parent's {path}: {why}; it may change {', '.join(CHANGEABLE)}"
        )
    if path not in space.search:
        return
    if path not in parent.params:  # its condition did not hold there
        when = space.search[path].when.items()
        conditions = ", ".join(f"{name} {list(choices)}" for name, choices in when)
        raise ConfigError(
            f"{path} is drawn only with {conditions}, which trial {parent.number} has not; clone another trial"
        )
    check_point(space.search[path], value, f"search.{path}", f"a clone's {path}")


def last_checkpoint(sweep: Place, parent: FrozenTrial) -> Place:
    """Return a trial's last whole checkpoint.

    Raises :class:`~latentwire.config.resolve.ConfigError` where it has none.
    """
    paths = step_checkpoints.finished(trial_path(sweep / "trials", directory_of(parent)))
    if not paths:
        raise ConfigError(
            f"a clone begins with its parent's last checkpoint, trial {parent.number} has none: it has not "
            f"reported yet, or the sweep's budget kept better ones; wait for a report, or clone another"
        )
    return paths[-1]


def copy_start(order: Order, parent: FrozenTrial, sweep: Place) -> Place:
    """Return the checkpoint that an order's clone begins with: a copy of the parent's last, made once."""
    folder = sweep / "trials" / f"{PREFIX}{order.id}"
    # An order is carried out once: a driver before may have made the copy and died.
    there = step_checkpoints.finished(folder)
    for attempt in range(COPIES):
        if there:
            break
        source = last_checkpoint(sweep, parent)
        try:
            _copy(source, folder / source.name)
        # The parent may just have replaced it. shutil's error is an OSError too.
        except (OSError, StorageError, exports.CheckpointError):
            if attempt + 1 == COPIES:
                raise
        there = step_checkpoints.finished(folder)
    return there[-1]


def enqueue(study: optuna.Study, order: Order, parent: FrozenTrial, start: Place) -> int:
    """Enqueue the clone of an order unless the study has it; return its number.

    Its parameters are the values that it trains under, so the sampler learns which gave its score.
    What it began with stands in its attributes.
    """
    trials = study.get_trials(deepcopy=False)
    # A driver before may have enqueued it, and died before it answered the order.
    for trial in trials:
        if clone_record(trial).get("order") == order.id:
            return trial.number
    searched = {path: order.values.get(path, value) for path, value in parent.params.items()}
    others = {path: value for path, value in order.values.items() if path not in searched}
    # A clone of a clone has the parent's changes too; its own come last, and lie over them.
    inherited = dict(clone_record(parent).get("values", {}))
    record = {
        "order": order.id,
        "parent": parent.number,
        "step": int(start.name.removeprefix("step-")),
        "changed": dict(order.values),
        "values": inherited | others | AFRESH | {"training.init_from": str(start)},
    }
    study.enqueue_trial(searched, user_attrs={CLONE: record})
    return len(trials)  # Optuna numbers trials from 0, and nobody else appends


def described(record: Mapping[str, Any]) -> str:
    """Return what a clone is, in a few words; ``record``: its attribute."""
    changed = ", ".join(f"{path}={value}" for path, value in record["changed"].items())
    return f"clone of {record['parent']} at step {record['step']} with {changed}"


def _copy(source: Place, target: Place) -> None:
    """Copy a checkpoint, whole or not at all."""
    with local(source) as files:
        if not isinstance(target, Path):  # a store renames nothing: the manifest goes last
            with directory(target, last=exports.MANIFEST) as folder:
                shutil.copytree(files, folder)
            return
        aside = target.with_name(f".{target.name}.part-{uuid.uuid4().hex[:8]}")
        try:
            shutil.copytree(files, aside)
            exports.read_manifest(aside)  # every file is there and hashes as its manifest says
            aside.rename(target)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise
