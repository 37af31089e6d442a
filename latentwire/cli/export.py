"""``latentwire export``: a checkpoint's wire as a directory of its own, to be passed on."""

from __future__ import annotations

from pathlib import Path

from transformers.utils.logging import disable_progress_bar

from latentwire import exports
from latentwire.cli.flags import ReceiverAt, receiver_places
from latentwire.config import DataConfig
from latentwire.config.resolve import with_values
from latentwire.model import LatentWire

ANYWHERE = {
    "data.data_dir": None,
    "data.shard_dir": DataConfig().shard_dir,
    "training.init_from": None,
    # It needs init_from, which is named no more.
    "training.train_only": (),
}
"""Knobs that say where things lay on the machine that trained, and what they are elsewhere."""


def export(
    wire: str,
    output: Path,
    /,
    *,
    half: bool = False,
    receiver_at: ReceiverAt = [],  # noqa: B006  (never changed)
) -> int:
    """Write a wire as an export: weights, configuration, manifest and model card, nothing to train on from.

    Args:
        wire: Directory of a checkpoint or export, Hub id, or name of a wire that is shipped.
        output: Directory to write, empty or not there yet.
        half: Round the trained weights to bfloat16 and store them so. The encoder is another one then, with an id of its
            own, and has no scores until it is evaluated.
    """
    exports.check_free(output)
    # Of weights that take a moment to load.
    disable_progress_bar()
    loaded = LatentWire.from_pretrained(wire, receiver_at=receiver_places(receiver_at))
    loaded.run = with_values(loaded.run, ANYWHERE)
    if half:
        loaded.halve()
    loaded.save_pretrained(output)
    size = sum(file.stat().st_size for file in output.rglob("*") if file.is_file())
    print(f"export: {output}, {size / 1e6:.1f} MB, encoder {loaded.encoder_id}")
    return 0
