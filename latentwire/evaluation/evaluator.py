"""Score a wire on shard rows: free-running answers and the likelihood of the gold one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa
import torch

from latentwire.assembly import LatentWire
from latentwire.data.batches import sender_texts
from latentwire.data.layout import Sequence, collate
from latentwire.evaluation.metrics import em_f1
from latentwire.losses.terms import token_ce
from latentwire.models.message import Message

Mode = Literal["latent", "text", "closed_book", "shuffled"]
MODES: tuple[Mode, ...] = ("latent", "text", "closed_book", "shuffled")
"""What stands where the context belongs: its message, its text, nothing, or the message of another row."""

METRIC_VERSION = 1
"""Raised whenever the same predictions would score differently; part of the evaluation pin."""


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
    nll: float
    """Negative log-likelihood of the first gold answer and its stop token, nats per token."""
    positions: int
    """Positions of the prompt that the receiver reads."""


@torch.no_grad()
def predict(wire: LatentWire, table: pa.Table, mode: Mode) -> Iterator[Prediction]:
    """Predictions of every receiver for every row of ``table`` (shard columns), batch by batch."""
    wire.interlingua.eval()
    size = wire.run.evaluation.batch_size
    for start in range(0, table.num_rows, size):
        rows = table.slice(start, size).to_pydict()
        message = _messages(wire, rows, mode)
        for name in wire.receivers:
            yield from _predict_batch(wire, name, rows, mode, message)


def _messages(wire: LatentWire, rows: dict[str, list], mode: Mode) -> Message | None:
    if mode not in ("latent", "shuffled"):
        return None
    message = wire.interlingua.encode(sender_texts(wire.run.data.send, rows))
    return message if mode == "latent" else message.roll(1)


def _predict_batch(
    wire: LatentWire, name: str, rows: dict[str, list], mode: Mode, message: Message | None
) -> Iterator[Prediction]:
    lm = wire.receivers[name]
    slots = None if message is None else message.slots(name)
    prompts = _prompts(wire, name, rows, mode, slots)
    answers = wire.decode(name, prompts, message)
    gold = collate(_prompts(wire, name, rows, mode, slots, answered=True)).to(lm.device)
    with wire.reading(name, gold, message) as soft_ND:
        ce_N = token_ce(lm.supervised_logits(gold, soft_ND), gold.target_N)
    rows_B = torch.zeros(len(prompts), device=ce_N.device)
    nll_B = rows_B.index_add(0, gold.row_N, ce_N) / rows_B.index_add(0, gold.row_N, torch.ones_like(ce_N))
    for i, answer in enumerate(answers):
        em, f1 = em_f1(answer, rows["answers"][i], wire.run.data.dataset)
        yield Prediction(
            id=rows["id"][i], receiver=name, mode=mode, text=answer, golds=rows["answers"][i],
            em=em, f1=f1, nll=float(nll_B[i]), positions=len(prompts[i].ids),
        )  # fmt: skip


def _prompts(
    wire: LatentWire, name: str, rows: dict[str, list], mode: Mode, slots: list[int] | None, answered: bool = False
) -> list[Sequence]:
    builder = wire.builders[name]
    context, question, answer = (rows[f"{name}_{piece}_ids"] for piece in ("context", "question", "answer"))
    prompts = []
    for i in range(len(question)):
        gold = answer[i] if answered else None
        if slots is not None:
            prompts.append(builder.latent(slots[i], question[i], gold))
        else:
            prompts.append(builder.text([] if mode == "closed_book" else context[i], question[i], gold))
    return prompts


def summarise(predictions: list[Prediction]) -> dict[str, dict[str, float]]:
    """receiver → mean ``em``, ``f1``, ``nll``, ``positions`` and the number of ``rows``; ``mean`` is over receivers."""
    table: dict[str, dict[str, float]] = {}
    for name in dict.fromkeys(p.receiver for p in predictions):
        own = [p for p in predictions if p.receiver == name]
        table[name] = {field: _mean(own, field) for field in ("em", "f1", "nll", "positions")} | {"rows": len(own)}
    names = list(table)
    table["mean"] = {
        field: sum(table[name][field] for name in names) / len(names)
        for field in ("em", "f1", "nll", "positions", "rows")
    }
    return table


def _mean(predictions: list[Prediction], field: str) -> float:
    values: list[Any] = [getattr(p, field) for p in predictions]
    return float(sum(values)) / len(values)
