"""What a good row is, in every schema, and what each bad one is told."""

import json
import typing
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from latentwire import card
from latentwire.config import DataConfig
from latentwire.data import sources
from latentwire.data.sources import DataError, Row, RowError, clean, pieces, read
from latentwire.storage import StorageError

GOOD = {
    "id": "1",
    "title": "T",
    "context": " c ",
    "question": "q?",
    "answers": {"text": ["a", "b"], "answer_start": [0, 1]},
}


def test_every_dataset_has_a_schema_and_a_name_for_its_card() -> None:
    known = set(typing.get_args(DataConfig.model_fields["dataset"].annotation))
    assert known == set(card.SOURCES) == set(sources.SCHEMAS) | {"toy", "custom"}  # these two are written as SQuAD is
    assert set(sources.HUB_IDS) <= known


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"\xff\xfe", "row must be UTF-8"),
        (b"{", "row must be JSON"),
        (b"[1]", "row must be a mapping, got list"),
        (GOOD | {"context": b"\xff"}, "context must be UTF-8, invalid start byte at byte 0"),
        (json.dumps(GOOD | {"context": None}).encode(), "context is missing"),
        (json.dumps(GOOD | {"context": " "}).encode(), "context must not be empty"),
        (json.dumps(GOOD | {"context": 3}).encode(), "context must be text, got int"),
        (json.dumps(GOOD | {"question": ""}).encode(), "question must not be empty"),
        (json.dumps(GOOD | {"answers": {"text": []}}).encode(), "answers must not be empty"),
        (json.dumps(GOOD | {"answers": [" "]}).encode(), "answers must not be empty"),
        (json.dumps(GOOD | {"answers": 5}).encode(), "answers must be text or a list of text, got int"),
        (json.dumps({"question": "q", "answers": "a"}).encode(), "context is missing"),
        (b'{"context": "\\ud800", "question": "q", "answers": "a"}', "context must be UTF-8"),
        (b'{"context": "c", "question": "q", "answers": ["a", "\\ud83d"]}', "answers must be UTF-8"),
        (b'{"context": "c", "question": "q", "answers": "a", "id": "\\ud83d"}', "id must be UTF-8"),
    ],
)
def test_bad_rows_are_told_why(raw: Row, reason: str) -> None:
    with pytest.raises(RowError) as caught:
        clean(raw, "squad")
    assert reason in str(caught.value)


def test_squad_row() -> None:
    assert clean(GOOD | {"context": b"c"}, "squad")["context"] == "c"
    assert clean(json.dumps(GOOD).encode(), "squad") == {
        "id": "1", "document": "T", "context": "c", "question": "q?", "answers": ["a", "b"],
    }  # fmt: skip


def test_texts_come_from_text_columns_and_from_the_contexts_of_questions() -> None:
    paragraphs = {"title": ["A", "B"], "sentences": [["One.", " Two."], ["Three."]]}
    found = [clean(json.dumps(row).encode(), "text") for row in ({"text": " c "}, GOOD, {"context": paragraphs})]
    assert [row["context"] for row in found] == ["c", "c", "A: One. Two.\nB: Three."]
    assert found[0]["id"] == found[1]["id"] and found[1]["document"] == "T"
    assert all(row["question"] == "" and row["answers"] == [] for row in found)
    with pytest.raises(RowError, match="context is missing"):
        clean(b'{"question": "q?"}', "text")


def test_hotpotqa_joins_titled_paragraphs_in_both_schemas() -> None:
    hub = {
        "id": "5", "question": "q", "answer": "yes",
        "context": {"title": ["A", "B"], "sentences": [["One.", " Two."], ["Three."]]},
        "supporting_facts": {"title": ["B", "A"], "sent_id": [0, 0]},
    }  # fmt: skip
    official = {
        "_id": "5", "question": "q", "answer": "yes",
        "context": [["A", ["One.", " Two."]], ["B", ["Three."]]], "supporting_facts": [["B", 0], ["A", 0]],
    }  # fmt: skip
    row = clean(json.dumps(hub).encode(), "hotpotqa")
    assert row["context"] == "A: One. Two.\nB: Three."
    assert (row["answers"], row["document"]) == (["yes"], "A | B")
    assert clean(json.dumps(official).encode(), "hotpotqa") == row


@pytest.mark.parametrize(
    ("context", "reason"),
    [
        ("plain", "context must hold titles and sentences, got str"),
        ([["A", "no list"]], "sentences must be lists of text"),
        ([["A", [" "]]], "context must not be empty"),
    ],
)
def test_bad_paragraphs_are_told_why(context: object, reason: str) -> None:
    with pytest.raises(RowError, match=reason):
        clean({"question": "q", "answer": "a", "context": context}, "hotpotqa")


def rows_of(folder: Path, dataset: str = "squad") -> list[Row]:
    config = DataConfig(dataset=dataset, data_dir=str(folder))
    return [raw for piece in pieces(config, "train") for raw in read(config, "train", piece)]


def test_official_json(tmp_path: Path) -> None:
    document = {"data": [{"title": "T", "paragraphs": [
        {"context": "c", "qas": [{"id": "9", "question": "q", "answers": [{"text": "a", "answer_start": 0}]}]}]}]}  # fmt: skip
    (tmp_path / "train-v1.1.json").write_text(json.dumps(document))
    assert clean(rows_of(tmp_path)[0], "squad")["id"] == "9"


def test_jsonl_keeps_bad_lines_for_the_rejects(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_bytes(json.dumps(GOOD).encode() + b"\n\xff\n\n")
    assert len(rows_of(tmp_path)) == 2


def test_files_are_read_in_pieces_and_nothing_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces end in the middle of lines and row groups; every row belongs to one of them."""
    monkeypatch.setattr(sources, "PIECE_ROWS", 7)
    monkeypatch.setattr(sources, "PIECE_BYTES", 100)
    rows = [GOOD | {"id": str(number), "context": "c" * (number % 40 + 1)} for number in range(50)]
    (tmp_path / "train.jsonl").write_bytes(b"".join(json.dumps(row).encode() + b"\n" for row in rows))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "train.parquet", row_group_size=20)
    found = [clean(row, "squad")["id"] for row in rows_of(tmp_path)]
    assert len(pieces(DataConfig(dataset="squad", data_dir=str(tmp_path)), "train")) > 20
    assert found == [row["id"] for row in rows] * 2


def test_a_uri_names_a_file_system(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist([GOOD]), tmp_path / "train.parquet")
    config = DataConfig(dataset="squad", data_dir=f"file://{tmp_path}")
    (piece,) = pieces(config, "train")
    assert [clean(row, "squad")["id"] for row in read(config, "train", piece)] == ["1"]
    with pytest.raises(StorageError, match="data_dir ftp://x cannot be read; pyarrow does not know such a URI"):
        pieces(DataConfig(dataset="squad", data_dir="ftp://x"), "train")


def test_parquet_with_bytes_that_are_no_text(tmp_path: Path) -> None:
    column = pa.array([b"good", b"\xff bad"], pa.binary())
    text = pa.StringArray.from_buffers(2, column.buffers()[1], column.buffers()[2])
    pq.write_table(
        pa.table({"context": text, "question": ["q", "q"], "answers": [["a"], ["a"]]}), tmp_path / "train.parquet"
    )
    rows = rows_of(tmp_path)
    assert clean(rows[0], "squad")["context"] == "good"
    with pytest.raises(RowError, match="must be UTF-8"):
        clean(rows[1], "squad")


def test_parquet_without_the_columns(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["x"]}), tmp_path / "train.parquet")
    with pytest.raises(DataError, match="must have columns context, question, answer or answers, it has text"):
        rows_of(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"), [("{", "must be JSON in UTF-8"), ('{"a": 1}', "official JSON, or a list of rows")]
)
def test_json_that_holds_no_rows(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "train.json").write_text(text)
    with pytest.raises(DataError, match=message):
        rows_of(tmp_path)


def test_file_that_is_no_parquet(tmp_path: Path) -> None:
    (tmp_path / "train.parquet").write_bytes(b"nothing")
    with pytest.raises(DataError, match="must be Parquet"):
        rows_of(tmp_path)


def test_a_split_is_a_word_of_a_files_name(tmp_path: Path) -> None:
    """A run that was written below the data holds ``training_state.json``, which is no data."""
    for name in ("train-v1.1.json", "hotpot_train_v1.1.json", "run/training_state.json", "constrain.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps([GOOD]))
    found = {Path(piece.name).name for piece in pieces(DataConfig(dataset="squad", data_dir=str(tmp_path)), "train")}
    assert found == {"train-v1.1.json", "hotpot_train_v1.1.json"}


def test_directories(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="must hold train files as parquet, jsonl or json, it holds nothing"):
        rows_of(tmp_path)
    with pytest.raises(DataError, match="must be an existing directory"):
        rows_of(tmp_path / "absent")


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


def test_of_several_datasets_the_one_that_is_named_is_read(tmp_path: Path) -> None:
    row = {"context": "Ada lives in Oslo.", "question": "Where?", "answers": ["Oslo"]}
    for folder in ("squad", "custom", "."):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / "train.jsonl").write_text(json.dumps(row) + "\n")
    for dataset, files in (
        ("squad", ["squad/train.jsonl"]),
        ("hotpotqa", ["custom/train.jsonl", "squad/train.jsonl", "train.jsonl"]),
    ):
        found = {piece.name for piece in pieces(DataConfig(dataset=dataset, data_dir=str(tmp_path)), "train")}
        assert found == {str(tmp_path / file) for file in files}


@pytest.mark.parametrize("dataset", ["squad", "hotpotqa"])
def test_real_rows_are_read(real_data: Path, dataset: str) -> None:
    config = DataConfig(dataset=dataset, data_dir=str(real_data / dataset))
    rows = [clean(raw, dataset) for piece in pieces(config, "validation") for raw in read(config, "validation", piece)]
    assert len(rows) == {"squad": 5397, "hotpotqa": 734}[dataset]
    assert all(row["context"] and row["answers"] for row in rows)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"supporting_facts": [[]]}, "supporting_facts must be titles"),
        ({"supporting_facts": [["T", 0], 3]}, "supporting_facts must be titles"),
        ({"supporting_facts": 3}, "supporting_facts must be titles"),
        ({"supporting_facts": {"title": "T"}}, "supporting_facts must be titles"),
        ({"supporting_facts": {"title": [None]}}, "supporting_facts must be titles"),
        ({"context": [["T", ["\ud83d"]]]}, "context must be UTF-8"),
    ],
)
def test_bad_hotpotqa_rows_are_told_why(change: dict[str, Any], reason: str) -> None:
    row = {"_id": "a", "question": "q", "answer": "yes", "context": [["T", ["x"]]], "supporting_facts": [["T", 0]]}
    assert clean(row, "hotpotqa")["document"] == "T"
    with pytest.raises(RowError, match=reason):
        clean(row | change, "hotpotqa")
