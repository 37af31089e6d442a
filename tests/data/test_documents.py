"""A wire remembers which documents it has trained on, and no later stage is compared on them."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from latentwire import exports
from latentwire.config import RunConfig, SweepConfig
from latentwire.config.resolve import ConfigError, with_values
from latentwire.data import cleaning, documents, shards
from latentwire.data.documents import FILE, UNKNOWN, TrainedOn
from latentwire.dataset import clean
from latentwire.distributed import sweep_files
from latentwire.exports import CheckpointError
from latentwire.model import LatentWire, load_wire
from latentwire.training.local import train_here
from tests.conftest import shard_table, wire_of

FRACTIONS = (0.1, 0.3)
SHORT = {"training.max_steps": 1, "evaluation.max_answer_tokens": 1}


def of_documents(run: RunConfig, count: int = 120) -> pa.Table:
    """Rows of 40 documents, three each."""
    table = shard_table(run, count)
    names = pa.array([f"article {number // 3}" for number in range(count)])
    return table.set_column(table.column_names.index("document"), "document", names)


def splits(run: RunConfig, table: pa.Table, folder: Path) -> dict[shards.ShardSplit, Path]:
    """Complete shards as the pipeline parts rows, made without Ray; validation rows are of other documents."""
    found: dict[shards.ShardSplit, Path] = {}
    for split in shards.SPLITS:
        rows = [row | {"reason": ""} for row in table.to_pylist()]
        keep = [number for number, row in enumerate(rows) if cleaning.belongs(row, run, split)]
        part = table.take(keep[:4] if split == "validation" else keep)
        found[split] = folder / split
        found[split].mkdir(parents=True)
        pq.write_table(part, found[split] / "0.parquet")
        manifest = {"key": split, "rows": part.num_rows, "files": ["0.parquet"]}
        (found[split] / "manifest.json").write_text(json.dumps(manifest))
    return found


def names_of(path: Path) -> set[str]:
    return set(shards.read_table(path, ["document"])["document"].to_pylist())


def stage(
    run: RunConfig, table: pa.Table, folder: Path, start: Path | None = None, **data: float
) -> Path:
    """A run of one step; returns its best checkpoint."""
    values = SHORT | {f"data.{name}": value for name, value in data.items()}
    values |= {} if start is None else {"training.init_from": str(start)}
    run = with_values(run, values)
    return Path(
        str(train_here(wire_of(run), splits(run, table, folder / "shards"), folder / "run"))
    )


def test_a_stage_that_would_be_compared_on_what_an_earlier_one_trained_on_is_refused(
    run: RunConfig, tmp_path: Path
) -> None:
    table = of_documents(run)
    small, large = FRACTIONS
    first = stage(run, table, tmp_path / "first", dev_fraction=small)
    trained = names_of(tmp_path / "first" / "shards" / "train")
    held_out = names_of(tmp_path / "first" / "shards" / "dev")
    record = documents.read(first, exports.read_manifest(first))
    assert set(record.hashes) == set(documents.document_hashes(trained)) and record.known
    assert record.rows_of(sorted(held_out)) == 0 and record.rows_of(sorted(trained)) == len(trained)
    rule = (
        rf"development rows must be of documents that the wire of {first} has not trained on, got \d+ of \d+ that are of \d+ it "
        rf"has \(article .*\); set data\.seed=0 and data\.dev_fraction to at most {small}"
    )
    with pytest.raises(ConfigError, match=rule):
        stage(run, table, tmp_path / "larger", first, dev_fraction=large)
    assert not (tmp_path / "larger" / "run").exists()
    with pytest.raises(ConfigError, match=rule):  # another seed holds out others
        stage(run, table, tmp_path / "other", first, dev_fraction=small, seed=3)
    # A part of what was held out is not trained on, and the third stage still knows of the first.
    second = stage(run, table, tmp_path / "second", first, dev_fraction=small / 2)
    third = stage(run, table, tmp_path / "third", second, dev_fraction=small / 2)
    record = documents.read(third, exports.read_manifest(third))
    own = names_of(tmp_path / "second" / "shards" / "train")
    assert set(record.hashes) == set(documents.document_hashes(trained | own))
    assert [s["dev_fraction"] for s in record.stages] == [small, small / 2]
    with pytest.raises(ConfigError, match=rf"dev_fraction to at most {small / 2}"):
        stage(run, table, tmp_path / "fourth", third, dev_fraction=small)
    # Other data of other documents is free to be parted anew.
    elsewhere = table.set_column(
        table.column_names.index("document"), "document", pa.array(["x"] * 60 + ["y"] * 60)
    )
    names = pa.array([f"page {number // 3}" for number in range(120)])
    elsewhere = table.set_column(table.column_names.index("document"), "document", names)
    stage(run, elsewhere, tmp_path / "elsewhere", third, dev_fraction=large)


def test_a_receiver_that_joins_is_held_to_the_same(run: RunConfig, tmp_path: Path) -> None:
    table, (small, large) = of_documents(run), FRACTIONS
    first = stage(run, table, tmp_path / "first", dev_fraction=small)
    export = exports.save(tmp_path / "best", load_wire(first)[0], {}, {})
    joined = with_values(run, {"training.train_only": ["qwen"], "training.init_from": str(export)})
    with pytest.raises(ConfigError, match=r"development rows must be of documents"):
        stage(joined, table, tmp_path / "joined", export, dev_fraction=large)
    stage(joined, table, tmp_path / "fine", export, dev_fraction=small)


def test_a_sweep_is_held_to_the_same_before_it_starts(run: RunConfig, tmp_path: Path) -> None:
    table, (small, large) = of_documents(run), FRACTIONS
    first = stage(run, table, tmp_path / "first", dev_fraction=small)
    values = {"data.shard_dir": str(tmp_path / "shards"), "training.init_from": str(first)}

    def prepared(fraction: float) -> dict[str, sweep_files.Files]:
        """The files of a sweep whose shards are there already."""
        own = with_values(run, values | {"data.dev_fraction": fraction})
        for split, path in splits(own, table, tmp_path / f"parts-{fraction}").items():
            named = Path(str(shards.shard_path(own, split)))
            if not named.exists():  # validation rows hang on no share
                named.parent.mkdir(exist_ok=True)
                path.rename(named)
        return sweep_files.prepare(SweepConfig(run=own), 0.0)

    with pytest.raises(
        ConfigError, match=rf"development rows must be of .*dev_fraction to at most {small}"
    ):
        prepared(large)
    (files,) = prepared(small).values()
    assert (
        files.shards["train"] / documents.SHARDS_FILE
    ).exists()  # for the workers, which do not read all rows for it


def test_a_wire_of_an_earlier_version_is_begun_with_and_said_to_be_unknown(
    run: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = of_documents(run)
    first = stage(run, table, tmp_path / "first", dev_fraction=0.1)
    manifest = json.loads((first / "manifest.json").read_text())
    del manifest["trained_on"], manifest["files"][FILE]
    (first / "manifest.json").write_text(json.dumps(manifest))
    (first / FILE).unlink()
    assert documents.read(first, manifest) is UNKNOWN
    capsys.readouterr()
    second = stage(run, table, tmp_path / "second", first, dev_fraction=0.3)
    told = capsys.readouterr().out
    assert (
        f"started from {first}: an earlier version did not record what it trained on" in told
        and "unknown" in told
    )
    # What comes after knows of itself, and that it does not know all.
    record = documents.read(second, exports.read_manifest(second))
    assert not record.known and len(record.hashes) == len(
        names_of(tmp_path / "second" / "shards" / "train")
    )
    stage(run, table, tmp_path / "third", second, dev_fraction=0.3)
    assert "an earlier version did not record" in capsys.readouterr().out


def test_the_record_goes_where_the_wire_goes(run: RunConfig, tmp_path: Path) -> None:
    first = stage(run, of_documents(run), tmp_path / "first", dev_fraction=0.1)
    loaded = LatentWire.from_pretrained(first)
    loaded.save_pretrained(tmp_path / "again")
    one, other = (
        documents.read(path, exports.read_manifest(path)) for path in (first, tmp_path / "again")
    )
    assert (
        np.array_equal(one.hashes, other.hashes) and one.stages == other.stages and len(one.hashes)
    )
    assert exports.read_manifest(first)["trained_on"] == one.entry and one.entry[
        "documents"
    ] == len(one.hashes)
    assert FILE in exports.FILES  # or the Hub would not hand it out
    (tmp_path / "again" / FILE).write_bytes(b"")
    with pytest.raises(CheckpointError, match=rf"{FILE} must hash to"):
        exports.read_manifest(tmp_path / "again")


def test_a_resumed_run_is_not_another_stage(run: RunConfig, tmp_path: Path) -> None:
    table = of_documents(run)
    base = stage(run, table, tmp_path / "base", dev_fraction=0.1)
    own = with_values(run, SHORT | {"data.dev_fraction": 0.1, "training.init_from": str(base)})
    paths = splits(own, table, tmp_path / "shards")
    train_here(wire_of(own), paths, tmp_path / "run")
    longer = with_values(own, {"training.max_steps": 2})
    last = Path(str(train_here(wire_of(longer), paths, tmp_path / "run")))
    assert len(documents.read(last, exports.read_manifest(last)).stages) == 1


def test_hashes_are_kept_beside_the_shards_and_are_of_distinct_documents(
    run: RunConfig, tmp_path: Path
) -> None:
    path = splits(run, of_documents(run), tmp_path)["train"]
    found = documents.of_shards(path)
    assert (
        list(found) == sorted(set(documents.document_hashes(names_of(path))))
        and found.dtype == np.int64
    )
    (path / "0.parquet").unlink()
    assert np.array_equal(documents.of_shards(path), found)
    assert documents.document_hashes(["a"]).tolist() != documents.document_hashes(["b"]).tolist()
    assert len(documents.document_hashes([f"{n}" for n in range(1000)])) == 1000
    twice = TrainedOn().with_stage(run, path).with_stage(run, path)
    assert len(twice.stages) == 1 and np.array_equal(twice.hashes, found)


def test_a_text_is_of_the_same_document_with_questions_and_without() -> None:
    squad = {
        "id": "1",
        "title": "Ada",
        "context": "Ada was here.",
        "question": "Who?",
        "answers": {"text": ["Ada"]},
    }
    hotpot = {
        "_id": "a", "question": "q", "answer": "yes", "context": [["T", ["x"]], ["U", ["y"]]],
        "supporting_facts": [["U", 0], ["T", 0], ["U", 1]],
    }  # fmt: skip
    untitled = {"context": "Ada was here.", "question": "Who?", "answers": ["Ada"]}
    for row, dataset in ((squad, "squad"), (hotpot, "hotpotqa"), (untitled, "custom")):
        assert clean(row, "text")["document"] == clean(row, dataset)["document"]
