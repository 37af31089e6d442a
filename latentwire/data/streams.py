"""Batches for a training loop: columns of shards and teachers, joined, ordered by seed, parted by length."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from latentwire.config import RunConfig, TrainingConfig
from latentwire.data import packing, shards, sources, teachers
from latentwire.data.packing import Units
from latentwire.data.pipeline import ROW_GROUP, quiet_ray_data
from latentwire.storage import Place, read_footer, read_parquet

SHUFFLE_ROWS = 2_048
"""Rows, at least, that a worker's stream is shuffled within. The shards themselves are in an order drawn by seed."""


def training_columns(run: RunConfig, *, continued: bool = False) -> list[str]:
    """Return the columns that training steps read.

    They are ids, and text only where the encoder's ids are its bytes or texts are cut between words.
    ``continued``: another trial on the same rows has a continuation loss.
    """
    pieces = ("context", "question", "answer")
    columns = ["id", "sender_bytes"]
    for receiver in run.receivers:
        columns += [f"{receiver.name}_{piece}_ids" for piece in pieces]
    if run.training.questions_together:
        columns.append("sender_hash")
    if run.encoder.pretrained:
        columns.append("encoder_ids")
        if not (continued or run.losses.continuation_ce_weight):
            return columns
    return [*columns, "context", "question"]


def read_joined(
    name: str,
    train: Place,
    teacher_paths: Mapping[str, Place],
    columns: Sequence[str],
    rows: int | None = None,
) -> Iterator[pa.Table]:
    """Yield one shard file's rows with the columns of all teachers.

    Args:
        name: the file's name, the same for shards and teachers.
        train: directory of the training shards.
        teacher_paths: receiver → directory of its teacher's columns.
        columns: columns of the shards to read.
        rows: rows that come at a time. None: all of them.
    """
    # Teachers' files hold a row for every row of the shard, in its order.
    table = read_parquet(train / name, columns)
    for path in teacher_paths.values():
        teacher = read_parquet(path / name)
        for column in teacher.column_names:
            table = table.append_column(column, teacher[column])
    # A stride of 0 is none: a table without rows takes 1.
    for start in range(0, table.num_rows, rows or max(1, table.num_rows)):
        yield table.slice(start, rows)


def training_table(run: RunConfig, train: Place) -> pa.Table:
    """Read all training rows into memory."""
    teacher_paths, columns = teachers.paths(run, train), training_columns(run)
    names = shards.read_manifest(train)["files"]
    files = [read_joined(name, train, teacher_paths, columns) for name in names]
    return pa.concat_tables(itertools.chain.from_iterable(files))


def ray_dataset(
    train: Place, teacher_paths: Mapping[str, Place], columns: Sequence[str], *, in_memory: bool
) -> Any:
    """Return training rows as a Ray Dataset; Ray must be running.

    Rows come in the order of the files and of their rows, whichever task ends first: a run that is
    resumed skips the batches that it has used.

    Args:
        train: directory of the training shards.
        teacher_paths: receiver → directory of its teacher's columns.
        columns: columns of the shards to read.
        in_memory: hold the rows in the object store, once for all trials. Else they are read anew in
            every epoch, block by block, by tasks whose CPUs the planner reserves.

    Raises:
        DataError: the object store cannot hold the rows.
    """
    import ray
    import ray.data

    quiet_ray_data()
    names = shards.read_manifest(train)["files"]
    if in_memory:
        size = 0
        for name in names:
            footer = read_footer(train / name)
            groups = [footer.row_group(group) for group in range(footer.num_row_groups)]
            size += sum(group.total_byte_size for group in groups)
        room = ray.cluster_resources().get("object_store_memory", 0.0)
        if size > room:
            raise sources.DataError(
                f"training rows in memory must fit the object store, got {size / 1e9:.1f} GB for {room / 1e9:.1f} GB; "
                f"set data.in_memory false to stream them from {train}, or add nodes"
            )
    read = functools.partial(
        _read_file, train=train, teacher_paths=dict(teacher_paths), columns=list(columns)
    )
    files = ray.data.from_items([{"file": name} for name in names], override_num_blocks=len(names))
    # Tasks end in any order: blocks are handed on in that of the files.
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
    """Yield one epoch of whole batches in an order drawn by (seed, epoch); each worker takes its share of every batch.

    A last batch that is not full is left out, unless it is the only one.
    """
    seed, size = epoch_seed(training, epoch), training.rows_per_batch
    only = table.num_rows < size
    for start, part in _parts(table, training, seed, size):
        for batch in length_buckets(part, size, seed + start, keep_short=only):
            yield share_of(batch, rank, world)


def share_of(batch: pa.Table, rank: int, world: int) -> pa.Table:
    """Return one of ``world`` workers' rows of a batch: neighbours, which may share a context."""
    # Worker r of W has rows ⌊n · r / W⌋ to ⌊n · (r + 1) / W⌋.
    start, stop = (batch.num_rows * place // world for place in (rank, rank + 1))
    return batch.slice(start, stop - start)


def streamed_batches(
    stream: Any, training: TrainingConfig, epoch: int, size: int, *, keep_short: bool
) -> Iterator[pa.Table]:
    """Yield one epoch of a worker's Ray stream in batches of ``size`` rows, shuffled within a buffer by (seed, epoch).

    With ``keep_short`` there is always a batch: one without rows where the other workers have them all.
    """
    seed, drawn = epoch_seed(training, epoch), size * training.bucket_batches
    if training.questions_together:  # Ray shuffles rows one by one
        # Rounded up to whole parts, so that only the last window ends in a short one.
        window = -(-SHUFFLE_ROWS // drawn) * drawn
        tables = stream.iter_batches(batch_size=window, batch_format="pyarrow")
        parts = _parts_of_windows(tables, training, seed, size)
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


def _parts_of_windows(
    tables: Iterable[pa.Table], training: TrainingConfig, seed: int, size: int
) -> Iterator[pa.Table]:
    for number, table in enumerate(tables):
        for _, part in _parts(table, training, seed + number, size):
            yield part


def packed_batches(
    stream: Iterable[pa.Table],
    training: TrainingConfig,
    epoch: int,
    units: Units,
    rank: int = 0,
    world: int = 1,
) -> Iterator[pa.Table]:
    """Yield a worker's rows of one epoch of batches that are filled by positions.

    Args:
        stream: all training rows, not the worker's share of them, in their order.
        training: says how much fits.
        epoch: the order hangs on it and on the seed.
        units: of these rows.
        rank: the worker's number.
        world: workers that share each batch.
    """
    assert training.positions_per_batch is not None, "batches are filled by rows"
    seed, budget = epoch_seed(training, epoch), training.positions_per_batch
    plan = packing.batches(units, budget, training.bucket_batches, seed)
    return packing.tables(stream, units, plan, rank, world)


def packed_steps(training: TrainingConfig, units: Units) -> int:
    """Count the optimiser steps of a run whose batches are filled by positions."""
    assert training.positions_per_batch is not None, "batches are filled by rows"
    seeds = (epoch_seed(training, epoch) for epoch in range(training.epochs))
    budget, buckets = training.positions_per_batch, training.bucket_batches
    return packing.count_steps(units, budget, buckets, seeds, training.max_steps)


def _parts(
    table: pa.Table, training: TrainingConfig, seed: int, size: int
) -> Iterator[tuple[int, pa.Table]]:
    """Yield the rows in an order drawn by ``seed``, a part for every ``bucket_batches`` batches, each with its first place.

    Groups of rows are shuffled: single rows, or, where questions go together, neighbours with one
    sender text, which stay neighbours.
    """
    starts = np.arange(table.num_rows)
    if training.questions_together:
        # Shards hold the questions to a text side by side: a group starts where the hash changes.
        sender = table["sender_hash"].to_numpy()
        starts = np.flatnonzero(np.append(True, sender[1:] != sender[:-1]))
    drawn = torch.randperm(len(starts), generator=torch.Generator().manual_seed(seed)).numpy()
    sizes = np.diff(np.append(starts, table.num_rows))[drawn]
    # The n-th row of the new order, in a group that begins at row b of it, is row start + (n - b)
    # of the old one. With starts [0, 2, 3], sizes 2, 1 and 2, and groups drawn as 2, 0, 1: [3, 4,
    # 0, 1, 2].
    begins = sizes.cumsum() - sizes
    order = np.repeat(starts[drawn] - begins, sizes) + np.arange(table.num_rows)
    rows = size * training.bucket_batches
    for start in range(0, table.num_rows, rows):
        yield start, table.take(order[start : start + rows])


def length_buckets(
    table: pa.Table, size: int, seed: int, *, keep_short: bool = False
) -> Iterator[pa.Table]:
    """Yield whole batches of ``size`` rows whose sender texts are about as long, in an order drawn by ``seed``.

    Rows that fill no batch are left out, before the sorting so that no length is favoured; ``keep_short`` keeps them
    where there is no whole batch at all.
    """
    whole = table.num_rows - table.num_rows % size
    if whole == 0 and keep_short:
        yield table
    # Neighbours by length share a batch. Stable, so that equal lengths keep their drawn order.
    by_length = np.argsort(table.column("sender_bytes").slice(0, whole).to_numpy(), kind="stable")
    for place in np.random.default_rng(seed).permutation(whole // size):
        yield table.take(by_length[place * size : (place + 1) * size])


def epoch_seed(training: TrainingConfig, epoch: int) -> int:
    """Return the seed of an epoch's order of rows."""
    # Further apart than the epochs of any run: no two pairs of seed and epoch share an order.
    return training.seed * 1_000_003 + epoch
