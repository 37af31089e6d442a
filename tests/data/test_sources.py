"""Rows from the Hub, from real files, and what is told where there are none."""

import typing
from pathlib import Path

import pytest

from latentwire import card
from latentwire.config import DataConfig
from latentwire.data import sources
from latentwire.data.rows import SCHEMAS, clean
from latentwire.data.sources import DataError, pieces, read
from tests.data.test_rows import GOOD


def test_every_dataset_has_a_schema_and_a_name_for_its_card() -> None:
    known = set(typing.get_args(DataConfig.model_fields["dataset"].annotation))
    assert known == set(card.SOURCES) == set(SCHEMAS) | {"toy", "custom"}  # these two are written as SQuAD is
    assert set(sources.HUB_IDS) <= known


def test_a_dataset_of_files_needs_their_directory() -> None:
    with pytest.raises(
        DataError, match="dataset custom needs the directory of its files, got none; name it by --data_dir"
    ):
        pieces(DataConfig(dataset="custom"), "train")


def test_hub_out_of_reach_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def offline(*_: object, **__: object) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(DataError, match=r"rajpurkar/squad cannot be read from the Hub \(no route\).*--data_dir"):
        list(read(DataConfig(dataset="squad"), "train", sources.Piece("squad")))
    monkeypatch.setattr(datasets, "load_dataset", lambda name, subset, **_: [GOOD | {"id": f"{name} {subset}"}])
    (row,) = read(DataConfig(dataset="hotpotqa"), "train", sources.Piece("hotpotqa"))
    assert row["id"] == "hotpotqa/hotpot_qa distractor"  # type: ignore[index]


@pytest.mark.parametrize("dataset", ["squad", "hotpotqa"])
def test_real_rows_are_read(real_data: Path, dataset: str) -> None:
    config = DataConfig(dataset=dataset, data_dir=str(real_data / dataset))
    rows = [clean(raw, dataset) for piece in pieces(config, "validation") for raw in read(config, "validation", piece)]
    assert len(rows) == {"squad": 5397, "hotpotqa": 734}[dataset]
    assert all(row["context"] and row["answers"] for row in rows)
