"""Weighted sums of loss terms, and how weights move over the steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from latentwire.config import LossConfig
from latentwire.losses.chunks import sum_by_chunks
from latentwire.losses.terms import TERMS, LossTerm, TeacherRows, Tokens
from latentwire.prompts.batch import Batch
from latentwire.prompts.sequences import ANSWER


def terms_on(config: LossConfig) -> list[LossTerm]:
    """Return the terms whose weight is above 0, whatever schedules make of it."""
    return [term for term in TERMS.values() if getattr(config, term.knob) > 0]


def teacher_reads(config: LossConfig) -> set[str]:
    """Return what a run compares with a teacher: ``logits``, ``states``, both, or nothing."""
    return {term.reads for term in terms_on(config) if term.needs_teacher}


def state_depths(config: LossConfig) -> tuple[float, ...]:
    """Return the depths of the states that a run compares, as fractions of a receiver's layers."""
    reads_states = any(term.reads == "states" for term in terms_on(config))
    return config.hidden_kd_depths if reads_states else ()


@dataclass(frozen=True)
class Weights:
    """A loss configuration at one step."""

    terms: dict[str, float]
    """Term → weight, for the terms that are on."""
    k: int

    @property
    def needs_teacher(self) -> bool:
        """True where a teacher must read this step's texts."""
        return any(TERMS[name].needs_teacher for name in self.terms)

    @property
    def reads_states(self) -> bool:
        """True where a term compares states of inner layers."""
        return any(TERMS[name].reads == "states" for name in self.terms)


@dataclass(frozen=True)
class Reader:
    """A receiver's output at the supervised positions."""

    hidden_ND: torch.Tensor
    """Its last states."""
    head: Callable[[torch.Tensor], torch.Tensor]
    """Last states → logits ``[N, V]``."""
    states: Sequence[torch.Tensor] = ()
    """At the depths of ``hidden_kd_depths``, each ``[N, D]``."""


@dataclass(frozen=True)
class Teacher:
    """The receiver's output on the full text, at the answers' tokens in their order."""

    rows: TeacherRows | None
    states: Sequence[torch.Tensor] = ()

    def to(self, device: torch.device | str) -> Teacher:
        """Copy all tensors to ``device``."""
        rows = None if self.rows is None else self.rows.to(device)
        return Teacher(rows, [state_ND.to(device) for state_ND in self.states])


def weights_at(config: LossConfig, step: int) -> Weights:
    """Return weights and ``k`` at a step counted from the end of the alignment.

    Terms of weight 0 are left out.
    """

    def scheduled(knob: str) -> float:
        return getattr(config, knob) * config.factor(knob, step)

    weights = {name: scheduled(term.knob) for name, term in TERMS.items()}
    on = {name: weight for name, weight in weights.items() if weight > 0}
    return Weights(on, max(1, round(scheduled("k"))))


def term_masks(weights: Weights, batch: Batch) -> dict[str, torch.Tensor]:
    """Return term → mask ``[N]`` of the tokens that it averages over."""
    return {name: TERMS[name].mask(batch, weights.k) for name in weights.terms}


def term_counts(weights: Weights, batch: Batch) -> dict[str, float]:
    """Return term → number of tokens that it averages over, in this batch."""
    return {name: float(mask_N.sum()) for name, mask_N in term_masks(weights, batch).items()}


def loss_terms(
    weights: Weights,
    batch: Batch,
    reader: Reader,
    teacher: Teacher | None,
    counts: dict[str, float],
    rows_at_once: int | None = None,
) -> dict[str, torch.Tensor]:
    """Return each term's weighted share of the loss, from one forward's states.

    Their sum is what is trained on. A term is its sum over this batch divided by ``counts[term]``,
    the number of its tokens over *all* micro-batches and workers: added up over those, the gradient
    is that of the joined batch. ``rows_at_once``: see
    :func:`~latentwire.losses.chunks.sum_by_chunks`. Raises ValueError where a teacher is missing.
    """
    if teacher is None and weights.needs_teacher:
        raise ValueError(f"loss terms {', '.join(weights.terms)} need a teacher, got none")
    masks = term_masks(weights, batch)
    # weight · Σ values / tokens of the whole step; a term without tokens is 0, not 0 / 0.
    scales = {name: weight / max(1.0, counts[name]) for name, weight in weights.terms.items()}
    answer_N = batch.control_N == ANSWER
    of_logits = [name for name in weights.terms if TERMS[name].reads == "logits"]
    of_states = [name for name in weights.terms if TERMS[name].reads == "states"]
    compares_logits = any(TERMS[name].needs_teacher for name in of_logits)
    # Row a of the teacher is the a-th answer token, whatever other tokens stand between them.
    teacher_row_N = answer_N.cumsum(0) - 1

    def sums(chunk: slice, hidden_ND: torch.Tensor) -> torch.Tensor:
        """Sum the logits' terms over a chunk of the N tokens, ``[T]``."""
        # The chunk's answer tokens [N] → their rows among all answer tokens [A].
        rows = None
        if compares_logits and teacher is not None and teacher.rows is not None:
            rows = teacher.rows.at(teacher_row_N[chunk][answer_N[chunk]])
        tokens = Tokens(
            target_N=batch.target_N[chunk],
            offset_N=batch.offset_N[chunk],
            answer_N=answer_N[chunk],
            k=weights.k,
            logits_NV=reader.head(hidden_ND),
            teacher_rows=rows,
        )
        values = {name: TERMS[name].value(tokens) * masks[name][chunk] for name in of_logits}
        return torch.stack([scales[name] * value_N.sum() for name, value_N in values.items()])

    shares = {}
    if of_logits:
        sums_T = sum_by_chunks(sums, reader.hidden_ND, rows_at_once)
        shares = dict(zip(of_logits, sums_T, strict=True))
    if of_states:
        # Answers alone: from here N is A, and every token an answer's.
        tokens = Tokens(
            target_N=batch.target_N[answer_N],
            offset_N=batch.offset_N[answer_N],
            answer_N=answer_N[answer_N],
            k=weights.k,
            states=[state_ND[answer_N] for state_ND in reader.states],
            teacher_states=() if teacher is None else teacher.states,
        )
        for name in of_states:
            value_A = TERMS[name].value(tokens) * masks[name][answer_N]
            shares[name] = scales[name] * value_A.sum()
    # Back into the terms' own order, whatever they read.
    return {name: shares[name] for name in weights.terms}
