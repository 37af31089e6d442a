"""Columns say what the live teacher says, to the precision of fp16, for exactly the tokens that are compared."""

import json
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from latentwire.config import LossConfig, RunConfig
from latentwire.config.resolve import ConfigError, with_values
from latentwire.data import shards, streams, teachers
from latentwire.data.sources import DataError
from latentwire.distributed.local_shards import local_shards
from latentwire.distributed.teachers import FULL_TEXT, TeacherReader, read_columns, train_reader
from latentwire.losses.bundles import Teacher
from latentwire.model import LatentWire
from latentwire.prompts.batch import collate
from latentwire.training import text_readers
from latentwire.training.loop import Trainer
from tests.conftest import shard_table

KD = {
    "losses.kd_weight": 1.0, "losses.kd_top_k": 16, "losses.kd_temperature": 2.0, "losses.k": 2,
    "losses.hidden_kd_weight": 0.5,
}  # fmt: skip

TUNED = KD | {
    "losses.kd_teacher": "tuned",
    "evaluation.tuned_text": {"tokens": 5, "steps": 4, "batch_size": 4, "trials": 1},
}


def with_columns(trainer: Trainer, table: pa.Table, values: dict) -> pa.Table:
    run = with_values(trainer.wire.run, values)
    for name, lm in trainer.wire.receivers.items():
        said = read_columns(lm, trainer.wire.builders[name], run, table)
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
        assert isinstance(batch.teacher[name], Teacher)
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
    run = with_values(run, TUNED | sizes | {"data.dev_samples": 4, "data.validation_samples": 4})
    train = local_shards(run)["train"]
    files = shards.read_manifest(train)["files"]
    first = {r.name: teachers.teacher_path(run, r, train) for r in run.receivers}
    assert (
        len(files) == 2
        and teachers.complete(run, train)
        and "MB per 1,000 rows, made in" in (printed := capsys.readouterr().out)
    )
    assert printed.count("its text reader is trained first") == 2
    assert len(list(tmp_path.glob("reader-*-text-*"))) == 2
    joined = streams.training_table(run, train)
    assert joined.num_rows == 70 and teachers.teacher_of(joined, "qwen", run.losses) is not None
    kept, lost = (first["llama"] / name for name in files)
    time, whole = kept.stat().st_mtime_ns, lost.read_bytes()
    lost.unlink()
    assert not teachers.complete(run, train)
    local_shards(run)
    assert kept.stat().st_mtime_ns == time and lost.read_bytes() == whole
    printed = capsys.readouterr().out
    assert "its text reader is trained first" not in printed
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


# ------------------------------------------------------------------------- who teaches, and what


@pytest.fixture
def paths(run: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """Complete shards of toy rows, where a run would look for them."""
    folders: dict[str, Path] = {}
    for split, rows, seed in (("train", 40, 0), ("dev", 8, 1)):
        folders[split] = tmp_path / f"toy-{split}"
        folders[split].mkdir()
        pq.write_table(shard_table(run, rows, seed=seed), folders[split] / "0.parquet")
        manifest = {"key": split, "rows": rows, "files": ["0.parquet"]}
        (folders[split] / "manifest.json").write_text(json.dumps(manifest))
    monkeypatch.setattr(shards, "shard_path", lambda _, split: folders[split])
    return folders


def test_the_tuned_reader_teaches(run: RunConfig, paths: dict[str, Path]) -> None:
    """Its columns are what the receiver says behind the trained prefix, to the precision of fp16."""
    run = with_values(run, TUNED)
    train_reader(run, "llama", paths["train"])
    where = teachers.teacher_path(run, run.receivers[0], paths["train"])
    where.mkdir()
    reading = TeacherReader(run.model_dump(mode="json"), "llama", str(paths["train"]), str(where))
    reading({"file": np.array(["0.parquet"])})
    found = pq.read_table(where / "0.parquet")
    table = pq.read_table(paths["train"] / "0.parquet")

    receivers = {"llama": reading.lm}
    places = {"llama": text_readers.reader_path(run, run.receivers[0], FULL_TEXT, dict(paths))}
    weights = {"llama": reading.lm.fingerprint()}
    reader = text_readers.load_reader(run, receivers, FULL_TEXT, places, weights)
    pieces = [
        table[f"llama_{piece}_ids"].to_pylist() for piece in ("context", "question", "answer")
    ]
    for row, (context, question, answer) in enumerate(zip(*pieces, strict=True)):
        batch = collate([reader.builders["llama"].text(context, question, answer, 5)])
        with torch.no_grad(), reader.reading("llama", batch, None) as soft_ND:
            logits_NV = reading.lm.supervised_logits(batch, soft_ND)
        log_p_NK, ids_NK = torch.log_softmax(logits_NV[:2] / 2.0, -1).topk(16)
        assert found["llama_teacher_ids"][row].as_py()[:4] == ids_NK[0, :4].tolist()
        assert found["llama_teacher_log_p"][row].as_py() == pytest.approx(
            log_p_NK.flatten().tolist(), abs=1e-2
        )
        expected = bool((logits_NV.argmax(-1) == batch.target_N).all())
        assert found["llama_teacher_right"][row].as_py() == expected
    untuned = read_columns(reading.lm, reading.builder, run, table)
    assert untuned["llama_teacher_log_p"] != found["llama_teacher_log_p"]
    as_it_is = with_values(run, {"losses.kd_teacher": "untuned"})
    assert teachers.teacher_path(as_it_is, run.receivers[0], paths["train"]) != where
    longer = with_values(run, {"evaluation.tuned_text.steps": 5})
    assert teachers.teacher_path(longer, run.receivers[0], paths["train"]) != where


def test_a_row_is_right_where_the_teacher_answers_it(trainer: Trainer) -> None:
    wire, rows = trainer.wire, shard_table(trainer.wire.run, 60)
    verdicts = set()
    for name, lm in wire.receivers.items():
        builder, said = wire.builders[name], read_columns(lm, wire.builders[name], wire.run, rows)
        right = said[f"{name}_teacher_right"].to_pylist()
        pieces = (rows[f"{name}_{piece}_ids"].to_pylist() for piece in ("context", "question"))
        answers = wire.decode(name, [builder.text(*pair) for pair in zip(*pieces, strict=True)])[0]
        golds = [golds[0] for golds in rows["answers"].to_pylist()]
        assert right == [answer == gold for answer, gold in zip(answers, golds, strict=True)]
        verdicts |= set(right)
    assert verdicts == {True, False}


def test_a_teacher_teaches_the_rows_that_it_answers(trainer: Trainer) -> None:
    """Its terms are means over those rows alone; the answers' own loss is over all."""
    rows = with_columns(trainer, shard_table(trainer.wire.run, 12), {})
    right = pa.array([index % 3 == 0 for index in range(12)])
    for name in trainer.wire.receivers:
        place = rows.column_names.index(f"{name}_teacher_right")
        rows = rows.set_column(place, f"{name}_teacher_right", right)
    run = with_values(trainer.wire.run, {"losses.kd_rows": "right"})
    chosen = Trainer(LatentWire(run, trainer.wire.receivers), 4)
    chosen.wire.interlingua.load_state_dict(trainer.wire.interlingua.state_dict())
    told = chosen.backward(chosen.collate(rows, 0))
    of_right = trainer.backward(trainer.collate(rows.filter(right), 0))
    of_all = trainer.backward(trainer.collate(rows, 0))
    trainer.optimizer.zero_grad(set_to_none=True)
    for term in ("kd_llama", "kd_qwen", "hidden_kd_llama", "hidden_kd_qwen"):
        assert told[term] == pytest.approx(of_right[term], rel=1e-4)
        assert told[term] != pytest.approx(of_all[term], rel=1e-3)
    for term in ("answer_ce_llama", "answer_ce_qwen"):
        assert told[term] == pytest.approx(of_all[term], rel=1e-4)


@pytest.mark.parametrize(
    "values", [{"losses.kd_teacher": "tuned"}, {"losses.kd_rows": "right"}], ids=["tuned", "right"]
)
def test_rows_without_columns_are_refused(trainer: Trainer, values: dict) -> None:
    """Else a step would quietly compare with the receiver as it is, or with all rows."""
    tuned = {"evaluation.tuned_text": {"steps": 4}}
    run = with_values(trainer.wire.run, tuned | values)
    learner = Trainer(LatentWire(run, trainer.wire.receivers), 4)
    with pytest.raises(DataError, match="needs rows with teachers' columns, got none of"):
        learner.collate(shard_table(run, 4), 0)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"losses.kd_teacher": "tuned", "losses.kd_top_k": 0}, "got losses.kd_top_k 0"),
        ({"losses.kd_rows": "right", "losses.kd_top_k": 0}, "losses.kd_rows right needs teachers"),
        (
            {"losses.kd_teacher": "tuned", "evaluation.tuned_text": None},
            "got evaluation.tuned_text None",
        ),
        (
            {"losses.kd_teacher": "tuned", "prompt.reads": "text", "prefix": {}},
            "and prompt.reads text",
        ),
    ],
)
def test_a_teacher_that_no_columns_can_hold_is_refused(
    run: RunConfig, values: dict, told: str
) -> None:
    with pytest.raises(ConfigError, match=told):
        with_values(run, KD | {"evaluation.tuned_text": {"steps": 4}} | values)


@pytest.mark.parametrize(
    "values", [{}, {"losses.kd_weight": 0.0}, {"losses.hidden_kd_weight": 0.0}]
)
def test_a_shard_file_without_rows_has_the_columns_of_the_others(
    trainer: Trainer, values: dict
) -> None:
    """All its rows may have been rejected, and readers put the columns of all files together."""
    wire, rows = trainer.wire, shard_table(trainer.wire.run, 3)
    run = with_values(wire.run, values)
    lm, builder = wire.receivers["llama"], wire.builders["llama"]
    none, some = (read_columns(lm, builder, run, table) for table in (rows.slice(0, 0), rows))
    assert none.num_rows == 0 and none.schema == some.schema
