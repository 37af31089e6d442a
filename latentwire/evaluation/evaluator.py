"""Score a wire on shard rows: free-running answers and the likelihood of the gold one."""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import torch

from latentwire.data.batches import sender_texts
from latentwire.evaluation.baselines import MESSAGE_MODES, Mode, kept_context
from latentwire.evaluation.conditions import Condition
from latentwire.evaluation.metrics import em_f1
from latentwire.message import Message, from_bytes
from latentwire.model import LatentWire
from latentwire.prompts.sequences import PromptSequence, collate

METRIC_VERSION = 3
"""Raised whenever the same wire would score differently; part of the evaluation pin."""

LATENT_BYTES = 2  # of one entry of a latent that no packet holds, as fp16


@dataclass(frozen=True)
class Prediction:
    """One receiver's answer to one row."""

    id: str
    receiver: str
    condition: str
    """Key of the row of the table: the mode, then budget and width where there are any."""
    mode: Mode
    text: str
    golds: list[str]
    context: str
    context_id: str
    """Identity of the context, by :func:`context_id`: rows that share it are resampled together."""
    question: str
    em: float
    f1: float
    nll: float
    """Negative log-likelihood of the first gold answer and its stop token, nats per token."""
    first_1: float
    """Whether the gold answer's first token is the likeliest one."""
    first_5: float
    """Whether it is among the five likeliest."""
    positions: int
    """Positions of the prompt that the receiver reads."""
    message_positions: int
    """Those of them that stand for the context."""
    bytes: int
    """What had to be sent: UTF-8 bytes of the text shown, or the latents as fp16, or the row's packet."""
    context_bytes: int
    """UTF-8 bytes of the whole context."""
    context_tokens: int
    """The whole context in this receiver's tokens."""
    forward_ms: float
    """Time of one forward over prompt and gold answer, adapter and features included, shared out over its batch like all
    times."""
    encode_ms: float
    """From the sender's token ids until the message is there; with ``bits``, packed and unpacked. 0 without a message."""
    prefill_ms: float
    """From the message, or from the text's token ids, to the answer's first token: adapter, features and receiver."""
    decode_ms: float
    """From there to the answer's end."""
    joint_logp: float | None = None
    """Log-likelihood of this answer and its stop token, summed over all receivers; ``None`` where they were not asked."""

    @property
    def first_token_ms(self) -> float:
        """Time from token ids to the answer's first token, the message's making included."""
        return self.encode_ms + self.prefill_ms


def context_id(context: str) -> str:
    """Return a short hash that names a context."""
    return hashlib.sha256(context.encode("utf-8", "surrogatepass")).hexdigest()[:16]


@dataclass(frozen=True)
class _Rows:
    """A batch of rows and the message that stands for them, where one does."""

    rows: dict[str, list]
    condition: Condition
    message: Message | None
    slots: dict[str, list[int]]
    """Each receiver's soft positions for the message of each row."""
    shown: dict[str, list[list[int]]]
    """Each receiver's tokens of the context that a text mode shows; none of a message."""
    bytes: list[int]
    encode_ms: float


@torch.no_grad()
def predict(
    wire: LatentWire,
    table: pa.Table,
    condition: Condition | Mode,
    rows: range | None = None,
    *,
    joint: bool = False,
    on_rows: Callable[[int], None] | None = None,
) -> Iterator[Prediction]:
    """Predictions of every receiver for rows of ``table`` (shard columns; ``rows``: all), batch by batch.

    ``condition``: what the receivers read; a mode alone has messages of the wire's own length. ``joint``: where receivers
    disagree, each also says how likely it finds every one's answer. Batches begin at multiples of the batch size wherever
    ``rows`` does, so that parts of a table give what the whole gives. ``on_rows`` is told of each batch how many rows it had.
    """
    condition = condition if isinstance(condition, Condition) else Condition(condition)
    wire.interlingua.eval()
    size, rows = wire.run.evaluation.batch_size, rows if rows is not None else range(table.num_rows)
    others = donors(table["context"].to_pylist()) if condition.mode == "shuffled" else None
    for start in range(rows.start, rows.stop, size):
        part = table.slice(start, min(size, rows.stop - start))
        sent = part if others is None else table.take(others[start : start + part.num_rows])
        batch = _encode(wire, part.to_pydict(), sent.select(["context", "question"]).to_pydict(), condition)
        found = [list(_predict_batch(wire, name, batch)) for name in wire.receivers]
        if joint and any(len({own.text for own in row}) > 1 for row in zip(*found, strict=True)):
            found = [_score_answers(wire, batch, own) for own in found]
        if on_rows is not None:
            on_rows(part.num_rows)
        for own in found:
            yield from own


def donors(contexts: list[str]) -> list[int]:
    """For each row, the nearest one before it (from the end on, where there is none) that has another context."""
    found = []
    for row, context in enumerate(contexts):
        other = row - 1
        while contexts[other] == context and other > row - len(contexts):
            other -= 1
        found.append(other % len(contexts))
    return found


def _encode(wire: LatentWire, rows: dict[str, list], sent: dict[str, list], condition: Condition) -> _Rows:
    encoder, z_bytes = wire.interlingua.encoder, LATENT_BYTES * wire.run.encoder.d_z
    tokens = condition.tokenize(encoder, sender_texts(wire.run.data.send, sent))
    if condition.mode not in MESSAGE_MODES:
        slots = {name: encoder.slots(tokens, name) for name in wire.receivers}
        shown = {name: _shown(wire, name, rows, condition.mode, own) for name, own in slots.items()}
        return _Rows(rows, condition, None, slots, shown, [], 0.0)
    began = _now(wire.interlingua.device)
    message = wire.interlingua.encode(tokens)
    if condition.bits is not None:
        message = from_bytes(message.to_bytes(bits=condition.bits)).to(wire.interlingua.device)
    seconds = _now(message.z_BLZ.device) - began
    slots = {name: message.slots(name) for name in wire.receivers}
    size = len(message)
    private = sum(map(len, message.private.values()))
    sizes = (
        [z_bytes * (length + private) for length in message.length_B.tolist()]
        if condition.bits is None
        else [len(message.row(row).to_bytes(bits=condition.bits)) for row in range(size)]
    )
    return _Rows(rows, condition, message, slots, {name: [] for name in slots}, sizes, 1000 * seconds / size)


def _shown(wire: LatentWire, name: str, rows: dict[str, list], mode: Mode, slots: list[int]) -> list[list[int]]:
    columns = (rows["id"], rows[f"{name}_context_ids"], rows[f"{name}_question_ids"], slots)
    return [kept_context(wire, name, mode, *row) for row in zip(*columns, strict=True)]


def _now(device: torch.device) -> float:
    """The time when ``device`` has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _predict_batch(wire: LatentWire, name: str, batch: _Rows) -> Iterator[Prediction]:
    lm, rows, mode, message = wire.receivers[name], batch.rows, batch.condition.mode, batch.message
    count = len(rows["id"])
    asked = _prompts(wire, name, batch, [None] * count)
    answered = _prompts(wire, name, batch, rows[f"{name}_answer_ids"])
    own_ND = _embeddings(wire, name, batch) if mode == "embeddings" else None
    answers, decoded = wire.decode(name, asked, message, own_ND)
    gold = collate(answered).to(lm.device)
    began = _now(lm.device)
    with wire.reading(name, gold, message) as soft_ND:
        judged = lm.score_answers(gold, soft_ND if own_ND is None else own_ND)
    seconds = time.perf_counter() - began
    row_N = gold.row_N.cpu()
    nll_B = torch.zeros(count).index_add(0, row_N, judged.ce_N) / torch.bincount(row_N, minlength=count)
    likelier_B = judged.likelier_N[gold.offset_N.cpu() == 0].tolist()
    sizes = (
        batch.bytes if message else [len(lm.tokenizer.decode(ids).encode()) for ids in _stood_for(wire, name, batch)]
    )
    for i, answer in enumerate(answers):
        em, f1 = em_f1(answer, rows["answers"][i], wire.run.data.dataset)
        yield Prediction(
            id=rows["id"][i], receiver=name, condition=batch.condition.key, mode=mode, text=answer, golds=rows["answers"][i],
            context=rows["context"][i], context_id=context_id(rows["context"][i]), question=rows["question"][i],
            em=em, f1=f1, nll=float(nll_B[i]), first_1=float(likelier_B[i] < 1), first_5=float(likelier_B[i] < 5),
            positions=len(asked[i].ids), message_positions=len(asked[i].message), bytes=sizes[i],
            context_bytes=len(rows["context"][i].encode()), context_tokens=len(rows[f"{name}_context_ids"][i]),
            forward_ms=1000 * seconds / count, encode_ms=batch.encode_ms, prefill_ms=decoded.prefill_ms / count,
            decode_ms=decoded.decode_ms / count,
        )  # fmt: skip


def _score_answers(wire: LatentWire, batch: _Rows, own: list[Prediction]) -> list[Prediction]:
    """One receiver's predictions with the log-likelihood that all receivers together give to its answers."""
    count = len(own)
    total_B = torch.zeros(count, dtype=torch.float64)
    for name, lm in wire.receivers.items():
        ids = wire.builders[name].tokenize([], [], [p.text for p in own])["answer_ids"]
        said = collate(_prompts(wire, name, batch, ids)).to(lm.device)
        own_ND = _embeddings(wire, name, batch) if batch.condition.mode == "embeddings" else None
        with wire.reading(name, said, batch.message) as soft_ND:
            judged = lm.score_answers(said, soft_ND if own_ND is None else own_ND)
        total_B.index_add_(0, said.row_N.cpu(), -judged.ce_N.double())
    return [dataclasses.replace(p, joint_logp=float(logp)) for p, logp in zip(own, total_B, strict=True)]


def _prompts(wire: LatentWire, name: str, batch: _Rows, answers: list[Any]) -> list[PromptSequence]:
    """Prompts to be answered where ``answers`` are ``None``, else with those ids as targets."""
    builder, mode, shown = wire.builders[name], batch.condition.mode, batch.shown[name]
    prompts = []
    for place, question in enumerate(batch.rows[f"{name}_question_ids"]):
        if mode in MESSAGE_MODES:
            prompts.append(builder.latent(batch.slots[name][place], question, answers[place]))
        elif mode == "embeddings":
            prompts.append(builder.latent(len(builder.message_ids(shown[place], question)), question, answers[place]))
        else:
            prompts.append(builder.text(shown[place], question, answers[place]))
    return prompts


def _stood_for(wire: LatentWire, name: str, batch: _Rows) -> list[list[int]]:
    """The tokens of each text prompt that a message would stand for: what had to be sent instead."""
    columns = (batch.shown[name], batch.rows[f"{name}_question_ids"])
    return [wire.builders[name].message_ids(shown, question) for shown, question in zip(*columns, strict=True)]


def _embeddings(wire: LatentWire, name: str, batch: _Rows) -> torch.Tensor:
    """The receiver's own embeddings of what the message stands for: the latent path must read them as text."""
    lm = wire.local_receiver(name)
    rows = _stood_for(wire, name, batch)
    return lm.embed_tokens(torch.tensor([token for row in rows for token in row], device=lm.device))
