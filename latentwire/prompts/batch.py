"""Prompts of several rows as padded tensors, with maps of where their parts stand."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch.nn import functional as F

from latentwire.prompts.sequences import ANSWER, PromptSequence

MASKS = ("prefix_BS", "latents_BS", "control_BS", "question_BS")
"""Fields of a batch that say where its parts stand."""
SHARED_BY = 1.5
"""Rows a message from which reading it once for all of them pays for a second pass."""


@dataclass(frozen=True)
class Batch:
    """Padded sequences. N counts supervised tokens over all rows."""

    ids_BS: torch.Tensor
    attention_BS: torch.Tensor
    """1 at real positions; padding gets no attention."""
    prefix_BS: torch.Tensor
    """True where the constant prefix stands."""
    latents_BS: torch.Tensor
    """True where the soft prompt's latents stand."""
    control_BS: torch.Tensor
    """True where a control embedding stands."""
    question_BS: torch.Tensor
    """True at the question's tokens."""
    message_R: torch.Tensor
    """The message that each row reads."""
    control_R: torch.Tensor
    """Each row's control embedding, or :data:`ANSWER`."""
    predict_N: torch.Tensor
    """Flat index into B × S of the position whose logits predict the target (the one before it)."""
    target_N: torch.Tensor
    """Supervised token ids: answer, then stop."""
    offset_N: torch.Tensor
    """Place of the target in its answer, from 0."""
    row_N: torch.Tensor
    """Row that the target belongs to."""
    end_R: torch.Tensor | None = None
    """Positions up to the end of each row's message; ``None`` in rows that are padded to the left."""
    past_R: torch.Tensor | None = None
    """Row of another batch that each row goes on from; that sequence ends at ``end_R``."""
    taught_R: torch.Tensor | None = None
    """True where a teacher's words are compared with a row's answer; ``None``: wherever there is one."""
    prefix: int = 0
    """Positions of the prefix in each row."""
    head: int = 0
    """Leading positions before anything that changes from row to row or is predicted: the same tokens in all rows. 0 in
    rows that are padded to the left."""
    head_H: torch.Tensor | None = None
    """Ids of a head that was taken off the rows; ``attention_BS`` still counts it, all other positions do not."""
    position_BS: torch.Tensor | None = None
    """The position of each place in its prompt, where places are missing (:meth:`without_latents`)."""

    @property
    def slots_BS(self) -> torch.Tensor:
        """True wherever a soft vector stands: prefix, latents and controls."""
        return self.prefix_BS | self.latents_BS | self.control_BS

    @property
    def control_N(self) -> torch.Tensor:
        """The control of each target's row, :data:`ANSWER` where the target belongs to one."""
        return self.control_R[self.row_N]

    def to(self, device: torch.device | str) -> Batch:
        """Return the same batch on ``device``."""
        moved: dict[str, Any] = {}
        for name, value in vars(self).items():
            if isinstance(value, torch.Tensor):
                moved[name] = value.to(device, non_blocking=True)
        return replace(self, **moved)

    def after_head(self) -> Batch:
        """Return the rows without the tokens that all of them begin with, which go to ``head_H``."""
        width, names = self.ids_BS.shape[1], ("ids_BS", *MASKS)
        rows: dict[str, Any] = {name: getattr(self, name)[:, self.head :] for name in names}
        # A flat index is row · S + place, of which S and the place lose the head.
        row_N, place_N = self.predict_N // width, self.predict_N % width
        return replace(
            self,
            **rows,
            predict_N=row_N * (width - self.head) + place_N - self.head,
            head=0,
            head_H=self.ids_BS[0, : self.head],
        )

    def positions(self) -> torch.Tensor:
        """Return the position of each place ``[B, S]`` in its prompt, counted without padding."""
        if self.position_BS is not None:
            return self.position_BS
        # Attention still counts a head that was taken off: its columns are cut after counting.
        count_BS = self.attention_BS.cumsum(1) - 1
        return count_BS.clamp(min=0)[:, self.attention_BS.shape[1] - self.ids_BS.shape[1] :]

    def without_latents(self) -> Batch:
        """Return the rows without the places of their latents; the others keep their positions.

        For receivers in which a message stands outside the sequence.
        """
        width = self.ids_BS.shape[1]
        head = self.attention_BS.shape[1] - width
        keep_BS = self.attention_BS[:, head:].bool() & ~self.latents_BS
        count_B = keep_BS.sum(1)
        rest = int(count_B.max())
        # Places that stay come first, in order; rows that are padded to the left are then moved.
        from_BS = (~keep_BS).long().argsort(dim=1, stable=True)[:, :rest]
        shift_B = torch.zeros_like(count_B) if self.end_R is not None else rest - count_B
        # Place t of a row is its (t − shift)-th that stays, or padding where there is none.
        place_BT = torch.arange(rest, device=keep_BS.device) - shift_B[:, None]
        kept_BT = (place_BT >= 0) & (place_BT < count_B[:, None])
        from_BT = from_BS.gather(1, place_BT.clamp(min=0))
        masks: dict[str, Any] = {}
        for name in MASKS:
            masks[name] = getattr(self, name).gather(1, from_BT) & kept_BT
        row_N, place_N = self.predict_N // width, self.predict_N % width
        # The other way round: the place to which each place that stays has moved.
        moved_BS = keep_BS.cumsum(1) - 1 + shift_B[:, None]
        return replace(
            self,
            ids_BS=self.ids_BS.gather(1, from_BT) * kept_BT,
            attention_BS=torch.cat((self.attention_BS[:, :head], kept_BT.long()), 1),
            **masks,
            predict_N=row_N * rest + moved_BS[row_N, place_N],
            position_BS=self.positions().gather(1, from_BT) * kept_BT,
        )

    def row(self, number: int) -> Batch:
        """Return one row that predicts nothing, as a batch of its own."""
        here = slice(number, number + 1)
        nothing = self.predict_N[:0]
        rows: dict[str, Any] = {}
        for name, value in vars(self).items():
            if isinstance(value, torch.Tensor) and name.endswith(("_BS", "_R")):
                rows[name] = value[here]
        rows |= dict.fromkeys(("predict_N", "target_N", "offset_N", "row_N"), nothing)
        return replace(self, **rows)

    def parted(self, side: Literal["right", "left"] = "right") -> tuple[Batch, Batch] | None:
        """Part rows that read the same messages: what they begin with, once each, and what follows it.

        Returns:
            :meth:`begun` and :meth:`going_on`. None where no two rows share a message, where some begin
            with nothing, or a target is predicted within a message.
        """
        if self.end_R is None or self.head_H is not None:
            return None
        messages, past_R = torch.unique(self.message_R, return_inverse=True)
        place_N = self.predict_N % self.ids_BS.shape[1]
        # As many messages as rows: nothing is shared.
        if len(messages) == len(past_R) or not bool(self.end_R.all()):
            return None
        if bool((place_N < self.end_R[self.row_N]).any()):
            return None
        return self.begun(), self.going_on(past_R, side)

    def begun(self) -> Batch:
        """Return what rows begin with up to their messages' ends: one row a message, nothing to predict.

        Rows are in the order of the messages' numbers, padded to the right. Those of the same
        ``message_R`` must be equal up to ``end_R``, as they are by construction.
        """
        assert self.end_R is not None, "rows are padded to the left"
        messages, past_R = torch.unique(self.message_R, return_inverse=True)
        # The first row of each message: the least number among its rows.
        first_M = torch.full_like(messages, len(past_R)).scatter_reduce(
            0, past_R, torch.arange(len(past_R)), "amin"
        )
        end_M = self.end_R[first_M]
        place_S = torch.arange(int(end_M.max()))
        within_MS = place_S < end_M[:, None]
        nothing = torch.zeros(0, dtype=torch.long)
        masks: dict[str, Any] = {}
        for name in MASKS:
            masks[name] = getattr(self, name)[first_M][:, : len(place_S)] & within_MS
        return Batch(
            ids_BS=self.ids_BS[first_M][:, : len(place_S)] * within_MS,
            attention_BS=within_MS.long(),
            **masks,
            message_R=messages,
            control_R=torch.full_like(messages, ANSWER),
            predict_N=nothing,
            target_N=nothing,
            offset_N=nothing,
            row_N=nothing,
            end_R=end_M,
            prefix=self.prefix,
            head=self.head,
        )

    def going_on(self, past_R: torch.Tensor, side: Literal["right", "left"] = "right") -> Batch:
        """Return what follows the message in each row.

        Args:
            past_R: the row of what has been read (:meth:`begun`, say) that each one goes on from.
            side: where padding stands.
        """
        assert self.end_R is not None, "rows are padded to the left"
        width, end_R1 = self.ids_BS.shape[1], self.end_R[:, None]
        length_R = self.attention_BS.sum(1) - self.end_R
        rest = int(length_R.max())
        shift_R = torch.zeros_like(length_R) if side == "right" else rest - length_R
        # Place t of what follows stood at end_R − shift_R + t.
        from_RT = end_R1 - shift_R[:, None] + torch.arange(rest)
        kept_RT = (from_RT >= end_R1) & (from_RT < end_R1 + length_R[:, None])
        from_RT = from_RT.clamp(min=0, max=width - 1)
        masks: dict[str, Any] = {}
        for name in MASKS:
            masks[name] = getattr(self, name).gather(1, from_RT) & kept_RT
        # A target's place, counted from the end of its row's message.
        row_N, place_N = self.predict_N // width, self.predict_N % width
        after_N = place_N - self.end_R[row_N] + shift_R[row_N]
        return replace(
            self,
            ids_BS=self.ids_BS.gather(1, from_RT) * kept_RT,
            attention_BS=kept_RT.long(),
            **masks,
            predict_N=row_N * rest + after_N,
            prefix=0,
            head=0,
            past_R=past_R,
        )


def collate(
    sequences: Iterable[PromptSequence],
    *,
    side: Literal["right", "left"] = "right",
    messages: list[int] | None = None,
) -> Batch:
    """Pad sequences to one length; the attention mask follows from their lengths, never from token ids.

    Args:
        sequences: rows of one receiver.
        side: where padding stands: to the right for training, to the left for decoding.
        messages: the message that each sequence reads. None: each its own, in order.
    """
    rows = list(sequences)
    width = max(len(row.ids) for row in rows)
    ids_BS = torch.zeros(len(rows), width, dtype=torch.long)
    attention_BS = torch.zeros(len(rows), width, dtype=torch.long)
    prefix_BS, latents_BS, control_BS, question_BS = torch.zeros(
        len(MASKS), len(rows), width, dtype=torch.bool
    )
    predict, target, offset, row_of = [], [], [], []
    for index, row in enumerate(rows):
        shift = 0 if side == "right" else width - len(row.ids)
        ids_BS[index, shift : shift + len(row.ids)] = torch.tensor(row.ids)
        attention_BS[index, shift : shift + len(row.ids)] = 1
        question_BS[index, shift + row.question.start : shift + row.question.stop] = True
        prefix_BS[index, shift + row.prefix.start : shift + row.prefix.stop] = True
        if row.soft:
            latents_BS[index, shift + row.message.start : shift + row.message.stop] = True
        if row.control != ANSWER:
            control_BS[index, shift + row.message.stop] = True
        for place, position in enumerate(row.supervised):
            # What a position says predicts the one after it; the index is flat over B × S.
            predict.append(index * width + shift + position - 1)
            target.append(row.ids[position])
            offset.append(place)
            row_of.append(index)
    # The head ends before the position that predicts a row's first target.
    firsts = [row.supervised[0] - 1 for row in rows if row.supervised]
    head = min([*(row.head for row in rows), *firsts]) if side == "right" else 0
    numbers = list(range(len(rows))) if messages is None else messages
    # Where padding stands to the left a column is no position, and ends are left out.
    ends = torch.tensor([row.message.stop for row in rows]) if side == "right" else None
    return Batch(
        ids_BS=ids_BS,
        attention_BS=attention_BS,
        prefix_BS=prefix_BS,
        latents_BS=latents_BS,
        control_BS=control_BS,
        question_BS=question_BS,
        message_R=torch.tensor(numbers, dtype=torch.long),
        control_R=torch.tensor([row.control for row in rows], dtype=torch.long),
        predict_N=torch.tensor(predict, dtype=torch.long),
        target_N=torch.tensor(target, dtype=torch.long),
        offset_N=torch.tensor(offset, dtype=torch.long),
        row_N=torch.tensor(row_of, dtype=torch.long),
        end_R=ends,
        prefix=len(rows[0].prefix),
        head=head,
    )


def join(batches: list[Batch], *, side: Literal["right", "left"] = "right") -> Batch:
    """Return several batches as one, padded to the longest; rows, slots and targets stay in order.

    Args:
        batches: of one receiver, none of them :meth:`Batch.after_head`.
        side: where padding stands, the same as for :func:`collate` of each of them.
    """
    if len(batches) == 1:
        return batches[0]
    width = max(batch.ids_BS.shape[1] for batch in batches)
    names = ("ids_BS", "attention_BS", *MASKS)
    moving = (*names, "message_R", "predict_N", "row_N")
    rows: dict[str, list[torch.Tensor]] = {name: [] for name in moving}
    first_row = first_message = 0
    for batch in batches:
        old_width = batch.ids_BS.shape[1]
        missing = width - old_width
        shift = missing if side == "left" else 0
        for name in names:
            rows[name].append(F.pad(getattr(batch, name), (shift, missing - shift)))
        # A flat index of the old B × S grid is a row and a place in it, each of which moves.
        row_N, place_N = batch.predict_N // old_width, batch.predict_N % old_width
        rows["predict_N"].append((first_row + row_N) * width + shift + place_N)
        rows["row_N"].append(first_row + batch.row_N)
        rows["message_R"].append(first_message + batch.message_R)
        first_row += len(batch.ids_BS)
        first_message += int(batch.message_R.max()) + 1
    for name in ("control_R", "target_N", "offset_N"):
        rows[name] = [getattr(batch, name) for batch in batches]
    # A head is common to all rows: it stays one where all batches begin with the same tokens.
    head = min(batch.head for batch in batches)
    heads = {tuple(batch.ids_BS[0, :head].tolist()) for batch in batches}
    if len(heads) > 1:
        head = 0
    joined = {name: torch.cat(parts) for name, parts in rows.items()}
    ends = [batch.end_R for batch in batches if batch.end_R is not None]
    if len(ends) == len(batches):
        joined["end_R"] = torch.cat(ends)
    return Batch(**joined, prefix=batches[0].prefix, head=head)
