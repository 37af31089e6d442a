"""Weighted sums of loss terms, and how weights move over the steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from latentwire.config import LossConfig, Schedule
from latentwire.data.layout import Batch
from latentwire.losses.terms import (
    TeacherRows,
    first_k,
    kd_first_k_prefix_vs_text,
    kd_hidden_states_first_k,
    token_ce,
)

ANSWER, RECONSTRUCTION, CONTINUATION = -1, 0, 1
"""What a supervised token belongs to, as :attr:`Batch.control_N` says it."""


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
    """What a receiver said at the supervised positions."""

    logits_NV: torch.Tensor
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


def factor(schedule: Schedule, step: int) -> float:
    """The schedule's factor at a step counted from the end of the alignment."""
    share = min(1.0, step / schedule.steps)
    if schedule.kind == "constant":
        return schedule.end
    if schedule.kind == "cosine":
        share = (1 - math.cos(math.pi * share)) / 2
    return schedule.start + (schedule.end - schedule.start) * share


def weights_at(config: LossConfig, step: int) -> Weights:
    """Weights and ``k`` at a step counted from the end of the alignment; terms of weight 0 are left out."""

    def now(knob: str) -> float:
        schedule = config.schedules.get(knob)
        return getattr(config, knob) * (factor(schedule, step) if schedule else 1.0)

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
        "reconstruction_ce": batch.control_N == RECONSTRUCTION,
        "continuation_ce": batch.control_N == CONTINUATION,
    }
    return {name: masks[name] for name in weights.terms}


def term_counts(weights: Weights, batch: Batch) -> dict[str, float]:
    """Tokens that each term averages over, in this batch."""
    return {name: float(mask_N.sum()) for name, mask_N in term_masks(weights, batch).items()}


def loss_terms(
    weights: Weights, batch: Batch, reader: Reader, teacher: Teacher | None, counts: dict[str, float]
) -> dict[str, torch.Tensor]:
    """Each term's weighted share of the loss, from one forward's logits; their sum is what is trained on.

    A term is its sum over this batch divided by ``counts[term]``, the number of its tokens over *all* micro-batches
    and workers: added up over those, the gradient is that of the joined batch.
    """
    masks = term_masks(weights, batch)
    ce_N = token_ce(reader.logits_NV, batch.target_N)
    shares = {}
    for name, weight in weights.terms.items():
        value_N = ce_N
        if name in ("kd", "hidden_kd"):
            if teacher is None:
                raise ValueError(f"loss term {name} needs a teacher, got none")
            value_N = _teacher_term(name, weights.k, batch, reader, teacher)
        shares[name] = weight * (value_N * masks[name]).sum() / max(1.0, counts[name])
    return shares


def _teacher_term(name: str, k: int, batch: Batch, reader: Reader, teacher: Teacher) -> torch.Tensor:
    """Per-token values ``[N]``; answers' tokens are the teacher's rows, others get 0."""
    answer_N = batch.control_N == ANSWER
    offset_A = batch.offset_N[answer_N]
    if name == "kd":
        assert teacher.rows is not None
        value_A = kd_first_k_prefix_vs_text(reader.logits_NV[answer_N], teacher.rows, offset_A, k)
    else:
        value_A = kd_hidden_states_first_k([s[answer_N] for s in reader.states], teacher.states, offset_A, k)
    return value_A.new_zeros(len(answer_N)).masked_scatter(answer_N, value_A)
