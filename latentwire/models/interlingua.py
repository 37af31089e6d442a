"""Everything that is trained: one encoder and an adapter per receiver."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from latentwire.config import RunConfig
from latentwire.models.adapter import Adapter
from latentwire.models.encoders import ByteEncoder


class Interlingua(nn.Module):
    """The trainable wire: text → ``z_BLZ`` → ``p_BLD`` for each receiver."""

    def __init__(self, run: RunConfig, receivers: Mapping[str, tuple[int, float]]) -> None:
        """``receivers``: name → (width D, embedding RMS). Weights are drawn from torch's global generator."""
        super().__init__()
        self.encoder = ByteEncoder(run.encoder)
        self.adapters = nn.ModuleDict(
            {
                name: Adapter(run.adapter, d_z=run.encoder.d_z, d_model=width, embed_rms=rms)
                for name, (width, rms) in receivers.items()
            }
        )

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.encoder.parameters()).device

    def encode(self, texts: Sequence[str]) -> torch.Tensor:
        """Sender texts → latents ``[B, L, d_z]``. One message serves every receiver."""
        return self.encoder(self.encoder.tokenize(texts).to(self.device))

    def prompt(self, receiver: str, z_BLZ: torch.Tensor) -> torch.Tensor:
        """Latents → soft prompt ``[B, L, D]`` of one receiver."""
        return self.adapters[receiver](z_BLZ)
