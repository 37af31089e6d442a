"""The benchmarks run, in a size that says nothing about speed."""

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.__main__ import PARTS
from benchmarks.sharing import on_one_gpu

TAKES_LONG = {"sharing", "workers"}
"""Three sweeps, whose way tests/ray_jobs/test_sharing.py goes; seven processes, whose sums tests/training/test_workers.py does."""


@pytest.mark.slow
def test_every_row_is_measured(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "benchmarks",
        "--repeats=1",
        "--steps=2",
        "--samples=64",
        "--batch_size=4",
        "--finished=5",
        "--vocabularies=16384",
        "--only",
        *(part for part in PARTS if part not in TAKES_LONG),
    ]
    done = subprocess.run(
        [*command, "--set", f"data.shard_dir={tmp_path}"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout[
        done.stdout.index("| what") :
    ].splitlines()  # Tune prints tables of its own before
    table = [line.split(" | ") for line in lines if line.startswith("| ")]
    assert table[0] == ["| what", "ratio", "goal", "measured |"] and len(table) == 25
    assert all(float(row[1]) > 0 for row in table[1:])


def test_the_planner_holds_more_trials_that_share() -> None:
    (memory, whole), (parted_memory, parted) = on_one_gpu(1), on_one_gpu(4)
    assert parted.ratio > whole.ratio > 4 and parted_memory.ratio < memory.ratio < 4


@pytest.mark.slow
def test_the_large_shapes_run_in_a_small_copy() -> None:
    command = [
        sys.executable,
        "-m",
        "benchmarks.gpu_shapes",
        "--scale=0.05",
        "--batch_size=2",
        "--steps=1",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [
        line.split(" | ")
        for line in done.stdout.splitlines()
        if line.startswith(("| joint", "| one receiver"))
    ]
    assert len(rows) == 2 and all(float(row[1]) > 0 and float(row[3]) > 0 for row in rows)
