"""From a source's raw rows to good rows of a split, or to what is wrong with them.

Each row gets a seeded hash, which shuffles and samples at once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa

from latentwire.config import DataConfig, RunConfig
from latentwire.data import shards, sources
from latentwire.dataset import NoAnswerError, Row
from latentwire.prompts.sequences import sender_text
from latentwire.tokens import chunks_utf8, truncate_utf8

BLOCK_ROWS = 1_024
"""Rows that a task hands on at once."""
HASH_BITS = 52
"""Bits of the hash that orders rows: Ray's sort takes its boundaries for floats."""
ROW_BITS = 20
"""Bits among them that order the rows of one context where those stand together."""

CLEAN = pa.schema(
    {
        "order": pa.int64(),
        "reason": pa.string(),
        "truncated": pa.bool_(),
        "id": pa.string(),
        "document": pa.string(),
        "context": pa.string(),
        "question": pa.string(),
        "answers": pa.list_(pa.string()),
    }
)


def read_and_clean(
    batch: dict[str, np.ndarray], run: RunConfig, split: shards.ShardSplit
) -> Iterator[pa.Table]:
    """Yield one piece's rows of this split in common columns, or with a reason."""
    # Ray hands over rows as columns: of the one piece, each column is an array of one value.
    piece = sources.Piece(**{name: values.tolist()[0] for name, values in batch.items()})
    source = shards.source_of(split)
    block: list[dict[str, Any]] = []
    together = split == "train" and run.training.questions_together
    for row in _cleaned(run, source, piece, together=together):
        if belongs(row, run, split):
            block.append(row)
        if len(block) == BLOCK_ROWS:
            yield pa.Table.from_pylist(block, CLEAN)
            block = []
    # Where no row is left the block still has the columns.
    yield pa.Table.from_pylist(block, CLEAN)


def _cleaned(
    run: RunConfig, source: sources.Split, piece: sources.Piece, *, together: bool
) -> Iterator[dict[str, Any]]:
    data, file = run.data, piece.key or piece.name
    # Pieces of lines begin at a byte: their numbers have gaps, but no row has another's.
    for number, raw in enumerate(sources.read(data, source, piece), start=piece.start):
        order = text_hash(f"{data.seed} {number} {file}")
        try:
            row = common_columns(raw, data)
            if not data.source.has_questions:
                # A paragraph that several rows hold has one place, where it is kept once.
                order = text_hash(f"{data.seed} {row['id']}")
            elif together:
                # High bits of the context's hash, low bits of the row's: its rows are neighbours.
                of_context = text_hash(f"{data.seed} {row['context']}")
                order = of_context >> ROW_BITS << ROW_BITS | order % 2**ROW_BITS
            yield from ({"order": order, "reason": ""} | part for part in _fitted(row, data))
        except sources.RowError as error:
            shown = raw.decode("utf-8", "replace") if isinstance(raw, bytes) else str(raw)
            yield {
                "order": order,
                "reason": str(error),
                "id": f"{file} {_place_in(piece, number)}",
                "context": shown[:500],
            }


def _place_in(piece: sources.Piece, number: int) -> str:
    """Return where a row stands in its file, by the number that :func:`_cleaned` counts."""
    if piece.form == "lines" and piece.start:
        # How many lines there are before would take reading them all.
        return f"row {number - piece.start} after byte {piece.start}"
    return f"row {number}"


def common_columns(raw: Row, data: DataConfig) -> dict[str, Any]:
    """Return the common columns; a row without an answer says so, where such rows are wanted."""
    try:
        return sources.clean(raw, data.dataset)
    except NoAnswerError as error:
        if data.unanswerable is None:
            raise
        return error.row | {"answers": [data.no_answer]}


def _fitted(row: dict[str, Any], data: DataConfig) -> Iterator[dict[str, Any]]:
    """Yield the row where its text fits the encoder's bytes, else what ``overflow`` makes of it."""
    size = len(sender_text(data.send, row["context"], row["question"]).encode())
    if size <= data.max_context_bytes:
        yield row | {"truncated": False}
    elif data.overflow == "reject":
        raise sources.RowError(
            f"sender text must be ≤ {data.max_context_bytes} bytes, data.max_context_bytes: got {size}"
        )
    elif data.overflow == "chunk":
        for number, chunk in enumerate(chunks_utf8(row["context"], data.max_context_bytes)):
            yield row | {"context": chunk, "id": f"{row['id']}-{number}", "truncated": False}
    else:
        # What is not the context's is the question's, which stays whole.
        spare = data.max_context_bytes - (size - len(row["context"].encode()))
        if spare < 1:
            raise sources.RowError(f"question must fit {data.max_context_bytes} bytes: got {size}")
        yield row | {"context": truncate_utf8(row["context"], spare), "truncated": True}


def belongs(row: dict[str, Any], run: RunConfig, split: shards.ShardSplit) -> bool:
    """Return whether a row is of a split: of development where its document's seeded hash falls under ``dev_fraction``."""
    if split == "validation":
        return True
    if row["reason"]:  # a rejected row of the training source is reported with train
        return split == "train"
    # Uniform in [0, 1): by the same seed, the draw of a smaller fraction is part of a larger one's.
    share = text_hash(f"dev {run.data.seed} {row['document']}") / 2**HASH_BITS
    return (share < run.data.dev_fraction) == (split == "dev")


def text_hash(text: str) -> int:
    """Return the first bits of a text's SHA-256 as a number, :data:`HASH_BITS` of them."""
    # A hex digit has 4 bits.
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
    return int(digest[: HASH_BITS // 4], 16)
