"""Attention forward and back in bfloat16: this project's, which chooses, over torch's fused kernel."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from benchmarks.measure import Row, in_turns
from latentwire.models.attention import attend

SHAPES = ((36, 9, 45, 65), (36, 3, 45, 198), (8, 9, 160, 160))
"""Rows, heads, queries and keys: questions after a message, in heads without and with it; texts."""
WIDTH = 64


def rows(repeats: int) -> list[Row]:
    """Measure each shape on this machine's CPU."""
    return [beside_fused(shape, repeats) for shape in SHAPES]


def beside_fused(shape: tuple[int, int, int, int], repeats: int) -> Row:
    """Measure one shape with a causal mask; every tensor needs a gradient."""
    count, heads, queries, keys = shape
    torch.manual_seed(0)
    like = {"dtype": torch.bfloat16, "requires_grad": True}
    # [rows, heads, length, WIDTH]
    query = torch.randn(count, heads, queries, WIDTH, **like)
    key = torch.randn(count, heads, keys, WIDTH, **like)
    value = torch.randn(count, heads, keys, WIDTH, **like)
    # Each row has a mask and a gradient of its own, as in training.
    # Causal from the end: the last query sees all keys, the first all but queries − 1.
    mask = torch.ones(count, 1, queries, keys, dtype=torch.bool).tril(keys - queries)
    gradient = torch.randn_like(query)

    def ours() -> None:
        attend(query, key, value, mask).backward(gradient)

    def fused() -> None:
        read = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        read.backward(gradient)

    chosen, kernel = in_turns(ours, fused, repeats)
    detail = f"{count} rows, {heads} heads, {queries} queries, {keys} keys: {1e3 * chosen:.0f} / {1e3 * kernel:.0f} ms"
    return Row(
        "attention in bfloat16 ÷ torch's fused kernel, on a CPU", chosen / kernel, "report", detail
    )
