"""Pure functions from logits to numbers. N counts supervised tokens, V the vocabulary."""

from __future__ import annotations

import torch
from torch.nn import functional as F


def token_ce(logits_NV: torch.Tensor, target_N: torch.Tensor) -> torch.Tensor:
    """Cross-entropy in nats of each supervised token, ``[N]``, computed in fp32."""
    return F.cross_entropy(logits_NV.float(), target_N, reduction="none")


def first_k(offset_N: torch.Tensor, k: int) -> torch.Tensor:
    """Mask ``[N]`` of the tokens among the first ``k`` of their answer."""
    return offset_N < k


def span_means(e_BTD: torch.Tensor, length_B: torch.Tensor, spans: int) -> torch.Tensor:
    """Means ``[B, spans, D]`` of contiguous, evenly spaced spans of each row's first ``length_B`` vectors.

    Spans share a vector by how much of it they cover; with more spans than vectors, several take the same one.
    """
    time = torch.arange(e_BTD.shape[1], device=e_BTD.device)
    width_B = (length_B.clamp(min=1) / spans)[:, None, None]
    start_BL1 = torch.arange(spans, device=e_BTD.device)[None, :, None] * width_B
    overlap_BLT = (torch.minimum(start_BL1 + width_B, time + 1) - torch.maximum(start_BL1, time)).clamp(min=0)
    return (overlap_BLT / width_B).to(e_BTD.dtype) @ e_BTD


def alignment_loss(p_BLD: torch.Tensor, target_BLD: torch.Tensor) -> torch.Tensor:
    """Squared distance per row ``[B]``, relative to the target's mean square: 1 is as far as a prompt of zeros."""
    scale = target_BLD.float().square().mean()
    return (p_BLD.float() - target_BLD.float()).square().mean((1, 2)) / scale
