"""Loss terms: pure functions of logits and states, and the table of those that can be trained on.

N counts supervised tokens, A those of them that belong to answers, V is the vocabulary, D a width,
K a teacher's columns. Values come per token, so that each term can be averaged over its own tokens,
over micro-batches and workers alike.

A new term is a function of :class:`Tokens` and its line in :data:`TERMS`; its weight is the field
``<name>_weight`` of :class:`~latentwire.config.LossConfig`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch.nn import functional as F

from latentwire.prompts.batch import Batch
from latentwire.prompts.sequences import ANSWER, CONTINUE, RECONSTRUCT

# ---------------------------------------------------------------------------------------- functions


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
    """A teacher's tempered distributions at N positions: likeliest tokens, and the others' mass."""

    ids_NK: torch.Tensor | None
    """Token ids of the columns; ``None``: the whole vocabulary, in order."""
    log_p_NK: torch.Tensor
    """Log-probabilities in nats, fp32."""
    log_tail_N: torch.Tensor | None
    """Log of the mass outside the columns; ``None`` with the whole vocabulary."""
    temperature: float

    def at(self, rows_M: torch.Tensor) -> TeacherRows:
        """Select rows by a mask or by indices."""
        return self._each(lambda tensor: tensor[rows_M])

    def to(self, device: torch.device | str) -> TeacherRows:
        """Copy the rows to ``device``."""
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
    """KL(teacher ‖ student) of each token ``[N]`` in nats, times temperature² (arXiv 1503.02531).

    It is 0 beyond the first ``k`` tokens. With a top-k teacher both distributions are compared over
    its tokens and one event for all others, which bounds the full KL from below and is 0 exactly
    where the student agrees on those.
    """
    mask_N = first_k(offset_N, k)
    rows = teacher.at(mask_N)
    # Σ_v p_v (log p_v − log q_v) over the teacher's columns, [M, V] → [M, K] → [M].
    log_q_NV = F.log_softmax(logits_NV[mask_N].float() / rows.temperature, dim=-1)
    log_q_NK = log_q_NV if rows.ids_NK is None else log_q_NV.gather(1, rows.ids_NK)
    kl_N = (rows.log_p_NK.exp() * (rows.log_p_NK - log_q_NK)).sum(-1)
    if rows.log_tail_N is not None:
        # One more summand: all other tokens as a single event.
        kl_N = kl_N + rows.log_tail_N.exp() * (rows.log_tail_N - _log_rest(log_q_NK))
    # [M] → [N]: gradients of tempered logits shrink by 1 / temperature², which this makes up for.
    value_M = rows.temperature**2 * kl_N
    return torch.zeros_like(offset_N, dtype=value_M.dtype).masked_scatter(mask_N, value_M)


def kd_hidden_states_first_k(
    states: Sequence[torch.Tensor], teacher: Sequence[torch.Tensor], offset_N: torch.Tensor, k: int
) -> torch.Tensor:
    """Mean squared distance ``[N]`` of layer-normalised states ``[N, D]``, averaged over layers.

    It is 0 beyond the first ``k`` tokens.
    """
    mask_N = first_k(offset_N, k)
    distances = []
    for state_ND, teacher_ND in zip(states, teacher, strict=True):
        difference_ND = normalised(state_ND[mask_N]) - normalised(teacher_ND[mask_N])
        distances.append(difference_ND.square().mean(-1))
    # [layers, M] → [M], of the tokens that the mask has.
    distance_N = torch.stack(distances).mean(0)
    return torch.zeros_like(offset_N, dtype=distance_N.dtype).masked_scatter(mask_N, distance_N)


def alignment_loss(
    p_BLD: torch.Tensor, target_BLD: torch.Tensor, keep_BL: torch.Tensor
) -> torch.Tensor:
    """Squared distance per row ``[B]``, relative to the target's mean square.

    1 is the distance of a prompt of zeros. ``keep_BL`` marks the real latents.
    """
    # |p − target|² / |target|², both of them means over D and sums over L.
    keep_BL1 = keep_BL[..., None].float()
    scale_B = (target_BLD.float().square().mean(-1, keepdim=True) * keep_BL1).sum((1, 2))
    square_BL1 = (p_BLD.float() - target_BLD.float()).square().mean(-1, keepdim=True) * keep_BL1
    return square_BL1.sum((1, 2)) / scale_B.clamp(min=1e-12)


def _log_rest(log_p_NK: torch.Tensor) -> torch.Tensor:
    """Log of the mass outside the columns, ``[N]``."""
    # log(1 − Σ p), where rounding may bring the sum to 1 or beyond.
    return torch.log1p(-log_p_NK.exp().sum(-1).clamp(max=1 - 1e-7))


def normalised(state_ND: torch.Tensor) -> torch.Tensor:
    """Layer-normalise states in fp32, as they are compared; what is normalised already stays so."""
    return F.layer_norm(state_ND.float(), state_ND.shape[-1:])


# -------------------------------------------------------------------------------------------- terms


@dataclass(frozen=True)
class Tokens:
    """Supervised tokens of one forward, or of a chunk of it, as a loss term reads them."""

    target_N: torch.Tensor
    """Token ids to be predicted."""
    offset_N: torch.Tensor
    """Place of each token in its answer or text, from 0."""
    answer_N: torch.Tensor
    """Mask of the tokens that belong to answers: A of them."""
    k: int
    logits_NV: torch.Tensor | None = None
    states: Sequence[torch.Tensor] = ()
    """``[N, D]`` at each of ``hidden_kd_depths``."""
    teacher_rows: TeacherRows | None = None
    """The teacher's distributions at the A answer tokens, in order."""
    teacher_states: Sequence[torch.Tensor] = ()
    """The teacher's states at the A answer tokens, ``[A, D]`` each."""

    @cached_property
    def ce_N(self) -> torch.Tensor:
        """Cross-entropy in nats, computed once for all terms that read it."""
        assert self.logits_NV is not None
        return token_ce(self.logits_NV, self.target_N)


def cross_entropy(tokens: Tokens) -> torch.Tensor:
    """Return the cross-entropy ``[N]`` in nats."""
    return tokens.ce_N


def distillation(tokens: Tokens) -> torch.Tensor:
    """Return the KL from the teacher ``[N]`` in nats; 0 outside the first ``k`` answer tokens."""
    assert tokens.logits_NV is not None and tokens.teacher_rows is not None
    answer_N = tokens.answer_N
    # Computed over the A answer tokens, and laid back among all N.
    value_A = kd_first_k_prefix_vs_text(
        tokens.logits_NV[answer_N], tokens.teacher_rows, tokens.offset_N[answer_N], tokens.k
    )
    return value_A.new_zeros(len(answer_N)).masked_scatter(answer_N, value_A)


def state_distillation(tokens: Tokens) -> torch.Tensor:
    """Return the squared distance ``[A]`` to the teacher's states; all tokens are answers'."""
    return kd_hidden_states_first_k(tokens.states, tokens.teacher_states, tokens.offset_N, tokens.k)


@dataclass(frozen=True)
class LossTerm:
    """One part of the loss: the mean of ``value`` over the tokens of ``mask``."""

    name: str
    """Its name in metrics; the configuration's ``<name>_weight`` switches it on."""
    value: Callable[[Tokens], torch.Tensor]
    """Tokens → a number for each, ``[N]``."""
    control: int = ANSWER
    """Sequences that it reads: answers to questions, or texts behind a control embedding."""
    span: Literal["all", "first_k", "first"] = "all"
    """Tokens of each sequence that it averages over."""
    reads: Literal["logits", "states"] = "logits"
    """Output of the receiver that it reads. Terms of states read answers alone, unchunked."""
    needs_teacher: bool = False
    """A teacher must give the same output, logits or states, on the full text."""

    @property
    def knob(self) -> str:
        """Field of the loss configuration that holds its weight."""
        return f"{self.name}_weight"

    def mask(self, batch: Batch, k: int) -> torch.Tensor:
        """Mask ``[N]`` of the tokens that it averages over."""
        mask_N = batch.control_N == self.control
        # [R] → [N]: whether the row of a token has a teacher's words.
        if self.needs_teacher and batch.taught_R is not None:
            mask_N = mask_N & batch.taught_R[batch.row_N]
        if self.span == "all":
            return mask_N
        first = k if self.span == "first_k" else 1
        return mask_N & first_k(batch.offset_N, first)


_ALL = (
    LossTerm("answer_ce", cross_entropy),
    LossTerm("first_k_ce", cross_entropy, span="first_k"),
    LossTerm("first_token_ce", cross_entropy, span="first"),
    LossTerm("kd", distillation, span="first_k", needs_teacher=True),
    LossTerm("hidden_kd", state_distillation, span="first_k", reads="states", needs_teacher=True),
    LossTerm("reconstruction_ce", cross_entropy, control=RECONSTRUCT),
    LossTerm("continuation_ce", cross_entropy, control=CONTINUE),
)
TERMS: Mapping[str, LossTerm] = {term.name: term for term in _ALL}
"""Every loss term by its name, in the order in which they are added up."""
