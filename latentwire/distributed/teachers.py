"""Have each receiver read the full text once for all trials, and keep what it says beside the shards.

Columns are those of :mod:`latentwire.data.teachers`. A file that is there is whole; what is missing
is made by a Ray Data actor pool, so a run that was killed goes on where it stopped. Where the tuned
text reader teaches (``losses.kd_teacher``), it is trained first, in a task of its own.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from latentwire.config import LossConfig, ReceiverConfig, RunConfig
from latentwire.data import shards, teachers
from latentwire.data.pipeline import LINE_SECONDS, quiet_ray_data
from latentwire.data.readers import is_reader, teaching_reader
from latentwire.distributed.remote import on_cluster
from latentwire.evaluation.conditions import Condition
from latentwire.losses.bundles import state_depths
from latentwire.losses.terms import normalised, teacher_rows
from latentwire.model import LatentWire
from latentwire.models.lm import LMWrapper
from latentwire.prompts.batch import collate
from latentwire.prompts.sequences import PromptBuilder
from latentwire.receivers.local import LocalReceiver
from latentwire.storage import Place, place, read_parquet, size, write
from latentwire.threads import use_threads
from latentwire.training import text_readers

BATCH_ROWS = 32
"""Texts that a teacher reads together."""
FULL_TEXT = Condition("text", tuned=True)
"""The row of a table whose reader teaches."""


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
    for name, path in teachers.readers(run, train).items():
        ensure_text_reader(run, f"teacher {name}", name, path, train, gpus)
    directories = teachers.paths(run, train)
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
        origin = f"made in {time.monotonic() - began:.0f} s," if missing else "reused from"
        print(
            f"teacher {receiver.name}: {rows:,} rows, {held / rows * 1e3 / 1e6:.2f} MB per 1,000 rows, "
            f"{origin} {path}",
            flush=True,
        )
    return directories


def ensure_text_reader(
    run: RunConfig, what: str, name: str, path: Place, train: Place, gpus: float
) -> None:
    """Train a receiver's text reader on a worker's resources, unless it is there.

    Args:
        run: the configuration.
        what: the part that needs it, for the lines that are printed.
        name: the receiver.
        path: where the reader lies.
        train: the training shards.
        gpus: GPUs that the training asks for.
    """
    if is_reader(path):
        return
    print(f"{what}: its text reader is trained first", flush=True)
    loss = on_cluster(run, gpus, train_reader, run, name, train)
    print(f"{what}: development loss of its text reader: {loss}", flush=True)


def train_reader(run: RunConfig, name: str, train: Place) -> str:
    """Train the text reader that teaches; return its development loss in a few words.

    Args:
        run: whose reader it is.
        name: the receiver.
        train: the training shards.
    """
    use_threads(run.training.cpus_per_worker)
    lm = LocalReceiver(next(receiver for receiver in run.receivers if receiver.name == name))
    paths: text_readers.Splits = {"train": train, "dev": shards.shard_path(run, "dev")}
    return text_readers.ensure_reader(run, lm, FULL_TEXT, paths)[1]


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
    cluster = ray.cluster_resources()
    room = cluster.get("GPU", 0.0) / gpus if gpus else cluster.get("CPU", 1.0) / cpus
    readers = max(1, min(len(missing), int(room)))
    # A block for each file, so that a reader writes one whenever it is done with it.
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
    # Ray Data computes as its rows are asked for; files are written on the way.
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
        self.lm = LocalReceiver(receiver)
        self.builder = PromptBuilder(
            self.lm.tokenizer, receiver, self.run.prompt, self.run.data.send
        )
        self.reader: LatentWire | None = None
        if self.run.losses.kd_teacher == "tuned":
            where = {name: teaching_reader(self.run, receiver, self.train)}
            receivers, weights = {name: self.lm}, {name: self.lm.fingerprint()}
            self.reader = text_readers.load_reader(self.run, receivers, FULL_TEXT, where, weights)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Write the columns of shard files; ``batch["file"]`` holds their names."""
        for name in batch["file"]:
            rows = read_parquet(self.train / name)
            table = read_columns(self.lm, self.builder, self.run, rows, self.reader)
            write(self.path / name, functools.partial(pq.write_table, table))
        return batch


def read_columns(
    lm: LMWrapper,
    builder: PromptBuilder,
    run: RunConfig,
    table: pa.Table,
    reader: LatentWire | None = None,
) -> pa.Table:
    """Return one receiver's teacher columns for shard rows, in their order.

    ``<name>_teacher_right`` says whether the receiver would give the row's answer itself: each of its
    tokens is the likeliest after those before it, which is what greedy decoding takes.
    ``<name>_teacher_count`` is a row's number of supervised positions that the others describe, K at
    most. For each of them ``…_ids`` and ``…_log_p`` hold top-k entries, ``…_log_tail`` one, and
    ``…_states`` all chosen layers' states, layer-normalised as the loss compares them: raw ones may go
    beyond fp16's 65,504 (Gemma 3 270M reaches 29,824). Floats are fp16.

    Args:
        lm: the receiver.
        builder: of its prompts, as the wire reads them.
        run: the configuration.
        table: shard rows.
        reader: its tuned text reader, whose prefix stands before every text. None: it reads as it is.
    """
    losses, k = run.losses, teachers.most_tokens(run.losses)
    prefix = 0 if reader is None else reader.builders[lm.name].prefix
    depths = state_depths(losses)
    columns_read = [f"{lm.name}_{piece}_ids" for piece in ("context", "question", "answer")]
    rows = table.select(columns_read).to_pydict()
    sequences = []
    for context, question, answer in zip(*rows.values(), strict=True):
        sequences.append(builder.text(context, question, answer, prefix))
    # By length, so that texts read together need little padding. Outputs go back to their rows.
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i].ids))
    outputs: list[dict[str, np.ndarray]] = [{}] * len(sequences)
    right = [True] * len(sequences)
    for start in range(0, len(order), BATCH_ROWS):
        chosen = order[start : start + BATCH_ROWS]
        batch = lm.read_head(collate(sequences[i] for i in chosen).to(lm.device))
        reading = nullcontext() if reader is None else reader.reading(lm.name, batch, None)
        with torch.no_grad(), reading as soft_ND:
            # N: all supervised positions of the texts read together, row by row.
            hidden_ND, states = lm.supervised_states(batch, soft_ND, depths)
            wrong_N = lm.logits(hidden_ND).argmax(-1).cpu() != batch.target_N.cpu()
            # offset_N counts from the beginning of an answer; M of the N are among a row's first k.
            first_N = batch.offset_N < k
            compared = [state_ND[first_N] for state_ND in states]
            tensors = _tensors(lm, hidden_ND[first_N], compared, losses)
        row_N, row_M = batch.row_N.cpu(), batch.row_N[first_N].cpu()
        for number, index in enumerate(chosen):
            # The answer as a whole counts, not its first k tokens.
            right[index] = not bool(wrong_N[row_N == number].any())
            of_row_M = row_M == number
            # [first k, entries] of the row, flat: its count says how to cut it again.
            flat = {name: tensor[of_row_M].flatten() for name, tensor in tensors.items()}
            outputs[index] = {name: tensor.numpy() for name, tensor in flat.items()}
    # From the knobs, not from the outputs: a file whose rows were all rejected has none.
    types: dict[str, pa.DataType] = {}
    if teachers.compares_top_k(losses):
        types |= {"ids": pa.int32(), "log_p": pa.float16(), "log_tail": pa.float16()}
    if depths:
        types["states"] = pa.float16()
    columns = {}
    for name, kind in types.items():
        columns[name] = pa.array([row[name] for row in outputs], pa.list_(kind))
    columns["count"] = pa.array(
        [len(sequence.supervised[:k]) for sequence in sequences], pa.int32()
    )
    columns["right"] = pa.array(right, pa.bool_())
    return pa.table({f"{lm.name}_teacher_{name}": column for name, column in columns.items()})


def _tensors(
    lm: LMWrapper, hidden_ND: torch.Tensor, states: list[torch.Tensor], losses: LossConfig
) -> dict[str, torch.Tensor]:
    tensors = {}
    if teachers.compares_top_k(losses):
        rows = teacher_rows(lm.logits(hidden_ND), losses.kd_temperature, losses.kd_top_k)
        assert rows.ids_NK is not None and rows.log_tail_N is not None
        tensors = {
            "ids": rows.ids_NK.int(),
            "log_p": rows.log_p_NK.half(),
            "log_tail": rows.log_tail_N.half(),
        }
    if states:  # [M, depths, D]
        tensors["states"] = torch.stack([normalised(state_ND) for state_ND in states], 1).half()
    return {name: tensor.cpu() for name, tensor in tensors.items()}
