"""Profiles of training steps."""

import json
from contextlib import nullcontext
from pathlib import Path

import pyarrow as pa
import pytest
import torch

from latentwire.config.resolve import with_values
from latentwire.model import LatentWire
from latentwire.receivers.base import PART
from latentwire.training import checkpoints
from latentwire.training.loop import Trainer, TrainingError
from latentwire.training.profile import profile_steps


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


def test_a_receivers_reading_and_its_loss_bear_its_name(
    wire: LatentWire, table: pa.Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, named = Trainer(wire, 1), []
    batches = trainer.collate(table.slice(0, 1), 0)
    monkeypatch.setattr(
        torch.profiler, "record_function", lambda name: nullcontext(named.append(name))
    )
    trainer.backward(batches)
    of_each = [f"{PART}{what} {name}" for name in wire.receivers for what in ("read", "loss")]
    assert named == [f"{PART}encode", *of_each, f"{PART}backward"]
