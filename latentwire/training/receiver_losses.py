"""Loss terms of one receiver that reads a step's messages."""

from __future__ import annotations

from contextlib import ExitStack

import torch

from latentwire.data.batches import TrainingBatch
from latentwire.losses.bundles import Weights, term_counts
from latentwire.message import Message
from latentwire.model import LatentWire
from latentwire.models.encoders import InterlinguaEncoder
from latentwire.models.slots import recorded
from latentwire.prompts.batch import Batch
from latentwire.receivers.base import LossTask, part
from latentwire.training.span_teacher import SpanTeacher, slot_distance

SLOT_KD = "slot_kd"
"""Name of the comparison of latents' keys and values; no term of a receiver's output."""


class ReceiverLosses:
    """Reads messages by one receiver after the other and compares what it says."""

    def __init__(self, wire: LatentWire, span_teacher: SpanTeacher | None = None) -> None:
        """Read by a wire's receivers.

        Args:
            wire: the encoder's messages are its own.
            span_teacher: gives the keys and values that latents are compared with. None: nothing is.
        """
        self.wire, self.span_teacher = wire, span_teacher
        self.config = wire.run.training

    def terms(self, weights: Weights) -> list[str]:
        """Return the names of all terms that are read under some weights."""
        return [*weights.terms, *([SLOT_KD] if self.span_teacher else [])]

    def counts(self, weights: Weights, name: str, batches: list[TrainingBatch]) -> dict[str, float]:
        """Count each term's tokens in one receiver's sequences of this worker's micro-batches."""
        totals = dict.fromkeys(weights.terms, 0.0)
        if self.span_teacher is not None:
            latents = [int(batch.sequences[name].latents_BS.sum()) for batch in batches]
            totals[SLOT_KD] = float(sum(latents))
        for batch in batches:
            add_to(totals, term_counts(weights, batch.sequences[name]))
        return totals

    def read(
        self,
        name: str,
        batch: TrainingBatch,
        message: Message | None,
        weights: Weights,
        counts: dict[str, float],
        step: int,
        attached: ExitStack,
    ) -> tuple[dict[str, torch.Tensor], float]:
        """Return one receiver's weighted loss terms, and its prompt's RMS over the embeddings'.

        Args:
            name: the receiver.
            batch: rows of a step.
            message: of the batch's texts. None: the receiver reads the texts themselves.
            weights: of the terms.
            counts: tokens of each term in the whole step, which its sum is divided by.
            step: steps after the alignment, for schedules.
            attached: holds the features in place, for activations that the backward pass computes
                again.
        """
        lm, losses = self.wire.receivers[name], self.wire.run.losses
        # Where rows share messages: each beginning, which is read once, and each row's rest.
        parts = None
        if not self.config.gradient_checkpointing:  # which allows no cache
            parts = self.wire.parted(name, batch.sequences[name])
        begun = (batch.sequences[name] if parts is None else parts[0]).to(lm.device)
        if self.wire.reads_heads_alike and not self.config.gradient_checkpointing:
            begun = lm.read_head(begun)
        teacher = lm.read_teacher(batch.teacher[name], losses) if weights.needs_teacher else None
        # One backward per term needs a graph per term, which chunks do not have.
        rows = None if self.config.log_gradient_norms else self.config.logit_rows
        teaches_slots = self.span_teacher is not None and SLOT_KD in counts
        targets = self._slot_targets(name, batch, begun, message) if teaches_slots else []
        entries: list[torch.Tensor] = []
        # The first of two passes needs its attachments no longer than it runs. A single pass keeps
        # them up to the backward pass, which may compute activations again.
        with ExitStack() as first_pass:
            held = attached if parts is None else first_pass
            soft_ND = held.enter_context(self.wire.reading(name, begun, message))
            assert soft_ND is not None
            if teaches_slots:
                here = self.wire.local_receiver(name).lm
                entries = held.enter_context(recorded(here, begun.latents_BS))
            if parts is not None:
                with part(f"read {name}"):
                    past = self.wire.local_receiver(name).prefill(begun, soft_ND)
        # How many rows read each message: one, unless they share it.
        rows_M = torch.ones(len(begun.ids_BS), device=lm.device)
        if parts is None:
            task = LossTask(begun, weights, counts, teacher, losses, rows)
            shares_T, rest_ND = lm.losses(task, soft_ND), None
        else:
            rest = parts[1].to(lm.device)
            assert rest.past_R is not None
            rows_M = torch.bincount(rest.past_R, minlength=len(begun.ids_BS)).float()
            task = LossTask(rest, weights, counts, teacher, losses, rows)
            rest_ND = attached.enter_context(self.wire.reading_on(name, rest, message))
            shares_T = self.wire.local_receiver(name).losses(task, rest_ND, past)
        shares = dict(zip(weights.terms, shares_T, strict=True))
        if teaches_slots:
            # [N]: one distance a latent that was read, counted once for each row that reads it.
            distance_N = slot_distance(entries, targets)
            rows_N = rows_M.repeat_interleave(begun.latents_BS.sum(1)).to(distance_N)
            weight = losses.slot_kd_weight * losses.factor(f"{SLOT_KD}_weight", step)
            total = (distance_N * rows_N).sum()
            shares[SLOT_KD] = weight * total / max(1.0, counts[SLOT_KD])
        slots_BS = begun.slots_BS
        if self.wire.run.adapter.kind == "heads" and message is not None:
            slots_BS = begun.prefix_BS | begun.control_BS  # its messages have no vectors
        return shares, _rms(soft_ND, rows_M, slots_BS, rest_ND) / lm.embed_rms

    def _slot_targets(
        self, name: str, batch: TrainingBatch, sequences: Batch, message: Message | None
    ) -> list[torch.Tensor]:
        """Return the teacher's keys and values for each latent of some sequences, ``[N, E]`` each."""
        encoder = self.wire.interlingua.encoder
        assert isinstance(encoder, InterlinguaEncoder) and self.span_teacher and message
        spans, ids = encoder.spans(batch.tokens, name), batch.message_ids[name]
        with part(f"teach {name}"):
            targets = self.span_teacher.targets(name, ids, spans)
        _, keep_BL = message.read_by(name)
        # [B, L, E] → one target for each latent that stands in a row, row by row: [N, E].
        message_R = sequences.message_R.to(keep_BL.device)
        return [target_BLE[message_R][keep_BL[message_R]] for target_BLE in targets]


def add_to(totals: dict[str, float], values: dict[str, float]) -> None:
    """Add values to totals of the same names, in place."""
    for name, value in values.items():
        totals[name] += value


def _rms(
    soft_ND: torch.Tensor,
    rows_M: torch.Tensor,
    slots_BS: torch.Tensor,
    rest_ND: torch.Tensor | None,
) -> float:
    """Return the root mean square of all rows' soft vectors, of which a message's are read once.

    0 where there are none.

    Args:
        soft_ND: of the messages, row by row.
        rows_M: rows that read each of them.
        slots_BS: where they stand in the messages' sequences.
        rest_ND: soft vectors that stand after them.
    """
    # √(Σ count · mean square / Σ count) over all soft vectors.
    square_N = soft_ND.detach().flatten(0, -2).square().mean(-1)
    count_N = rows_M.repeat_interleave(slots_BS.sum(1)).to(square_N)
    if rest_ND is not None:
        square_N = torch.cat((square_N, rest_ND.detach().square().mean(-1).to(square_N)))
        count_N = torch.cat((count_N, count_N.new_ones(len(rest_ND))))
    return float((square_N * count_N).sum() / count_N.sum().clamp(min=1)) ** 0.5
