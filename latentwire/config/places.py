"""Relative paths of a configuration: outputs lie under a home, inputs where they exist."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from latentwire.addresses import expanded
from latentwire.config import SweepConfig
from latentwire.config.knobs import knob_of
from latentwire.config.wire import LENT
from latentwire.storage import Place, place


def home() -> Place:
    """Return where relative outputs go: ``$LATENTWIRE_HOME`` (a directory or a URI), else the current directory.

    A submitted job runs in an unpacked copy of the project that Ray deletes later, so there it is ``~/latentwire``.
    """
    if chosen := os.environ.get("LATENTWIRE_HOME"):
        return place(chosen)
    # Ray unpacks a job's working_dir into a folder of this name.
    if "_ray_pkg_" in str(Path.cwd()):
        return Path.home() / "latentwire"
    return Path.cwd()


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
    models' directories) are :func:`sought`, those that a search chooses from too.
    """
    # Sections are frozen: the paths are changed in a plain tree, which is validated again.
    tree = space.model_dump(mode="json")
    tree["run"]["data"]["shard_dir"] = at_home(space.run.data.shard_dir)
    for changed in tree["run"]["stages"].values():
        _seek_inputs(changed)
    tree["tune"]["storage_path"] = at_home(space.tune.storage_path)
    if space.run.encoder.model is not None:
        tree["run"]["encoder"]["model"] = _absolute_model(space.run.encoder.model)
    tree["run"]["encoder"]["senders"] = list(map(_absolute_sender, space.run.encoder.senders))
    for path in tree["search"]:
        if knob_of(path) in INPUTS:
            _seek_choices(tree, path, INPUTS[knob_of(path)])
    if space.run.data.data_dir is not None:
        tree["run"]["data"]["data_dir"] = _absolute_input(space.run.data.data_dir)
    if space.run.training.init_from is not None:
        tree["run"]["training"]["init_from"] = _absolute_input(space.run.training.init_from)
    if space.tune.warm_start is not None:
        tree["tune"]["warm_start"] = _absolute_input(space.tune.warm_start)
    for receiver in tree["run"]["receivers"]:
        receiver["model"] = _absolute_model(receiver["model"])
    return SweepConfig.model_validate(tree)


def _seek_inputs(changed: dict[str, Any]) -> None:
    """Make the inputs that a stage names absolute, in place."""
    data, encoder = changed["data"], changed["encoder"]
    if data.get("data_dir") is not None:
        data["data_dir"] = _absolute_input(data["data_dir"])
    if "model" in encoder:
        encoder["model"] = _absolute_model(encoder["model"])
    if "senders" in encoder:
        encoder["senders"] = list(map(_absolute_sender, encoder["senders"]))


def _seek_choices(tree: dict[str, Any], path: str, absolute: Callable[[Any], Any]) -> None:
    """Make the choices of a searched input absolute, in place, wherever the space names them."""
    dimension = tree["search"][path]
    if "choices" in dimension:
        dimension["choices"] = [absolute(choice) for choice in dimension["choices"]]
    # Conditions name several choices, starting points one.
    for dim in tree["search"].values():
        if path in dim["when"]:
            dim["when"][path] = [absolute(choice) for choice in dim["when"][path]]
    for point in tree["tune"]["start_with"]:
        if path in point:
            point[path] = absolute(point[path])


def _absolute_input(address: Any) -> Any:
    """Return an input's absolute address, as :func:`sought` finds it; what is no text as it is."""
    return str(sought(address).absolute()) if isinstance(address, str) else address


def _absolute_sender(model: str) -> str:
    """Return a sender as :func:`_absolute_model` does; ``receiver:<name>`` names no path."""
    return model if model.startswith(LENT) else _absolute_model(model)


def _absolute_model(model: Any) -> Any:
    """Return a model's directory as an absolute path, sought as other inputs are; any other name as it is."""
    if isinstance(model, str):
        # A home in an object store holds no directory that transformers could load.
        for base in (Path.cwd(), home()):
            if isinstance(base, Path) and (base / expanded(model)).is_dir():
                return str(base.absolute() / expanded(model))
    return model


INPUTS: dict[str, Callable[[Any], Any]] = {
    "data.data_dir": _absolute_input,
    "encoder.model": _absolute_model,
    "training.init_from": _absolute_input,
}
"""Knobs that name inputs and can be searched, each with what makes a choice of it absolute."""
