"""Shards on their way to a training loop: which columns, joined with the teachers', in which order, in which batches."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from latentwire.config import RunConfig, TrainingConfig
from latentwire.data import shards, sources, teachers
from latentwire.data.pipeline import ROW_GROUP, quiet_ray_data
from latentwire.storage import Place, read_footer, read_parquet

SHUFFLE_ROWS = 2_048
"""Rows, at least, that a worker's stream is shuffled within. The shards themselves are in an order drawn by seed."""


def training_columns(run: RunConfig, *, continued: bool = False) -> list[str]:
    """What training steps read: ids, and text only where the encoder's ids are its bytes or texts are cut between words.

    ``continued``: another trial on the same rows has a continuation loss.
    """
    pieces = ("context", "question", "answer")
    columns = ["id", "sender_bytes", *(f"{r.name}_{piece}_ids" for r in run.receivers for piece in pieces)]
    if run.training.questions_together:
        columns.append("sender_hash")
    if run.encoder.pretrained:
        columns.append("encoder_ids")
        if not (continued or run.losses.continuation_ce_weight):
            return columns
    return [*columns, "context", "question"]


def read_joined(
    name: str, train: Place, told: Mapping[str, Place], columns: Sequence[str], rows: int | None = None
) -> Iterator[pa.Table]:
    """One shard file's rows with the columns of all teachers, ``rows`` at a time (``None``: all at once)."""
    table = read_parquet(train / name, columns)
    for path in told.values():
        said = read_parquet(path / name)
        for column in said.column_names:
            table = table.append_column(column, said[column])
    for start in range(0, table.num_rows, rows or max(1, table.num_rows)):
        yield table.slice(start, rows)


def training_table(run: RunConfig, train: Place) -> pa.Table:
    """All training rows in memory."""
    names, told = shards.read_manifest(train)["files"], teachers.paths(run, train)
    return pa.concat_tables(table for name in names for table in read_joined(name, train, told, training_columns(run)))


def ray_dataset(train: Place, told: Mapping[str, Place], columns: Sequence[str], *, in_memory: bool) -> Any:
    """Training rows as a Ray Dataset; Ray must be running.

    ``in_memory``: held in the object store, once for all trials. Else read anew in every epoch, block by block, by tasks
    whose CPUs the planner reserves. Either way in the order of the files and of their rows, whichever
    task ends first: a run that is resumed skips the batches that it has used. Raises
    :class:`~latentwire.data.sources.DataError` for rows that the store cannot hold.
    """
    import ray
    import ray.data

    quiet_ray_data()
    names = shards.read_manifest(train)["files"]
    if in_memory:
        footers = [read_footer(train / name) for name in names]
        size = sum(
            footer.row_group(group).total_byte_size for footer in footers for group in range(footer.num_row_groups)
        )
        room = ray.cluster_resources().get("object_store_memory", 0.0)
        if size > room:
            raise sources.DataError(
                f"training rows in memory must fit the object store, got {size / 1e9:.1f} GB for {room / 1e9:.1f} GB; "
                f"set data.in_memory false to stream them from {train}, or add nodes"
            )
    read = functools.partial(_read_file, train=train, told=dict(told), columns=list(columns))
    files = ray.data.from_items([{"file": name} for name in names], override_num_blocks=len(names))
    dataset = files.map_batches(read, batch_size=1)
    dataset.context.execution_options.preserve_order = True
    return dataset.materialize() if in_memory else dataset


def _read_file(batch: Mapping[str, np.ndarray], **options: Any) -> Iterator[pa.Table]:
    for name in batch["file"]:
        yield from read_joined(str(name), rows=ROW_GROUP, **options)


# ------------------------------------------------------------------------------------------------------------ batches


def shuffled_batches(
    table: pa.Table, training: TrainingConfig, epoch: int, rank: int = 0, world: int = 1
) -> Iterator[pa.Table]:
    """One epoch of whole batches in an order told by (seed, epoch); each worker takes its share of every batch.

    A last batch that is not full is left out, unless it is the only one.
    """
    seed, size = epoch_seed(training, epoch), training.batch_size
    only = table.num_rows < size
    for start, part in _parts(table, training, seed, size):
        for batch in length_buckets(part, size, seed + start, keep_short=only):
            ends = [batch.num_rows * place // world for place in (rank, rank + 1)]  # neighbours may share a context
            yield batch.slice(ends[0], ends[1] - ends[0])


def streamed_batches(
    stream: Any, training: TrainingConfig, epoch: int, size: int, *, keep_short: bool
) -> Iterator[pa.Table]:
    """One epoch of a worker's own Ray stream in batches of ``size`` rows, shuffled within a buffer by (seed, epoch).

    With ``keep_short`` there is always a batch: one without rows where the other workers have them all.
    """
    seed, drawn = epoch_seed(training, epoch), size * training.bucket_batches
    if training.questions_together:  # Ray shuffles rows one by one
        window = -(-SHUFFLE_ROWS // drawn) * drawn
        tables = stream.iter_batches(batch_size=window, batch_format="pyarrow")
        parts = (
            part for number, table in enumerate(tables) for _, part in _parts(table, training, seed + number, size)
        )
    else:
        parts = stream.iter_batches(
            batch_size=drawn,
            batch_format="pyarrow",
            local_shuffle_buffer_size=max(drawn, SHUFFLE_ROWS),
            local_shuffle_seed=seed,
        )
    empty = keep_short
    for number, part in enumerate(parts):
        empty = False
        yield from length_buckets(part, size, seed + number, keep_short=keep_short)
    if empty:
        yield pa.table({})


def _parts(table: pa.Table, training: TrainingConfig, seed: int, size: int) -> Iterator[tuple[int, pa.Table]]:
    """The rows in an order told by ``seed``, in parts of as many batches as are drawn together; each with its first place.

    Neighbours with one sender text stay neighbours where questions go together.
    """
    first = np.arange(table.num_rows)
    if training.questions_together:
        sender = table["sender_hash"].to_numpy()
        first = np.flatnonzero(np.append(True, sender[1:] != sender[:-1]))
    drawn = torch.randperm(len(first), generator=torch.Generator().manual_seed(seed)).numpy()
    count = np.diff(np.append(first, table.num_rows))[drawn]
    order = np.repeat(first[drawn] - (count.cumsum() - count), count) + np.arange(table.num_rows)
    rows = size * training.bucket_batches
    for start in range(0, table.num_rows, rows):
        yield start, table.take(order[start : start + rows])


def length_buckets(table: pa.Table, size: int, seed: int, *, keep_short: bool = False) -> Iterator[pa.Table]:
    """Whole batches of ``size`` rows whose sender texts are about as long, in an order told by ``seed``.

    Rows that fill no batch are left out, before the sorting so that no length is favoured; ``keep_short`` keeps them
    where there is no whole batch at all.
    """
    whole = table.num_rows - table.num_rows % size
    if whole == 0 and keep_short:
        yield table
    by_length = np.argsort(table.column("sender_bytes").slice(0, whole).to_numpy(), kind="stable")
    for place in np.random.default_rng(seed).permutation(whole // size):
        yield table.take(by_length[place * size : (place + 1) * size])


def epoch_seed(training: TrainingConfig, epoch: int) -> int:
    """The seed of an epoch's order of rows."""
    return training.seed * 1_000_003 + epoch
