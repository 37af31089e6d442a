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
