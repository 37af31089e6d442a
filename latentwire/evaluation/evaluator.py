"""Score a wire on shard rows: free-running answers and the likelihood of the gold one."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence

import pyarrow as pa
import torch

from latentwire.evaluation.baselines import Mode
from latentwire.evaluation.conditions import Condition
from latentwire.evaluation.inputs import (
    Inputs,
    embeddings_of,
    encode_rows,
    messages_read,
    now,
    prompts_of,
    stood_for,
    with_own_parts,
)
from latentwire.evaluation.metrics import em_f1, match
from latentwire.evaluation.predictions import Prediction, context_id
from latentwire.model import LatentWire
from latentwire.models import own_cache
from latentwire.prefilled import Prefilled
from latentwire.prompts.batch import Batch, collate
from latentwire.prompts.sequences import PromptSequence
from latentwire.receivers.base import AnswerScores

METRIC_VERSION = 3
"""Version of the metrics, raised whenever the same wire would score differently; part of the
protocol hash."""


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

    Raises :class:`~latentwire.pretrained.weights.ReceiverError` where a receiver's own cache is to be
    cut and cannot be.
    """
    condition = condition if isinstance(condition, Condition) else Condition(condition)
    if condition.mode == "own_cache":
        for name in wire.receivers:
            own_cache.check(name, wire.local_receiver(name).lm)
    wire.interlingua.eval()
    size = wire.run.evaluation.batch_size
    rows = range(table.num_rows) if rows is None else rows
    # Of the whole table, whatever part of it is scored here: every worker has the same donors.
    others = donors(table["context"].to_pylist()) if condition.mode == "shuffled" else None
    for start in range(rows.start, rows.stop, size):
        part = table.slice(start, min(size, rows.stop - start))
        sent = part if others is None else table.take(others[start : start + part.num_rows])
        senders = sent.select(["context", "question"]).to_pydict()
        batch = encode_rows(wire, part.to_pydict(), senders, condition)
        by_receiver = [list(_predict_batch(wire, name, batch)) for name in wire.receivers]
        # Where all say the same, nothing has to be chosen and the passes are saved.
        if joint and any(map(_disagree, zip(*by_receiver, strict=True))):
            by_receiver = [_score_answers(wire, batch, predictions) for predictions in by_receiver]
        if on_rows is not None:
            on_rows(part.num_rows)
        for predictions in by_receiver:
            yield from predictions


def _disagree(row: Sequence[Prediction]) -> bool:
    """Return whether several receivers' answers to one row differ."""
    return len({prediction.text for prediction in row}) > 1


def donors(contexts: list[str]) -> list[int]:
    """Return for each row the nearest one before it that has another context.

    Where there is none before it, the search goes on from the end.
    """
    nearest = []
    for row, context in enumerate(contexts):
        # Below 0 it counts from the end, as a list's index does.
        other = row - 1
        # Once around at most: where all contexts are one, a row is its own donor.
        while contexts[other] == context and other > row - len(contexts):
            other -= 1
        nearest.append(other % len(contexts))
    return nearest


def _predict_batch(wire: LatentWire, name: str, batch: Inputs) -> Iterator[Prediction]:
    lm, rows, mode, message = wire.receivers[name], batch.rows, batch.condition.mode, batch.message
    count = len(rows["id"])
    prompts = prompts_of(wire, name, batch, [None] * count)
    answered = prompts_of(wire, name, batch, rows[f"{name}_answer_ids"])
    # What rows share is read once, for the answers and for the gold ones' scores.
    messages, began = messages_read(batch, prompts), now(lm.device)
    begun = _begin(wire, name, batch, prompts, messages)
    shared_seconds = 0.0 if begun is None else now(lm.device) - began
    if begun is not None:
        answers, decoded = begun.decode(prompts, messages)
    else:
        text_ND = embeddings_of(wire, name, batch) if mode == "embeddings" else None
        with with_own_parts(wire, name, batch, prompts, "left"):
            answers, decoded = wire.decode(name, prompts, message, text_ND, messages=messages)
    scores, gold, seconds = _score(wire, name, batch, answered, messages, begun)
    prefill_ms, seconds = 1000 * shared_seconds + decoded.prefill_ms, shared_seconds + seconds
    # The mean over each answer's tokens: N supervised positions, row_N[n] the row of one.
    row_N = gold.row_N.cpu()
    # total_B[b] = Σ ce_N[n] over n with row_N[n] = b
    total_B = torch.zeros(count).index_add(0, row_N, scores.ce_N)
    nll_B = total_B / torch.bincount(row_N, minlength=count)
    # Tokens likelier than the gold answer's first one.
    # offset 0 is the first target of a row: one value a row, in the order of the rows.
    likelier_B = scores.likelier_N[gold.offset_N.cpu() == 0].tolist()
    # What had to be sent: a message's bytes, else the text that stands in its place.
    sizes = batch.bytes
    if message is None:
        sizes = [len(lm.tokenizer.decode(ids).encode()) for ids in stood_for(wire, name, batch)]
    # A message in a few heads alone takes as many positions as its entries would fill.
    message_positions = [len(prompt.message) for prompt in prompts]
    if message is not None or name in batch.own:
        message_positions = wire.interlingua.budgets(name, message_positions)
    encode_ms = batch.encode_ms
    if caches := batch.caches.get(name):
        entry_bytes = own_cache.entry_bytes(wire.local_receiver(name))
        # kept_LHT: True for each entry (layer, head, place) that is left.
        sizes = [entry_bytes * int(kept_LHT.sum()) for kept_LHT in caches.kept]
        message_positions, encode_ms = caches.positions, caches.ms
    if name in batch.own:
        # [N, E]: E numbers a token, as fp16.
        entry_bytes = 2 * batch.own[name].shape[1]
        sizes = [entry_bytes * len(prompt.message) for prompt in prompts]
    data = wire.run.data
    no_answer = None if data.unanswerable is None else data.no_answer
    for i, answer in enumerate(answers):
        em, f1 = em_f1(answer, rows["answers"][i], data.dataset, no_answer)
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


def _begin(
    wire: LatentWire,
    name: str,
    batch: Inputs,
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
    batch: Inputs,
    answered: list[PromptSequence],
    messages: list[int],
    begun: Prefilled | None,
) -> tuple[AnswerScores, Batch, float]:
    """Score the targets of prompts; return the scores, the sequences and the seconds that it took.

    ``begun``: what they begin with, where it has been read.
    """
    lm = wire.receivers[name]
    began = now(lm.device)
    if begun is not None:
        scores, gold = begun.score(answered, messages)
        return scores, gold, time.perf_counter() - began
    # Timed from here: building the batch is no part of a forward.
    gold = collate(answered, messages=messages).to(lm.device)
    text_ND = embeddings_of(wire, name, batch) if batch.condition.mode == "embeddings" else None
    began = now(lm.device)
    with (
        with_own_parts(wire, name, batch, answered, "right"),
        wire.reading(name, gold, batch.message) as soft_ND,
    ):
        scores = lm.score_answers(gold, soft_ND if text_ND is None else text_ND)
    return scores, gold, time.perf_counter() - began


def _score_answers(
    wire: LatentWire, batch: Inputs, predictions: list[Prediction]
) -> list[Prediction]:
    """Add to one receiver's predictions the log-likelihood that all receivers give to them."""
    total_B = torch.zeros(len(predictions), dtype=torch.float64)
    texts = [prediction.text for prediction in predictions]
    for name in wire.receivers:
        ids = wire.builders[name].tokenize([], [], texts)["answer_ids"]
        # Who answered nothing said the end at once, without the space that leads an answer.
        ids = [tokens if text else [] for tokens, text in zip(ids, texts, strict=True)]
        prompts = prompts_of(wire, name, batch, ids)
        messages = messages_read(batch, prompts)
        begun = _begin(wire, name, batch, prompts, messages)
        scores, answered, _ = _score(wire, name, batch, prompts, messages, begun)
        # −ce is the log-likelihood of a target; each row sums its own, over all receivers.
        total_B.index_add_(0, answered.row_N.cpu(), -scores.ce_N.double())
    return [
        dataclasses.replace(prediction, joint_logp=float(logp))
        for prediction, logp in zip(predictions, total_B, strict=True)
    ]
