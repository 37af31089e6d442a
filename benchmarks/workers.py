"""What several workers of one run make of the same batches."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

import pyarrow as pa
import torch
import torch.distributed as dist
import torch.multiprocessing as processes

from benchmarks.measure import Row
from benchmarks.trials import in_halves, second_half_seconds
from latentwire.config import RunConfig

COUNTS = (1, 2, 4)


def rows(run: RunConfig, table: pa.Table, steps: int) -> list[Row]:
    """Each of ``COUNTS`` of gloo workers, one thread each, takes its share of every batch of the run."""
    speeds = {count: _examples_per_s(run, table, steps, count) / count for count in COUNTS}
    rates = " / ".join(f"{speed:.0f}" for speed in speeds.values())
    counts = ", ".join(map(str, COUNTS))
    detail = (
        f"{os.cpu_count()} cores, batches of {run.training.batch_size} shared out; "
        f"{counts} workers: {rates} examples/s each"
    )
    measured = []
    for count in COUNTS[1:]:
        what = f"examples/s per worker: {count} workers ÷ 1"
        measured.append(Row(what, speeds[count] / speeds[1], "report", detail))
    return measured


def _examples_per_s(run: RunConfig, table: pa.Table, steps: int, count: int) -> float:
    with tempfile.TemporaryDirectory() as folder:
        processes.spawn(_work, (in_halves(run, steps), table, count, folder), nprocs=count)
        # A step is over when its slowest worker is done.
        seconds = max(json.loads(path.read_text()) for path in Path(folder).glob("*.json"))
    return steps * run.training.batch_size / seconds


def _work(rank: int, run: RunConfig, table: pa.Table, count: int, folder: str) -> None:
    torch.set_num_threads(1)
    # They meet at a file: no port has to be free.
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=count
    )
    (Path(folder) / f"{rank}.json").write_text(
        json.dumps(second_half_seconds(run, table, rank, count))
    )
    dist.destroy_process_group()
