"""Checkpoints and exports: safetensors and JSON, never pickle; written aside, then renamed.

A directory holds ``config.json``, ``interlingua.safetensors`` (the encoder, without a backbone that is not trained),
``adapters/<receiver>.safetensors``, ``features/<name>.safetensors`` for each feature that is on,
``manifest.json`` (format, hashes, parameter counts, package versions, pins, metrics) and, in a checkpoint but not in an
export, ``training_state.safetensors`` and ``training_state.json`` for an exact resume. No receiver weight is in it.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import uuid
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from latentwire.assembly import LatentWire
from latentwire.config import RunConfig
from latentwire.config.resolve import ConfigError, validate
from latentwire.features.registry import keeps_receivers_frozen
from latentwire.storage import Place, local, place
from latentwire.training.loop import Progress, Trainer

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
"""Written last: a directory that has it is complete."""
PACKAGES = ("latentwire", "ray", "torch", "transformers", "datasets", "optuna", "pyarrow", "safetensors")


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be trusted or does not fit; the message says what was expected and what was found."""


# ------------------------------------------------------------------------------------------------------------- saving


def save(
    path: Path, wire: LatentWire, metrics: dict[str, Any], pins: dict[str, Any], trainer: Trainer | None = None
) -> Path:
    """Write a checkpoint (with ``trainer``) or an export (without) to ``path``, which must not exist yet.

    ``pins``: what the metrics hang on (shard keys, receivers' hashes, evaluation settings).
    """
    path = Path(path)
    if path.exists():
        raise CheckpointError(f"a checkpoint must not overwrite anything, {path} exists; name another directory")
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.parent / f".{path.name}.part-{uuid.uuid4().hex[:8]}"
    aside.mkdir()
    try:
        (aside / "config.json").write_text(wire.run.model_dump_json(indent=1))
        for name, module in _parts(wire).items():
            (aside / name).parent.mkdir(exist_ok=True)
            save_file(_trained(module), aside / name)
        if trainer is not None:
            _save_training(aside, trainer)
        manifest = {
            "format_version": FORMAT_VERSION,
            "files": {str(f.relative_to(aside)): _sha256(f) for f in sorted(aside.rglob("*")) if f.is_file()},
            "parameters": {
                name: sum(t.numel() for t in _trained(part).values()) for name, part in _parts(wire).items()
            },
            "receivers_frozen": keeps_receivers_frozen(wire.run),
            "backbone": wire.interlingua.encoder.backbone_fingerprint(),
            "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
            "python": platform.python_version(),
            "pins": pins,
            "metrics": metrics,
        }
        (aside / MANIFEST).write_text(json.dumps(manifest, indent=1))
        os.rename(aside, path)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return path


def _parts(wire: LatentWire) -> dict[str, torch.nn.Module]:
    """File → the module whose weights it holds."""
    interlingua = wire.interlingua
    parts: dict[str, torch.nn.Module] = {"interlingua.safetensors": interlingua.encoder}
    parts |= {f"adapters/{name}.safetensors": adapter for name, adapter in interlingua.adapters.items()}
    return parts | {f"features/{name}.safetensors": feature for name, feature in interlingua.features.items()}


def _trained(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A module's weights, without those of a pretrained backbone that is not trained: the manifest holds their hash."""
    fixed = {name for name, parameter in module.named_parameters() if not parameter.requires_grad}
    return {name: t.detach().cpu().contiguous() for name, t in module.state_dict().items() if name not in fixed}


def _save_training(path: Path, trainer: Trainer) -> None:
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


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest, after every file it names has been hashed. Raises :class:`CheckpointError`."""
    file = Path(path) / MANIFEST
    if not file.exists():
        raise CheckpointError(
            f"a checkpoint must hold manifest.json, {path} does not; name the directory that holds it"
        )
    try:
        manifest = json.loads(file.read_text())
        version, files = manifest["format_version"], dict(manifest["files"])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file} must be the JSON that latentwire writes ({error}); restore it") from error
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"format_version must be {FORMAT_VERSION}, got {version} ({file}); use the version that wrote it"
        )
    for name, expected in files.items():
        part = (Path(path) / name).resolve()
        if not part.is_relative_to(Path(path).resolve()):
            raise CheckpointError(f"files must lie inside the checkpoint, got {name} ({file})")
        if not part.exists():
            raise CheckpointError(
                f"{path} must hold {name} as its manifest says, it is missing; copy the whole directory"
            )
        found = _sha256(part)
        if found != expected:
            raise CheckpointError(
                f"{part} must hash to {expected[:12]}… as its manifest says, got {found[:12]}…; it was changed or cut off"
            )
    return manifest


def read_run(path: Path) -> RunConfig:
    """The configuration a checkpoint was made with. Raises :class:`CheckpointError`."""
    try:
        return validate(RunConfig, json.loads((Path(path) / "config.json").read_text()), f"{path}/config.json")
    except (OSError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise CheckpointError(f"{path}/config.json must be readable JSON ({error})") from error


def load_weights(path: Path, wire: LatentWire) -> dict[str, Any]:
    """Put a checkpoint's encoder and adapters into ``wire``; returns the manifest.

    Raises :class:`CheckpointError` for changed files, other shapes or keys, or receivers whose weights hash differently
    from those it was trained with.
    """
    path = Path(path)
    manifest = read_manifest(path)
    for name, module in _parts(wire).items():
        if name not in manifest["files"]:
            raise CheckpointError(f"{path} must hold {name} for this configuration, it does not")
        _fill(path / name, module)
    backbone = wire.interlingua.encoder.backbone_fingerprint()
    if backbone != manifest["backbone"]:
        raise CheckpointError(
            f"the encoder's backbone must hash to {manifest['backbone']}, got {backbone} ({wire.run.encoder.model}); "
            f"load the same weights"
        )
    for name, expected in manifest["pins"].get("receivers", {}).items():
        if name in wire.receivers and (found := wire.receivers[name].fingerprint()) != expected:
            raise CheckpointError(
                f"receiver {name} must hash to {expected[:12]}… as when the wire was trained, got {found[:12]}… "
                f"({wire.receivers[name].config.model}); load the same weights and dtype"
            )
    return manifest


def initialise(source: str | Place, wire: LatentWire) -> None:
    """Start a fresh wire from an earlier one: every part that both have; what is new keeps its fresh weights.

    ``source``: a directory or URI of a checkpoint or export.

    Raises :class:`CheckpointError` for a part of another shape, or a checkpoint that has nothing in common.
    """
    with local(place(source)) as path:
        manifest, parts = read_manifest(path), _parts(wire)
        common = [name for name in parts if name in manifest["files"]]
        if not common:
            raise CheckpointError(f"init_from must hold a part of this wire ({', '.join(parts)}), {source} holds none")
        for name in common:
            _fill(path / name, parts[name])
    fresh = ", ".join(name for name in parts if name not in common) or "nothing"
    print(f"started from {source}: {', '.join(common)}; fresh: {fresh}", flush=True)


def _fill(file: Path, module: torch.nn.Module) -> None:
    """Put a file's weights into a module. Raises :class:`CheckpointError` where keys or shapes differ."""
    try:
        tensors = load_file(file)
    except SafetensorError as error:
        raise CheckpointError(f"{file} must be readable safetensors ({error}); restore it") from error
    if differing := tensors.keys() ^ _trained(module).keys():
        raise CheckpointError(f"{file} must fit the configuration, it differs in {', '.join(sorted(differing)[:5])}")
    try:
        module.load_state_dict(tensors, strict=False)
    except RuntimeError as error:
        raise CheckpointError(f"{file} must fit the configuration: {error}") from error


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


def remove(path: Path) -> None:
    """Delete a checkpoint: the files that its manifest names, and nothing that somebody else put there."""
    manifest = json.loads((path / MANIFEST).read_text())
    for name in (*manifest["files"], MANIFEST):
        (path / name).unlink(missing_ok=True)
    folders = sorted((folder for folder in path.rglob("*") if folder.is_dir()), reverse=True)
    for folder in (*folders, path):
        if not any(folder.iterdir()):
            folder.rmdir()


def load_wire(path: Path, run: RunConfig | None = None) -> tuple[LatentWire, dict[str, Any]]:
    """A wire from a checkpoint or export, with its manifest; loads the receivers too. ``run`` replaces its configuration."""
    read_manifest(path)
    wire = LatentWire(run or read_run(path))
    return wire, load_weights(path, wire)


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
