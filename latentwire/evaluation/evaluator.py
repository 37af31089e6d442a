"""Score a wire on shard rows: free-running answers and the likelihood of the gold one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa
import torch

from latentwire.data.batches import sender_texts
from latentwire.data.layout import Sequence, collate
from latentwire.evaluation.metrics import em_f1
from latentwire.losses.terms import token_ce
from latentwire.models.latentwire import LatentWire

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
        z_BLZ = _messages(wire, rows, mode)
        for name in wire.receivers:
            yield from _predict_batch(wire, name, rows, mode, z_BLZ)


def _messages(wire: LatentWire, rows: dict[str, list], mode: Mode) -> torch.Tensor | None:
    if mode not in ("latent", "shuffled"):
        return None
    z_BLZ = wire.interlingua.encode(sender_texts(wire.run.data.send, rows))
    return z_BLZ if mode == "latent" else z_BLZ.roll(1, dims=0)


def _predict_batch(
    wire: LatentWire, name: str, rows: dict[str, list], mode: Mode, z_BLZ: torch.Tensor | None
) -> Iterator[Prediction]:
    lm = wire.receivers[name]
    prompts = [_prompt(wire, name, rows, i, mode) for i in range(len(rows["id"]))]
    answers = wire.decode(name, prompts, z_BLZ)
    gold = collate(_prompt(wire, name, rows, i, mode, answered=True) for i in range(len(rows["id"]))).to(lm.device)
    p_BLD = None if z_BLZ is None else wire.interlingua.prompt(name, z_BLZ).to(lm.device)
    ce_N = token_ce(lm.supervised_logits(gold, p_BLD), gold.target_N)
    rows_B = torch.zeros(len(prompts), device=ce_N.device)
    nll_B = rows_B.index_add(0, gold.row_N, ce_N) / rows_B.index_add(0, gold.row_N, torch.ones_like(ce_N))
    for i, answer in enumerate(answers):
        em, f1 = em_f1(answer, rows["answers"][i], wire.run.data.dataset)
        yield Prediction(
            id=rows["id"][i], receiver=name, mode=mode, text=answer, golds=rows["answers"][i],
            em=em, f1=f1, nll=float(nll_B[i]), positions=len(prompts[i].ids),
        )  # fmt: skip


def _prompt(wire: LatentWire, name: str, rows: dict[str, list], i: int, mode: Mode, answered: bool = False) -> Sequence:
    builder = wire.builders[name]
    question = rows[f"{name}_question_ids"][i]
    answer = rows[f"{name}_answer_ids"][i] if answered else None
    if mode in ("latent", "shuffled"):
        return builder.latent(wire.run.encoder.latent_len, question, answer)
    return builder.text([] if mode == "closed_book" else rows[f"{name}_context_ids"][i], question, answer)


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
