"""Where teachers' columns lie, when they are whole, and that what is in them is what the receiver says on the text."""

import json
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from latentwire.config import LossConfig, ReceiverConfig, RunConfig
from latentwire.config.resolve import with_values
from latentwire.data import shards, teachers
from latentwire.data.readers import weights_id
from latentwire.distributed.teachers import TeacherReader, ensure_teachers, read_columns
from latentwire.model import LatentWire
from tests.conftest import frozen, shard_table

KD = {"losses.kd_weight": 1.0, "losses.kd_top_k": 3, "losses.kd_temperature": 2.0, "losses.k": 2}
STATES = {"losses.hidden_kd_weight": 0.5, "losses.hidden_kd_depths": (0.5, 1.0)}


def shards_of(folder: Path, table: pa.Table | None = None, key: str = "k") -> Path:
    """Complete training shards of two files."""
    path = folder / f"train-{key}"
    path.mkdir(parents=True)
    names = ["0.parquet", "1.parquet"]
    manifest = {"key": key, "rows": 6, "files": names}
    (path / "manifest.json").write_text(json.dumps(manifest))
    for name, part in zip(
        names, (table.slice(0, 4), table.slice(4)) if table else (), strict=False
    ):
        pq.write_table(part, path / name)
    return path


def test_readers_teach_where_their_words_are_compared(run: RunConfig, tmp_path: Path) -> None:
    tuned = {"losses.kd_teacher": "tuned", "evaluation.tuned_text": {"tokens": 3}}
    run = with_values(run, {"data.shard_dir": str(tmp_path)})
    train, dev = shards_of(tmp_path), shards.shard_path(run, "dev")
    dev.mkdir()
    (dev / "manifest.json").write_text(json.dumps({"key": "dev", "rows": 2, "files": []}))
    taught = teachers.readers(with_values(run, KD | tuned), train)
    assert list(taught) == [receiver.name for receiver in run.receivers]
    assert len(set(taught.values())) == len(taught)
    assert teachers.readers(with_values(run, KD), train) == {}
    assert teachers.readers(with_values(run, {"losses.kd_weight": 0.0}), train) == {}


def test_columns_are_known_by_what_they_hang_on(run: RunConfig, tmp_path: Path) -> None:
    train = shards_of(tmp_path)
    run = with_values(run, KD | STATES)
    receiver = run.receivers[0]

    def path(values: dict, train: Path = train, **reads: object) -> Path:
        return teachers.teacher_path(
            with_values(run, values), receiver.model_copy(update=reads), train
        )

    first = path({})
    assert first.parent == tmp_path and first.name.startswith(f"teacher-{receiver.name}-")
    others = [
        path({"losses.k": 3}), path({"losses.kd_top_k": 4}), path({"losses.kd_temperature": 3.0}), path({"losses.kd_weight": 0.0}),
        path({"losses.hidden_kd_depths": (1.0,)}), path({"losses.hidden_kd_weight": 0.0}), path({}, dtype="bfloat16"),
        path({}, revision="other"), path({}, shards_of(tmp_path, key="other")), path({}, model="toy-qwen"),
        teachers.teacher_path(run, run.receivers[1], train),
    ]  # fmt: skip
    assert len({first, *others}) == 1 + len(others)
    alike = [
        {"losses.kd_weight": 0.3},
        {"losses.hidden_kd_weight": 2.0},
        {"training.seed": 8},
        {"encoder.latent_len": 3},
    ]
    assert {path(values) for values in alike} == {first}
    assert teachers.paths(run, train) == {
        r.name: teachers.teacher_path(run, r, train) for r in run.receivers
    }
    assert (
        teachers.paths(
            with_values(run, {"losses.kd_weight": 0.0, "losses.hidden_kd_weight": 0.0}), train
        )
        == {}
    )


def test_weights_of_the_hub_are_known_by_their_id() -> None:
    assert weights_id(ReceiverConfig(name="a", model="some/where")) == "some/where"


def test_weights_of_a_directory_are_known_by_their_files(tmp_path: Path) -> None:
    receiver = ReceiverConfig(name="a", model=str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    for name, content in (("b.safetensors", b"12"), ("a.safetensors", b"345"), ("old.bin", b"6")):
        (tmp_path / name).write_bytes(content)
        os.utime(tmp_path / name, ns=(5_000, 7_000))
    assert weights_id(receiver) == [
        ["a.safetensors", 3, 7_000],
        ["b.safetensors", 2, 7_000],
    ]
    os.utime(tmp_path / "a.safetensors", ns=(5_000, 8_000))
    assert weights_id(receiver)[0] == ["a.safetensors", 3, 8_000]
    for name in ("a.safetensors", "b.safetensors"):
        (tmp_path / name).unlink()
    assert weights_id(receiver) == [["old.bin", 1, 7_000]]


def test_columns_are_made_file_by_file_and_told_when_whole(
    run: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = with_values(run, KD)
    table = shard_table(run, 6)
    train = shards_of(tmp_path, table)
    paths = teachers.paths(run, train)
    for number, (name, path) in enumerate(paths.items()):
        path.mkdir()
        assert not teachers.complete(run, train)
        reader = TeacherReader(run.model_dump(mode="json"), name, str(train), str(path))
        assert (reader.lm.name, reader.builder.send) == (name, run.data.send)
        batch = {"file": np.array(["0.parquet"])}
        assert reader(batch) is batch and not teachers.complete(run, train)
        reader({"file": np.array(["1.parquet"])})
        assert teachers.complete(run, train) == (number == 1)
        found = pa.concat_tables([pq.read_table(path / f"{file}.parquet") for file in (0, 1)])
        expected = read_columns(frozen(run.receivers)[name], reader.builder, run, table)
        assert found.column_names == expected.column_names and found.num_rows == 6
        for column in found.column_names:
            assert np.allclose(*(one[column].combine_chunks().flatten() if pa.types.is_list(one[column].type) else one[column]
                                 for one in (found, expected)), atol=5e-3)  # fmt: skip
    assert ensure_teachers(run, train) == paths  # without Ray: nothing is missing
    said = capsys.readouterr().out
    size = sum((paths["llama"] / name).stat().st_size for name in ("0.parquet", "1.parquet"))
    assert (
        f"teacher llama: 6 rows, {size / 6 * 1_000 / 1e6:.2f} MB per 1,000 rows, reused from {paths['llama']}"
        in said
    )
    assert ensure_teachers(with_values(run, {"losses.kd_weight": 0.0}), train) == {}
    assert capsys.readouterr().out == ""


def test_columns_hold_what_the_model_itself_says(run: RunConfig, wire: LatentWire) -> None:
    """Against transformers' own forward pass over each row's text, one row at a time."""
    run = with_values(run, KD | STATES)
    table = shard_table(run, 5)
    lm, builder = wire.receivers["llama"], wire.builders["llama"]
    found = read_columns(lm, builder, run, table).to_pydict()
    rows = table.to_pydict()
    layers = len(lm.lm.model.layers)
    for index in range(5):
        sequence = builder.text(
            *(rows[f"llama_{piece}_ids"][index] for piece in ("context", "question", "answer"))
        )
        asked = [place - 1 for place in sequence.supervised][:2]
        assert found["llama_teacher_count"][index] == len(asked)
        with torch.no_grad():
            out = lm.lm(torch.tensor([sequence.ids]), output_hidden_states=True)
        log_p, ids = torch.log_softmax(out.logits[0, asked] / 2.0, -1).topk(3)
        assert found["llama_teacher_ids"][index] == ids.flatten().tolist()
        assert found["llama_teacher_log_p"][index] == pytest.approx(
            log_p.flatten().tolist(), abs=5e-3
        )
        tail = torch.log1p(-log_p.exp().sum(-1)).tolist()
        assert found["llama_teacher_log_tail"][index] == pytest.approx(tail, abs=2e-2)
        half = out.hidden_states[layers // 2][0, asked]
        states = np.array(found["llama_teacher_states"][index], np.float32).reshape(
            len(asked), 2, -1
        )
        told, own = (
            torch.nn.functional.layer_norm(x, x.shape[1:])
            for x in (torch.from_numpy(states[:, 0]), half)
        )
        torch.testing.assert_close(
            told, own, atol=1e-2, rtol=1e-2
        )  # a layer off would be another state


def test_words_are_laid_out_for_every_answer_token() -> None:
    """Two rows of 3 and 1 answer tokens, and a stop each; the columns tell of the first two."""
    table = pa.table(
        {
            "a_answer_ids": [[5, 6, 7], [8]], "a_teacher_count": [2, 2],
            "a_teacher_ids": [[1, 2, 3, 4], [5, 6, 7, 8]],
            "a_teacher_log_p": [[-1.0, -2.0, -3.0, -4.0], [-5.0, -6.0, -7.0, -8.0]],
            "a_teacher_log_tail": [[-0.5, -0.25], [-0.125, -2.0]],
            "a_teacher_states": [list(range(8)), list(range(8, 16))],
        }
    )  # fmt: skip
    both = LossConfig(
        kd_weight=1.0,
        kd_top_k=2,
        kd_temperature=4.0,
        hidden_kd_weight=1.0,
        hidden_kd_depths=(0.5, 1.0),
    )
    teacher = teachers.teacher_of(table, "a", both)
    assert teacher is not None and teacher.rows is not None and teacher.rows.temperature == 4.0
    told = [0, 1, 4, 5]  # of the six tokens; the first row's third and its stop are not told of
    assert teacher.rows.ids_NK is not None and teacher.rows.log_tail_N is not None
    assert teacher.rows.ids_NK.shape == (6, 2) and teacher.rows.ids_NK[told].tolist() == [
        [1, 2],
        [3, 4],
        [5, 6],
        [7, 8],
    ]
    assert teacher.rows.log_p_NK[told].tolist() == [[-1, -2], [-3, -4], [-5, -6], [-7, -8]]
    assert teacher.rows.log_tail_N[told].tolist() == [-0.5, -0.25, -0.125, -2.0]
    shallow, deep = teacher.states
    assert shallow[told].tolist() == [[0, 1], [4, 5], [8, 9], [12, 13]]
    assert deep[told].tolist() == [[2, 3], [6, 7], [10, 11], [14, 15]]
    assert {tensor.dtype for tensor in (shallow, deep, teacher.rows.log_p_NK)} == {torch.float32}
    words = teachers.teacher_of(
        table.drop_columns(["a_teacher_states"]),
        "a",
        both.model_copy(update={"hidden_kd_weight": 0.0}),
    )
    assert words is not None and words.rows is not None and words.states == ()
    states = teachers.teacher_of(
        table.drop_columns(["a_teacher_ids"]), "a", both.model_copy(update={"kd_weight": 0.0})
    )
    assert states is not None and states.rows is None and len(states.states) == 2
    assert teachers.teacher_of(table.drop_columns(["a_teacher_ids"]), "a", both) is None
    assert teachers.teacher_of(table.drop_columns(["a_teacher_states"]), "a", both) is None
    assert (
        teachers.teacher_of(table, "b", both) is None
        and teachers.teacher_of(table, "a", LossConfig()) is None
    )
