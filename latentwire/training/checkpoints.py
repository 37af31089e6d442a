"""Checkpoints: a wire's directory (``latentwire/exports.py``) with what training needs to go on exactly where it stopped.

``training_state.safetensors`` and ``training_state.json`` lie beside the weights: optimiser, schedule, progress and random
state. An export is the same directory without them.
"""

from __future__ import annotations

import json
import uuid
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from latentwire import exports
from latentwire.assembly import LatentWire
from latentwire.config import RunConfig
from latentwire.exports import CheckpointError, load_weights, read_manifest, read_run
from latentwire.storage import Place, delete, delete_directory, files_below, local, place, text_if_there
from latentwire.training.loop import Trainer
from latentwire.training.progress import Progress

# ------------------------------------------------------------------------------------------------------------- saving


def save(
    path: Path, wire: LatentWire, metrics: dict[str, Any], pins: dict[str, Any], trainer: Trainer | None = None
) -> Path:
    """Write a checkpoint (with ``trainer``) or an export (without) to ``path``, which must not hold anything yet.

    ``pins``: what the metrics hang on (shard keys, receivers' hashes, evaluation settings).
    """
    return exports.save(path, wire, metrics, pins, partial(_save_training, trainer=trainer) if trainer else None)


def _save_training(path: Path, *, trainer: Trainer) -> None:
    tensors = {"rng": torch.get_rng_state()}
    state = trainer.optimizer.state_dict()
    for index, slots in state["state"].items():
        for slot, value in slots.items():
            tensors[f"optimizer.{index}.{slot}"] = torch.as_tensor(value).detach().cpu()
    save_file(tensors, path / "training_state.safetensors")
    document = {
        "progress": asdict(trainer.progress),
        "optimizer_groups": state["param_groups"],
        "scheduler": trainer.scheduler.state_dict(),
    }
    (path / "training_state.json").write_text(json.dumps(document, indent=1))


# ------------------------------------------------------------------------------------------------------------ loading


def initialise(source: str | Place, wire: LatentWire) -> None:
    """Start a fresh wire from an earlier one: every part that both have; what is new keeps its fresh weights.

    ``source``: a directory or URI of a checkpoint or export. Of a feature, the part for a receiver that the earlier wire did
    not have is new. Raises :class:`CheckpointError` for a part of another shape, a checkpoint that has nothing in common, or a
    part that ``training.train_only`` keeps as it is and that is not there.
    """
    parts = exports.parts(wire)
    with local(place(source)) as path:
        manifest, known = read_manifest(path), {receiver.name for receiver in read_run(path).receivers}
        common = [name for name in parts if name in manifest["files"]]
        if not common:
            raise CheckpointError(f"init_from must hold a part of this wire ({', '.join(parts)}), {source} holds none")
        for name in common:
            exports.fill(path / name, parts[name], left_out=wire.receivers.keys() ^ known)
    missing = [name for name in parts if name not in common]
    frozen = [name for name in missing if not all(p.requires_grad for p in parts[name].parameters())]
    if wire.run.training.train_only and frozen:
        raise CheckpointError(
            f"init_from must hold what train_only keeps as it is, {source} has no {', '.join(frozen)}; train it too"
        )
    print(f"started from {source}: {', '.join(common)}; fresh: {', '.join(missing) or 'nothing'}", flush=True)


def load_training(path: Path, trainer: Trainer) -> None:
    """Continue exactly where a checkpoint stopped: weights, optimiser, schedule, progress and random state."""
    load_weights(path, trainer.wire)
    document = json.loads((Path(path) / "training_state.json").read_text())
    tensors = load_file(Path(path) / "training_state.safetensors")
    state: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith("optimizer."):
            _, index, slot = name.split(".")
            state.setdefault(int(index), {})[slot] = tensor
    trainer.optimizer.load_state_dict({"state": state, "param_groups": document["optimizer_groups"]})
    trainer.scheduler.load_state_dict(document["scheduler"])
    trainer.progress = Progress(**document["progress"])
    torch.set_rng_state(tensors["rng"])


def remove(path: Place) -> None:
    """Delete a checkpoint: the files that its manifest names, and nothing that somebody else put there.

    It is renamed first, so that no half of it is ever seen under its name. A store renames nothing at once: there the manifest,
    which makes it whole, goes first. One that another process has just deleted is nothing to delete.
    """
    if not isinstance(path, Path):
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
    """Files of a checkpoint: those its manifest names, the manifest last. Without one, those that every checkpoint may have."""
    if (manifest := text_if_there(path / exports.MANIFEST)) is not None:
        return [*json.loads(manifest)["files"], exports.CARD, exports.MANIFEST]
    fixed = ("config.json", exports.CARD, exports.MANIFEST, "training_state.json")
    return [name for name in files_below(path) if name.rpartition("/")[2] in fixed or name.endswith(".safetensors")]


def remove_files(path: Path, names: list[str]) -> None:
    """Delete these files of a directory, and it and those below it where nothing else is left in them."""
    for name in names:
        delete(path / name)
    folders = sorted((folder for folder in path.rglob("*") if folder.is_dir()), reverse=True)
    for folder in (*folders, path):
        if not any(folder.iterdir()):
            folder.rmdir()


def load_wire(path: Path, run: RunConfig | None = None) -> tuple[LatentWire, dict[str, Any]]:
    """A wire from a checkpoint or export, with its manifest; loads the receivers too. ``run`` replaces its configuration."""
    read_manifest(path)
    wire = LatentWire(run or read_run(path))
    return wire, load_weights(path, wire)
