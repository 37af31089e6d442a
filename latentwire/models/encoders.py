"""Text to latents."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from latentwire.config import EncoderConfig
from latentwire.models.tokens import PAD_ID, VOCAB_SIZE, ByteTokenizer

BYTE_WIDTH = 32  # width of one byte's embedding; a patch joins several


class ByteEncoder(nn.Module):
    """From-scratch encoder over UTF-8 bytes.

    The bytes of a patch (a word, cut where it is long) are embedded side by side and joined into one state by an MLP,
    bidirectional attention with rotary positions (RoFormer, arXiv 2104.09864) relates the states, and ``latent_len``
    learned queries read them out. ``ids_BPE`` are :meth:`~latentwire.models.tokens.ByteTokenizer.patches`; the result
    is ``z_BLZ``.
    """

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        width = config.d_model
        self.tokenizer = ByteTokenizer()
        self.bytes_per_patch, self.head_width = config.bytes_per_patch, width // config.heads
        self.embed = nn.Embedding(VOCAB_SIZE, BYTE_WIDTH, padding_idx=PAD_ID)
        self.join = nn.Sequential(
            nn.Linear(config.bytes_per_patch * BYTE_WIDTH, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )
        self.blocks = nn.ModuleList(_Block(width, config.heads) for _ in range(config.layers))
        self.queries = SpanQueries(config.latent_len, width, config.heads)
        self.norm = nn.LayerNorm(width)
        self.project = nn.Linear(width, config.d_z)
        self.dropout = nn.Dropout(config.latent_dropout)

    def tokenize(self, texts: Sequence[str]) -> torch.Tensor:
        """The ids that :meth:`forward` takes."""
        return self.tokenizer.patches(texts, self.bytes_per_patch)

    def forward(self, ids_BPE: torch.Tensor) -> torch.Tensor:
        """``[B, P, bytes_per_patch]`` byte ids → ``[B, latent_len, d_z]``."""
        keep_BP = ids_BPE[:, :, 0] != PAD_ID
        count_B = keep_BP.sum(1).clamp(min=1)
        keep_BP = keep_BP | (torch.arange(ids_BPE.shape[1], device=ids_BPE.device) == 0)  # an empty text is one patch
        x_BPM = self.join(self.embed(ids_BPE).flatten(2))
        rotary = _rotary(torch.arange(x_BPM.shape[1], device=x_BPM.device), self.head_width)
        for block in self.blocks:
            x_BPM = block(x_BPM, keep_BP, rotary)
        return self.dropout(self.project(self.norm(self.queries(x_BPM, count_B, keep_BP))))


class SpanQueries(nn.Module):
    """Learned queries that start out reading evenly spaced spans.

    Attention to state s from query l carries a bias −sharpness·((s − centre_l) / span)², with one learned sharpness
    per head: at first each latent looks at its own stretch of text, whatever the text's length, and training is free
    to flatten the bias. Random queries must find that out before anything else is learned.
    """

    def __init__(self, count: int, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Parameter(torch.randn(count, width) * width**-0.5)
        self.norm = nn.LayerNorm(width)
        self.key_value = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)
        self.mlp = _mlp(width)
        self.sharpness = nn.Parameter(torch.linspace(0.2, 2.0, heads))

    def forward(self, x_BSM: torch.Tensor, count_B: torch.Tensor, keep_BS: torch.Tensor) -> torch.Tensor:
        batch, states, _ = x_BSM.shape
        latents = self.query.shape[0]
        key_BSM, value_BSM = self.key_value(self.norm(x_BSM)).chunk(2, dim=-1)
        span_B = count_B.to(x_BSM.dtype) / latents
        centre_BL = (torch.arange(latents, device=x_BSM.device) + 0.5)[None] * span_B[:, None] - 0.5
        distance_BLS = (torch.arange(states, device=x_BSM.device)[None, None] - centre_BL[..., None]) / span_B.clamp(
            min=1.0
        )[:, None, None]
        bias_BHLS = -self.sharpness[None, :, None, None] * distance_BLS[:, None].square()
        bias_BHLS = bias_BHLS.masked_fill(~keep_BS[:, None, None], float("-inf"))
        query_BLM = self.query[None].expand(batch, -1, -1)
        read_BHLE = F.scaled_dot_product_attention(
            _split(query_BLM, self.heads),
            _split(key_BSM, self.heads),
            _split(value_BSM, self.heads),
            attn_mask=bias_BHLS.to(x_BSM.dtype),
        )
        y_BLM = query_BLM + self.out(_merge(read_BHLE))
        return y_BLM + self.mlp(y_BLM)


class _Block(nn.Module):
    """Pre-norm bidirectional attention and MLP."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp = _mlp(width)

    def forward(
        self, x_BSM: torch.Tensor, keep_BS: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor]
    ) -> torch.Tensor:
        query, key, value = (_split(t, self.heads) for t in self.query_key_value(self.norm(x_BSM)).chunk(3, dim=-1))
        read = F.scaled_dot_product_attention(
            _rotate(query, rotary), _rotate(key, rotary), value, attn_mask=keep_BS[:, None, None]
        )
        x_BSM = x_BSM + self.out(_merge(read))
        return x_BSM + self.mlp(x_BSM)


def _mlp(width: int) -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))


def _split(x_BSM: torch.Tensor, heads: int) -> torch.Tensor:
    return x_BSM.unflatten(-1, (heads, -1)).transpose(1, 2)


def _merge(x_BHSE: torch.Tensor) -> torch.Tensor:
    return x_BHSE.transpose(1, 2).flatten(2)


def _rotary(position_S: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    rate = 10_000.0 ** (-torch.arange(0, width, 2, device=position_S.device) / width)
    angle_SE = position_S[:, None] * rate[None]
    return angle_SE.cos(), angle_SE.sin()


def _rotate(x_BHSE: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    cos, sin = (t.to(x_BHSE.dtype) for t in rotary)
    first, second = x_BHSE.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1)
