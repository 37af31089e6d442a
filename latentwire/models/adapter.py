"""The adapter: latents → soft prompt of one receiver."""

from __future__ import annotations

import torch
from torch import nn

from latentwire.config import AdapterConfig
from latentwire.prompts.sequences import CONTROLS


class Adapter(nn.Module):
    """2-layer MLP with a linear skip, then the scale that ``calibration`` says.

    At initialisation the MLP's last layer is zero and the skip keeps unit RMS, so a calibrated
    prompt starts at the receiver's embedding RMS. ``control_CD`` holds the receiver's learned
    control embeddings, one for each of :data:`CONTROLS`.
    """

    def __init__(
        self,
        config: AdapterConfig,
        *,
        d_z: int,
        d_model: int,
        embed_rms: float,
        slots: int | None = None,
    ) -> None:
        """Build one for latents of width ``d_z`` and a receiver of width ``d_model``.

        ``slots``: positions of the soft prompt, for ``slot_positions``; ``None`` where they vary.
        """
        super().__init__()
        hidden = max(1, round(config.hidden_multiple * d_z))
        self.calibration, self.embed_rms = config.calibration, float(embed_rms)
        self.norm = nn.LayerNorm(d_z)
        self.skip = nn.Linear(d_z, d_model, bias=False)
        self.up = nn.Linear(d_z, hidden)
        self.down = nn.Linear(hidden, d_model)
        if config.calibration == "learned":
            self.gain = nn.Parameter(torch.tensor(self.embed_rms))
        if config.slot_positions:
            self.position_LD = nn.Parameter(torch.zeros(slots or 0, d_model))
        self.control_CD = nn.Parameter(torch.randn(len(CONTROLS), d_model) * self.embed_rms)
        nn.init.normal_(self.skip.weight, std=d_z**-0.5)
        nn.init.zeros_(self.down.weight)
        nn.init.zeros_(self.down.bias)

    def forward(self, z_BLZ: torch.Tensor, keep_BL: torch.Tensor | None = None) -> torch.Tensor:
        """Map ``[B, L, Z]`` to ``[B, L, D]``; ``keep_BL`` marks real latents (``None``: all)."""
        x_BLZ = self.norm(z_BLZ)
        p_BLD = self.skip(x_BLZ) + self.down(nn.functional.gelu(self.up(x_BLZ)))
        if hasattr(self, "position_LD"):
            p_BLD = p_BLD + self.position_LD
        if self.calibration == "learned":
            return self.gain * p_BLD
        if self.calibration == "none":
            return p_BLD
        keep_BL1 = (
            torch.ones_like(p_BLD[..., :1])
            if keep_BL is None
            else keep_BL[..., None].to(p_BLD.dtype)
        )
        mean_B = (p_BLD.square().mean(-1, keepdim=True) * keep_BL1).sum(1) / keep_BL1.sum(1)
        return p_BLD * (self.embed_rms * mean_B.clamp(min=1e-12).rsqrt())[:, None]
