"""Files as people have them: which are read, how, and what is said of those that cannot be."""

import bz2
import codecs
import gzip
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from latentwire.config import DataConfig
from latentwire.data import files
from latentwire.data.sources import DataError, pieces, read
from latentwire.dataset import Row, RowError, clean
from latentwire.storage import StorageError
from tests.data.test_rows import GOOD


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


def test_files_are_read_in_pieces_and_nothing_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pieces end in the middle of lines and row groups; every row belongs to one of them."""
    monkeypatch.setattr(files, "PIECE_ROWS", 7)
    monkeypatch.setattr(files, "PIECE_BYTES", 100)
    rows = [GOOD | {"id": str(number), "context": "c" * (number % 40 + 1)} for number in range(50)]
    (tmp_path / "train.jsonl").write_bytes(
        b"".join(json.dumps(row).encode() + b"\n" for row in rows)
    )
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "train.parquet", row_group_size=20)
    found = [clean(row, "squad")["id"] for row in rows_of(tmp_path)]
    assert len(pieces(DataConfig(dataset="squad", data_dir=str(tmp_path)), "train")) > 20
    assert found == [row["id"] for row in rows] * 2


def test_a_uri_names_a_file_system(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist([GOOD]), tmp_path / "train.parquet")
    config = DataConfig(dataset="squad", data_dir=f"file://{tmp_path}")
    (piece,) = pieces(config, "train")
    assert [clean(row, "squad")["id"] for row in read(config, "train", piece)] == ["1"]
    with pytest.raises(
        StorageError, match="data_dir ftp://x cannot be read; pyarrow does not know such a URI"
    ):
        pieces(DataConfig(dataset="squad", data_dir="ftp://x"), "train")


def test_parquet_with_bytes_that_are_no_text(tmp_path: Path) -> None:
    column = pa.array([b"good", b"\xff bad"], pa.binary())
    text = pa.StringArray.from_buffers(2, column.buffers()[1], column.buffers()[2])
    pq.write_table(
        pa.table({"context": text, "question": ["q", "q"], "answers": [["a"], ["a"]]}),
        tmp_path / "train.parquet",
    )
    rows = rows_of(tmp_path)
    assert clean(rows[0], "squad")["context"] == "good"
    with pytest.raises(RowError, match="must be UTF-8"):
        clean(rows[1], "squad")


def test_parquet_without_the_columns(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["x"]}), tmp_path / "train.parquet")
    with pytest.raises(
        DataError, match="must have columns context, question, answer or answers, it has text"
    ):
        rows_of(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "must be JSON in UTF-8"), ('{"a": 1}', "official JSON, or a list of rows")],
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
    for name in (
        "train-v1.1.json",
        "hotpot_train_v1.1.json",
        "run/training_state.json",
        "constrain.json",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps([GOOD]))
    found = {
        Path(piece.name).name
        for piece in pieces(DataConfig(dataset="squad", data_dir=str(tmp_path)), "train")
    }
    assert found == {"train-v1.1.json", "hotpot_train_v1.1.json"}


def test_directories(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match="must hold train files as parquet, jsonl or json, it holds nothing"
    ):
        rows_of(tmp_path)
    with pytest.raises(DataError, match="must be an existing directory"):
        rows_of(tmp_path / "absent")


def test_of_several_datasets_the_one_that_is_named_is_read(tmp_path: Path) -> None:
    row = {"context": "Ada lives in Oslo.", "question": "Where?", "answers": ["Oslo"]}
    for folder in ("squad", "custom", "."):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / "train.jsonl").write_text(json.dumps(row) + "\n")
    for dataset, names in (
        ("squad", ["squad/train.jsonl"]),
        ("hotpotqa", ["custom/train.jsonl", "squad/train.jsonl", "train.jsonl"]),
    ):
        found = {
            piece.name
            for piece in pieces(DataConfig(dataset=dataset, data_dir=str(tmp_path)), "train")
        }
        assert found == {str(tmp_path / name) for name in names}


# ---------------------------------------------------------------------------------------- layouts as people have them

ROWS = [
    {
        "id": str(n),
        "title": f"T{n}",
        "context": f"Ada lives at {n}.",
        "question": "Where?",
        "answers": {"text": [f"{n}"]},
    }
    for n in range(8)
]


def lines(rows: list[dict[str, Any]], end: str = "\n") -> bytes:
    return "".join(json.dumps(row) + end for row in rows).encode()


def ids(
    folder: Path, split: files.Split = "train", dataset: str = "squad", **knobs: Any
) -> list[str]:
    """Ids of a split's rows, in the order in which they are read; all must be good ones."""
    config = DataConfig(dataset=dataset, data_dir=str(folder), **knobs)
    return [
        clean(raw, dataset)["id"]
        for piece in pieces(config, split)
        for raw in read(config, split, piece)
    ]


ALL = [row["id"] for row in ROWS]


def test_a_folder_can_be_the_split(tmp_path: Path) -> None:
    """As the Hub lays files out; what a file's own name says of its split goes before."""
    for split, rows in {"train": ROWS, "validation": ROWS[:3]}.items():
        (tmp_path / "data" / split).mkdir(parents=True)
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "data" / split / "0000.parquet")
    (tmp_path / "data" / "train" / "dev.jsonl").write_bytes(lines(ROWS[5:6]))
    assert ids(tmp_path) == ALL
    assert ids(tmp_path, "validation") == ["5", "0", "1", "2"]


def test_a_folder_can_be_named_as_a_file(tmp_path: Path) -> None:
    """As Spark and Ray Data leave them."""
    (tmp_path / "train.parquet").mkdir()
    (tmp_path / "train.parquet" / "_SUCCESS").touch()
    for part in range(2):
        table = pa.Table.from_pylist(ROWS[part * 4 : part * 4 + 4])
        pq.write_table(table, tmp_path / "train.parquet" / f"part-0000{part}.snappy.parquet")
    assert ids(tmp_path) == ALL


def test_hidden_files_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_bytes(lines(ROWS))
    for folder in (".ipynb_checkpoints", "__MACOSX", "train/_temporary"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "train-checkpoint.jsonl").write_bytes(lines(ROWS))
    for name in ("._train.jsonl", "_train.jsonl"):
        (tmp_path / name).write_bytes(b"\x00\x05\x16\x07Mac OS X")
    assert ids(tmp_path) == ALL
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "train.jsonl").write_bytes(lines(ROWS[:2]))
    assert ids(tmp_path / ".cache") == ["0", "1"]  # what is hidden may be named


@pytest.mark.parametrize(
    "name", ["validation", "valid", "val", "dev", "Dev", "VALIDATION-00000-of-00001"]
)
def test_a_split_has_several_names_in_any_case(tmp_path: Path, name: str) -> None:
    (tmp_path / "Train.JSONL").write_bytes(lines(ROWS))
    (tmp_path / f"{name}.jsonl").write_bytes(lines(ROWS[:3]))
    (tmp_path / "values_deviation.jsonl").write_bytes(lines(ROWS))
    assert ids(tmp_path) == ALL and ids(tmp_path, "validation") == ["0", "1", "2"]


def test_a_file_is_named_after_one_split(tmp_path: Path) -> None:
    (tmp_path / "train_dev.jsonl").write_bytes(lines(ROWS))
    with pytest.raises(
        DataError,
        match=r"train_dev\.jsonl must be named after one split, it has words of two; rename",
    ):
        ids(tmp_path)


def zstd(data: bytes) -> bytes:
    return pa.Codec("zstd").compress(data, asbytes=True)


@pytest.mark.parametrize(
    ("suffix", "compress"), [(".gz", gzip.compress), (".bz2", bz2.compress), (".zst", zstd)]
)
def test_compressed_files_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, compress: Callable[[bytes], bytes]
) -> None:
    """In several members too, as ``cat`` leaves them; a file that is cut is told, and not read half."""
    monkeypatch.setattr(files, "PIECE_BYTES", 100)  # no piece begins within a compressed file
    (tmp_path / f"train.jsonl{suffix}").write_bytes(
        compress(lines(ROWS[:3])) + compress(lines(ROWS[3:]))
    )
    (tmp_path / f"val.json{suffix}").write_bytes(compress(json.dumps(ROWS[:3]).encode()))
    assert ids(tmp_path) == ALL and ids(tmp_path, "validation") == ["0", "1", "2"]
    (tmp_path / f"train.jsonl{suffix}").write_bytes(compress(lines(ROWS))[:-20])
    with pytest.raises(
        StorageError,
        match=r"train\.jsonl\S+ cannot be read; it is cut, or not compressed as its name says",
    ):
        ids(tmp_path)


@pytest.mark.parametrize("name", ["train.json", "train.jsonl"])
@pytest.mark.parametrize(
    "text",
    [
        json.dumps(ROWS),
        json.dumps(ROWS, indent=1),
        "[\n" + ",\n".join(map(json.dumps, ROWS)) + "\n]",
        json.dumps({"data": ROWS}),
        json.dumps({"version": "1", "data": ROWS}, indent=1),
        "\n".join(map(json.dumps, ROWS)),
        "\n\n" + "\r\n".join(map(json.dumps, ROWS)) + "\r\n\r\n",
    ],
    ids=[
        "array",
        "indented array",
        "array of lines",
        "under data",
        "indented under data",
        "lines",
        "CRLF",
    ],
)
def test_json_is_read_in_either_form_under_either_name(
    tmp_path: Path, name: str, text: str
) -> None:
    for mark in (b"", codecs.BOM_UTF8):
        (tmp_path / name).write_bytes(mark + text.encode())
        assert ids(tmp_path) == ALL


def test_a_first_line_that_is_broken_makes_no_document_of_a_file_of_lines(tmp_path: Path) -> None:
    for line in (b"{broken\n", b"[1]\n"):
        (tmp_path / "train.jsonl").write_bytes(line + lines(ROWS))
        first, *others = rows_of(tmp_path)
        assert [clean(row, "squad")["id"] for row in others] == ALL
        with pytest.raises(RowError, match="row must be"):
            clean(first, "squad")


def test_what_is_no_question_in_official_json_is_one_reject(tmp_path: Path) -> None:
    answers = [{"text": "Oslo", "answer_start": 18}]
    good = {"id": "2", "question": "Where now?", "answers": answers}
    questions = [{"id": "1", "question": "Where?", "answers": None}, good, None, {"id": "3"}]
    paragraphs = [
        {"context": "Ada lives in Oslo.", "qas": questions},
        {"context": "x", "qas": None},
        None,
    ]
    (tmp_path / "train.json").write_text(
        json.dumps({"data": [{"title": "T", "paragraphs": paragraphs}, 3]})
    )
    good_ids, reasons = [], []
    for raw in rows_of(tmp_path):
        try:
            good_ids.append(clean(raw, "squad")["id"])
        except RowError as error:
            reasons.append(str(error))
    assert good_ids == ["2"]
    assert Counter(reasons) == {
        "answers must not be empty": 1,
        "row must be a mapping, got NoneType": 2,
        "row must be a mapping, got int": 1,
        "question is missing: the row has title, context, id": 1,
        "question is missing: the row has context": 1,
    }


def test_of_several_configurations_one_is_chosen(tmp_path: Path) -> None:
    def row(name: str) -> dict[str, Any]:
        context = [["T", ["One."]]]
        return {
            "_id": name,
            "question": "q",
            "answer": "yes",
            "context": context,
            "supporting_facts": [["T", 0]],
        }

    for name in ("distractor", "fullwiki"):
        (tmp_path / name).mkdir()
        for split in ("train", "validation"):
            (tmp_path / name / f"hotpot_{split}.json").write_text(
                json.dumps([row(f"{name} {split}")])
            )
    for split in ("train", "validation"):
        with pytest.raises(DataError, match=rf"must hold one configuration of hotpotqa, its {split} files are of "
                           r"distractor and fullwiki; choose one by --set data\.config=distractor, or name its directory"):  # fmt: skip
            ids(tmp_path, split, "hotpotqa")
    assert ids(tmp_path, dataset="hotpotqa", config="fullwiki") == ["fullwiki train"]
    assert ids(tmp_path / "distractor", "validation", "hotpotqa") == ["distractor validation"]
    with pytest.raises(
        DataError,
        match=r"data\.config must be a word of a file's name or folder in .*, got full for dis",
    ):
        ids(tmp_path, dataset="hotpotqa", config="full")


def test_official_names_tell_configurations_apart_and_share_the_training_rows(
    tmp_path: Path,
) -> None:
    row = {"question": "q", "answer": "yes", "context": [["T", ["One."]]]}
    for name in ("train_v1.1", "dev_distractor_v1", "dev_fullwiki_v1"):
        (tmp_path / f"hotpot_{name}.json").write_text(json.dumps([row | {"_id": name}]))
    assert ids(tmp_path, dataset="hotpotqa") == ["train_v1.1"]
    with pytest.raises(DataError, match="its validation files are of distractor and fullwiki"):
        ids(tmp_path, "validation", "hotpotqa")
    assert ids(tmp_path, dataset="hotpotqa", config="distractor") == ["train_v1.1"]
    assert ids(tmp_path, "validation", "hotpotqa", config="distractor") == ["dev_distractor_v1"]


def test_folders_with_both_splits_are_configurations_of_a_known_dataset_and_parts_of_your_own(
    tmp_path: Path,
) -> None:
    for folder in ("plain_text", "other"):
        (tmp_path / folder).mkdir()
        for split in ("train", "dev"):
            (tmp_path / folder / f"{split}.jsonl").write_bytes(lines(ROWS[:1]))
    with pytest.raises(DataError, match="its train files are of other and plain_text"):
        ids(tmp_path)
    assert ids(tmp_path, config="other") == ["0"] and ids(tmp_path, dataset="custom") == ["0", "0"]


def test_files_of_one_name_in_two_folders_are_two_files(tmp_path: Path) -> None:
    """Their keys differ, and stay when the directory moves; a file that is alone keeps its name for a key."""
    for root in (tmp_path / "here", tmp_path / "there" / "deeper"):
        for folder in ("a", "b"):
            (root / folder).mkdir(parents=True)
            (root / folder / "train.jsonl").write_bytes(lines(ROWS))
        found = pieces(DataConfig(dataset="custom", data_dir=str(root)), "train")
        assert [piece.key for piece in found] == ["a/train.jsonl", "b/train.jsonl"]
        (one,) = pieces(DataConfig(dataset="custom", data_dir=str(root / "a")), "train")
        assert one.key == "train.jsonl"


def test_a_row_group_is_decoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A large one is one piece; small ones go together until a piece has enough rows."""
    monkeypatch.setattr(files, "PIECE_ROWS", 100)
    rows = [row | {"id": str(number)} for number, row in enumerate(ROWS * 125)]
    decoded: Counter[tuple[str, int]] = Counter()
    iterate = pq.ParquetFile.iter_batches

    def counted(self: pq.ParquetFile, *, row_groups: list[int], **named: Any) -> Any:
        decoded.update(row_groups)
        return iterate(self, row_groups=row_groups, **named)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", counted)
    for size, groups, parts in ((1_000, 1, 1), (40, 25, 9), (300, 4, 4)):
        decoded.clear()
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "train.parquet", row_group_size=size)
        assert ids(tmp_path) == [row["id"] for row in rows]
        assert decoded == Counter(range(groups))
        assert len(pieces(DataConfig(dataset="squad", data_dir=str(tmp_path)), "train")) == parts
