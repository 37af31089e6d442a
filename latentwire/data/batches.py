"""Shard rows to tensors: the same collation for training and decoding, with and without Ray."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import pyarrow as pa
import torch

from latentwire.config import RunConfig
from latentwire.data.layout import Batch, Sequence, SequenceBuilder, collate, sender_text


@dataclass(frozen=True)
class TrainingBatch:
    """B examples: the sender texts, and for each receiver the latent prompts with answers and targets."""

    texts: list[str]
    sequences: dict[str, Batch]
    message_ids: dict[str, list[list[int]]]
    """Each receiver's own token ids of the message's text, one list a row."""

    def __len__(self) -> int:
        return len(self.texts)


class TrainingCollator:
    """Turns a table of shard rows into a :class:`TrainingBatch`."""

    def __init__(self, run: RunConfig, builders: Mapping[str, SequenceBuilder]) -> None:
        self.send, self.slots, self.builders = run.data.send, run.encoder.latent_len, dict(builders)
        self.reconstruct = run.losses.reconstruction_ce_weight > 0

    def __call__(self, table: pa.Table) -> TrainingBatch:
        """``table``: shard columns, one row per example."""
        rows = table.to_pydict()
        return TrainingBatch(
            texts=sender_texts(self.send, rows),
            sequences={name: collate(self._sequences(name, rows)) for name in self.builders},
            message_ids={
                name: [
                    builder.message_ids(context, question)
                    for context, question in zip(rows[f"{name}_context_ids"], rows[f"{name}_question_ids"], strict=True)
                ]
                for name, builder in self.builders.items()
            },
        )

    def _sequences(self, name: str, rows: Mapping[str, list]) -> list[Sequence]:
        """One latent prompt a row; with reconstruction, as many rows again, for the same messages in the same order."""
        builder = self.builders[name]
        context, question, answer = (rows[f"{name}_{piece}_ids"] for piece in ("context", "question", "answer"))
        sequences = [builder.latent(self.slots, q, a) for q, a in zip(question, answer, strict=True)]
        if self.reconstruct:
            sequences += [builder.reconstruction(self.slots, c, q) for c, q in zip(context, question, strict=True)]
        return sequences


def sender_texts(send: Literal["context", "prompt"], rows: Mapping[str, list]) -> list[str]:
    """The encoder's input for columns ``context`` and ``question``."""
    return [sender_text(send, c, q) for c, q in zip(rows["context"], rows["question"], strict=True)]


def shuffled_batches(
    table: pa.Table, batch_size: int, *, seed: int, epoch: int, rank: int = 0, world: int = 1
) -> Iterator[pa.Table]:
    """One epoch of whole batches in an order told by (seed, epoch); each worker takes its share of every batch.

    ``batch_size`` counts all workers. A last batch that is not full is left out, unless it is the only one.
    """
    order = torch.randperm(table.num_rows, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
    for start in range(0, max(1, table.num_rows - batch_size + 1), batch_size):
        yield table.take(pa.array(order[start : start + batch_size][rank::world].tolist()))
