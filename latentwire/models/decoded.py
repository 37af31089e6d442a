"""What a receiver said. Light: whoever asks one elsewhere imports this, and no model."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Decoded:
    """What a receiver said, and how long it took over the whole batch."""

    rows: list[list[int]]
    """Token ids, up to and without the stop token."""
    prefill_ms: float
    """From the prompt to the first token; for a wire, from its message or the text's token ids."""
    decode_ms: float
    """From there to the end."""
