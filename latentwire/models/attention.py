"""Attention blocks for encoders and features."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

Rotary = tuple[torch.Tensor, torch.Tensor]
"""Cosines and sines of the positions (RoFormer, arXiv 2104.09864): ``[S, E/2]``, or ``[B, 1, S,
E/2]`` where rows differ."""


class Block(nn.Module):
    """Pre-norm bidirectional self-attention and MLP. ``[B, S, M]`` → the same shape."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp = mlp(width)

    def forward(self, x_BSM: torch.Tensor, keep_BS: torch.Tensor, rotary: Rotary) -> torch.Tensor:
        """Return ``[B, S, M]``.

        ``keep_BS``: positions that may be attended to; a row without any reads zeros.
        """
        query, key, value = (
            split(t, self.heads) for t in self.query_key_value(self.norm(x_BSM)).chunk(3, dim=-1)
        )
        query, key = rotate(query, rotary), rotate(key, rotary)
        read = F.scaled_dot_product_attention(query, key, value, attn_mask=keep_BS[:, None, None])
        x_BSM = x_BSM + self.out(merge(read))
        return x_BSM + self.mlp(x_BSM)

    def start_as_identity(self) -> Block:
        """Zero what the block adds, so that it begins as the identity and learns from there."""
        for layer in (self.out, self.mlp[-1]):
            nn.init.zeros_(layer.weight)  # type: ignore[arg-type]
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
        return self


def mlp(width: int) -> nn.Sequential:
    """Build a pre-norm MLP, four times as wide inside."""
    return nn.Sequential(
        nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
    )


def split(x_BSM: torch.Tensor, heads: int) -> torch.Tensor:
    """Split into heads: ``[B, S, M]`` → ``[B, H, S, M/H]``."""
    return x_BSM.unflatten(-1, (heads, -1)).transpose(1, 2)


def merge(x_BHSE: torch.Tensor) -> torch.Tensor:
    """Join heads: ``[B, H, S, E]`` → ``[B, S, H·E]``."""
    return x_BHSE.transpose(1, 2).flatten(2)


def rotary_of(positions: int, width: int, device: torch.device) -> Rotary:
    """Return rotary tables for positions 0, 1, …; ``width`` is one head's."""
    return rotary_at(torch.arange(positions, device=device), width)


def rotary_at(place: torch.Tensor, width: int) -> Rotary:
    """Return rotary tables for the positions ``place``.

    They are ``[S]``, or ``[B, S]`` for rows with positions of their own; ``width`` is one head's.
    """
    rate = 10_000.0 ** (-torch.arange(0, width, 2, device=place.device) / width)
    angle = place[..., None] * rate
    if place.dim() == 2:
        angle = angle[:, None]  # the same for all heads
    return angle.cos(), angle.sin()


def rotate(x_BHSE: torch.Tensor, rotary: Rotary) -> torch.Tensor:
    """Turn each pair of entries ``(x_i, x_{i+E/2})`` by its position's angle."""
    cos, sin = (t.to(x_BHSE.dtype) for t in rotary)
    first, second = x_BHSE.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1)
