"""The wire in one object: built, loaded and saved here, with what it sends and answers."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelHubMixin, snapshot_download
from huggingface_hub.errors import HFValidationError

from latentwire import exports, loading
from latentwire.config import RunConfig
from latentwire.messaging import Messaging
from latentwire.model_addresses import by_name, choose_receivers, with_places
from latentwire.pretrained.weights import fingerprint
from latentwire.receivers.base import Receiver

WIRES = Path(__file__).parents[1] / "wires"
"""Wires that come with a checkout of the project; an installed package has none."""


class LatentWire(Messaging, ModelHubMixin, library_name="latentwire"):
    """Text → one message → answers from every receiver.

    ``interlingua`` (encoder and adapters) is trained; ``receivers`` are frozen. Build one from a
    configuration, or load an export with :meth:`from_pretrained`; :meth:`save_pretrained` and
    :meth:`push_to_hub` write one.
    """

    manifest: dict[str, Any] | None = None
    """Manifest of a loaded export: metrics, hashes, versions."""
    reports: Mapping[str, dict[str, Any]] = {}
    """Reports of a text reader's training, by receiver."""

    def __init__(self, run: RunConfig, receivers: Mapping[str, Receiver] | None = None) -> None:
        """Load the receivers and draw fresh trainable weights from ``run.training.seed``.

        ``receivers``: those of the run, by name, where they are held elsewhere. Raises
        :class:`~latentwire.pretrained.weights.ReceiverError` or
        :class:`~latentwire.prompts.sequences.PromptError`.
        """
        super().__init__(run, receivers)
        # Names models' directories in an export.
        self._address: Callable[[str], str] | None = None
        self._stored_as: torch.dtype | None = None
        self._loaded = ""  # hash of the weights that came with the manifest

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        revision: str | None = None,
        receivers: str | Sequence[str] | Mapping[str, str | Path] | None = None,
        receiver_at: Mapping[str, str | Path] | None = None,
        trust_remote_code: bool = False,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
    ) -> LatentWire:
        """Load the wire of an export or checkpoint: a directory, or a Hub id with its ``revision``.

        ``~`` is the user's home.
        The name of a wire that comes with a checkout of the project (``wires/``) does as well.
        ``receivers``: names of those to load (``None``: all), or name → Hub id or directory of the
        same weights where they lie elsewhere than when the wire was trained. ``receiver_at``: the same
        of some, while all others stay as they are. ``trust_remote_code``:
        whether receivers may run code that comes with their weights where the export asks for it; a
        stranger's export could. Raises :class:`~latentwire.exports.CheckpointError` for a place
        that holds no wire, or one that its manifest does not fit,
        :class:`~latentwire.config.resolve.ConfigError` and
        :class:`~latentwire.pretrained.weights.ReceiverError`.
        """
        here = os.path.expanduser(pretrained_model_name_or_path)
        # A directory goes before a wire of the checkout, and that before a Hub id.
        path = shipped(pretrained_model_name_or_path) or Path(here)
        if not path.is_dir():
            try:
                path = Path(
                    snapshot_download(
                        str(pretrained_model_name_or_path),
                        revision=revision,
                        token=token,
                        cache_dir=cache_dir,
                        local_files_only=local_files_only,
                        force_download=force_download,
                        allow_patterns=exports.FILES,
                    )
                )
            except HFValidationError as error:  # no Hub id, so a path was meant
                raise exports.CheckpointError(
                    f"a wire must be a directory or a Hub id, got {pretrained_model_name_or_path}, "
                    f"which is not there; name a run's or sweep's best/, which it writes at its end"
                ) from error
            except (OSError, ValueError) as error:
                raise exports.CheckpointError(
                    f"a wire must be a directory or a Hub id, got {pretrained_model_name_or_path} "
                    f"({str(error).strip().splitlines()[0]}); name its best/ directory, or log in "
                    f"with `hf auth login`"
                ) from error
        manifest = exports.read_manifest(path)
        run = exports.read_run(path)
        if receiver_at:
            run = with_places(run, receiver_at)
        run = choose_receivers(run, receivers)
        with_code = [receiver.name for receiver in run.receivers if receiver.trust_remote_code]
        if with_code and not trust_remote_code:
            raise exports.CheckpointError(
                f"{path} lets {', '.join(with_code)} run code that comes with their weights; read "
                f"that code, then say trust_remote_code=True"
            )
        wire, _ = load_wire(path, run, manifest)
        wire.manifest = manifest
        # Compared when it is saved: metrics belong to these weights alone.
        wire._loaded = fingerprint(wire.interlingua)
        return wire

    @torch.no_grad()
    def halve(self) -> None:
        """Round the trained weights to bfloat16, and let exports store them so: half the bytes.

        The encoder's id changes with its weights: packets of the encoder as it was are refused.
        """
        for parameter in self.interlingua.parameters():
            if parameter.requires_grad:  # senders may be the receivers' own weights
                parameter.copy_(parameter.to(torch.bfloat16))
        self._stored_as = torch.bfloat16

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> str | None:
        """Write an export with its model card to an empty directory.

        ``push_to_hub=True`` sends it to the Hub too. Metrics are those of the export it was loaded
        from, as long as its weights are. Raises :class:`~latentwire.exports.CheckpointError`.
        """
        path = Path(save_directory)
        with exports.written_at(path):
            exports.check_free(path)  # the mixin removes a config.json that is there
            path.mkdir(parents=True, exist_ok=True)
        return super().save_pretrained(save_directory, **options)

    def _save_pretrained(self, save_directory: Path) -> None:
        known = self.manifest or {"metrics": {}, "pins": {}}
        provenance = known["pins"] | {"receivers": self.fingerprints()}
        # Weights that have changed since they were loaded have no metrics.
        unchanged = fingerprint(self.interlingua) == self._loaded
        metrics = known["metrics"] if unchanged else {}
        with exports.written_at(save_directory):
            exports.save(
                save_directory,
                self,
                metrics,
                provenance,
                address=self._address,
                stored_as=self._stored_as,
            )

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Upload an export with its model card to the Hub; return the commit's address.

        Receivers from directories are named by their last name alone: who loads it says where
        theirs are.
        """
        # The mixin calls _save_pretrained without a word on where the export will go.
        self._address = by_name
        try:
            return super().push_to_hub(repo_id, **options)
        finally:
            self._address = None


def shipped(name: str | Path) -> Path | None:
    """Return the directory of a wire that comes with the project's checkout, by its name; else None.

    A directory of that name where the process works goes before it.
    """
    path = WIRES / name
    is_name = Path(name).name == str(name) and not Path(name).is_dir()
    return path if is_name and (path / exports.MANIFEST).exists() else None


def load_wire(
    path: Path, run: RunConfig | None = None, manifest: dict[str, Any] | None = None
) -> tuple[LatentWire, dict[str, Any]]:
    """Load a wire and its receivers from a checkpoint or export; returns it with its manifest.

    ``run`` replaces the configuration it was saved with. ``manifest``: by
    :func:`latentwire.exports.read_manifest`, where the caller has read it: reading it hashes every
    file.
    """
    manifest = exports.read_manifest(path) if manifest is None else manifest
    run = run or exports.read_run(path)
    exports.check_models(path, run)
    wire = LatentWire(run)
    loading.load_weights(path, wire, manifest)
    return wire, manifest
