"""Predictions of each receiver on the full text, computed once for all trials and kept beside the shards.

A teacher is the receiver itself, reading the row's text instead of its message. It never changes, so
its log-probabilities of the likeliest tokens and its hidden states of chosen layers, at the first K
supervised positions, are columns: ``<shard_dir>/teacher-<receiver>-<hash>`` holds one Parquet file
for every file of the training shards, row by row. The hash covers the shards, the receiver's weights
and the knobs that decide what is kept. A file that is there is whole; what is missing is made by a
Ray Data actor pool, so a run that was killed goes on where it stopped.
"""

from __future__ import annotations

import functools
import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from latentwire.config import LossConfig, ReceiverConfig, RunConfig
from latentwire.data import shards
from latentwire.data.pipeline import LINE_SECONDS, quiet_ray_data
from latentwire.losses.bundles import Teacher, state_depths, teacher_reads
from latentwire.losses.terms import TeacherRows, normalised, teacher_rows
from latentwire.models.lm import LMWrapper
from latentwire.models.weights import resolve
from latentwire.prompts.sequences import PromptBuilder, collate
from latentwire.storage import Place, place, read_parquet, size, write
from latentwire.threads import use_threads

TEACHER_VERSION = 2
"""Raised whenever the same columns would hold other numbers."""
BATCH_ROWS = 32
"""Texts that a teacher reads together."""


def needed(losses: LossConfig) -> bool:
    """Return whether a run compares with teachers, and with few enough tokens for columns to hold them."""
    return "states" in teacher_reads(losses) or compares_top_k(losses)


def compares_top_k(losses: LossConfig) -> bool:
    """Return whether columns hold the likeliest tokens; a whole vocabulary is too large to keep."""
    return losses.kd_top_k > 0 and "logits" in teacher_reads(losses)


def most_tokens(losses: LossConfig) -> int:
    """Return K, the largest ``k`` that the schedule reaches."""
    schedule = losses.schedules.get("k")
    return max(1, round(losses.k * max((schedule.start, schedule.end) if schedule else (1.0,))))


def teacher_path(run: RunConfig, receiver: ReceiverConfig, train: Place) -> Place:
    """Return the directory of one receiver's columns for these training shards, whether they are there or not."""
    losses = run.losses
    spec = {
        "teacher_version": TEACHER_VERSION,
        "shards": shards.read_manifest(train)["key"],  # layout, template and anchor are part of it
        "weights": weights_id(receiver),
        "reads": [receiver.dtype, receiver.quantization, receiver.revision],
        "k": most_tokens(losses),
        "tokens": [losses.kd_top_k, losses.kd_temperature]
        if "logits" in teacher_reads(losses)
        else None,
        "depths": state_depths(losses) or None,
    }
    key = hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest()[:16]
    return train.parent / f"teacher-{receiver.name}-{key}"


def weights_id(receiver: ReceiverConfig) -> Any:
    """Return what identifies weights unread: a Hub id, or names, sizes and times of a directory's files."""
    path = Path(resolve(receiver))
    if not path.is_dir():
        return receiver.model
    files = sorted(path.glob("*.safetensors")) or sorted(path.glob("*.bin"))
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]


def paths(run: RunConfig, train: Place) -> dict[str, Place]:
    """Return receiver → directory of its columns; empty where the run needs none."""
    return (
        {r.name: teacher_path(run, r, train) for r in run.receivers} if needed(run.losses) else {}
    )


def complete(run: RunConfig, train: Place) -> bool:
    """Return whether every column that the run needs is there."""
    files = shards.read_manifest(train)["files"]
    return all((path / name).exists() for path in paths(run, train).values() for name in files)


def ensure_teachers(run: RunConfig, train: Place, gpus: float = 0.0) -> dict[str, Place]:
    """Make every receiver's columns for complete training shards, unless they are there.

    Ray must be initialised to make them.

    Args:
        run: the configuration; where it needs no columns, none are made.
        train: the shards.
        gpus: GPUs that one reader asks for.

    Returns:
        Receiver → directory of its columns.
    """
    directories = paths(run, train)
    files = shards.read_manifest(train)["files"]
    for receiver in run.receivers if directories else ():
        path = directories[receiver.name]
        missing = [name for name in files if not (path / name).exists()]
        began = time.monotonic()
        if missing:
            path.mkdir(parents=True, exist_ok=True)
            _make(run, receiver, train, path, missing, gpus)
        rows = shards.read_manifest(train)["rows"]
        held = sum(size(path / name) for name in files)
        print(
            f"teacher {receiver.name}: {rows:,} rows, {held / rows * 1e3 / 1e6:.2f} MB per 1,000 rows, "
            f"{f'made in {time.monotonic() - began:.0f} s,' if missing else 'reused from'} {path}",
            flush=True,
        )
    return directories


def _make(
    run: RunConfig,
    receiver: ReceiverConfig,
    train: Place,
    path: Place,
    missing: list[str],
    gpus: float,
) -> None:
    import ray
    import ray.data

    quiet_ray_data()
    cpus = run.training.cpus_per_worker
    room = (
        ray.cluster_resources().get("GPU", 0.0) / gpus
        if gpus
        else ray.cluster_resources().get("CPU", 1.0) / cpus
    )
    readers = max(1, min(len(missing), int(room)))
    done = ray.data.from_items(
        [{"file": name} for name in missing], override_num_blocks=len(missing)
    ).map_batches(
        TeacherReader,
        fn_constructor_args=(run.model_dump(mode="json"), receiver.name, str(train), str(path)),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=readers),
        num_cpus=cpus,
        num_gpus=gpus or None,
    )
    last_line = time.monotonic()
    for count, _ in enumerate(done.iter_rows(), start=1):
        if count == len(missing) or time.monotonic() - last_line < LINE_SECONDS:
            continue
        last_line = time.monotonic()
        print(f"teacher {receiver.name}: {count}/{len(missing)} files", flush=True)


class TeacherReader:
    """One actor of the pool: holds a receiver, reads a shard file, writes its columns into a file of the same name."""

    def __init__(self, run: Mapping[str, Any], name: str, train: str, path: str) -> None:
        self.run, self.train, self.path = RunConfig.model_validate(run), place(train), place(path)
        use_threads(self.run.training.cpus_per_worker)
        receiver = next(receiver for receiver in self.run.receivers if receiver.name == name)
        self.lm = LMWrapper(receiver)
        self.builder = PromptBuilder(
            self.lm.tokenizer, receiver, self.run.prompt, self.run.data.send
        )

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Write the columns of shard files; ``batch["file"]`` holds their names."""
        for name in batch["file"]:
            table = read_columns(self.lm, self.builder, self.run, read_parquet(self.train / name))
            write(self.path / name, functools.partial(pq.write_table, table))
        return batch


def read_columns(
    lm: LMWrapper, builder: PromptBuilder, run: RunConfig, table: pa.Table
) -> pa.Table:
    """Return one receiver's teacher columns for shard rows, in their order.

    ``<name>_teacher_count`` is a row's number of supervised positions that the others describe, K at
    most. For each of them ``…_ids`` and ``…_log_p`` hold top-k entries, ``…_log_tail`` one, and
    ``…_states`` all chosen layers' states, layer-normalised as the loss compares them: raw ones may go
    beyond fp16's 65,504 (Gemma 3 270M reaches 29,824). Floats are fp16.
    """
    losses, k = run.losses, most_tokens(run.losses)
    depths = state_depths(losses)
    rows = table.select(
        [f"{lm.name}_{piece}_ids" for piece in ("context", "question", "answer")]
    ).to_pydict()
    sequences = [builder.text(*pieces) for pieces in zip(*rows.values(), strict=True)]
    order = sorted(
        range(len(sequences)), key=lambda i: len(sequences[i].ids)
    )  # alike in length, so little padding
    outputs: list[dict[str, np.ndarray]] = [{}] * len(sequences)
    for start in range(0, len(order), BATCH_ROWS):
        chosen = order[start : start + BATCH_ROWS]
        batch = collate(
            replace(sequences[i], supervised=sequences[i].supervised[:k]) for i in chosen
        ).to(lm.device)
        with torch.no_grad():
            hidden_ND, states = lm.supervised_states(lm.read_head(batch), None, depths)
            tensors = _tensors(lm, hidden_ND, states, losses)
        for number, index in enumerate(chosen):
            in_row_N = (batch.row_N == number).cpu()
            outputs[index] = {
                name: tensor[in_row_N].flatten().numpy() for name, tensor in tensors.items()
            }
    types = {
        "ids": pa.int32(),
        "log_p": pa.float16(),
        "log_tail": pa.float16(),
        "states": pa.float16(),
    }
    columns = {
        name: pa.array([row[name] for row in outputs], pa.list_(types[name])) for name in outputs[0]
    }
    columns["count"] = pa.array(
        [len(sequence.supervised[:k]) for sequence in sequences], pa.int32()
    )
    return pa.table({f"{lm.name}_teacher_{name}": column for name, column in columns.items()})


def _tensors(
    lm: LMWrapper, hidden_ND: torch.Tensor, states: list[torch.Tensor], losses: LossConfig
) -> dict[str, torch.Tensor]:
    tensors = {}
    if compares_top_k(losses):
        rows = teacher_rows(lm.logits(hidden_ND), losses.kd_temperature, losses.kd_top_k)
        assert rows.ids_NK is not None and rows.log_tail_N is not None
        tensors = {
            "ids": rows.ids_NK.int(),
            "log_p": rows.log_p_NK.half(),
            "log_tail": rows.log_tail_N.half(),
        }
    if states:
        tensors["states"] = torch.stack([normalised(state_ND) for state_ND in states], 1).half()
    return {name: tensor.cpu() for name, tensor in tensors.items()}


def teacher_of(table: pa.Table, name: str, losses: LossConfig) -> Teacher | None:
    """Return one receiver's predictions for a batch of shard rows, as the losses take them.

    N counts every supervised token of every answer. Rows of those after the first K hold nothing, and
    no loss reads them: K is the largest ``k`` of the run, or of the whole sweep.

    Returns:
        None where columns are missing, or no term needs them.
    """
    reads = teacher_reads(losses)
    first_column = {"logits": f"{name}_teacher_ids", "states": f"{name}_teacher_states"}
    if not reads or any(first_column[read] not in table.column_names for read in reads):
        return None
    answers, counts = (
        table[f"{name}_answer_ids"].to_pylist(),
        table[f"{name}_teacher_count"].to_pylist(),
    )
    has_columns_N = torch.cat(
        [torch.arange(len(a) + 1) < count for a, count in zip(answers, counts, strict=True)]
    )

    def spread(column: str, dtype: torch.dtype) -> torch.Tensor:
        flat = (
            table[f"{name}_teacher_{column}"]
            .combine_chunks()
            .flatten()
            .to_numpy(zero_copy_only=False)
        )
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
        states = states_NE.view(len(states_NE), len(losses.hidden_kd_depths), -1).unbind(1)
    return Teacher(rows, states)
