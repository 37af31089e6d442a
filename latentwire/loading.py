"""Put a saved wire's weights into a wire: keys, shapes and hashes are compared first.

``exports.py`` has the directory that they come from.
"""

from __future__ import annotations

from collections.abc import Container
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from latentwire.data import documents
from latentwire.exports import CheckpointError, parts, read_run, saved_tensors
from latentwire.models.interlingua import owner

if TYPE_CHECKING:  # as in exports
    from latentwire.wire_base import WireBase


def load_weights(path: Path, wire: WireBase, manifest: dict[str, Any]) -> None:
    """Put a checkpoint's encoder and adapters into ``wire``.

    ``manifest``: by :func:`read_manifest`, which has checked that the files are whole. Raises
    :class:`CheckpointError` for other shapes or keys, or receivers whose weights hash differently
    from those it was trained with.
    """
    path = Path(path)
    others = {receiver.name for receiver in read_run(path).receivers} - wire.receivers.keys()
    for name, module in parts(wire).items():
        if name not in manifest["files"]:
            raise CheckpointError(f"{path} must hold {name} for this configuration, it does not")
        fill(path / name, module, left_out=others)
    check_backbone(path, wire, manifest)
    wire.trained_on = documents.read(path, manifest)
    for name, expected in manifest["pins"].get("receivers", {}).items():
        if name not in wire.receivers:
            continue
        actual = wire.receivers[name].fingerprint()
        if actual != expected:
            raise CheckpointError(
                f"receiver {name} must hash to {expected[:12]}… as when the wire was trained, got "
                f"{actual[:12]}… ({wire.receivers[name].config.model}); load the same weights and "
                f"dtype"
            )


def check_backbone(path: Path, wire: WireBase, manifest: dict[str, Any]) -> None:
    """Raise :class:`CheckpointError` where a saved encoder was trained on states of other weights.

    Those are of a backbone that is not trained; the order of several senders counts, too.
    """
    backbone = wire.interlingua.encoder.backbone_fingerprint()
    if backbone == manifest["backbone"]:
        return
    encoder = wire.run.encoder
    models = ", ".join(encoder.senders or filter(None, [encoder.model])) or encoder.kind
    raise CheckpointError(
        f"the encoder of {path} reads by models that hash to {manifest['backbone']}, got {backbone} ({models}); load "
        f"the same weights in the same dtype, senders in the same order"
    )


def fill(file: Path, module: torch.nn.Module, left_out: Container[str] = ()) -> None:
    """Put a file's weights into a module.

    ``left_out``: receivers that only one of the two knows, whose part is passed over. Raises
    :class:`CheckpointError` where keys or shapes differ.
    """
    try:
        tensors = load_file(file)
    except SafetensorError as error:
        raise CheckpointError(
            f"{file} must be readable safetensors ({error}); restore it"
        ) from error
    tensors = {name: t for name, t in tensors.items() if owner(module, name) not in left_out}
    names = {name for name in saved_tensors(module) if owner(module, name) not in left_out}
    if differing := tensors.keys() ^ names:
        raise CheckpointError(
            f"{file} must fit the configuration, it differs in {', '.join(sorted(differing)[:5])}"
        )
    try:
        # Not strict: weights of a frozen backbone are in no file. Keys were compared above.
        module.load_state_dict(tensors, strict=False)
    except RuntimeError as error:
        # torch names every tensor of another shape on a line of its own, below its heading.
        fault = " ".join(next(iter(str(error).splitlines()[1:]), str(error)).split())
        raise CheckpointError(
            f"{file} must fit the configuration and its receivers, it does not "
            f"({fault.rstrip('.')}); name those that it was trained with"
        ) from error
