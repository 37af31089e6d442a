"""The inputs of a batch: a message, a text, or what is a receiver's own."""

from __future__ import annotations

import itertools
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from latentwire.data.batches import once, sender_texts
from latentwire.evaluation.baselines import MESSAGE_MODES, Mode, kept_context
from latentwire.evaluation.conditions import Condition
from latentwire.evaluation.own_heads import heads_of, own_entries
from latentwire.message import Message, from_bytes
from latentwire.model import LatentWire
from latentwire.models import own_cache
from latentwire.prompts.sequences import PromptSequence

LATENT_BYTES = 2
"""Of one entry of a latent that no packet holds, as fp16."""


@dataclass(frozen=True)
class Inputs:
    """A batch of rows, and the message that stands for them where one does."""

    rows: dict[str, list]
    condition: Condition
    message: Message | None
    slots: dict[str, list[int]]
    """Each receiver's soft positions for the message of each row."""
    shown: dict[str, list[list[int]]]
    """Each receiver's tokens of the context that a text mode shows; none of a message."""
    bytes: list[int]
    encode_ms: float
    message_R: list[int] = field(default_factory=list)
    """The message that each row reads: rows of one text share it; none of a text."""
    caches: dict[str, CutCaches] = field(default_factory=dict)
    """Each receiver's own caches of the texts; none in other modes."""
    own: dict[str, torch.Tensor] = field(default_factory=dict)
    """Each receiver's own keys and values ``[N, E]`` of the texts in the wire's heads, row by row; none in
    other modes."""


@dataclass(frozen=True)
class CutCaches:
    """One receiver's own caches of a batch's texts, cut."""

    kept: list[torch.Tensor]
    """Each row's entries, by :func:`~latentwire.models.own_cache.choose`."""
    positions: list[int]
    """Positions that would have as many entries."""
    ms: float
    """Time to read and recite a text."""


def encode_rows(
    wire: LatentWire, rows: dict[str, list], sent: dict[str, list], condition: Condition
) -> Inputs:
    """Prepare what receivers read under a condition, and time the message's encoding.

    Args:
        wire: the wire.
        rows: the rows that are asked.
        sent: the rows whose texts are sent; others than ``rows`` where messages are shuffled.
        condition: what is read.
    """
    encoder = wire.interlingua.encoder
    texts = sender_texts(wire.run.data.send, sent)
    # Rows of one text share a message: message_R[row] is its number, first_M its first row.
    message_R, first_M = once([[text] for text in texts])
    tokens = condition.tokenize(encoder, [texts[row] for row in first_M])
    if condition.mode not in MESSAGE_MODES:
        by_text = {}
        for name in wire.receivers:
            counts = encoder.slots(tokens, name)
            by_text[name] = wire.interlingua.budgets(name, counts, of_text=True)
        slots = {name: _of_rows(counts, message_R) for name, counts in by_text.items()}
        shown = {name: _shown(wire, name, rows, condition.mode, slots[name]) for name in slots}
        batch = Inputs(rows, condition, None, slots, shown, [], 0.0)
        if condition.mode == "own_cache":
            # They read the batch itself, so it is there first.
            batch.caches.update({name: _cut_caches(wire, name, batch) for name in slots})
        if condition.mode == "own_heads":
            batch.own.update({name: _own_entries(wire, name, batch) for name in slots})
        return batch
    began = now(wire.interlingua.device)
    message = wire.interlingua.encode(tokens)
    if condition.bits is not None:
        # Sent and received: what is read below has lost what the packet's width loses.
        message = from_bytes(message.to_bytes(bits=condition.bits)).to(wire.interlingua.device)
    seconds = now(message.z_BLZ.device) - began
    by_text = {name: wire.slots(message, name) for name in wire.receivers}
    slots = {name: _of_rows(counts, message_R) for name, counts in by_text.items()}
    if condition.bits is None:
        # d_z numbers a latent; private latents, of every receiver, travel too.
        z_bytes = LATENT_BYTES * wire.run.encoder.d_z
        private = sum(map(len, message.private.values()))
        sizes = [z_bytes * (length + private) for length in message.length_B.tolist()]
    else:
        sizes = [len(message.row(row).to_bytes(bits=condition.bits)) for row in range(len(message))]
    sizes, shown = _of_rows(sizes, message_R), {name: [] for name in slots}
    encode_ms = 1000 * seconds / len(message_R)
    return Inputs(rows, condition, message, slots, shown, sizes, encode_ms, message_R)


def _of_rows(values: list[int], message_R: list[int]) -> list[int]:
    """Return each row's value from those of the messages."""
    return [values[message] for message in message_R]


def _shown(
    wire: LatentWire, name: str, rows: dict[str, list], mode: Mode, slots: list[int]
) -> list[list[int]]:
    columns = (rows["id"], rows[f"{name}_context_ids"], rows[f"{name}_question_ids"], slots)
    return [kept_context(wire, name, mode, *row) for row in zip(*columns, strict=True)]


def _cut_caches(wire: LatentWire, name: str, batch: Inputs) -> CutCaches:
    """Let a receiver read and recite a batch's texts, and keep as much as their messages take."""
    lm, texts = wire.local_receiver(name), stood_for(wire, name, batch)
    began = now(lm.device)
    builder = wire.builders[name]
    scores = own_cache.scores(
        lm,
        builder,
        texts,
        lambda recitals: wire.reading(name, recitals, None),
        builder.prefix if batch.condition.tuned else 0,
    )
    # A text that is shorter than its message keeps all of its cache.
    positions = [min(slots, len(ids)) for slots, ids in zip(batch.slots[name], texts, strict=True)]
    entries = [own_cache.choose(*row) for row in zip(scores, positions, strict=True)]
    return CutCaches(entries, positions, 1000 * (now(lm.device) - began) / len(texts))


def _own_entries(wire: LatentWire, name: str, batch: Inputs) -> torch.Tensor:
    """Return a receiver's own keys and values of a batch's texts in the wire's heads, row by row."""
    texts = stood_for(wire, name, batch)
    return torch.cat(own_entries(wire, name, texts, heads_of(wire)[name]))


def with_own_parts(
    wire: LatentWire,
    name: str,
    batch: Inputs,
    prompts: list[PromptSequence],
    side: Literal["right", "left"],
) -> AbstractContextManager[None]:
    """Put what is a receiver's own into its reading, where that is what is read: heads, or a cut cache."""
    if name in batch.own:
        lm = wire.local_receiver(name)
        return lm.heads_at_slots(batch.own[name], heads_of(wire)[name])
    if name in batch.caches:
        return own_cache.cut(wire.local_receiver(name), prompts, batch.caches[name].kept, side)
    return nullcontext()


def now(device: torch.device) -> float:
    """Return the time when ``device`` has done what it was given."""
    # CUDA's calls return before the work is done.
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def messages_read(batch: Inputs, prompts: list[PromptSequence]) -> list[int]:
    """Return the message that each row reads, or the text: rows that are shown the same share it."""
    if batch.message is not None:
        return batch.message_R
    # A receiver's own entries stand for each row's text by itself.
    if batch.own:
        return list(range(len(prompts)))
    # Up to the end of the message's place; the question comes after it, or in it.
    return once([[prompt.ids[: prompt.message.stop]] for prompt in prompts])[0]


def prompts_of(
    wire: LatentWire, name: str, batch: Inputs, answers: list[Any]
) -> list[PromptSequence]:
    """Build a batch's prompts; those with ``answers`` have them as targets, others are open."""
    builder, mode, shown = wire.builders[name], batch.condition.mode, batch.shown[name]
    prompts = []
    for row, question in enumerate(batch.rows[f"{name}_question_ids"]):
        if mode in MESSAGE_MODES:
            prompts.append(builder.latent(batch.slots[name][row], question, answers[row]))
        elif mode == "embeddings":
            # As many slots as the text has tokens, whose embeddings they will hold.
            slots = len(builder.message_ids(shown[row], question))
            prompts.append(builder.latent(slots, question, answers[row], prefix=0))
        elif mode == "own_heads":
            slots = len(builder.message_ids(shown[row], question))
            prompts.append(builder.latent(slots, question, answers[row]))
        else:
            prefix = builder.prefix if batch.condition.tuned else 0
            prompts.append(builder.text(shown[row], question, answers[row], prefix))
    return prompts


def stood_for(wire: LatentWire, name: str, batch: Inputs) -> list[list[int]]:
    """Return the tokens of each text prompt that a message would stand for."""
    pairs = zip(batch.shown[name], batch.rows[f"{name}_question_ids"], strict=True)
    return [wire.builders[name].message_ids(shown, question) for shown, question in pairs]


def embeddings_of(wire: LatentWire, name: str, batch: Inputs) -> torch.Tensor:
    """Embed what the message stands for by the receiver's own table: it must read that as text."""
    lm = wire.local_receiver(name)
    # [N, D], row after row, as collate numbers the slots of a batch.
    tokens = itertools.chain.from_iterable(stood_for(wire, name, batch))
    return lm.embed_tokens(torch.tensor(list(tokens), device=lm.device))
