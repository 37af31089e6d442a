"""Decoded answers. Light: a trial that asks a replica imports this, and no model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from latentwire.errors import UserError


@dataclass(frozen=True)
class Decoded:
    """A batch of decoded answers, and the time that they took."""

    rows: list[list[int]]
    """Token ids, up to and without the stop token."""
    prefill_ms: float
    """Milliseconds to the first token; for a wire, from its message or the text's token ids."""
    decode_ms: float
    """Milliseconds from the first token to the end."""


class SamplingError(UserError, ValueError):
    """A way of drawing tokens that draws none."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn, in place of taking the likeliest one."""

    temperature: float = 1.0
    """Divides the logits; above 0."""
    top_p: float = 1.0
    """Tokens are drawn from the likeliest ones that have this probability together."""
    top_k: int | None = None
    """And from so many of them at most."""
    seed: int = 0
    """The same seed gives the same answers to the same questions, on the same machine."""

    def __post_init__(self) -> None:
        """Raise :class:`SamplingError` for what draws nothing."""
        if not self.temperature > 0 or not 0 < self.top_p <= 1:
            raise SamplingError(
                f"sampling needs temperature > 0 and top_p in (0, 1], got {self.temperature} and "
                f"{self.top_p}; for the likeliest tokens leave sampling out"
            )
        if self.top_k is not None and self.top_k < 1:
            raise SamplingError(
                f"top_k must be at least 1, got {self.top_k}; leave it out for all tokens"
            )
        # What torch's generators take.
        if not isinstance(self.seed, int) or not -(2**63) <= self.seed < 2**64:
            raise SamplingError(
                f"seed must be a whole number from -2**63 to 2**64 - 1, got {self.seed}; choose one"
            )


Watch = Callable[[list[int]], object]
"""Called with each step's tokens, one for each row."""
