"""Attention, and blocks of it for encoders and features."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

Rotary = tuple[torch.Tensor, torch.Tensor]
"""Cosines and sines of the positions (RoFormer, arXiv 2104.09864): ``[S, E/2]``, or ``[B, 1, S,
E/2]`` where rows differ."""

KEPT_SCORES = 2**23
"""Most scores of one call that :func:`attend` keeps for a backward pass: 50 MB."""


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    """Return sums of values, weighted by scaled products of queries and keys (arXiv 1706.03762).

    By torch's fused kernel, or by two products and a softmax where its backward pass is slow
    (:func:`slow_backward`).

    Args:
        query: ``[B, H, N, E]``.
        key: ``[B, K, S, E]``; each of its heads serves H/K heads of queries (arXiv 2305.13245).
        value: as the keys.
        mask: True where a query sees a key, or numbers that are added to the scores; of 4
            dimensions, which may be 1. A query that sees no key reads zeros.
        scale: of the products. None: 1/√E.

    Returns:
        ``[B, H, N, E]``.
    """
    groups = query.shape[1] // key.shape[1]
    if slow_backward(query, key, value):
        return _by_products(query, key, value, mask, scale)
    if groups > 1:
        # [B, K, S, E] → [B, H, S, E]: each head of keys, once for every head of queries it serves.
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)


def slow_backward(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    """Return whether the fused kernel's gradients would take longer than those of products.

    On CPUs in bfloat16 (torch 2.13; ``python -m benchmarks --only attention``). What products keep
    grows with N · S, so long texts stay with the kernel.
    """
    if query.device.type != "cpu" or not torch.is_grad_enabled():
        return False
    if query.dtype != torch.bfloat16 and not torch.is_autocast_enabled("cpu"):
        return False
    if not (query.requires_grad or key.requires_grad or value.requires_grad):
        return False
    # There are B · H · N · S scores.
    return query.shape[:-1].numel() * key.shape[2] <= KEPT_SCORES


def _by_products(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float | None,
) -> torch.Tensor:
    heads, queries, width = key.shape[1], query.shape[2], query.shape[3]
    scale = width**-0.5 if scale is None else scale
    # Queries that share a key's head stand one after the other, for one product: [B, K, G·N, E].
    grouped = (query * scale).unflatten(1, (heads, -1)).flatten(2, 3)
    score_BKGNS = (grouped @ key.transpose(2, 3)).float().unflatten(2, (-1, queries))
    blind = None
    if mask is not None:
        # [B, 1, N, S] → [B, 1, 1, N, S], and a mask of its own for each head as the queries.
        by_group = mask[:, :, None] if mask.shape[1] == 1 else mask.unflatten(1, (heads, -1))
        if mask.dtype == torch.bool:
            # Of scores that are all the least a softmax reads every key alike: zeroed below.
            blind = ~by_group.any(-1, keepdim=True)
            # Half of the least number: no score added to it is −∞, of which a softmax makes NaN.
            least = torch.finfo(torch.float32).min / 2
            by_group = torch.zeros_like(by_group, dtype=torch.float32).masked_fill(~by_group, least)
        score_BKGNS = score_BKGNS + by_group
    weight_BKGNS = score_BKGNS.softmax(-1).to(value.dtype)
    read_BKGNE = (weight_BKGNS.flatten(2, 3) @ value).unflatten(2, (-1, queries))
    if blind is not None and bool(blind.any()):
        read_BKGNE = read_BKGNE.masked_fill(blind, 0)
    return read_BKGNE.flatten(1, 2)


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
        parts = self.query_key_value(self.norm(x_BSM)).chunk(3, dim=-1)
        query, key, value = (split(part, self.heads) for part in parts)
        query, key = rotate(query, rotary), rotate(key, rotary)
        read = attend(query, key, value, keep_BS[:, None, None])
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
    # Pair i turns by position · 10000^(−2i / E).
    rate = 10_000.0 ** (-torch.arange(0, width, 2, device=place.device) / width)
    angle = place[..., None] * rate
    if place.dim() == 2:
        angle = angle[:, None]  # the same for all heads
    return angle.cos(), angle.sin()


def rotate(x_BHSE: torch.Tensor, rotary: Rotary) -> torch.Tensor:
    """Turn each pair of entries ``(x_i, x_{i+E/2})`` by its position's angle."""
    cos, sin = (t.to(x_BHSE.dtype) for t in rotary)
    first, second = x_BHSE.chunk(2, dim=-1)
    # (a, b) → (a cos − b sin, a sin + b cos)
    return torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1)
