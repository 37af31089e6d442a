"""The one place where text becomes a token sequence.

Training, teacher, evaluation and decoding all read sequences from here. A prompt is a row of pieces, each tokenised on
its own (:mod:`latentwire.prompts.pieces`) and joined as ids::

    [BOS] head | prefix | context or soft slots | mid | question | tail | anchor | answer | stop

A text prompt puts the context's tokens where a latent prompt has its soft slots; every other position is equal token
by token, because it *is* the same piece. The prefix is soft too, and the same in every row: most prompts have none.
With ``send: prompt`` the message replaces ``context | mid | question``.
Nothing outside this file counts positions: the index maps of :class:`PromptSequence` and :class:`Batch` say where things are.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch.nn import functional as F

from latentwire.config import PromptConfig, ReceiverConfig
from latentwire.prompts import templates
from latentwire.prompts.pieces import Pieces
from latentwire.prompts.templates import PromptError as PromptError

PROMPT_VERSION = 2
"""Raised whenever the same text would give other ids or positions; part of every shard's and evaluation's hash."""

ANSWER, RECONSTRUCT, CONTINUE = -1, 0, 1
"""A row's targets: the answer, or the text that a control embedding right after the message asks for, which is the message's own
or what follows it. The numbers of controls are their places among a receiver's control embeddings."""
CONTROLS = (RECONSTRUCT, CONTINUE)

SLOT_ID = (
    0  # stands at soft slots, whose embedding is replaced; any id inside the vocabulary will do
)

MASKS = ("prefix_BS", "latents_BS", "control_BS", "question_BS")
"""Fields of a batch that say where its parts stand."""

RECITE = "\n\nRepeat the previous context exactly."
RECITE_FROM = "\n\nRepeat the part of the previous context exactly, starting with"
RECITE_CUE = 8
"""How a text is asked for, or a later part of it, by as many tokens before that (KVzip, arXiv 2505.23416)."""

_PROBE_ANSWERS = ("Paris", "the red house", "1912", "$5", "(a)", '"so"', "Ärzte", "-3")


@dataclass(frozen=True)
class PromptSequence:
    """Token ids of one prompt and where its parts stand (half-open ranges of positions)."""

    ids: list[int]
    bos: int | None
    message: range
    """Positions of the sender's text or, in a latent prompt, of the soft slots."""
    question: range
    anchor: range
    answer: range
    stop: int | None
    """Position of the stop token; ``None`` where there is none."""
    supervised: range
    """Positions that are targets: answer and stop, or the reconstructed message; empty in a prompt to be answered."""
    soft: bool
    """True where ``message`` is to be filled with a soft prompt."""
    control: int = ANSWER
    """The one of :data:`CONTROLS` right after the message; :data:`ANSWER` where there is none."""
    prefix: range = range(0)
    """Positions of the constant vectors right before the message; empty where there are none."""

    @property
    def head(self) -> int:
        """Positions before everything that is soft or that changes from row to row."""
        return self.message.start - len(self.prefix)


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
    """Where each row goes on from a sequence of another batch, which ends at ``end_R``: the row of it."""
    taught_R: torch.Tensor | None = None
    """True where a teacher's words are compared with a row's answer; ``None``: wherever there is one."""
    prefix: int = 0
    """Positions of the prefix in each row."""
    head: int = 0
    """Leading positions before anything that changes from row to row or is predicted: the same tokens in all rows. 0 in
    rows that are padded to the left."""
    head_H: torch.Tensor | None = None
    """Ids of a head that was taken off the rows; ``attention_BS`` still counts it, all other positions do not."""

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
        tensors: dict[str, Any] = {
            name: value for name, value in vars(self).items() if isinstance(value, torch.Tensor)
        }
        return replace(
            self, **{name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()}
        )

    def after_head(self) -> Batch:
        """Return the rows without the tokens that all of them begin with, which go to ``head_H``."""
        width, names = self.ids_BS.shape[1], ("ids_BS", *MASKS)
        rows: dict[str, Any] = {name: getattr(self, name)[:, self.head :] for name in names}
        row_N, place_N = self.predict_N // width, self.predict_N % width
        return replace(
            self,
            **rows,
            predict_N=row_N * (width - self.head) + place_N - self.head,
            head=0,
            head_H=self.ids_BS[0, : self.head],
        )

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
        first_M = torch.full_like(messages, len(past_R)).scatter_reduce(
            0, past_R, torch.arange(len(past_R)), "amin"
        )
        end_M = self.end_R[first_M]
        place_S = torch.arange(int(end_M.max()))
        within_MS = place_S < end_M[:, None]
        nothing = torch.zeros(0, dtype=torch.long)
        masks = {
            name: getattr(self, name)[first_M][:, : len(place_S)] & within_MS for name in MASKS
        }
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
        masks: dict[str, Any] = {
            name: getattr(self, name).gather(1, from_RT) & kept_RT for name in MASKS
        }
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


def sender_text(send: Literal["context", "prompt"], context: str, question: str) -> str:
    """Return the text that the encoder compresses. It knows no receiver: one message serves all of them."""
    return context if send == "context" else f"{context}\nQuestion: {question}"


class PromptBuilder:
    """Builds sequences for one receiver under one prompt configuration."""

    def __init__(
        self,
        tokenizer: Any,
        receiver: ReceiverConfig,
        prompt: PromptConfig,
        send: Literal["context", "prompt"],
        prefix: int = 0,
    ) -> None:
        """``prefix``: constant soft positions before every message."""
        self.tokenizer, self.receiver, self.send = tokenizer, receiver, send
        self.prefix = prefix
        self.anchor_text = prompt.anchor.rstrip()
        self.answer_lead = prompt.anchor[len(self.anchor_text) :]
        self.chat = templates.is_chat(tokenizer, receiver)
        """True where a prompt is a turn of a chat, whose answer ends with the turn. Else it is a list of
        lines, whose answer is one."""
        text = templates.around(tokenizer, receiver)
        self._mid_text, self._tail_text = text.mid.rstrip(" "), text.tail
        # It belongs to the question's first word, as in running text.
        self._question_lead = text.mid[len(self._mid_text) :]
        self._pieces = Pieces(tokenizer, receiver.name)
        bos_id = tokenizer.bos_token_id
        self.head_ids = self._pieces.first(text.head)
        self.bos: int | None = 0 if self._wants_bos(text.head) else None
        if self.bos == 0 and self.head_ids[:1] != [bos_id]:
            self.head_ids = [bos_id, *self.head_ids]
        if receiver.bos == "no" and bos_id is not None and self.head_ids[:1] == [bos_id]:
            self.head_ids = self.head_ids[1:]  # the template's own
        if self.head_ids.count(bos_id) > 1 and self.bos == 0 and not self.chat:
            raise PromptError(
                f"BOS must stand once, at position 0, got {self.head_ids.count(bos_id)} in the head of {receiver.name}"
            )
        self.mid_ids = self._pieces.following(self._mid_text)
        self.tail_ids = self._pieces.following(self._tail_text)
        self.anchor_ids = self._pieces.after(self._tail_text, self.anchor_text)
        closing = self._tail_text + self.anchor_text
        self._answers_anew = self._pieces.begins_anew(closing, f"{self.answer_lead}a")
        self._before_answer = (
            closing if self._pieces.marks_beginnings else self.anchor_text or self._tail_text
        )
        self.newline_ids = self._pieces.following("\n")
        self.stop_id, self.stop_ids = self._stops()
        self._probe()

    # ------------------------------------------------------------------------------------------------- tokenising

    def tokenize(
        self, contexts: list[str], questions: list[str], answers: list[str]
    ) -> dict[str, list[list[int]]]:
        """Return the ids of the three pieces that change from row to row, for a column of rows."""
        return {
            "context_ids": self._pieces.of_user(contexts),
            "question_ids": self._pieces.of_user(
                [self._question_lead + question for question in questions]
            ),
            "answer_ids": self._pieces.of_user(
                [self.answer_lead + answer for answer in answers], anew=self._answers_anew
            ),
        }

    def check_boundaries(self, answers: list[str], answer_ids: list[list[int]]) -> list[bool]:
        """Return for each answer whether anchor and answer, tokenised as one text, give the same ids as joined."""
        before_ids = self._template_ids(self._before_answer)
        joint = self._pieces.all_following(
            [self._before_answer + self.answer_lead + answer for answer in answers]
        )
        return [whole == before_ids + ids for whole, ids in zip(joint, answer_ids, strict=True)]

    def answer_of(self, text: str) -> str:
        """Return the answer in decoded text: a chat's whole turn, a plain continuation's first line.

        Some tokenizers join a plain answer's newline with a punctuation mark, which is no stop token
        then.
        """
        return text.strip() if self.chat else text.strip().split("\n")[0].strip()

    # --------------------------------------------------------------------------------------------------- sequences

    def text(
        self,
        context_ids: list[int],
        question_ids: list[int],
        answer_ids: list[int] | None = None,
        prefix: int = 0,
    ) -> PromptSequence:
        """Return the full-text prompt; an empty context makes it the closed book. Answer and stop follow where given.

        ``prefix``: constant soft positions before the text, for a text reader; others read it as it is.
        """
        message = self.message_ids(context_ids, question_ids)
        mid, question = ([], []) if self.send == "prompt" else (self.mid_ids, question_ids)
        return self._join(message, mid, question, answer_ids, soft=False, prefix=prefix)

    def text_alone(self, message_ids: list[int], prefix: int = 0) -> PromptSequence:
        """Return a text prompt up to the text's end, with nothing to predict.

        Args:
            message_ids: the text, where a message would stand.
            prefix: constant soft positions before it.
        """
        return self._begun(message_ids, prefix, soft=False)

    def message_alone(self, slots: int) -> PromptSequence:
        """Return a latent prompt up to its last slot, with nothing to predict."""
        return self._begun([SLOT_ID] * slots, self.prefix, soft=True)

    def _begun(self, message_ids: list[int], prefix: int, soft: bool) -> PromptSequence:
        start = len(self.head_ids) + prefix
        end = start + len(message_ids)
        nowhere = range(end, end)
        return PromptSequence(
            ids=[*self.head_ids, *[SLOT_ID] * prefix, *message_ids],
            bos=self.bos,
            message=range(start, end),
            question=nowhere,
            anchor=nowhere,
            answer=nowhere,
            stop=None,
            supervised=nowhere,
            soft=soft,
            prefix=range(start - prefix, start),
        )

    def message_ids(self, context_ids: list[int], question_ids: list[int]) -> list[int]:
        """Return the tokens that a latent prompt's slots stand for."""
        return (
            [*context_ids, *self.mid_ids, *question_ids] if self.send == "prompt" else context_ids
        )

    def latent(
        self,
        slots: int,
        question_ids: list[int],
        answer_ids: list[int] | None = None,
        prefix: int | None = None,
    ) -> PromptSequence:
        """Return the same prompt with ``slots`` soft positions in place of the message.

        ``prefix``: constant soft positions before them; ``None``: as many as the wire has.
        """
        mid, question = ([], []) if self.send == "prompt" else (self.mid_ids, question_ids)
        prefix = self.prefix if prefix is None else prefix
        return self._join([SLOT_ID] * slots, mid, question, answer_ids, soft=True, prefix=prefix)

    def controlled(
        self, slots: int, control: int, text_ids: list[int], given: int = 0
    ) -> PromptSequence:
        """Return soft slots, a control embedding, and a text as targets.

        Args:
            slots: soft positions.
            control: :data:`RECONSTRUCT`, for the message's own text, or :data:`CONTINUE`, for what follows it.
            text_ids: that text.
            given: its first tokens that are read and not predicted.
        """
        start = len(self.head_ids) + self.prefix
        text = start + slots + 1
        nowhere = range(text, text)
        return PromptSequence(
            ids=[*self.head_ids, *[SLOT_ID] * (self.prefix + slots + 1), *text_ids],
            bos=self.bos,
            message=range(start, start + slots),
            question=nowhere,
            anchor=nowhere,
            answer=nowhere,
            stop=None,
            supervised=range(text + given, text + len(text_ids)),
            soft=True,
            control=control,
            prefix=range(start - self.prefix, start),
        )

    def recital(self, message_ids: list[int], part: range, prefix: int = 0) -> PromptSequence:
        """Return a text, a request to repeat some of its tokens, and those tokens as targets.

        Args:
            message_ids: the text, where a message would stand.
            part: the tokens to be repeated.
            prefix: constant soft positions before the text.
        """
        start = len(self.head_ids) + prefix
        end = start + len(message_ids)
        nowhere = range(end, end)
        asked = self._template_ids(RECITE if part.start == 0 else RECITE_FROM)
        cue = message_ids[max(0, part.start - RECITE_CUE) : part.start]
        said = message_ids[part.start : part.stop]
        before = [*self.head_ids, *[SLOT_ID] * prefix, *message_ids, *asked, *cue]
        ids = [*before, *self.tail_ids, *said]
        return PromptSequence(
            ids=ids,
            bos=self.bos,
            message=range(start, end),
            question=nowhere,
            anchor=nowhere,
            answer=nowhere,
            stop=None,
            supervised=range(len(ids) - len(said), len(ids)),
            soft=False,
            prefix=range(start - prefix, start),
        )

    def _join(
        self,
        message: list[int],
        mid: list[int],
        question: list[int],
        answer: list[int] | None,
        *,
        soft: bool,
        prefix: int,
    ) -> PromptSequence:
        start = len(self.head_ids) + prefix
        question_at = start + len(message) + len(mid)
        anchor_at = question_at + len(question) + len(self.tail_ids)
        answer_at = anchor_at + len(self.anchor_ids)
        before = [*self.head_ids, *[SLOT_ID] * prefix, *message, *mid, *question]
        ids = [*before, *self.tail_ids, *self.anchor_ids]
        if answer is not None:
            ids += [*answer, self.stop_id]
        return PromptSequence(
            ids=ids,
            bos=self.bos,
            message=range(start, start + len(message)),
            question=range(question_at, question_at + len(question)),
            anchor=range(anchor_at, answer_at),
            answer=range(answer_at, answer_at + len(answer or [])),
            stop=None if answer is None else answer_at + len(answer),
            supervised=range(answer_at, len(ids)) if answer is not None else range(0),
            soft=soft,
            prefix=range(start - prefix, start),
        )

    # ----------------------------------------------------------------------------------------------------- template

    def _wants_bos(self, head: str) -> bool:
        token = self.tokenizer.bos_token
        if self.receiver.bos == "yes" and token is None:
            raise PromptError(
                f"bos: yes needs a tokenizer with a BOS token, {self.receiver.model} has none"
            )
        if self.receiver.bos != "auto" or token is None:
            return self.receiver.bos == "yes"
        if self.chat:
            return head.startswith(token)
        return self.tokenizer("a").input_ids[:1] == [self.tokenizer.bos_token_id]

    def _stops(self) -> tuple[int, tuple[int, ...]]:
        """Return the supervised stop token, and every token that ends decoding.

        A plain prompt is a list of lines, so its answer ends with the line; a chat turn ends with the special token that the
        template writes after it, which for some models is not EOS.
        """
        eos = self.tokenizer.eos_token_id
        if eos is None:
            raise PromptError(
                f"the tokenizer of {self.receiver.model} must have an EOS token, it has none"
            )
        if self.chat:
            end = self._turn_end()
            stop = eos if end is None else end
            return stop, tuple(dict.fromkeys((stop, eos)))
        if len(self.newline_ids) != 1:
            raise PromptError(
                f"template: plain needs a newline that is one token, {self.receiver.model} gives {self.newline_ids}"
            )
        return self.newline_ids[0], (self.newline_ids[0], eos)

    def _turn_end(self) -> int | None:
        """Return the special token right after an assistant's turn; None where the template writes none."""
        after = templates.after_answer(self.tokenizer, self.receiver)
        ids = self._template_ids(after)[:1]
        return ids[0] if ids and not self.tokenizer.decode(ids, skip_special_tokens=True) else None

    def _probe(self) -> None:
        """Raise :class:`PromptError` for an anchor that merges with answers, before any row is read: try one of every kind."""
        answers = list(_PROBE_ANSWERS)
        ids = self.tokenize([], [], answers)["answer_ids"]
        for answer, good in zip(answers, self.check_boundaries(answers, ids), strict=True):
            if not good:
                raise PromptError(
                    f"anchor and answer must tokenise alike alone and joined, {self.anchor_text + self.answer_lead!r} "
                    f"+ {answer!r} does not for {self.receiver.name}; end the anchor with a space or a newline"
                )

    def _template_ids(self, text: str) -> list[int]:
        """Return the ids of our own text behind other text."""
        return self._pieces.following(text)


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
            predict.append(index * width + shift + position - 1)
            target.append(row.ids[position])
            offset.append(place)
            row_of.append(index)
    firsts = [
        row.supervised[0] - 1 for row in rows if row.supervised
    ]  # the positions that predict a row's first target
    head = min([*(row.head for row in rows), *firsts]) if side == "right" else 0
    return Batch(
        ids_BS=ids_BS,
        attention_BS=attention_BS,
        prefix_BS=prefix_BS,
        latents_BS=latents_BS,
        control_BS=control_BS,
        question_BS=question_BS,
        message_R=torch.tensor(
            list(range(len(rows))) if messages is None else messages, dtype=torch.long
        ),
        control_R=torch.tensor([row.control for row in rows], dtype=torch.long),
        predict_N=torch.tensor(predict, dtype=torch.long),
        target_N=torch.tensor(target, dtype=torch.long),
        offset_N=torch.tensor(offset, dtype=torch.long),
        row_N=torch.tensor(row_of, dtype=torch.long),
        end_R=torch.tensor([row.message.stop for row in rows]) if side == "right" else None,
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
    rows: dict[str, list[torch.Tensor]] = {
        name: [] for name in (*names, "message_R", "predict_N", "row_N")
    }
    first_row = first_message = 0
    for batch in batches:
        missing = width - batch.ids_BS.shape[1]
        shift = missing if side == "left" else 0
        for name in names:
            rows[name].append(F.pad(getattr(batch, name), (shift, missing - shift)))
        # A flat index of the old B × S grid is a row and a place in it, each of which moves.
        row_N, place_N = (
            batch.predict_N // batch.ids_BS.shape[1],
            batch.predict_N % batch.ids_BS.shape[1],
        )
        rows["predict_N"].append((first_row + row_N) * width + shift + place_N)
        rows["row_N"].append(first_row + batch.row_N)
        rows["message_R"].append(first_message + batch.message_R)
        first_row += len(batch.ids_BS)
        first_message += int(batch.message_R.max()) + 1
    for name in ("control_R", "target_N", "offset_N"):
        rows[name] = [getattr(batch, name) for batch in batches]
    head = min(batch.head for batch in batches)
    heads = {tuple(batch.ids_BS[0, :head].tolist()) for batch in batches}
    joined = {name: torch.cat(parts) for name, parts in rows.items()}
    return Batch(**joined, prefix=batches[0].prefix, head=head if len(heads) == 1 else 0)
