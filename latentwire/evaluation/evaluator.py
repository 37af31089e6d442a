"""Score a wire on shard rows: free-running answers and the likelihood of the gold one."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import pyarrow as pa
import torch

from latentwire.data.batches import once, sender_texts
from latentwire.evaluation.baselines import MESSAGE_MODES, Mode, kept_context
from latentwire.evaluation.conditions import Condition
from latentwire.evaluation.metrics import em_f1, match
from latentwire.evaluation.own_heads import heads_of, own_entries
from latentwire.message import Message, from_bytes
from latentwire.model import LatentWire
from latentwire.models import own_cache
from latentwire.prefilled import Prefilled
from latentwire.prompts.batch import Batch, collate
from latentwire.prompts.sequences import PromptSequence
from latentwire.receivers.base import AnswerScores

METRIC_VERSION = 3
"""Version of the metrics, raised whenever the same wire would score differently; part of the
protocol hash."""

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
    document: str
    """The document that the context is a part of: an article of SQuAD, say."""
    question: str
    em: float
    f1: float
    match: float
    """1 where a gold answer occurs in the text, by :func:`~latentwire.evaluation.metrics.match`,
    else 0."""
    nll: float
    """Negative log-likelihood of the first gold answer and its stop token, nats per token."""
    first_1: float
    """1 where the gold answer's first token is the likeliest one, else 0."""
    first_5: float
    """1 where it is among the five likeliest, else 0."""
    positions: int
    """Positions of the prompt that the receiver reads; a cut cache, and a message in some heads alone,
    counts as those that have as many entries."""
    message_positions: int
    """Positions of the prompt that stand for the context."""
    bytes: int
    """Bytes that had to be sent: the text shown as UTF-8, the latents as fp16, the row's packet, or
    a cache's keys and values as fp16, without saying which ones they are."""
    context_bytes: int
    """UTF-8 bytes of the whole context."""
    context_tokens: int
    """The whole context in this receiver's tokens."""
    forward_ms: float
    """Time of one forward over prompt and gold answer, adapter and features included. Like all
    times it is shared out over its batch."""
    encode_ms: float
    """Time from the sender's token ids to the message; with ``bits``, packed and unpacked. For a cut
    cache, that of reading and reciting the text; 0 for other texts."""
    prefill_ms: float
    """Time from the message, or the text's token ids, to the answer's first token: adapter,
    features and receiver."""
    decode_ms: float
    """Time from the answer's first token to its end."""
    joint_logp: float | None = None
    """Log-likelihood of this answer and its stop token, summed over all receivers; ``None`` where
    they were not asked."""

    @property
    def first_token_ms(self) -> float:
        """Time from token ids to the answer's first token, the message's encoding included."""
        return self.encode_ms + self.prefill_ms


def context_id(context: str) -> str:
    """Return a short hash that names a context."""
    return hashlib.sha256(context.encode("utf-8", "surrogatepass")).hexdigest()[:16]


@dataclass(frozen=True)
class _Rows:
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
    caches: dict[str, _CutCaches] = field(default_factory=dict)
    """Each receiver's own caches of the texts; none in other modes."""
    own: dict[str, torch.Tensor] = field(default_factory=dict)
    """Each receiver's own keys and values ``[N, E]`` of the texts in the wire's heads, row by row; none in
    other modes."""


@dataclass(frozen=True)
class _CutCaches:
    """What one receiver keeps of its own caches of a batch's texts."""

    kept: list[torch.Tensor]
    """Each row's entries, by :func:`~latentwire.models.own_cache.choose`."""
    positions: list[int]
    """Positions that would have as many entries."""
    ms: float
    """Time to read and recite a text."""


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
    """Yield every receiver's predictions for rows of ``table``, batch by batch.

    Args:
        table: rows with the columns of a shard.
        condition: what the receivers read; a mode alone has messages of the wire's own length.
        rows: which rows; all by default. Batches begin at multiples of the batch size wherever it
            does, so that parts of a table give what the whole gives.
        joint: where receivers disagree, each also says how likely it finds every one's answer.
        on_rows: called after each batch with the number of its rows.

    Raises :class:`~latentwire.models.weights.ReceiverError` where a receiver's own cache is to be
    cut and cannot be.
    """
    condition = condition if isinstance(condition, Condition) else Condition(condition)
    if condition.mode == "own_cache":
        for name in wire.receivers:
            own_cache.check(name, wire.local_receiver(name).lm)
    wire.interlingua.eval()
    size, rows = wire.run.evaluation.batch_size, rows if rows is not None else range(table.num_rows)
    others = donors(table["context"].to_pylist()) if condition.mode == "shuffled" else None
    for start in range(rows.start, rows.stop, size):
        part = table.slice(start, min(size, rows.stop - start))
        sent = part if others is None else table.take(others[start : start + part.num_rows])
        senders = sent.select(["context", "question"]).to_pydict()
        batch = _encode(wire, part.to_pydict(), senders, condition)
        by_receiver = [list(_predict_batch(wire, name, batch)) for name in wire.receivers]
        answers = [
            {prediction.text for prediction in row} for row in zip(*by_receiver, strict=True)
        ]
        if joint and any(len(texts) > 1 for texts in answers):
            by_receiver = [_score_answers(wire, batch, predictions) for predictions in by_receiver]
        if on_rows is not None:
            on_rows(part.num_rows)
        for predictions in by_receiver:
            yield from predictions


def donors(contexts: list[str]) -> list[int]:
    """Return for each row the nearest one before it that has another context.

    Where there is none before it, the search goes on from the end.
    """
    nearest = []
    for row, context in enumerate(contexts):
        other = row - 1  # below 0 it counts from the end
        while contexts[other] == context and other > row - len(contexts):
            other -= 1
        nearest.append(other % len(contexts))
    return nearest


def _encode(
    wire: LatentWire, rows: dict[str, list], sent: dict[str, list], condition: Condition
) -> _Rows:
    encoder = wire.interlingua.encoder
    texts = sender_texts(wire.run.data.send, sent)
    message_R, first_M = once([[text] for text in texts])
    tokens = condition.tokenize(encoder, [texts[row] for row in first_M])
    if condition.mode not in MESSAGE_MODES:
        by_text = {
            name: wire.interlingua.budgets(name, encoder.slots(tokens, name), of_text=True)
            for name in wire.receivers
        }
        slots = {name: [counts[m] for m in message_R] for name, counts in by_text.items()}
        shown = {name: _shown(wire, name, rows, condition.mode, slots[name]) for name in slots}
        batch = _Rows(rows, condition, None, slots, shown, [], 0.0)
        if condition.mode == "own_cache":
            batch.caches.update({name: _cut_caches(wire, name, batch) for name in slots})
        if condition.mode == "own_heads":
            batch.own.update({name: _own_entries(wire, name, batch) for name in slots})
        return batch
    began = _now(wire.interlingua.device)
    message = wire.interlingua.encode(tokens)
    if condition.bits is not None:
        message = from_bytes(message.to_bytes(bits=condition.bits)).to(wire.interlingua.device)
    seconds = _now(message.z_BLZ.device) - began
    by_text = {name: wire.slots(message, name) for name in wire.receivers}
    slots = {name: [counts[m] for m in message_R] for name, counts in by_text.items()}
    if condition.bits is None:
        z_bytes = LATENT_BYTES * wire.run.encoder.d_z
        private = sum(map(len, message.private.values()))
        sizes = [z_bytes * (length + private) for length in message.length_B.tolist()]
    else:
        sizes = [len(message.row(row).to_bytes(bits=condition.bits)) for row in range(len(message))]
    sizes, shown = [sizes[m] for m in message_R], {name: [] for name in slots}
    encode_ms = 1000 * seconds / len(message_R)
    return _Rows(rows, condition, message, slots, shown, sizes, encode_ms, message_R)


def _shown(
    wire: LatentWire, name: str, rows: dict[str, list], mode: Mode, slots: list[int]
) -> list[list[int]]:
    columns = (rows["id"], rows[f"{name}_context_ids"], rows[f"{name}_question_ids"], slots)
    return [kept_context(wire, name, mode, *row) for row in zip(*columns, strict=True)]


def _cut_caches(wire: LatentWire, name: str, batch: _Rows) -> _CutCaches:
    """Let a receiver read and recite a batch's texts, and keep as much as their messages take."""
    lm, texts = wire.local_receiver(name), _stood_for(wire, name, batch)
    began = _now(lm.device)
    builder = wire.builders[name]
    scores = own_cache.scores(
        lm,
        builder,
        texts,
        lambda recitals: wire.reading(name, recitals, None),
        builder.prefix if batch.condition.tuned else 0,
    )
    positions = [min(slots, len(ids)) for slots, ids in zip(batch.slots[name], texts, strict=True)]
    kept = [own_cache.choose(*row) for row in zip(scores, positions, strict=True)]
    return _CutCaches(kept, positions, 1000 * (_now(lm.device) - began) / len(texts))


def _own_entries(wire: LatentWire, name: str, batch: _Rows) -> torch.Tensor:
    """Return a receiver's own keys and values of a batch's texts in the wire's heads, row by row."""
    texts = _stood_for(wire, name, batch)
    return torch.cat(own_entries(wire, name, texts, heads_of(wire)[name]))


def _put(
    wire: LatentWire,
    name: str,
    batch: _Rows,
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


def _now(device: torch.device) -> float:
    """Return the time when ``device`` has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _predict_batch(wire: LatentWire, name: str, batch: _Rows) -> Iterator[Prediction]:
    lm, rows, mode, message = wire.receivers[name], batch.rows, batch.condition.mode, batch.message
    count = len(rows["id"])
    prompts = _prompts(wire, name, batch, [None] * count)
    answered = _prompts(wire, name, batch, rows[f"{name}_answer_ids"])
    messages, began = _messages(batch, prompts), _now(lm.device)
    begun = _begin(wire, name, batch, prompts, messages)
    shared_seconds = 0.0 if begun is None else _now(lm.device) - began
    if begun is not None:
        answers, decoded = begun.decode(prompts, messages)
    else:
        text_ND = _embeddings(wire, name, batch) if mode == "embeddings" else None
        with _put(wire, name, batch, prompts, "left"):
            answers, decoded = wire.decode(name, prompts, message, text_ND, messages=messages)
    scores, gold, seconds = _score(wire, name, batch, answered, messages, begun)
    prefill_ms, seconds = 1000 * shared_seconds + decoded.prefill_ms, shared_seconds + seconds
    # The mean over each answer's tokens: N supervised positions, row_N[n] the row of one.
    row_N = gold.row_N.cpu()
    total_B = torch.zeros(count).index_add(0, row_N, scores.ce_N)
    nll_B = total_B / torch.bincount(row_N, minlength=count)
    # Tokens likelier than the gold answer's first one.
    likelier_B = scores.likelier_N[gold.offset_N.cpu() == 0].tolist()
    sizes = batch.bytes
    if message is None:
        sizes = [len(lm.tokenizer.decode(ids).encode()) for ids in _stood_for(wire, name, batch)]
    message_positions = [len(prompt.message) for prompt in prompts]
    if message is not None or name in batch.own:
        message_positions = wire.interlingua.budgets(name, message_positions)
    encode_ms = batch.encode_ms
    if caches := batch.caches.get(name):
        entry_bytes = own_cache.entry_bytes(wire.local_receiver(name))
        sizes = [entry_bytes * int(kept_LHT.sum()) for kept_LHT in caches.kept]
        message_positions, encode_ms = caches.positions, caches.ms
    if name in batch.own:
        entry_bytes = 2 * batch.own[name].shape[1]  # as fp16
        sizes = [entry_bytes * len(prompt.message) for prompt in prompts]
    for i, answer in enumerate(answers):
        em, f1 = em_f1(answer, rows["answers"][i], wire.run.data.dataset)
        yield Prediction(
            id=rows["id"][i],
            receiver=name,
            condition=batch.condition.key,
            mode=mode,
            text=answer,
            golds=rows["answers"][i],
            context=rows["context"][i],
            context_id=context_id(rows["context"][i]),
            document=rows["document"][i],
            question=rows["question"][i],
            em=em,
            f1=f1,
            match=match(answer, rows["answers"][i]),
            nll=float(nll_B[i]),
            first_1=float(likelier_B[i] < 1),
            first_5=float(likelier_B[i] < 5),
            positions=len(prompts[i].ids) - len(prompts[i].message) + message_positions[i],
            message_positions=message_positions[i],
            bytes=sizes[i],
            context_bytes=len(rows["context"][i].encode()),
            context_tokens=len(rows[f"{name}_context_ids"][i]),
            forward_ms=1000 * seconds / count,
            encode_ms=encode_ms,
            prefill_ms=prefill_ms / count,
            decode_ms=decoded.decode_ms / count,
        )


def _messages(batch: _Rows, prompts: list[PromptSequence]) -> list[int]:
    """Return the message that each row reads, or the text: rows that are shown the same share it."""
    if batch.message is not None:
        return batch.message_R
    if batch.own:  # a receiver's own entries stand for each row's text by itself
        return list(range(len(prompts)))
    return once([[prompt.ids[: prompt.message.stop]] for prompt in prompts])[0]


def _begin(
    wire: LatentWire,
    name: str,
    batch: _Rows,
    prompts: list[PromptSequence],
    messages: list[int],
) -> Prefilled | None:
    """Read what rows share once, where they do and nothing else is put into each of them."""
    if batch.condition.mode in ("embeddings", "own_cache", "own_heads"):
        return None
    return wire.begin(name, prompts, messages, batch.message)


def _score(
    wire: LatentWire,
    name: str,
    batch: _Rows,
    answered: list[PromptSequence],
    messages: list[int],
    begun: Prefilled | None,
) -> tuple[AnswerScores, Batch, float]:
    """Score the targets of prompts; return the scores, the sequences and the seconds that it took.

    ``begun``: what they begin with, where it has been read.
    """
    lm = wire.receivers[name]
    began = _now(lm.device)
    if begun is not None:
        scores, gold = begun.score(answered, messages)
        return scores, gold, time.perf_counter() - began
    gold = collate(answered, messages=messages).to(lm.device)
    text_ND = _embeddings(wire, name, batch) if batch.condition.mode == "embeddings" else None
    began = _now(lm.device)
    with (
        _put(wire, name, batch, answered, "right"),
        wire.reading(name, gold, batch.message) as soft_ND,
    ):
        scores = lm.score_answers(gold, soft_ND if text_ND is None else text_ND)
    return scores, gold, time.perf_counter() - began


def _score_answers(
    wire: LatentWire, batch: _Rows, predictions: list[Prediction]
) -> list[Prediction]:
    """Add to one receiver's predictions the log-likelihood that all receivers give to them."""
    total_B = torch.zeros(len(predictions), dtype=torch.float64)
    texts = [prediction.text for prediction in predictions]
    for name in wire.receivers:
        ids = wire.builders[name].tokenize([], [], texts)["answer_ids"]
        prompts = _prompts(wire, name, batch, ids)
        messages = _messages(batch, prompts)
        begun = _begin(wire, name, batch, prompts, messages)
        scores, answered, _ = _score(wire, name, batch, prompts, messages, begun)
        total_B.index_add_(0, answered.row_N.cpu(), -scores.ce_N.double())
    return [
        dataclasses.replace(prediction, joint_logp=float(logp))
        for prediction, logp in zip(predictions, total_B, strict=True)
    ]


def _prompts(wire: LatentWire, name: str, batch: _Rows, answers: list[Any]) -> list[PromptSequence]:
    """Build a batch's prompts; those with ``answers`` have them as targets, others are open."""
    builder, mode, shown = wire.builders[name], batch.condition.mode, batch.shown[name]
    prompts = []
    for row, question in enumerate(batch.rows[f"{name}_question_ids"]):
        if mode in MESSAGE_MODES:
            prompts.append(builder.latent(batch.slots[name][row], question, answers[row]))
        elif mode == "embeddings":
            slots = len(builder.message_ids(shown[row], question))
            prompts.append(builder.latent(slots, question, answers[row], prefix=0))
        elif mode == "own_heads":
            slots = len(builder.message_ids(shown[row], question))
            prompts.append(builder.latent(slots, question, answers[row]))
        else:
            prefix = builder.prefix if batch.condition.tuned else 0
            prompts.append(builder.text(shown[row], question, answers[row], prefix))
    return prompts


def _stood_for(wire: LatentWire, name: str, batch: _Rows) -> list[list[int]]:
    """Return the tokens of each text prompt that a message would stand for."""
    pairs = zip(batch.shown[name], batch.rows[f"{name}_question_ids"], strict=True)
    return [wire.builders[name].message_ids(shown, question) for shown, question in pairs]


def _embeddings(wire: LatentWire, name: str, batch: _Rows) -> torch.Tensor:
    """Embed what the message stands for by the receiver's own table: it must read that as text."""
    lm = wire.local_receiver(name)
    tokens = itertools.chain.from_iterable(_stood_for(wire, name, batch))
    return lm.embed_tokens(torch.tensor(list(tokens), device=lm.device))
