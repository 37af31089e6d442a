"""Columns say what the live teacher says, to the precision of fp16, for exactly the tokens that are compared."""

import re
from pathlib import Path

import pyarrow as pa
import pytest
import torch

from latentwire.config import LossConfig, ReceiverConfig, RunConfig
from latentwire.config.resolve import with_values
from latentwire.data import shards, streams, teachers
from latentwire.distributed.local_shards import local_shards
from latentwire.model import LatentWire
from latentwire.training.loop import Trainer
from tests.conftest import shard_table

KD = {
    "losses.kd_weight": 1.0, "losses.kd_top_k": 16, "losses.kd_temperature": 2.0, "losses.k": 2,
    "losses.hidden_kd_weight": 0.5,
}  # fmt: skip


def with_columns(trainer: Trainer, table: pa.Table, values: dict) -> pa.Table:
    run = with_values(trainer.wire.run, values)
    for name, lm in trainer.wire.receivers.items():
        said = teachers.read_columns(lm, trainer.wire.builders[name], run, table)
        for column in said.column_names:
            table = table.append_column(column, said[column])
    return table


@pytest.fixture(scope="module")
def trainer(run: RunConfig) -> Trainer:
    return Trainer(LatentWire(with_values(run, KD)), 4)


@pytest.mark.parametrize("most", [2, 5], ids=["k", "k-of-a-larger-sweep"])
def test_a_step_with_columns_is_the_step_with_a_live_teacher(trainer: Trainer, most: int) -> None:
    rows = shard_table(trainer.wire.run, 70)  # more than are read together, in another order
    table = with_columns(trainer, rows, {"losses.k": most})
    live = trainer.backward(trainer.collate(rows.slice(30, 9), 0))
    expected = {
        name: p.grad.clone()
        for name, p in trainer.wire.interlingua.named_parameters()
        if p.grad is not None
    }
    trainer.optimizer.zero_grad(set_to_none=True)
    told = trainer.backward(trainer.collate(table.slice(30, 9), 0))
    for term in ("kd_llama", "kd_qwen", "hidden_kd_llama", "hidden_kd_qwen"):
        assert told[term] == pytest.approx(live[term], rel=5e-3) and live[term] > 0.01
    for name, p in trainer.wire.interlingua.named_parameters():
        if name in expected:
            torch.testing.assert_close(p.grad, expected[name], atol=2e-3, rtol=2e-2, msg=name)
    trainer.optimizer.zero_grad(set_to_none=True)


def test_no_receiver_reads_a_text_that_has_columns(
    trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = shard_table(trainer.wire.run, 6)
    (batch,) = trainer.collate(with_columns(trainer, rows, {}), 0)
    for lm in trainer.wire.receivers.values():
        monkeypatch.setattr(lm, "supervised_states", None)
    for name, lm in trainer.wire.receivers.items():
        assert isinstance(batch.teacher[name], teachers.Teacher)
        lm.read_teacher(batch.teacher[name], trainer.wire.run.losses)


def test_states_beyond_fp16_are_columns_like_any_other(run: RunConfig) -> None:
    """Gemma 3 reaches 30,000 inside, others more; fp16 ends at 65,504. All that goes into the states is that much larger."""
    values = {"losses.hidden_kd_weight": 1.0, "losses.k": 2, "losses.hidden_kd_depths": (0.5,)}
    trainer = Trainer(LatentWire(with_values(run, values)), 4)
    rows = shard_table(trainer.wire.run, 8)
    for lm in trainer.wire.local_receivers():
        for parameter_name, parameter in lm.lm.named_parameters():
            if any(part in parameter_name for part in ("embed_tokens", "o_proj", "down_proj")):
                parameter.mul_(1e6)
    live = trainer.backward(trainer.collate(rows, 0))
    trainer.optimizer.zero_grad(set_to_none=True)
    table = with_columns(trainer, rows, values)
    for name in trainer.wire.receivers:
        stored = torch.tensor(
            table[f"{name}_teacher_states"].combine_chunks().flatten().to_pylist()
        )
        assert 0 < stored.abs().max() < 100
    told = trainer.backward(trainer.collate(table, 0))
    for term in ("hidden_kd_llama", "hidden_kd_qwen"):
        assert told[term] == pytest.approx(live[term], rel=5e-3) and live[term] > 0.01


def test_what_is_needed_and_how_far() -> None:
    assert not teachers.needed(LossConfig()) and not teachers.needed(
        LossConfig(kd_weight=1.0, kd_top_k=0)
    )
    assert teachers.needed(LossConfig(kd_weight=1.0, kd_top_k=8)) and teachers.needed(
        LossConfig(hidden_kd_weight=1.0)
    )
    assert teachers.most_tokens(LossConfig(k=3)) == 3
    growing = {"k": {"kind": "linear", "start": 0.5, "end": 2.0, "steps": 10}}
    assert teachers.most_tokens(LossConfig.model_validate({"k": 3, "schedules": growing})) == 6


@pytest.mark.slow
def test_files_are_made_once_and_missing_ones_again(
    run: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = {"data.samples": 70, "data.shard_mib": 0.006, "data.shard_dir": str(tmp_path)}
    run = with_values(run, KD | sizes | {"data.dev_samples": 4, "data.validation_samples": 4})
    train = local_shards(run)["train"]
    files = shards.read_manifest(train)["files"]
    first = {r.name: teachers.teacher_path(run, r, train) for r in run.receivers}
    assert (
        len(files) == 2
        and teachers.complete(run, train)
        and "MB per 1,000 rows, made in" in capsys.readouterr().out
    )
    joined = streams.training_table(run, train)
    assert joined.num_rows == 70 and teachers.teacher_of(joined, "qwen", run.losses) is not None
    kept, lost = (first["llama"] / name for name in files)
    time, whole = kept.stat().st_mtime_ns, lost.read_bytes()
    lost.unlink()
    assert not teachers.complete(run, train)
    local_shards(run)
    assert kept.stat().st_mtime_ns == time and lost.read_bytes() == whole
    printed = capsys.readouterr().out
    assert re.search(r"teacher llama: .* made in \d+ s", printed)
    assert "reused from" in printed.partition("teacher qwen")[2]
    # Other numbers need other columns, fewer tokens' weights do not.
    assert (
        teachers.teacher_path(
            with_values(run, {"losses.kd_temperature": 3.0}), run.receivers[0], train
        )
        != first["llama"]
    )
    assert (
        teachers.teacher_path(with_values(run, {"losses.kd_weight": 0.1}), run.receivers[0], train)
        == first["llama"]
    )


def test_weights_of_the_hub_are_known_by_their_id() -> None:
    assert teachers.weights_id(ReceiverConfig(name="a", model="some/where")) == "some/where"
