"""Latents to the soft prompt of one receiver."""

from __future__ import annotations

import torch
from torch import nn

from latentwire.config import AdapterConfig


class Adapter(nn.Module):
    """2-layer MLP with a linear skip, then a learned gain.

    At initialisation the MLP's last layer is zero and the skip keeps unit RMS, so the prompt starts at the receiver's
    embedding RMS and the gain is free from there. Shapes: ``z_BLZ`` → ``p_BLD``.
    """

    def __init__(self, config: AdapterConfig, *, d_z: int, d_model: int, embed_rms: float) -> None:
        super().__init__()
        hidden = max(1, round(config.hidden_multiple * d_z))
        self.norm = nn.LayerNorm(d_z)
        self.skip = nn.Linear(d_z, d_model, bias=False)
        self.up = nn.Linear(d_z, hidden)
        self.down = nn.Linear(hidden, d_model)
        self.gain = nn.Parameter(torch.tensor(float(embed_rms)), requires_grad=config.learned_gain)
        nn.init.normal_(self.skip.weight, std=d_z**-0.5)
        nn.init.zeros_(self.down.weight)
        nn.init.zeros_(self.down.bias)

    def forward(self, z_BLZ: torch.Tensor) -> torch.Tensor:
        """``[B, L, d_z]`` → ``[B, L, D]``."""
        x_BLZ = self.norm(z_BLZ)
        return self.gain * (self.skip(x_BLZ) + self.down(nn.functional.gelu(self.up(x_BLZ))))
