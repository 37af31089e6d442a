"""Profiles of training steps."""

import json
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pytest
import torch

from latentwire.config import RunConfig
from latentwire.config.resolve import with_values
from latentwire.model import LatentWire
from latentwire.receivers.base import PART
from latentwire.training import checkpoints
from latentwire.training.loop import Trainer, TrainingError
from latentwire.training.profile import OPERATORS, _shares, profile_steps
from tests.conftest import shard_table, wire_of


def test_a_profile_names_the_parts_of_a_step(
    wire: LatentWire, table: pa.Table, tmp_path: Path
) -> None:
    run = with_values(wire.run, {"training.batch_size": 4, "training.alignment_steps": 0})
    wire.run = run
    printed = profile_steps(wire, table, 2, tmp_path / "profile")
    assert (tmp_path / "profile/shares.md").read_text() == printed + "\n"
    rows = {
        cells[1]: cells
        for cells in ([cell.strip() for cell in line.split("|")] for line in printed.splitlines())
    }
    parts = [
        "collate",
        "encode",
        "read llama",
        "read qwen",
        "loss llama",
        "loss qwen",
        "backward",
        "update",
    ]
    shares = {
        name: float(rows[name][3].rstrip("%"))
        for name in [*parts, "everything else", "**whole step**"]
    }
    assert shares.pop("**whole step**") == 100
    assert sum(shares.values()) == pytest.approx(100, abs=2) and shares["backward"] > 1
    trace = json.loads((tmp_path / "profile/trace.json").read_text())
    assert {f"{PART}{name}" for name in parts} <= {
        event.get("name") for event in trace["traceEvents"]
    }


def test_a_profile_begins_as_a_training_would(
    wire: LatentWire, table: pa.Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[Path | None] = []
    monkeypatch.setattr(checkpoints, "restore", lambda trainer, last: begun.append(last))
    monkeypatch.setattr(Trainer, "step", lambda *_: begun or pytest.fail("a step came first"))
    wire.run = with_values(wire.run, {"training.batch_size": 4})
    profile_steps(wire, table, 1, tmp_path)
    assert begun == [None]


def test_a_profile_asks_for_enough_batches(
    wire: LatentWire, table: pa.Table, tmp_path: Path
) -> None:
    with pytest.raises(TrainingError, match="needs 102 batches, the data has"):
        profile_steps(wire, table, 100, tmp_path)


@pytest.mark.parametrize("questions", [1, 2])
@pytest.mark.parametrize("sequential", [False, True])
def test_every_part_of_a_backward_pass_bears_its_name(
    run: RunConfig, monkeypatch: pytest.MonkeyPatch, questions: int, sequential: bool
) -> None:
    """One after the other each receiver's graph is run backwards, then the encoder's."""
    wire = wire_of(with_values(run, {"training.sequential_models": sequential}))
    trainer, named = Trainer(wire, 1), []
    batches = trainer.collate(shard_table(run, questions, questions=questions), 0)
    monkeypatch.setattr(
        torch.profiler, "record_function", lambda name: nullcontext(named.append(name))
    )
    trainer.backward(batches)
    expected = ["encode"]
    for name in wire.receivers:
        expected += [f"read {name}"] * questions  # what both begin with, then the questions
        expected += [f"loss {name}", *(["backward"] if sequential else [])]
    assert named == [f"{PART}{name}" for name in [*expected, "backward"]]


@dataclass(frozen=True)
class Event:
    """What torch's profiler says of one name: microseconds on the host and on the device, in all and by itself."""

    key: str
    cpu_time_total: float
    device_time_total: float = 0.0
    self_cpu_time_total: float = 0.0
    self_device_time_total: float = 0.0
    count: int = 2


def test_shares_are_of_the_measured_seconds_and_the_dearest_come_first() -> None:
    """Of two steps in 0.2 s, milliseconds are one step's and shares those of both."""
    events = [
        Event(f"{PART}update", 20_000.0),
        Event("aten::add", 70_000.0, self_cpu_time_total=8_000.0, count=6),
        Event(f"{PART}encode", 60_000.0),
        Event("aten::mm", 50_000.0, self_cpu_time_total=50_000.0, count=4),
    ]
    assert _shares(events, 0.2, 2).splitlines() == [
        "| part of a step | ms | share |",
        "|---|---|---|",
        "| encode | 30.0 | 30.0% |",
        "| update | 10.0 | 10.0% |",
        "| everything else | 60.0 | 60.0% |",
        "| **whole step** | 100.0 | 100.0% |",
        "| `aten::mm` itself, 2 calls | 25.0 | 25.0% |",
        "| `aten::add` itself, 3 calls | 4.0 | 4.0% |",
    ]


def test_a_device_has_a_column_and_decides_which_operators_are_dear() -> None:
    events = [
        Event(f"{PART}encode", 60_000.0, 90_000.0),
        Event("aten::mm", 50_000.0, 0.0, 50_000.0, 4_000.0),
        Event("aten::add", 70_000.0, 0.0, 8_000.0, 60_000.0),
    ]
    events += [Event(f"aten::none_{n}", 1.0, 0.0, 1.0, 1.0) for n in range(50)]
    lines = _shares(events, 0.2, 2).splitlines()
    assert lines[:7] == [
        "| part of a step | ms | share | device ms |",
        "|---|---|---|---|",
        "| encode | 30.0 | 30.0% | 45.0 |",
        "| everything else | 70.0 | 70.0% | 0.0 |",
        "| **whole step** | 100.0 | 100.0% | 0.0 |",
        "| `aten::add` itself, 1 calls | 4.0 | 4.0% | 30.0 |",
        "| `aten::mm` itself, 1 calls | 25.0 | 25.0% | 2.0 |",
    ]
    assert len(lines) == 5 + OPERATORS
