"""Latents that are codes of single tokens, side by side."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from latentwire.config import EncoderConfig
from latentwire.models.attention import Block, rotary_of

PLACE_SCALE = 0.02
"""Size at which the vectors of the places in a latent begin."""


def square_map(width: int) -> nn.Linear:
    """Return a linear map of vectors of some width to as many numbers that gives zeros at first."""
    linear = nn.Linear(width, width, bias=False)
    nn.init.zeros_(linear.weight)
    return linear


class TokenCodes(nn.Module):
    """Token states → latents of R tokens each: K = Z/R numbers a token, side by side.

    A token's code is a linear map of its state, plus what blocks of attention over all tokens add;
    a square map, where it is asked for, then mixes the codes of one latent. Blocks and mixing add
    nothing at first, so that the linear map can be filled in closed form. The parts of tokens that
    are not there are exactly zero, by which a receiver knows.
    """

    def __init__(self, width: int, config: EncoderConfig, entries: int = 0) -> None:
        """Build one for states of ``width`` M.

        ``entries``: how many of a state's last numbers are keys and values, which the linear map
        alone reads. They are of any size, so it reads them with mean 0 and variance 1 over texts.
        """
        super().__init__()
        assert config.tokens_per_latent is not None, "EncoderConfig asks for it"
        self.tokens, size = config.tokens_per_latent, config.d_z // config.tokens_per_latent
        self.linear = nn.Linear(width, size)
        # What the blocks read.
        self.seen = width - entries
        self.mean_E: torch.Tensor
        self.spread_E: torch.Tensor
        if entries:
            self.register_buffer("mean_E", torch.zeros(entries))
            self.register_buffer("spread_E", torch.ones(entries))
        self.mix = square_map(config.d_z) if config.code_mixing else None
        inner, heads = config.code_width, config.heads
        self.blocks = nn.ModuleList(Block(inner, heads) for _ in range(config.code_blocks))
        self.head_width = config.code_width // config.heads
        if config.code_blocks:
            self.into = nn.Linear(self.seen, config.code_width, bias=False)
            places = torch.randn(self.tokens, config.code_width)
            self.where_RC = nn.Parameter(PLACE_SCALE * places)
            self.norm = nn.LayerNorm(config.code_width)
            self.out = nn.Linear(config.code_width, size, bias=False)
            nn.init.zeros_(self.out.weight)

    def forward(self, x_BTM: torch.Tensor, length_B: torch.Tensor) -> torch.Tensor:
        """Code ``[B, T, M]``, of which each row's first ``length_B`` are real, as ``[B, L, Z]``.

        L = ⌈T/R⌉; a row's latents after its own ⌈length/R⌉ are zero.
        """
        keep_BT = torch.arange(x_BTM.shape[1], device=x_BTM.device) < length_B[:, None]
        code_BTK = self.linear(self._standardised(x_BTM))
        if self.blocks:
            code_BTK = code_BTK + self._added(x_BTM[..., : self.seen], keep_BT)
        # [B, T, K] → [B, L, R, K] → [B, L, R·K]
        code_BLRK = self._parted(code_BTK.masked_fill(~keep_BT[..., None], 0))
        z_BLZ = code_BLRK.flatten(2)
        if self.mix is not None:
            z_BLZ = z_BLZ + self.mix(z_BLZ)
        # What is mixed reaches parts without a token, too.
        gone_BLR1 = ~self._parted(keep_BT[..., None])
        return z_BLZ.view_as(code_BLRK).masked_fill(gone_BLR1, 0).flatten(2)

    @torch.no_grad()
    def begin(
        self,
        encoder_MK: torch.Tensor,
        bias_K: torch.Tensor,
        mean_M: torch.Tensor,
        std_M: torch.Tensor,
    ) -> None:
        """Take over a linear map of states as they come, code = x @ encoder_MK + bias_K.

        ``mean_M``, ``std_M``: the states' own, over texts; no deviation is zero.
        """
        weight_KM = encoder_MK.T.clone()
        if self.entries:
            self.mean_E.copy_(mean_M[self.seen :])
            self.spread_E.copy_(std_M[self.seen :])
            # W y + b = (W s) (y − m) / s + (b + W m), with y the keys and values.
            part_KE = weight_KM[:, self.seen :]
            bias_K = bias_K + part_KE @ self.mean_E.to(part_KE)
            part_KE *= self.spread_E.to(part_KE)
        self.linear.weight.copy_(weight_KM)
        self.linear.bias.copy_(bias_K)

    @property
    def entries(self) -> int:
        """How many numbers of a state are keys and values."""
        return self.linear.in_features - self.seen

    @torch.no_grad()
    def raw_map(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what :meth:`begin` takes: encoder_MK and bias_K for states as they come."""
        weight_KM = self.linear.weight.clone()
        bias_K: torch.Tensor = self.linear.bias
        if self.entries:
            part_KE = weight_KM[:, self.seen :]
            part_KE /= self.spread_E
            bias_K = bias_K - part_KE @ self.mean_E
        return weight_KM.T, bias_K

    def _standardised(self, x_BTM: torch.Tensor) -> torch.Tensor:
        if not self.entries:
            return x_BTM
        entry_BTE = (x_BTM[..., self.seen :] - self.mean_E) / self.spread_E
        return torch.cat((x_BTM[..., : self.seen], entry_BTE), -1)

    def _added(self, x_BTM: torch.Tensor, keep_BT: torch.Tensor) -> torch.Tensor:
        """Return what the blocks add to each token's code, ``[B, T, K]``."""
        place_T = torch.arange(x_BTM.shape[1], device=x_BTM.device)
        # Token t stands at place t mod R of its latent.
        y_BTC = self.into(x_BTM) + self.where_RC[place_T % self.tokens]
        rotary = rotary_of(len(place_T), self.head_width, x_BTM.device)
        # A text without tokens reads one of padding.
        seen_BT = keep_BT | (place_T == 0)
        for block in self.blocks:
            y_BTC = block(y_BTC, seen_BT, rotary)
        return self.out(self.norm(y_BTC))

    def _parted(self, x_BTK: torch.Tensor) -> torch.Tensor:
        """Part tokens into latents, the last filled up with zeros: ``[B, L, R, K]``."""
        # −T mod R places are missing; F.pad takes pairs from the last dimension on.
        missing = -x_BTK.shape[1] % self.tokens
        return F.pad(x_BTK, (0, 0, 0, missing)).unflatten(1, (-1, self.tokens))
