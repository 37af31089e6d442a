"""Rows from the Hub, from real files, and what is told where there are none."""

import json
import os
import typing
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from latentwire.config import DataConfig
from latentwire.data import sources
from latentwire.data.shards import SHARD_VERSION
from latentwire.data.sources import DataError, pieces, read
from latentwire.dataset import DATASETS, Dataset, clean
from latentwire.dataset.base import QUESTION_COLUMNS
from tests.data.test_rows import GOOD


@pytest.mark.parametrize("dataset", DATASETS.values(), ids=list(DATASETS))
def test_every_dataset_says_all_that_differs(dataset: Dataset) -> None:
    assert dataset.name in typing.get_args(DataConfig.model_fields["dataset"].annotation)
    assert DATASETS[dataset.name] is dataset and dataset.description
    if dataset.generate is None:  # else its files would keep a version that others have left behind
        assert dataset.version is None or dataset.version > SHARD_VERSION
    else:
        assert dataset.version is not None
    assert dataset.has_questions == (dataset.columns == QUESTION_COLUMNS)
    row = clean({"context": "Rome is old.", "question": "What?", "answers": ["Rome"]}, "squad")
    assert clean(
        row | {"context": [["Rome", ["Rome is old."]]]} if dataset.name == "hotpotqa" else row,
        dataset.name,
    )


def test_only_datasets_whose_rows_changed_have_their_shards_made_anew() -> None:
    versions = {name: dataset.version for name, dataset in DATASETS.items()}
    assert versions == {"custom": 4, "hotpotqa": 4, "squad": None, "text": 5, "toy": 2}


def test_only_names_that_are_registered_are_taken() -> None:
    assert set(typing.get_args(DataConfig.model_fields["dataset"].annotation)) == set(DATASETS)
    with pytest.raises(
        ValueError, match="Input should be 'custom', 'hotpotqa', 'squad', 'text' or 'toy'"
    ):
        DataConfig.model_validate({"dataset": "sqaud"})


def test_official_scripts_are_those_of_the_two_datasets() -> None:
    assert [name for name, dataset in DATASETS.items() if dataset.official_scores] == [
        "hotpotqa",
        "squad",
    ]
    assert [name for name, dataset in DATASETS.items() if dataset.exact_yes_no] == ["hotpotqa"]


def test_a_dataset_of_files_needs_their_directory() -> None:
    with pytest.raises(
        DataError,
        match="dataset custom needs the directory of its files, got none; name it by --data_dir",
    ):
        pieces(DataConfig(dataset="custom"), "train")


def test_hub_out_of_reach_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def offline(*_: object, **__: object) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(
        DataError, match=r"rajpurkar/squad cannot be read from the Hub \(no route\).*--data_dir"
    ):
        list(read(DataConfig(dataset="squad"), "train", sources.Piece("squad")))
    monkeypatch.setattr(
        datasets, "load_dataset", lambda name, subset, **_: [GOOD | {"id": f"{name} {subset}"}]
    )
    (row,) = read(DataConfig(dataset="hotpotqa"), "train", sources.Piece("hotpotqa"))
    assert row["id"] == "hotpotqa/hotpot_qa distractor"  # type: ignore[index]


@pytest.mark.parametrize("dataset", ["squad", "hotpotqa"])
def test_real_rows_are_read(real_data: Path, dataset: str) -> None:
    config = DataConfig(dataset=dataset, data_dir=str(real_data / dataset))
    rows = [
        clean(raw, dataset)
        for piece in pieces(config, "validation")
        for raw in read(config, "validation", piece)
    ]
    assert len(rows) == {"squad": 5397, "hotpotqa": 734}[dataset]
    assert all(row["context"] and row["answers"] for row in rows)


def test_a_name_that_is_no_utf8_is_told(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text(json.dumps(GOOD))
    (Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.txt"))).write_text("notes")
    with pytest.raises(DataError, match=r"must be UTF-8, got b'.*caf\\xe9\.txt'; rename it"):
        pieces(DataConfig(dataset="custom", data_dir=str(tmp_path)), "train")


def test_dates_beyond_those_of_python_stop_no_file(tmp_path: Path) -> None:
    rows = [GOOD | {"id": str(number)} for number in range(3)]
    far = pa.array([10**18] * len(rows), pa.timestamp("us"))
    table = pa.Table.from_pylist(rows).append_column("written", far)
    pq.write_table(table, tmp_path / "train.parquet")
    config = DataConfig(dataset="custom", data_dir=str(tmp_path))
    (piece,) = pieces(config, "train")
    assert list(read(config, "train", piece)) == rows
