"""Keys and values of the slots in every layer, from the latents (P-tuning v2, arXiv 2110.07602)."""

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
    """An MLP per receiver from each latent to its slot's keys and values.

    With ``head_parts`` it maps each part of a latent's entries to those of the part's own heads. A
    head compares a query with one key per slot: of two facts in one latent it can find one by its
    key, or both mixed, and nothing in the loss tells heads to choose differently; this does
    (docs/experiments/findings.md).
    """

    def __init__(
        self, options: DeepPrefixFeature, run: RunConfig, receivers: Mapping[str, ReceiverShape]
    ) -> None:
        super().__init__(options, run, receivers)
        self.parts = options.head_parts
        width = run.encoder.d_z // self.parts
        self.hidden, self.slots = nn.ModuleDict(), nn.ModuleDict()
        # One kind of part after the other: a seed draws the weights in this order.
        for name in receivers:
            project = nn.Linear(width, options.hidden)
            self.hidden[name] = nn.Sequential(nn.LayerNorm(width), project, nn.GELU())
        for name, shape in receivers.items():
            lm, hidden = shape.skeleton(), options.hidden
            self.slots[name] = SlotKeyValues(lm, hidden, "deep_prefix", self.parts)

    @contextmanager
    def attached(self, receiver: str, lm: Any, reading: Reading) -> Iterator[None]:
        """Add to keys and values at the slots."""
        # N real latents of all rows, each in P parts: [N, Z] → [N, P, Z/P] → [N, P, M].
        part_NPY = reading.z_RLZ[reading.keep_RL].unflatten(1, (self.parts, -1))
        state_NPM = self.hidden[receiver](part_NPY)
        with lm.added_to_slots(self.slots[receiver](state_NPM), reading.latents_RS):
            yield
