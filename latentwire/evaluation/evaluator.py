"""Score a wire on shard rows: free-running answers and the likelihood of the gold one."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import torch

from latentwire.assembly import LatentWire
from latentwire.data.batches import sender_texts
from latentwire.data.layout import Sequence, collate
from latentwire.evaluation.baselines import MESSAGE_MODES, Mode, kept_context
from latentwire.evaluation.metrics import em_f1
from latentwire.evaluation.settings import Setting
from latentwire.evaluation.statistics import interval
from latentwire.losses.terms import token_ce
from latentwire.models.message import Message

METRIC_VERSION = 1
"""Raised whenever the same predictions would score differently; part of the evaluation pin."""

LATENT_BYTES = 2  # of one entry of a latent on the wire, as fp16


@dataclass(frozen=True)
class Prediction:
    """One receiver's answer to one row."""

    id: str
    receiver: str
    mode: Mode
    text: str
    golds: list[str]
    em: float
    f1: float
    budget: str
    """Length of message that the prompt is as long as, where it is not the wire's own: ``4 tokens per latent``."""
    nll: float
    """Negative log-likelihood of the first gold answer and its stop token, nats per token."""
    positions: int
    """Positions of the prompt that the receiver reads."""
    bytes: int
    """What had to be sent: UTF-8 bytes of the text shown, or the latents as fp16."""
    forward_ms: float
    """Time of one forward over prompt and gold answer, shared out over its batch."""


@torch.no_grad()
def predict(wire: LatentWire, table: pa.Table, setting: Setting | Mode) -> Iterator[Prediction]:
    """Predictions of every receiver for every row of ``table`` (shard columns), batch by batch.

    ``setting``: what the receivers read; a mode alone has messages of the wire's own length.
    """
    setting = setting if isinstance(setting, Setting) else Setting(setting)
    mode = setting.mode
    wire.interlingua.eval()
    size = wire.run.evaluation.batch_size
    for start in range(0, table.num_rows, size):
        rows = table.slice(start, size).to_pydict()
        texts = sender_texts(wire.run.data.send, rows)
        encoder = wire.interlingua.encoder
        tokens = setting.tokenize(encoder, texts)
        message = wire.interlingua.encode(tokens) if mode in MESSAGE_MODES else None
        if message is not None and mode == "shuffled":
            message = message.roll(1)
        for name in wire.receivers:
            slots = encoder.slots(tokens, name) if message is None else message.slots(name)
            yield from _predict_batch(wire, name, rows, setting, message, slots)


def _predict_batch(
    wire: LatentWire, name: str, rows: dict[str, list], setting: Setting, message: Message | None, slots: list[int]
) -> Iterator[Prediction]:
    lm, count, mode = wire.receivers[name], len(rows["id"]), setting.mode
    columns = (rows[f"{name}_{piece}_ids"] for piece in ("context", "question", "answer"))
    pieces = list(zip(rows["id"], *columns, slots, strict=True))
    shown = [] if message else [kept_context(wire, name, mode, row, c, q, slot) for row, c, q, _, slot in pieces]
    asked, answered = (_prompts(wire, name, pieces, mode, shown, gold=gold) for gold in (False, True))
    own_ND = _embeddings(wire, name, pieces, shown) if mode == "embeddings" else None
    answers = wire.decode(name, asked, message, own_ND)
    gold = collate(answered).to(lm.device)
    with wire.reading(name, gold, message) as soft_ND:
        began = time.perf_counter()
        logits_NV = lm.supervised_logits(gold, soft_ND if own_ND is None else own_ND)
        ce_N = token_ce(logits_NV, gold.target_N).cpu()
        seconds = time.perf_counter() - began
    row_N = gold.row_N.cpu()
    nll_B = torch.zeros(count).index_add(0, row_N, ce_N) / torch.bincount(row_N, minlength=count)
    sizes = (
        [LATENT_BYTES * wire.run.encoder.d_z * slot for slot in slots]
        if message
        else [len(lm.tokenizer.decode(ids).encode()) for ids in shown]
    )
    for i, answer in enumerate(answers):
        em, f1 = em_f1(answer, rows["answers"][i], wire.run.data.dataset)
        yield Prediction(
            id=rows["id"][i], receiver=name, mode=mode, text=answer, golds=rows["answers"][i], em=em, f1=f1,
            budget=str(setting.budget or ""), nll=float(nll_B[i]), positions=len(asked[i].ids), bytes=sizes[i],
            forward_ms=1000 * seconds / count,
        )  # fmt: skip


def _prompts(
    wire: LatentWire, name: str, pieces: list[tuple], mode: Mode, shown: list[list[int]], *, gold: bool
) -> list[Sequence]:
    builder = wire.builders[name]
    prompts = []
    for place, (_, _, question, answer, slots) in enumerate(pieces):
        target = answer if gold else None
        if mode in MESSAGE_MODES:
            prompts.append(builder.latent(slots, question, target))
        elif mode == "embeddings":
            prompts.append(builder.latent(len(builder.message_ids(shown[place], question)), question, target))
        else:
            prompts.append(builder.text(shown[place], question, target))
    return prompts


def _embeddings(wire: LatentWire, name: str, pieces: list[tuple], shown: list[list[int]]) -> torch.Tensor:
    """The receiver's own embeddings of what the message stands for: the latent path must read them as text."""
    builder, lm = wire.builders[name], wire.receivers[name]
    rows = [builder.message_ids(shown[place], question) for place, (_, _, question, _, _) in enumerate(pieces)]
    return lm.embed_tokens(torch.tensor([token for row in rows for token in row], device=lm.device))


def summarise(predictions: list[Prediction]) -> dict[str, dict[str, float]]:
    """receiver → means, 95 % intervals (``em_low`` …) of EM and F1, and the number of ``rows``; ``mean`` is over receivers."""
    table: dict[str, dict[str, float]] = {}
    fields = ("em", "f1", "nll", "positions", "bytes", "forward_ms")
    for name in dict.fromkeys(p.receiver for p in predictions):
        own = [p for p in predictions if p.receiver == name]
        table[name] = {field: _mean(own, field) for field in fields} | {"rows": len(own)}
        for field in ("em", "f1"):
            low, high = interval([getattr(p, field) for p in own])
            table[name] |= {f"{field}_low": low, f"{field}_high": high}
    names = list(table)
    table["mean"] = {field: sum(table[name][field] for name in names) / len(names) for field in (*fields, "rows")}
    return table


def _mean(predictions: list[Prediction], field: str) -> float:
    values: list[Any] = [getattr(p, field) for p in predictions]
    return float(sum(values)) / len(values)
