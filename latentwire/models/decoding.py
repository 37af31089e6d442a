"""How answers are decoded: transformers' settings, the seed, the times and the end."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from latentwire.models.decoded import Decoded, Sampling, Watch

if TYPE_CHECKING:  # at run time where a model is loaded: see pretrained/weights.py
    from transformers import GenerationConfig


def decoding_settings(
    stop_ids: Sequence[int], max_new_tokens: int, sampling: Sampling | None
) -> GenerationConfig:
    """Return transformers' settings for answers that end with one of ``stop_ids``.

    ``sampling``: how tokens are drawn; ``None``: the likeliest.
    """
    from transformers import GenerationConfig

    drawn: dict[str, Any] = {"do_sample": False}
    if sampling is not None:
        drawn = {"do_sample": True, "temperature": sampling.temperature}
        # transformers takes a top_k of 0 for all tokens.
        drawn |= {"top_p": sampling.top_p, "top_k": sampling.top_k or 0}
    # Rows that have ended go on with a stop token, at the first of which they are cut.
    return GenerationConfig(
        **drawn,
        max_new_tokens=max_new_tokens,
        eos_token_id=list(stop_ids),
        pad_token_id=stop_ids[0],
    )


@contextmanager
def seeded(device: torch.device, sampling: Sampling | None) -> Iterator[None]:
    """Draw tokens by the seed of ``sampling``; the generators go on afterwards as if it had not."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices, enabled=sampling is not None):
        if sampling is not None:
            torch.manual_seed(sampling.seed)
        yield


class Stopwatch:
    """A streamer for transformers that notes the times of the prompt and of each step's tokens."""

    def __init__(self, watch: Watch | None = None) -> None:
        """Start the clock; ``watch`` is told each step's tokens."""
        self.times = [time.perf_counter()]
        self.watch = watch

    def put(self, value: torch.Tensor) -> None:
        """Note the time; transformers calls it with the prompt, and after each step."""
        self.times.append(time.perf_counter())
        # The times are the beginning, the prompt, and then each step's.
        if self.watch is not None and len(self.times) > 2:
            self.watch(value.tolist())

    def end(self) -> None:
        """Do nothing; transformers calls it once at the end."""

    def decoded(self, output_BK: torch.Tensor, stop_ids: Sequence[int]) -> Decoded:
        """Return the answers of the tokens that were decoded, with the times they took."""
        rows = [_until(row, stop_ids) for row in output_BK.tolist()]
        start, _, first, *_ = self.times
        return Decoded(rows, 1000 * (first - start), 1000 * (self.times[-1] - first))


def _until(ids: list[int], stops: Sequence[int]) -> list[int]:
    """Return the ids before the first of ``stops``."""
    for place, token in enumerate(ids):
        if token in stops:
            return ids[:place]
    return ids
