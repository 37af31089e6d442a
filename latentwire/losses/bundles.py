"""Weighted sums of loss terms, and how weights move over the steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from latentwire.config import LossConfig
from latentwire.losses.chunks import sum_by_chunks
from latentwire.losses.terms import (
    TeacherRows,
    first_k,
    kd_first_k_prefix_vs_text,
    kd_hidden_states_first_k,
    token_ce,
)
from latentwire.prompts.sequences import ANSWER, CONTINUE, RECONSTRUCT, Batch

PLAIN_CE = ("answer_ce", "first_k_ce", "first_token_ce", "reconstruction_ce", "continuation_ce")
"""Terms that are the cross-entropy of their tokens, and differ in these alone."""


@dataclass(frozen=True)
class Weights:
    """A loss configuration at one step."""

    terms: dict[str, float]
    """Term → weight, for the terms that are on."""
    k: int

    @property
    def needs_teacher(self) -> bool:
        """Whether the teacher must read this step's texts."""
        return bool({"kd", "hidden_kd"} & self.terms.keys())


@dataclass(frozen=True)
class Reader:
    """What a receiver made of the supervised positions."""

    hidden_ND: torch.Tensor
    """Its last states."""
    head: Callable[[torch.Tensor], torch.Tensor]
    """Last states → logits ``[N, V]``."""
    states: Sequence[torch.Tensor] = ()
    """At the depths of ``hidden_kd_depths``, each ``[N, D]``."""


@dataclass(frozen=True)
class Teacher:
    """The same receiver's words on the full text; its rows are those of the answers, in order."""

    rows: TeacherRows | None
    states: Sequence[torch.Tensor] = ()

    def to(self, device: torch.device | str) -> Teacher:
        """The same on ``device``."""
        rows = None if self.rows is None else self.rows.to(device)
        return Teacher(rows, [state_ND.to(device) for state_ND in self.states])


def weights_at(config: LossConfig, step: int) -> Weights:
    """Weights and ``k`` at a step counted from the end of the alignment; terms of weight 0 are left out."""

    def now(knob: str) -> float:
        return getattr(config, knob) * config.factor(knob, step)

    knobs = [name for name in LossConfig.model_fields if name.endswith("_weight")]
    terms = {name.removesuffix("_weight"): now(name) for name in knobs}
    return Weights({name: weight for name, weight in terms.items() if weight > 0}, max(1, round(now("k"))))


def term_masks(weights: Weights, batch: Batch) -> dict[str, torch.Tensor]:
    """Term → mask ``[N]`` of the tokens it averages over."""
    answer_N = batch.control_N == ANSWER
    first_N = answer_N & first_k(batch.offset_N, weights.k)
    masks = {
        "answer_ce": answer_N,
        "first_k_ce": first_N,
        "first_token_ce": answer_N & first_k(batch.offset_N, 1),
        "kd": first_N,
        "hidden_kd": first_N,
        "reconstruction_ce": batch.control_N == RECONSTRUCT,
        "continuation_ce": batch.control_N == CONTINUE,
    }
    return {name: masks[name] for name in weights.terms}


def term_counts(weights: Weights, batch: Batch) -> dict[str, float]:
    """Tokens that each term averages over, in this batch."""
    return {name: float(mask_N.sum()) for name, mask_N in term_masks(weights, batch).items()}


def loss_terms(
    weights: Weights,
    batch: Batch,
    reader: Reader,
    teacher: Teacher | None,
    counts: dict[str, float],
    rows_at_once: int | None = None,
) -> dict[str, torch.Tensor]:
    """Each term's weighted share of the loss, from one forward's states; their sum is what is trained on.

    A term is its sum over this batch divided by ``counts[term]``, the number of its tokens over *all* micro-batches
    and workers: added up over those, the gradient is that of the joined batch. ``rows_at_once``: see
    :func:`~latentwire.losses.chunks.sum_by_chunks`.
    """
    if teacher is None and weights.needs_teacher:
        raise ValueError(f"loss terms {', '.join(weights.terms)} need a teacher, got none")
    masks = term_masks(weights, batch)
    scales = {name: weight / max(1.0, counts[name]) for name, weight in weights.terms.items()}
    answer_N = batch.control_N == ANSWER
    teacher_row_N = answer_N.cumsum(0) - 1  # the teacher's rows are those of the answers, in order

    def kd(rows: slice, logits_NV: torch.Tensor) -> torch.Tensor:
        assert teacher is not None and teacher.rows is not None
        mine_N = answer_N[rows]
        told = teacher.rows.at(teacher_row_N[rows][mine_N])
        value_A = kd_first_k_prefix_vs_text(logits_NV[mine_N], told, batch.offset_N[rows][mine_N], weights.k)
        return value_A.new_zeros(len(mine_N)).masked_scatter(mine_N, value_A)

    from_logits = [name for name in weights.terms if name != "hidden_kd"]

    def sums(rows: slice, hidden_ND: torch.Tensor) -> torch.Tensor:
        logits_NV = reader.head(hidden_ND)
        ce_N = token_ce(logits_NV, batch.target_N[rows])
        values = dict.fromkeys(PLAIN_CE, ce_N)
        if "kd" in from_logits:
            values["kd"] = kd(rows, logits_NV)
        return torch.stack([scales[name] * (values[name] * masks[name][rows]).sum() for name in from_logits])

    shares = (
        dict(zip(from_logits, sum_by_chunks(sums, reader.hidden_ND, rows_at_once), strict=True)) if from_logits else {}
    )
    if "hidden_kd" in weights.terms:
        assert teacher is not None
        own = [state_ND[answer_N] for state_ND in reader.states]
        value_A = kd_hidden_states_first_k(own, teacher.states, batch.offset_N[answer_N], weights.k)
        shares["hidden_kd"] = scales["hidden_kd"] * value_A.sum()
    return {name: shares[name] for name in weights.terms}
