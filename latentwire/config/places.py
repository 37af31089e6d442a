"""Relative paths of a configuration: outputs lie under a home, inputs where they exist."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from latentwire.addresses import expanded
from latentwire.config import SweepConfig
from latentwire.config.wire import LENT
from latentwire.storage import Place, place


def home() -> Place:
    """Return where relative outputs go: ``$LATENTWIRE_HOME`` (a directory or a URI), else the current directory.

    A submitted job runs in an unpacked copy of the project that Ray deletes later, so there it is ``~/latentwire``.
    """
    if chosen := os.environ.get("LATENTWIRE_HOME"):
        return place(chosen)
    return Path.home() / "latentwire" if "_ray_pkg_" in str(Path.cwd()) else Path.cwd()


def at_home(address: str) -> str:
    """Return an output's address, under :func:`home` where it is relative."""
    address = expanded(address)
    return address if "://" in address or Path(address).is_absolute() else str(home() / address)


def sought(address: str) -> Place:
    """Return an input's place: where the command was given, or else under :func:`home`, if it is there.

    A job writes under home, and the next one names what it reads by the same relative path.
    """
    where = place(address)
    if isinstance(where, Path) and not where.is_absolute() and not where.exists():
        written = place(at_home(address))
        if written.exists():
            return written
    return where


def with_home(space: SweepConfig) -> SweepConfig:
    """Return the space with every local path made absolute: Ray's workers run in directories of their own.

    Outputs (``shard_dir``, ``storage_path``) go under :func:`home`; inputs (``data_dir``, ``init_from``, ``warm_start``,
    models' directories) are :func:`sought`.
    """
    tree = space.model_dump(mode="json")
    tree["run"]["data"]["shard_dir"] = at_home(space.run.data.shard_dir)
    for changed in tree["run"]["stages"].values():
        _seek_inputs(changed)
    tree["tune"]["storage_path"] = at_home(space.tune.storage_path)
    if space.run.encoder.model is not None:
        tree["run"]["encoder"]["model"] = _absolute(space.run.encoder.model)
    senders = space.run.encoder.senders
    tree["run"]["encoder"]["senders"] = [s if s.startswith(LENT) else _absolute(s) for s in senders]
    if (searched := tree["search"].get("encoder.model")) is not None:
        searched["choices"] = [_absolute(choice) for choice in searched["choices"]]
        for named in (
            *(dim["when"] for dim in tree["search"].values()),
            *tree["tune"]["start_with"],
        ):
            if (value := named.get("encoder.model")) is not None:
                named["encoder.model"] = (
                    [_absolute(v) for v in value] if isinstance(value, list) else _absolute(value)
                )
    if space.run.data.data_dir is not None:
        tree["run"]["data"]["data_dir"] = str(sought(space.run.data.data_dir).absolute())
    if space.run.training.init_from is not None:
        tree["run"]["training"]["init_from"] = str(sought(space.run.training.init_from).absolute())
    if space.tune.warm_start is not None:
        tree["tune"]["warm_start"] = str(sought(space.tune.warm_start).absolute())
    for receiver in tree["run"]["receivers"]:
        receiver["model"] = _absolute(receiver["model"])
    return SweepConfig.model_validate(tree)


def _seek_inputs(changed: dict[str, Any]) -> None:
    """Make the inputs that a stage names absolute, in place."""
    data, encoder = changed["data"], changed["encoder"]
    if data.get("data_dir") is not None:
        data["data_dir"] = str(sought(data["data_dir"]).absolute())
    if "model" in encoder:
        encoder["model"] = _absolute(encoder["model"])
    if "senders" in encoder:
        encoder["senders"] = [s if s.startswith(LENT) else _absolute(s) for s in encoder["senders"]]


def _absolute(model: Any) -> Any:
    """Return a model's directory as an absolute path, sought as other inputs are; any other name as it is."""
    if isinstance(model, str):
        for base in (Path.cwd(), home()):
            if isinstance(base, Path) and (base / expanded(model)).is_dir():
                return str(base.absolute() / expanded(model))
    return model
