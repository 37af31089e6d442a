"""Self-attention among the latents before the adapters; the identity at first."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from latentwire.config import RefinerFeature, RunConfig
from latentwire.features.base import Feature
from latentwire.message import Message
from latentwire.models.attention import Block, rotary_of
from latentwire.models.interlingua import ReceiverShape


class Refiner(Feature):
    """Transformer layers over all latents of a message, shared by the receivers."""

    def __init__(
        self, options: RefinerFeature, run: RunConfig, receivers: Mapping[str, ReceiverShape]
    ) -> None:
        super().__init__(options, run, receivers)
        self.head_width = run.encoder.d_z // options.heads
        blocks = [Block(run.encoder.d_z, options.heads) for _ in range(options.layers)]
        self.blocks = nn.ModuleList(block.start_as_identity() for block in blocks)

    def refine(self, message: Message) -> Message:
        """Return the message after the layers. Padding is not attended to; private latents are."""
        z_BLZ = message.z_BLZ
        place_L = torch.arange(z_BLZ.shape[1], device=z_BLZ.device)
        # Shared columns have padding, which differs from row to row; private ones have none.
        keep_BL = (place_L < message.length_B[:, None]) | (place_L >= message.shared)
        rotary = rotary_of(len(place_L), self.head_width, z_BLZ.device)
        for block in self.blocks:
            z_BLZ = block(z_BLZ, keep_BL, rotary)
        return message.with_latents(z_BLZ)
