"""Checkpoints: a wire's directory (``latentwire/exports.py``) with the state of its training.

``training_state.safetensors`` and ``training_state.json`` lie beside the weights: optimiser and
progress, from which rates and every random number follow. An export is the same directory without
them.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from latentwire import exports
from latentwire.closed_form.begin import begin
from latentwire.config import RunConfig
from latentwire.config.knobs import has_property
from latentwire.config.resolve import ConfigError
from latentwire.data import documents, shards
from latentwire.exports import CheckpointError, read_manifest, read_run
from latentwire.loading import check_backbone, fill, load_weights
from latentwire.model import LatentWire
from latentwire.storage import (
    Place,
    delete,
    delete_directory,
    files_below,
    local,
    place,
    text_if_there,
)
from latentwire.training.loop import Trainer
from latentwire.training.optimizer import former_names, parameter_names
from latentwire.training.progress import Progress

# ------------------------------------------------------------------------------------------- saving


def save(
    path: Path,
    wire: LatentWire,
    metrics: dict[str, Any],
    provenance: dict[str, Any],
    trainer: Trainer | None = None,
) -> Path:
    """Write a checkpoint (with ``trainer``) or an export (without) to an empty ``path``.

    ``provenance``: what the metrics depend on (shard keys, receivers' hashes, evaluation settings).
    A checkpoint is its run's own and names models as the run does; an export names their
    directories from its own place.
    """
    if trainer is None:
        return exports.save(path, wire, metrics, provenance)
    return exports.save(
        path, wire, metrics, provenance, partial(_save_training, trainer=trainer), address=str
    )


def _save_training(path: Path, *, trainer: Trainer) -> None:
    tensors = {}
    names = parameter_names(trainer.wire.interlingua, trainer.optimizer)
    # torch counts parameters from 0; names hold where a later version groups them in another order.
    for index, slots in trainer.optimizer.state_dict()["state"].items():
        for slot, value in slots.items():
            tensors[f"optimizer.{names[index]}.{slot}"] = torch.as_tensor(value).detach().cpu()
    exports.write_tensors(tensors, path / "training_state.safetensors")
    (path / "training_state.json").write_text(
        json.dumps({"progress": asdict(trainer.progress)}, indent=1)
    )


# ------------------------------------------------------------------------------------------ loading


def initialise(
    source: str | Place, wire: LatentWire, say: Callable[[str], object] = print
) -> list[str]:
    """Start a wire from an earlier one: every part that both have; return the parts that stay fresh.

    ``source``: a directory or URI of a checkpoint or export. ``say``: takes a line about it. Of a feature, the part for a receiver
    that the earlier wire did not have is new. Raises :class:`CheckpointError` for a part of another
    shape, an encoder that read by other weights, a checkpoint that has nothing in common, or a part
    that ``training.train_only`` keeps as it is and that is not there.
    """
    parts = exports.parts(wire)
    with local(place(source)) as path:
        manifest = read_manifest(path)
        known = {receiver.name for receiver in read_run(path).receivers}
        common = [name for name in parts if name in manifest["files"]]
        if not common:
            raise CheckpointError(
                f"init_from must hold a part of this wire ({', '.join(parts)}), {source} holds none"
            )
        # Receivers of one wire alone: what features hold for them is dropped, or stays fresh.
        one_sided = wire.receivers.keys() ^ known
        for name in common:
            fill(path / name, parts[name], left_out=one_sided)
        if exports.ENCODER in common:
            check_backbone(path, wire, manifest)
        wire.trained_on = documents.read(path, manifest)
    missing = [name for name in parts if name not in common]
    frozen = []
    for name in missing:
        if not all(parameter.requires_grad for parameter in parts[name].parameters()):
            frozen.append(name)
    if wire.run.training.train_only and frozen:
        raise CheckpointError(
            f"init_from must hold what train_only keeps as it is, {source} has no {', '.join(frozen)}; train it too"
        )
    say(f"started from {source}: {', '.join(common)}; fresh: {', '.join(missing) or 'nothing'}")
    return missing


def restore(trainer: Trainer, last: Place | None) -> None:
    """Go on from a run's last checkpoint; without one, begin as the configuration says.

    That is from the wire of ``training.init_from``, or from what was calibrated on the training rows.
    """
    say = trainer.workers.say
    if last is not None:
        with local(last) as path:
            load_training(path, trainer)
        say(f"resumed at step {trainer.progress.step} from {last}")
    elif trainer.config.init_from is not None:
        fresh = initialise(trainer.config.init_from, trainer.wire, say)
        if trainer.train_shards is not None:
            begin(trainer.wire, trainer.train_shards, fresh, say)
    elif trainer.train_shards is not None:
        begin(trainer.wire, trainer.train_shards, say=say)


def check_development(run: RunConfig, dev: Place) -> None:
    """Raise where a run's development rows are of documents that its first wire trained on.

    ``dev``: the development shards; the first wire is that of ``training.init_from``. Raises
    :class:`~latentwire.config.resolve.ConfigError`.
    """
    if run.training.init_from is not None:
        with local(place(run.training.init_from)) as path:
            earlier = documents.read(path, read_manifest(path))
        names = shards.read_table(dev, ["document"])["document"].to_pylist()
        documents.check_development(earlier, str(run.training.init_from), names)


def check_frozen(wire: LatentWire, before: Mapping[str, str]) -> None:
    """Raise :class:`RuntimeError` where receivers hash otherwise than before the training."""
    if changed := [name for name, hash_ in wire.fingerprints().items() if hash_ != before[name]]:
        raise RuntimeError(f"frozen receivers must not change, {', '.join(changed)} did")


def load_training(path: Path, trainer: Trainer) -> None:
    """Continue exactly where a checkpoint stopped: weights, optimiser and progress.

    Raises :class:`~latentwire.config.resolve.ConfigError` where the trainer's run is another one,
    and :class:`CheckpointError` where the optimiser's state is that of other parameters.
    """
    check_same_run(read_run(path), trainer.wire.run, path)
    load_weights(path, trainer.wire, read_manifest(path))
    document = json.loads((Path(path) / "training_state.json").read_text())
    names = parameter_names(trainer.wire.interlingua, trainer.optimizer)
    former = former_names(trainer.wire.interlingua, trainer.config)
    places = {name: place for place, name in enumerate(names)}
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, tensor in load_file(Path(path) / "training_state.safetensors").items():
        name, _, slot = key.removeprefix("optimizer.").rpartition(".")
        # Earlier checkpoints have a place, counted in their own order, for a name.
        name = former[int(name)] if name.isdecimal() and int(name) < len(former) else name
        if name not in places:
            raise CheckpointError(
                f"{path} must hold the optimiser state of this wire, got one of {name}; restore it"
            )
        state.setdefault(places[name], {})[slot] = tensor
    # Rates and decays are the configuration's, which a resumed run keeps.
    groups = trainer.optimizer.state_dict()["param_groups"]
    trainer.optimizer.load_state_dict({"state": state, "param_groups": groups})
    trainer.progress = Progress(**document["progress"])


def check_same_run(before: RunConfig, now: RunConfig, path: Place) -> None:
    """Raise where a run would go on with other knobs than it began with.

    Half of it would be another run's, and its manifest would name one of them. Raises
    :class:`~latentwire.config.resolve.ConfigError`.
    """
    old, new = _flat(before.model_dump(mode="json")), _flat(now.model_dump(mode="json"))
    changed = []
    for name in sorted(old.keys() | new.keys()):
        before_value, now_value = old.get(name), new.get(name)
        if before_value != now_value and not has_property(name, "may_change", "resumed run"):
            changed.append(f"{name} {before_value} → {now_value}")
    if changed:
        raise ConfigError(
            f"a resumed run keeps its configuration, {path} was made with another: "
            f"{', '.join(changed)}; take that back, or begin a new run with this wire by --from, "
            f"elsewhere"
        )


def _flat(tree: Any, path: str = "") -> dict[str, Any]:
    """Map the dotted path of every leaf of a JSON tree to its value."""
    if isinstance(tree, list):
        tree = dict(enumerate(tree))
    if not isinstance(tree, dict):
        return {path: tree}
    # {"a": {"b": 1}} → {"a.b": 1}
    leaves: dict[str, Any] = {}
    for name, child in tree.items():
        leaves |= _flat(child, f"{path}.{name}" if path else str(name))
    return leaves


def remove(path: Place) -> None:
    """Delete a checkpoint: the files that its manifest names, and no others.

    It is renamed first, so that no half of it is ever seen under its name. A store renames nothing
    at once: there the manifest, which makes it whole, goes first. One that another process has just
    deleted is nothing to delete.
    """
    if not isinstance(path, Path):
        # The manifest is last in the list, so it goes first.
        for name in reversed(written_names(path)):
            delete(path / name)
        if path.is_dir() and not files_below(path):
            delete_directory(path)
        return
    aside = path.parent / f".{path.name}.removed-{uuid.uuid4().hex[:8]}"
    try:
        path.rename(aside)
    except FileNotFoundError:
        return
    remove_files(aside, written_names(aside))
    if aside.exists():  # another's files are in it: they go back to where they were
        aside.rename(path)


def written_names(path: Place) -> list[str]:
    """List a checkpoint's files: those that its manifest names, the manifest last.

    Without a manifest, those that every checkpoint may have.
    """
    if (manifest := text_if_there(path / exports.MANIFEST)) is not None:
        return [*json.loads(manifest)["files"], exports.CARD, exports.MANIFEST]
    fixed = ("config.json", exports.CARD, exports.MANIFEST, "training_state.json")
    names = []
    for name in files_below(path):
        if name.rpartition("/")[2] in fixed or name.endswith(".safetensors"):
            names.append(name)
    return names


def remove_files(path: Path, names: list[str]) -> None:
    """Delete these files of a directory, then every folder that nothing else is left in."""
    for name in names:
        delete(path / name)
    # Deepest first: "a/b" comes after "a", and must be gone before it.
    folders = sorted((folder for folder in path.rglob("*") if folder.is_dir()), reverse=True)
    for folder in (*folders, path):
        if not any(folder.iterdir()):
            folder.rmdir()
