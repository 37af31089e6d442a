"""Pure functions from logits and states to numbers. N counts supervised tokens, V the vocabulary, D a width.

Terms come per token, so that a bundle can average each over its own tokens, over micro-batches and workers alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F


def token_ce(logits_NV: torch.Tensor, target_N: torch.Tensor) -> torch.Tensor:
    """Cross-entropy in nats of each supervised token, ``[N]``, computed in fp32."""
    return F.cross_entropy(logits_NV.float(), target_N, reduction="none")


def first_k(offset_N: torch.Tensor, k: int) -> torch.Tensor:
    """Mask ``[N]`` of the tokens among the first ``k`` of their answer."""
    return offset_N < k


def k_token_ce_from_prefix(
    logits_NV: torch.Tensor, target_N: torch.Tensor, offset_N: torch.Tensor, k: int
) -> torch.Tensor:
    """Mean cross-entropy in nats over the first ``k`` tokens of every answer."""
    mask_N = first_k(offset_N, k)
    return token_ce(logits_NV[mask_N], target_N[mask_N]).mean()


@dataclass(frozen=True)
class TeacherRows:
    """A teacher's tempered distributions at N positions: its likeliest tokens, and what the others share."""

    ids_NK: torch.Tensor | None
    """Token ids of the columns; ``None``: the whole vocabulary, in order."""
    log_p_NK: torch.Tensor
    """Log-probabilities in nats, fp32."""
    log_tail_N: torch.Tensor | None
    """Log of the mass outside the columns; ``None`` with the whole vocabulary."""
    temperature: float

    def at(self, mask_N: torch.Tensor) -> TeacherRows:
        """Some of the rows."""
        return self._each(lambda tensor: tensor[mask_N])

    def to(self, device: torch.device | str) -> TeacherRows:
        """The same on ``device``."""
        return self._each(lambda tensor: tensor.to(device))

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> TeacherRows:
        return TeacherRows(
            None if self.ids_NK is None else change(self.ids_NK),
            change(self.log_p_NK),
            None if self.log_tail_N is None else change(self.log_tail_N),
            self.temperature,
        )


def teacher_rows(logits_NV: torch.Tensor, temperature: float = 1.0, top_k: int = 0) -> TeacherRows:
    """Temper a teacher's logits and keep the ``top_k`` likeliest tokens of each row (0: all)."""
    log_p_NV = F.log_softmax(logits_NV.float() / temperature, dim=-1)
    if not 0 < top_k < log_p_NV.shape[-1]:
        return TeacherRows(None, log_p_NV, None, temperature)
    log_p_NK, ids_NK = log_p_NV.topk(top_k, dim=-1)
    return TeacherRows(ids_NK, log_p_NK, _log_rest(log_p_NK), temperature)


def kd_first_k_prefix_vs_text(
    logits_NV: torch.Tensor, teacher: TeacherRows, offset_N: torch.Tensor, k: int
) -> torch.Tensor:
    """KL(teacher ‖ student) per token ``[N]`` in nats, times temperature² (arXiv 1503.02531); 0 beyond the first ``k``.

    With a top-k teacher both distributions are compared over its tokens and one event for all others, which bounds the
    full KL from below and is 0 exactly where the student agrees on those.
    """
    mask_N = first_k(offset_N, k)
    rows = teacher.at(mask_N)
    log_q_NV = F.log_softmax(logits_NV[mask_N].float() / rows.temperature, dim=-1)
    log_q_NK = log_q_NV if rows.ids_NK is None else log_q_NV.gather(1, rows.ids_NK)
    kl_N = (rows.log_p_NK.exp() * (rows.log_p_NK - log_q_NK)).sum(-1)
    if rows.log_tail_N is not None:
        kl_N = kl_N + rows.log_tail_N.exp() * (rows.log_tail_N - _log_rest(log_q_NK))
    return torch.zeros_like(offset_N, dtype=kl_N.dtype).masked_scatter(mask_N, rows.temperature**2 * kl_N)


def kd_hidden_states_first_k(
    states: Sequence[torch.Tensor], teacher: Sequence[torch.Tensor], offset_N: torch.Tensor, k: int
) -> torch.Tensor:
    """Mean squared distance ``[N]`` of layer-normalised states ``[N, D]``, averaged over layers; 0 beyond the first ``k``."""
    mask_N = first_k(offset_N, k)
    distance_N = torch.stack(
        [(normalised(own[mask_N]) - normalised(other[mask_N])).square().mean(-1) for own, other in zip(states, teacher, strict=True)]
    ).mean(0)  # fmt: skip
    return torch.zeros_like(offset_N, dtype=distance_N.dtype).masked_scatter(mask_N, distance_N)


def alignment_loss(p_BLD: torch.Tensor, target_BLD: torch.Tensor, keep_BL: torch.Tensor) -> torch.Tensor:
    """Squared distance per row ``[B]``, relative to the target's mean square: 1 is as far as a prompt of zeros."""
    keep_BL1 = keep_BL[..., None].float()
    scale_B = (target_BLD.float().square().mean(-1, keepdim=True) * keep_BL1).sum((1, 2))
    square_BL1 = (p_BLD.float() - target_BLD.float()).square().mean(-1, keepdim=True) * keep_BL1
    return square_BL1.sum((1, 2)) / scale_B.clamp(min=1e-12)


def _log_rest(log_p_NK: torch.Tensor) -> torch.Tensor:
    """Log of the mass that the columns leave."""
    return torch.log1p(-log_p_NK.exp().sum(-1).clamp(max=1 - 1e-7))


def normalised(state_ND: torch.Tensor) -> torch.Tensor:
    """Layer-normalise states in fp32, as they are compared; what is normalised already stays so."""
    return F.layer_norm(state_ND.float(), state_ND.shape[-1:])
