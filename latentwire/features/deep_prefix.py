"""Keys and values of the soft slots in every layer, computed from the latents (P-tuning v2, arXiv 2110.07602)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from latentwire.config import DeepPrefixFeature, RunConfig
from latentwire.features.base import Feature, Reading
from latentwire.features.slot_kv import SlotKeyValues
from latentwire.models.interlingua import ReceiverShape


class DeepPrefix(Feature):
    """An MLP per receiver from each latent to its slot's keys and values. Nothing more than the latents is sent."""

    def __init__(self, options: DeepPrefixFeature, run: RunConfig, receivers: Mapping[str, ReceiverShape]) -> None:
        super().__init__(options, run, receivers)
        d_z = run.encoder.d_z
        self.hidden = nn.ModuleDict(
            {name: nn.Sequential(nn.LayerNorm(d_z), nn.Linear(d_z, options.hidden), nn.GELU()) for name in receivers}
        )
        self.slots = nn.ModuleDict(
            {name: SlotKeyValues(shape.skeleton(), options.hidden, "deep_prefix") for name, shape in receivers.items()}
        )

    @contextmanager
    def attached(self, receiver: str, lm: Any, reading: Reading) -> Iterator[None]:
        """Adds to keys and values at the slots."""
        state_NM = self.hidden[receiver](reading.z_RLZ[reading.keep_RL])
        with lm.added_to_slots(self.slots[receiver](state_NM), reading.latents_RS):
            yield
