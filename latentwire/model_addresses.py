"""The models of a configuration: which of its receivers, and by which address each model is named."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from latentwire.config import RunConfig
from latentwire.config.resolve import ConfigError, with_values
from latentwire.config.wire import LENT
from latentwire.pretrained.weights import TOY_MODELS


def with_models(run: RunConfig, address: Callable[[str], str]) -> RunConfig:
    """Return ``run`` with another address of each model, its receivers' and its encoder's."""
    receivers = []
    for receiver in run.receivers:
        receivers.append(receiver.model_dump() | {"model": address(receiver.model)})
    values: dict[str, Any] = {"receivers": receivers}
    if run.encoder.model is not None:
        values["encoder.model"] = address(run.encoder.model)
    if run.encoder.senders:
        # ``receiver:<name>`` borrows a receiver's model, which has its address there.
        senders = run.encoder.senders
        values["encoder.senders"] = [s if s.startswith(LENT) else address(s) for s in senders]
    return with_values(run, values, "receivers")


def beside(path: Path, model: str) -> str:
    """Return a model's directory relative to the directory ``path``, beginning with a dot.

    A Hub id or an embedded model stays as it is. Whoever gets both together, or under another root,
    finds one from the other; nobody learns where they lay.
    """
    if not is_directory(model):
        return model
    relative = Path(os.path.relpath(Path(model).resolve(), Path(path).resolve())).as_posix()
    return relative if relative.startswith("..") else f"./{relative}"


def below(path: Path, model: str) -> str:
    """Return a model's directory relative to ``path`` where it lies below it, else as it is.

    For an export in an object store.
    """
    folder, root = Path(model).resolve(), path.resolve()
    if is_directory(model) and folder.is_relative_to(root):
        return folder.relative_to(root).as_posix()
    return model


def by_name(model: str) -> str:
    """Return a model's directory by its last name, as if it lay in the export.

    For strangers, who must say where they have it.
    """
    return f"./{Path(model).resolve().name}" if is_directory(model) else model


def is_directory(model: str) -> bool:
    """Return whether a model is a directory (or file) of this machine."""
    return model not in TOY_MODELS and Path(model).exists()


def is_path(model: str) -> bool:
    """Return whether a model is named by a path, and not by a Hub id or as an embedded one."""
    # A Hub id has one slash at most: organisation/model.
    return model.startswith((".", "/", "~")) or model.count("/") > 1


def with_places(run: RunConfig, places: Mapping[str, str | Path]) -> RunConfig:
    """Return ``run`` with other places of some receivers' weights, by their names.

    Raises :class:`~latentwire.config.resolve.ConfigError` for an unknown name.
    """
    known = [receiver.name for receiver in run.receivers]
    _check_known(known, places)
    values = {f"receivers.{known.index(name)}.model": place for name, place in places.items()}
    return with_values(run, values, "receivers")


def choose_receivers(
    run: RunConfig, chosen: str | Sequence[str] | Mapping[str, str | Path] | None
) -> RunConfig:
    """Return ``run`` with the chosen receivers alone (``None``: all).

    They are one name, several, or name → another place of its weights. Raises
    :class:`~latentwire.config.resolve.ConfigError` for an unknown name, or where the encoder needs
    all of them.
    """
    if chosen is None:
        return run
    chosen = [chosen] if isinstance(chosen, str) else chosen
    known = {receiver.name: receiver for receiver in run.receivers}
    _check_known(known, chosen)
    if run.encoder.private_len and len(chosen) < len(known):
        raise ConfigError(
            f"encoder.private_len {run.encoder.private_len} makes latents for each of "
            f"{', '.join(known)}, got only {', '.join(chosen)}; name all of them"
        )
    if away := [name for name in run.encoder.lenders if name not in chosen]:
        raise ConfigError(
            f"encoder.senders reads texts by the models of {', '.join(run.encoder.lenders)}, got no "
            f"{', '.join(away)}; name them too"
        )
    places = dict(chosen) if isinstance(chosen, Mapping) else {}
    receivers = [known[name].model_dump() for name in chosen]
    for receiver in receivers:
        receiver["model"] = places.get(receiver["name"], receiver["model"])
    # Receivers that stay away cannot be named as trained, of a wire that one of them joined.
    stay = {"encoder", *chosen}
    train_only = [name for name in run.training.train_only if name in stay]
    values: dict[str, Any] = {"receivers": receivers, "training.train_only": train_only}
    lender = run.encoder.lender
    if lender is not None and lender not in chosen:
        # The encoder is still built like the receiver that stays away.
        values["encoder.model"] = known[lender].model
    return with_values(run, values, "receivers")


def _check_known(known: Collection[str], names: Iterable[str]) -> None:
    if strange := [name for name in names if name not in known]:
        raise ConfigError(
            f"receivers must be among {', '.join(known)}, got {', '.join(strange)}; name some of them"
        )
