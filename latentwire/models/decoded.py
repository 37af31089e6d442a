"""Decoded answers. Light: a trial that asks a replica imports this, and no model."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Decoded:
    """A batch of decoded answers, and the time that they took."""

    rows: list[list[int]]
    """Token ids, up to and without the stop token."""
    prefill_ms: float
    """Milliseconds to the first token; for a wire, from its message or the text's token ids."""
    decode_ms: float
    """Milliseconds from the first token to the end."""
