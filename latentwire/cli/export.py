"""``latentwire export``: a checkpoint's wire as a directory of its own, to be passed on."""

from __future__ import annotations

from pathlib import Path

from transformers.utils.logging import disable_progress_bar

from latentwire.model import LatentWire


def export(wire: str, output: Path, /, *, half: bool = False) -> int:
    """Write a wire as an export: weights, configuration, manifest and model card, nothing to train on from.

    Args:
        wire: Directory of a checkpoint or export, Hub id, or name of a wire that is shipped.
        output: Directory to write, empty or not there yet.
        half: Round the trained weights to bfloat16 and store them so. The encoder is another one then, with an id of its
            own, and has no scores until it is evaluated.
    """
    disable_progress_bar()  # of weights that take a moment to load
    loaded = LatentWire.from_pretrained(wire)
    if half:
        loaded.halve()
    loaded.save_pretrained(output)
    size = sum(file.stat().st_size for file in output.rglob("*") if file.is_file())
    print(f"export: {output}, {size / 1e6:.1f} MB, encoder {loaded.encoder_id}")
    return 0
