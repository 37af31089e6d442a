"""Attention of frozen LMs: transformers' own, but where its gradients are slow."""

from __future__ import annotations

from typing import Any

import torch

from latentwire.models.attention import attend, slow_backward

IMPLEMENTATION = "latentwire"
"""Name of this attention among transformers' own."""


def register(name: str, attention: Any) -> None:
    """Give transformers an attention by name, with the masks of its ``sdpa``."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if name not in ALL_ATTENTION_FUNCTIONS.valid_keys():
        ALL_ATTENTION_FUNCTIONS.register(name, attention)
        ALL_MASK_ATTENTION_FUNCTIONS.register(name, sdpa_mask)


def speed_up(lm: Any) -> None:
    """Let an LM whose attention is ``sdpa`` take this one.

    Nothing changes without gradients, nor on other devices than CPUs.
    """
    if lm.config.get_text_config()._attn_implementation == "sdpa":
        register(IMPLEMENTATION, plain_attention)
        lm.set_attn_implementation(IMPLEMENTATION)


def plain_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Compute one layer's attention; takes and returns what transformers' functions do.

    Queries, keys and values are ``[B, heads, N, D]``, the result ``[B, N, heads, D]``.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    plain = not options.get("dropout") and options.get("is_causal") is None
    if plain and slow_backward(query, key, value):
        mask = visible(attention_mask, query, key)
        output = attend(query, key, value, mask, options.get("scaling"))
        return output.transpose(1, 2).contiguous(), None
    output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    return output, None


def visible(
    attention_mask: torch.Tensor | None, query: torch.Tensor, key: torch.Tensor
) -> torch.Tensor:
    """Return a mask ``[B or 1, 1, N, S]`` that is True where a query sees a key.

    transformers leaves it out where causality says it all.
    """
    queries, keys = query.shape[2], key.shape[2]
    if attention_mask is None:
        # Queries are the last of the positions: query n sees keys up to keys − queries + n.
        whole = torch.ones(queries, keys, dtype=torch.bool, device=query.device)
        return whole.tril(keys - queries)[None, None]
    mask = attention_mask[..., :keys]
    # Numbers are added to scores: 0 changes nothing, so a query sees that key.
    return mask if mask.dtype == torch.bool else mask == 0
