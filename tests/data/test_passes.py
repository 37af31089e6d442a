"""The two passes over rows, step by step and without Ray: what each keeps, cuts, leaves out and says of it."""

import hashlib
import json
import logging
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from latentwire.config import RunConfig
from latentwire.config.resolve import with_values
from latentwire.data import cleaning, pipeline, shards, sources, token_columns
from latentwire.data.distractors import Distractors
from latentwire.data.sources import DataError, RowError

OVERFLOWS = ("reject", "chunk", "truncate")


def good(number: int, **other: Any) -> dict[str, Any]:
    return {
        "id": str(number), "title": f"article {number // 5}", "context": f"Ada lives in house {number}.",
        "question": "Where?", "answers": {"text": [f"house {number}"], "answer_start": [13]},
    } | other  # fmt: skip


def run_on(folder: Path, rows: list[dict[str, Any] | bytes], **values: Any) -> RunConfig:
    """A run whose training rows are these."""
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    (folder / "train.jsonl").write_bytes(b"\n".join(lines))
    (folder / "validation.jsonl").write_bytes(b"\n".join(lines))
    knobs = {name.replace("__", "."): value for name, value in values.items()}
    own = {
        "data.dataset": "custom",
        "data.data_dir": str(folder),
        "data.shard_dir": str(folder / "shards"),
    }
    return with_values(RunConfig(), own | knobs)


def tables(run: RunConfig, split: shards.ShardSplit) -> list[pa.Table]:
    """What the first pass makes of a split."""
    pieces = sources.pieces(run.data, shards.source_of(split))
    batches = [{name: np.array([value]) for name, value in vars(piece).items()} for piece in pieces]
    return [table for batch in batches for table in cleaning.read_and_clean(batch, run, split)]


def rows(run: RunConfig, split: shards.ShardSplit) -> list[dict[str, Any]]:
    return [row for table in tables(run, split) for row in table.to_pylist()]


# ---------------------------------------------------------------------------------------------------------- first pass


def test_documents_are_dealt_out_whole_and_by_seed(tmp_path: Path) -> None:
    run = run_on(tmp_path, [good(number) for number in range(1_000)], data__dev_fraction=0.3)
    train, dev = rows(run, "train"), rows(run, "dev")
    assert sorted(int(row["id"]) for row in train + dev) == list(range(1_000))
    held = {row["document"] for row in dev}
    assert held.isdisjoint(row["document"] for row in train)
    assert 0.3 * 200 - 25 < len(held) < 0.3 * 200 + 25  # four deviations of a draw of 200 documents
    other = {row["document"] for row in rows(with_values(run, {"data.seed": 5}), "dev")}
    assert held != other and len(held & other) < len(held)
    assert len(rows(run, "validation")) == 1_000  # of the validation files, all


def test_what_is_wrong_with_a_row_is_told_once(tmp_path: Path) -> None:
    wrong = [b"{broken", b"\xff" * 600, good(3, context="")]
    run = run_on(tmp_path, [good(0), *wrong, good(4)], data__dev_fraction=0.5)
    told = [row for row in rows(run, "train") if row["reason"]]
    assert [row["reason"].split(",")[0] for row in told] == [
        "row must be JSON", "row must be UTF-8", "context must not be empty",
    ]  # fmt: skip
    assert told[0]["context"].strip() == "{broken" and told[1]["context"] == "\ufffd" * 500
    assert told[2]["context"].startswith("{") and "Where?" in told[2]["context"]
    places = [row["id"].rpartition(" row ") for row in told]
    assert {place[0] for place in places} == {"train.jsonl"}
    assert not any(row["reason"] for row in rows(run, "dev"))
    assert sum(bool(row["reason"]) for row in rows(run, "validation")) == 3


def test_blocks_are_bounded_and_hold_every_row_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cleaning, "BLOCK_ROWS", 7)
    run = run_on(tmp_path, [good(number) for number in range(20)])
    made = tables(run, "validation")
    assert [table.num_rows for table in made] == [7, 7, 6] and all(
        table.schema == cleaning.CLEAN for table in made
    )
    assert [row["id"] for table in made for row in table.to_pylist()] == [
        str(number) for number in range(20)
    ]


def test_rows_are_shuffled_by_numbers_that_a_sort_can_hold(tmp_path: Path) -> None:
    run = run_on(tmp_path, [good(number) for number in range(400)], data__dev_fraction=0.01)
    order = np.array([row["order"] for row in rows(run, "validation")])
    assert len(np.unique(order)) == 400 and order.min() >= 0 and order.max() < 2**52
    assert (
        abs(order.mean() / 2**52 - 0.5) < 0.07 and order.max() > 0.95 * 2**52
    )  # as if drawn evenly
    assert abs(np.corrcoef(order, np.arange(400))[0, 1]) < 0.2
    again = [row["order"] for row in rows(with_values(run, {"data.seed": 9}), "validation")]
    assert not set(again) & set(order.tolist())


def test_rows_of_one_context_stand_together_where_questions_do(tmp_path: Path) -> None:
    asked = [
        good(number, context=f"Ada lives in house {number % 40}.", id=f"r{number}")
        for number in range(200)
    ]
    run = run_on(tmp_path, asked, training__questions_together=True, data__dev_fraction=0.01)
    found = sorted(rows(run, "train"), key=lambda row: row["order"])
    contexts = [row["context"] for row in found]
    changes = sum(one != other for one, other in pairwise(contexts))
    assert changes == len(set(contexts)) - 1  # each context once
    assert len({row["order"] for row in found}) == len(found)
    within = [int(row["id"][1:]) for row in found if row["context"] == contexts[0]]
    assert contexts[0] != asked[0]["context"] or within != sorted(within)
    apart = [
        row["context"] for row in sorted(rows(run, "validation"), key=lambda row: row["order"])
    ]
    assert sum(one != other for one, other in pairwise(apart)) > 150  # only training rows do


def test_a_text_has_one_place_whatever_row_holds_it(tmp_path: Path) -> None:
    texts = [
        {"context": f"text {number % 6}", "question": "?", "answers": ["a"]} for number in range(30)
    ]
    run = run_on(tmp_path, texts, data__dataset="text", losses__bundle="pretrain")
    found = rows(run, "validation")
    places: dict[str, set[int]] = {}
    for row in found:
        places.setdefault(row["context"], set()).add(row["order"])
    assert len(found) == 30 and [len(place) for place in places.values()] == [1] * 6
    assert len(set.union(*places.values())) == 6


def fitted(run: RunConfig, context: str, question: str = "Where?") -> list[dict[str, Any]]:
    row = {"id": "r", "document": "d", "context": context, "question": question, "answers": ["a"]}
    return list(cleaning._fitted(row, run.data))


def test_a_text_that_just_fits_stays_whole_and_a_longer_one_goes_by_the_rule(
    tmp_path: Path,
) -> None:
    just, over = "ä" * 8 + "bcde", "ä" * 8 + "bcdef"  # 20 and 21 bytes
    texts = {"data__dataset": "text", "losses__bundle": "pretrain", "data__max_context_bytes": 20}
    runs = {
        overflow: run_on(tmp_path, [good(0)], **texts, data__overflow=overflow)
        for overflow in OVERFLOWS
    }
    for run in runs.values():
        assert fitted(run, just) == [
            {
                "id": "r",
                "document": "d",
                "context": just,
                "question": "Where?",
                "answers": ["a"],
                "truncated": False,
            }
        ]
    (cut,) = fitted(runs["truncate"], over)
    assert cut["context"] == just and cut["truncated"] is True
    (cut,) = fitted(runs["truncate"], "b" * 19 + "ä")
    assert cut["context"] == "b" * 19  # between characters
    with pytest.raises(RowError, match=r"≤ 20 bytes, data\.max_context_bytes: got 21"):
        fitted(runs["reject"], over)
    parts = fitted(runs["chunk"], "one two three four five six seven")
    assert [part["id"] for part in parts] == [
        f"r-{number}" for number in range(len(parts))
    ] and len(parts) > 1
    assert "".join(part["context"] for part in parts) == "one two three four five six seven"
    assert not any(part["truncated"] for part in parts) and all(
        len(part["context"]) <= 20 for part in parts
    )


def test_the_question_takes_its_room_where_it_is_sent_too(tmp_path: Path) -> None:
    overhead = len("\nQuestion: ") + 6
    run = run_on(
        tmp_path,
        [good(0)],
        data__overflow="truncate",
        data__send="prompt",
        data__max_context_bytes=overhead + 5,
    )
    (cut,) = fitted(run, "abcdefgh")
    assert cut["context"] == "abcde"
    (cut,) = fitted(with_values(run, {"data.max_context_bytes": overhead + 1}), "abcdefgh")
    assert cut["context"] == "a"
    with pytest.raises(RowError, match=f"question must fit {overhead} bytes: got {overhead + 8}"):
        fitted(with_values(run, {"data.max_context_bytes": overhead}), "abcdefgh")


# --------------------------------------------------------------------------------------------------------- second pass


def test_a_row_belongs_to_the_last_shard_that_begins_before_it() -> None:
    first = np.array([10, 20, 30])
    order = np.array([10, 11, 19, 20, 29, 30, 31, 10_000])
    expected = [max(shard for shard in range(3) if first[shard] <= value) for value in order]
    assert pipeline._shard_of(order, first).tolist() == expected


def test_only_good_rows_of_missing_shards_are_chosen() -> None:
    order = [10, 15, 20, 25, 26, 30, 35, 40]
    reason = ["", "bad", "", "", "bad", "", "", ""]
    table = pa.table({"order": order, "reason": reason, "id": [str(value) for value in order]})
    chosen = pipeline._choose(table, np.array([10, 20, 30]), last=35, missing={0, 2})
    assert chosen.column_names == ["order", "id"] and chosen["order"].to_pylist() == [10, 30, 35]


def cleaned(contexts: list[str], answers: list[list[str]], order: list[int]) -> pa.Table:
    """Rows as the second pass gets them."""
    count = len(contexts)
    return pa.table(
        {
            "order": pa.array(order, pa.int64()), "truncated": [number % 2 == 0 for number in range(count)],
            "id": [f"r{number}" for number in range(count)], "document": ["d"] * count, "context": contexts,
            "question": [f"Where is {number}?" for number in range(count)], "answers": answers,
        }
    )  # fmt: skip


def written(
    run: RunConfig,
    table: pa.Table,
    path: Path,
    first: list[int],
    split: shards.ShardSplit = "train",
) -> pa.Table:
    held = np.bincount(
        pipeline._shard_of(table["order"].to_numpy(), np.array(first)), minlength=len(first)
    )
    return pipeline._write(table, run, split, path, np.array(first), held)


def test_a_shard_holds_its_rows_in_order_with_every_receivers_ids(tmp_path: Path) -> None:
    run = run_on(tmp_path, [good(0)], training__questions_together=True)
    contexts = ["Ada lives in Oslo.", "Bo lives in Bergen with Ärzte.", "Ada lives in Oslo."]
    table = cleaned(contexts, [["Oslo", "in Oslo"], ["Bergen"], ["Oslo"]], order=[27, 21, 24])
    assert written(run, table, tmp_path, [0, 20, 30]).to_pydict() == {"rows": [3]}
    found = pq.read_table(tmp_path / "00001.parquet").to_pylist()
    assert [row["id"] for row in found] == ["r1", "r2", "r0"]
    for name, builder in shards.builders(run).items():
        for row in found:
            ids = builder.tokenize([row["context"]], [row["question"]], [row["answers"][0]])
            assert {f"{name}_{piece}": values[0] for piece, values in ids.items()} == {
                column: row[column] for column in row if column.startswith(name)
            }
    assert [row["sender_bytes"] for row in found] == [31, 18, 18]
    assert found[1]["sender_hash"] == found[2]["sender_hash"] != found[0]["sender_hash"]
    assert "encoder_ids" not in found[0] and "order" not in found[0] and "truncated" not in found[0]
    told = json.loads(pq.read_metadata(tmp_path / "00001.parquet").metadata[pipeline.FOOTER])
    assert (told["rows"], told["truncated"], told["rejects"]) == (3, 2, [])
    assert written(run, table.slice(0, 0), tmp_path, [0]).to_pydict() == {"rows": []}
    with pytest.raises(RuntimeError, match="must hold one shard's rows, got 3 for shard 1 of 4"):
        pipeline._write(table, run, "train", tmp_path, np.array([0, 20, 30]), np.array([0, 4, 0]))


def test_a_shard_holds_the_text_of_all_paragraphs(tmp_path: Path) -> None:
    run = run_on(tmp_path, [good(0)], data__distractors=[1, 1])
    contexts = ["Ada lives in Oslo.", "Bo lives in Bergen."]
    table = cleaned(contexts, [["Oslo"], ["Bergen"]], order=[2, 1])
    around = Distractors(run.data)
    around.add(table)
    held = np.array([2])
    pipeline._write(table, run, "train", tmp_path, np.array([0]), held, around)
    rows = pq.read_table(tmp_path / "00000.parquet").to_pylist()
    assert [set(row["context"].split("\n")) for row in rows] == [set(contexts)] * 2
    assert [row["sender_bytes"] for row in rows] == [len("\n".join(contexts))] * 2


def test_answers_that_merge_with_the_anchor_are_told_and_left_out(tmp_path: Path) -> None:
    run = run_on(tmp_path, [good(0)], prompt__anchor="Answer: Os")
    table = cleaned(["c1", "c2", "c3"], [["lo"], ["!"], []], order=[3, 1, 2])
    assert written(run, table, tmp_path, [0], "validation")["rows"].to_pylist() == [2]
    file = pq.read_table(tmp_path / "00000.parquet")
    assert file["id"].to_pylist() == ["r1", "r2"] and "sender_hash" not in file.column_names
    told = json.loads(pq.read_metadata(tmp_path / "00000.parquet").metadata[pipeline.FOOTER])
    # Of the three, r0 and r2 are truncated, and r0 is left out: one remains.
    assert (told["rows"], told["truncated"]) == (2, 1)
    first = next(iter(shards.builders(run)))
    assert told["rejects"] == [
        {
            "reason": f"anchor and answer must not merge into one token for {first}",
            "id": "r0",
            "context": "c1",
        }
    ]


def test_a_text_is_kept_where_it_stands_first() -> None:
    table = pa.table({"id": ["b", "a", "b", "c", "a"], "place": [0, 1, 2, 3, 4]})
    assert pipeline._once(table)["place"].to_pylist() == [0, 1, 3]


def test_texts_are_kept_once_in_their_shard(tmp_path: Path) -> None:
    run = run_on(tmp_path, [good(0)], data__dataset="text", losses__bundle="pretrain")
    table = cleaned(["t", "t", "u"], [[], [], []], order=[5, 5, 3])
    table = table.set_column(2, "id", pa.array(["t", "t", "u"]))
    assert written(run, table, tmp_path, [0])["rows"].to_pylist() == [2]
    assert pq.read_table(tmp_path / "00000.parquet")["id"].to_pylist() == ["u", "t"]


@pytest.mark.parametrize("ids", [[], [[]], [[], [3, 1], [], [70_000]], [[1], [2, 3]]])
def test_lists_of_ids_are_the_column_that_arrow_makes_of_them(ids: list[list[int]]) -> None:
    column = token_columns.id_lists(ids)
    column.validate(full=True)
    assert column.type == pa.list_(pa.int32()) and column.to_pylist() == ids


def test_lengths_are_counted_by_powers_of_two() -> None:
    sizes = [0, 1, 7, 8, 15, 16, 2**20]
    ids = [[0] * min(size, 20) for size in sizes]
    table = pa.table(
        {
            "sender_bytes": sizes,
            "llama_answer_ids": ids,
            "encoder_ids": [[[1]]] * 7,
            "id": ["a"] * 7,
        }
    )
    found = token_columns.count_lengths(table)
    edges = token_columns.LENGTH_EDGES
    assert found.keys() == {"sender_bytes", "llama_answer_ids"} and list(edges[:4]) == [
        0,
        8,
        16,
        32,
    ]
    for name, values in (("sender_bytes", sizes), ("llama_answer_ids", [len(row) for row in ids])):
        expected = [sum(low <= value < high for value in values) for low, high in pairwise(edges)]
        assert found[name] == expected and sum(expected) == 7


def test_a_manifest_adds_up_what_the_files_say(tmp_path: Path) -> None:
    run = run_on(tmp_path, [good(0)], prompt__anchor="Answer: Os")
    table = cleaned(["c1", "c2", "c3", "c4"], [["lo"], ["!"], ["?"], ["lo"]], order=[1, 2, 11, 12])
    for part in (table.slice(0, 2), table.slice(2)):
        written(run, part, tmp_path, [0, 10], "validation")
    names = ["00000.parquet", "00001.parquet"]
    early = [{"reason": "context must not be empty", "id": "x", "context": "y" * 600}]
    early += [{"reason": "row must be JSON: what", "id": "z", "context": None}]
    manifest = pipeline._manifest(run, "validation", tmp_path, names, early)
    assert (manifest["rows"], manifest["file_rows"], manifest["files"]) == (2, [1, 1], names)
    assert manifest["truncated"] == 1  # r2; r0 is truncated too and left out
    assert (
        list(manifest["rejects"].values()) == [2, 1, 1]
        and "row must be JSON" in manifest["rejects"]
    )
    assert manifest["sha256"] == [
        hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() for name in names
    ]
    assert manifest["key"] == shards.shard_key(run, "validation")[0]
    assert manifest["spec"] == shards.shard_key(run, "validation")[1]
    lengths = manifest["lengths"]
    assert (
        lengths.pop("edges") == token_columns.LENGTH_EDGES[:-1] and lengths["sender_bytes"][0] == 2
    )
    assert {sum(counts) for counts in lengths.values()} == {2}
    lines = [json.loads(line) for line in (tmp_path / "rejects.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == ["x", "z", "r0", "r3"]
    assert [line["row"] for line in lines] == ["y" * 500, "", "c1", "c4"] and lines[0][
        "reason"
    ] == early[0]["reason"]


# -------------------------------------------------------------------------------------------------------- what is said


def test_no_rows_at_all_say_why(tmp_path: Path) -> None:
    run = run_on(tmp_path, [good(0)], data__dev_fraction=0.125)
    rejects = [
        {"reason": f"row must be JSON: {number}", "id": "", "context": ""} for number in range(2)
    ]
    rejects += [{"reason": "context is missing", "id": "", "context": ""}] * 3
    assert pipeline._reasons(rejects) == {"context is missing": 3, "row must be JSON": 2}
    assert list(pipeline._reasons(rejects)) == ["context is missing", "row must be JSON"]
    assert (
        "custom train must leave at least one row, got none (3 × context is missing; 2 × row must be JSON)"
        in str(pipeline._nothing_left(run, "train", rejects, read=5))
    )
    assert "(the source is empty)" in str(pipeline._nothing_left(run, "train", [], read=0))
    assert "is in data.dev_fraction 0.125; raise it" in str(
        pipeline._nothing_left(run, "dev", [], read=0)
    )
    assert "dev_fraction" not in str(pipeline._nothing_left(run, "dev", rejects, read=5))
    assert isinstance(pipeline._nothing_left(run, "dev", [], read=0), DataError)


def test_errors_that_an_entry_point_tells_are_no_news_for_rays_log() -> None:
    def record(error: Exception | None) -> logging.LogRecord:
        told = None if error is None else (type(error), error, None)
        return logging.LogRecord("ray.data", logging.ERROR, "", 0, "", None, told)

    assert pipeline._is_news(record(ValueError("a fault"))) and pipeline._is_news(record(None))
    assert not pipeline._is_news(record(DataError("a file")))
    try:
        raise DataError("a file")
    except DataError:
        assert not pipeline._is_news(record(None))


def test_what_is_made_is_told_and_what_is_there_is_not_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_on(tmp_path, [good(0)], data__dev_samples=64, data__dev_fraction=0.125)
    manifest = {
        "rows": 1_234,
        "truncated": 17,
        "rejects": {"row must be JSON": 2_000, "context is missing": 1},
    }
    asked: list[tuple[str, Path]] = []

    def make(run: RunConfig, split: str, path: Path) -> dict[str, Any]:
        asked.append((split, path))
        return manifest

    monkeypatch.setattr(pipeline, "_make", make)
    assert pipeline.ensure_shards(run, "train") == shards.shard_path(run, "train")
    said = capsys.readouterr().out
    assert (
        "shards train: 1,234 rows (17 truncated), 2,001 rejected (2,000 × row must be JSON, 1 × context"
        in said
    )
    manifest |= {"rows": 63, "rejects": {}}
    pipeline.ensure_shards(run, "dev", tmp_path / "there")
    said = capsys.readouterr().out
    assert (
        "0 rejected (none; see" in said
        and "asks for 64 rows, data.dev_fraction 0.125 of the documents has 63" in said
    )
    manifest |= {"rows": 64}
    for split in ("dev", "train"):
        pipeline.ensure_shards(run, split, tmp_path / "there")
        manifest |= {"rows": 3}
    assert "asks for" not in capsys.readouterr().out
    assert asked[0] == ("train", shards.shard_path(run, "train")) and asked[1] == (
        "dev",
        tmp_path / "there",
    )
    (tmp_path / "manifest.json").write_text('{"rows": 5000}')
    assert pipeline.ensure_shards(run, "dev", tmp_path) == tmp_path and len(asked) == 4
    assert f"shards dev: 5,000 rows, reused from {tmp_path}" in capsys.readouterr().out
