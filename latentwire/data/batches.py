"""Shard rows to tensors: the same collation for training and decoding, with and without Ray."""

from __future__ import annotations

import itertools
import random
import re
import zlib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch

from latentwire.config import RunConfig
from latentwire.data import packing
from latentwire.data.positions import PositionCounter
from latentwire.data.teachers import taught_rows, teacher_of
from latentwire.dataset.rows import digest
from latentwire.losses.bundles import Teacher, teacher_reads, weights_at
from latentwire.losses.terms import TERMS
from latentwire.models.pooling import Coarsening
from latentwire.prompts.batch import Batch, collate
from latentwire.prompts.sequences import (
    ANSWER,
    CONTINUE,
    RECONSTRUCT,
    PromptBuilder,
    PromptSequence,
    sender_text,
)
from latentwire.prompts.shown import Reads, shown

CUT_BETWEEN = (0.3, 0.8)
"""The range of places where a text is parted into message and continuation, as shares of its words."""


@dataclass(frozen=True)
class TrainingBatch:
    """The sender texts of some messages, and for each receiver the sequences that read them.

    Rows whose text is the same, as the questions to one context, share a message.
    """

    tokens: Any
    """The texts as the encoder's tokenizer gives them."""
    sequences: dict[str, Batch]
    """Latent prompts with answers; after them, where their losses are on, reconstructions and continuations."""
    message_ids: dict[str, list[list[int]]]
    """Each receiver's own token ids of each message's text, for the alignment."""
    new_M: torch.Tensor
    """True for messages that no earlier part of the step has: they alone are aligned, recited and
    continued."""
    teacher: dict[str, Batch | Teacher]
    """With a KD term: the receiver's predictions on the texts, or, where the rows hold none, text prompts with the
    same answers in the same order for it to read."""


class TrainingCollator:
    """Turns a table of shard rows into one step's micro-batches."""

    def __init__(self, run: RunConfig, builders: Mapping[str, PromptBuilder], encoder: Any) -> None:
        """Collate for ``run``, each receiver's prompts by its builder.

        ``encoder``: its tokenizer and its count of slots are used, its weights are not.
        """
        self.send, self.builders = run.data.send, dict(builders)
        self.training, self.losses = run.training, run.losses
        self.encoder = encoder
        self.stretch, self.cue = run.losses.reconstruction_tokens, run.losses.reconstruction_cue
        self.needs_teacher = bool(teacher_reads(run.losses))
        self.reads = run.prompt.reads
        self.counter: PositionCounter | None = None
        if run.training.positions_per_batch is not None and run.training.accumulation > 1:
            self.counter = PositionCounter(run)

    def __call__(
        self,
        table: pa.Table,
        step: int,
        *,
        own_length: bool = False,
        told: Collection[str] = (),
    ) -> list[TrainingBatch]:
        """Make a step's micro-batches: no more of them than there are rows, none for none.

        Those that would read nothing are left out.

        Args:
            table: shard columns, one row per example.
            step: optimiser steps done so far, which decide how long the messages are.
            own_length: give messages that of ``encoder.tokens_per_latent``, as in an evaluation.
            told: texts (:meth:`texts`) that another worker aligns, recites and continues.
        """
        coarsening: Coarsening | None = None
        length: int | None = None
        if not own_length:
            coarsening, length = self._coarsening(step), self._tokens_per_latent(step)
        # Grows from part to part: what is asked of a text itself is asked once in a step, as it
        # would be if the step were one part.
        seen = set(told)
        parts = self._parted(table, own_length)
        batches = [self._micro(part, coarsening, length, step, seen) for part in parts]
        return [batch for batch in batches if batch is not None]

    def reads_texts(self, step: int) -> bool:
        """Return whether a step asks something of texts themselves, whatever the questions are."""
        aligns = step < self.training.alignment_steps
        return self.reads == "message" and (aligns or bool(self._controls(step) - {ANSWER}))

    def texts(self, table: pa.Table) -> list[str]:
        """Return a name for each text of some rows, once each: the same in every process."""
        if table.num_rows == 0:
            return []
        whole = self._whole(table.to_pydict())
        return [digest(repr(whole[row])) for row in once(whole)[1]]

    def _whole(self, rows: Mapping[str, list]) -> list[list[Any]]:
        """Return what the encoder reads of each row."""
        # Shards for pretrained encoders hold the ids ready.
        return rows.get("encoder_ids") or self.encoder.token_ids(sender_texts(self.send, rows))

    def _parted(self, table: pa.Table, by_rows: bool) -> list[pa.Table]:
        """Part a batch into micro-batches: as many rows each, or as many positions where these fill batches."""
        count = self.training.accumulation
        if self.counter is None or by_rows or table.num_rows == 0:
            # Rounded up: never more than ``count`` parts. range() takes no stride of 0.
            size = max(1, -(-table.num_rows // count))
            return [table.slice(start, size) for start in range(0, table.num_rows, size)]
        units = self.counter.of_table(table)
        parts = packing.parts(units, np.arange(len(units)), count)
        return [table.take(units.rows_of(part)) for part in parts if len(part)]

    def _controls(self, step: int) -> set[int]:
        """Return the sequences that have a weight in this step: answers, and what controls ask for."""
        weights = weights_at(self.losses, max(0, step - self.training.alignment_steps))
        return {TERMS[name].control for name in weights.terms}

    def _coarsening(self, step: int) -> Coarsening | None:
        # Stages go from 0 to 1, counted from the end of the alignment.
        # From 1 on a message has its own length.
        steps = self.training.coarsening_steps
        done = max(0, step - self.training.alignment_steps)
        return Coarsening(self.training.coarsening_from, done / steps) if done < steps else None

    def _tokens_per_latent(self, step: int) -> int | None:
        choices = self.training.tokens_per_latent
        if not choices:
            return None
        # The step alone decides: all workers draw one length, and a resumed run draws it again.
        return random.Random(f"{self.training.seed} length {step}").choice(choices)

    def _micro(
        self,
        table: pa.Table,
        coarsening: Coarsening | None,
        length: int | None,
        step: int,
        seen: set[str],
    ) -> TrainingBatch | None:
        """Return one micro-batch, or ``None`` where it would read nothing.

        ``seen``: the texts of those before it, to which its own are added.
        """
        rows = table.to_pydict()
        whole = self._whole(rows)
        # R rows read M different texts: each text is encoded once.
        message_R, first_M = once(whole)
        texts: dict[str, list] = {}
        for column, values in rows.items():
            texts[column] = [values[row] for row in first_M]
        controls = self._controls(step)
        new = [True] * len(first_M)
        if self.reads_texts(step):
            names = [digest(repr(whole[row])) for row in first_M]
            new = [name not in seen for name in names]
            seen.update(names)
        parted = []
        for m in itertools.compress(range(len(new)), new if CONTINUE in controls else ()):
            if (pieces := cut(texts["context"][m], texts["id"][m])) is not None:
                parted.append(pieces)
        if self.reads == "message" and ANSWER not in controls:
            recites = RECONSTRUCT in controls and any(new)
            if not (recites or parted):
                return None  # texts of other parts, or none that can be continued
        # Messages 0 to M − 1 are those of whole texts; beginnings are messages after them.
        beginnings = self.encoder.token_ids([before for before, _ in parted])
        ids = [whole[row] for row in first_M] + beginnings
        tokens = self.encoder.tokens_of(ids, coarsening, length)
        sequences, message_ids = {}, {}
        for name in self.builders:
            slots = self.encoder.slots(tokens, name)
            if self.reads == "message":
                sequences[name], message_ids[name] = self._read_by(
                    name, rows, message_R, texts, new, parted, slots, step, controls
                )
            else:
                slots_R = [slots[m] for m in message_R]
                prompts = reader_prompts(self.builders[name], name, self.reads, rows, slots_R)
                # Questions to a context are shown the same text, unless it is drawn by the row.
                shared = self.reads in ("text", "truncated") and self.send == "context"
                sequences[name] = collate(prompts, messages=message_R if shared else None)
            sequences[name] = self._taught(sequences[name], table, name)
        return TrainingBatch(
            tokens,
            sequences,
            message_ids,
            torch.tensor(new + [True] * len(beginnings)),
            self._teachers(table, rows) if self.needs_teacher else {},
        )

    def _taught(self, batch: Batch, table: pa.Table, name: str) -> Batch:
        """Mark the rows that a teacher teaches, where it does not teach all of them."""
        right = taught_rows(table, name, self.losses)
        if right is None:
            return batch
        answers = (batch.control_R == ANSWER).tolist()  # one for each row of the table, in order
        # Recitals and continuations are never taught and take no value of ``right``.
        told = iter(right)
        return replace(batch, taught_R=torch.tensor([asks and next(told) for asks in answers]))

    def _read_by(
        self,
        name: str,
        rows: Mapping[str, list],
        message_R: list[int],
        texts: Mapping[str, list],
        new: list[bool],
        parted: list[tuple[str, str]],
        slots: list[int],
        step: int,
        controls: set[int],
    ) -> tuple[Batch, list[list[int]]]:
        """Return the sequences of one receiver, and its own ids of each message's text.

        Args:
            name: the receiver.
            rows: columns of the micro-batch.
            message_R: the message that each row reads.
            texts: the same columns with one row for each message.
            new: the messages that no earlier part of the step has.
            parted: beginnings of texts, which have further messages, and what comes after each.
            slots: soft positions of each message, those of beginnings last.
            step: optimiser steps done so far.
            controls: the sequences that have a weight in it.
        """
        builder = self.builders[name]
        messages: list[int] = []
        sequences: list[PromptSequence] = []
        pieces = zip(texts[f"{name}_context_ids"], texts[f"{name}_question_ids"], strict=True)
        text_ids = [builder.message_ids(context, question) for context, question in pieces]
        # Texts were cut between words; each receiver's tokenizer reads the halves by itself.
        beginnings = [beginning for beginning, _ in parted]
        continuations = [continuation for _, continuation in parted]
        before = builder.tokenize(beginnings, [], [])["context_ids"]
        after = builder.tokenize(continuations, [], [])["context_ids"]
        if ANSWER in controls:  # pretraining on texts alone asks nothing
            # Answers come first, one a row in the rows' order: _taught marks them by it.
            questions, answers = rows[f"{name}_question_ids"], rows[f"{name}_answer_ids"]
            for m, question, answer in zip(message_R, questions, answers, strict=True):
                sequences.append(builder.latent(slots[m], question, answer))
            messages += message_R
        recited = list(enumerate(text_ids)) if RECONSTRUCT in controls else []
        for m, ids in itertools.compress(recited, new):
            stretch, given = self._stretch(ids, f"{texts['id'][m]} {name} {step}")
            sequences.append(builder.controlled(slots[m], RECONSTRUCT, stretch, given))
            messages.append(m)
        # Beginnings are the messages after those of the M whole texts.
        for m, ids in enumerate(after, start=len(text_ids)):
            sequences.append(builder.controlled(slots[m], CONTINUE, ids))
            messages.append(m)
        return collate(sequences, messages=messages), text_ids + before

    def _teachers(self, table: pa.Table, rows: Mapping[str, list]) -> dict[str, Batch | Teacher]:
        """Return each receiver's predictions on the texts where the rows hold them, else the texts for it to read."""
        teachers: dict[str, Batch | Teacher] = {}
        for name in self.builders:
            stored = teacher_of(table, name, self.losses)
            teachers[name] = stored or collate(self._texts(name, rows))
        return teachers

    def _stretch(self, ids: list[int], seed: str) -> tuple[list[int], int]:
        """Return the stretch of a text that is recited, with the tokens given before it, and how many these are."""
        if self.stretch is None or len(ids) <= self.stretch:
            return ids, 0
        # ids[start : start + stretch] are predicted; up to ``cue`` tokens before are only read.
        start = random.Random(seed).randint(0, len(ids) - self.stretch)
        given = min(start, self.cue)
        return ids[start - given : start + self.stretch], given

    def _texts(self, name: str, rows: Mapping[str, list]) -> list[PromptSequence]:
        columns = (rows[f"{name}_{piece}_ids"] for piece in ("context", "question", "answer"))
        return [self.builders[name].text(*pieces) for pieces in zip(*columns, strict=True)]


def reader_prompts(
    builder: PromptBuilder,
    name: str,
    reads: Reads,
    rows: Mapping[str, list],
    slots: list[int],
) -> list[PromptSequence]:
    """Return the prompts of a text reader, with the gold answers as targets.

    Args:
        builder: of the receiver ``name``, with the reader's prefix.
        name: the receiver.
        reads: the part of each context that is shown.
        rows: columns of shard rows.
        slots: soft positions that each row's message would take.
    """
    columns = ("id", f"{name}_context_ids", f"{name}_question_ids", f"{name}_answer_ids")
    prompts = []
    for row, context, question, answer, budget in zip(
        *(rows[column] for column in columns), slots, strict=True
    ):
        # Where a message stands for the question too, so do as many tokens.
        budget -= len(builder.message_ids([], question))
        part = shown(reads, row, context, budget)
        prompts.append(builder.text(part, question, answer, builder.prefix))
    return prompts


def sender_texts(send: Literal["context", "prompt"], rows: Mapping[str, list]) -> list[str]:
    """Return the encoder's input for columns ``context`` and ``question``."""
    return [sender_text(send, c, q) for c, q in zip(rows["context"], rows["question"], strict=True)]


def once(texts: list[Any]) -> tuple[list[int], list[int]]:
    """Return each text's place among the different ones, and the row where each of those stands first."""
    place_of: dict[Any, int] = {}
    first: list[int] = []
    places = []
    for row, parts in enumerate(texts):
        # A text is a list of lines, each of them text or a list of ids; lists cannot be keys.
        key = tuple(part if isinstance(part, str) else tuple(part) for part in parts)
        if key not in place_of:
            place_of[key] = len(first)
            first.append(row)
        places.append(place_of[key])
    return places, first


def cut(text: str, row: str) -> tuple[str, str] | None:
    """Part ``text`` before a word, at a place that the row's id decides; None where it has fewer than 4 words."""
    # Where the white space before each word ends; the first word has none before it.
    words = [match.start() for match in re.finditer(r"\s\S", text)]
    if len(words) < 3:
        return None
    low, high = CUT_BETWEEN
    # crc32 / 2³² is a number in [0, 1), the same in every process; hash() of a text is not.
    share = low + (high - low) * zlib.crc32(row.encode()) / 2**32
    place = words[int(share * len(words))]
    return text[:place], text[place:]


def padding(batches: Iterable[TrainingBatch]) -> tuple[int, int]:
    """Count the positions of the receivers' rows that are padding, and all positions."""
    attention: list[torch.Tensor] = []
    for batch in batches:
        attention += [sequences.attention_BS for sequences in batch.sequences.values()]
    positions = sum(a.numel() for a in attention)
    return positions - sum(int(a.sum()) for a in attention), positions
