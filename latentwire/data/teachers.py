"""Columns that hold what each receiver says on the full text, kept beside the shards.

A teacher is the receiver itself, reading the row's text instead of its message, as it is or behind
the prefix of its tuned text reader. It never changes, so its log-probabilities of the likeliest
tokens and its hidden states of chosen layers, at the first K supervised positions, are columns:
``<shard_dir>/teacher-<receiver>-<hash>`` holds one Parquet file for every file of the training
shards, row by row. The hash covers the shards, the receiver's weights, the reader and the knobs that
decide what is kept. :mod:`latentwire.distributed.teachers` makes them.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any, NoReturn

import pyarrow as pa
import torch

from latentwire.config import LossConfig, ReceiverConfig, RunConfig
from latentwire.data import shards
from latentwire.data.readers import is_reader, teaching_reader, weights_id
from latentwire.data.sources import DataError
from latentwire.losses.bundles import Teacher, state_depths, teacher_reads
from latentwire.losses.terms import TeacherRows
from latentwire.storage import Place

TEACHER_VERSION = 3
"""Raised whenever the same columns would hold other numbers."""


def needed(losses: LossConfig) -> bool:
    """Return whether a run compares with teachers, and with few enough tokens for columns to hold them."""
    return "states" in teacher_reads(losses) or compares_top_k(losses)


def compares_top_k(losses: LossConfig) -> bool:
    """Return whether columns hold the likeliest tokens; a whole vocabulary is too large to keep."""
    return losses.kd_top_k > 0 and "logits" in teacher_reads(losses)


def most_tokens(losses: LossConfig) -> int:
    """Return K, the largest ``k`` that the schedule reaches."""
    # A schedule's factor stays between its start and its end.
    schedule = losses.schedules.get("k")
    return max(1, round(losses.k * max((schedule.start, schedule.end) if schedule else (1.0,))))


def teacher_path(run: RunConfig, receiver: ReceiverConfig, train: Place) -> Place:
    """Return the directory of one receiver's columns for these training shards, whether they are there or not."""
    losses = run.losses
    tokens = None
    if "logits" in teacher_reads(losses):
        tokens = [losses.kd_top_k, losses.kd_temperature]
    spec: dict[str, Any] = {
        "teacher_version": TEACHER_VERSION,
        "shards": shards.read_manifest(train)["key"],  # layout, template and anchor are part of it
        "weights": weights_id(receiver),
        "reads": [receiver.dtype, receiver.quantization, receiver.revision],
        "k": most_tokens(losses),
        "tokens": tokens,
        "depths": state_depths(losses) or None,
    }
    if losses.kd_teacher == "tuned":
        spec["reader"] = teaching_reader(run, receiver, train).name
    key = hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest()[:16]
    return train.parent / f"teacher-{receiver.name}-{key}"


def paths(run: RunConfig, train: Place) -> dict[str, Place]:
    """Return receiver → directory of its columns; empty where the run needs none."""
    if not needed(run.losses):
        return {}
    return {r.name: teacher_path(run, r, train) for r in run.receivers}


def readers(run: RunConfig, train: Place) -> dict[str, Place]:
    """Return receiver → directory of its text reader, where those teach; else nothing."""
    losses = run.losses
    if losses.kd_teacher == "untuned" or not (needed(losses) or losses.slot_kd_weight):
        return {}
    return {r.name: teaching_reader(run, r, train) for r in run.receivers}


def complete(run: RunConfig, train: Place) -> bool:
    """Return whether every column, and every reader, that the run needs is there."""
    files = shards.read_manifest(train)["files"]
    for path in paths(run, train).values():
        if not all((path / name).exists() for name in files):
            return False
    return all(is_reader(path) for path in readers(run, train).values())


def teacher_of(table: pa.Table, name: str, losses: LossConfig) -> Teacher | None:
    """Return one receiver's predictions for a batch of shard rows, as the losses take them.

    N counts every supervised token of every answer. Rows of those after the first K hold nothing, and
    no loss reads them: K is the largest ``k`` of the run, or of the whole sweep.

    Returns:
        None where columns are missing and the receiver can read the text in the step itself, or no
        term needs them.

    Raises:
        DataError: columns are missing that no step can replace.
    """
    reads = teacher_reads(losses)
    first_column = {"logits": f"{name}_teacher_ids", "states": f"{name}_teacher_states"}
    missing = [first_column[read] for read in reads if first_column[read] not in table.column_names]
    if missing and losses.kd_teacher == "tuned":
        _refuse_without(missing, "losses.kd_teacher tuned")
    if missing or not reads:
        return None
    answers = table[f"{name}_answer_ids"].to_pylist()
    counts = table[f"{name}_teacher_count"].to_pylist()
    # An answer's tokens and its stop are supervised; the first ``count`` of them have columns.
    pairs = zip(answers, counts, strict=True)
    has_columns_N = torch.cat([torch.arange(len(ids) + 1) < count for ids, count in pairs])

    def spread(column: str, dtype: torch.dtype) -> torch.Tensor:
        # [M, E] for the M tokens that have columns → [N, E], 0 at the others.
        flat = (
            table[f"{name}_teacher_{column}"]
            .combine_chunks()
            .flatten()
            .to_numpy(zero_copy_only=False)
        )
        # A copy, since Arrow's memory cannot be written to, which torch warns of.
        values_ME = torch.from_numpy(flat.copy()).to(dtype).view(int(has_columns_N.sum()), -1)
        empty_NE = torch.zeros(len(has_columns_N), values_ME.shape[1], dtype=dtype)
        return empty_NE.masked_scatter(has_columns_N[:, None], values_ME)

    rows: TeacherRows | None = None
    states: tuple[torch.Tensor, ...] = ()
    if "logits" in reads:
        tail_N = spread("log_tail", torch.float32).squeeze(1)
        rows = TeacherRows(
            spread("ids", torch.long), spread("log_p", torch.float32), tail_N, losses.kd_temperature
        )
    if "states" in reads:
        states_NE = spread("states", torch.float32)
        # [N, depths · D] → one [N, D] a depth.
        states = states_NE.view(len(states_NE), len(losses.hidden_kd_depths), -1).unbind(1)
    return Teacher(rows, states)


def taught_rows(table: pa.Table, name: str, losses: LossConfig) -> list[bool] | None:
    """Return which rows one receiver's teacher teaches; None: all of them.

    With ``losses.kd_rows: right`` they are those whose answer the teacher would give itself. Raises
    :class:`~latentwire.data.sources.DataError` where no column says so.
    """
    if losses.kd_rows == "all" or not teacher_reads(losses):
        return None
    if (column := f"{name}_teacher_right") not in table.column_names:
        _refuse_without([column], "losses.kd_rows right")
    right: list[bool] = table[column].to_pylist()
    return right


def _refuse_without(missing: list[str], knob: str) -> NoReturn:
    raise DataError(
        f"{knob} needs rows with teachers' columns, got none of {', '.join(missing)}; make them by "
        f"`latentwire preprocess` with this configuration"
    )
