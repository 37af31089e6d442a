"""The adapter: latents → soft prompt of one receiver."""

from __future__ import annotations

import torch
from torch import nn

from latentwire.config import AdapterConfig
from latentwire.pretrained.weights import ReceiverError
from latentwire.prompts.sequences import CONTROLS


class Adapter(nn.Module):
    """2-layer MLP with a linear skip, then the scale that ``calibration`` says.

    At initialisation the MLP's last layer is zero and the skip keeps unit RMS, so a calibrated
    prompt starts at the receiver's embedding RMS. ``control_CD`` holds the receiver's learned
    control embeddings, one for each of :data:`CONTROLS`. Kinds other than ``mlp`` leave parts out:
    ``linear`` the MLP, ``none`` the skip too, and ``keys_values`` the prompt itself, which is zero.
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
        Raises :class:`~latentwire.pretrained.weights.ReceiverError` for latents that are to be a prompt
        and have another width than the receiver.
        """
        super().__init__()
        hidden = max(1, round(config.hidden_multiple * d_z))
        self.kind, self.width = config.kind, d_model
        self.calibration, self.embed_rms = config.calibration, float(embed_rms)
        if config.kind == "none" and d_z != d_model:
            raise ReceiverError(
                f"adapter.kind none needs encoder.d_z as wide as the receiver's embeddings, {d_model}, got {d_z}; set it "
                f"to that, or adapter.kind linear"
            )
        if config.kind in ("mlp", "linear"):
            self.norm = nn.LayerNorm(d_z)
            self.skip = nn.Linear(d_z, d_model, bias=False)
        if config.kind == "mlp":
            self.up = nn.Linear(d_z, hidden)
            self.down = nn.Linear(hidden, d_model)
        if config.calibration == "learned" and config.kind != "keys_values":
            self.gain = nn.Parameter(torch.tensor(self.embed_rms))
        if config.slot_positions:
            self.position_LD = nn.Parameter(torch.zeros(slots or 0, d_model))
        self.control_CD = nn.Parameter(torch.randn(len(CONTROLS), d_model) * self.embed_rms)
        if config.kind in ("mlp", "linear"):
            # A sum of d_z entries of RMS 1, each times a weight of variance 1 / d_z, has RMS 1.
            nn.init.normal_(self.skip.weight, std=d_z**-0.5)
        if config.kind == "mlp":
            nn.init.zeros_(self.down.weight)
            nn.init.zeros_(self.down.bias)

    def forward(self, z_BLZ: torch.Tensor, keep_BL: torch.Tensor | None = None) -> torch.Tensor:
        """Map ``[B, L, Z]`` to ``[B, L, D]``; ``keep_BL`` marks real latents (``None``: all)."""
        if self.kind == "keys_values":
            return z_BLZ.new_zeros(*z_BLZ.shape[:2], self.width)
        p_BLD = self._mapped(z_BLZ)
        if hasattr(self, "position_LD"):
            p_BLD = p_BLD + self.position_LD
        if self.calibration == "learned":
            return self.gain * p_BLD
        if self.calibration == "none":
            return p_BLD
        keep_BL1 = torch.ones_like(p_BLD[..., :1])
        if keep_BL is not None:
            keep_BL1 = keep_BL[..., None].to(p_BLD.dtype)
        # Mean square of a row's real vectors [B, 1], whose root is brought to the embeddings' RMS.
        mean_B = (p_BLD.square().mean(-1, keepdim=True) * keep_BL1).sum(1) / keep_BL1.sum(1)
        return p_BLD * (self.embed_rms * mean_B.clamp(min=1e-12).rsqrt())[:, None]

    def _mapped(self, z_BLZ: torch.Tensor) -> torch.Tensor:
        if self.kind == "none":
            return z_BLZ
        x_BLZ = self.norm(z_BLZ)
        if self.kind == "linear":
            return self.skip(x_BLZ)
        return self.skip(x_BLZ) + self.down(nn.functional.gelu(self.up(x_BLZ)))
