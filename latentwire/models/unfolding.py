"""The adapter of retrieval heads: latents → a key and a value for each token, in chosen heads."""

from __future__ import annotations

import math

import torch
from torch import nn

from latentwire.config import AdapterConfig
from latentwire.models.attention import Block, rotary_of
from latentwire.models.head_slots import Heads, chosen, none_chosen
from latentwire.models.key_heads import heads_within
from latentwire.models.token_codes import square_map
from latentwire.pretrained.weights import ReceiverError
from latentwire.prompts.sequences import CONTROLS


def text_stride(share: float) -> int:
    """Return of how many tokens cut text gets one, where a message takes a share of the cache."""
    # 1e-9 makes up for shares that are rounded: 1 / (1 / 93) is a little less than 93.
    return max(1, math.floor(1 / share + 1e-9))


class Unfolding(nn.Module):
    """A map from each latent's R codes to keys (before rotary positions) and values of J heads.

    A linear map, which a closed form can begin (:mod:`latentwire.closed_form`), and beside it blocks
    of attention over the message's tokens, whose output begins at zero. A code that is exactly zero
    stands for no token. ``head_J2`` holds the chosen heads as (layer, head) and ``score_LH`` the scores
    by which they were chosen; both are saved with the weights. ``control_CD`` holds the receiver's learned
    control embeddings.
    """

    def __init__(
        self,
        config: AdapterConfig,
        *,
        d_z: int,
        tokens: int,
        mixed: bool,
        attention_heads: int,
        shape: tuple[int, int, int],
        width: int,
        embed_rms: float,
    ) -> None:
        """Build one whose heads are not chosen yet.

        Args:
            config: the adapter's.
            d_z: width of a latent.
            tokens: R, codes in a latent.
            mixed: whether the sender mixes the codes of a latent.
            attention_heads: heads of the blocks.
            shape: the receiver's layers, key-value heads of each, and width of a head.
            width: D, of its embeddings.
            embed_rms: root mean square of those.

        Raises:
            ReceiverError: the share is less than one head.
        """
        super().__init__()
        layers, heads, self.head_width = shape
        self.share = share = config.share_at(tokens)
        self.all_heads = layers * heads
        count = heads_within(share, shape)
        if count < 1:
            raise ReceiverError(
                f"adapter.cache_share must be one of a receiver's {self.all_heads} key-value heads or more, got "
                f"{share:g}; set it to {1 / self.all_heads:.3g} at least"
            )
        self.tokens, self.codes = tokens, d_z // tokens
        self.kind = config.kind
        self.head_J2: torch.Tensor
        self.register_buffer("head_J2", none_chosen(count))
        self.score_LH: torch.Tensor
        self.register_buffer("score_LH", torch.zeros(layers, heads))
        # A key and a value in each chosen head.
        entries = count * 2 * self.head_width
        self.linear = nn.Linear(self.codes, entries)
        self.unmix = square_map(d_z) if mixed else None
        inner, blocks = config.unfold_width, config.unfold_blocks
        self.inner_head_width = inner // attention_heads
        self.blocks = nn.ModuleList(Block(inner, attention_heads) for _ in range(blocks))
        if blocks:
            self.into = nn.Linear(d_z, tokens * inner, bias=False)
            self.place_RI = nn.Parameter(torch.randn(tokens, inner) * 0.02)
            self.norm = nn.LayerNorm(inner)
            self.out = nn.Linear(inner, entries, bias=False)
            nn.init.zeros_(self.out.weight)
        self.control_CD = nn.Parameter(torch.randn(len(CONTROLS), width) * embed_rms)

    @property
    def heads(self) -> Heads:
        """The chosen heads. Raises :class:`ReceiverError` where none are chosen."""
        return chosen(self.head_J2)

    def choose(self, heads: Heads, score_LH: torch.Tensor) -> None:
        """Take the chosen heads, as many as the share of the cache allows, and all heads' scores."""
        self.head_J2.copy_(torch.tensor(heads))
        self.score_LH.copy_(score_LH)

    def budget(self, tokens: int) -> int:
        """Return the positions in all heads that have as many entries as tokens in the chosen ones.

        By the share that was asked for, of which the chosen heads may take less.
        """
        return max(1, math.ceil(tokens * self.share - 1e-9))

    def text_budget(self, tokens: int) -> int:
        """Return the positions that cut text gets: no fewer than the message, one of a whole number."""
        # −(−n // s) = ⌈n / s⌉
        return max(1, -(-tokens // text_stride(self.share)))

    def tokens_of(self, z_BLZ: torch.Tensor, keep_BL: torch.Tensor) -> torch.Tensor:
        """Mark the codes that stand for a token ``[B, L · R]``: all up to the last that is not zero.

        A code between others can be rounded to zero in a packet of few bits, and stands for a token
        all the same.
        """
        # [B, L, R · K] → [B, L · R, K]; each latent's mark once for every code of it.
        code_BTK = z_BLZ.detach().unflatten(2, (self.tokens, self.codes)).flatten(1, 2)
        filled_BT = (code_BTK != 0).any(-1) & keep_BL.repeat_interleave(self.tokens, 1)
        # The running maximum from the end on: True up to the last True.
        return filled_BT.flip(1).cummax(1).values.flip(1)

    def forward(
        self, z_BLZ: torch.Tensor, keep_BL: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Map ``[B, L, Z]`` to entries ``[B, L · R, E]``, and mark the tokens among them.

        Entries of a token are, for each head, its key and its value side by side. ``keep_BL`` marks
        real latents.
        """
        keep_BT = self.tokens_of(z_BLZ, keep_BL)
        # What was mixed on the sender's side is undone, then parted: [B, L, R · K] → [B, L · R, K].
        parted_BLZ = z_BLZ if self.unmix is None else z_BLZ + self.unmix(z_BLZ)
        code_BTK = parted_BLZ.unflatten(2, (self.tokens, self.codes)).flatten(1, 2)
        entry_BTE = self.linear(code_BTK)
        if len(self.blocks):
            inner = len(self.norm.weight)
            x_BLRI = self.into(z_BLZ).unflatten(2, (self.tokens, inner)) + self.place_RI
            x_BTI = x_BLRI.flatten(1, 2)
            rotary = rotary_of(x_BTI.shape[1], self.inner_head_width, x_BTI.device)
            for block in self.blocks:
                x_BTI = block(x_BTI, keep_BT, rotary)
            entry_BTE = entry_BTE + self.out(self.norm(x_BTI))
        return entry_BTE, keep_BT

    def rows(
        self, z_BLZ: torch.Tensor, keep_BL: torch.Tensor, message_M: torch.Tensor
    ) -> torch.Tensor:
        """Return the entries ``[N, E]`` of some messages, one by one."""
        # [B, T, E] → [M, T, E] → [N, E]: message by message, real tokens alone.
        entry_BTE, keep_BT = self(z_BLZ, keep_BL)
        return entry_BTE[message_M][keep_BT[message_M]]
