"""The first pass of preprocessing, without Ray: which rows a split has, and by what they are ordered."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from latentwire.config import RunConfig
from latentwire.config.resolve import with_values
from latentwire.data import cleaning, files, shards, sources


def cleaned(run: RunConfig, split: shards.ShardSplit) -> list[dict[str, Any]]:
    """What the tasks of the first pass give, one after another."""
    rows = []
    for piece in sources.pieces(run.data, shards.source_of(split)):
        batch = {name: np.array([value]) for name, value in vars(piece).items()}
        rows += pa.concat_tables(cleaning.read_and_clean(batch, run, split)).to_pylist()
    return rows


def asking(run: RunConfig, root: Path, **values: Any) -> RunConfig:
    return with_values(run, {"data.dataset": "custom", "data.data_dir": str(root)} | values)


@pytest.fixture
def articles(run: RunConfig, tmp_path: Path) -> RunConfig:
    """300 rows of 60 documents, five in each."""
    lines = [
        {
            "title": f"article {number % 60}",
            "context": f"House {number}.",
            "question": "Where?",
            "answers": "there",
        }
        for number in range(300)
    ]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return asking(run, tmp_path, **{"data.dev_fraction": 0.2})


def test_development_rows_are_whole_documents(articles: RunConfig) -> None:
    """Rows of one document in both splits would be learned by heart; a draw of rows would part nearly all of these."""
    train, dev = (cleaned(articles, split) for split in ("train", "dev"))
    documents = [{row["document"] for row in rows} for rows in (train, dev)]
    assert documents[0].isdisjoint(documents[1])
    assert len(train) + len(dev) == 300 and len(dev) == 5 * len(documents[1])
    assert 4 <= len(documents[1]) <= 24  # a fifth of 60, to four standard deviations
    other = with_values(articles, {"data.seed": 1})
    assert {row["document"] for row in cleaned(other, "dev")} != documents[1]


def test_every_row_of_two_folders_has_a_place_of_its_own(run: RunConfig, tmp_path: Path) -> None:
    lines = [
        {"context": f"House {number}.", "question": "Where?", "answers": "there"}
        for number in range(50)
    ]
    places = []
    for root in (tmp_path / "here", tmp_path / "there"):
        for folder in ("a", "b"):
            (root / folder).mkdir(parents=True)
            (root / folder / "train.jsonl").write_text("\n".join(map(json.dumps, lines)))
        own = asking(run, root, **{"data.dev_fraction": 1e-6})
        places.append([row["order"] for row in cleaned(own, "train")])
    assert len(places[0]) == len(set(places[0])) == 100
    assert places[0] == places[1]  # wherever the directory is
    assert (
        len(
            {
                sources.fingerprint(asking(run, tmp_path / name).data, "train")
                for name in ("here", "there")
            }
        )
        == 1
    )


def test_rejected_rows_are_told_by_file_and_number(run: RunConfig, tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "train.jsonl").write_text(
            '{"context": "c", "question": "q", "answers": "a"}\n{broken\n'
        )
    rejects = [row for row in cleaned(asking(run, tmp_path), "train") if row["reason"]]
    assert [row["id"] for row in rejects] == ["a/train.jsonl row 1", "b/train.jsonl row 1"]


def test_a_rejected_row_of_a_later_piece_is_told_by_the_byte_that_it_is_counted_from(
    run: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its line's number is not known: the lines before the piece are another task's."""
    monkeypatch.setattr(files, "PIECE_BYTES", 105)
    good = '{"context": "c", "question": "q", "answers": "a"}\n'
    text = good * 2 + "{broken\n" + good * 2 + "{broken too\n"
    (tmp_path / "train.jsonl").write_text(text)
    rejects = [row for row in cleaned(asking(run, tmp_path), "train") if row["reason"]]
    first, second = (row["id"] for row in rejects)
    assert first == "train.jsonl row 2" and second == "train.jsonl row 2 after byte 105"
    # The rows that begin there, as a person finds them.
    assert text[105:].splitlines()[1:][2] == "{broken too"


def test_a_configuration_that_names_the_same_files_has_the_same_shards(
    run: RunConfig, tmp_path: Path
) -> None:
    (tmp_path / "fullwiki").mkdir()
    (tmp_path / "fullwiki" / "train.jsonl").write_text("{}")
    named = asking(run, tmp_path, **{"data.dataset": "hotpotqa", "data.config": "fullwiki"})
    plain = asking(run, tmp_path / "fullwiki", **{"data.dataset": "hotpotqa"})
    assert shards.shard_key(named, "train") == shards.shard_key(plain, "train")
    hub = with_values(run, {"data.dataset": "hotpotqa"})
    assert shards.shard_key(
        with_values(hub, {"data.config": "fullwiki"}), "train"
    ) != shards.shard_key(hub, "train")
