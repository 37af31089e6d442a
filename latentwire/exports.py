"""A wire as a directory of safetensors and JSON: written aside, then renamed; checked when read.

It holds ``config.json``, ``interlingua.safetensors`` (the encoder, without a backbone that is not
trained), ``adapters/<receiver>.safetensors``, ``prefixes/<receiver>.safetensors`` where there are
prefixes, ``features/<name>.safetensors`` for each feature that is on, ``trained_on.safetensors``
(hashes of the documents it has trained on), ``manifest.json`` (format, hashes, parameter counts,
package versions, provenance, metrics) and ``README.md``, the model card. No receiver weight is in
it; a text reader is the same without encoder and adapters. ``loading.py`` puts the weights into a
wire. What training adds to go on from is in ``training/checkpoints.py``.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file

from latentwire import card
from latentwire.config import RunConfig
from latentwire.config.resolve import validate
from latentwire.data import documents
from latentwire.errors import UserError
from latentwire.features.registry import keeps_receivers_frozen
from latentwire.model_addresses import beside, is_path, with_models
from latentwire.models.encoders import InterlinguaEncoder
from latentwire.storage import sha256

if TYPE_CHECKING:  # commands name exports' files and load no receivers for it
    from latentwire.wire_base import WireBase

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
CARD = "README.md"
ENCODER = "interlingua.safetensors"
FILES = [
    "config.json",
    MANIFEST,
    CARD,
    ENCODER,
    documents.FILE,
    "adapters/*.safetensors",
    "prefixes/*.safetensors",
    "features/*.safetensors",
]
"""Files of an export, as patterns."""
PACKAGES = (
    "latentwire",
    "ray",
    "torch",
    "transformers",
    "datasets",
    "optuna",
    "pyarrow",
    "safetensors",
)


class CheckpointError(UserError):
    """A checkpoint that cannot be trusted or does not fit; it says what was expected and found."""


# ------------------------------------------------------------------------------------------- saving


def save(
    path: Path,
    wire: WireBase,
    metrics: dict[str, Any],
    provenance: dict[str, Any],
    add: Callable[[Path], None] | None = None,
    address: Callable[[str], str] | None = None,
    stored_as: torch.dtype | None = None,
) -> Path:
    """Write a wire to ``path``, which must be empty or not there yet.

    ``provenance``: what the metrics depend on (shard keys, receivers' hashes, evaluation settings).
    ``add`` writes further files into the directory that it is given, before everything is hashed.
    ``address``: how the configuration names a model's directory; ``None``: relative to ``path``
    (:func:`~latentwire.model_addresses.beside`). ``stored_as``: type in which trained weights are
    written; ``None``: their own.
    """
    path = Path(path)
    check_free(path)
    run = with_models(wire.run, address or partial(beside, path))
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.parent / f".{path.name}.part-{uuid.uuid4().hex[:8]}"
    aside.mkdir()
    try:
        (aside / "config.json").write_text(run.model_dump_json(indent=1))
        for name, module in parts(wire).items():
            (aside / name).parent.mkdir(exist_ok=True)
            write_tensors(saved_tensors(module, stored_as), aside / name)
        wire.trained_on.save(aside)
        if add is not None:
            add(aside)
        files = [file for file in sorted(aside.rglob("*")) if file.is_file()]
        manifest = {
            "format_version": FORMAT_VERSION,
            "files": {str(file.relative_to(aside)): sha256(file) for file in files},
            "parameters": {name: _count(module) for name, module in parts(wire).items()},
            "receivers_frozen": keeps_receivers_frozen(wire.run),
            "backbone": wire.interlingua.encoder.backbone_fingerprint(),
            "encoder_id": wire.encoder_id,
            "packages": installed(PACKAGES),
            "python": platform.python_version(),
            "trained_on": wire.trained_on.entry,
            "pins": provenance,
            "metrics": metrics,
        }
        (aside / MANIFEST).write_text(json.dumps(manifest, indent=1))
        (aside / CARD).write_text(card.write(run, manifest), encoding="utf-8")
        # An empty directory may stand at ``path``: POSIX lets a directory take its place.
        os.rename(aside, path)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return path


def write_tensors(tensors: dict[str, torch.Tensor], file: Path) -> None:
    """Write tensors as safetensors, readable by those whom the umask lets read."""
    file.touch()  # with the umask's mode, which safetensors' own file would not have
    mode = file.stat().st_mode
    save_file(tensors, file)
    file.chmod(mode)


def installed(names: Iterable[str]) -> dict[str, str]:
    """Return package → version of those that are there: a plain run needs no Ray or Optuna."""
    versions = {}
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


@contextlib.contextmanager
def written_at(path: Path) -> Iterator[None]:
    """Turn what a disk refuses into a :class:`CheckpointError`.

    Not for training, which tries again where its disk did not answer.
    """
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"a wire must go to a directory that can be written, got {path} ({error}); name another directory"
        ) from error


def check_free(path: Path) -> None:
    """Raise :class:`CheckpointError` where a wire would overwrite something, or the directory one works in."""
    if path.is_dir() and path.samefile("."):
        raise CheckpointError(
            f"a checkpoint must be a directory of its own, got {path}, in which this process works; name another directory"
        )
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise CheckpointError(
            f"a checkpoint must not overwrite anything, {path} exists; name another directory"
        )


def parts(wire: WireBase) -> dict[str, torch.nn.Module]:
    """Return file → the module whose weights it holds."""
    interlingua = wire.interlingua
    modules: dict[str, torch.nn.Module] = {}
    if isinstance(interlingua.encoder, InterlinguaEncoder):
        modules[ENCODER] = interlingua.encoder
    for name, adapter in interlingua.adapters.items():
        modules[f"adapters/{name}.safetensors"] = adapter
    for name, prefix in interlingua.prefixes.items():
        modules[f"prefixes/{name}.safetensors"] = prefix
    for name, feature in interlingua.features.items():
        modules[f"features/{name}.safetensors"] = feature
    return modules


def saved_tensors(
    module: torch.nn.Module, stored_as: torch.dtype | None = None
) -> dict[str, torch.Tensor]:
    """Return a module's weights, without those of a backbone that is not trained.

    The manifest holds such a backbone's hash. ``stored_as``: type of the parameters; ``None``: their
    own. Buffers have their own.
    """
    fixed = module.frozen_parameters() if isinstance(module, InterlinguaEncoder) else frozenset()
    dtypes = {} if stored_as is None else {name: stored_as for name, _ in module.named_parameters()}
    tensors = {}
    for name, tensor in module.state_dict().items():
        if name not in fixed:
            dtype = dtypes.get(name, tensor.dtype)
            tensors[name] = tensor.detach().cpu().to(dtype).contiguous()
    return tensors


def _count(module: torch.nn.Module) -> int:
    """Count the numbers that are saved of a module, without what says which heads were chosen."""
    of_heads = ("head_J2", "score_LH")
    tensors = saved_tensors(module)
    counts = [t.numel() for name, t in tensors.items() if name.split(".")[-1] not in of_heads]
    return sum(counts)


# ------------------------------------------------------------------------------------------ loading


def read_manifest(path: Path) -> dict[str, Any]:
    """Read the manifest and hash every file that it names. Raises :class:`CheckpointError`."""
    file = Path(path) / MANIFEST
    if not file.exists():
        raise CheckpointError(
            f"a checkpoint must hold manifest.json, {path} {'does not' if Path(path).is_dir() else 'is not there'}; "
            f"{_best_below(path) or 'name the directory that holds it'}"
        )
    try:
        manifest = json.loads(file.read_text())
        version, files = manifest["format_version"], dict(manifest["files"])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{file} must be the JSON that latentwire writes ({error}); {_best_below(path) or 'restore it'}"
        ) from error
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"format_version must be {FORMAT_VERSION}, got {version} ({file}); use the version that wrote it"
        )
    for name, expected in files.items():
        # A stranger's manifest may name "../…", or a link that leads out.
        part = (Path(path) / name).resolve()
        if not part.is_relative_to(Path(path).resolve()):
            raise CheckpointError(f"files must lie inside the checkpoint, got {name} ({file})")
        if not part.exists():
            raise CheckpointError(
                f"{path} must hold {name} as its manifest says, it is missing; copy the whole directory"
            )
        actual = sha256(part)
        if actual != expected:
            raise CheckpointError(
                f"{part} must hash to {expected[:12]}… as its manifest says, got {actual[:12]}…; "
                f"it was changed or cut off"
            )
    return manifest


def _best_below(path: Path) -> str:
    """Return the next move of whoever names a run's or sweep's directory instead of its export."""
    best = Path(path) / "best"
    return f"did you mean {best}?" if (best / MANIFEST).exists() else ""


def sizes(path: Path) -> dict[str, dict[str, int]]:
    """Measure the trained weights of a checkpoint or export.

    Returns ``encoder`` (with all that receivers share) and each receiver → ``parameters`` and
    ``bytes`` as stored. Weights of a backbone that is not trained are left out.
    """
    names = [receiver.name for receiver in read_run(path).receivers]
    totals = {name: {"parameters": 0, "bytes": 0} for name in ("encoder", *names)}
    for file in sorted(path.glob("*.safetensors")) + sorted(path.glob("*/*.safetensors")):
        if file.parent == path and file.name != ENCODER:
            continue  # the state of training, which is no part of the wire
        for name, tensor in load_file(file).items():
            # Parts for one receiver lie under its name, in a file of their own or right in a
            # feature's module.
            by_receiver = file.parent.name in ("adapters", "prefixes")
            words = [file.stem] if by_receiver else name.split(".")[1:2]
            part = words[0] if file.parent != path and words and words[0] in names else "encoder"
            totals[part]["parameters"] += tensor.numel()
            totals[part]["bytes"] += tensor.numel() * tensor.element_size()
    return totals


def read_run(path: Path) -> RunConfig:
    """Read the configuration that a checkpoint was made with.

    Models' directories that it names from its own place become absolute paths. Raises
    :class:`CheckpointError`.
    """
    file = Path(path) / "config.json"
    try:
        run = validate(RunConfig, json.loads(file.read_text()), str(file))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}/config.json must be readable JSON ({error})") from error

    def absolute(model: str) -> str:
        folder = (Path(path) / model).resolve()
        return str(folder) if model.startswith(".") and folder.exists() else model

    return with_models(run, absolute)


def check_models(path: Path, run: RunConfig) -> None:
    """Raise :class:`CheckpointError` where a model's directory in the configuration is missing."""
    for place, receiver in enumerate(run.receivers):
        if is_path(receiver.model) and not Path(receiver.model).exists():
            raise CheckpointError(
                f"receiver {receiver.name} of {path} must be in a directory of this machine, "
                f"{_sought(path, receiver.model)} is not there; say where its weights are: ask and export take "
                f"--receiver_at {receiver.name}=<directory or Hub id>, Python LatentWire.from_pretrained(…, "
                f"receivers={{'{receiver.name}': '<directory or Hub id>'}}), or --set receivers.{place}.model=<directory "
                f"or Hub id> where the command has it"
            )
    backbones = {"encoder.model": run.encoder.model} if run.encoder.model else {}
    senders = run.encoder.senders
    backbones |= {f"encoder.senders.{place}": model for place, model in enumerate(senders)}
    for knob, model in backbones.items():
        if is_path(model) and not Path(model).exists():
            raise CheckpointError(
                f"the encoder's backbone of {path} must be in a directory of this machine, "
                f"{_sought(path, model)} is not there; put its weights there, or --set "
                f"{knob}=<directory or Hub id>"
            )


def _sought(path: Path, model: str) -> Path:
    """Return where a model's directory was looked for: one that begins with a dot lies beside the wire."""
    return (Path(path) / model).resolve() if model.startswith(".") else Path(model)
