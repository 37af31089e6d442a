"""Shards through Ray Data: whole or absent, split by document, with a reason for every row left out."""

import hashlib
import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from latentwire.config import RunConfig
from latentwire.config.resolve import ConfigError, with_values
from latentwire.data import pipeline, shards, streams
from latentwire.data.sources import DataError

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def _ray() -> Iterator[None]:
    import ray

    ray.init(num_cpus=2, log_to_driver=False, include_dashboard=False)
    yield
    ray.shutdown()


def good(number: int) -> dict:
    return {
        "id": str(number), "title": f"article {number // 5}", "context": f"Ada lives in house {number}.",
        "question": "Where?", "answers": {"text": [f"house {number}"], "answer_start": [13]},
    }  # fmt: skip


@pytest.fixture
def own(tmp_path: Path) -> RunConfig:
    """200 good rows of 40 documents, and five bad ones."""
    folder = tmp_path / "data"
    folder.mkdir()
    lines = [json.dumps(good(number)).encode() for number in range(200)]
    lines += [
        b"{broken",
        b"\xff\xfe",
        json.dumps(good(1) | {"answers": []}).encode(),
        json.dumps(good(2) | {"context": ""}).encode(),
    ]
    lines += [json.dumps(good(3) | {"context": "x" * 5000}).encode()]
    (folder / "train.jsonl").write_bytes(b"\n".join(lines))
    (folder / "validation.jsonl").write_bytes(b"\n".join(lines[:10]))
    values = {
        "data.dataset": "custom", "data.data_dir": str(folder), "data.shard_dir": str(tmp_path / "shards"),
        "data.samples": 0, "data.dev_fraction": 0.2, "data.shard_mib": 0.005,
    }  # fmt: skip
    return with_values(RunConfig(), values)


def test_a_file_that_cannot_be_read_is_told_in_one_line(
    own: RunConfig, capfd: pytest.CaptureFixture[str]
) -> None:
    (Path(own.data.data_dir) / "train.json").write_text("[{broken")
    with pytest.raises(DataError, match=r"train\.json must be JSON in UTF-8"):
        pipeline.ensure_shards(own, "train")
    told = "".join(capfd.readouterr())
    assert "Traceback" not in told and "internal code" not in told


def test_rows_are_split_by_document_and_bad_ones_kept_aside(
    own: RunConfig, capfd: pytest.CaptureFixture[str]
) -> None:
    train, dev = (pipeline.ensure_shards(own, split) for split in ("train", "dev"))
    rows, held_out = shards.read_table(train).to_pylist(), shards.read_table(dev).to_pylist()
    assert len(rows) + len(held_out) == 200 and held_out
    assert {row["document"] for row in rows}.isdisjoint(row["document"] for row in held_out)
    assert [row["id"] for row in rows] != sorted((row["id"] for row in rows), key=int)  # shuffled
    rejects = [json.loads(line) for line in (train / "rejects.jsonl").read_text().splitlines()]
    reasons = sorted(reject["reason"].split(",")[0].split(":")[0] for reject in rejects)
    assert reasons == [
        "answers must not be empty", "context must not be empty", "row must be JSON", "row must be UTF-8",
        "sender text must be ≤ 4096 bytes",
    ]  # fmt: skip
    assert "5 rejected" in capfd.readouterr().out
    manifest = shards.read_manifest(train)
    assert manifest["rows"] == len(rows) and len(manifest["files"]) > 1
    for name, builder in shards.builders(own).items():
        first = rows[0]
        ids = builder.tokenize([first["context"]], [first["question"]], [first["answers"][0]])
        assert [first[f"{name}_{piece}"] for piece in ids] == [values[0] for values in ids.values()]


def test_long_rows_are_cut_and_counted_where_that_is_asked_for(own: RunConfig) -> None:
    cut = with_values(own, {"data.overflow": "truncate", "data.max_context_bytes": 21})
    path = pipeline.ensure_shards(cut, "train")
    contexts = shards.read_table(path).column("context").to_pylist()
    assert max(len(context.encode()) for context in contexts) == 21
    original = [good(number)["context"] for number in range(200)]
    manifest = shards.read_manifest(path)
    assert manifest["truncated"] == sum(context not in original for context in contexts) > 0
    assert not any("bytes" in reason for reason in manifest["rejects"])


def test_a_text_that_several_rows_hold_is_one_row(own: RunConfig, tmp_path: Path) -> None:
    rows = [
        {"context": f"text {number % 7}", "question": f"q{number}?", "answers": ["a"]}
        for number in range(30)
    ]
    (tmp_path / "data" / "validation.jsonl").write_text("\n".join(map(json.dumps, rows)))
    texts = with_values(own, {"data.dataset": "text", "losses.bundle": "pretrain"})
    table = shards.read_table(pipeline.ensure_shards(texts, "validation"))
    assert sorted(table["context"].to_pylist()) == [f"text {number}" for number in range(7)]


def test_complete_shards_are_reused_and_half_written_ones_never(
    own: RunConfig, capfd: pytest.CaptureFixture[str]
) -> None:
    path = pipeline.ensure_shards(own, "validation")
    stamp = (path / "manifest.json").stat().st_mtime_ns
    assert pipeline.ensure_shards(own, "validation") == path
    assert (path / "manifest.json").stat().st_mtime_ns == stamp
    assert "reused" in capfd.readouterr().out
    # A crash before the manifest leaves a directory that nobody trusts.
    (path / "manifest.json").unlink()
    with pytest.raises(DataError, match="must be complete"):
        shards.read_manifest(path)
    assert shards.read_table(pipeline.ensure_shards(own, "validation")).num_rows == 10


def test_a_run_that_was_killed_goes_on_with_the_next_file(
    own: RunConfig, capfd: pytest.CaptureFixture[str]
) -> None:
    path = pipeline.ensure_shards(own, "train")
    manifest, rejects = shards.read_manifest(path), (path / "rejects.jsonl").read_text()
    assert manifest["sha256"] == [
        hashlib.sha256((path / name).read_bytes()).hexdigest() for name in manifest["files"]
    ]
    kept, lost = manifest["files"][0], manifest["files"][1]
    stamp = (path / kept).stat().st_mtime_ns
    for name in ("manifest.json", "rejects.jsonl", lost):
        (path / name).unlink()
    (path / f".{lost}.part-dead").write_bytes(b"half")
    pipeline.ensure_shards(own, "train")
    assert (
        shards.read_manifest(path) == manifest and (path / "rejects.jsonl").read_text() == rejects
    )
    assert (path / kept).stat().st_mtime_ns == stamp
    count = len(manifest["files"])
    assert f"{count - 1} of {count} files were there, going on" in capfd.readouterr().out


def test_contexts_stand_among_others_of_their_documents_where_that_is_asked_for(
    own: RunConfig,
) -> None:
    among = with_values(own, {"data.distractors": [2, 4]})
    path = pipeline.ensure_shards(among, "train")
    rows = shards.read_table(path).to_pylist()
    for row in rows:
        lines, (answer,) = row["context"].split("\n"), row["answers"]
        assert 3 <= len(lines) <= 5 and f"Ada lives in {answer}." in lines
        houses = {int(line.rstrip(".").split()[-1]) // 5 for line in lines}
        assert {f"article {house}" for house in houses} == {row["document"]}
    alone = shards.read_table(pipeline.ensure_shards(own, "train"))
    assert [row["id"] for row in rows] == alone["id"].to_pylist()
    one_each = with_values(own, {"data.distractors": [1, 1], "data.dataset": "custom"})
    lines = [json.dumps(good(number) | {"title": f"t{number}"}) for number in range(40)]
    (Path(own.data.data_dir) / "train.jsonl").write_text("\n".join(lines))
    with pytest.raises(DataError, match="needs documents of several paragraphs"):
        pipeline.ensure_shards(one_each, "train")


def test_a_manifest_tells_lengths(own: RunConfig) -> None:
    path = pipeline.ensure_shards(own, "train")
    manifest, table = shards.read_manifest(path), shards.read_table(path)
    assert sum(manifest["file_rows"]) == manifest["rows"] == table.num_rows
    edges, lengths = manifest["lengths"]["edges"], table["llama_context_ids"].to_pylist()
    for start, end, count in zip(
        edges, [*edges[1:], 2**40], manifest["lengths"]["llama_context_ids"], strict=True
    ):
        assert count == sum(start <= len(row) < end for row in lengths)


def test_training_shards_hold_the_encoders_ids(own: RunConfig) -> None:
    lm = with_values(
        own, {"encoder.kind": "lm", "encoder.model": "receiver:llama", "encoder.split": "lines"}
    )
    table = shards.read_table(pipeline.ensure_shards(lm, "train"))
    expected = [[ids] for ids in table["llama_context_ids"].to_pylist()]
    assert table["encoder_ids"].to_pylist() == expected
    assert "encoder_ids" not in shards.read_table(pipeline.ensure_shards(lm, "dev")).column_names
    assert "context" not in streams.training_columns(lm) and "context" in streams.training_columns(
        own
    )


def test_rows_of_one_context_stand_together_where_that_is_asked_for(own: RunConfig) -> None:
    lines = [good(number) for number in range(200)]
    for line in lines:
        line["context"] = f"Houses of street {int(line['id']) // 4}."
    (Path(own.data.data_dir) / "train.jsonl").write_text(
        "\n".join(map(json.dumps, lines[::2] + lines[1::2]))
    )
    together = with_values(own, {"training.questions_together": True})
    path = pipeline.ensure_shards(together, "train")
    contexts = shards.read_table(path)["context"].to_pylist()
    runs = [context for context, _ in itertools.groupby(contexts)]
    assert len(runs) == len(set(runs)) < len(contexts) and runs != sorted(runs)
    assert len(shards.read_manifest(path)["files"]) > 1
    assert streams.training_columns(together) == [
        *streams.training_columns(own)[:-2],
        "sender_hash",
        "context",
        "question",
    ]
    asked_more = with_values(own, {"data.toy_questions": 2})  # which tells of training rows alone
    assert shards.shard_path(asked_more, "validation") == shards.shard_path(own, "validation")
    apart = pipeline.ensure_shards(own, "train")
    assert apart != path and sorted(shards.read_table(apart)["id"].to_pylist()) == sorted(
        shards.read_table(path)["id"].to_pylist()
    )
    assert shards.shard_path(together, "dev") == shards.shard_path(own, "dev")


def test_long_texts_are_parted_where_that_is_asked_for(own: RunConfig, tmp_path: Path) -> None:
    text = " ".join(f"word{number}" for number in range(40))
    (tmp_path / "data" / "validation.jsonl").write_text(
        json.dumps({"text": text}) + "\n" + json.dumps({"text": "short"})
    )
    values = {
        "data.dataset": "text",
        "losses.bundle": "pretrain",
        "data.overflow": "chunk",
        "data.max_context_bytes": 50,
    }
    rows = shards.read_table(
        pipeline.ensure_shards(with_values(own, values), "validation")
    ).to_pylist()
    long = sorted(
        (row for row in rows if row["context"] != "short"),
        key=lambda row: int(row["id"].split("-")[1]),
    )
    assert (
        "".join(row["context"] for row in long) == text
        and max(len(row["context"]) for row in long) <= 50
    )
    with pytest.raises(ConfigError, match="overflow chunk needs dataset text"):
        with_values(own, {"data.overflow": "chunk"})


def test_the_name_changes_with_what_made_the_shards(own: RunConfig) -> None:
    base = shards.shard_path(own, "train")
    for values in (
        {"prompt.anchor": "A: "},
        {"data.send": "prompt"},
        {"data.seed": 1},
        {"receivers.0.bos": "no"},
    ):
        assert shards.shard_path(with_values(own, values), "train") != base
    for values in (
        {"data.dev_samples": 7},
        {"training.seed": 3},
        {"data.shard_dir": own.data.shard_dir},
    ):
        assert shards.shard_path(with_values(own, values), "train") == base
    other_parts = with_values(own, {"data.dev_fraction": 0.3})  # of the training rows alone
    assert shards.shard_path(other_parts, "validation") == shards.shard_path(own, "validation")
    assert shards.shard_path(other_parts, "train") != base


def test_validation_rows_that_were_read_can_be_passed_over(
    own: RunConfig, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = Path(own.data.data_dir or "")
    (folder / "validation.jsonl").write_text(
        "\n".join(json.dumps(good(number)) for number in range(50))
    )

    def ids(**values: int) -> list[str]:
        path = pipeline.ensure_shards(
            with_values(own, {f"data.validation_{k}": v for k, v in values.items()}), "validation"
        )
        return [str(name) for name in shards.read_table(path)["id"].to_pylist()]

    whole = ids(samples=0)
    assert len(whole) == 50 and ids(samples=20) == whole[:20]
    assert (
        "30 further rows of the split are beyond these; data.validation_skip=20 takes them"
        in capfd.readouterr().out
    )
    assert ids(samples=20, skip=20) == whole[20:40] and ids(samples=0, skip=35) == whole[35:]
    with pytest.raises(
        DataError,
        match=r"got none \(data\.validation_skip 50 passes over all 50 of them; lower it\)",
    ):
        ids(skip=50)
    skipping = with_values(own, {"data.validation_skip": 20})
    assert shards.shard_path(skipping, "train") == shards.shard_path(own, "train")
    assert (
        "validation_skip" not in shards.shard_key(own, "validation")[1]["data"]
    )  # older shards keep their names


def test_a_source_of_bad_rows_only_is_an_error(own: RunConfig, tmp_path: Path) -> None:
    (tmp_path / "data" / "validation.jsonl").write_bytes(b"{broken\n")
    with pytest.raises(
        DataError, match=r"must leave at least one row, got none \(1 × row must be JSON"
    ):
        pipeline.ensure_shards(own, "validation")
    assert not shards.complete(shards.shard_path(own, "validation"))
    (tmp_path / "data" / "validation.jsonl").write_bytes(b"")
    with pytest.raises(
        DataError, match=r"must leave at least one row, got none \(the source is empty\)"
    ):
        pipeline.ensure_shards(own, "validation")


def test_a_development_share_that_no_document_falls_into_is_an_error(own: RunConfig) -> None:
    with pytest.raises(
        DataError, match=r"custom dev must leave .* is in data\.dev_fraction 1e-06; raise it"
    ):
        pipeline.ensure_shards(with_values(own, {"data.dev_fraction": 1e-6}), "dev")


@pytest.mark.parametrize("dataset", ["squad", "hotpotqa"])
def test_real_data(real_data: Path, tmp_path: Path, dataset: str) -> None:
    values = {
        "data.dataset": dataset, "data.data_dir": str(real_data / dataset), "data.shard_dir": str(tmp_path),
        "data.validation_samples": 50, "data.max_context_bytes": 20_000,
    }  # fmt: skip
    run = with_values(RunConfig(), values)
    rows = shards.read_table(pipeline.ensure_shards(run, "validation"))
    assert rows.num_rows == 50
    assert all(rows.column("llama_context_ids").to_pylist())
