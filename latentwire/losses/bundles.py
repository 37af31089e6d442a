"""Weighted sums of loss terms."""

from __future__ import annotations

import torch

from latentwire.config import LossConfig
from latentwire.data.layout import Batch
from latentwire.losses.terms import first_k, token_ce


def ce_masks(config: LossConfig, batch: Batch) -> dict[str, tuple[float, torch.Tensor]]:
    """The terms that are switched on: name → (weight, mask ``[N]`` of the tokens it averages over)."""
    answer_N = ~batch.reconstruction_N
    terms = {
        "answer_ce": (config.answer_ce_weight, answer_N),
        "first_k_ce": (config.first_k_ce_weight, answer_N & first_k(batch.offset_N, config.k)),
        "first_token_ce": (config.first_token_ce_weight, answer_N & first_k(batch.offset_N, 1)),
        "reconstruction_ce": (config.reconstruction_ce_weight, batch.reconstruction_N),
    }
    return {name: term for name, term in terms.items() if term[0] > 0}


def ce_loss(
    config: LossConfig, batch: Batch, logits_NV: torch.Tensor, counts: dict[str, float]
) -> tuple[torch.Tensor, dict[str, float]]:
    """The weighted loss and each term's value, from one forward's logits.

    Each term is its sum over this batch divided by ``counts[term]``, the number of its tokens over *all* workers: added
    up over workers, the gradient is that of the joined batch.
    """
    ce_N = token_ce(logits_NV, batch.target_N)
    total = ce_N.new_zeros(())
    values: dict[str, float] = {}
    for name, (weight, mask_N) in ce_masks(config, batch).items():
        term = (ce_N * mask_N).sum() / max(1.0, counts[name])
        values[name] = float(term.detach())
        total = total + weight * term
    return total, values


def ce_counts(config: LossConfig, batch: Batch) -> dict[str, float]:
    """Tokens that each term averages over, in this batch."""
    return {name: float(mask_N.sum()) for name, (_, mask_N) in ce_masks(config, batch).items()}
